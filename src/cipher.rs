//! What encrypts a connection, without its socket: ciphertext in, ciphertext out. There are two:
//! `tls.rs` and `gss.rs`. What moves the ciphertext is `link.rs`.

use std::fmt::Debug;

use nix::errno::Errno;

use crate::error::Error;

/// What a step of the handshake came to.
#[derive(Debug, PartialEq, Eq)]
pub enum Handshake {
    /// It is finished and the server is who it should be; what is unsent still belongs to it.
    Finished,
    /// It needs more from the server, once what is unsent has been sent.
    NeedsMore,
    /// It has something to send, at the caller's next turn.
    SpeaksNext,
}

/// What decrypting brought.
#[derive(Debug, PartialEq, Eq)]
pub enum Decrypted {
    /// This many bytes.
    Bytes(usize),
    /// The server said that it will send no more.
    Closed,
    /// Nothing until more has been received.
    NeedMore,
}

/// What befell the socket below, which libpq words differently for each encryption.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// The server closed it in the middle of the handshake.
    ClosedInHandshake,
    /// Receiving failed in the middle of the handshake.
    ReceiveInHandshake(Errno),
    /// The server closed it before the request was sent.
    ClosedTooSoon,
    /// The server closed it, and what was sent last never left, for this reason.
    ClosedUnsent(Errno),
    /// Receiving failed.
    Receive(Errno),
}

/// One encrypted connection.
pub trait Cipher: Debug {
    /// Takes in ciphertext.
    fn received(&mut self, ciphertext: &[u8]);

    /// Whether ciphertext was taken in that has not been looked at.
    fn has_unread(&self) -> bool;

    /// Ciphertext that waits to be sent.
    fn unsent(&self) -> &[u8];

    /// Forgets ciphertext that has been sent.
    fn sent(&mut self, length: usize);

    /// Goes on with the handshake.
    fn handshake(&mut self) -> Result<Handshake, Error>;

    /// Encrypts; the ciphertext is then unsent.
    fn encrypt(&mut self, plaintext: &[u8]) -> Result<(), Error>;

    /// Decrypts what was received.
    fn decrypt(&mut self, buffer: &mut [u8]) -> Result<Decrypted, Error>;

    /// Prepares what is said at the end, if anything is.
    fn shut_down(&mut self) {}

    /// What to report.
    fn error(&self, trouble: Trouble) -> Error;
}

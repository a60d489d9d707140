//! The connection to the server: a socket, and what encrypts over it once that is asked for. It
//! moves bytes and knows nothing of the protocol; it never waits, but says what to wait for.

use nix::errno::Errno;

use crate::cipher::{Cipher, Decrypted, Handshake, Trouble};
use crate::error::Error;
use crate::socket::{Direction, Socket};

/// As much as one read takes. It lies on the caller's stack, which may be small.
pub const READ_SIZE: usize = 4096;

/// After so many reads the caller gets its turn, even if the server could go on for ever.
const MOST_READS: usize = 16;

/// How a step ended that needs the socket.
#[derive(Debug, PartialEq, Eq)]
pub enum Step<T> {
    /// It is done.
    Done(T),
    /// The socket has to be waited for; then the same step again.
    Blocked(Direction),
}

/// What a read brought.
#[derive(Debug, PartialEq, Eq)]
pub enum Receipt {
    /// This many bytes.
    Bytes(usize),
    /// The server closed the connection.
    Closed,
}

/// One connection; closed, its encryption first, when dropped.
#[derive(Debug)]
pub struct Link {
    socket: Socket,
    cipher: Option<Box<dyn Cipher>>,
    /// How much of the message being sent is sent (plaintext) or whether it is encrypted.
    sent: usize,
    /// A failed write is held back, as in libpq, because the server may have said why.
    write_error: Option<Errno>,
    /// What came before the request was sent, when nothing may come: held back, too.
    premature: Option<Result<Receipt, Error>>,
    peer_closed: bool,
}

impl Link {
    /// A connection over this socket, in plaintext so far.
    pub fn new(socket: Socket) -> Link {
        Link {
            socket,
            cipher: None,
            sent: 0,
            write_error: None,
            premature: None,
            peer_closed: false,
        }
    }

    /// The socket, to be waited for.
    pub fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Whether something is left to read that waiting for the socket would not show.
    pub fn has_unread(&self) -> bool {
        let premature = self.premature.is_some() && !self.peer_closed; // a close stays readable
        premature || self.cipher.as_ref().is_some_and(|cipher| cipher.has_unread())
    }

    /// Sends a message whole, encrypted where that is established. `permit` is asked right
    /// before each write, when all else is done: without it nothing more of the message leaves.
    pub fn send(&mut self, message: &[u8], permit: &dyn Fn() -> bool) -> Result<Step<()>, Error> {
        if self.cipher.is_some() {
            return self.send_encrypted(message, permit);
        }
        if !permit() {
            return Err(Error::Withdrawn);
        }
        while let Some(rest) = message.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match write(&self.socket, &mut self.write_error, rest) {
                Some(length) => self.sent += length,
                None => return Ok(Step::Blocked(Direction::Writing)),
            }
        }
        self.sent = 0;
        Ok(Step::Done(()))
    }

    /// Looks before it sends: a server that has spoken or closed already will not take the
    /// request, and its bare close would otherwise look as if it had.
    fn send_encrypted(
        &mut self,
        message: &[u8],
        permit: &dyn Fn() -> bool,
    ) -> Result<Step<()>, Error> {
        if self.sent == 0 {
            self.premature = match self.receive_encrypted(&mut [0]) {
                Ok(Step::Blocked(_)) => None,
                Err(error) if error.is_reset() => {
                    self.peer_closed = true;
                    Some(Ok(Receipt::Closed))
                }
                Ok(Step::Done(receipt)) => Some(Ok(receipt)),
                Err(error) => Some(Err(error)),
            };
            if self.premature.is_some() {
                return Ok(Step::Done(()));
            }
            self.cipher.iter_mut().try_for_each(|cipher| cipher.encrypt(message))?;
            self.sent = message.len();
        }
        if !permit() {
            return Err(Error::Withdrawn);
        }
        if !self.flush() {
            return Ok(Step::Blocked(Direction::Writing));
        }
        self.sent = 0;
        Ok(Step::Done(()))
    }

    /// Receives bytes, decrypted where encryption is established.
    pub fn receive(&mut self, buffer: &mut [u8]) -> Result<Step<Receipt>, Error> {
        match self.premature.take() {
            Some(Ok(Receipt::Closed)) => return Err(self.error(Trouble::ClosedTooSoon)),
            Some(receipt) => return receipt.map(Step::Done),
            None if self.cipher.is_some() => return self.receive_encrypted(buffer),
            None => {}
        }
        match self.socket.receive(buffer) {
            Ok(0) => self.closed(),
            Ok(length) => Ok(Step::Done(Receipt::Bytes(length))),
            Err(Errno::EAGAIN) => Ok(Step::Blocked(Direction::Reading)),
            Err(errno) => Err(self.error(Trouble::Receive(errno))),
        }
    }

    fn receive_encrypted(&mut self, buffer: &mut [u8]) -> Result<Step<Receipt>, Error> {
        let mut ciphertext = [0; READ_SIZE];
        for read in 0.. {
            let Some(cipher) = &mut self.cipher else {
                break;
            };
            match cipher.decrypt(buffer)? {
                Decrypted::Bytes(length) => return Ok(Step::Done(Receipt::Bytes(length))),
                Decrypted::Closed => return self.closed(),
                Decrypted::NeedMore => {}
            }
            // TLS has things to say of its own, such as a new key.
            if !self.flush() {
                return Ok(Step::Blocked(Direction::Writing));
            }
            if read == MOST_READS {
                return Ok(Step::Blocked(Direction::Reading));
            }
            match self.socket.receive(&mut ciphertext) {
                // Bare, without TLS's own closing: whoever could forge that could as well have
                // cut the connection, so it tells no less than closing in good order.
                Ok(0) => return self.closed(),
                Ok(length) => self.take_in(&ciphertext, length),
                Err(Errno::EAGAIN) => return Ok(Step::Blocked(Direction::Reading)),
                Err(errno) => return Err(self.error(Trouble::Receive(errno))),
            }
        }
        Err(Error::InvalidState)
    }

    fn take_in(&mut self, buffer: &[u8], length: usize) {
        let received = buffer.get(..length).unwrap_or_default();
        self.cipher.iter_mut().for_each(|cipher| cipher.received(received));
    }

    /// The server closed. If what we last wrote never left, that is the failure to report: libpq
    /// 18 forgets it and calls the request delivered.
    fn closed(&mut self) -> Result<Step<Receipt>, Error> {
        self.peer_closed = true;
        match self.write_error.take() {
            Some(errno) => Err(self.error(Trouble::ClosedUnsent(errno))),
            None => Ok(Step::Done(Receipt::Closed)),
        }
    }

    fn error(&self, trouble: Trouble) -> Error {
        match (&self.cipher, trouble) {
            (Some(cipher), trouble) => cipher.error(trouble),
            (None, Trouble::Receive(errno) | Trouble::ReceiveInHandshake(errno)) => {
                Error::Receive(errno)
            }
            (None, Trouble::ClosedUnsent(errno)) => Error::Send(errno),
            (None, Trouble::ClosedInHandshake | Trouble::ClosedTooSoon) => Error::ServerClosed,
        }
    }

    /// Goes on with the handshake; `prepare` makes ready for it the first time.
    pub fn handshake(
        &mut self,
        prepare: impl FnOnce() -> Result<Box<dyn Cipher>, Error>,
    ) -> Result<Step<()>, Error> {
        if self.cipher.is_none() {
            self.cipher = Some(prepare()?);
        }
        let mut ciphertext = [0; READ_SIZE];
        for read in 0.. {
            // What was left for this turn.
            if !self.flush() {
                return Ok(Step::Blocked(Direction::Writing));
            }
            let Some(cipher) = &mut self.cipher else {
                break;
            };
            let step = cipher.handshake();
            let has_spoken = !cipher.unsent().is_empty();
            if step == Ok(Handshake::SpeaksNext) {
                return Ok(Step::Blocked(Direction::Writing));
            }
            // Also on failure: an alert tells the server why.
            let flushed = self.flush();
            let step = step?;
            if !flushed {
                return Ok(Step::Blocked(Direction::Writing));
            }
            if step == Handshake::Finished {
                return Ok(Step::Done(()));
            }
            // What it has just said, nobody can have answered yet.
            if has_spoken || read == MOST_READS {
                return Ok(Step::Blocked(Direction::Reading));
            }
            match self.socket.receive(&mut ciphertext) {
                Ok(0) => return Err(self.error(Trouble::ClosedInHandshake)),
                Ok(length) => self.take_in(&ciphertext, length),
                Err(Errno::EAGAIN) => return Ok(Step::Blocked(Direction::Reading)),
                Err(errno) => return Err(self.error(Trouble::ReceiveInHandshake(errno))),
            }
        }
        Err(Error::InvalidState)
    }

    /// Sends ciphertext that waits for it. False when the socket has to be waited for.
    fn flush(&mut self) -> bool {
        loop {
            let Some(cipher) = self.cipher.as_mut().filter(|cipher| !cipher.unsent().is_empty())
            else {
                return true;
            };
            let Some(length) = write(&self.socket, &mut self.write_error, cipher.unsent()) else {
                return false;
            };
            cipher.sent(length);
        }
    }

    /// Whether everything that was sent has left.
    pub fn has_sent_all(&self) -> bool {
        self.sent == 0 && self.write_error.is_none() && self.premature.is_none()
    }

    /// Ends encryption, politely where it is established and the server still there. A message that
    /// was given up on half-way stays unsent.
    pub fn close_cipher(&mut self) {
        if !self.peer_closed && self.sent == 0 {
            self.cipher.iter_mut().for_each(|cipher| cipher.shut_down());
            self.flush();
        }
        self.cipher = None;
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.close_cipher();
    }
}

/// Writes some bytes; `None` when the socket has to be waited for. After a failure, which is held
/// back, everything counts as written: reading will tell more.
fn write(socket: &Socket, error: &mut Option<Errno>, bytes: &[u8]) -> Option<usize> {
    if error.is_some() {
        return Some(bytes.len());
    }
    match socket.send(bytes) {
        Ok(length) => Some(length),
        Err(Errno::EAGAIN) => None,
        Err(errno) => {
            *error = Some(errno);
            Some(bytes.len())
        }
    }
}

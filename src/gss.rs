//! GSSAPI encryption on a cancel connection, without its socket. Each token of the handshake, and
//! each encrypted message after it, is preceded by its length in four bytes: libpq 18's
//! `pqsecure_open_gss`, `pg_GSS_read` and `pg_GSS_write`.
//!
//! While the handshake is made, the GSSAPI library may ask a KDC for a ticket, and wait for it: as
//! in libpq, which has no way to do that in pieces either.

use crate::cipher::{Cipher, Decrypted, Handshake, Trouble};
use crate::error::Error;
use crate::gssapi::{Context, Credentials, Name};
use crate::message::Encryption;
use crate::params::GssOptions;

/// The length before each token and message.
const LENGTH: usize = 4;

/// libpq's PQ_GSS_AUTH_BUFFER_SIZE and PQ_GSS_MAX_PACKET_SIZE, of which the first four bytes are
/// the length.
const LONGEST_TOKEN: usize = 65_536 - LENGTH;
const LONGEST_MESSAGE: usize = 16_384 - LENGTH;

/// One GSSAPI-encrypted connection.
#[derive(Debug)]
pub struct Gss {
    context: Context,
    received: Vec<u8>,
    unsent: Vec<u8>,
}

impl Gss {
    /// Prepares a connection, if the user has credentials. To be called before there is one: libpq
    /// does not even ask the server otherwise.
    pub fn new(options: &GssOptions) -> Result<Gss, Error> {
        let credentials = Credentials::acquire(options.gssapi).ok_or(Error::NoCredentialCache)?;
        let server = Name::import(options.gssapi, &options.service)?;
        let context = Context::new(credentials, server);
        Ok(Gss { context, received: Vec::new(), unsent: Vec::new() })
    }

    fn queue(&mut self, bytes: &[u8], limit: usize) -> Result<(), Error> {
        let length = u32::try_from(bytes.len()).ok().filter(|_| bytes.len() <= limit);
        let Some(length) = length else {
            let text = "client tried to send oversize GSSAPI packet";
            return Err(Error::Gss(format!("{text} ({} > {limit})", bytes.len())));
        };
        self.unsent.extend_from_slice(&length.to_be_bytes());
        self.unsent.extend_from_slice(bytes);
        Ok(())
    }

    /// The next token or message, if all of it has been received.
    fn next_packet(&mut self, limit: usize) -> Result<Option<Vec<u8>>, Error> {
        let Some(length) = self.received.first_chunk::<LENGTH>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*length) as usize;
        if length > limit {
            let text = "oversize GSSAPI packet sent by the server";
            return Err(Error::Gss(format!("{text} ({length} > {limit})")));
        }
        if self.received.len() < LENGTH + length {
            return Ok(None);
        }
        Ok(Some(self.received.drain(..LENGTH + length).skip(LENGTH).collect()))
    }
}

impl Cipher for Gss {
    fn received(&mut self, ciphertext: &[u8]) {
        self.received.extend_from_slice(ciphertext);
    }

    fn has_unread(&self) -> bool {
        !self.received.is_empty()
    }

    fn unsent(&self) -> &[u8] {
        &self.unsent
    }

    fn sent(&mut self, length: usize) {
        self.unsent.drain(..length);
    }

    fn handshake(&mut self) -> Result<Handshake, Error> {
        let mut token = Vec::new();
        if self.context.is_begun() {
            // In place of a token the server may send an error message. Unlike libpq we do not show
            // it: nobody has proven to be the server yet.
            if self.received.len() >= LENGTH && self.received.starts_with(b"E") {
                return Err(Error::ServerError(Encryption::Gss));
            }
            match self.next_packet(LONGEST_TOKEN)? {
                Some(received) => token = received,
                None => return Ok(Handshake::NeedsMore),
            }
        }
        let Some(next) = self.context.next_token(&token)? else {
            return Ok(Handshake::Finished);
        };
        self.queue(&next, LONGEST_TOKEN)?;
        Ok(Handshake::SpeaksNext)
    }

    fn encrypt(&mut self, plaintext: &[u8]) -> Result<(), Error> {
        let wrapped = self.context.wrap(plaintext)?;
        self.queue(&wrapped, LONGEST_MESSAGE)
    }

    fn decrypt(&mut self, buffer: &mut [u8]) -> Result<Decrypted, Error> {
        while let Some(wrapped) = self.next_packet(LONGEST_MESSAGE)? {
            let plaintext = self.context.unwrap(&wrapped)?;
            // Nothing is expected, so that what does not fit need not be kept.
            let length = plaintext.len().min(buffer.len());
            if let (Some(to), Some(from)) = (buffer.get_mut(..length), plaintext.get(..length))
                && length > 0
            {
                to.copy_from_slice(from);
                return Ok(Decrypted::Bytes(length));
            }
        }
        Ok(Decrypted::NeedMore)
    }

    fn error(&self, trouble: Trouble) -> Error {
        match trouble {
            Trouble::ClosedInHandshake => Error::GssClosed,
            Trouble::ReceiveInHandshake(errno) => Error::GssReceive(errno),
            Trouble::ClosedTooSoon => Error::ServerClosed,
            Trouble::ClosedUnsent(errno) => Error::Send(errno),
            Trouble::Receive(errno) => Error::Receive(errno),
        }
    }
}

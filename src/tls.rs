//! TLS on a cancel connection, without its socket.
//!
//! Keeping OpenSSL away from the socket keeps every system call in one file, and means that the
//! only thing a handshake ever waits for is more bytes from the server.

use std::io::{self, Read, Write};

use openssl::error::ErrorStack;
use openssl::ssl::{self, ErrorCode, Ssl, SslStream};

use crate::cipher::{Cipher, Decrypted, Handshake, Trouble};
use crate::error::Error;
use crate::known_contexts;
use crate::openssl_memory::{call_openssl, openssl_is_initialized};
use crate::params::{SslMode, SslNegotiation, TlsOptions, TlsVersion};
use crate::tls_context::reason;
use crate::verify::verify_peer_name;

/// The error of a connection that ends too soon, in the words of OpenSSL 3.
const UNEXPECTED_EOF: &str = "SSL error: unexpected eof while reading";

/// The two directions of ciphertext, as OpenSSL sees them: a stream that can always be written
/// and that "would block" when it is read empty.
#[derive(Debug, Default)]
struct Pipe {
    received: Vec<u8>,
    unsent: Vec<u8>,
}

impl Read for Pipe {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.received.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let length = self.received.as_slice().read(buffer)?;
        self.received.drain(..length);
        Ok(length)
    }
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.unsent.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One TLS connection.
#[derive(Debug)]
pub struct Tls {
    stream: SslStream<Pipe>,
    direct: bool,
    /// sslmode=verify-full: the certificate must be this host's.
    verify_full: bool,
    host: Option<String>,
    versions: (Option<TlsVersion>, Option<TlsVersion>),
}

impl Tls {
    /// Prepares a connection to the server that was asked for by this host name.
    pub fn new(options: &TlsOptions, host: Option<&str>) -> Result<Tls, Error> {
        call_openssl(|| Tls::prepare(options, host))
    }

    fn prepare(options: &TlsOptions, host: Option<&str>) -> Result<Tls, Error> {
        let context = known_contexts::context_for(options)?;
        let failed = |e: ErrorStack| {
            Error::Tls(format!("could not establish SSL connection: {}", reason(&e)))
        };
        let mut ssl = Ssl::new(&context).map_err(failed)?;
        if let Some(name) = host.filter(|host| options.sni && is_name(host)) {
            ssl.set_hostname(name).map_err(|e| {
                let why = reason(&e);
                Error::Tls(format!("could not set SSL Server Name Indication (SNI): {why}"))
            })?;
        }
        Ok(Tls {
            stream: SslStream::new(ssl, Pipe::default()).map_err(failed)?,
            direct: options.negotiation == SslNegotiation::Direct,
            verify_full: options.sslmode == SslMode::VerifyFull,
            host: host.map(str::to_owned),
            versions: (options.min_version, options.max_version),
        })
    }

    /// What OpenSSL's chain verification leaves open.
    fn verify(&self) -> Result<(), Error> {
        let refuse = |why: &str| Err(Error::Tls(why.to_owned()));
        match self.stream.ssl().selected_alpn_protocol() {
            None if self.direct => refuse(
                "direct SSL connection was established without ALPN protocol negotiation extension",
            ),
            Some(protocol) if self.direct && protocol != b"postgresql" => {
                refuse("SSL connection was established with unexpected ALPN protocol")
            }
            _ => Ok(()),
        }?;
        let Some(certificate) = self.stream.ssl().peer_certificate() else {
            return refuse("certificate could not be obtained: no SSL error reported");
        };
        if self.verify_full {
            verify_peer_name(&certificate, self.host.as_deref())?;
        }
        Ok(())
    }

    fn handshake_error(&self, error: &ssl::Error) -> Error {
        let Some(errors) = error.ssl_error() else {
            return unexpected(error);
        };
        let mut text = format!("SSL error: {}", reason(errors));
        if errors.errors().first().is_some_and(|e| is_about_versions(e.reason_code())) {
            let (min, max) = self.versions;
            text.push_str(&format!(
                "\nThis may indicate that the server does not support any SSL protocol version \
                 between {} and {}.",
                min.unwrap_or(TlsVersion::V1_0),
                max.unwrap_or(TlsVersion::V1_3)
            ));
        }
        Error::Tls(text)
    }
}

impl Cipher for Tls {
    fn received(&mut self, ciphertext: &[u8]) {
        self.stream.get_mut().received.extend_from_slice(ciphertext);
    }

    fn has_unread(&self) -> bool {
        !self.stream.get_ref().received.is_empty() || self.stream.ssl().pending() > 0
    }

    fn unsent(&self) -> &[u8] {
        &self.stream.get_ref().unsent
    }

    fn sent(&mut self, length: usize) {
        self.stream.get_mut().unsent.drain(..length);
    }

    fn handshake(&mut self) -> Result<Handshake, Error> {
        match call_openssl(|| self.stream.connect()) {
            Ok(()) => {
                openssl_is_initialized();
                call_openssl(|| self.verify()).map(|()| Handshake::Finished)
            }
            Err(error) if error.code() == ErrorCode::WANT_READ => Ok(Handshake::NeedsMore),
            Err(error) => {
                known_contexts::forget(self.stream.ssl().ssl_context());
                Err(self.handshake_error(&error))
            }
        }
    }

    fn encrypt(&mut self, plaintext: &[u8]) -> Result<(), Error> {
        match call_openssl(|| self.stream.ssl_write(plaintext)) {
            Ok(length) if length == plaintext.len() => Ok(()),
            Ok(_) => Err(Error::TlsBroken("SSL_write did not take the whole request".to_owned())),
            Err(error) => Err(data_error(&error)),
        }
    }

    fn decrypt(&mut self, buffer: &mut [u8]) -> Result<Decrypted, Error> {
        match call_openssl(|| self.stream.ssl_read(buffer)) {
            Ok(length) => Ok(Decrypted::Bytes(length)),
            Err(error) if error.code() == ErrorCode::WANT_READ => Ok(Decrypted::NeedMore),
            Err(error) if error.code() == ErrorCode::ZERO_RETURN => Ok(Decrypted::Closed),
            Err(error) => Err(data_error(&error)),
        }
    }

    /// The closing alert.
    fn shut_down(&mut self) {
        // It fails before the handshake is finished and after a fatal error: then there is
        // nothing to say.
        let _ = call_openssl(|| self.stream.shutdown());
    }

    fn error(&self, trouble: Trouble) -> Error {
        match trouble {
            Trouble::ClosedInHandshake => Error::Tls(UNEXPECTED_EOF.to_owned()),
            Trouble::ReceiveInHandshake(errno) => Error::SslHandshakeReceive(errno),
            Trouble::ClosedTooSoon | Trouble::ClosedUnsent(_) => {
                Error::TlsBroken(UNEXPECTED_EOF.to_owned())
            }
            Trouble::Receive(errno) => Error::SslReceive(errno),
        }
    }
}

/// RFC 6066 allows host names in SNI, but no addresses; libpq's test for it.
fn is_name(host: &str) -> bool {
    !host.contains(':') && !host.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.')
}

fn data_error(error: &ssl::Error) -> Error {
    match error.ssl_error() {
        Some(errors) => Error::TlsBroken(format!("SSL error: {}", reason(errors))),
        None => unexpected(error),
    }
}

fn unexpected(error: &ssl::Error) -> Error {
    Error::Tls(format!("unrecognized SSL error code: {}", error.code().as_raw()))
}

/// The SSL_R_ reasons after which libpq hints at protocol versions.
fn is_about_versions(reason: i32) -> bool {
    const REASONS: [i32; 11] = [
        116,  // BAD_PROTOCOL_VERSION_NUMBER
        166,  // VERSION_TOO_HIGH
        191,  // NO_PROTOCOLS_AVAILABLE
        252,  // UNKNOWN_PROTOCOL
        254,  // UNKNOWN_SSL_VERSION
        258,  // UNSUPPORTED_PROTOCOL
        259,  // UNSUPPORTED_SSL_VERSION
        266,  // WRONG_SSL_VERSION
        267,  // WRONG_VERSION_NUMBER
        396,  // VERSION_TOO_LOW
        1070, // TLSV1_ALERT_PROTOCOL_VERSION
    ];
    REASONS.contains(&reason)
}

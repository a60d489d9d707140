//! Everything that can go wrong, in libpq's own words, and the buffer that
//! `PQcancelErrorMessage` points into.
//!
//! The texts are those of libpq 18 (`fe-cancel.c`, `fe-connect.c`, `fe-misc.c`, `fe-secure.c`,
//! `fe-secure-openssl.c`), so that what users search for finds libpq's answers.

use std::ffi::{CStr, c_char};
use std::fmt::{self, Display, Write};

use nix::errno::Errno;

use crate::message::Encryption;

/// A reason why a cancel request could not be delivered.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)] // the texts below say what each one is
pub enum Error {
    // of the session that is to be cancelled
    NullConnection,
    NotOpen,
    NoCancelKey,
    InvalidOption { option: &'static str, value: String },
    InvalidInteger { option: &'static str, value: String },
    // of the libpq it belongs to
    HostNotFound,
    HostAmbiguous,
    HostLacks(&'static str),
    HostUnsupported(i32),
    HostLayout(i32),
    HostFailed(&'static str),
    // of the caller
    AlreadyStarted,
    InvalidState,
    Withdrawn,
    Panicked,
    OutOfMemory,
    // of the socket
    Socket(Errno),
    NoDelay(Errno),
    SetSockOpt { option: &'static str, errno: Errno },
    Connect { errno: Errno, local: bool },
    SocketStatus(Errno),
    PeerCredentials(Errno),
    PeerUser(u32),
    RequirePeer { required: String, actual: String },
    ServerClosed,
    Receive(Errno),
    Send(Errno),
    Wait(Errno),
    TimeoutExpired,
    // of the protocol
    Refused(Encryption),
    ServerError(Encryption),
    InvalidReply(Encryption, u8),
    UnencryptedData(Encryption),
    UnexpectedResponse,
    // of TLS, before it is established; the text is complete
    Tls(String),
    // of TLS, once it is established; the text is complete
    TlsBroken(String),
    // of the socket under TLS, before it is established and afterwards
    SslHandshakeReceive(Errno),
    SslReceive(Errno),
    // of GSSAPI; the text is complete
    NoCredentialCache,
    Gss(String),
    // of the socket under GSSAPI, before it is established
    GssClosed,
    GssReceive(Errno),
}

impl Error {
    /// Whether the server has cut the connection.
    pub fn is_reset(&self) -> bool {
        let errno = match self {
            Error::Receive(errno) | Error::SslReceive(errno) => errno,
            _ => return false,
        };
        matches!(errno, Errno::EPIPE | Errno::ECONNRESET)
    }

    /// Whether libpq closes the socket at once on this error, rather than leaving that to
    /// PQcancelReset or PQcancelFinish: `pqReadData`'s "definitelyFailed", and every failure to
    /// reach an address at all.
    pub fn closes_socket(&self) -> bool {
        match self {
            Error::NoDelay(_)
            | Error::SetSockOpt { .. }
            | Error::Connect { .. }
            | Error::ServerClosed
            | Error::TlsBroken(_)
            | Error::TimeoutExpired => true,
            Error::Receive(errno) | Error::SslReceive(errno) | Error::Send(errno) => {
                is_connection_failure(*errno)
            }
            _ => false,
        }
    }
}

/// The same for the error buffer of `PQcancel`: its words for what libpq's own can meet, where an
/// error number stands for strerror, and the usual ones for the rest.
pub struct ForPQcancel<'a>(pub &'a Error);

impl Display for ForPQcancel<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PQcancel() -- ")?;
        match self.0 {
            Error::Socket(e) => write!(f, "socket() failed: error {}", *e as i32),
            Error::SetSockOpt { option, errno } => {
                write!(f, "setsockopt({option}) failed: error {}", *errno as i32)
            }
            Error::Connect { errno, .. } => write!(f, "connect() failed: error {}", *errno as i32),
            Error::Send(e) => write!(f, "send() failed: error {}", *e as i32),
            error => error.fmt(f),
        }
    }
}

/// libpq's ALL_CONNECTION_FAILURE_ERRNOS.
fn is_connection_failure(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::EPIPE
            | Errno::ECONNRESET
            | Errno::ECONNABORTED
            | Errno::EHOSTDOWN
            | Errno::EHOSTUNREACH
            | Errno::ENETDOWN
            | Errno::ENETRESET
            | Errno::ENETUNREACH
            | Errno::ETIMEDOUT
    )
}

/// The C library's text for an error number.
pub fn strerror(errno: Errno) -> String {
    let text = std::io::Error::from_raw_os_error(errno as i32).to_string();
    match text.rfind(" (os error ") {
        Some(end) => text.get(..end).unwrap_or(&text).to_owned(),
        None => text,
    }
}

const SERVER_CLOSED: &str = "server closed the connection unexpectedly\n\
    \tThis probably means the server terminated abnormally\n\
    \tbefore or while processing the request.";

impl Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::NullConnection
            | Error::NotOpen
            | Error::NoCancelKey
            | Error::InvalidOption { .. }
            | Error::InvalidInteger { .. } => self.fmt_session(f),
            Error::HostNotFound
            | Error::HostAmbiguous
            | Error::HostLacks(_)
            | Error::HostUnsupported(_)
            | Error::HostLayout(_)
            | Error::HostFailed(_) => self.fmt_host(f),
            Error::AlreadyStarted => {
                f.write_str("cancel request is already being sent on this connection")
            }
            Error::InvalidState => {
                f.write_str("invalid connection state, probably indicative of memory corruption")
            }
            Error::Withdrawn => f.write_str("the request was given up"),
            Error::Panicked => f.write_str("pqcancel: internal error"),
            Error::OutOfMemory => f.write_str("out of memory"),
            Error::Refused(_)
            | Error::ServerError(_)
            | Error::InvalidReply(..)
            | Error::UnencryptedData(_)
            | Error::UnexpectedResponse => self.fmt_protocol(f),
            Error::Tls(_)
            | Error::TlsBroken(_)
            | Error::SslHandshakeReceive(_)
            | Error::SslReceive(_)
            | Error::NoCredentialCache
            | Error::Gss(_)
            | Error::GssClosed
            | Error::GssReceive(_) => self.fmt_encryption(f),
            _ => self.fmt_socket(f),
        }
    }
}

impl Error {
    fn fmt_session(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::NullConnection => f.write_str("connection pointer is NULL"),
            Error::NotOpen => f.write_str("connection not open"),
            Error::NoCancelKey => f.write_str("no cancellation key received"),
            Error::InvalidOption { option, value } => {
                write!(f, "invalid {option} value: \"{value}\"")
            }
            Error::InvalidInteger { option, value } => {
                write!(f, "invalid integer value \"{value}\" for connection option \"{option}\"")
            }
            _ => Ok(()),
        }
    }

    fn fmt_host(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::HostNotFound => {
                f.write_str("pqcancel could not find the libpq that this connection belongs to")
            }
            Error::HostAmbiguous => f.write_str(
                "pqcancel cannot tell which of the several libpqs in this process is in use",
            ),
            Error::HostLacks(function) => {
                write!(f, "pqcancel could not find {function}() in the libpq in use")
            }
            Error::HostUnsupported(version) => write!(
                f,
                "pqcancel does not know the libpq in use (version {version}); \
                 it knows those of PostgreSQL 10 and later"
            ),
            Error::HostLayout(version) => write!(
                f,
                "pqcancel could not read the cancel key from the libpq in use \
                 (version {version}): its layout is not the expected one"
            ),
            Error::HostFailed(function) => {
                write!(f, "{function}() of the libpq in use failed")
            }
            _ => Ok(()),
        }
    }

    fn fmt_socket(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Socket(e) => write!(f, "could not create socket: {}", strerror(*e)),
            Error::NoDelay(e) => {
                write!(f, "could not set socket to TCP no delay mode: {}", strerror(*e))
            }
            Error::SetSockOpt { option, errno } => {
                write!(f, "setsockopt({option}) failed: {}", strerror(*errno))
            }
            Error::Connect { errno, local: true } => write!(
                f,
                "{}\n\tIs the server running locally and accepting connections on that socket?",
                strerror(*errno)
            ),
            Error::Connect { errno, local: false } => write!(
                f,
                "{}\n\tIs the server running on that host and accepting TCP/IP connections?",
                strerror(*errno)
            ),
            Error::SocketStatus(e) => {
                write!(f, "could not get socket error status: {}", strerror(*e))
            }
            Error::PeerCredentials(e) => {
                write!(f, "could not get peer credentials: {}", strerror(*e))
            }
            Error::PeerUser(uid) => write!(f, "local user with ID {uid} does not exist"),
            Error::RequirePeer { required, actual } => write!(
                f,
                "requirepeer specifies \"{required}\", but actual peer user name is \"{actual}\""
            ),
            Error::ServerClosed => f.write_str(SERVER_CLOSED),
            Error::Receive(Errno::EPIPE | Errno::ECONNRESET)
            | Error::Send(Errno::EPIPE | Errno::ECONNRESET) => f.write_str(SERVER_CLOSED),
            Error::Receive(e) => {
                write!(f, "could not receive data from server: {}", strerror(*e))
            }
            Error::Send(e) => write!(f, "could not send data to server: {}", strerror(*e)),
            Error::Wait(e) => write!(f, "select() failed: {}", strerror(*e)),
            Error::TimeoutExpired => f.write_str("timeout expired"),
            _ => Ok(()),
        }
    }

    fn fmt_protocol(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Refused(Encryption::Ssl) => {
                f.write_str("server does not support SSL, but SSL was required")
            }
            Error::Refused(Encryption::Gss) => {
                f.write_str("server doesn't support GSSAPI encryption, but it was required")
            }
            Error::ServerError(Encryption::Ssl) => {
                f.write_str("server sent an error response during SSL exchange")
            }
            Error::ServerError(Encryption::Gss) => {
                f.write_str("server sent an error response during GSS encryption exchange")
            }
            Error::InvalidReply(encryption, byte) => {
                let name = match encryption {
                    Encryption::Ssl => "SSL",
                    Encryption::Gss => "GSSAPI",
                };
                let byte = char::from(*byte);
                write!(f, "received invalid response to {name} negotiation: {byte}")
            }
            Error::UnencryptedData(Encryption::Ssl) => {
                f.write_str("received unencrypted data after SSL response")
            }
            Error::UnencryptedData(Encryption::Gss) => {
                f.write_str("received unencrypted data after GSSAPI encryption response")
            }
            Error::UnexpectedResponse => f.write_str("unexpected response from server"),
            _ => Ok(()),
        }
    }

    fn fmt_encryption(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Tls(text) | Error::TlsBroken(text) | Error::Gss(text) => f.write_str(text),
            // libpq reports such an error twice: where it reads the socket, and where OpenSSL
            // tells it that reading failed.
            Error::SslReceive(e @ (Errno::EPIPE | Errno::ECONNRESET)) => {
                write!(f, "{}\n{SERVER_CLOSED}", Error::Receive(*e))
            }
            Error::SslReceive(e) | Error::SslHandshakeReceive(e) => {
                write!(f, "{}\nSSL SYSCALL error: {}", Error::Receive(*e), strerror(*e))
            }
            Error::NoCredentialCache => {
                f.write_str("GSSAPI encryption required but no credential cache")
            }
            Error::GssClosed => f.write_str(SERVER_CLOSED),
            Error::GssReceive(e) => Error::Receive(*e).fmt(f),
            _ => Ok(()),
        }
    }
}

/// The text of `PQcancelErrorMessage`: always ends in NUL, stays where it is until the next
/// operation on its cancel connection.
#[derive(Debug)]
pub struct ErrorMessage(Vec<u8>);

impl Default for ErrorMessage {
    fn default() -> ErrorMessage {
        ErrorMessage(vec![0])
    }
}

impl ErrorMessage {
    /// Empties the text.
    pub fn clear(&mut self) {
        self.0.clear();
        self.0.push(0);
    }

    /// Appends as is; libpq does so with the words that name the server, before it is known
    /// whether anything will go wrong.
    pub fn append(&mut self, text: &str) {
        self.0.pop();
        self.0.reserve(text.len() + 1);
        // A NUL inside would hide what follows it from a C reader.
        self.0.extend(text.bytes().filter(|byte| *byte != 0));
        self.0.push(0);
    }

    /// Appends an error and the newline that every libpq message ends in.
    pub fn append_error(&mut self, error: &Error) {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{error}");
        self.append(&text);
    }

    /// The text as C sees it.
    pub fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.0).unwrap_or(c"")
    }

    /// Where C finds the text.
    pub fn as_ptr(&self) -> *const c_char {
        self.as_c_str().as_ptr()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_what_was_appended_and_a_newline() {
        let mut message = ErrorMessage::default();
        assert_eq!(message.as_c_str(), c"");
        message.append("connection to server at \"h\", port 1 failed: ");
        message.append_error(&Error::TimeoutExpired);
        assert_eq!(
            message.as_c_str(),
            c"connection to server at \"h\", port 1 failed: timeout expired\n"
        );
        message.clear();
        assert_eq!(message.as_c_str(), c"");
    }

    #[test]
    fn a_nul_from_outside_does_not_cut_the_message() {
        let mut message = ErrorMessage::default();
        message.append_error(&Error::InvalidReply(Encryption::Ssl, 0));
        message.append("rest");
        assert_eq!(message.as_c_str(), c"received invalid response to SSL negotiation: \nrest");
    }

    #[test]
    fn system_errors_read_as_in_c() {
        assert_eq!(strerror(Errno::ECONNREFUSED), "Connection refused");
        assert_eq!(
            Error::Connect { errno: Errno::ECONNREFUSED, local: false }.to_string(),
            "Connection refused\n\tIs the server running on that host and accepting TCP/IP connections?"
        );
        assert_eq!(Error::Send(Errno::EPIPE).to_string(), SERVER_CLOSED);
    }

    #[test]
    fn pqcancel_says_what_libpqs_own_says() {
        let text = |error: &Error| ForPQcancel(error).to_string();
        let refused = Error::Connect { errno: Errno::ECONNREFUSED, local: false };
        assert_eq!(text(&refused), "PQcancel() -- connect() failed: error 111");
        assert_eq!(text(&Error::Socket(Errno::EMFILE)), "PQcancel() -- socket() failed: error 24");
        assert_eq!(text(&Error::TimeoutExpired), "PQcancel() -- timeout expired");
    }
}

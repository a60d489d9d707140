//! Everything that can go wrong, in libpq's own words, and the buffer that
//! `PQcancelErrorMessage` points into.
//!
//! The texts are those of libpq 18 (`fe-cancel.c`, `fe-connect.c`, `fe-misc.c`, `fe-secure.c`,
//! `fe-secure-openssl.c`), so that what users search for finds libpq's answers.

use std::ffi::{CStr, c_char};
use std::fmt::{self, Display, Write};

use nix::errno::Errno;

use crate::message::Encryption;

/// A reason why a cancel request could not be delivered, and what `PQcancelErrorMessage` says of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the texts say what each one is
pub enum Error {
    // Of the session that is to be cancelled.
    #[error("connection pointer is NULL")]
    NullConnection,
    #[error("connection not open")]
    NotOpen,
    #[error("no cancellation key received")]
    NoCancelKey,
    #[error("invalid {option} value: \"{value}\"")]
    InvalidOption { option: &'static str, value: String },
    #[error("invalid integer value \"{value}\" for connection option \"{option}\"")]
    InvalidInteger { option: &'static str, value: String },

    // Of the libpq it belongs to.
    #[error("pqcancel could not find the libpq that this connection belongs to")]
    HostNotFound,
    #[error("pqcancel cannot tell which of the several libpqs in this process is in use")]
    HostAmbiguous,
    #[error("pqcancel could not find {0}() in the libpq in use")]
    HostLacks(&'static str),
    #[error(
        "pqcancel does not know the libpq in use (version {0}); \
         it knows those of PostgreSQL 10 and later"
    )]
    HostUnsupported(i32),
    #[error(
        "pqcancel could not read the cancel key from the libpq in use (version {0}): \
         its layout is not the expected one"
    )]
    HostLayout(i32),
    #[error("{0}() of the libpq in use failed")]
    HostFailed(&'static str),

    // Of the caller.
    #[error("cancel request is already being sent on this connection")]
    AlreadyStarted,
    #[error("invalid connection state, probably indicative of memory corruption")]
    InvalidState,
    #[error("the request was given up")]
    Withdrawn,
    #[error("pqcancel: internal error")]
    Panicked,
    #[error("out of memory")]
    OutOfMemory,

    // Of the socket.
    #[error("could not create socket: {}", strerror(*.0))]
    Socket(Errno),
    #[error("could not set socket to TCP no delay mode: {}", strerror(*.0))]
    NoDelay(Errno),
    #[error("setsockopt({option}) failed: {}", strerror(*.errno))]
    SetSockOpt { option: &'static str, errno: Errno },
    #[error("{}\n\tIs the server running {}?", strerror(*.errno), if *.local {
        "locally and accepting connections on that socket"
    } else {
        "on that host and accepting TCP/IP connections"
    })]
    Connect { errno: Errno, local: bool },
    #[error("could not get socket error status: {}", strerror(*.0))]
    SocketStatus(Errno),
    #[error("could not get peer credentials: {}", strerror(*.0))]
    PeerCredentials(Errno),
    #[error("local user with ID {0} does not exist")]
    PeerUser(u32),
    #[error("requirepeer specifies \"{required}\", but actual peer user name is \"{actual}\"")]
    RequirePeer { required: String, actual: String },
    #[error("{SERVER_CLOSED}")]
    ServerClosed,
    #[error("{}", unless_reset(*.0, "could not receive data from server"))]
    Receive(Errno),
    #[error("{}", unless_reset(*.0, "could not send data to server"))]
    Send(Errno),
    #[error("select() failed: {}", strerror(*.0))]
    Wait(Errno),
    #[error("timeout expired")]
    TimeoutExpired,

    // Of the protocol.
    #[error("{}", match .0 {
        Encryption::Ssl => "server does not support SSL, but SSL was required",
        Encryption::Gss => "server doesn't support GSSAPI encryption, but it was required",
    })]
    Refused(Encryption),
    #[error("server sent an error response during {} exchange", match .0 {
        Encryption::Ssl => "SSL",
        Encryption::Gss => "GSS encryption",
    })]
    ServerError(Encryption),
    #[error("received invalid response to {} negotiation: {}", match .0 {
        Encryption::Ssl => "SSL",
        Encryption::Gss => "GSSAPI",
    }, char::from(*.1))]
    InvalidReply(Encryption, u8),
    #[error("received unencrypted data after {} response", match .0 {
        Encryption::Ssl => "SSL",
        Encryption::Gss => "GSSAPI encryption",
    })]
    UnencryptedData(Encryption),
    #[error("unexpected response from server")]
    UnexpectedResponse,

    // Of TLS, before it is established and afterwards; the text is complete.
    #[error("{0}")]
    Tls(String),
    #[error("{0}")]
    TlsBroken(String),
    // Of the socket under TLS, before it is established and afterwards. libpq tells it twice: where
    // it reads the socket, and where OpenSSL tells it that reading has failed.
    #[error("{}\nSSL SYSCALL error: {}", Error::Receive(*.0), strerror(*.0))]
    SslHandshakeReceive(Errno),
    #[error("{}\n{}", Error::Receive(*.0), unless_reset(*.0, "SSL SYSCALL error"))]
    SslReceive(Errno),

    // Of GSSAPI; where there is a text, it is complete.
    #[error("GSSAPI encryption required but no credential cache")]
    NoCredentialCache,
    #[error("{0}")]
    Gss(String),
    // Of the socket under GSSAPI, before it is established.
    #[error("{SERVER_CLOSED}")]
    GssClosed,
    #[error("{}", Error::Receive(*.0))]
    GssReceive(Errno),
}

const SERVER_CLOSED: &str = "server closed the connection unexpectedly\n\
    \tThis probably means the server terminated abnormally\n\
    \tbefore or while processing the request.";

/// What failed and why, or, as libpq puts it, that the server has cut the connection.
fn unless_reset(errno: Errno, what: &str) -> String {
    if is_reset(errno) { SERVER_CLOSED.to_owned() } else { format!("{what}: {}", strerror(errno)) }
}

fn is_reset(errno: Errno) -> bool {
    matches!(errno, Errno::EPIPE | Errno::ECONNRESET)
}

/// The C library's text for an error number.
pub fn strerror(errno: Errno) -> String {
    let text = std::io::Error::from_raw_os_error(errno as i32).to_string();
    match text.rfind(" (os error ") {
        Some(end) => text.get(..end).unwrap_or(&text).to_owned(),
        None => text,
    }
}

impl Error {
    /// Whether the server has cut the connection.
    pub fn is_reset(&self) -> bool {
        matches!(self, Error::Receive(errno) | Error::SslReceive(errno) if is_reset(*errno))
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

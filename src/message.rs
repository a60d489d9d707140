//! The messages of a cancel connection: SSLRequest or GSSENCRequest, the one byte that answers it,
//! and CancelRequest. See "Message Formats" in the PostgreSQL documentation. Bytes only; no I/O.

use zeroize::Zeroizing;

/// SSLRequest: its length and the code 80877103.
pub const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

/// GSSENCRequest: its length and the code 80877104.
pub const GSSENC_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x30];

/// The code that marks a CancelRequest where a startup packet has its protocol version.
pub const CANCEL_REQUEST_CODE: u32 = 80_877_102;

/// The shortest and the longest cancel key a server may send (protocol 3.2).
pub const CANCEL_KEY_LENGTHS: std::ops::RangeInclusive<usize> = 4..=256;

/// What comes before the key: length, code, backend PID.
const REQUEST_HEAD: usize = 12;

/// The longest CancelRequest.
pub const LONGEST_REQUEST: usize = REQUEST_HEAD + *CANCEL_KEY_LENGTHS.end();

/// A complete CancelRequest, wiped when dropped because it holds the session's cancel key. In
/// place, so that making one allocates nothing.
#[derive(Clone)]
pub struct CancelRequest {
    bytes: Zeroizing<[u8; LONGEST_REQUEST]>,
    length: usize,
}

impl CancelRequest {
    /// The request for the backend with this process ID and cancel key.
    ///
    /// A key whose length the protocol does not allow gives no request.
    pub fn new(backend_pid: i32, key: &[u8]) -> Option<CancelRequest> {
        if !CANCEL_KEY_LENGTHS.contains(&key.len()) {
            return None;
        }
        let length = REQUEST_HEAD + key.len();
        let head = [u32::try_from(length).ok()?, CANCEL_REQUEST_CODE, backend_pid.cast_unsigned()];
        let mut request = CancelRequest { bytes: Zeroizing::new([0; LONGEST_REQUEST]), length };
        let packet = head.iter().flat_map(|field| field.to_be_bytes()).chain(key.iter().copied());
        for (to, from) in request.bytes.iter_mut().zip(packet) {
            *to = from;
        }
        Some(request)
    }

    /// The process ID of the backend that it is for.
    pub fn backend_pid(&self) -> i32 {
        let bytes = self.bytes.get(8..).and_then(<[u8]>::first_chunk);
        bytes.copied().map_or(0, i32::from_be_bytes)
    }

    /// The bytes to put on the wire.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

/// The key is secret, so debugging output shows the length only.
impl std::fmt::Debug for CancelRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CancelRequest({} bytes)", self.length)
    }
}

/// What a client may ask the server for before anything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// TLS, which PostgreSQL calls SSL.
    Ssl,
    /// GSSAPI encryption.
    Gss,
}

impl Encryption {
    /// The message that asks for it.
    pub fn request(self) -> &'static [u8; 8] {
        match self {
            Encryption::Ssl => &SSL_REQUEST,
            Encryption::Gss => &GSSENC_REQUEST,
        }
    }

    /// What the first byte of the server's answer means.
    pub fn reply(self, byte: u8) -> Reply {
        match (self, byte) {
            (Encryption::Ssl, b'S') | (Encryption::Gss, b'G') => Reply::Accepted,
            (_, b'N') => Reply::Refused,
            (_, b'E') => Reply::Error,
            (_, other) => Reply::Unknown(other),
        }
    }
}

/// A server's answer to SSLRequest or GSSENCRequest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// 'S' or 'G': the handshake may begin.
    Accepted,
    /// 'N': the server does not do this.
    Refused,
    /// 'E': an error message follows. It is never shown, because nobody has proven to be the
    /// server yet (CVE-2024-10977).
    Error,
    /// Anything else: this is no PostgreSQL server.
    Unknown(u8),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cancel_request_is_length_code_pid_key_in_network_order() {
        let request = CancelRequest::new(0x0102_0304, &[9, 8, 7, 6]).unwrap();
        assert_eq!(
            request.as_bytes(),
            [0, 0, 0, 16, 0x04, 0xd2, 0x16, 0x2e, 1, 2, 3, 4, 9, 8, 7, 6]
        );
        assert_eq!(request.backend_pid(), 0x0102_0304);
    }

    #[test]
    fn keys_of_every_allowed_length_and_no_other() {
        for length in 0..300 {
            let request = CancelRequest::new(1, &vec![7; length]);
            assert_eq!(request.is_some(), (4..=256).contains(&length), "{length}");
            if let Some(request) = request {
                assert_eq!(request.as_bytes().len(), 12 + length);
                assert_eq!(request.as_bytes()[..4], (12 + length as u32).to_be_bytes());
            }
        }
    }

    #[test]
    fn debugging_output_hides_the_key() {
        let request = CancelRequest::new(1, b"secret").unwrap();
        assert_eq!(format!("{request:?}"), "CancelRequest(18 bytes)");
    }

    #[test]
    fn every_reply_byte_is_classified() {
        for (encryption, accepted) in [(Encryption::Ssl, b'S'), (Encryption::Gss, b'G')] {
            for byte in 0..=255_u8 {
                let expected = match byte {
                    b'N' => Reply::Refused,
                    b'E' => Reply::Error,
                    _ if byte == accepted => Reply::Accepted,
                    _ => Reply::Unknown(byte),
                };
                assert_eq!(encryption.reply(byte), expected);
            }
        }
    }
}

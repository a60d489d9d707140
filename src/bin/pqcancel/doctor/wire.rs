//! What an eavesdropper reads of a cancel connection: the packets that open it, and TLS or GSS from
//! outside ("Message Formats" in PostgreSQL's documentation, RFC 8446). A cancel key is counted,
//! never kept.

const SSL_REQUEST: u32 = 80_877_103;
const GSSENC_REQUEST: u32 = 80_877_104;
const CANCEL_REQUEST: u32 = 80_877_102;

/// TLS's record types and handshake messages.
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;
const SERVER_HELLO: u8 = 2;
const SUPPORTED_VERSIONS: usize = 43;
const RECORD_HEADER: usize = 5;
/// An alert of TLS 1.3: two bytes, their type, a tag. It closes a connection, and looks like data.
const SEALED_ALERT: usize = 2 + 1 + 16;

const PACKET_HEADER: usize = 4;

/// What is known of the request itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// In the clear.
    Readable {
        length: u32,
        pid: u32,
        key_length: usize,
    },
    Encrypted {
        by: String,
        header: Vec<u8>,
        body: Vec<u8>,
    },
    /// None was sent.
    Missing,
}

/// Reads a connection from what its client sent, and what it got.
pub(crate) fn read(sent: &[u8], received: &[u8]) -> Request {
    let (mut client, mut server) = (Bytes(sent), Bytes(received));
    loop {
        let Some(packet) = Packet::first(client.0) else { return tls(client, server) };
        match (packet.code, packet.rest) {
            (CANCEL_REQUEST, [a, b, c, d, key @ ..]) => {
                let pid = u32::from_be_bytes([*a, *b, *c, *d]);
                return Request::Readable { length: packet.length, pid, key_length: key.len() };
            }
            (SSL_REQUEST | GSSENC_REQUEST, _) => {
                client.take(packet.length as usize);
                if (packet.code, server.take(1)) == (GSSENC_REQUEST, Some(b"G")) {
                    return gss(client);
                }
            }
            _ => return tls(client, server),
        }
    }
}

/// Whether a CancelRequest stands there in the clear, even if its end has not come yet.
pub(crate) fn is_readable(sent: &[u8]) -> bool {
    matches!(read(sent, &[]), Request::Readable { .. })
}

/// A packet that begins with its length and a code, as all do that open a PostgreSQL connection.
struct Packet<'b> {
    length: u32,
    code: u32,
    rest: &'b [u8],
}

impl<'b> Packet<'b> {
    fn first(bytes: &'b [u8]) -> Option<Self> {
        let (length, after) = bytes.split_first_chunk()?;
        let (code, rest) = after.split_first_chunk()?;
        let length = u32::from_be_bytes(*length);
        let end = (length as usize).saturating_sub(8).min(rest.len());
        Some(Self { length, code: u32::from_be_bytes(*code), rest: rest.get(..end)? })
    }
}

fn tls(mut client: Bytes, mut server: Bytes) -> Request {
    let version = std::iter::from_fn(|| server.record()).find_map(version_of).unwrap_or("TLS");
    let is_data = |record: &Record| {
        record.kind == APPLICATION_DATA
            && (version != "TLSv1.3" || record.body.len() != SEALED_ALERT)
    };
    // The handshake's own encrypted messages come before it.
    match std::iter::from_fn(|| client.record()).filter(is_data).last() {
        Some(request) => Request::Encrypted {
            by: version.to_owned(),
            header: request.header.to_owned(),
            body: request.body.to_owned(),
        },
        None => Request::Missing,
    }
}

/// Tokens first, then what they protect, all with its length in front.
fn gss(mut client: Bytes) -> Request {
    let packets = std::iter::from_fn(|| {
        let header = client.take(PACKET_HEADER)?;
        Some((header, client.take(Bytes(header).number(PACKET_HEADER)?)?))
    });
    match packets.last() {
        Some((header, body)) => Request::Encrypted {
            by: "GSS".to_owned(),
            header: header.to_owned(),
            body: body.to_owned(),
        },
        None => Request::Missing,
    }
}

struct Record<'b> {
    kind: u8,
    header: &'b [u8],
    body: &'b [u8],
}

/// What a ServerHello has chosen.
fn version_of(record: Record) -> Option<&'static str> {
    let mut fields = Bytes(record.body);
    if record.kind != HANDSHAKE || fields.take(1) != Some(&[SERVER_HELLO]) {
        return None;
    }
    fields.take(3)?; // its length
    let old_version = fields.number(2)?;
    fields.take(32)?; // random
    fields.vector(1)?; // session ID
    fields.take(2 + 1)?; // cipher suite, compression method
    let mut extensions = Bytes(fields.vector(2).unwrap_or_default());
    let mut version = old_version;
    while let Some(kind) = extensions.number(2) {
        let value = extensions.vector(2)?;
        if kind == SUPPORTED_VERSIONS {
            version = Bytes(value).number(2)?;
        }
    }
    Some(match version {
        0x0304 => "TLSv1.3",
        0x0303 => "TLSv1.2",
        0x0302 => "TLSv1.1",
        0x0301 => "TLSv1",
        _ => "TLS",
    })
}

/// Bytes that are taken from the front.
#[derive(Clone, Copy)]
struct Bytes<'b>(&'b [u8]);

impl<'b> Bytes<'b> {
    fn take(&mut self, size: usize) -> Option<&'b [u8]> {
        let (taken, rest) = self.0.split_at_checked(size)?;
        self.0 = rest;
        Some(taken)
    }

    fn number(&mut self, size: usize) -> Option<usize> {
        Some(self.take(size)?.iter().fold(0, |number, byte| number << 8 | usize::from(*byte)))
    }

    /// A field with its length in front.
    fn vector(&mut self, size: usize) -> Option<&'b [u8]> {
        let length = self.number(size)?;
        self.take(length)
    }

    fn record(&mut self) -> Option<Record<'b>> {
        let header = self.take(RECORD_HEADER)?;
        let [kind, _, _, high, low] = header else { return None };
        let body = self.take(usize::from(u16::from_be_bytes([*high, *low])))?;
        Some(Record { kind: *kind, header, body })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(code: u32, rest: &[u8]) -> Vec<u8> {
        let length = u32::try_from(8 + rest.len()).unwrap();
        [&length.to_be_bytes(), &code.to_be_bytes(), rest].concat()
    }

    fn record(kind: u8, body: &[u8]) -> Vec<u8> {
        let length = u16::try_from(body.len()).unwrap();
        [&[kind, 3, 3][..], &length.to_be_bytes(), body].concat()
    }

    fn server_hello(extensions: &[u8]) -> Vec<u8> {
        let hello =
            [&[SERVER_HELLO, 0, 0, 0, 3, 3][..], &[7; 32], &[0, 0x13, 2, 0], extensions].concat();
        record(HANDSHAKE, &hello)
    }

    const TLS13: &[u8] = &[0, 6, 0, 43, 0, 2, 3, 4];

    #[test]
    fn a_request_in_the_clear_is_read_without_its_key() {
        let readable = |sent: &[u8]| (read(sent, b"N"), is_readable(sent));
        let expected = |key_length, length| Request::Readable { length, pid: 7, key_length };
        let short = packet(CANCEL_REQUEST, &[0, 0, 0, 7, 1, 2, 3, 4]);
        assert_eq!(readable(&short), (expected(4, 16), true));
        let long = packet(CANCEL_REQUEST, &[&[0, 0, 0, 7][..], &[9; 32]].concat());
        assert_eq!(readable(&long), (expected(32, 44), true));
        let refused = [packet(SSL_REQUEST, &[]), short.clone()].concat();
        assert_eq!(readable(&refused), (expected(4, 16), true));
        // Its first bytes are enough to stop it.
        assert!(is_readable(short.get(..12).unwrap()));
        assert!(!is_readable(short.get(..7).unwrap()));
    }

    #[test]
    fn an_encrypted_request_is_the_last_data_before_the_alert() {
        let request = [5; 33];
        let sent = [
            packet(SSL_REQUEST, &[]),
            record(HANDSHAKE, &[1]),
            record(APPLICATION_DATA, &[4; 53]),
            record(APPLICATION_DATA, &request),
            record(APPLICATION_DATA, &[6; SEALED_ALERT]),
        ]
        .concat();
        let received = [b"S".to_vec(), server_hello(TLS13)].concat();
        let Request::Encrypted { by, header, body } = read(&sent, &received) else { panic!() };
        assert_eq!(
            (by.as_str(), header.len(), &body[..]),
            ("TLSv1.3", RECORD_HEADER, &request[..])
        );
        assert!(!is_readable(&sent));
    }

    #[test]
    fn versions_are_those_that_the_server_has_chosen() {
        let version = |hello: Vec<u8>| Bytes(&hello).record().and_then(version_of);
        assert_eq!(version(server_hello(TLS13)), Some("TLSv1.3"));
        assert_eq!(version(server_hello(&[])), Some("TLSv1.2"));
        assert_eq!(version(record(HANDSHAKE, &[1, 0, 0, 0])), None);
    }

    #[test]
    fn gss_hides_its_last_packet() {
        let sent = [packet(GSSENC_REQUEST, &[]), vec![0, 0, 0, 1, 8, 0, 0, 0, 2, 9, 9]].concat();
        let expected =
            Request::Encrypted { by: "GSS".into(), header: vec![0, 0, 0, 2], body: vec![9, 9] };
        assert_eq!(read(&sent, b"G"), expected);
    }

    #[test]
    fn nothing_and_nonsense_are_no_request() {
        for sent in [&b""[..], b"\0\0\0\x08", b"GET / HTTP/1.1\r\n\r\n", &[22, 3, 1, 255, 255, 1]] {
            assert_eq!(read(sent, b""), Request::Missing);
        }
    }
}

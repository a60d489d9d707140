//! Socket addresses: read from the bytes of a `sockaddr_storage`, and written as libpq writes
//! them in messages.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddrV4, SocketAddrV6};

/// The address a session is connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// TCP over IPv4.
    V4(SocketAddrV4),
    /// TCP over IPv6.
    V6(SocketAddrV6),
    /// A Unix socket, by path.
    UnixPath(Vec<u8>),
    /// A Unix socket in Linux's abstract name space, without the leading NUL.
    UnixAbstract(Vec<u8>),
}

impl Address {
    /// Reads a socket address of exactly these bytes.
    pub fn from_sockaddr(bytes: &[u8]) -> Option<Address> {
        let family = i32::from(u16::from_ne_bytes(field(bytes, 0)?));
        match family {
            libc::AF_INET => {
                let port = u16::from_be_bytes(field(bytes, 2)?);
                let ip = Ipv4Addr::from(field::<4>(bytes, 4)?);
                Some(Address::V4(SocketAddrV4::new(ip, port)))
            }
            libc::AF_INET6 => {
                let port = u16::from_be_bytes(field(bytes, 2)?);
                let flowinfo = u32::from_ne_bytes(field(bytes, 4)?);
                let ip = Ipv6Addr::from(field::<16>(bytes, 8)?);
                let scope = u32::from_ne_bytes(field(bytes, 24)?);
                Some(Address::V6(SocketAddrV6::new(ip, port, flowinfo, scope)))
            }
            libc::AF_UNIX => unix(bytes.get(2..)?),
            _ => None,
        }
    }

    /// Whether this is a Unix socket, which never carries TLS.
    pub fn is_local(&self) -> bool {
        matches!(self, Address::UnixPath(_) | Address::UnixAbstract(_))
    }

    /// The IP address of a TCP address.
    pub fn ip(&self) -> Option<IpAddr> {
        match self {
            Address::V4(v4) => Some(IpAddr::V4(*v4.ip())),
            Address::V6(v6) => Some(IpAddr::V6(*v6.ip())),
            Address::UnixPath(_) | Address::UnixAbstract(_) => None,
        }
    }
}

fn field<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..offset + N)?.try_into().ok()
}

fn unix(name: &[u8]) -> Option<Address> {
    match name.split_first()? {
        (0, abstract_name) => Some(Address::UnixAbstract(abstract_name.to_vec())),
        _ => {
            let path = name.split(|byte| *byte == 0).next()?;
            Some(Address::UnixPath(path.to_vec()))
        }
    }
}

/// Reads an IPv4 address as `inet_aton` does, which libpq uses on purpose: one to four parts, the
/// last filling what is left, each decimal, octal (leading 0) or hexadecimal (leading 0x).
pub fn inet_aton(text: &str) -> Option<Ipv4Addr> {
    // inet_aton ignores whatever follows white space.
    let text = text.split([' ', '\t', '\n', '\x0b', '\x0c', '\r']).next()?;
    let parts: Vec<u32> = text.split('.').map(inet_aton_part).collect::<Option<_>>()?;
    let (&last, leading) = parts.split_last()?;
    if leading.len() > 3 || leading.iter().any(|part| *part > 0xff) {
        return None;
    }
    let room = 32 - 8 * u32::try_from(leading.len()).ok()?;
    if room < 32 && last >> room != 0 {
        return None;
    }
    let high = leading.iter().fold(0_u32, |ip, part| ip << 8 | part);
    let high = high.checked_shl(room).unwrap_or(0);
    Some(Ipv4Addr::from(high | last))
}

fn inet_aton_part(part: &str) -> Option<u32> {
    let (digits, radix) = match part.as_bytes() {
        [b'0', b'x' | b'X', ..] => (part.get(2..)?, 16),
        [b'0', _, ..] => (part.get(1..)?, 8),
        _ => (part, 10),
    };
    // from_str_radix would accept a sign.
    if !digits.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        return None;
    }
    u32::from_str_radix(digits, radix).ok()
}

/// Reads an IP address as libpq reads a `hostaddr` or decides that a host name is one.
pub fn ip_address(text: &str) -> Option<IpAddr> {
    inet_aton(text).map(IpAddr::V4).or_else(|| text.parse().ok().map(IpAddr::V6))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inet_aton_reads_what_the_c_function_reads() {
        let localhost = Some(Ipv4Addr::LOCALHOST);
        for text in
            ["127.0.0.1", "127.1", "127.0.1", "2130706433", "0x7f.1", "0177.0.0.01", "127.1 x"]
        {
            assert_eq!(inet_aton(text), localhost, "{text}");
        }
        for text in [
            "",
            "127.0.0.256",
            "1.2.3.4.5",
            "256.1",
            "a.b",
            "127.0.0.1x",
            "08.1.1.1",
            "+1.1",
            "1..2",
            "4294967296",
            "::1",
        ] {
            assert_eq!(inet_aton(text), None, "{text}");
        }
        assert_eq!(inet_aton("255.255.255.255"), Some(Ipv4Addr::BROADCAST));
        assert_eq!(inet_aton("1.65536"), Some(Ipv4Addr::new(1, 1, 0, 0)));
    }

    #[test]
    fn sockaddrs_are_read_field_by_field() {
        let mut v4 = libc::AF_INET.to_ne_bytes()[..2].to_vec();
        v4.extend([0x15, 0x38, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
        let address = Address::from_sockaddr(&v4).unwrap();
        assert_eq!(address, Address::V4("127.0.0.1:5432".parse().unwrap()));
        assert!(!address.is_local());
        for length in 0..8 {
            assert_eq!(Address::from_sockaddr(&v4[..length]), None, "{length}");
        }

        let mut v6 = libc::AF_INET6.to_ne_bytes()[..2].to_vec();
        v6.extend([0x15, 0x38, 0, 0, 0, 0]);
        v6.extend(Ipv6Addr::LOCALHOST.octets());
        v6.extend(7_u32.to_ne_bytes());
        let expected = SocketAddrV6::new(Ipv6Addr::LOCALHOST, 5432, 0, 7);
        assert_eq!(Address::from_sockaddr(&v6), Some(Address::V6(expected)));

        let mut path = libc::AF_UNIX.to_ne_bytes()[..2].to_vec();
        let mut name = path.clone();
        path.extend(b"/tmp/.s.PGSQL.5432\0\0\0");
        assert_eq!(
            Address::from_sockaddr(&path),
            Some(Address::UnixPath(b"/tmp/.s.PGSQL.5432".to_vec()))
        );
        name.extend(b"\0pg/.s.PGSQL.5432");
        assert_eq!(
            Address::from_sockaddr(&name),
            Some(Address::UnixAbstract(b"pg/.s.PGSQL.5432".to_vec()))
        );
        assert!(Address::from_sockaddr(&name).is_some_and(|address| address.is_local()));
        assert!(Address::from_sockaddr(&path).is_some_and(|address| address.is_local()));
        assert_eq!(Address::from_sockaddr(&[9, 9, 0, 0]), None);
    }
}

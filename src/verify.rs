//! Whether a server's certificate belongs to the host the session was asked for: libpq 18's
//! rules (`fe-secure-common.c`, `pgtls_verify_peer_name_matches_certificate_guts`), which differ
//! from OpenSSL's own. Used for sslmode=verify-full, after the chain is verified.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use openssl::nid::Nid;
use openssl::x509::X509Ref;

use crate::address::{inet_aton, ip_address};
use crate::error::Error;

/// One subject alternative name.
#[derive(Debug)]
enum AltName {
    Dns(Vec<u8>),
    Ip(Vec<u8>),
    /// A kind that plays no part.
    Other,
    /// A kind that could not be told; it must not open the way to the common name.
    Unknown,
}

/// Checks the certificate against the host name of the session's connection options.
pub fn verify_peer_name(certificate: &X509Ref, host: Option<&str>) -> Result<(), Error> {
    let Some(host) = host else {
        return refuse("host name must be specified for a verified SSL connection");
    };
    let common_name = certificate
        .subject_name()
        .entries_by_nid(Nid::COMMONNAME)
        .next()
        .map(|entry| entry.data().as_slice().to_vec());
    match_names(host, &alt_names(certificate), common_name.as_deref())
}

fn alt_names(certificate: &X509Ref) -> Vec<AltName> {
    let names = certificate.subject_alt_names();
    let classify = |name: &openssl::x509::GeneralNameRef| {
        if let Some(dns) = name.dnsname() {
            AltName::Dns(dns.as_bytes().to_vec())
        } else if let Some(ip) = name.ipaddress() {
            AltName::Ip(ip.to_vec())
        } else if name.email().is_some() || name.uri().is_some() || name.directory_name().is_some()
        {
            AltName::Other
        } else {
            AltName::Unknown
        }
    };
    names.iter().flatten().map(classify).collect()
}

fn match_names(host: &str, names: &[AltName], common_name: Option<&[u8]>) -> Result<(), Error> {
    let host_is_ip = ip_address(host).is_some();
    let mut check_common_name = true;
    let mut examined = Vec::new();
    for name in names {
        let matches = match name {
            AltName::Dns(dns) => {
                check_common_name &= host_is_ip;
                examined.push(printable_name(dns)?);
                dns_name_matches(dns, host)
            }
            AltName::Ip(ip) => {
                check_common_name &= !host_is_ip;
                examined.push(printable_ip(ip)?);
                ip_matches(ip, host)
            }
            AltName::Other => false,
            AltName::Unknown => {
                check_common_name = false;
                false
            }
        };
        if matches {
            return Ok(());
        }
    }
    if let (true, Some(name)) = (check_common_name, common_name) {
        examined.push(printable_name(name)?);
        if dns_name_matches(name, host) {
            return Ok(());
        }
    }
    mismatch(host, &examined)
}

fn mismatch(host: &str, examined: &[String]) -> Result<(), Error> {
    match examined {
        [] => refuse("could not get server's host name from server certificate"),
        [only] => refuse(&format!(
            "server certificate for \"{only}\" does not match host name \"{host}\""
        )),
        [first, others @ ..] => {
            let count = others.len();
            let plural = if count == 1 { "name" } else { "names" };
            refuse(&format!(
                "server certificate for \"{first}\" (and {count} other {plural}) \
                 does not match host name \"{host}\""
            ))
        }
    }
}

fn refuse(reason: &str) -> Result<(), Error> {
    Err(Error::Tls(reason.to_owned()))
}

/// A NUL in a name has deceived many a client (CVE-2009-4034).
fn printable_name(name: &[u8]) -> Result<String, Error> {
    if name.contains(&0) {
        return Err(Error::Tls("SSL certificate's name contains embedded null".to_owned()));
    }
    Ok(String::from_utf8_lossy(name).into_owned())
}

fn printable_ip(ip: &[u8]) -> Result<String, Error> {
    certificate_ip(ip).map(|ip| ip.to_string()).ok_or_else(|| {
        let length = ip.len();
        Error::Tls(format!("certificate contains IP address with invalid length {length}"))
    })
}

fn certificate_ip(ip: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(ip).map(|ip| IpAddr::V4(Ipv4Addr::from(ip)));
    let v6 = <[u8; 16]>::try_from(ip).map(|ip| IpAddr::V6(Ipv6Addr::from(ip)));
    v4.or(v6).ok()
}

/// libpq reads the host in the family of the certificate's address.
fn ip_matches(ip: &[u8], host: &str) -> bool {
    match certificate_ip(ip) {
        Some(IpAddr::V4(v4)) => inet_aton(host) == Some(v4),
        Some(IpAddr::V6(v6)) => host.parse() == Ok(v6),
        None => false,
    }
}

/// The name itself, or a wildcard for its first label: `*.` and then what follows the host's
/// first dot. Case does not matter.
fn dns_name_matches(name: &[u8], host: &str) -> bool {
    let host = host.as_bytes();
    if name.eq_ignore_ascii_case(host) {
        return true;
    }
    let Some(suffix) = name.strip_prefix(b"*").filter(|s| s.starts_with(b".") && s.len() > 1)
    else {
        return false;
    };
    let first_label_ends = host.iter().position(|byte| *byte == b'.');
    first_label_ends
        .filter(|end| *end > 0)
        .and_then(|end| host.get(end..))
        .is_some_and(|rest| rest.eq_ignore_ascii_case(suffix))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dns(name: &str) -> AltName {
        AltName::Dns(name.as_bytes().to_vec())
    }

    fn ip(address: &str) -> AltName {
        AltName::Ip(match address.parse().unwrap() {
            IpAddr::V4(v4) => v4.octets().to_vec(),
            IpAddr::V6(v6) => v6.octets().to_vec(),
        })
    }

    fn check(host: &str, names: &[AltName], common_name: &str) -> Result<(), String> {
        match_names(host, names, Some(common_name.as_bytes())).map_err(|e| e.to_string())
    }

    #[test]
    fn wildcards_stand_for_exactly_one_label() {
        for (name, host, matches) in [
            ("db.example.com", "DB.example.COM", true),
            ("*.example.com", "db.example.com", true),
            ("*.EXAMPLE.com", "db.example.com", true),
            ("*.example.com", "a.db.example.com", false),
            ("*.example.com", "example.com", false),
            ("*.example.com", ".example.com", false),
            ("d*.example.com", "db.example.com", false),
            ("*", "localhost", false),
            ("*.", "localhost.", false),
            ("**.example.com", "db.example.com", false),
            ("*.com", "example.com", true),
        ] {
            assert_eq!(dns_name_matches(name.as_bytes(), host), matches, "{name} {host}");
        }
    }

    #[test]
    fn the_common_name_counts_only_without_alternative_names_of_the_hosts_kind() {
        assert!(check("db", &[], "db").is_ok());
        assert!(check("db", &[ip("10.0.0.1")], "db").is_ok());
        assert!(check("db", &[dns("other")], "db").is_err());
        assert!(check("10.0.0.1", &[dns("db")], "10.0.0.1").is_ok());
        assert!(check("10.0.0.1", &[ip("10.0.0.2")], "10.0.0.1").is_err());
        assert!(check("db", &[AltName::Other], "db").is_ok());
        assert!(check("db", &[AltName::Unknown], "db").is_err());
    }

    #[test]
    fn addresses_match_in_every_notation_of_inet_aton() {
        assert!(check("127.1", &[ip("127.0.0.1")], "x").is_ok());
        assert!(check("::1", &[ip("::1")], "x").is_ok());
        assert!(check("0:0::1", &[ip("::1")], "x").is_ok());
        assert!(check("::2", &[ip("::1")], "x").is_err());
        assert!(check("127.0.0.1", &[ip("::ffff:127.0.0.1")], "x").is_err());
    }

    #[test]
    fn refusals_name_the_first_name_and_count_the_others() {
        assert_eq!(
            check("db", &[], "cn").unwrap_err(),
            "server certificate for \"cn\" does not match host name \"db\""
        );
        assert_eq!(
            check("db", &[dns("a"), ip("::1")], "cn").unwrap_err(),
            "server certificate for \"a\" (and 1 other name) does not match host name \"db\""
        );
        assert_eq!(
            check("db", &[dns("a"), dns("b"), dns("c")], "cn").unwrap_err(),
            "server certificate for \"a\" (and 2 other names) does not match host name \"db\""
        );
        assert_eq!(
            match_names("db", &[], None).unwrap_err().to_string(),
            "could not get server's host name from server certificate"
        );
        assert_eq!(
            check("db", &[dns("db\0.evil")], "cn").unwrap_err(),
            "SSL certificate's name contains embedded null"
        );
        assert_eq!(
            check("db", &[AltName::Ip(vec![1, 2, 3])], "cn").unwrap_err(),
            "certificate contains IP address with invalid length 3"
        );
    }
}

//! The session's connection options, parsed once into what the rest of the library works with.
//! Values come from the host's `PQconninfo`, defaults included; the password is not among them.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use zeroize::Zeroizing;

use crate::error::Error;
use crate::gssapi::Gssapi;

/// The options that a cancel connection depends on.
const OPTIONS: [&str; 23] = [
    "connect_timeout",
    "host",
    "hostaddr",
    "keepalives",
    "keepalives_count",
    "keepalives_idle",
    "keepalives_interval",
    "krbsrvname",
    "requirepeer",
    "ssl_max_protocol_version",
    "ssl_min_protocol_version",
    "sslcert",
    "sslcertmode",
    "sslcrl",
    "sslcrldir",
    "sslkey",
    "sslkeylogfile",
    "sslmode",
    "sslnegotiation",
    "sslpassword",
    "sslrootcert",
    "sslsni",
    "tcp_user_timeout",
];

/// Option names and values as the host's libpq reports them: those that matter, and wiped when
/// dropped, because `sslpassword` is among them.
#[derive(Default)]
pub struct ConnInfo(Vec<(&'static str, Zeroizing<Vec<u8>>)>);

impl ConnInfo {
    /// Takes note of an option, if it matters.
    pub fn note(&mut self, name: &[u8], value: &[u8]) {
        if let Some(known) = OPTIONS.iter().find(|known| known.as_bytes() == name) {
            self.0.push((known, Zeroizing::new(value.to_vec())));
        }
    }

    /// The value of an option, if it has one. An empty one counts as none, as in libpq.
    pub fn value(&self, option: &str) -> Option<&[u8]> {
        self.verbatim(option).filter(|value| !value.is_empty())
    }

    fn verbatim(&self, option: &str) -> Option<&[u8]> {
        let (_, value) = self.0.iter().find(|(name, _)| *name == option)?;
        Some(value)
    }

    /// The value for use in a message.
    pub fn text(&self, option: &str) -> Option<String> {
        Some(String::from_utf8_lossy(self.value(option)?).into_owned())
    }

    fn path(&self, option: &str) -> Option<PathBuf> {
        Some(PathBuf::from(OsStr::from_bytes(self.value(option)?)))
    }
}

/// An integer option. libpq complains of a malformed one when it needs it, not before, so a
/// malformed one is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IntOption {
    /// Not given.
    Unset,
    /// Given.
    Value(i32),
    /// Given, but no integer.
    Malformed(Error),
}

impl IntOption {
    fn parse(options: &ConnInfo, option: &'static str) -> IntOption {
        // An empty one is malformed, not unset: libpq's pqParseIntParam.
        let Some(value) = options.verbatim(option) else {
            return IntOption::Unset;
        };
        let text = String::from_utf8_lossy(value).into_owned();
        // What isspace() accepts around a number.
        let trimmed = text.trim_matches([' ', '\t', '\n', '\x0b', '\x0c', '\r']);
        match trimmed.parse() {
            Ok(number) => IntOption::Value(number),
            Err(_) => IntOption::Malformed(Error::InvalidInteger { option, value: text }),
        }
    }

    /// The number, if one was given.
    pub fn value(&self) -> Result<Option<i32>, Error> {
        match self {
            IntOption::Unset => Ok(None),
            IntOption::Value(number) => Ok(Some(*number)),
            IntOption::Malformed(error) => Err(error.clone()),
        }
    }
}

/// `keepalives*` and `tcp_user_timeout`. `PQconninfo` gives them as text.
#[derive(Debug, Clone)]
pub struct TcpOptions {
    /// `keepalives`; 0 turns them off.
    pub keepalives: IntOption,
    /// `keepalives_idle`, seconds.
    pub idle: IntOption,
    /// `keepalives_interval`, seconds.
    pub interval: IntOption,
    /// `keepalives_count`.
    pub count: IntOption,
    /// `tcp_user_timeout`, milliseconds.
    pub user_timeout: IntOption,
}

impl TcpOptions {
    /// Reads them from the session's options.
    pub fn parse(options: &ConnInfo) -> TcpOptions {
        TcpOptions {
            keepalives: IntOption::parse(options, "keepalives"),
            idle: IntOption::parse(options, "keepalives_idle"),
            interval: IntOption::parse(options, "keepalives_interval"),
            count: IntOption::parse(options, "keepalives_count"),
            user_timeout: IntOption::parse(options, "tcp_user_timeout"),
        }
    }
}

/// `connect_timeout`, in seconds. Zero, negative and unset mean no limit.
#[derive(Debug, Clone)]
pub struct ConnectTimeout(IntOption);

impl ConnectTimeout {
    /// Reads it from the session's options.
    pub fn parse(options: &ConnInfo) -> ConnectTimeout {
        ConnectTimeout(IntOption::parse(options, "connect_timeout"))
    }

    /// How long PQcancelBlocking may take; `None` for as long as it takes.
    pub fn limit(&self) -> Result<Option<Duration>, Error> {
        let seconds = self.0.value()?.unwrap_or(0);
        Ok(u64::try_from(seconds).ok().filter(|s| *s > 0).map(Duration::from_secs))
    }
}

/// `sslnegotiation`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SslNegotiation {
    /// Ask with SSLRequest first.
    Postgres,
    /// Begin with the TLS handshake (server 17 and later).
    Direct,
}

/// How far the server's certificate is checked beyond what a root certificate file brings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SslMode {
    /// disable, allow, prefer, require: only checked if a root certificate file is there.
    /// (A TLS session may have any of them; its cancel is sent over TLS in every case.)
    Encrypt,
    /// verify-ca.
    VerifyCa,
    /// verify-full.
    VerifyFull,
}

/// Where trusted root certificates come from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum RootCert {
    /// `~/.postgresql/root.crt`, if it is there.
    Default,
    /// `sslrootcert`.
    File(PathBuf),
    /// `sslrootcert=system` (libpq 16 and later): what the machine trusts.
    System,
}

/// A TLS version, as `ssl_min_protocol_version` and `ssl_max_protocol_version` name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum TlsVersion {
    V1_0,
    V1_1,
    V1_2,
    V1_3,
}

/// A group for TLS's key exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Group {
    P256,
    P384,
    P521,
    X25519,
    X448,
    X25519MlKem768,
}

/// Everything that decides how the cancel connection of a TLS session is protected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsOptions {
    /// The group that the session's own handshake came to, if it is known.
    pub group: Option<Group>,
    /// How TLS is asked for.
    pub negotiation: SslNegotiation,
    /// How far the server is verified.
    pub sslmode: SslMode,
    /// Trusted roots.
    pub rootcert: RootCert,
    /// `sslcrl`.
    pub crl: Option<PathBuf>,
    /// `sslcrldir`.
    pub crldir: Option<PathBuf>,
    /// `sslcert`; `None` for `~/.postgresql/postgresql.crt`.
    pub cert: Option<PathBuf>,
    /// `sslkey`; `None` for `~/.postgresql/postgresql.key`.
    pub key: Option<PathBuf>,
    /// What unlocks the key: `sslpassword`, or what the application's hook answered.
    pub passphrase: Option<Zeroizing<Vec<u8>>>,
    /// Whether a client certificate may be sent (`sslcertmode` is not disable).
    pub send_cert: bool,
    /// `ssl_min_protocol_version`.
    pub min_version: Option<TlsVersion>,
    /// `ssl_max_protocol_version`.
    pub max_version: Option<TlsVersion>,
    /// `sslsni`.
    pub sni: bool,
    /// `sslkeylogfile` (libpq 18).
    pub keylogfile: Option<PathBuf>,
}

impl TlsOptions {
    /// Reads them from the options of a session of a libpq of this major version.
    pub fn parse(options: &ConnInfo, host_major: i32) -> Result<TlsOptions, Error> {
        let passphrase = options.value("sslpassword").map(|p| Zeroizing::new(p.to_vec()));
        Ok(TlsOptions {
            group: None,
            negotiation: parse_negotiation(options)?,
            sslmode: parse_sslmode(options)?,
            rootcert: parse_rootcert(options, host_major),
            crl: options.path("sslcrl"),
            crldir: options.path("sslcrldir"),
            cert: options.path("sslcert"),
            key: options.path("sslkey"),
            passphrase,
            send_cert: parse_certmode(options)?,
            min_version: parse_version(options, "ssl_min_protocol_version")?,
            max_version: parse_version(options, "ssl_max_protocol_version")?,
            sni: options.value("sslsni").is_none_or(|sni| sni.starts_with(b"1")),
            keylogfile: options.path("sslkeylogfile"),
        })
    }
}

/// Everything that the cancel connection of a GSSAPI-encrypted session needs. (`gsslib` chooses
/// between libraries on Windows only.)
#[derive(Debug)]
pub struct GssOptions {
    /// The library that the session uses.
    pub gssapi: Gssapi,
    /// Whom the server has to prove to be: `krbsrvname`, '@' and the host's name.
    pub service: String,
}

impl GssOptions {
    /// Reads them from the options of a session with this host.
    pub fn parse(options: &ConnInfo, gssapi: Gssapi, host_name: &str) -> GssOptions {
        let krbsrvname = options.text("krbsrvname").unwrap_or_else(|| "postgres".to_owned());
        GssOptions { gssapi, service: format!("{krbsrvname}@{host_name}") }
    }
}

fn invalid(options: &ConnInfo, option: &'static str) -> Error {
    Error::InvalidOption { option, value: options.text(option).unwrap_or_default() }
}

fn parse_sslmode(options: &ConnInfo) -> Result<SslMode, Error> {
    match options.value("sslmode") {
        None | Some(b"disable" | b"allow" | b"prefer" | b"require") => Ok(SslMode::Encrypt),
        Some(b"verify-ca") => Ok(SslMode::VerifyCa),
        Some(b"verify-full") => Ok(SslMode::VerifyFull),
        Some(_) => Err(invalid(options, "sslmode")),
    }
}

fn parse_negotiation(options: &ConnInfo) -> Result<SslNegotiation, Error> {
    match options.value("sslnegotiation") {
        None | Some(b"postgres") => Ok(SslNegotiation::Postgres),
        Some(b"direct") => Ok(SslNegotiation::Direct),
        Some(_) => Err(invalid(options, "sslnegotiation")),
    }
}

fn parse_rootcert(options: &ConnInfo, host_major: i32) -> RootCert {
    match options.path("sslrootcert") {
        None => RootCert::Default,
        // Before libpq 16, "system" was the name of a file like any other.
        Some(path) if path == OsStr::new("system") && host_major >= 16 => RootCert::System,
        Some(path) => RootCert::File(path),
    }
}

fn parse_certmode(options: &ConnInfo) -> Result<bool, Error> {
    match options.value("sslcertmode") {
        None | Some(b"allow" | b"require") => Ok(true),
        Some(b"disable") => Ok(false),
        Some(_) => Err(invalid(options, "sslcertmode")),
    }
}

fn parse_version(options: &ConnInfo, option: &'static str) -> Result<Option<TlsVersion>, Error> {
    let Some(name) = options.value(option) else {
        return Ok(None);
    };
    let versions = [
        ("TLSv1", TlsVersion::V1_0),
        ("TLSv1.1", TlsVersion::V1_1),
        ("TLSv1.2", TlsVersion::V1_2),
        ("TLSv1.3", TlsVersion::V1_3),
    ];
    versions
        .iter()
        .find(|(known, _)| name.eq_ignore_ascii_case(known.as_bytes()))
        .map(|(_, version)| Some(*version))
        .ok_or_else(|| invalid(options, option))
}

impl std::fmt::Display for TlsVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            TlsVersion::V1_0 => "TLSv1",
            TlsVersion::V1_1 => "TLSv1.1",
            TlsVersion::V1_2 => "TLSv1.2",
            TlsVersion::V1_3 => "TLSv1.3",
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn conninfo(options: &[(&str, &str)]) -> ConnInfo {
        let mut conninfo = ConnInfo::default();
        for (name, value) in options {
            conninfo.note(name.as_bytes(), value.as_bytes());
        }
        conninfo
    }

    #[test]
    fn empty_values_count_as_unset() {
        let options = conninfo(&[("sslcrl", ""), ("sslkey", "k")]);
        assert_eq!(options.value("sslcrl"), None);
        assert_eq!(options.value("sslkey"), Some(&b"k"[..]));
        assert_eq!(options.value("sslcert"), None);
    }

    #[test]
    fn what_does_not_matter_is_not_kept() {
        let options = conninfo(&[("password", "secret"), ("user", "u"), ("sslmode", "require")]);
        assert_eq!(options.0.len(), 1);
    }

    #[test]
    fn integers_as_strtol_and_isspace_read_them() {
        for (text, expected) in [("7", 7), (" +7 ", 7), ("-1", -1), ("\t0\r\n", 0)] {
            let parsed = IntOption::parse(&conninfo(&[("keepalives", text)]), "keepalives");
            assert_eq!(parsed, IntOption::Value(expected), "{text:?}");
        }
        for text in ["", "x", "1x", "1 2", "2147483648", " ", "0x10"] {
            let parsed = IntOption::parse(&conninfo(&[("keepalives", text)]), "keepalives");
            let error = parsed.value().unwrap_err().to_string();
            let expected =
                format!("invalid integer value \"{text}\" for connection option \"keepalives\"");
            assert_eq!(error, expected);
        }
        assert_eq!(IntOption::parse(&conninfo(&[]), "keepalives"), IntOption::Unset);
    }

    #[test]
    fn only_a_positive_connect_timeout_limits() {
        let limit = |text| ConnectTimeout::parse(&conninfo(&[("connect_timeout", text)])).limit();
        assert_eq!(limit("0"), Ok(None));
        assert_eq!(limit("-5"), Ok(None));
        assert_eq!(limit("1"), Ok(Some(Duration::from_secs(1))));
        assert!(limit("soon").is_err());
    }

    #[test]
    fn system_is_a_file_name_before_libpq_16() {
        let options = conninfo(&[("sslrootcert", "system")]);
        let parse = |major| TlsOptions::parse(&options, major).unwrap().rootcert;
        assert_eq!(parse(15), RootCert::File("system".into()));
        assert_eq!(parse(16), RootCert::System);
    }

    #[test]
    fn unknown_words_are_refused_not_guessed() {
        for option in ["sslmode", "sslnegotiation", "sslcertmode"] {
            let error = TlsOptions::parse(&conninfo(&[(option, "new")]), 18).unwrap_err();
            assert_eq!(error.to_string(), format!("invalid {option} value: \"new\""));
        }
        let options = conninfo(&[("ssl_max_protocol_version", "TLSv9")]);
        assert!(TlsOptions::parse(&options, 18).is_err());
    }

    #[test]
    fn defaults_are_libpqs() {
        let tls = TlsOptions::parse(&conninfo(&[]), 15).unwrap();
        assert_eq!(tls.negotiation, SslNegotiation::Postgres);
        assert_eq!(tls.sslmode, SslMode::Encrypt);
        assert_eq!(tls.rootcert, RootCert::Default);
        assert!(tls.send_cert && tls.sni);
        assert_eq!((tls.min_version, tls.max_version), (None, None));
    }
}

//! The target: an immutable snapshot of one session, all that it takes to cancel it. It is taken
//! while the session is alive and needs the session no more.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crate::address::{Address, ip_address};
use crate::error::Error;
use crate::gssapi::Gssapi;
use crate::host::Session;
use crate::host_layout::CancelBlock;
use crate::known_contexts;
use crate::machine::Negotiation;
use crate::message::{CancelRequest, Encryption};
use crate::openssl_memory::call_openssl;
use crate::params::{ConnInfo, ConnectTimeout, GssOptions, SslNegotiation, TcpOptions, TlsOptions};
use crate::tls_context::ask_passphrase_hook;

/// How the session is protected, and therefore its cancel.
#[derive(Debug)]
pub enum Protection {
    /// Not at all.
    Plaintext,
    /// By TLS.
    Tls(Box<TlsOptions>),
    /// By GSSAPI encryption.
    Gss(GssOptions),
}

/// One session, as far as cancelling it goes.
#[derive(Debug)]
pub struct Target {
    /// Where it is connected to: this very address, no other host of its options.
    pub address: Address,
    /// The host name it was asked for by, which the server's certificate must match.
    pub host_name: Option<String>,
    /// How messages about it begin.
    pub failure_prefix: String,
    /// What cancels it.
    pub request: CancelRequest,
    /// How it is protected.
    pub protection: Protection,
    /// Socket options.
    pub tcp: TcpOptions,
    /// `requirepeer`, for Unix sockets.
    pub requirepeer: Option<Vec<u8>>,
    /// `connect_timeout`.
    pub connect_timeout: ConnectTimeout,
    /// Whether what takes long was done ahead.
    is_prepared: AtomicBool,
}

impl Target {
    /// What the host gives to cancel the session with.
    pub fn cancel_block(session: &Session<'_>) -> Result<CancelBlock, Error> {
        if !session.is_open() {
            return Err(Error::NotOpen);
        }
        let block = session.cancel_block()?;
        // Not yet, or no longer, an established session; or a server that sent no key. (If there is a
        // PID, it did, and the key is not where it is looked for.)
        if !block.has_key() && session.backend_pid() == 0 {
            return Err(Error::NoCancelKey);
        }
        Ok(block)
    }

    /// Takes the snapshot.
    pub fn of_block(session: &Session<'_>, block: &CancelBlock) -> Result<Target, Error> {
        let request = block.request(session.backend_pid()).ok_or_else(|| session.unreadable())?;
        let address = block.address().ok_or_else(|| session.unreadable())?;
        let options = session.options()?;
        let protection = protection(session, &address, &options)?;
        let server = ServerName::find(&options, &session.host_name(), &address);
        Ok(Target {
            failure_prefix: server.failure_prefix(&address, &session.port()),
            host_name: server.name,
            address,
            request,
            protection,
            tcp: TcpOptions::parse(&options),
            requirepeer: options.value("requirepeer").map(<[u8]>::to_vec),
            connect_timeout: ConnectTimeout::parse(&options),
            is_prepared: AtomicBool::new(false),
        })
    }

    /// Makes, once, the TLS context that the cancel will need: reading all the roots that a machine
    /// trusts would stall an event loop. If it fails, so will the cancel, which has a place to say so.
    pub fn prepare(&self) {
        if let Protection::Tls(options) = &self.protection
            && known_contexts::may_keep(options)
            && !self.is_prepared.swap(true, Relaxed)
        {
            let _ = call_openssl(|| known_contexts::context_for(options));
        }
    }

    /// How the protocol asks for the protection.
    pub fn negotiation(&self) -> Option<Negotiation> {
        match &self.protection {
            Protection::Plaintext => None,
            Protection::Tls(options) => Some(match options.negotiation {
                SslNegotiation::Postgres => Negotiation::Request(Encryption::Ssl),
                SslNegotiation::Direct => Negotiation::DirectSsl,
            }),
            Protection::Gss(_) => Some(Negotiation::Request(Encryption::Gss)),
        }
    }
}

/// What counts is how the session runs, not what its options would allow: libpq 17 and 18 decide
/// anew for the cancel, and with sslmode=prefer or allow may do so for plaintext.
fn protection(
    session: &Session<'_>,
    address: &Address,
    options: &ConnInfo,
) -> Result<Protection, Error> {
    if !session.is_encrypted() {
        return Ok(Protection::Plaintext);
    }
    if address.is_local() {
        // libpq never does this; if one did, there would be no way to do it as well.
        return Err(session.unreadable());
    }
    if session.uses_gss_encryption() {
        let gssapi = Gssapi::of(session.host())?;
        return Ok(Protection::Gss(GssOptions::parse(options, gssapi, &session.host_name())));
    }
    let mut tls = TlsOptions::parse(options, session.host().major())?;
    tls.group = session.negotiated_group();
    if let Some(answer) = session.passphrase_hook().and_then(|hook| ask_passphrase_hook(&tls, hook))
    {
        tls.passphrase = Some(answer);
    }
    Ok(Protection::Tls(Box::new(tls)))
}

/// How the server was named in the options: the one of their hosts that the session got to.
struct ServerName {
    /// `host`, where it was given.
    name: Option<String>,
    /// `hostaddr`, where it was given: messages then show it and not the name.
    hostaddr: Option<String>,
}

impl ServerName {
    /// `PQhost` tells the name, or the hostaddr in its lack; which of the two, and whether there
    /// was a hostaddr, has to be found in the options.
    fn find(options: &ConnInfo, pqhost: &str, address: &Address) -> ServerName {
        let hosts = options.text("host").unwrap_or_default();
        let hostaddrs = options.text("hostaddr").unwrap_or_default();
        let mut hosts = hosts.split(',').filter(|_| !hosts.is_empty());
        for hostaddr in hostaddrs.split(',').filter(|_| !hostaddrs.is_empty()) {
            let host = hosts.next().filter(|host| !host.is_empty());
            let is_this = host.unwrap_or(hostaddr) == pqhost
                && parse_hostaddr(hostaddr).is_some_and(|ip| Some(ip) == address.ip());
            if is_this {
                return ServerName {
                    name: host.map(str::to_owned),
                    hostaddr: Some(hostaddr.to_owned()),
                };
            }
        }
        // Where only a hostaddr was given, libpq 10 tells the directory of its Unix sockets.
        let is_directory = pqhost.starts_with('/') && !address.is_local();
        let name = (!pqhost.is_empty() && !is_directory).then(|| pqhost.to_owned());
        ServerName { name, hostaddr: None }
    }

    /// `emitHostIdentityInfo`.
    fn failure_prefix(&self, address: &Address, port: &str) -> String {
        let ip = match address {
            Address::UnixPath(path) => return socket_prefix("", path),
            Address::UnixAbstract(name) => return socket_prefix("@", name),
            Address::V4(v4) => v4.ip().to_string(),
            Address::V6(v6) => v6.ip().to_string(),
        };
        let port = if port.is_empty() { "5432" } else { port };
        match (&self.hostaddr, &self.name) {
            (None, Some(name)) if *name != ip => {
                format!("connection to server at \"{name}\" ({ip}), port {port} failed: ")
            }
            (Some(displayed), _) | (None, Some(displayed)) => {
                format!("connection to server at \"{displayed}\", port {port} failed: ")
            }
            (None, None) => format!("connection to server at \"{ip}\", port {port} failed: "),
        }
    }
}

fn socket_prefix(marker: &str, name: &[u8]) -> String {
    let name = String::from_utf8_lossy(name);
    format!("connection to server on socket \"{marker}{name}\" failed: ")
}

/// A hostaddr may name an interface after '%'.
fn parse_hostaddr(hostaddr: &str) -> Option<std::net::IpAddr> {
    ip_address(hostaddr.split('%').next()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::tests::conninfo;

    fn prefix(options: &[(&str, &str)], pqhost: &str) -> String {
        let address = Address::V4("127.0.0.1:5433".parse().unwrap());
        ServerName::find(&conninfo(options), pqhost, &address).failure_prefix(&address, "5433")
    }

    #[test]
    fn the_server_is_named_as_it_was_given() {
        let at = |what: &str| format!("connection to server at {what}, port 5433 failed: ");
        assert_eq!(prefix(&[("host", "db")], "db"), at("\"db\" (127.0.0.1)"));
        assert_eq!(prefix(&[("host", "127.0.0.1")], "127.0.0.1"), at("\"127.0.0.1\""));
        let both = [("host", "db"), ("hostaddr", "127.0.0.1")];
        assert_eq!(prefix(&both, "db"), at("\"127.0.0.1\""));
        assert_eq!(prefix(&[("hostaddr", "127.1")], "127.1"), at("\"127.1\""));
    }

    #[test]
    fn the_name_to_verify_is_never_an_address_given_as_hostaddr() {
        let address = Address::V4("127.0.0.1:5433".parse().unwrap());
        let name = |options: &[(&str, &str)], pqhost: &str| {
            ServerName::find(&conninfo(options), pqhost, &address).name
        };
        assert_eq!(name(&[("hostaddr", "127.0.0.1")], "127.0.0.1"), None);
        assert_eq!(
            name(&[("host", "a,db"), ("hostaddr", "10.0.0.1,127.0.0.1")], "db"),
            Some("db".into())
        );
        assert_eq!(name(&[("host", "a,"), ("hostaddr", "10.0.0.1,127.0.0.1")], "127.0.0.1"), None);
        assert_eq!(
            name(&[("host", "a,127.0.0.1"), ("hostaddr", "10.0.0.1,")], "127.0.0.1"),
            Some("127.0.0.1".into())
        );
        assert_eq!(name(&[("hostaddr", "127.0.0.1")], "/var/run/postgresql"), None);
    }

    #[test]
    fn unix_sockets_are_named_by_path() {
        let server = ServerName { name: Some("/tmp".into()), hostaddr: None };
        let path = Address::UnixPath(b"/tmp/.s.PGSQL.1".to_vec());
        let name = Address::UnixAbstract(b"pg/.s.PGSQL.1".to_vec());
        assert_eq!(
            server.failure_prefix(&path, "1"),
            "connection to server on socket \"/tmp/.s.PGSQL.1\" failed: "
        );
        assert_eq!(
            server.failure_prefix(&name, "1"),
            "connection to server on socket \"@pg/.s.PGSQL.1\" failed: "
        );
    }
}

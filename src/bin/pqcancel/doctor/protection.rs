//! What protects a session: the way it takes, how it is encrypted, and how far its server is known.

use std::env;
use std::ffi::c_int;
use std::io::{Read, Write};
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6, TcpStream};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{SockaddrStorage, getpeername};
use nix::unistd::{User, getuid};

use super::libpq::Session;

/// libpq takes this for the machine's own roots from version 16 on.
const SYSTEM_ROOTS: &str = "system";
const SYSTEM_ROOTS_SINCE: c_int = 160_000;

const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    UnixSocket,
    Tcp(SocketAddr),
}

impl Route {
    /// It stays on this machine as far as this machine can tell.
    pub(crate) fn is_local(self) -> bool {
        match self {
            Route::UnixSocket => true,
            Route::Tcp(address) => address.ip().to_canonical().is_loopback(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Encryption {
    Tls { protocol: String, cipher: String },
    Gss,
    None,
}

impl Encryption {
    pub(crate) fn of(session: &Session) -> Self {
        let attribute = |name| session.tls_attribute(name).unwrap_or_else(|| "unknown".to_owned());
        if session.uses_tls() {
            Encryption::Tls { protocol: attribute(c"protocol"), cipher: attribute(c"cipher") }
        } else if session.uses_gss_encryption() {
            Encryption::Gss
        } else {
            Encryption::None
        }
    }
}

/// How far a server's certificate was verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verified {
    No,
    Chain,
    ChainAndHostName,
}

#[derive(Clone, Debug)]
pub(crate) struct Protection {
    pub(crate) route: Route,
    pub(crate) encryption: Encryption,
    pub(crate) sslmode: String,
    pub(crate) roots: Option<String>,
    pub(crate) verified: Verified,
    /// Of a session in plaintext over TCP: whether it need not be. None where that is not known.
    pub(crate) tls_is_offered: Option<bool>,
}

impl Protection {
    pub(crate) fn of(session: &Session, libpq_version: c_int) -> Self {
        let route = route(session);
        let encryption = Encryption::of(session);
        let sslmode = session.option(c"sslmode").unwrap_or_default();
        let roots = roots(session.option(c"sslrootcert"), libpq_version);
        // Roots that are there are used, whatever sslmode says.
        let verified = match (&encryption, &roots) {
            (Encryption::Tls { .. }, Some(_)) if sslmode == "verify-full" => {
                Verified::ChainAndHostName
            }
            (Encryption::Tls { .. }, Some(_)) => Verified::Chain,
            _ => Verified::No,
        };
        let tls_is_offered = match (route, &encryption) {
            (Route::Tcp(server), Encryption::None) => offers_tls(server),
            _ => None,
        };
        Self { route, encryption, sslmode, roots, verified, tls_is_offered }
    }

    pub(crate) fn is_encrypted(&self) -> bool {
        self.encryption != Encryption::None
    }
}

/// Where the socket leads to; libpq 12 and later would tell a name's address, too, but not all do.
fn route(session: &Session) -> Route {
    let peer = session.socket().and_then(|it| getpeername::<SockaddrStorage>(it.as_raw_fd()).ok());
    let v4 = peer.as_ref().and_then(|peer| peer.as_sockaddr_in());
    let v6 = peer.as_ref().and_then(|peer| peer.as_sockaddr_in6());
    match (v4, v6) {
        (Some(v4), _) => Route::Tcp(SocketAddrV4::from(*v4).into()),
        (_, Some(v6)) => Route::Tcp(SocketAddrV6::from(*v6).into()),
        _ => Route::UnixSocket,
    }
}

/// The roots that libpq verifies by: a file that is there, or the machine's.
fn roots(sslrootcert: Option<String>, libpq_version: c_int) -> Option<String> {
    if sslrootcert.as_deref() == Some(SYSTEM_ROOTS) && libpq_version >= SYSTEM_ROOTS_SINCE {
        return sslrootcert;
    }
    let file = sslrootcert.map(PathBuf::from).or_else(default_roots)?;
    file.exists().then(|| file.to_string_lossy().into_owned())
}

fn default_roots() -> Option<PathBuf> {
    let named = env::var_os("HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
    let home = named.or_else(|| User::from_uid(getuid()).ok().flatten().map(|user| user.dir));
    home.map(|home| home.join(Path::new(".postgresql/root.crt")))
}

fn offers_tls(server: SocketAddr) -> Option<bool> {
    let ask = || {
        let mut stream = TcpStream::connect_timeout(&server, PROBE_TIMEOUT)?;
        stream.set_read_timeout(Some(PROBE_TIMEOUT))?;
        stream.write_all(&SSL_REQUEST)?;
        let mut answer = [0];
        stream.read_exact(&mut answer)?;
        std::io::Result::Ok(answer)
    };
    match &ask().ok()? {
        b"S" => Some(true),
        b"N" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_addresses_and_unix_sockets_are_local() {
        let tcp = |address: &str| Route::Tcp(address.parse().unwrap()).is_local();
        assert!(Route::UnixSocket.is_local());
        for local in ["127.0.0.1:5432", "127.8.9.1:5432", "[::1]:5432", "[::ffff:127.0.0.1]:5432"] {
            assert!(tcp(local), "{local}");
        }
        for far in ["192.0.2.1:5432", "10.0.0.1:5432", "[2001:db8::1]:5432", "0.0.0.0:5432"] {
            assert!(!tcp(far), "{far}");
        }
    }

    #[test]
    fn roots_are_files_that_are_there() {
        let here = file!().to_owned();
        let missing = Some("/nowhere/root.crt".to_owned());
        assert_eq!(roots(missing, 180_000), None);
        let existing = env!("CARGO_MANIFEST_DIR").to_owned() + "/" + &here;
        assert_eq!(roots(Some(existing.clone()), 150_000), Some(existing));
        let system = Some(SYSTEM_ROOTS.to_owned());
        assert_eq!(roots(system.clone(), 160_000), system);
        assert_eq!(roots(system, 150_018), None);
    }
}

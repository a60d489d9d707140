//! An OpenSSL context from the session's TLS options: trusted roots, revocation lists, client
//! certificate and key, protocol versions. The order of the steps and the texts are those of
//! libpq 18's `initialize_SSL`.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::unistd::{User, geteuid};
use openssl::error::ErrorStack;
use openssl::pkey::{PKey, Private};
use openssl::ssl::{
    SslContext, SslContextBuilder, SslFiletype, SslMethod, SslMode as Mode, SslOptions,
    SslVerifyMode, SslVersion,
};
use openssl::x509::X509;
use openssl::x509::store::{X509Lookup, X509StoreBuilderRef};
use openssl::x509::verify::X509VerifyFlags;
use zeroize::Zeroizing;

use crate::error::{Error, strerror};
use crate::openssl_memory::call_openssl;
use crate::params::{Group, RootCert, SslMode, TlsOptions, TlsVersion};
use crate::tls_files::TlsFiles;

/// ALPN's name for PostgreSQL's protocol, preceded by its length.
const ALPN_PROTOCOLS: &[u8] = b"\x0apostgresql";

/// The groups on offer for the key exchange, and OpenSSL's names for them.
const GROUPS: [(Group, &str); 6] = [
    (Group::P256, "P-256"),
    (Group::X25519, "X25519"),
    (Group::X25519MlKem768, "X25519MLKEM768"),
    (Group::X448, "X448"),
    (Group::P521, "P-521"),
    (Group::P384, "P-384"),
];

/// The same in a line, as OpenSSL 3.5 reads it: for those with a star a key share is sent along. For
/// any other the server has to ask again, which costs a round trip; so it is the group that the
/// server came to with the session. Where that is not known there are two, because PostgreSQL's
/// default up to 17 is P-256 alone, and 18 prefers X25519.
fn group_list(session: Option<Group>) -> String {
    let has_share =
        |group| session.map_or(matches!(group, Group::P256 | Group::X25519), |it| it == group);
    let (shares, others): (Vec<_>, Vec<_>) = GROUPS.iter().partition(|(it, _)| has_share(*it));
    let shares = shares.iter().map(|(_, name)| format!("*{name}"));
    let others = others.iter().map(|(_, name)| format!("?{name}"));
    let more = ["?ffdhe2048".to_owned(), "?ffdhe3072".to_owned()];
    shares.chain(others).chain(more).collect::<Vec<_>>().join(":")
}

/// The same for OpenSSL before 3.5, which sends one key share, for the first group.
fn group_list_before_3_5(session: Option<Group>) -> String {
    let known = GROUPS.iter().filter(|(group, _)| *group != Group::X25519MlKem768);
    let (first, others): (Vec<_>, Vec<_>) = known.partition(|(it, _)| Some(*it) == session);
    first.iter().chain(&others).map(|(_, name)| *name).collect::<Vec<_>>().join(":")
}

/// Builds a context, from what its files hold now, and notes them. To be called through
/// `call_openssl`.
pub(crate) fn build(
    options: &TlsOptions,
    home: &HomeDirectory,
    files: &mut TlsFiles,
) -> Result<SslContext, Error> {
    let context = SslContextBuilder::new(SslMethod::tls_client()).map_err(could_not_create)?;
    let mut making = Making { context, options, home, files };
    making.set_protocol()?;
    let has_roots = making.load_roots()?;
    making.load_client_certificate()?;
    let mut context = making.context;
    context
        .set_alpn_protos(ALPN_PROTOCOLS)
        .map_err(|e| Error::Tls(format!("could not set SSL ALPN extension: {}", reason(&e))))?;
    context.set_verify(if has_roots { SslVerifyMode::PEER } else { SslVerifyMode::NONE });
    if let Some(path) = options.keylogfile.clone() {
        context.set_keylog_callback(move |_, line| log_key(&path, line));
    }
    Ok(context.build())
}

fn could_not_create(errors: ErrorStack) -> Error {
    Error::Tls(format!("could not create SSL context: {}", reason(&errors)))
}

fn openssl_version(version: TlsVersion) -> SslVersion {
    match version {
        TlsVersion::V1_0 => SslVersion::TLS1,
        TlsVersion::V1_1 => SslVersion::TLS1_1,
        TlsVersion::V1_2 => SslVersion::TLS1_2,
        TlsVersion::V1_3 => SslVersion::TLS1_3,
    }
}

/// The user's home directory, where libpq looks for files that are not named.
#[derive(PartialEq, Eq)]
pub(crate) struct HomeDirectory(Option<PathBuf>);

impl HomeDirectory {
    /// `pqGetHomeDirectory`: `HOME`, else what the user database says.
    pub(crate) fn find() -> HomeDirectory {
        let named = std::env::var_os("HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
        HomeDirectory(named.or_else(|| Some(User::from_uid(geteuid()).ok()??.dir)))
    }

    /// A file in `~/.postgresql`.
    fn file(&self, name: &str) -> Option<PathBuf> {
        Some(self.0.as_ref()?.join(".postgresql").join(name))
    }
}

/// A context in the making.
struct Making<'a> {
    context: SslContextBuilder,
    options: &'a TlsOptions,
    home: &'a HomeDirectory,
    files: &'a mut TlsFiles,
}

impl Making<'_> {
    fn set_protocol(&mut self) -> Result<(), Error> {
        let context = &mut self.context;
        context.set_options(SslOptions::NO_SSLV2 | SslOptions::NO_SSLV3);
        if let Some(version) = self.options.min_version {
            context.set_min_proto_version(Some(openssl_version(version))).map_err(|e| {
                Error::Tls(format!("could not set minimum SSL protocol version: {}", reason(&e)))
            })?;
        }
        if let Some(version) = self.options.max_version {
            context.set_max_proto_version(Some(openssl_version(version))).map_err(|e| {
                Error::Tls(format!("could not set maximum SSL protocol version: {}", reason(&e)))
            })?;
        }
        context.set_mode(Mode::ACCEPT_MOVING_WRITE_BUFFER);
        let session = self.options.group;
        context
            .set_groups_list(&group_list(session))
            .or_else(|_| context.set_groups_list(&group_list_before_3_5(session)))
            .map_err(could_not_create)
    }

    /// Loads what the server's certificate is verified against. Without any, nothing is verified,
    /// which only sslmode=require and weaker allow.
    fn load_roots(&mut self) -> Result<bool, Error> {
        let path = match &self.options.rootcert {
            RootCert::System => return self.load_system_roots().map(|()| true),
            RootCert::File(path) => Some(path.clone()),
            RootCert::Default => self.home.file("root.crt"),
        };
        path.iter().for_each(|path| self.files.note(path));
        let Some(path) = path.as_deref().filter(|path| fs::metadata(path).is_ok()) else {
            return match self.options.sslmode {
                SslMode::Encrypt => Ok(false),
                SslMode::VerifyCa | SslMode::VerifyFull => Err(missing_root(path.as_deref())),
            };
        };
        let failed = |why: &str| could_not("read root certificate", path, why);
        let name = openssl_path(path).map_err(failed)?;
        self.context.set_ca_file(name).map_err(|e| failed(&reason(&e)))?;
        self.load_crls()?;
        Ok(true)
    }

    /// What the machine trusts. `SSL_CERT_FILE` and `SSL_CERT_DIR` override it, as in OpenSSL; a
    /// private OpenSSL does not know where distributions keep their roots, so they are looked for:
    /// in a directory, from which OpenSSL takes what it needs, or else in one large file.
    fn load_system_roots(&mut self) -> Result<(), Error> {
        let failed = |e: ErrorStack| {
            Error::Tls(format!("could not load system root certificate paths: {}", reason(&e)))
        };
        let (named_file, named_directories) = self.note_default_paths();
        self.context.set_default_verify_paths().map_err(failed)?;
        if !cfg!(feature = "vendored") {
            return Ok(());
        }
        let probed = openssl_probe::probe();
        let mut has_directory = false;
        for directory in probed.cert_dir.iter().filter(|_| !named_directories) {
            let is_hashed = self.files.note_directory(directory);
            let (true, Ok(name)) = (is_hashed, openssl_path(directory)) else {
                continue;
            };
            let lookup =
                self.context.cert_store_mut().add_lookup(X509Lookup::hash_dir()).map_err(failed)?;
            lookup.add_dir(name, SslFiletype::PEM).map_err(failed)?;
            has_directory = true;
        }
        if !has_directory
            && !named_file
            && let Some(file) = &probed.cert_file
            && let Ok(name) = openssl_path(file)
        {
            self.files.note(file);
            // Not being there, or not readable, is no error for OpenSSL's own default either.
            let _ = self.context.set_ca_file(name);
        }
        Ok(())
    }

    /// Notes where OpenSSL itself looks, and whether that file and those directories were named.
    fn note_default_paths(&mut self) -> (bool, bool) {
        // OPENSSLDIR: "/usr/lib/ssl"
        let told = openssl::version::dir();
        let home = PathBuf::from(told.split('"').nth(1).unwrap_or_default());
        let file = self.files.note_variable("SSL_CERT_FILE");
        let directories = self.files.note_variable("SSL_CERT_DIR");
        let named = (file.is_some(), directories.is_some());
        self.files.note(&file.map_or_else(|| home.join("cert.pem"), PathBuf::from));
        let directories = directories.unwrap_or_else(|| home.join("certs").into());
        for directory in std::env::split_paths(&directories) {
            self.files.note_directory(&directory);
        }
        named
    }

    /// Loads revocation lists. As in libpq, ones that cannot be loaded are ignored, and none are
    /// required; but once there are some, each certificate of a chain needs one.
    fn load_crls(&mut self) -> Result<(), Error> {
        let file = match (&self.options.crl, &self.options.crldir) {
            (None, None) => self.home.file("root.crl"),
            (file, _) => file.clone(),
        };
        file.iter().for_each(|file| self.files.note(file));
        let store = self.context.cert_store_mut();
        let mut loaded = match &file {
            Some(file) => load_crl_file(store, file)?,
            None => true,
        };
        if let (true, Some(directory)) = (loaded, &self.options.crldir) {
            self.files.note_what_hides_changes();
            let name = openssl_path(directory)
                .map_err(|why| could_not("read certificate revocation list", directory, why))?;
            loaded = store
                .add_lookup(X509Lookup::hash_dir())
                .and_then(|lookup| lookup.add_dir(name, SslFiletype::PEM))
                .is_ok();
        }
        if !loaded && file.as_ref().is_some_and(|file| file.exists()) {
            self.files.note_what_hides_changes();
        }
        if loaded && (file.is_some() || self.options.crldir.is_some()) {
            store
                .set_flags(X509VerifyFlags::CRL_CHECK | X509VerifyFlags::CRL_CHECK_ALL)
                .map_err(could_not_create)?;
        }
        Ok(())
    }

    fn load_client_certificate(&mut self) -> Result<(), Error> {
        if !self.options.send_cert {
            return Ok(());
        }
        let path = self.options.cert.clone().or_else(|| self.home.file("postgresql.crt"));
        let Some(path) = path else {
            return Ok(());
        };
        self.files.note(&path);
        match fs::metadata(&path) {
            Ok(_) => {}
            // Without the file the connection goes on without a certificate.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => {
                return Ok(());
            }
            Err(e) => return Err(could_not("open certificate", &path, &system_reason(&e))),
        }
        let failed = |why: &str| could_not("read certificate", &path, why);
        self.context
            .set_certificate_chain_file(openssl_path(&path).map_err(failed)?)
            .map_err(|e| failed(&reason(&e)))?;
        self.load_private_key()
    }

    fn load_private_key(&mut self) -> Result<(), Error> {
        let path = private_key_path(self.options, self.home)?;
        if let Some(path) = &path {
            self.files.note(path);
            let pem = read_private_key(path)?;
            let name = path.display();
            let failed = |e: ErrorStack| {
                Error::Tls(format!("could not load private key file \"{name}\": {}", reason(&e)))
            };
            // A file that is not PEM may be DER; if it is neither, PEM's complaint is reported.
            let key = parse_private_key(&pem, |buffer| passphrase(self.options, buffer))
                .or_else(|e| PKey::private_key_from_der(&pem).map_err(|_| e))
                .map_err(failed)?;
            self.context.set_private_key(&key).map_err(failed)?;
        }
        self.context.check_private_key().map_err(|e| {
            let name = path.as_deref().unwrap_or(Path::new("")).display();
            let why = reason(&e);
            Error::Tls(format!("certificate does not match private key file \"{name}\": {why}"))
        })
    }
}

fn missing_root(path: Option<&Path>) -> Error {
    let problem = match path {
        Some(path) => format!("root certificate file \"{}\" does not exist", path.display()),
        None => "could not get home directory to locate root certificate file".to_owned(),
    };
    Error::Tls(format!(
        "{problem}\nEither provide the file, use the system's trusted roots with \
         sslrootcert=system, or change sslmode to disable server certificate verification."
    ))
}

/// OpenSSL's loader for such files takes certificates, too; a file of only certificates then
/// switches the check on, and every chain fails for want of a revocation list.
fn load_crl_file(store: &mut X509StoreBuilderRef, path: &Path) -> Result<bool, Error> {
    let name = openssl_path(path)
        .map_err(|why| could_not("read certificate revocation list", path, why))?;
    let loaded = store
        .add_lookup(X509Lookup::file())
        .and_then(|lookup| lookup.load_crl_file(name, SslFiletype::PEM))
        .is_ok();
    let holds_certificates = || fs::read(path).ok().and_then(|pem| X509::stack_from_pem(&pem).ok());
    Ok(loaded || holds_certificates().is_some_and(|certificates| !certificates.is_empty()))
}

fn private_key_path(options: &TlsOptions, home: &HomeDirectory) -> Result<Option<PathBuf>, Error> {
    let Some(key) = &options.key else {
        return Ok(home.file("postgresql.key"));
    };
    // libpq takes "engine:key" to an OpenSSL engine, of which a private OpenSSL has none.
    match key.to_string_lossy().split_once(':') {
        Some((engine, _)) => Err(Error::Tls(format!(
            "could not load SSL engine \"{engine}\": pqcancel does not support engines"
        ))),
        None => Ok(Some(key.clone())),
    }
}

/// Reads the key file, unless others may read it, too.
fn read_private_key(path: &Path) -> Result<Zeroizing<Vec<u8>>, Error> {
    let name = path.display();
    let metadata = fs::metadata(path).map_err(|e| {
        Error::Tls(match e.raw_os_error() {
            Some(libc::ENOENT) => {
                format!("certificate present, but not private key file \"{name}\"")
            }
            _ => format!("could not stat private key file \"{name}\": {}", system_reason(&e)),
        })
    })?;
    if !metadata.is_file() {
        return Err(Error::Tls(format!("private key file \"{name}\" is not a regular file")));
    }
    if is_accessible_to_others(&metadata) {
        return Err(Error::Tls(format!(
            "private key file \"{name}\" has group or world access; file must have permissions \
             u=rw (0600) or less if owned by the current user, or permissions u=rw,g=r (0640) or \
             less if owned by root"
        )));
    }
    fs::read(path).map(Zeroizing::new).map_err(|e| {
        Error::Tls(format!("could not load private key file \"{name}\": {}", system_reason(&e)))
    })
}

/// Files of root may be readable by a group, for certificates that a machine's services share.
fn is_accessible_to_others(metadata: &Metadata) -> bool {
    let forbidden = if metadata.uid() == 0 { 0o037 } else { 0o077 };
    metadata.mode() & forbidden != 0
}

fn parse_private_key(
    pem: &[u8],
    passphrase: impl FnOnce(&mut [u8]) -> usize,
) -> Result<PKey<Private>, ErrorStack> {
    PKey::private_key_from_pem_callback(pem, |buffer| Ok(passphrase(buffer)))
}

/// Answers OpenSSL's question for the key's passphrase. Without one the answer is empty, where
/// libpq would ask the user at the terminal: a library must not do that in the middle of a cancel.
fn passphrase(options: &TlsOptions, buffer: &mut [u8]) -> usize {
    let Some(passphrase) = &options.passphrase else {
        return 0;
    };
    // libpq's sslpassword leaves room for a NUL.
    let length = passphrase.len().min(buffer.len().saturating_sub(1));
    match (buffer.get_mut(..length), passphrase.get(..length)) {
        (Some(to), Some(from)) => to.copy_from_slice(from),
        _ => return 0,
    }
    length
}

/// Asks the application's key passphrase hook, if the session's key needs a passphrase at all.
/// Done while the session is certainly alive, because the hook may look at it.
pub(crate) fn ask_passphrase_hook(
    options: &TlsOptions,
    hook: impl FnOnce(&mut [u8]) -> usize,
) -> Option<Zeroizing<Vec<u8>>> {
    let home = HomeDirectory::find();
    let cert = options.cert.clone().or_else(|| home.file("postgresql.crt"))?;
    if !options.send_cert || fs::metadata(cert).is_err() {
        return None;
    }
    let pem = read_private_key(&private_key_path(options, &home).ok()??).ok()?;
    let mut answer = None;
    // Whether the key can be read with it is found when it is needed.
    let _ = call_openssl(|| {
        parse_private_key(&pem, |buffer| {
            let length = hook(buffer).min(buffer.len());
            let given = buffer.get(..length).filter(|bytes| !bytes.is_empty());
            answer = given.map(|bytes| Zeroizing::new(bytes.to_vec()));
            length
        })
    });
    answer
}

fn could_not(verb_and_kind: &str, path: &Path, why: &str) -> Error {
    Error::Tls(format!("could not {verb_and_kind} file \"{}\": {why}", path.display()))
}

/// The openssl crate takes names as text.
fn openssl_path(path: &Path) -> Result<&str, &'static str> {
    path.to_str().ok_or("pqcancel supports file names in UTF-8 only")
}

fn system_reason(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(errno) => strerror(Errno::from_raw(errno)),
        None => error.to_string(),
    }
}

/// The text of the earliest error, as `SSLerrmessage` of libpq gives it.
pub(crate) fn reason(errors: &ErrorStack) -> String {
    const ERR_LIB_SSL: i32 = 20;
    const NO_APPLICATION_PROTOCOL: i32 = 1000 + 120;
    /// In OpenSSL 3 this bit marks an error number of the system.
    const ERR_SYSTEM_FLAG: u64 = 0x8000_0000;

    let Some(error) = errors.errors().first() else {
        return "no SSL error reported".to_owned();
    };
    if let Some(reason) = error.reason() {
        return reason.to_owned();
    }
    if error.library_code() == ERR_LIB_SSL && error.reason_code() == NO_APPLICATION_PROTOCOL {
        return "no application protocol".to_owned();
    }
    let code: u64 = error.code();
    if code & ERR_SYSTEM_FLAG != 0 {
        let errno = i32::try_from(code & (ERR_SYSTEM_FLAG - 1)).unwrap_or(0);
        return strerror(Errno::from_raw(errno));
    }
    format!("SSL error code {code}")
}

/// Appends to the key log file. Where libpq would complain on stderr, a guest keeps quiet.
fn log_key(path: &Path, line: &str) {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let file = fs::OpenOptions::new().append(true).create(true).mode(0o600).open(path);
    if let Ok(mut file) = file {
        let _ = file.write_all(format!("{line}\n").as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_share_is_for_the_sessions_group() {
        assert_eq!(
            group_list(None),
            "*P-256:*X25519:?X25519MLKEM768:?X448:?P-521:?P-384:?ffdhe2048:?ffdhe3072"
        );
        for (group, name) in GROUPS {
            let list = group_list(Some(group));
            assert!(list.starts_with(&format!("*{name}:")), "{list}");
            assert_eq!(list.matches('*').count(), 1, "{list}");
            assert_eq!(list.matches(':').count(), 7, "{list}");
        }
        assert_eq!(group_list_before_3_5(None), "P-256:X25519:X448:P-521:P-384");
        assert_eq!(group_list_before_3_5(Some(Group::P384)), "P-384:P-256:X25519:X448:P-521");
    }
}

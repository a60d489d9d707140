//! The host: the libpq that the program already uses, found when we are called. Everything we
//! ask it goes through one typed table, and a [`Session`] gives safe answers from it.
//!
//! A process may hold several libpqs (Python wheels bring their own), and we must ask the one that
//! made the connection. That is the one in the dependency tree of whoever called us.

#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::marker::PhantomData;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicPtr, Ordering};

use rustix::fs::{FileType, fstat};
use zeroize::Zeroize;

use crate::error::Error;
use crate::host_layout::{CancelBlock, Layout};
use crate::host_tls;
use crate::loader::{self, Generation, Library, Object};
use crate::params::{ConnInfo, Group};
use crate::recent::Recent;
use crate::reserve;
use crate::signal_safe;

/// Types and declarations of the libpq-fe.h this library was built with.
#[allow(
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    dead_code,
    unreachable_pub,
    clippy::all
)]
mod libpq_fe {
    include!(concat!(env!("OUT_DIR"), "/libpq_fe.rs"));
}
pub use libpq_fe::{PGconn, pg_cancel};
use libpq_fe::{PQconninfoOption, PQsslKeyPassHook_OpenSSL_type};

/// Declares the table: each function with its type, looked up by its own name, and the type
/// compared with libpq-fe.h's when this is compiled. Older libpqs lack the second kind.
macro_rules! host_functions {
    (
        required { $($name:ident: fn($($arg:ty),*) $(-> $ret:ty)?;)* }
        optional { $($newer:ident: fn($($newer_arg:ty),*) $(-> $newer_ret:ty)?;)* }
    ) => {
        #[allow(non_snake_case)]
        struct Functions {
            $($name: unsafe extern "C" fn($($arg),*) $(-> $ret)?,)*
            $($newer: Option<unsafe extern "C" fn($($newer_arg),*) $(-> $newer_ret)?>,)*
        }

        impl Functions {
            fn look_up(library: &Library) -> Result<Functions, Error> {
                Ok(Functions {
                    $($name: host_functions!(@symbol library, $name, fn($($arg),*) $(-> $ret)?)
                        .ok_or(Error::HostLacks(stringify!($name)))?,)*
                    $($newer: host_functions!(
                        @symbol library, $newer, fn($($newer_arg),*) $(-> $newer_ret)?
                    ),)*
                })
            }
        }

        $(const _: unsafe extern "C" fn($($arg),*) $(-> $ret)? = libpq_fe::$name;)*
        $(const _: unsafe extern "C" fn($($newer_arg),*) $(-> $newer_ret)? = libpq_fe::$newer;)*
    };
    (@symbol $library:ident, $name:ident, fn($($arg:ty),*) $(-> $ret:ty)?) => {
        $library.symbol(concat!(stringify!($name), "\0")).map(|symbol| {
            // SAFETY: the symbol comes from a libpq, whose function of this name has this type: the
            // constants above compare it with libpq-fe.h's.
            unsafe {
                std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($arg),*) $(-> $ret)?>(
                    symbol.as_ptr(),
                )
            }
        })
    };
}

host_functions! {
    required {
        PQsocket: fn(*const PGconn) -> c_int;
        PQerrorMessage: fn(*const PGconn) -> *mut c_char;
        PQbackendPID: fn(*const PGconn) -> c_int;
        PQhost: fn(*const PGconn) -> *mut c_char;
        PQport: fn(*const PGconn) -> *mut c_char;
        PQsslInUse: fn(*mut PGconn) -> c_int;
        PQconninfo: fn(*mut PGconn) -> *mut PQconninfoOption;
        PQconninfoFree: fn(*mut PQconninfoOption);
        PQgetCancel: fn(*mut PGconn) -> *mut pg_cancel;
        PQfreeCancel: fn(*mut pg_cancel);
        PQcancel: fn(*mut pg_cancel, *mut c_char, c_int) -> c_int;
    }
    optional {
        PQgssEncInUse: fn(*mut PGconn) -> c_int; // 12
        PQgetssl: fn(*mut PGconn) -> *mut c_void;
        PQgetSSLKeyPassHook_OpenSSL: fn() -> PQsslKeyPassHook_OpenSSL_type; // 13
        PQdefaultSSLKeyPassHook_OpenSSL: fn(*mut c_char, c_int, *mut PGconn) -> c_int; // 13
    }
}

/// One libpq in this process.
pub struct Host {
    /// Where its `PQconninfo` is: what tells one libpq from another.
    identity: NonNull<c_void>,
    version: c_int,
    functions: Functions,
    /// The libpq met before this one.
    previous: Option<&'static Host>,
}

/// The libpq met last. None is ever unloaded or forgotten. A list without a lock, so that a child
/// forked in the middle of a change finds it whole.
static LATEST: AtomicPtr<Host> = AtomicPtr::new(std::ptr::null_mut());

/// Who called us lately, from where, and whose libpq that is. Only ever tried, never waited for:
/// without it the answer takes some microseconds longer, and a child forked while it was locked
/// goes on without it.
static CALLERS: Mutex<Recent<Caller, 16>> = Mutex::new(Recent::new());

struct Caller {
    return_address: usize,
    generation: Generation,
    host: &'static Host,
}

impl Host {
    /// The libpq that the code at this return address calls.
    pub fn of_caller(return_address: *const c_void) -> Result<&'static Host, Error> {
        let return_address_value = return_address.addr();
        let generation = loader::generation();
        if let Ok(mut callers) = CALLERS.try_lock() {
            // An address may be another object's once something was unloaded.
            callers.take(|caller| caller.generation != generation);
            let from_here = |caller: &Caller| caller.return_address == return_address_value;
            if let Some(caller) = callers.find(from_here) {
                return Ok(caller.host);
            }
        }
        let host = Host::find(return_address)?;
        if let Ok(mut callers) = CALLERS.try_lock() {
            callers.remember(Caller { return_address: return_address_value, generation, host });
        }
        Ok(host)
    }

    fn find(return_address: *const c_void) -> Result<&'static Host, Error> {
        let identity = find_from(return_address)?;
        let known = std::iter::successors(Host::latest(), |host| host.previous);
        if let Some(host) = known.into_iter().find(|host| host.identity == identity) {
            return Ok(host);
        }
        let shortages = reserve::shortages();
        let host = Box::new(Host::bind(identity)?);
        if reserve::shortages() != shortages {
            return Err(Error::OutOfMemory); // the reserve is nothing to keep for good
        }
        let host = Box::leak(host);
        signal_safe::remember_host_cancel(host.version, host.functions.PQcancel);
        host.previous = Host::latest();
        // If another thread was faster, its entry is left out of the list: it is merely made
        // again when it is needed.
        LATEST.store(host, Ordering::Release);
        Ok(host)
    }

    fn latest() -> Option<&'static Host> {
        // SAFETY: what is stored there was leaked, and is not changed once it is stored.
        unsafe { LATEST.load(Ordering::Acquire).as_ref() }
    }

    /// All functions come from the very object that holds `PQconninfo`, so that none of ours, or
    /// of a third libpq, is taken for the host's.
    fn bind(identity: NonNull<c_void>) -> Result<Host, Error> {
        let object = Object::containing(identity.as_ptr()).ok_or(Error::HostNotFound)?;
        // A libpq that is linked into the same program as we are: its functions are hidden by ours.
        if Object::containing((&raw const LATEST).cast()).is_some_and(|o| o.base == object.base) {
            return Err(Error::HostLacks("PQgetCancel"));
        }
        let library = Library::open(&object).ok_or(Error::HostNotFound)?;
        let version = version_of(&library).ok_or(Error::HostLacks("PQlibVersion"))?;
        let functions = Functions::look_up(&library)?;
        let interposed = [
            ("PQgetCancel", functions.PQgetCancel as *const c_void),
            ("PQfreeCancel", functions.PQfreeCancel as *const c_void),
            ("PQcancel", functions.PQcancel as *const c_void),
        ];
        for (name, function) in interposed {
            if Object::containing(function).is_none_or(|o| o.base != object.base) {
                return Err(Error::HostLacks(name));
            }
        }
        // The table is kept for good, so the library must stay for good.
        std::mem::forget(library);
        Ok(Host { identity, version, functions, previous: None })
    }

    /// It, and behind it what it depends on.
    pub(crate) fn library(&self) -> Option<Library> {
        Library::open(&Object::containing(self.identity.as_ptr())?)
    }

    /// Its major version, from 10 on.
    pub fn major(&self) -> i32 {
        self.version / 10_000
    }
}

impl Host {
    /// Calls PQcancelStart or PQcancelPoll of this libpq itself (17 and later), by a name that ends
    /// in NUL.
    ///
    /// # Safety
    ///
    /// This libpq made `cancel`, and no other thread uses it.
    pub unsafe fn call_own(&self, name: &str, cancel: *mut c_void) -> Option<c_int> {
        let object = Object::containing(self.identity.as_ptr())?;
        let function = Library::open(&object)?.symbol(name)?;
        if Object::containing(function.as_ptr())?.base != object.base {
            return None;
        }
        type Function = unsafe extern "C" fn(*mut c_void) -> c_int;
        // SAFETY: the functions of these names have this type in every libpq that has them; the
        // caller's promise.
        unsafe { Some(std::mem::transmute::<*mut c_void, Function>(function.as_ptr())(cancel)) }
    }
}

// SAFETY: the table holds function addresses of a library that is never unloaded, and a pointer
// that is only compared.
unsafe impl Send for Host {}
// SAFETY: as above; nothing in it changes.
unsafe impl Sync for Host {}

/// Every libpq since 9.3 exports it, and we do not.
const NAME: &str = "PQconninfo\0";

/// Looks for the libpq that the caller's other calls go to; then in the caller's dependency tree, in
/// the objects behind us, in the whole global scope, and at last in all there is: a caller that
/// belongs to no libpq (libffi, say) means the only one.
fn find_from(return_address: *const c_void) -> Result<NonNull<c_void>, Error> {
    let of_caller = Object::containing(return_address)
        .and_then(|caller| called_by(&caller).or_else(|| Library::open(&caller)?.symbol(NAME)));
    if let Some(identity) = of_caller.or_else(|| loader::symbol_in_scope(NAME)) {
        return Ok(identity);
    }
    let mut all = loader::symbols_anywhere(NAME);
    let identity = all.pop_first().ok_or(Error::HostNotFound)?;
    // Each would read another's connections by its own layout.
    if all.is_empty() { Ok(identity) } else { Err(Error::HostAmbiguous) }
}

/// The libpq that the caller's calls are bound to. It may be another than the one in its dependency
/// tree: where a libpq is in the global scope, private ones that are loaded later are not called.
fn called_by(caller: &Object) -> Option<NonNull<c_void>> {
    let bindings = caller.bindings()?;
    bindings
        .functions("PQ")
        .filter_map(Object::containing)
        .filter(|object| object.base != caller.base)
        .find_map(|object| Library::open(&object)?.symbol(NAME))
}

/// The version of a libpq, before anything else of it is relied on.
fn version_of(library: &Library) -> Option<c_int> {
    let symbol = library.symbol("PQlibVersion\0")?;
    type LibVersion = unsafe extern "C" fn() -> c_int;
    const _: LibVersion = libpq_fe::PQlibVersion;
    // SAFETY: the symbol comes from a libpq, whose function of this name has this type: the
    // constant above compares it with libpq-fe.h's. It takes nothing and may be called at any
    // time.
    unsafe { Some(std::mem::transmute::<*mut c_void, LibVersion>(symbol.as_ptr())()) }
}

/// A connection of the program's, for the length of one call of ours.
pub struct Session<'call> {
    conn: NonNull<PGconn>,
    host: &'static Host,
    _call: PhantomData<&'call PGconn>,
}

impl Session<'_> {
    /// # Safety
    ///
    /// `conn` must be a live connection made by the libpq `host`, and no other thread may use it
    /// while the session lives: what libpq asks of its own callers.
    pub unsafe fn new(conn: NonNull<PGconn>, host: &'static Host) -> Self {
        Session { conn, host, _call: PhantomData }
    }

    /// The libpq it belongs to.
    pub fn host(&self) -> &'static Host {
        self.host
    }

    /// Whether it has a socket.
    pub fn is_open(&self) -> bool {
        // SAFETY: the connection is live (`new`), PQsocket only reads it.
        unsafe { (self.host.functions.PQsocket)(self.conn.as_ptr()) >= 0 }
    }

    /// The process ID of its backend, 0 while it is not established.
    pub fn backend_pid(&self) -> i32 {
        // SAFETY: the connection is live (`new`), PQbackendPID only reads it.
        unsafe { (self.host.functions.PQbackendPID)(self.conn.as_ptr()) }
    }

    /// Whether it runs over TLS right now.
    pub fn uses_tls(&self) -> bool {
        // SAFETY: the connection is live (`new`), PQsslInUse only reads it.
        unsafe { (self.host.functions.PQsslInUse)(self.conn.as_ptr()) != 0 }
    }

    /// The group of its TLS key exchange, if that can be told.
    pub fn negotiated_group(&self) -> Option<Group> {
        // SAFETY: the connection is live (`new`), PQgetssl only reads it, and what it returns is as
        // live.
        unsafe {
            let ssl = (self.host.functions.PQgetssl?)(self.conn.as_ptr());
            host_tls::negotiated_group(self.host, NonNull::new(ssl)?)
        }
    }

    /// Whether it is encrypted by GSSAPI right now.
    pub fn uses_gss_encryption(&self) -> bool {
        self.host.functions.PQgssEncInUse.is_some_and(|function| {
            // SAFETY: the connection is live (`new`), PQgssEncInUse only reads it.
            unsafe { function(self.conn.as_ptr()) != 0 }
        })
    }

    /// The host it is connected to, as it was given: a name, or an address in its lack.
    pub fn host_name(&self) -> String {
        // SAFETY: the connection is live (`new`); PQhost returns a C string of its, or NULL.
        unsafe { text((self.host.functions.PQhost)(self.conn.as_ptr())) }
    }

    /// The port it is connected to, as it was given.
    pub fn port(&self) -> String {
        // SAFETY: the connection is live (`new`); PQport returns a C string of its, or NULL.
        unsafe { text((self.host.functions.PQport)(self.conn.as_ptr())) }
    }

    /// Its connection options, without the password.
    pub fn options(&self) -> Result<ConnInfo, Error> {
        // SAFETY: the connection is live (`new`); the array is ours until it is freed below.
        let array = unsafe { (self.host.functions.PQconninfo)(self.conn.as_ptr()) };
        let Some(array) = NonNull::new(array) else {
            return Err(Error::OutOfMemory);
        };
        let mut options = ConnInfo::default();
        let mut next = array.as_ptr();
        // SAFETY: PQconninfo's array ends with an entry whose keyword is NULL; keyword and value
        // are C strings, the value may be NULL. The array is freed once, after its last use.
        unsafe {
            while !(*next).keyword.is_null() {
                if !(*next).val.is_null() {
                    take_option(&mut options, CStr::from_ptr((*next).keyword), (*next).val);
                }
                next = next.add(1);
            }
            (self.host.functions.PQconninfoFree)(array.as_ptr());
        }
        Ok(options)
    }

    /// The peer's address and the cancel key, from what the host's own PQgetCancel makes.
    pub fn cancel_block(&self) -> Result<CancelBlock, Error> {
        let block = self.host_cancel().ok_or(Error::HostFailed("PQgetCancel"))?;
        // SAFETY: the host of this version made the block.
        let copy = unsafe { CancelBlock::take(block.cast::<u8>(), self.host.version) };
        // SAFETY: the block is freed once, by the host that made it.
        unsafe { (self.host.functions.PQfreeCancel)(block.as_ptr()) };
        copy.ok_or_else(|| self.unreadable())
    }

    /// What to say where its host's objects are not as expected.
    pub fn unreadable(&self) -> Error {
        let version = self.host.version;
        match Layout::of(version) {
            Some(_) => Error::HostLayout(version),
            None => Error::HostUnsupported(version),
        }
    }

    /// What the host's own PQgetCancel makes, for who frees it.
    pub fn host_cancel(&self) -> Option<NonNull<pg_cancel>> {
        // SAFETY: the connection is live (`new`).
        NonNull::new(unsafe { (self.host.functions.PQgetCancel)(self.conn.as_ptr()) })
    }

    /// What tells this connection from all others, now and later: not the address of its object, which
    /// another may get, nor its key, which a server may hand out twice, but its socket's inode.
    pub fn identity(&self) -> Option<u64> {
        // SAFETY: the connection is live (`new`), PQsocket only reads it.
        let socket = unsafe { (self.host.functions.PQsocket)(self.conn.as_ptr()) };
        if socket < 0 {
            return None;
        }
        // SAFETY: the socket stays open during the call, because the connection is used by nobody else.
        let status = fstat(unsafe { BorrowedFd::borrow_raw(socket) }).ok()?;
        FileType::from_raw_mode(status.st_mode).is_socket().then_some(status.st_ino)
    }

    /// Whether it runs over TLS or GSSAPI encryption right now.
    pub fn is_encrypted(&self) -> bool {
        self.uses_tls() || self.uses_gss_encryption()
    }

    /// Writes what PQerrorMessage then shows, as far as it fits into the buffer that every
    /// connection has.
    pub fn set_error_message(&self, message: &CStr) {
        /// PQExpBuffer's smallest size.
        const BUFFER_SIZE: usize = 256;
        // SAFETY: the connection is live (`new`).
        let buffer = unsafe { (self.host.functions.PQerrorMessage)(self.conn.as_ptr()) };
        if buffer.is_null() || self.is_constant(buffer) {
            return;
        }
        let text = message.to_bytes().iter().take(BUFFER_SIZE - 1);
        for (offset, byte) in text.chain(b"\0").enumerate() {
            // SAFETY: no constant, so the connection's own buffer, and within its size.
            unsafe { buffer.add(offset).write(byte.cast_signed()) };
        }
    }

    /// When memory had run out for the connection's buffer, PQerrorMessage shows a constant of
    /// libpq's or its translation, neither of which may be written to.
    fn is_constant(&self, text: *const c_char) -> bool {
        unsafe extern "C" {
            fn dgettext(domain: *const c_char, text: *const c_char) -> *const c_char;
        }
        let domain = CString::new(format!("libpq5-{}", self.host.major())).unwrap_or_default();
        // SAFETY: both are C strings.
        let translation = unsafe { dgettext(domain.as_ptr(), c"out of memory\n".as_ptr()) };
        text == translation || Object::containing(text.cast()).is_some()
    }

    /// The application's hook for the passphrase of the client key, if it set one of its own.
    pub fn passphrase_hook(&self) -> Option<impl FnOnce(&mut [u8]) -> usize> {
        let functions = &self.host.functions;
        // SAFETY: PQgetSSLKeyPassHook_OpenSSL takes nothing and may be called at any time.
        let hook = unsafe { (functions.PQgetSSLKeyPassHook_OpenSSL?)() }?;
        if std::ptr::fn_addr_eq(hook, functions.PQdefaultSSLKeyPassHook_OpenSSL?) {
            return None; // that one answers with sslpassword, and so do we
        }
        let conn = self.conn.as_ptr();
        Some(move |buffer: &mut [u8]| {
            let size = c_int::try_from(buffer.len()).unwrap_or(c_int::MAX);
            // SAFETY: the hook is one for PQsetSSLKeyPassHook_OpenSSL, which fills a buffer of
            // this size; the connection is live (`new`).
            let length = unsafe { hook(buffer.as_mut_ptr().cast::<c_char>(), size, conn) };
            usize::try_from(length).unwrap_or(0)
        })
    }
}

/// # Safety
///
/// `pointer` is NULL or a C string that stays as it is during the call.
unsafe fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned()
}

/// Notes an option; then wipes what is secret from the array, which the host frees as it is.
///
/// # Safety
///
/// `value` is a C string that belongs to us.
unsafe fn take_option(options: &mut ConnInfo, keyword: &CStr, value: *mut c_char) {
    const SECRETS: [&CStr; 5] = [
        c"password",
        c"sslpassword",
        c"scram_client_key",
        c"scram_server_key",
        c"oauth_client_secret",
    ];
    // SAFETY: the caller's promise.
    let length = unsafe { CStr::from_ptr(value) }.count_bytes();
    // SAFETY: the string's bytes are ours to read and change.
    let bytes = unsafe { std::slice::from_raw_parts_mut(value.cast::<u8>(), length) };
    options.note(keyword.to_bytes(), bytes);
    if SECRETS.contains(&keyword) {
        bytes.zeroize();
    }
}

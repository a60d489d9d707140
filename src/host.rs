//! The host: the libpq that the program already uses, found when we are called. Everything we
//! ask it goes through one typed table, and a [`Session`] gives safe answers from it.
//!
//! A process may hold several libpqs (Python wheels bring their own), and ours must ask the one
//! that made the connection. That is the one in the dependency tree of whoever called us.

#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicPtr, Ordering};

use zeroize::Zeroize;

use crate::error::Error;
use crate::host_layout::{self, CancelSecret};
use crate::params::ConnInfo;

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
/// compared with libpq-fe.h's when this is compiled.
macro_rules! host_functions {
    ($($name:ident: unsafe extern "C" fn($($arg:ty),*) $(-> $ret:ty)?;)*) => {
        #[allow(non_snake_case)]
        struct Functions { $($name: unsafe extern "C" fn($($arg),*) $(-> $ret)?,)* }

        impl Functions {
            fn look_up(library: &Library) -> Result<Functions, Error> {
                Ok(Functions { $($name: {
                    let symbol = library.symbol(concat!(stringify!($name), "\0"))
                        .ok_or(Error::HostLacks(stringify!($name)))?;
                    // SAFETY: the symbol comes from a libpq, whose function of this name has this
                    // type: the constants below compare it with libpq-fe.h's.
                    unsafe {
                        std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($arg),*) $(-> $ret)?>(
                            symbol.as_ptr(),
                        )
                    }
                },)* })
            }
        }

        $(const _: unsafe extern "C" fn($($arg),*) $(-> $ret)? = libpq_fe::$name;)*
    };
}

host_functions! {
    PQsocket: unsafe extern "C" fn(*const PGconn) -> c_int;
    PQbackendPID: unsafe extern "C" fn(*const PGconn) -> c_int;
    PQhost: unsafe extern "C" fn(*const PGconn) -> *mut c_char;
    PQport: unsafe extern "C" fn(*const PGconn) -> *mut c_char;
    PQsslInUse: unsafe extern "C" fn(*mut PGconn) -> c_int;
    PQgssEncInUse: unsafe extern "C" fn(*mut PGconn) -> c_int;
    PQconninfo: unsafe extern "C" fn(*mut PGconn) -> *mut PQconninfoOption;
    PQconninfoFree: unsafe extern "C" fn(*mut PQconninfoOption);
    PQgetCancel: unsafe extern "C" fn(*mut PGconn) -> *mut pg_cancel;
    PQfreeCancel: unsafe extern "C" fn(*mut pg_cancel);
    PQgetSSLKeyPassHook_OpenSSL: unsafe extern "C" fn() -> PQsslKeyPassHook_OpenSSL_type;
    PQdefaultSSLKeyPassHook_OpenSSL:
        unsafe extern "C" fn(*mut c_char, c_int, *mut PGconn) -> c_int;
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

impl Host {
    /// The libpq that the code at this return address calls.
    pub fn of_caller(return_address: *const c_void) -> Result<&'static Host, Error> {
        let identity = find_from(return_address).ok_or(Error::HostNotFound)?;
        let known = std::iter::successors(Host::latest(), |host| host.previous);
        if let Some(host) = known.into_iter().find(|host| host.identity == identity) {
            return Ok(host);
        }
        let host = Box::leak(Box::new(Host::bind(identity)?));
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
        let library = Library::open(&object).ok_or(Error::HostNotFound)?;
        let version = library.version().ok_or(Error::HostLacks("PQlibVersion"))?;
        if !host_layout::is_known(version) {
            return Err(Error::HostUnsupported(version));
        }
        let functions = Functions::look_up(&library)?;
        let cancel = functions.PQgetCancel as *const c_void;
        if Object::containing(cancel).is_none_or(|o| o.base != object.base) {
            return Err(Error::HostLacks("PQgetCancel"));
        }
        // The table is kept for good, so the library must stay for good.
        std::mem::forget(library);
        Ok(Host { identity, version, functions, previous: None })
    }

    /// Its version as `PQlibVersion` gives it.
    pub fn version(&self) -> i32 {
        self.version
    }

    /// Its major version, from 10 on.
    pub fn major(&self) -> i32 {
        self.version / 10_000
    }
}

// SAFETY: the table holds function addresses of a library that is never unloaded, and a pointer
// that is only compared.
unsafe impl Send for Host {}
// SAFETY: as above; nothing in it changes.
unsafe impl Sync for Host {}

/// Looks for `PQconninfo`, which every libpq since 9.3 exports and we do not: in the caller's
/// dependency tree, then in the objects behind us, then in the whole global scope.
fn find_from(return_address: *const c_void) -> Option<NonNull<c_void>> {
    const NAME: &str = "PQconninfo\0";
    Object::containing(return_address)
        .and_then(|caller| Library::open(&caller))
        .and_then(|library| library.symbol(NAME))
        .or_else(|| symbol_in(libc::RTLD_NEXT, NAME))
        .or_else(|| symbol_in(libc::RTLD_DEFAULT, NAME))
}

/// A loaded object, as the dynamic loader knows it.
struct Object {
    base: *const c_void,
    /// Points into the loader's own list. The main program's name is empty there.
    name: *const c_char,
}

impl Object {
    fn containing(address: *const c_void) -> Option<Object> {
        let mut info = std::mem::MaybeUninit::<libc::Dl_info>::zeroed();
        let mut map: *mut LinkMap = std::ptr::null_mut();
        // SAFETY: dladdr1 only looks the address up; both out parameters are valid for it, and
        // with RTLD_DL_LINKMAP the last one receives a pointer to the loader's link map.
        let found = unsafe {
            dladdr1(
                address,
                info.as_mut_ptr(),
                (&raw mut map).cast::<*mut c_void>(),
                RTLD_DL_LINKMAP,
            )
        };
        if found == 0 || map.is_null() {
            return None;
        }
        // SAFETY: dladdr1 filled info, and the link map of a loaded object is readable.
        unsafe { Some(Object { base: info.assume_init().dli_fbase, name: (*map).name }) }
    }
}

/// The documented beginning of glibc's `struct link_map` (link.h).
#[repr(C)]
struct LinkMap {
    load_address: usize,
    name: *const c_char,
}

const RTLD_DL_LINKMAP: c_int = 2;

unsafe extern "C" {
    fn dladdr1(
        address: *const c_void,
        info: *mut libc::Dl_info,
        extra: *mut *mut c_void,
        flags: c_int,
    ) -> c_int;
}

/// A counted handle to a loaded object, for looking into it and its dependencies.
struct Library(NonNull<c_void>);

impl Library {
    /// Opens an object that is loaded already; it never loads one.
    fn open(object: &Object) -> Option<Library> {
        // SAFETY: the name comes from the loader's list and is a C string there.
        let is_main_program = object.name.is_null() || unsafe { *object.name } == 0;
        let name = if is_main_program { std::ptr::null() } else { object.name };
        // SAFETY: dlopen takes NULL for the main program, or a C string; RTLD_NOLOAD keeps it
        // from loading anything or running anyone's constructors.
        NonNull::new(unsafe { libc::dlopen(name, libc::RTLD_LAZY | libc::RTLD_NOLOAD) })
            .map(Library)
    }

    /// Looks a symbol up, by a name that ends in NUL, here and then in the dependencies.
    fn symbol(&self, name: &str) -> Option<NonNull<c_void>> {
        symbol_in(self.0.as_ptr(), name)
    }

    /// The version of a libpq, before anything else of it is relied on.
    fn version(&self) -> Option<c_int> {
        let symbol = self.symbol("PQlibVersion\0")?;
        type LibVersion = unsafe extern "C" fn() -> c_int;
        const _: LibVersion = libpq_fe::PQlibVersion;
        // SAFETY: the symbol comes from a libpq, whose function of this name has this type: the
        // constant above compares it with libpq-fe.h's. It takes nothing and may be called at any
        // time.
        unsafe { Some(std::mem::transmute::<*mut c_void, LibVersion>(symbol.as_ptr())()) }
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        // SAFETY: the handle came from dlopen and is closed once.
        unsafe { libc::dlclose(self.0.as_ptr()) };
    }
}

fn symbol_in(handle: *mut c_void, name: &str) -> Option<NonNull<c_void>> {
    let name = CStr::from_bytes_with_nul(name.as_bytes()).ok()?;
    // SAFETY: the handle is open or one of the loader's own, the name a C string.
    NonNull::new(unsafe { libc::dlsym(handle, name.as_ptr()) })
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

    /// Whether it is encrypted by GSSAPI right now.
    pub fn uses_gss_encryption(&self) -> bool {
        // SAFETY: the connection is live (`new`), PQgssEncInUse only reads it.
        unsafe { (self.host.functions.PQgssEncInUse)(self.conn.as_ptr()) != 0 }
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
    pub fn cancel_secret(&self) -> Result<CancelSecret, Error> {
        // SAFETY: the connection is live (`new`); the block is ours until it is freed below.
        let block = unsafe { (self.host.functions.PQgetCancel)(self.conn.as_ptr()) };
        let Some(block) = NonNull::new(block) else {
            return Err(Error::HostFailed("PQgetCancel"));
        };
        // SAFETY: the host of this version made the block.
        let secret = unsafe {
            CancelSecret::read(block.cast::<u8>(), self.host.version, self.backend_pid())
        };
        // SAFETY: the block is freed once, by the host that made it.
        unsafe { (self.host.functions.PQfreeCancel)(block.as_ptr()) };
        secret
    }

    /// The application's hook for the passphrase of the client key, if it set one of its own.
    pub fn passphrase_hook(&self) -> Option<impl FnOnce(&mut [u8]) -> usize> {
        let functions = &self.host.functions;
        // SAFETY: PQgetSSLKeyPassHook_OpenSSL takes nothing and may be called at any time.
        let hook = unsafe { (functions.PQgetSSLKeyPassHook_OpenSSL)() }?;
        if std::ptr::fn_addr_eq(hook, functions.PQdefaultSSLKeyPassHook_OpenSSL) {
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

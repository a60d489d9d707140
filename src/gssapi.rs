//! The GSSAPI library (RFC 2744) that the program's libpq uses: found among what that libpq depends
//! on, never linked and never loaded by us. Each of its objects has an owner that releases it.

#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::marker::PhantomData;

use crate::error::Error;
use crate::host::Host;
use crate::loader::Library;

/// `gss_buffer_desc`.
#[repr(C)]
struct Buffer<'a> {
    length: usize,
    value: *mut c_void,
    _bytes: PhantomData<&'a [u8]>,
}

impl<'a> Buffer<'a> {
    /// For a function that only reads it.
    fn of(bytes: &'a [u8]) -> Buffer<'a> {
        Buffer { length: bytes.len(), value: bytes.as_ptr().cast_mut().cast(), _bytes: PhantomData }
    }

    /// For a function that fills it.
    fn empty() -> Buffer<'static> {
        Buffer { length: 0, value: std::ptr::null_mut(), _bytes: PhantomData }
    }
}

/// `gss_OID_desc`.
#[repr(C)]
struct Oid {
    length: u32,
    elements: *const u8,
}

// SAFETY: it points to constant bytes.
unsafe impl Sync for Oid {}

/// `GSS_C_NT_HOSTBASED_SERVICE`: 1.2.840.113554.1.2.1.4.
static HOSTBASED_SERVICE: Oid =
    Oid { length: 10, elements: b"\x2a\x86\x48\x86\xf7\x12\x01\x02\x01\x04".as_ptr() };

/// Encryption, and as libpq: the server proves who it is, and nothing can be changed, repeated or
/// reordered. (No delegation: whoever only cancels has no use for the user's credentials.)
const FLAGS: u32 = MUTUAL_FLAG | REPLAY_FLAG | SEQUENCE_FLAG | CONF_FLAG | INTEG_FLAG;
const MUTUAL_FLAG: u32 = 2;
const REPLAY_FLAG: u32 = 4;
const SEQUENCE_FLAG: u32 = 8;
const CONF_FLAG: u32 = 16;
const INTEG_FLAG: u32 = 32;

/// What a context must have, as far as the mechanism tells. (libpq does not ask, and finds out when it
/// encrypts.)
const REQUIRED_FLAGS: u32 = MUTUAL_FLAG | CONF_FLAG | INTEG_FLAG;

/// `GSS_S_CONTINUE_NEEDED`.
const CONTINUE_NEEDED: u32 = 1;

/// `GSS_C_INITIATE`.
const INITIATE: c_int = 1;
/// `GSS_C_GSS_CODE` and `GSS_C_MECH_CODE`.
const GSS_CODE: c_int = 1;
const MECH_CODE: c_int = 2;

/// `gss_cred_id_t`, `gss_ctx_id_t`, `gss_name_t`: only the library knows what is behind them.
type Handle = *mut c_void;

macro_rules! functions {
    ($($name:ident: fn($($arg:ty),* $(,)?);)*) => {
        #[derive(Clone, Copy)]
        struct Functions {
            $($name: unsafe extern "C" fn($($arg),*) -> u32,)*
        }

        impl Functions {
            fn look_up(library: &Library) -> Result<Functions, Error> {
                Ok(Functions {
                    $($name: {
                        let symbol = library
                            .symbol(concat!(stringify!($name), "\0"))
                            .ok_or(Error::HostLacks(stringify!($name)))?;
                        // SAFETY: the functions of these names have these types, which RFC 2744
                        // gives in C.
                        unsafe {
                            std::mem::transmute::<
                                *mut c_void,
                                unsafe extern "C" fn($($arg),*) -> u32,
                            >(symbol.as_ptr())
                        }
                    },)*
                })
            }
        }
    };
}

functions! {
    gss_acquire_cred: fn(
        &mut u32, Handle, u32, *const c_void, c_int, &mut Handle, *mut c_void, *mut u32,
    );
    gss_release_cred: fn(&mut u32, &mut Handle);
    gss_import_name: fn(&mut u32, &Buffer<'_>, &Oid, &mut Handle);
    gss_release_name: fn(&mut u32, &mut Handle);
    gss_init_sec_context: fn(
        &mut u32, Handle, &mut Handle, Handle, *const Oid, u32, u32, *const c_void,
        &Buffer<'_>, *mut *const Oid, &mut Buffer<'static>, *mut u32, *mut u32,
    );
    gss_delete_sec_context: fn(&mut u32, &mut Handle, *mut c_void);
    gss_wrap: fn(&mut u32, Handle, c_int, u32, &Buffer<'_>, &mut c_int, &mut Buffer<'static>);
    gss_unwrap: fn(&mut u32, Handle, &Buffer<'_>, &mut Buffer<'static>, &mut c_int, *mut u32);
    gss_display_status: fn(&mut u32, u32, c_int, *const Oid, &mut u32, &mut Buffer<'static>);
    gss_release_buffer: fn(&mut u32, &mut Buffer<'static>);
}

/// A GSSAPI library.
#[derive(Clone, Copy)]
pub struct Gssapi(Functions);

impl std::fmt::Debug for Gssapi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Gssapi")
    }
}

/// What a function returned: the routine's error and the mechanism's.
struct Status {
    major: u32,
    minor: u32,
}

impl Status {
    /// `GSS_ERROR`.
    fn is_error(&self) -> bool {
        self.major & 0xffff_0000 != 0
    }
}

impl Gssapi {
    /// The one that this libpq uses. It stays loaded, because the libpq does.
    pub fn of(host: &Host) -> Result<Gssapi, Error> {
        let library = host.library().ok_or(Error::HostLacks("gss_init_sec_context"))?;
        Functions::look_up(&library).map(Gssapi)
    }

    /// Calls a function, whose minor status is its first argument.
    fn call(&self, function: impl FnOnce(&Functions, &mut u32) -> u32) -> Status {
        let mut minor = 0;
        let major = function(&self.0, &mut minor);
        Status { major, minor }
    }

    /// Takes the bytes out of a buffer that the library filled.
    fn take(&self, mut buffer: Buffer<'static>) -> Vec<u8> {
        if buffer.value.is_null() {
            return Vec::new();
        }
        // SAFETY: the library filled the buffer with so many bytes.
        let bytes = unsafe { std::slice::from_raw_parts(buffer.value.cast(), buffer.length) };
        let bytes = bytes.to_vec();
        // SAFETY: the library's own buffer, released once.
        self.call(|gss, minor| unsafe { (gss.gss_release_buffer)(minor, &mut buffer) });
        bytes
    }

    /// `pg_GSS_error`: what failed, and in the library's words why.
    fn failure(&self, what: &str, status: &Status) -> Error {
        let mut text = format!("{what}:");
        self.describe(&mut text, status.major, GSS_CODE);
        text.push(':');
        self.describe(&mut text, status.minor, MECH_CODE);
        Error::Gss(text)
    }

    fn describe(&self, text: &mut String, code: u32, kind: c_int) {
        let mut context = 0;
        loop {
            let mut message = Buffer::empty();
            // SAFETY: all pointers are valid or, for the mechanism, NULL as is allowed.
            let status = self.call(|gss, minor| unsafe {
                let any = std::ptr::null();
                (gss.gss_display_status)(minor, code, kind, any, &mut context, &mut message)
            });
            if status.major != 0 {
                return;
            }
            text.push(' ');
            text.push_str(&String::from_utf8_lossy(&self.take(message)));
            if context == 0 {
                return;
            }
        }
    }
}

/// The user's credentials.
#[derive(Debug)]
pub(crate) struct Credentials(Gssapi, Handle);

impl Credentials {
    /// The default ones (`pg_GSS_have_cred_cache`). None if there are none.
    pub(crate) fn acquire(gssapi: Gssapi) -> Option<Credentials> {
        let (mut handle, null) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: all pointers are valid or, where that is allowed, NULL: any name, any mechanism.
        let status = gssapi.call(|gss, minor| unsafe {
            let any = std::ptr::null();
            (gss.gss_acquire_cred)(minor, null, 0, any, INITIATE, &mut handle, null, null.cast())
        });
        (status.major == 0).then_some(Credentials(gssapi, handle))
    }
}

impl Drop for Credentials {
    fn drop(&mut self) {
        // SAFETY: the handle is the library's, and released once.
        self.0.call(|gss, minor| unsafe { (gss.gss_release_cred)(minor, &mut self.1) });
    }
}

/// A server's name.
#[derive(Debug)]
pub(crate) struct Name(Gssapi, Handle);

impl Name {
    /// Of a service, as SERVICE@HOST.
    pub(crate) fn import(gssapi: Gssapi, service: &str) -> Result<Name, Error> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: the buffer is read only, the kind of name a constant, the handle's place valid.
        let status = gssapi.call(|gss, minor| unsafe {
            let service = Buffer::of(service.as_bytes());
            (gss.gss_import_name)(minor, &service, &HOSTBASED_SERVICE, &mut handle)
        });
        if status.major == 0 {
            Ok(Name(gssapi, handle))
        } else {
            Err(gssapi.failure("GSSAPI name import error", &status))
        }
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        // SAFETY: the handle is the library's, and released once.
        self.0.call(|gss, minor| unsafe { (gss.gss_release_name)(minor, &mut self.1) });
    }
}

/// A security context with a server: its establishment, and what is encrypted in it.
#[derive(Debug)]
pub(crate) struct Context {
    gssapi: Gssapi,
    handle: Handle,
    credentials: Credentials,
    server: Name,
}

impl Context {
    /// One that is not begun.
    pub(crate) fn new(credentials: Credentials, server: Name) -> Context {
        Context { gssapi: server.0, handle: std::ptr::null_mut(), credentials, server }
    }

    /// Whether the first token has been made.
    pub(crate) fn is_begun(&self) -> bool {
        !self.handle.is_null()
    }

    /// Takes the server's token (none, to begin with) and makes the next one for it. None at the end,
    /// when the context is established.
    pub(crate) fn next_token(&mut self, token: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        let (mut next, mut flags) = (Buffer::empty(), 0);
        let handle = &mut self.handle;
        // SAFETY: the handles are the library's, the context's NULL to begin with; the token is only
        // read; what is NULL may be: no preference of a mechanism, no channel bindings, no answers.
        let status = self.gssapi.call(|gss, minor| unsafe {
            let (credentials, server, token) =
                (self.credentials.1, self.server.1, Buffer::of(token));
            let any = std::ptr::null();
            (gss.gss_init_sec_context)(
                minor,
                credentials,
                handle,
                server,
                any,
                FLAGS,
                0,
                std::ptr::null(),
                &token,
                std::ptr::null_mut(),
                &mut next,
                &mut flags,
                std::ptr::null_mut(),
            )
        });
        let next = self.gssapi.take(next);
        if status.is_error() {
            return Err(self.gssapi.failure("could not initiate GSSAPI security context", &status));
        }
        if !next.is_empty() {
            return Ok(Some(next));
        }
        if status.major & CONTINUE_NEEDED != 0 || flags & REQUIRED_FLAGS != REQUIRED_FLAGS {
            let text = "GSSAPI security context without mutual authentication or confidentiality";
            return Err(Error::Gss(text.to_owned()));
        }
        Ok(None)
    }

    /// Encrypts.
    pub(crate) fn wrap(&mut self, plaintext: &[u8]) -> Result<Vec<u8>, Error> {
        let (mut is_confidential, mut wrapped) = (0, Buffer::empty());
        // SAFETY: the context is the library's; the plaintext is only read; 0 is the default quality.
        let status = self.gssapi.call(|gss, minor| unsafe {
            let plaintext = Buffer::of(plaintext);
            (gss.gss_wrap)(minor, self.handle, 1, 0, &plaintext, &mut is_confidential, &mut wrapped)
        });
        let wrapped = self.gssapi.take(wrapped);
        if status.major != 0 {
            return Err(self.gssapi.failure("GSSAPI wrap error", &status));
        }
        if is_confidential == 0 {
            let text = "outgoing GSSAPI message would not use confidentiality";
            return Err(Error::Gss(text.to_owned()));
        }
        Ok(wrapped)
    }

    /// Decrypts.
    pub(crate) fn unwrap(&mut self, wrapped: &[u8]) -> Result<Vec<u8>, Error> {
        let (mut was_confidential, mut plaintext) = (0, Buffer::empty());
        // SAFETY: the context is the library's; what is wrapped is only read; nobody asks for the
        // quality.
        let status = self.gssapi.call(|gss, minor| unsafe {
            let (wrapped, quality) = (Buffer::of(wrapped), std::ptr::null_mut());
            let confidential = &mut was_confidential;
            (gss.gss_unwrap)(minor, self.handle, &wrapped, &mut plaintext, confidential, quality)
        });
        let plaintext = self.gssapi.take(plaintext);
        if status.major != 0 {
            return Err(self.gssapi.failure("GSSAPI unwrap error", &status));
        }
        if was_confidential == 0 {
            let text = "incoming GSSAPI message did not use confidentiality";
            return Err(Error::Gss(text.to_owned()));
        }
        Ok(plaintext)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if self.is_begun() {
            // SAFETY: the context is the library's, and deleted once; nobody wants a last token.
            self.gssapi.call(|gss, minor| unsafe {
                (gss.gss_delete_sec_context)(minor, &mut self.handle, std::ptr::null_mut())
            });
        }
    }
}

//! Shared libraries, opened by hand, and typed tables of their functions: so that those that libpq
//! and pqcancel both have are at hand twice.

#![allow(unsafe_code)]

use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_uint, c_void};
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::ptr::{NonNull, null, null_mut};

use super::libpq::Session;

/// Types and declarations of the libpq-fe.h that this command was built with.
#[allow(
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    dead_code,
    unreachable_pub,
    clippy::all
)]
pub(super) mod libpq_fe {
    include!(concat!(env!("OUT_DIR"), "/libpq_fe.rs"));
}
use libpq_fe::{PGconn, PGresult, PQconninfoOption, pg_cancel};

/// `struct pg_cancel_conn`, which libpq-fe.h has from 17 on.
pub(super) type PGcancelConn = c_void;

/// What libpq itself reserves for PQcancel's message.
const ERRBUF_SIZE: usize = 256;

/// Declares a table of functions, all of which a library must have. Those that libpq-fe.h knows
/// are compared with it when this is compiled.
macro_rules! functions {
    (
        $table:ident
        $(known { $($name:ident: fn($($arg:ty),*) $(-> $ret:ty)?;)* })?
        $(newer { $($newer:ident: fn($($newer_arg:ty),*) $(-> $newer_ret:ty)?;)* })?
    ) => {
        #[allow(non_snake_case)]
        pub(super) struct $table {
            $($(pub(super) $name: unsafe extern "C" fn($($arg),*) $(-> $ret)?,)*)?
            $($(pub(super) $newer: unsafe extern "C" fn($($newer_arg),*) $(-> $newer_ret)?,)*)?
        }

        impl $table {
            pub(super) fn look_up(library: &Library) -> Result<Self, String> {
                Ok(Self {
                    $($($name: functions!(@ library, $name, fn($($arg),*) $(-> $ret)?),)*)?
                    $($($newer: functions!(
                        @ library, $newer, fn($($newer_arg),*) $(-> $newer_ret)?
                    ),)*)?
                })
            }
        }

        $($(const _: unsafe extern "C" fn($($arg),*) $(-> $ret)? = libpq_fe::$name;)*)?
    };
    (@ $library:ident, $name:ident, fn($($arg:ty),*) $(-> $ret:ty)?) => {{
        let symbol = $library.symbol(concat!(stringify!($name), "\0"));
        let symbol = symbol.ok_or_else(|| $library.lacks(stringify!($name)))?;
        // SAFETY: the function of this name has this type in every libpq, and in pqcancel: it is
        // compared with libpq-fe.h's above, or copied from pqcancel.h.
        unsafe {
            std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($arg),*) $(-> $ret)?>(
                symbol.as_ptr(),
            )
        }
    }};
}

functions! {
    SessionFunctions
    known {
        PQlibVersion: fn() -> c_int;
        PQconninfoParse: fn(*const c_char, *mut *mut c_char) -> *mut PQconninfoOption;
        PQconninfo: fn(*mut PGconn) -> *mut PQconninfoOption;
        PQconninfoFree: fn(*mut PQconninfoOption);
        PQfreemem: fn(*mut c_void);
        PQconnectdbParams: fn(*const *const c_char, *const *const c_char, c_int) -> *mut PGconn;
        PQfinish: fn(*mut PGconn);
        PQstatus: fn(*const PGconn) -> libpq_fe::ConnStatusType;
        PQerrorMessage: fn(*const PGconn) -> *mut c_char;
        PQsocket: fn(*const PGconn) -> c_int;
        PQhost: fn(*const PGconn) -> *mut c_char;
        PQport: fn(*const PGconn) -> *mut c_char;
        PQpass: fn(*const PGconn) -> *mut c_char;
        PQparameterStatus: fn(*const PGconn, *const c_char) -> *const c_char;
        PQsslInUse: fn(*mut PGconn) -> c_int;
        PQsslAttribute: fn(*mut PGconn, *const c_char) -> *const c_char;
        PQsendQuery: fn(*mut PGconn, *const c_char) -> c_int;
        PQconsumeInput: fn(*mut PGconn) -> c_int;
        PQisBusy: fn(*mut PGconn) -> c_int;
        PQgetResult: fn(*mut PGconn) -> *mut PGresult;
        PQresultErrorMessage: fn(*const PGresult) -> *mut c_char;
        PQresultErrorField: fn(*const PGresult, c_int) -> *mut c_char;
        PQclear: fn(*mut PGresult);
    }
}

functions! {
    OldFunctions
    known {
        PQgetCancel: fn(*mut PGconn) -> *mut pg_cancel;
        PQcancel: fn(*mut pg_cancel, *mut c_char, c_int) -> c_int;
        PQfreeCancel: fn(*mut pg_cancel);
    }
}

functions! {
    NewFunctions
    newer {
        PQcancelCreate: fn(*mut PGconn) -> *mut PGcancelConn;
        PQcancelStart: fn(*mut PGcancelConn) -> c_int;
        PQcancelPoll: fn(*mut PGcancelConn) -> c_uint;
        PQcancelStatus: fn(*const PGcancelConn) -> c_uint;
        PQcancelSocket: fn(*const PGcancelConn) -> c_int;
        PQcancelErrorMessage: fn(*const PGcancelConn) -> *mut c_char;
        PQcancelFinish: fn(*mut PGcancelConn);
    }
}

/// A shared library, which stays loaded.
pub(super) struct Library {
    handle: NonNull<c_void>,
    name: PathBuf,
}

impl Library {
    pub(super) fn open(name: &Path, scope: c_int) -> Result<Self, String> {
        let file = c_string(name.as_os_str())?;
        // SAFETY: a C string. What the loader runs of a library is that library's own business.
        let handle = unsafe { libc::dlopen(file.as_ptr(), libc::RTLD_NOW | scope) };
        let handle = NonNull::new(handle).ok_or_else(|| {
            // SAFETY: dlopen has failed in this thread; its message is a C string until the next.
            unsafe { text(libc::dlerror()) }.unwrap_or_else(|| format!("{name:?} cannot be opened"))
        })?;
        Ok(Self { handle, name: name.to_owned() })
    }

    /// Looks a symbol up, by a name that ends in NUL, here and then in the dependencies.
    pub(super) fn symbol(&self, name: &str) -> Option<NonNull<c_void>> {
        let name = CStr::from_bytes_with_nul(name.as_bytes()).ok()?;
        // SAFETY: a handle that is never closed, and a C string.
        NonNull::new(unsafe { libc::dlsym(self.handle.as_ptr(), name.as_ptr()) })
    }

    pub(super) fn lacks(&self, function: &str) -> String {
        format!("{:?} has no {function}()", self.name)
    }
}

/// The file that the code at this address was loaded from.
pub(super) fn file_of(address: NonNull<c_void>) -> Option<PathBuf> {
    let mut found = libc::Dl_info {
        dli_fname: null(),
        dli_fbase: null_mut(),
        dli_sname: null(),
        dli_saddr: null_mut(),
    };
    // SAFETY: any address may be asked for; where it is found, the name is a C string.
    unsafe {
        (libc::dladdr(address.as_ptr(), &raw mut found) != 0 && !found.dli_fname.is_null())
            .then(|| OsStr::from_bytes(CStr::from_ptr(found.dli_fname).to_bytes()).into())
    }
}

impl OldFunctions {
    pub(super) fn cancel(&self, session: &Session) -> Result<(), String> {
        let mut errbuf = [0; ERRBUF_SIZE];
        // SAFETY: the session is live; the PGcancel is used and freed by the library that made it;
        // the buffer is as long as is said, and holds a C string when PQcancel has failed.
        unsafe {
            let cancel = (self.PQgetCancel)(session.ptr());
            if cancel.is_null() {
                return Err("PQgetCancel() failed".to_owned());
            }
            let done = (self.PQcancel)(cancel, errbuf.as_mut_ptr(), ERRBUF_SIZE as c_int) == 1;
            (self.PQfreeCancel)(cancel);
            if done { Ok(()) } else { Err(text(errbuf.as_ptr()).unwrap_or_default()) }
        }
    }
}

pub(crate) fn c_string(value: &OsStr) -> Result<CString, String> {
    CString::new(value.as_bytes()).map_err(|_| "a zero byte in an argument".to_owned())
}

/// A copy of a C string, without white space at its ends; None for NULL and for an empty one.
///
/// # Safety
///
/// NULL, or a C string.
pub(super) unsafe fn text(string: *const c_char) -> Option<String> {
    // SAFETY: the caller's promise.
    let string = (!string.is_null()).then(|| unsafe { CStr::from_ptr(string) })?;
    Some(string.to_string_lossy().trim().to_owned()).filter(|text| !text.is_empty())
}

/// # Safety
///
/// -1, or a descriptor that stays open as long as the result is used.
pub(super) unsafe fn borrow<'fd>(descriptor: c_int) -> Option<BorrowedFd<'fd>> {
    // SAFETY: the caller's promise.
    (descriptor >= 0).then(|| unsafe { BorrowedFd::borrow_raw(descriptor) })
}

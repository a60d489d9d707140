//! libpq, and a session of it: safe outside this file.

#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::ptr::{NonNull, null, null_mut};

use super::functions::libpq_fe::{self, PGconn};
use super::functions::{Library, OldFunctions, SessionFunctions, borrow, file_of, text};

/// PG_DIAG_SQLSTATE of postgres_ext.h.
const SQLSTATE: c_int = b'C' as c_int;

/// libpq.
pub(crate) struct Libpq {
    pub(crate) path: PathBuf,
    session: SessionFunctions,
    old: OldFunctions,
    /// PQgssEncInUse, from 12 on.
    gss_enc_in_use: Option<unsafe extern "C" fn(*mut PGconn) -> c_int>,
}

impl Libpq {
    /// Opens it under a name for the loader, or by its path. Where that leads to a drop-in, which
    /// has but a few functions itself, the libpq behind it is meant: the one that has PQconninfo.
    pub(crate) fn open(name: &Path) -> Result<Self, String> {
        let named = Library::open(name, libc::RTLD_LOCAL)?;
        let path = named.symbol("PQconninfo\0").and_then(file_of);
        let path = path.ok_or_else(|| named.lacks("PQconninfo"))?;
        // In the global scope, where pqcancel finds it for a program that is linked with none.
        let library = Library::open(&path, libc::RTLD_GLOBAL)?;
        let gss_enc_in_use = library.symbol("PQgssEncInUse\0").map(|symbol| {
            type Function = unsafe extern "C" fn(*mut PGconn) -> c_int;
            const _: Function = libpq_fe::PQgssEncInUse;
            // SAFETY: the function of this name has this type: see the line above.
            unsafe { std::mem::transmute::<*mut c_void, Function>(symbol.as_ptr()) }
        });
        Ok(Self {
            session: SessionFunctions::look_up(&library)?,
            old: OldFunctions::look_up(&library)?,
            path: path.canonicalize().unwrap_or(path),
            gss_enc_in_use,
        })
    }

    /// As PQlibVersion has it: 150018.
    pub(crate) fn version(&self) -> i32 {
        // SAFETY: it takes nothing and may be called at any time.
        unsafe { (self.session.PQlibVersion)() }
    }

    /// Whether libpq understands a conninfo string or URI. If not, its message quotes from it.
    pub(crate) fn check_conninfo(&self, conninfo: &CStr) -> Result<(), String> {
        let mut message = null_mut();
        // SAFETY: a C string, and a place for the message. Both results may be NULL, and are freed
        // once.
        unsafe {
            let parsed = (self.session.PQconninfoParse)(conninfo.as_ptr(), &raw mut message);
            (self.session.PQconninfoFree)(parsed);
            let reason = text(message);
            (self.session.PQfreemem)(message.cast());
            if parsed.is_null() {
                Err(reason.unwrap_or_else(|| "out of memory".into()))
            } else {
                Ok(())
            }
        }
    }

    /// Opens a session. Of an option that is given twice the later value counts; `dbname` may be a
    /// conninfo string or URI.
    pub(crate) fn connect(&self, options: &[(&CStr, &CStr)]) -> Result<Session<'_>, String> {
        let list = |strings: &dyn Fn(&(&CStr, &CStr)) -> *const c_char| {
            options.iter().map(strings).chain([null()]).collect::<Vec<_>>()
        };
        let (keywords, values) =
            (list(&|option| option.0.as_ptr()), list(&|option| option.1.as_ptr()));
        // SAFETY: two arrays of C strings that end with NULL.
        let conn =
            unsafe { (self.session.PQconnectdbParams)(keywords.as_ptr(), values.as_ptr(), 1) };
        let conn = NonNull::new(conn).ok_or("out of memory")?;
        let session = Session { conn, libpq: self };
        // SAFETY: the connection is live.
        if unsafe { (self.session.PQstatus)(session.ptr()) }
            == libpq_fe::ConnStatusType_CONNECTION_OK
        {
            Ok(session)
        } else {
            Err(session.message())
        }
    }

    /// Cancels by this libpq's own PQcancel.
    pub(crate) fn cancel(&self, session: &Session) -> Result<(), String> {
        self.old.cancel(session)
    }
}

/// A connection. It is closed when it is dropped.
pub(crate) struct Session<'l> {
    conn: NonNull<PGconn>,
    libpq: &'l Libpq,
}

/// What became of a statement.
pub(crate) struct Outcome {
    /// None if there was no error, and if libpq itself has made it.
    pub(crate) sqlstate: Option<String>,
    pub(crate) error: Option<String>,
}

// SAFETY, for all of these: the connection is live until the drop, used by one thread, and belongs
// to the libpq whose functions are called; what libpq returns is a C string or NULL, and is copied,
// or borrowed from the session.
impl Session<'_> {
    pub(super) fn ptr(&self) -> *mut PGconn {
        self.conn.as_ptr()
    }

    fn functions(&self) -> &SessionFunctions {
        &self.libpq.session
    }

    pub(crate) fn message(&self) -> String {
        // SAFETY: see above.
        unsafe { text((self.functions().PQerrorMessage)(self.ptr())) }.unwrap_or_default()
    }

    pub(crate) fn socket(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: see above; the descriptor is open as long as libpq names it.
        unsafe { borrow((self.functions().PQsocket)(self.ptr())) }
    }

    pub(crate) fn host(&self) -> String {
        // SAFETY: see above.
        unsafe { text((self.functions().PQhost)(self.ptr())) }.unwrap_or_default()
    }

    pub(crate) fn port(&self) -> String {
        // SAFETY: see above.
        unsafe { text((self.functions().PQport)(self.ptr())) }.unwrap_or_default()
    }

    /// The password that libpq has or found, for another connection.
    pub(crate) fn password(&self) -> Option<&CStr> {
        // SAFETY: see above; it stays where it is as long as the connection.
        unsafe {
            let password = (self.functions().PQpass)(self.ptr());
            (!password.is_null()).then(|| CStr::from_ptr(password)).filter(|it| !it.is_empty())
        }
    }

    pub(crate) fn parameter(&self, name: &CStr) -> Option<String> {
        // SAFETY: see above.
        unsafe { text((self.functions().PQparameterStatus)(self.ptr(), name.as_ptr())) }
    }

    pub(crate) fn uses_tls(&self) -> bool {
        // SAFETY: see above.
        unsafe { (self.functions().PQsslInUse)(self.ptr()) != 0 }
    }

    pub(crate) fn uses_gss_encryption(&self) -> bool {
        // SAFETY: see above.
        self.libpq.gss_enc_in_use.is_some_and(|function| unsafe { function(self.ptr()) != 0 })
    }

    pub(crate) fn tls_attribute(&self, name: &CStr) -> Option<String> {
        // SAFETY: see above.
        unsafe { text((self.functions().PQsslAttribute)(self.ptr(), name.as_ptr())) }
    }

    /// The value of a connection option, wherever it comes from; None if it is empty.
    pub(crate) fn option(&self, keyword: &CStr) -> Option<String> {
        // SAFETY: see above. The array ends with an entry whose keyword is NULL, and is freed once.
        unsafe {
            let array = (self.functions().PQconninfo)(self.ptr());
            let mut next = NonNull::new(array)?.as_ptr();
            while !(*next).keyword.is_null() && CStr::from_ptr((*next).keyword) != keyword {
                next = next.add(1);
            }
            let value = text((*next).val);
            (self.functions().PQconninfoFree)(array);
            value
        }
    }

    pub(crate) fn send(&self, query: &CStr) -> Result<(), String> {
        // SAFETY: see above.
        let sent = unsafe { (self.functions().PQsendQuery)(self.ptr(), query.as_ptr()) } == 1;
        if sent { Ok(()) } else { Err(self.message()) }
    }

    /// Takes what has come, without waiting.
    pub(crate) fn consume(&self) -> Result<(), String> {
        // SAFETY: see above.
        let consumed = unsafe { (self.functions().PQconsumeInput)(self.ptr()) } == 1;
        if consumed { Ok(()) } else { Err(self.message()) }
    }

    /// Whether the next result would have to be waited for.
    pub(crate) fn is_busy(&self) -> bool {
        // SAFETY: see above.
        unsafe { (self.functions().PQisBusy)(self.ptr()) != 0 }
    }

    /// The next result; None when the query has ended.
    pub(crate) fn next_result(&self) -> Option<Outcome> {
        // SAFETY: see above. The result is live until it is freed.
        unsafe {
            let result = NonNull::new((self.functions().PQgetResult)(self.ptr()))?.as_ptr();
            let outcome = Outcome {
                sqlstate: text((self.functions().PQresultErrorField)(result, SQLSTATE)),
                error: text((self.functions().PQresultErrorMessage)(result)),
            };
            (self.functions().PQclear)(result);
            Some(outcome)
        }
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        // SAFETY: the connection is freed once; nothing borrowed from it is left.
        unsafe { (self.functions().PQfinish)(self.ptr()) }
    }
}

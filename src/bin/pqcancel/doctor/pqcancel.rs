//! pqcancel's library, and a cancel connection of it: safe outside this file.

#![allow(unsafe_code)]

use std::ffi::{c_char, c_int, c_void};
use std::marker::PhantomData;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::ptr::NonNull;

use super::functions::libpq_fe;
use super::functions::{Library, NewFunctions, OldFunctions, PGcancelConn, borrow, text};
use super::libpq::Session;

/// pqcancel's library.
pub(crate) struct Pqcancel {
    old: OldFunctions,
    new: NewFunctions,
    /// The OpenSSL that it shares with the process, if it has not one of its own.
    pub(crate) shared_openssl: Option<String>,
}

impl Pqcancel {
    pub(crate) fn open(path: &Path) -> Result<Self, String> {
        let library = Library::open(path, libc::RTLD_LOCAL)?;
        let shared_openssl = library.symbol("OpenSSL_version\0").and_then(|symbol| {
            type Function = unsafe extern "C" fn(c_int) -> *const c_char;
            // SAFETY: OpenSSL's function of this name has this type; 0 asks for the version's text.
            unsafe { text(std::mem::transmute::<*mut c_void, Function>(symbol.as_ptr())(0)) }
        });
        Ok(Self {
            old: OldFunctions::look_up(&library)?,
            new: NewFunctions::look_up(&library)?,
            shared_openssl,
        })
    }

    /// Cancels by the PQcancel that programs get with pqcancel preloaded.
    pub(crate) fn cancel(&self, session: &Session) -> Result<(), String> {
        self.old.cancel(session)
    }

    /// PQcancelCreate.
    pub(crate) fn create(&self, session: &Session) -> Result<CancelConn<'_>, String> {
        // SAFETY: the session is live, and used by one thread.
        let conn = unsafe { (self.new.PQcancelCreate)(session.ptr()) };
        let conn = NonNull::new(conn).ok_or("out of memory")?;
        let cancel = CancelConn { conn, functions: &self.new, _not_shared: PhantomData };
        if cancel.status() == Some(Status::Bad) { Err(cancel.message()) } else { Ok(cancel) }
    }
}

/// A PGcancelConn of pqcancel's. It is freed when it is dropped.
pub(crate) struct CancelConn<'l> {
    conn: NonNull<PGcancelConn>,
    functions: &'l NewFunctions,
    _not_shared: PhantomData<*mut c_void>,
}

/// `ConnStatusType`, as far as a cancel connection has it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    Ok,
    Bad,
    SslStartup,
    GssStartup,
    Made,
    AwaitingResponse,
}

/// `PostgresPollingStatusType`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Polling {
    Failed,
    Reading,
    Writing,
    Ok,
}

// SAFETY, for all of these: the object is live until the drop, used by one thread, and pqcancel's.
impl CancelConn<'_> {
    pub(crate) fn start(&mut self) -> Polling {
        // SAFETY: see above.
        let started = unsafe { (self.functions.PQcancelStart)(self.conn.as_ptr()) } == 1;
        if started { Polling::Writing } else { Polling::Failed }
    }

    pub(crate) fn poll(&mut self) -> Polling {
        // SAFETY: see above.
        match unsafe { (self.functions.PQcancelPoll)(self.conn.as_ptr()) } {
            libpq_fe::PostgresPollingStatusType_PGRES_POLLING_READING => Polling::Reading,
            libpq_fe::PostgresPollingStatusType_PGRES_POLLING_WRITING => Polling::Writing,
            libpq_fe::PostgresPollingStatusType_PGRES_POLLING_OK => Polling::Ok,
            _ => Polling::Failed,
        }
    }

    /// None before it has come to one of those.
    pub(crate) fn status(&self) -> Option<Status> {
        // SAFETY: see above.
        match unsafe { (self.functions.PQcancelStatus)(self.conn.as_ptr()) } {
            libpq_fe::ConnStatusType_CONNECTION_OK => Some(Status::Ok),
            libpq_fe::ConnStatusType_CONNECTION_BAD => Some(Status::Bad),
            libpq_fe::ConnStatusType_CONNECTION_MADE => Some(Status::Made),
            libpq_fe::ConnStatusType_CONNECTION_AWAITING_RESPONSE => Some(Status::AwaitingResponse),
            libpq_fe::ConnStatusType_CONNECTION_SSL_STARTUP => Some(Status::SslStartup),
            libpq_fe::ConnStatusType_CONNECTION_GSS_STARTUP => Some(Status::GssStartup),
            _ => None,
        }
    }

    pub(crate) fn socket(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: see above; the descriptor is open until the object changes.
        unsafe { borrow((self.functions.PQcancelSocket)(self.conn.as_ptr())) }
    }

    pub(crate) fn message(&self) -> String {
        // SAFETY: see above; a C string.
        unsafe { text((self.functions.PQcancelErrorMessage)(self.conn.as_ptr())) }
            .unwrap_or_default()
    }
}

impl Drop for CancelConn<'_> {
    fn drop(&mut self) {
        // SAFETY: the object is freed once.
        unsafe { (self.functions.PQcancelFinish)(self.conn.as_ptr()) }
    }
}

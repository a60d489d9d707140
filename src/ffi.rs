//! The C surface: pointers in, results out, and no logic. Every function catches panics, because
//! none may cross into C, and answers NULL with libpq's failure value.
//!
//! The documentation comments of the functions travel into include/pqcancel.h.
//! (cbindgen reads this file as text; that is why the functions are written out and not made by
//! a macro.)

#![allow(unsafe_code)]

use std::ffi::{c_char, c_int, c_void};
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use crate::abi::{CONNECTION_BAD, ConnStatusType, PGRES_POLLING_FAILED, PostgresPollingStatusType};
use crate::cancel_conn::CancelConn;
use crate::error::Error;
use crate::guard::{attempt, catch};
use crate::host::{Host, PGconn, Session, pg_cancel};
use crate::settings::settings;
use crate::{known_sessions, legacy, signal_safe};

/// The C type is opaque; behind it is this.
pub type PGcancelConn = CancelConn;

/// The C type is opaque to most; behind it are the host's bytes and ours (`signal_safe.rs`).
pub type PGcancel = pg_cancel;

/// Goes on with another function that takes, behind the one argument of this, the address that
/// this one was called from: it tells whose libpq the caller uses, and a compiled function has no
/// way to ask for it.
#[cfg(target_arch = "x86_64")]
macro_rules! return_address_as_second_argument {
    ($function:literal) => {
        concat!("mov rsi, [rsp]\njmp ", $function)
    };
}

#[cfg(target_arch = "aarch64")]
macro_rules! return_address_as_second_argument {
    ($function:literal) => {
        concat!("mov x1, x30\nb ", $function)
    };
}

/// Create a cancel connection for the session `conn`, as PQcancelCreate() of libpq 17 and 18.
///
/// Everything needed is copied: `conn` may be used, closed or freed afterwards. Nothing is sent
/// yet. How the session is protected is decided now: a session over TLS is cancelled over TLS,
/// verified by the session's own settings, one encrypted with GSSAPI so, too, and never otherwise.
/// For one over TLS the first call reads the certificates that the session's options name, so that
/// PQcancelPoll() need not, unless they change; with all the roots that a machine trusts that takes
/// some milliseconds.
///
/// Returns a cancel connection, to be freed with PQcancelFinish(); NULL only when out of memory.
/// If the session cannot be cancelled (NULL, closed, no key from the server, an unknown libpq),
/// its status is CONNECTION_BAD and PQcancelErrorMessage() tells why.
///
/// Thread rule: no other thread may use `conn` during the call. Not for signal handlers.
#[unsafe(naked)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn PQcancelCreate(conn: *mut PGconn) -> *mut PGcancelConn {
    core::arch::naked_asm!(return_address_as_second_argument!("{create}"), create = sym create)
}

/// # Safety
///
/// `conn` is NULL or a live connection that no other thread uses meanwhile.
unsafe extern "C" fn create(conn: *mut PGconn, return_address: *const c_void) -> *mut PGcancelConn {
    let cancel = attempt(|| {
        // SAFETY: the caller's promise.
        let session = unsafe { session(conn, return_address) };
        let target = session.and_then(|session| known_sessions::prepared_target_of(&session));
        Box::new(CancelConn::new(target))
    });
    cancel.map_or(std::ptr::null_mut(), Box::into_raw)
}

/// Start to deliver the cancel request without waiting, as PQcancelStart() of libpq 17 and 18.
///
/// Then wait until the socket of PQcancelSocket() can be written, and call PQcancelPoll().
///
/// Returns 1 if it is started. Returns 0 if not (NULL, already bad, already started, or the
/// server cannot be reached): the status is then CONNECTION_BAD.
///
/// Thread rule: one thread at a time. Not for signal handlers.
#[unsafe(naked)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn PQcancelStart(cancelConn: *mut PGcancelConn) -> c_int {
    core::arch::naked_asm!(return_address_as_second_argument!("{start}"), start = sym start)
}

/// # Safety
///
/// As for [`with`]; or a libpq's own, of the caller's libpq.
unsafe extern "C" fn start(cancel: *mut PGcancelConn, return_address: *const c_void) -> c_int {
    // SAFETY: this function's own contract.
    unsafe {
        if is_foreign(cancel) {
            return call_own("PQcancelStart\0", cancel, return_address).unwrap_or(0);
        }
        with(cancel, 0, |cancel| c_int::from(cancel.start()))
    }
}

/// Deliver the cancel request and wait for the end, as PQcancelBlocking() of libpq 17 and 18.
///
/// Waits as long as the session's connect_timeout allows (seconds; zero, negative and unset mean
/// without limit), with poll(2).
///
/// Returns 1 if the server has taken the request; whether it had an effect, only the query's own
/// result tells. Returns 0 if not: PQcancelErrorMessage() tells why.
///
/// Thread rule: one thread at a time. Not for signal handlers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn PQcancelBlocking(cancelConn: *mut PGcancelConn) -> c_int {
    // SAFETY: this function's own contract.
    unsafe { with(cancelConn, 0, |cancel| c_int::from(cancel.run_blocking())) }
}

/// Go on with a started cancel request as far as that needs no waiting, as PQcancelPoll() of
/// libpq 17 and 18. Polling before the socket is ready does no harm. (With GSSAPI it waits if a ticket
/// has to be fetched from the KDC, as libpq does.)
///
/// Returns PGRES_POLLING_READING or PGRES_POLLING_WRITING: wait until the socket of
/// PQcancelSocket() can be read or written, and call it again. Returns PGRES_POLLING_OK when the
/// server has taken the request. Returns PGRES_POLLING_FAILED when it failed, or for NULL (where
/// libpq crashes).
///
/// Thread rule: one thread at a time. Not for signal handlers.
#[unsafe(naked)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn PQcancelPoll(cancelConn: *mut PGcancelConn) -> PostgresPollingStatusType {
    core::arch::naked_asm!(return_address_as_second_argument!("{poll}"), poll = sym poll)
}

/// # Safety
///
/// As for [`start`].
unsafe extern "C" fn poll(
    cancel: *mut PGcancelConn,
    return_address: *const c_void,
) -> PostgresPollingStatusType {
    // SAFETY: this function's own contract.
    unsafe {
        if is_foreign(cancel) {
            let polled = call_own("PQcancelPoll\0", cancel, return_address);
            return polled.map_or(PGRES_POLLING_FAILED, c_int::cast_unsigned);
        }
        with(cancel, PGRES_POLLING_FAILED, |cancel| cancel.poll().into())
    }
}

/// The status of a cancel connection, as PQcancelStatus() of libpq 17 and 18.
///
/// Returns CONNECTION_ALLOCATED before it is started, then CONNECTION_STARTED, CONNECTION_MADE,
/// CONNECTION_SSL_STARTUP, CONNECTION_GSS_STARTUP or CONNECTION_AWAITING_RESPONSE, in the end
/// CONNECTION_OK (the request is delivered) or CONNECTION_BAD (also for NULL).
///
/// Thread rule: one thread at a time. Not for signal handlers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn PQcancelStatus(cancelConn: *const PGcancelConn) -> ConnStatusType {
    // SAFETY: this function's own contract.
    unsafe { read(cancelConn, CONNECTION_BAD, |cancel| cancel.status().into()) }
}

/// The socket of a cancel connection, as PQcancelSocket() of libpq 17 and 18. It is non-blocking
/// and closed on exec; it belongs to the cancel connection and may change with each
/// PQcancelStart().
///
/// Returns a descriptor, or -1 where there is none (also for NULL).
///
/// Thread rule: one thread at a time. Not for signal handlers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn PQcancelSocket(cancelConn: *const PGcancelConn) -> c_int {
    // SAFETY: this function's own contract.
    unsafe { read(cancelConn, -1, |cancel| cancel.socket().map_or(-1, |fd| fd.as_raw_fd())) }
}

/// The message of the latest failure of a cancel connection, as PQcancelErrorMessage() of libpq
/// 17 and 18: in libpq's words, ending in a newline, empty after a success.
///
/// Returns a string that belongs to the cancel connection and is valid until the next call with
/// it. For NULL it is a constant.
///
/// Thread rule: one thread at a time. Not for signal handlers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn PQcancelErrorMessage(cancelConn: *const PGcancelConn) -> *mut c_char {
    // SAFETY: this function's own contract.
    unsafe {
        let nothing_to_say = if is_foreign(cancelConn) {
            c"pqcancel: this cancel connection is another library's\n"
        } else {
            c"connection pointer is NULL\n"
        };
        read(cancelConn, nothing_to_say.as_ptr(), |cancel| cancel.message().as_ptr()).cast_mut()
    }
}

/// Close the connection of a cancel request, whatever became of it, and make it ready to be
/// started again, as PQcancelReset() of libpq 17 and 18. Its status is then CONNECTION_ALLOCATED.
/// NULL is ignored (where libpq crashes).
///
/// Thread rule: one thread at a time. Not for signal handlers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn PQcancelReset(cancelConn: *mut PGcancelConn) {
    // SAFETY: this function's own contract.
    unsafe { with(cancelConn, (), CancelConn::reset) }
}

/// Close and free a cancel connection, at any point, as PQcancelFinish() of libpq 17 and 18. NULL
/// is ignored. If the request is not delivered yet, it may or may not be.
///
/// Thread rule: one thread, and no use afterwards. Not for signal handlers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn PQcancelFinish(cancelConn: *mut PGcancelConn) {
    let _ = catch(|| {
        // SAFETY: this function's own contract: a pointer of PQcancelCreate, given back once.
        unsafe {
            if !cancelConn.is_null() && !is_foreign(cancelConn) {
                drop(Box::from_raw(cancelConn));
            }
        }
    });
}

/// Make a PGcancel for the session `conn`, as PQgetCancel() of libpq: what PQcancel() needs, so that
/// it can be called from another thread or from a signal handler. To be freed with PQfreeCancel().
///
/// How the session is protected is decided now, as by PQcancelCreate(). For an encrypted session the
/// first call in a process starts a thread, which has all signals blocked; for one in plaintext
/// nothing is started. Called again for the same session, it costs about a microsecond.
///
/// Returns NULL if `conn` is NULL or closed, or when out of memory. Where else the session cannot be
/// cancelled (no key from the server, an unknown libpq), PQcancel() fails and tells why.
///
/// Thread rule: no other thread may use `conn` during the call. Not for signal handlers.
#[unsafe(naked)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn PQgetCancel(conn: *mut PGconn) -> *mut PGcancel {
    core::arch::naked_asm!(return_address_as_second_argument!("{get}"), get = sym get_cancel)
}

/// # Safety
///
/// As for [`create`].
unsafe extern "C" fn get_cancel(conn: *mut PGconn, return_address: *const c_void) -> *mut PGcancel {
    let cancel = attempt(|| {
        // SAFETY: the caller's promise.
        match unsafe { session(conn, return_address) } {
            Ok(session) => legacy::get(&session),
            Err(Error::NullConnection) => None,
            Err(error) => legacy::into_raw(legacy::unusable(&error)),
        }
    });
    cancel.ok().flatten().map_or(std::ptr::null_mut(), NonNull::as_ptr)
}

/// Cancel what the session is doing, as PQcancel() of libpq, and wait until the server has taken the
/// request.
///
/// A session in plaintext is cancelled by system calls, for as long as they take, as in libpq. For
/// one that is encrypted the request is, too, exactly as by PQcancelBlocking(), by the thread that
/// PQgetCancel() started; it takes no longer than the session's connect_timeout, or if there is
/// none, PQCANCEL_TIMEOUT or 10 seconds. If that thread cannot go on, because the program was
/// interrupted while it held a lock (malloc's, say), PQcancel() fails after about half a second, or
/// two if the lock is one that spins.
/// What has failed is not sent any more, and nothing is ever sent in plaintext instead.
///
/// Returns 1 if the request was sent, which does not mean that it had an effect. Returns 0 if not:
/// `errbuf`, a buffer of `errbufsize` bytes (256 are recommended), then holds the reason; it is
/// not changed otherwise. errno is kept.
///
/// Thread rule: any thread, several at once. Signal rule: may be called from a signal handler.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn PQcancel(
    cancel: *mut PGcancel,
    errbuf: *mut c_char,
    errbufsize: c_int,
) -> c_int {
    // No guard: nothing there can panic, and a guard is nothing for a signal handler.
    // SAFETY: this function's own contract.
    unsafe { signal_safe::cancel(cancel, errbuf, errbufsize) }
}

/// Free a PGcancel, as PQfreeCancel() of libpq. NULL is ignored.
///
/// Thread rule: one thread, and no use afterwards. Not for signal handlers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn PQfreeCancel(cancel: *mut PGcancel) {
    let _ = catch(|| {
        if let Some(cancel) = NonNull::new(cancel) {
            // SAFETY: this function's own contract.
            unsafe { legacy::free(cancel) };
        }
    });
}

/// Cancel what the session is doing, as the deprecated PQrequestCancel() of libpq: PQgetCancel(),
/// PQcancel() and PQfreeCancel() in one.
///
/// Returns 1 if the request was sent. Returns 0 if not: PQerrorMessage(conn) then tells why, cut off
/// at the size of that buffer.
///
/// Thread rule: no other thread may use `conn` during the call. Not for signal handlers.
#[unsafe(naked)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn PQrequestCancel(conn: *mut PGconn) -> c_int {
    core::arch::naked_asm!(return_address_as_second_argument!("{request}"), request = sym request_cancel)
}

/// # Safety
///
/// As for [`create`].
unsafe extern "C" fn request_cancel(conn: *mut PGconn, return_address: *const c_void) -> c_int {
    let requested = attempt(|| {
        // SAFETY: the caller's promise.
        let session = unsafe { session(conn, return_address) };
        session.is_ok_and(|session| legacy::request(&session))
    });
    c_int::from(requested.unwrap_or(false))
}

/// The session behind a connection, by the libpq that the caller at this return address calls.
///
/// # Safety
///
/// `conn` is NULL or a live connection that no other thread uses meanwhile.
unsafe fn session<'call>(
    conn: *mut PGconn,
    return_address: *const c_void,
) -> Result<Session<'call>, Error> {
    settings(); // the trace begins with what it has to say
    let conn = NonNull::new(conn).ok_or(Error::NullConnection)?;
    let host = Host::of_caller(return_address)?;
    // SAFETY: the caller's promise; the host is the libpq that the caller calls.
    Ok(unsafe { Session::new(conn, host) })
}

/// Whether a cancel connection was made by a libpq itself, whose PQcancelCreate the program has got
/// hold of without us (dlsym). Its PQcancelBlocking then calls PQcancelStart and PQcancelPoll by
/// name, and gets ours.
///
/// # Safety
///
/// `cancel` is NULL or came from a PQcancelCreate, and was not finished.
unsafe fn is_foreign(cancel: *const PGcancelConn) -> bool {
    // SAFETY: the caller's promise; ours begins with its mark, and a libpq's is longer.
    !cancel.is_null()
        && !CancelConn::has_our_mark(unsafe { cancel.cast::<u128>().read_unaligned() })
}

/// What the libpq that the code at this return address is, or calls, does by itself.
///
/// # Safety
///
/// It made `cancel`.
unsafe fn call_own(
    name: &str,
    cancel: *mut PGcancelConn,
    return_address: *const c_void,
) -> Option<c_int> {
    attempt(|| {
        // SAFETY: the caller's promise.
        Host::of_caller(return_address)
            .ok()
            .and_then(|host| unsafe { host.call_own(name, cancel.cast()) })
    })
    .ok()
    .flatten()
}

/// Does something with a cancel connection; what a panic leaves behind is bad. With one that is not
/// ours it does nothing.
///
/// # Safety
///
/// `cancel` is NULL or came from PQcancelCreate, was not finished, and is not used by another
/// thread meanwhile: what the header asks of every caller.
unsafe fn with<T: Copy>(
    cancel: *mut PGcancelConn,
    failure: T,
    body: impl FnOnce(&mut CancelConn) -> T,
) -> T {
    // SAFETY: the caller's promise.
    let ours = unsafe { if is_foreign(cancel) { None } else { cancel.as_mut() } };
    let Some(cancel) = ours else {
        return failure;
    };
    attempt(|| body(cancel)).unwrap_or_else(|error| {
        let _ = catch(|| cancel.fail_once(&error));
        failure
    })
}

/// Looks at a cancel connection.
///
/// # Safety
///
/// As for [`with`].
unsafe fn read<T: Copy>(
    cancel: *const PGcancelConn,
    failure: T,
    body: impl FnOnce(&CancelConn) -> T,
) -> T {
    // SAFETY: the caller's promise.
    match unsafe { if is_foreign(cancel) { None } else { cancel.as_ref() } } {
        Some(cancel) => catch(|| body(cancel)).unwrap_or(failure),
        None => failure,
    }
}

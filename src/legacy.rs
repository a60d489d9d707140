//! The old functions around PQcancel: PQgetCancel, PQfreeCancel, PQrequestCancel. All looking up,
//! allocating, parsing and starting of threads happens here, so that PQcancel itself
//! (`signal_safe.rs`) need not.

#![allow(unsafe_code)]

use std::ffi::{CStr, c_int};
use std::ptr::NonNull;
use std::time::Duration;

use zeroize::Zeroizing;

use crate::courier;
use crate::error::{Error, ForPQcancel};
use crate::host::{Session, pg_cancel};
use crate::host_layout::{CancelBlock, LONGEST_BLOCK, SOCKADDR_LENGTH};
use crate::known_sessions;
use crate::params::ConnectTimeout;
use crate::settings::settings;
use crate::signal_safe::{self, MESSAGE_SIZE, Message, PgCancel, Plaintext, Way};
use crate::target::Target;
use crate::trace;

/// PQgetCancel. None where libpq returns NULL: the session is closed, or memory has run out.
pub(crate) fn get(session: &Session<'_>) -> Option<NonNull<pg_cancel>> {
    match make(session) {
        Ok(cancel) => into_raw(cancel),
        Err(Error::NotOpen | Error::HostFailed(_) | Error::OutOfMemory) => None,
        // A libpq that we cannot read goes on as without us, where that is not less than the session.
        Err(Error::HostLayout(_) | Error::HostUnsupported(_)) if !session.is_encrypted() => {
            trace::step(|| "PQgetCancel: made by the libpq in use, in plaintext".to_owned());
            session.host_cancel()
        }
        Err(error) => into_raw(unusable(&error)),
    }
}

fn make(session: &Session<'_>) -> Result<PgCancel, Error> {
    let block = Target::cancel_block(session)?;
    let way = if session.is_encrypted() && !settings().plaintext_legacy {
        encrypted(session, &block)?
    } else {
        plaintext(session, &block)?
    };
    Ok(PgCancel::new(host_bytes(&block, &way), way))
}

/// A PGcancel with which PQcancel fails, and says why.
pub(crate) fn unusable(error: &Error) -> PgCancel {
    trace::step(|| format!("PQgetCancel: {error}"));
    let way = match error {
        Error::NoCancelKey => Way::NoKey,
        error => Way::Refused(Message::new(&ForPQcancel(error).to_string())),
    };
    PgCancel::new(Zeroizing::new([0; LONGEST_BLOCK]), way)
}

fn plaintext(session: &Session<'_>, block: &CancelBlock) -> Result<Way, Error> {
    let pid = session.backend_pid();
    let request = block.request(pid).ok_or_else(|| session.unreadable())?;
    let plaintext = Plaintext::new(block, request).ok_or_else(|| session.unreadable())?;
    trace::step(|| format!("PQgetCancel: backend {pid}, in plaintext"));
    Ok(Way::Plaintext(plaintext))
}

fn encrypted(session: &Session<'_>, block: &CancelBlock) -> Result<Way, Error> {
    let target = known_sessions::target_of(session, block)?;
    let timeout = bound(&target.connect_timeout);
    trace::step(|| {
        let pid = session.backend_pid();
        format!("PQgetCancel: backend {pid}, encrypted, at most {} s", timeout.as_secs())
    });
    // Without one PQcancel will fail, and say so; perhaps there will be one by then.
    courier::ensure_running();
    let timeout = u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX);
    Ok(Way::Encrypted { target, timeout })
}

/// PQcancel has no way to complain of a malformed connect_timeout, and libpq's does not know it.
fn bound(connect_timeout: &ConnectTimeout) -> Duration {
    connect_timeout.limit().ok().flatten().unwrap_or(settings().timeout)
}

/// What the block begins with: the host's bytes, for programs that look into it. But the address
/// of an encrypted session has no length: whoever hands the block to a libpq's own PQcancel, which
/// would send the key in plaintext, gets an error from connect(), and nothing is sent.
fn host_bytes(block: &CancelBlock, way: &Way) -> Zeroizing<[u8; LONGEST_BLOCK]> {
    let mut bytes = Zeroizing::new(*block.as_bytes());
    if let (Way::Encrypted { .. }, Some(length)) =
        (way, bytes.get_mut(SOCKADDR_LENGTH..SOCKADDR_LENGTH + 4))
    {
        length.fill(0);
    }
    bytes
}

/// Moves it into a block of malloc's: libpq's own PQfreeCancel, which is free(), may be what frees
/// it. None if memory has run out.
pub(crate) fn into_raw(cancel: PgCancel) -> Option<NonNull<pg_cancel>> {
    // SAFETY: malloc takes any size.
    let block = NonNull::new(unsafe { libc::malloc(size_of::<PgCancel>()) })?.cast::<PgCancel>();
    // SAFETY: the block is as long, and malloc aligns to 16 bytes, as it wants.
    unsafe { block.write(cancel) };
    Some(block.cast())
}

/// PQfreeCancel.
///
/// # Safety
///
/// `cancel` came from PQgetCancel, ours or a libpq's, and is freed once.
pub(crate) unsafe fn free(cancel: NonNull<pg_cancel>) {
    // SAFETY: the caller's promise: a block of ours holds a PgCancel, and either came from malloc.
    // (Every libpq's PQfreeCancel is free().)
    unsafe {
        if PgCancel::is_ours(cancel.as_ptr()) {
            cancel.cast::<PgCancel>().drop_in_place();
        }
        libc::free(cancel.as_ptr().cast());
    }
}

/// PQrequestCancel. As in libpq, a message is cut off at the size of the connection's buffer.
pub(crate) fn request(session: &Session<'_>) -> bool {
    if !session.is_open() {
        session.set_error_message(c"PQrequestCancel() -- connection is not open\n");
        return false;
    }
    let Some(cancel) = get(session) else {
        session.set_error_message(c"out of memory");
        return false;
    };
    let mut message = [0_u8; MESSAGE_SIZE];
    let size = c_int::try_from(message.len()).unwrap_or(0);
    // SAFETY: PQgetCancel's, freed once and after its last use, and a buffer of this size.
    let result = unsafe {
        let result = signal_safe::cancel(cancel.as_ptr(), message.as_mut_ptr().cast(), size);
        free(cancel);
        result
    };
    if result == 0 {
        session.set_error_message(CStr::from_bytes_until_nul(&message).unwrap_or_default());
    }
    result != 0
}

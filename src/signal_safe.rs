//! The body of PQcancel. Everything that it may reach in a signal handler is in this file and in
//! the folder of its name, and nothing there allocates, locks, panics, formats, or looks a symbol
//! up: it makes system calls (through the C library's async-signal-safe functions), keeps errno,
//! and uses atomics. A test walks the machine code to make sure of it.
//!
//! A session in plaintext is cancelled on the caller's stack, as libpq does it (`plaintext.rs`).
//! An encrypted one is handed over to the courier, the thread that can do what a handler cannot
//! (`handover.rs`).

#![allow(unsafe_code)]
// To make a large error small would take an allocator.
#![allow(clippy::result_large_err, clippy::large_enum_variant)]

use std::ffi::{c_char, c_int, c_void};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicPtr;
use std::sync::atomic::Ordering::{Acquire, Release};

use zeroize::Zeroizing;

use crate::host::pg_cancel;
use crate::host_layout::{CancelBlock, LONGEST_BLOCK, Layout};
use crate::target::Target;

mod handover;
mod plaintext;
mod words;

pub(crate) use handover::{
    BELL, COURIER_PROCESS, COURIER_THREAD, HEARTBEAT, KEEPER, PRESENCE, SLOTS, Slot, WORKING,
    courier_is_here, sleep_on, wake_one,
};
pub(crate) use plaintext::Plaintext;
use words::{Errbuf, Failure};
pub(crate) use words::{Line, MESSAGE_SIZE, Message, is_traced, trace_to_file, trace_to_stderr};

/// No socket address uses the last 16 bytes of sockaddr_storage (the longest ends at 110): there a
/// block of ours carries its mark.
const MARK: usize = 112;
const MARK_WORD: u64 = u64::from_ne_bytes(*b"pqcancel");

/// What PQgetCancel returns: one block of malloc's that begins with the bytes of the host's own
/// `struct pg_cancel`, for programs that look into it; what is ours stands behind them.
#[repr(C, align(16))]
pub(crate) struct PgCancel {
    host: Zeroizing<[u8; LONGEST_BLOCK]>,
    way: Way,
}

/// How PQcancel goes about it.
pub(crate) enum Way {
    /// It cannot be done, and this is why.
    Refused(Message),
    /// The server gave no key.
    NoKey,
    /// System calls on the caller's stack.
    Plaintext(Plaintext),
    /// By the courier.
    Encrypted {
        /// What to cancel.
        target: Arc<Target>,
        /// The bound, in nanoseconds.
        timeout: u64,
    },
}

/// Who made a block.
enum Maker<'a> {
    Us(&'a PgCancel),
    /// A second pqcancel in this process.
    AnotherOfUs,
    Host,
}

impl PgCancel {
    /// A block that begins with these bytes of the host's.
    pub(crate) fn new(mut host: Zeroizing<[u8; LONGEST_BLOCK]>, way: Way) -> PgCancel {
        for (to, from) in host.iter_mut().skip(MARK).zip(mark().to_ne_bytes()) {
            *to = from;
        }
        PgCancel { host, way }
    }

    /// Whether we made this block.
    ///
    /// # Safety
    ///
    /// `cancel` came from PQgetCancel, ours or a libpq's, and was not freed.
    pub(crate) unsafe fn is_ours(cancel: *const pg_cancel) -> bool {
        // SAFETY: the caller's promise.
        matches!(unsafe { PgCancel::maker(cancel) }, Maker::Us(_))
    }

    /// # Safety
    ///
    /// As for [`PgCancel::is_ours`]; it is not freed while the answer is in use.
    unsafe fn maker<'a>(cancel: *const pg_cancel) -> Maker<'a> {
        // SAFETY: every struct pg_cancel begins with a sockaddr_storage, which the mark is in.
        let found = unsafe { cancel.cast::<u8>().add(MARK).cast::<u128>().read_unaligned() };
        if found == mark() {
            // SAFETY: only our blocks have this mark.
            return Maker::Us(unsafe { &*cancel.cast::<PgCancel>() });
        }
        if found as u64 == MARK_WORD { Maker::AnotherOfUs } else { Maker::Host }
    }
}

/// What our objects are known by: a word that says what we are, which is no address, and an address
/// that says which of us.
pub(crate) fn mark() -> u128 {
    let us = (&raw const BELL).addr() as u64;
    u128::from(MARK_WORD) | u128::from(us) << 64
}

/// PQcancel.
///
/// # Safety
///
/// `cancel` is NULL or came from PQgetCancel and is not freed meanwhile; `errbuf` has room for
/// `errbufsize` bytes.
pub(crate) unsafe fn cancel(
    cancel: *mut pg_cancel,
    errbuf: *mut c_char,
    errbufsize: c_int,
) -> c_int {
    let kept = errno();
    let size = if errbuf.is_null() { 0 } else { usize::try_from(errbufsize).unwrap_or(0) };
    let errbuf = Errbuf { start: errbuf.cast(), size };
    let began = now();
    let result = match NonNull::new(cancel) {
        None => Err(Failure::Bare(b"PQcancel() -- no cancel object supplied")),
        // SAFETY: the caller's promise.
        Some(cancel) => match unsafe { PgCancel::maker(cancel.as_ptr()) } {
            Maker::Us(cancel) => cancel.way.go(),
            Maker::AnotherOfUs => Err(Failure::Line(b"PQcancel() -- made by another pqcancel")),
            // SAFETY: the caller's promise; the block is the host's.
            Maker::Host => unsafe { cancel_for_host(cancel, &errbuf) },
        },
    };
    if is_traced() {
        let mut line = Line::begin();
        line.text(b"PQcancel returned ").number(u64::from(result.is_ok()));
        line.text(b" after ").number(now().saturating_sub(began) / 1000).text(b" us");
        if let Err(failure) = &result {
            failure.trace(&mut line);
        }
        line.end();
    }
    let returned = c_int::from(result.is_ok());
    if let Err(failure) = result {
        failure.write_to(&errbuf);
    }
    set_errno(kept);
    returned
}

impl Way {
    fn go(&self) -> Result<(), Failure> {
        match self {
            Way::Refused(message) => Err(Failure::Message(message.clone())),
            Way::NoKey => Err(Failure::Bare(b"PQcancel() -- no cancellation key received")),
            Way::Plaintext(plaintext) => plaintext.deliver(),
            Way::Encrypted { target, timeout } => handover::hand_over(target, *timeout),
        }
    }
}

type HostCancel = unsafe extern "C" fn(*mut pg_cancel, *mut c_char, c_int) -> c_int;

/// PQcancel of a libpq whose blocks hold a packet (18 and newer), and of one whose blocks hold a key.
static PACKET_CANCEL: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());
static KEY_CANCEL: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());

/// Remembers a libpq's own PQcancel, for blocks that it made itself.
pub(crate) fn remember_host_cancel(version: c_int, function: HostCancel) {
    let holds_packet = Layout::of(version) == Some(Layout::Packet);
    let kind = if holds_packet { &PACKET_CANCEL } else { &KEY_CANCEL };
    kind.store(function as *mut c_void, Release);
}

/// A block that a libpq made for a caller that does not come by our PQgetCancel: it gets what it
/// would get without us.
///
/// # Safety
///
/// A libpq made the block.
unsafe fn cancel_for_host(cancel: NonNull<pg_cancel>, errbuf: &Errbuf) -> Result<(), Failure> {
    let (packet, key) = (PACKET_CANCEL.load(Acquire), KEY_CANCEL.load(Acquire));
    let function = match (NonNull::new(packet), NonNull::new(key)) {
        // SAFETY: the caller's promise.
        (Some(packet), Some(key)) => match unsafe { CancelBlock::of_unknown(cancel.cast()) } {
            Some(block) if block.layout() == Layout::Packet => packet,
            _ => key,
        },
        (Some(function), None) | (None, Some(function)) => function,
        // SAFETY: the caller's promise.
        (None, None) => return unsafe { cancel_as_host(cancel) },
    };
    // SAFETY: what is stored there are functions of this type; the caller's promise.
    unsafe { call_host(function, cancel, errbuf) }
}

/// # Safety
///
/// The function is a libpq's PQcancel, and that libpq made the block.
#[inline(never)] // the one place that calls through a pointer: the test of the machine code knows it
unsafe fn call_host(
    function: NonNull<c_void>,
    cancel: NonNull<pg_cancel>,
    errbuf: &Errbuf,
) -> Result<(), Failure> {
    // SAFETY: the caller's promise.
    let function = unsafe { std::mem::transmute::<NonNull<c_void>, HostCancel>(function) };
    let size = c_int::try_from(errbuf.size).unwrap_or(c_int::MAX);
    // SAFETY: the block is that libpq's, and the buffer as long as it says.
    match unsafe { function(cancel.as_ptr(), errbuf.start.cast(), size) } {
        0 => Err(Failure::Written),
        _ => Ok(()),
    }
}

/// No libpq is known yet, and a handler cannot look for one: so by what the block tells.
///
/// # Safety
///
/// A libpq made the block.
unsafe fn cancel_as_host(cancel: NonNull<pg_cancel>) -> Result<(), Failure> {
    // SAFETY: the caller's promise.
    let block = unsafe { CancelBlock::of_unknown(cancel.cast()) };
    match &block {
        // libpq 18 makes a block of zeros where the server sent no key.
        Some(block) if block.sockaddr().is_some_and(<[u8]>::is_empty) => Way::NoKey.go(),
        Some(block) => match block.any_request().and_then(|r| Plaintext::new(block, r)) {
            Some(plaintext) => plaintext.deliver(),
            None => Err(UNKNOWN_BLOCK),
        },
        None => Err(UNKNOWN_BLOCK),
    }
}

const UNKNOWN_BLOCK: Failure =
    Failure::Line(b"PQcancel() -- pqcancel does not know the libpq in use");

/// Nanoseconds, from some beginning on.
pub(crate) fn now() -> u64 {
    clock(libc::CLOCK_MONOTONIC)
}

/// What a clock shows, in nanoseconds; 0 if there is no such clock.
fn clock(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: there is room for the time.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}

fn errno() -> c_int {
    // SAFETY: the thread's own errno.
    unsafe { *libc::__errno_location() }
}

fn set_errno(number: c_int) {
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = number };
}

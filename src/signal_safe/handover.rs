//! How PQcancel of an encrypted session and the courier (`courier.rs`) meet: through one of a fixed
//! number of [`Slot`]s. Reachable from a signal handler: nothing here allocates, locks or panics.
//!
//! Either side may leave at any moment:
//!
//! ```text
//!              handler            courier           courier            courier
//! Free -> Claimed -> Posted ------> Taken ---------> Committed ------> Flushed --> Delivered -> Free
//!                       |             | ^               | (not sent)       |   \-> Failed ----> Free
//!               handler |     handler | +---------------+          handler |
//!                       +--> Withdrawn <                               Abandoned -> Free (courier)
//! ```
//!
//! The request leaves only between Committed and Flushed, and Committed is reached only from Taken:
//! what the handler has withdrawn is never sent. Once it may have been sent, the handler says so.

#![allow(unsafe_code)]

use std::ffi::c_long;
use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU8, AtomicU32};

use libc::pid_t;

use super::words::{Failure, Line, MESSAGE_SIZE, Message};
use super::{clock, now};
use crate::target::Target;

const FREE: u32 = 0;
const CLAIMED: u32 = 1;
const POSTED: u32 = 2;
const TAKEN: u32 = 3;
const COMMITTED: u32 = 4;
const FLUSHED: u32 = 5;
const DELIVERED: u32 = 6;
const FAILED: u32 = 7;
const WITHDRAWN: u32 = 8;
const ABANDONED: u32 = 9;

/// A request on its way between a PQcancel and the courier.
pub(crate) struct Slot {
    state: AtomicU32,
    /// A count of the target's own, from Posted on until the courier takes it.
    target: AtomicPtr<Target>,
    /// The courier's connection, so that a forked child can close its copy; -1 for none.
    pub(crate) socket: AtomicI32,
    message: [AtomicU8; MESSAGE_SIZE],
}

/// As many requests as can be under way at once; more have to wait.
pub(crate) static SLOTS: [Slot; 128] = [const { Slot::new() }; 128];

/// Rung for every request that is posted; the courier sleeps on it.
pub(crate) static BELL: AtomicU32 = AtomicU32::new(0);

/// The process and the thread that the courier lives in; 0 where there is none.
pub(crate) static COURIER_PROCESS: AtomicI32 = AtomicI32::new(0);
pub(crate) static COURIER_THREAD: AtomicI32 = AtomicI32::new(0);

/// Goes up with every step of the courier's.
pub(crate) static HEARTBEAT: AtomicU32 = AtomicU32::new(0);

/// WORKING while the courier works; else how many threads keep it from working, which fork or exit.
pub(crate) static PRESENCE: AtomicU32 = AtomicU32::new(0);
pub(crate) const WORKING: u32 = 1 << 31;

/// The thread that keeps it from working; of several the last one to come.
pub(crate) static KEEPER: AtomicI32 = AtomicI32::new(0);

/// When the courier waits for a lock for so long in the middle of its work, or who keeps it from
/// working does, it is one that the program we interrupted may hold: malloc's, or the loader's.
const STUCK_AFTER: u64 = 500 * MILLISECOND;

/// So does one that takes so much processor time for a single step: the lock is one that spins. (The
/// C library's rwlock does for a moment, which a signal may stretch; OpenSSL 3.0 is full of them.)
const SPINS_AFTER: u64 = 2000 * MILLISECOND;

/// How often a waiting PQcancel looks whether that is so.
const LOOK_EVERY: u64 = 100 * MILLISECOND;

/// How long PQcancel waits, when its time is over, for a write that has begun.
const GRACE: u64 = 1000 * MILLISECOND;

const MILLISECOND: u64 = 1_000_000;

const TIMEOUT_EXPIRED: &[u8] = b"PQcancel() -- timeout expired";
const STUCK: &[u8] = b"PQcancel() -- interrupted while the program held a lock; \
    nothing was sent, try again";

pub(super) fn hand_over(target: &Arc<Target>, timeout: u64) -> Result<(), Failure> {
    if !courier_is_here() {
        return Err(Failure::Line(
            b"PQcancel() -- could not start the thread that encrypts cancel requests",
        ));
    }
    let deadline = now().saturating_add(timeout);
    let slot = Slot::claim(deadline)?;
    let target = Arc::into_raw(Arc::clone(target));
    slot.target.store(target.cast_mut(), Relaxed);
    slot.state.store(POSTED, Release);
    BELL.fetch_add(1, Release);
    wake_one(&BELL);
    slot.wait(deadline)
}

/// Whether there is a courier in this process; in a child that came about without pthread_atfork
/// (vfork, clone) there is none.
pub(crate) fn courier_is_here() -> bool {
    // SAFETY: getpid takes nothing.
    COURIER_PROCESS.load(Acquire) == unsafe { libc::getpid() }
}

impl Slot {
    const fn new() -> Slot {
        Slot {
            state: AtomicU32::new(FREE),
            target: AtomicPtr::new(std::ptr::null_mut()),
            socket: AtomicI32::new(-1),
            message: [const { AtomicU8::new(0) }; MESSAGE_SIZE],
        }
    }

    // The handler's side.

    fn claim(deadline: u64) -> Result<&'static Slot, Failure> {
        loop {
            for slot in &SLOTS {
                if slot.change(FREE, CLAIMED) {
                    return Ok(slot);
                }
            }
            if now() >= deadline {
                return Err(Failure::Line(b"PQcancel() -- too many cancel requests at once"));
            }
            // SAFETY: poll takes no descriptors, only to wait.
            unsafe { libc::poll(std::ptr::null_mut(), 0, 1) };
        }
    }

    fn wait(&self, deadline: u64) -> Result<(), Failure> {
        let mut watch = Watch::begin(now());
        loop {
            let state = self.state.load(Acquire);
            match state {
                DELIVERED => {
                    self.state.store(FREE, Release);
                    return Ok(());
                }
                FAILED => {
                    let message = self.message();
                    self.state.store(FREE, Release);
                    return Err(Failure::Message(message));
                }
                _ => {}
            }
            let time = now();
            let expired = time >= deadline;
            let grace_is_over = time >= deadline.saturating_add(GRACE);
            if (expired || watch.is_stuck(time, state))
                && let Some(result) = self.give_up(state, expired, grace_is_over)
            {
                return result;
            }
            let left = if expired { MILLISECOND } else { deadline - time };
            sleep_on(&self.state, state, Some(left.min(LOOK_EVERY)));
        }
    }

    /// Leaves the request to the courier: to be forgotten, or, if it may have left, to be closed.
    /// Nothing if it has just come further, or is about to be written.
    fn give_up(
        &self,
        state: u32,
        expired: bool,
        grace_is_over: bool,
    ) -> Option<Result<(), Failure>> {
        match state {
            POSTED | TAKEN => {
                let why = if expired { TIMEOUT_EXPIRED } else { STUCK };
                self.change(state, WITHDRAWN).then_some(Err(Failure::Line(why)))
            }
            FLUSHED => self.change(state, ABANDONED).then_some(Ok(())),
            COMMITTED if grace_is_over => self.change(state, ABANDONED).then_some(Ok(())),
            _ => None,
        }
    }

    fn message(&self) -> Message {
        let mut message = Message([0; MESSAGE_SIZE]);
        for (to, from) in message.0.iter_mut().zip(&self.message) {
            *to = from.load(Relaxed);
        }
        message
    }

    fn change(&self, from: u32, to: u32) -> bool {
        self.state.compare_exchange(from, to, AcqRel, Acquire).is_ok()
    }

    // The courier's side. None of this runs in a handler.

    /// Takes a request that was posted, and what it is for.
    pub(crate) fn take(&self) -> Option<Arc<Target>> {
        if self.state.load(Acquire) == WITHDRAWN && !self.target.load(Relaxed).is_null() {
            drop(self.take_target()); // before it was taken
            self.state.store(FREE, Release);
        }
        if !self.change(POSTED, TAKEN) {
            return None;
        }
        self.take_target()
    }

    fn take_target(&self) -> Option<Arc<Target>> {
        let target = self.target.swap(std::ptr::null_mut(), Relaxed);
        // SAFETY: hand_over counted the target for the slot; it is taken out once.
        (!target.is_null()).then(|| unsafe { Arc::from_raw(target) })
    }

    /// Whether PQcancel still waits for it.
    pub(crate) fn is_wanted(&self) -> bool {
        !matches!(self.state.load(Acquire), WITHDRAWN | ABANDONED)
    }

    /// Asks to send the request now. No to what was withdrawn; after a yes it is either sent at once
    /// or told otherwise.
    pub(crate) fn commit(&self) -> bool {
        self.change(TAKEN, COMMITTED) || self.state.load(Acquire) == COMMITTED
    }

    /// Tells what became of the write.
    pub(crate) fn written(&self, flushed: bool) {
        self.change(COMMITTED, if flushed { FLUSHED } else { TAKEN });
    }

    /// Tells PQcancel how it ended, or frees the slot if nobody waits any more.
    pub(crate) fn finish(&self, result: Result<(), Message>) {
        let end = match result {
            Ok(()) => DELIVERED,
            Err(message) => {
                for (to, from) in self.message.iter().zip(message.0) {
                    to.store(from, Relaxed);
                }
                FAILED
            }
        };
        let told = [TAKEN, COMMITTED, FLUSHED].iter().any(|state| self.change(*state, end));
        if !told {
            self.state.store(FREE, Release);
        }
        wake_one(&self.state);
    }

    /// Forgets everything: in a forked child, where neither side exists any more.
    pub(crate) fn reset(&self) {
        self.target.store(std::ptr::null_mut(), Relaxed);
        self.socket.store(-1, Relaxed);
        self.state.store(FREE, Release);
    }
}

/// Looks out for a courier that cannot go on.
struct Watch {
    heartbeat: u32,
    /// Since when it has waited for a lock, as far as was seen.
    waits_since: u64,
    /// The processor time that it had taken when it last did anything.
    spent: u64,
    looked: u64,
}

impl Watch {
    fn begin(time: u64) -> Watch {
        Watch {
            heartbeat: HEARTBEAT.load(Relaxed),
            waits_since: time,
            spent: courier_time(),
            looked: time,
        }
    }

    fn is_stuck(&mut self, time: u64, state: u32) -> bool {
        if time.saturating_sub(self.looked) < LOOK_EVERY {
            return false;
        }
        self.looked = time;
        let busy = state == POSTED || PRESENCE.load(Relaxed) != 0;
        if HEARTBEAT.load(Relaxed) != self.heartbeat || !busy {
            *self = Watch::begin(time);
            return false;
        }
        if !lock_is_in_the_way() {
            self.waits_since = time;
        }
        time.saturating_sub(self.waits_since) >= STUCK_AFTER
            || courier_time().saturating_sub(self.spent) >= SPINS_AFTER
    }
}

/// The processor time that the courier's thread has taken, in nanoseconds; 0 if there is no telling.
fn courier_time() -> u64 {
    // As pthread_getcpuclockid makes it, which needs more than the thread's number.
    const OF_A_THREAD: libc::clockid_t = 0b110;
    match COURIER_THREAD.load(Relaxed) {
        0 => 0,
        thread => clock(!thread << 3 | OF_A_THREAD),
    }
}

/// Whether the one we wait for waits for a lock: the courier, or who keeps it from working. If that
/// is the thread we interrupted, in the middle of a fork, it waits for us.
fn lock_is_in_the_way() -> bool {
    let presence = PRESENCE.load(Acquire);
    if presence == 0 || presence & WORKING != 0 {
        return waits_for_a_lock(COURIER_THREAD.load(Relaxed));
    }
    let keeper = KEEPER.load(Relaxed);
    // SAFETY: gettid takes nothing.
    let own = unsafe { libc::syscall(libc::SYS_gettid) };
    c_long::from(keeper) == own || waits_for_a_lock(keeper)
}

/// Whether a thread waits for a lock, rather than for a server, a KDC or a disk, for processor time,
/// or to begin. Without an answer from /proc it counts as waiting.
fn waits_for_a_lock(thread: pid_t) -> bool {
    // A lock that spins may do so asleep.
    const BY: [c_long; 4] =
        [libc::SYS_futex, libc::SYS_sched_yield, libc::SYS_nanosleep, libc::SYS_clock_nanosleep];
    if thread == 0 {
        return false;
    }
    let mut path = Line::empty();
    path.text(b"/proc/self/task/").number(u64::from(thread.unsigned_abs())).text(b"/syscall\0");
    let mut text = [0_u8; 128];
    // SAFETY: the path ends in a zero byte, the buffer is as long as it says, and the descriptor
    // is closed once.
    let length = unsafe {
        let file = libc::open(path.as_bytes().as_ptr().cast(), libc::O_RDONLY | libc::O_CLOEXEC);
        if file < 0 {
            return true;
        }
        let length = libc::read(file, text.as_mut_ptr().cast(), text.len());
        libc::close(file);
        length
    };
    let Ok(length) = usize::try_from(length) else {
        return true;
    };
    // "202 0x..." while it is in a system call, else "running".
    let digits = text.iter().take(length).take_while(|byte| byte.is_ascii_digit());
    let number = digits.fold(None, |number: Option<c_long>, digit| {
        Some(number.unwrap_or(0).saturating_mul(10).saturating_add(c_long::from(digit - b'0')))
    });
    number.is_some_and(|number| BY.contains(&number))
}

/// Sleeps until it is woken, the word is not as expected, or so many nanoseconds have passed.
pub(crate) fn sleep_on(word: &AtomicU32, expected: u32, nanoseconds: Option<u64>) {
    let time = nanoseconds.map(|left| libc::timespec {
        tv_sec: (left / 1_000_000_000).cast_signed(),
        tv_nsec: (left % 1_000_000_000).cast_signed(),
    });
    let timeout = time.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    let wait = c_long::from(libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG);
    // SAFETY: the word is an aligned 32-bit one, the timeout NULL or a timespec.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), wait, c_long::from(expected), timeout) };
}

/// Wakes one that sleeps on the word.
pub(crate) fn wake_one(word: &AtomicU32) {
    let wake = c_long::from(libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG);
    // SAFETY: the word is an aligned 32-bit one.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), wake, c_long::from(1)) };
}

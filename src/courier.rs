//! The courier: the one thread that carries the cancel requests of encrypted sessions for
//! PQcancel, which may be called in a signal handler and can do none of it itself. It is started
//! by the first PQgetCancel of such a session, has all signals blocked, and sleeps in the kernel
//! until a request is posted (`signal_safe/handover.rs`). It holds no descriptor meanwhile, so that
//! a program that closes all of them takes nothing from it.
//!
//! A forked child has no threads but the one that forked. It gets a courier of its own, and the
//! fork waits until the parent's is between two steps, so that what the child inherits (OpenSSL's
//! state above all) is whole. For the same reason the process does not exit in the middle of one.
//!
//! A process also ends when the last of its threads does. The courier is no such thread: when the
//! main thread has left (pthread_exit), it looks for others, and leaves when there are none.

use std::cell::Cell;
use std::ffi::c_void;
use std::fs::DirEntry;
use std::os::fd::AsRawFd;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{getpid, gettid};

use crate::cancel_conn::{CancelConn, Polling};
use crate::error::{Error, ForPQcancel};
use crate::guard::catch;
use crate::openssl_memory;
use crate::process;
use crate::signal_safe::{
    BELL, COURIER_PROCESS, COURIER_THREAD, HEARTBEAT, KEEPER, Message, PRESENCE, SLOTS, Slot,
    WORKING, courier_is_here, sleep_on, wake_one,
};
use crate::trace;

/// Deep enough for OpenSSL; what is not used is not there.
const STACK_SIZE: usize = 512 * 1024;

/// While there are connections to look after, new requests are looked for so often, in milliseconds:
/// what waits for a socket cannot be woken by the bell.
const TICK: u8 = 5;

/// How long a fork or an exit waits for the courier. One that is stuck would never come.
const FORK_PATIENCE: Duration = Duration::from_millis(500);
const EXIT_PATIENCE: Duration = Duration::from_millis(1000);

/// How often the courier looks for other threads when the main thread has left, in nanoseconds.
const LOOK_AROUND_EVERY: u64 = 200_000_000;

// ---- starting it --------------------------------------------------------------------------------

/// Makes sure that this process has a courier. False if it cannot have one.
pub(crate) fn ensure_running() -> bool {
    // Not courier_is_here(): this is asked around every query. (A child that came about without
    // pthread_atfork and has no courier is told so by PQcancel.)
    COURIER_PROCESS.load(Acquire) > 0 || start()
}

static STARTING: AtomicBool = AtomicBool::new(false);

fn start() -> bool {
    while STARTING.swap(true, AcqRel) {
        std::thread::yield_now();
    }
    let started = courier_is_here() || (watch_process() && spawn());
    if gettid() == getpid() {
        process::on_end_of_this_thread(main_thread_leaves);
    }
    STARTING.store(false, Release);
    started
}

fn spawn() -> bool {
    if COURIER_PROCESS.load(Acquire) == EXITING {
        return false;
    }
    // The first thing that the thread does is work.
    PRESENCE.store(WORKING, Release);
    if let Err(errno) = process::start_thread(c"pqcancel", STACK_SIZE, begin) {
        PRESENCE.store(0, Release);
        trace::step(|| format!("the courier could not be started: {errno}"));
        return false;
    }
    COURIER_PROCESS.store(getpid().as_raw(), Release);
    true
}

/// Has the process tell us of its forks and its exit. Once is enough, also for its children.
fn watch_process() -> bool {
    static WATCHED: AtomicBool = AtomicBool::new(false);
    let watched = WATCHED.load(Relaxed)
        || (process::on_fork(before_fork, after_fork_in_parent, after_fork_in_child)
            && process::on_exit(before_exit));
    WATCHED.store(watched, Relaxed);
    watched
}

// ---- its life -----------------------------------------------------------------------------------

/// One request under way.
struct Job {
    slot: &'static Slot,
    conn: CancelConn,
    wants: PollFlags,
}

extern "C" fn begin(_: *mut c_void) -> *mut c_void {
    COURIER_THREAD.store(gettid().as_raw(), Release);
    let _ = catch(live);
    COURIER_PROCESS.store(EXITING, Release);
    std::ptr::null_mut()
}

fn live() {
    trace::step(|| "the courier has started".to_owned());
    // OpenSSL's first use takes long: not while somebody waits.
    let _ = catch(openssl_memory::prepare);
    let mut jobs: Vec<Job> = Vec::new();
    while !(jobs.is_empty() && MAIN_THREAD_HAS_LEFT.load(Acquire) && is_alone()) {
        let rung = BELL.load(Acquire);
        jobs.extend(SLOTS.iter().filter_map(Job::take));
        jobs.retain_mut(Job::goes_on);
        wait(&mut jobs, rung);
    }
}

/// Waits until a socket is ready or a request is posted.
fn wait(jobs: &mut [Job], rung: u32) {
    if jobs.is_empty() {
        let limit = MAIN_THREAD_HAS_LEFT.load(Acquire).then_some(LOOK_AROUND_EVERY);
        rest(|| sleep_on(&BELL, rung, limit));
        return;
    }
    let mut fds: Vec<PollFd<'_>> =
        jobs.iter().filter_map(|job| Some(PollFd::new(job.conn.socket()?, job.wants))).collect();
    // However it ends, the jobs are looked at: polling one too early does no harm.
    rest(|| {
        let _ = poll(&mut fds, PollTimeout::from(TICK));
    });
}

/// Does something during which the courier may be kept from working.
fn rest(body: impl FnOnce()) {
    PRESENCE.fetch_and(!WORKING, Release);
    body();
    while let Err(kept) = PRESENCE.compare_exchange(0, WORKING, AcqRel, Acquire) {
        sleep_on(&PRESENCE, kept, None);
    }
    HEARTBEAT.fetch_add(1, Relaxed);
}

impl Job {
    /// Takes a request, if one was posted in this slot, and begins with it.
    fn take(slot: &'static Slot) -> Option<Job> {
        let target = slot.take()?;
        HEARTBEAT.fetch_add(1, Relaxed);
        let conn = CancelConn::new(Ok(target));
        let mut job = Job { slot, conn, wants: PollFlags::POLLOUT };
        let started = catch(|| job.conn.try_start(&|| slot.commit())).unwrap_or_else(Err);
        slot.socket.store(job.conn.socket().map_or(-1, |socket| socket.as_raw_fd()), Release);
        match started {
            Ok(()) => Some(job),
            Err(error) => {
                job.end(Err(error));
                None
            }
        }
    }

    /// Goes on as far as it can. False when it is over.
    fn goes_on(&mut self) -> bool {
        HEARTBEAT.fetch_add(1, Relaxed);
        if !self.slot.is_wanted() {
            self.end(Err(Error::Withdrawn));
            return false;
        }
        let (slot, conn) = (self.slot, &mut self.conn);
        let had_sent = conn.has_sent();
        let polled = catch(|| conn.try_poll(&|| slot.commit())).unwrap_or_else(Err);
        slot.written(conn.has_sent());
        match polled {
            Ok(Polling::Reading) => self.wants = PollFlags::POLLIN,
            Ok(Polling::Writing) => self.wants = PollFlags::POLLOUT,
            Ok(Polling::Ok) => self.end(Ok(())),
            // As in libpq's PQcancel: a server that has the request may well reset.
            Err(Error::SslReceive(_) | Error::Receive(_)) if had_sent => self.end(Ok(())),
            Err(error) => self.end(Err(error)),
            Ok(Polling::Failed) => self.end(Err(Error::InvalidState)),
        }
        self.conn.socket().is_some()
    }

    /// Closes the connection, and only then tells PQcancel, who may look at its descriptors.
    fn end(&mut self, result: Result<(), Error>) {
        self.slot.socket.store(-1, Release);
        let _ = catch(|| self.conn.reset());
        self.slot.finish(result.map_err(|error| Message::new(&ForPQcancel(&error).to_string())));
    }
}

// ---- forks and the end --------------------------------------------------------------------------

static MAIN_THREAD_HAS_LEFT: AtomicBool = AtomicBool::new(false);

extern "C" fn main_thread_leaves(_: *mut c_void) {
    MAIN_THREAD_HAS_LEFT.store(true, Release);
    BELL.fetch_add(1, Release);
    wake_one(&BELL);
}

/// Whether no other thread lives any more. If that cannot be told, some do.
fn is_alone() -> bool {
    let is_dead = |thread: &DirEntry| {
        let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        // "PID (name) Z ...", and the name may be anything.
        stat.rsplit_once(") ").is_none_or(|(_, fields)| fields.starts_with(['Z', 'X']))
    };
    let Ok(threads) = std::fs::read_dir("/proc/self/task") else {
        return false;
    };
    threads.flatten().filter(|thread| !is_dead(thread)).count() == 1
}

/// In COURIER_PROCESS: it has come to its end, and no courier is started any more.
const EXITING: i32 = -1;

thread_local! {
    /// Whether this thread, which forks, keeps the courier from working.
    static KEEPS: Cell<bool> = const { Cell::new(false) };
}

extern "C" fn before_fork() {
    KEEPS.set(courier_is_here() && keep_from_working(FORK_PATIENCE));
}

extern "C" fn after_fork_in_parent() {
    if KEEPS.take() {
        PRESENCE.fetch_sub(1, Release);
        wake_one(&PRESENCE);
    }
}

/// What the parent's courier had in hand is the parent's.
extern "C" fn after_fork_in_child() {
    KEEPS.set(false);
    let had_courier = COURIER_PROCESS.swap(0, AcqRel) > 0;
    for slot in &SLOTS {
        process::close(slot.socket.load(Acquire));
        slot.reset();
    }
    PRESENCE.store(0, Release);
    COURIER_THREAD.store(0, Release);
    STARTING.store(false, Release);
    MAIN_THREAD_HAS_LEFT.store(false, Release);
    if had_courier {
        let _ = catch(ensure_running);
    }
}

extern "C" fn before_exit() {
    if courier_is_here() {
        COURIER_PROCESS.store(EXITING, Release);
        keep_from_working(EXIT_PATIENCE);
    }
}

/// Waits until the courier is between two steps, and keeps it there. False if it does not come.
fn keep_from_working(patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    loop {
        let presence = PRESENCE.load(Acquire);
        let resting = presence & WORKING == 0;
        if resting && PRESENCE.compare_exchange(presence, presence + 1, AcqRel, Acquire).is_ok() {
            KEEPER.store(gettid().as_raw(), Relaxed);
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

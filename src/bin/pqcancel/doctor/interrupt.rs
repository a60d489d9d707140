//! SIGINT and its like, put off while a query runs: it must not outlive us by its full time.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// What a wait has come to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waited {
    /// Which of the descriptors are ready.
    Ready([bool; 2]),
    TimedOut,
    Interrupted,
}

/// While it lives, those signals end waits, not the process. What came meanwhile ends it after.
pub(crate) struct Interrupts {
    signals: SigSet,
    pending: SignalFd,
}

impl Interrupts {
    pub(crate) fn put_off() -> Result<Self, Errno> {
        let signals =
            [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect::<SigSet>();
        let pending = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC)?;
        signals.thread_block()?;
        Ok(Self { signals, pending })
    }

    /// Waits until one of two descriptors is ready, for what is wanted of it.
    pub(crate) fn wait(
        &self,
        heeds_interrupts: bool,
        first: (BorrowedFd, PollFlags),
        second: Option<(BorrowedFd, PollFlags)>,
        deadline: Instant,
    ) -> Result<Waited, Errno> {
        // Never read, so it stays pending.
        let signals = if heeds_interrupts { PollFlags::POLLIN } else { PollFlags::empty() };
        let mut on =
            vec![PollFd::new(self.pending.as_fd(), signals), PollFd::new(first.0, first.1)];
        on.extend(second.map(|(descriptor, wanted)| PollFd::new(descriptor, wanted)));
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up: a wait that ends just before the deadline would be repeated without a pause.
        let timeout =
            PollTimeout::try_from(left.as_millis().saturating_add(1)).unwrap_or(PollTimeout::MAX);
        loop {
            match poll(&mut on, timeout) {
                Ok(0) => return Ok(Waited::TimedOut),
                Ok(_) => break,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        let is_ready = |at: usize| on.get(at).is_some_and(|it| it.any().unwrap_or(true));
        Ok(if is_ready(0) {
            Waited::Interrupted
        } else {
            Waited::Ready([is_ready(1), is_ready(2)])
        })
    }
}

impl Drop for Interrupts {
    fn drop(&mut self) {
        // It cannot fail: the set is a valid one.
        let _ = self.signals.thread_unblock();
    }
}

//! A query that sleeps until it is cancelled, and the cancelling, with the time of every step.
//! Nothing is waited for without a limit, and no query is left behind.

use std::ffi::CString;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::poll::PollFlags;

use super::interrupt::{Interrupts, Waited};
use super::libpq::{Outcome, Session};
use super::pqcancel::{CancelConn, Polling, Status};

/// QUERY_CANCELED.
pub(crate) const CANCELLED: &str = "57014";

const RUNNING_LIMIT: Duration = Duration::from_secs(5);
/// As PQcancel of pqcancel without a connect_timeout.
const CANCEL_LIMIT: Duration = Duration::from_secs(10);
/// How long a query may go on after its cancel was delivered.
const END_LIMIT: Duration = Duration::from_secs(5);
/// Longer than all of them; and if everything fails, not for ever.
pub(crate) const SLEEP_SECONDS: u32 = 30;

/// What was done to cancel, and what became of the query.
pub(crate) struct Cancelled {
    /// Since the first call.
    pub(crate) steps: Vec<(&'static str, Duration)>,
    pub(crate) end: End,
}

pub(crate) enum End {
    /// The server's message, and how long after the first call.
    Cancelled { message: String, after: Duration },
    /// It ended, but not so.
    Otherwise(String),
    /// The cancel failed, in libpq's words.
    NotDelivered(String),
    /// The cancel was taken, and the query went on.
    WentOn,
    /// By a signal to us.
    Interrupted,
}

impl Cancelled {
    pub(crate) fn is_success(&self) -> bool {
        matches!(self.end, End::Cancelled { .. })
    }
}

/// A query that runs in a session.
pub(crate) struct Query<'q> {
    session: &'q Session<'q>,
    interrupts: Interrupts,
    heeds_interrupts: bool,
    token: String,
    outcome: Option<(Instant, Outcome)>,
    is_over: bool,
}

impl<'q> Query<'q> {
    /// Starts it, and waits until the server says that it runs: by the first statement's result,
    /// which is more than a server keeps back. That one also switches off what else would end it,
    /// for this transaction.
    pub(crate) fn start(session: &'q Session<'q>) -> Result<Self, String> {
        let interrupts = Interrupts::put_off().map_err(|errno| errno.desc().to_owned())?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let token = format!("pqcancel doctor {}.{}", std::process::id(), now.as_nanos());
        let text = format!(
            "select set_config('statement_timeout', '0', true), repeat('.', 16384); \
             select pg_sleep({SLEEP_SECONDS}) /* {token} */"
        );
        session.send(&CString::new(text).unwrap_or_default())?;
        let query = Self {
            session,
            interrupts,
            heeds_interrupts: true,
            token,
            outcome: None,
            is_over: false,
        };
        let socket = query.socket()?;
        query.wait(socket, PollFlags::POLLIN, None, Instant::now() + RUNNING_LIMIT)?;
        Ok(query)
    }

    /// Cancels it by a call that blocks. Where `check` finds that this was in vain, nothing is
    /// waited for.
    pub(crate) fn cancel_blocking(
        mut self,
        cancel: impl FnOnce() -> Result<(), String>,
        check: impl FnOnce() -> Result<(), String>,
    ) -> (Cancelled, Self) {
        let began = Instant::now();
        let done = cancel();
        let steps = vec![("PQcancel", began.elapsed())];
        let taken = self.take_results(); // now, so that the time is right
        let end = match done.and(check()).and(taken) {
            Ok(()) => self.wait_for_end(began),
            Err(message) => End::NotDelivered(message),
        };
        (Cancelled { steps, end }, self)
    }

    /// Cancels it as an event loop does, and notes the time of every step; making the cancel
    /// connection was the first.
    pub(crate) fn cancel(mut self, mut cancel: CancelConn, made_in: Duration) -> (Cancelled, Self) {
        let began = Instant::now().checked_sub(made_in).unwrap_or_else(Instant::now);
        let mut steps = vec![("PQcancelCreate", made_in)];
        let end = match self.deliver(&mut cancel, began, &mut steps) {
            Ok(Waited::Interrupted) => End::Interrupted,
            Ok(_) => self.wait_for_end(began),
            Err(message) => End::NotDelivered(message),
        };
        (Cancelled { steps, end }, self)
    }

    fn deliver(
        &mut self,
        cancel: &mut CancelConn,
        began: Instant,
        steps: &mut Vec<(&'static str, Duration)>,
    ) -> Result<Waited, String> {
        let mut polling = cancel.start();
        let mut before = None;
        loop {
            let status = cancel.status();
            if status != before {
                steps.extend(step(before, status).map(|step| (step, began.elapsed())));
                before = status;
            }
            let wanted = match polling {
                Polling::Ok => return Ok(Waited::Ready([false; 2])),
                Polling::Failed => return Err(cancel.message()),
                Polling::Reading => PollFlags::POLLIN,
                Polling::Writing => PollFlags::POLLOUT,
            };
            let socket = cancel.socket().ok_or_else(|| cancel.message())?;
            match self.wait(socket, wanted, self.socket_unless_ended(), began + CANCEL_LIMIT)? {
                Waited::Ready([ours, sessions]) => {
                    if sessions {
                        self.take_results()?;
                    }
                    if ours {
                        polling = cancel.poll();
                    }
                }
                Waited::TimedOut => return Err("timeout expired".to_owned()),
                Waited::Interrupted => return Ok(Waited::Interrupted),
            }
        }
    }

    fn wait_for_end(&mut self, began: Instant) -> End {
        let deadline = Instant::now() + END_LIMIT;
        loop {
            if let Err(message) = self.take_results() {
                return End::Otherwise(message);
            }
            if let (true, Some((ended, outcome))) = (self.is_over, &self.outcome) {
                let error =
                    outcome.error.clone().unwrap_or_else(|| "it slept to its end".to_owned());
                return match outcome.sqlstate.as_deref() {
                    Some(CANCELLED) => End::Cancelled { message: error, after: *ended - began },
                    _ => End::Otherwise(error),
                };
            }
            let waited = self
                .socket()
                .and_then(|socket| self.wait(socket, PollFlags::POLLIN, None, deadline));
            match waited {
                Ok(Waited::Ready(_)) => {}
                Ok(Waited::TimedOut) => return End::WentOn,
                Ok(Waited::Interrupted) => return End::Interrupted,
                Err(message) => return End::Otherwise(message),
            }
        }
    }

    /// Takes what has come of the results. The first error, or else the last result, is how the
    /// query ended.
    fn take_results(&mut self) -> Result<(), String> {
        self.session.consume()?;
        while !self.is_over && !self.session.is_busy() {
            match self.session.next_result() {
                Some(outcome) if self.has_failed() => drop(outcome),
                Some(outcome) => self.outcome = Some((Instant::now(), outcome)),
                None => self.is_over = true,
            }
        }
        Ok(())
    }

    fn has_failed(&self) -> bool {
        self.outcome.as_ref().is_some_and(|(_, outcome)| outcome.error.is_some())
    }

    /// Ends the query if it still runs, from another session: no cancel request is relied on, and a
    /// query that sleeps does not notice that its client has gone. Returns whether nothing is left.
    pub(crate) fn end<'c>(
        &mut self,
        connect: impl FnOnce() -> Result<Session<'c>, String>,
    ) -> bool {
        if self.take_results().is_ok() && self.is_over {
            return true;
        }
        self.heeds_interrupts = false;
        let Ok(other) = connect() else { return false };
        let text = format!(
            "select pg_cancel_backend(pid) from pg_stat_activity \
             where query like '%{}%' and pid <> pg_backend_pid()",
            self.token
        );
        let asked = other.send(&CString::new(text).unwrap_or_default());
        asked.is_ok() && matches!(self.wait_for_end(Instant::now()), End::Cancelled { .. })
    }

    fn socket(&self) -> Result<BorrowedFd<'q>, String> {
        self.session.socket().ok_or_else(|| self.session.message())
    }

    fn socket_unless_ended(&self) -> Option<BorrowedFd<'q>> {
        self.socket().ok().filter(|_| !self.is_over)
    }

    fn wait(
        &self,
        socket: BorrowedFd,
        wanted: PollFlags,
        sessions: Option<BorrowedFd>,
        deadline: Instant,
    ) -> Result<Waited, String> {
        let sessions = sessions.map(|socket| (socket, PollFlags::POLLIN));
        let waited =
            self.interrupts.wait(self.heeds_interrupts, (socket, wanted), sessions, deadline);
        waited.map_err(|errno| errno.desc().to_owned())
    }
}

/// What has been done when a cancel connection comes from one status to another.
fn step(before: Option<Status>, status: Option<Status>) -> Option<&'static str> {
    match (before, status?) {
        (Some(Status::SslStartup), Status::Made) => Some("TLS established"),
        (Some(Status::GssStartup), Status::Made) => Some("GSS established"),
        (_, Status::Made) => Some("connected"),
        (_, Status::AwaitingResponse) => Some("request sent"),
        (_, Status::Ok) => Some("server closed"),
        (_, Status::SslStartup | Status::GssStartup | Status::Bad) => None,
    }
}

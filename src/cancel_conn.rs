//! The object behind `PGcancelConn`: it drives one machine over one link, a step at a time
//! (poll) or to the end (blocking), as often as it is reset. Where it stops between two polls,
//! what its message says at each moment and when its socket closes are libpq 18's.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use crate::cipher::Cipher;
use crate::error::{Error, ErrorMessage};
use crate::gss::Gss;
use crate::link::{Link, READ_SIZE, Receipt, Step};
use crate::machine::{Event, Machine, Status, Turn, Want};
use crate::reserve;
use crate::signal_safe::mark;
use crate::socket::{Connecting, Direction, Socket, Waited};
use crate::target::{Protection, Target};
use crate::tls::Tls;
use crate::trace;

/// What the caller of a poll has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Polling {
    /// It has failed; the message says why.
    Failed,
    /// Wait until the socket can be read, then poll again.
    Reading,
    /// Wait until the socket can be written, then poll again.
    Writing,
    /// The request is delivered.
    Ok,
}

impl From<Direction> for Polling {
    fn from(direction: Direction) -> Polling {
        match direction {
            Direction::Reading => Polling::Reading,
            Direction::Writing => Polling::Writing,
        }
    }
}

/// A cancel connection.
#[repr(C)]
pub struct CancelConn {
    /// Ours, where a libpq's own PGcancelConn has pointers.
    mark: u128,
    delivery: Option<Delivery>,
    /// What to say without a delivery: bad from the start, and "allocated" once it is reset, as
    /// in libpq; it still cannot be started.
    status_without: Status,
    message: ErrorMessage,
}

/// One session's cancel request and how far it has come.
struct Delivery {
    target: Arc<Target>,
    machine: Machine,
    link: Option<Link>,
    connecting: Connecting,
    /// What will encrypt, where that is made before the connection.
    cipher: Option<Box<dyn Cipher>>,
    /// How often memory had run short when the delivery began.
    shortages: usize,
}

impl CancelConn {
    /// A cancel connection for this target, or one that is bad from the start and says why.
    pub fn new(target: Result<Arc<Target>, Error>) -> CancelConn {
        let mut message = ErrorMessage::default();
        let delivery = match target {
            Ok(target) => Some(Delivery {
                machine: Machine::new(target.request.clone(), target.negotiation()),
                target,
                link: None,
                connecting: Connecting::InProgress,
                cipher: None,
                shortages: 0,
            }),
            Err(error) => {
                message.append_error(&error);
                None
            }
        };
        CancelConn { mark: mark(), delivery, status_without: Status::Bad, message }
    }

    /// Whether we made it: the first bytes of what is called a PGcancelConn tell.
    pub fn has_our_mark(first_bytes: u128) -> bool {
        first_bytes == mark()
    }

    /// Where it is.
    pub fn status(&self) -> Status {
        match &self.delivery {
            Some(delivery) => delivery.machine.status(),
            None => self.status_without,
        }
    }

    /// Its socket's descriptor, if it has one.
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        Some(self.delivery.as_ref()?.link.as_ref()?.socket().as_fd())
    }

    /// The latest message.
    pub fn message(&self) -> &ErrorMessage {
        &self.message
    }

    /// Begins to connect. False if that failed.
    pub fn start(&mut self) -> bool {
        match self.status() {
            Status::Bad => false,
            _ => self.try_start(&|| true).is_ok(),
        }
    }

    /// The same, with the reason; nothing of the request leaves without permit.
    pub fn try_start(&mut self, permit: &dyn Fn() -> bool) -> Result<(), Error> {
        if self.status() != Status::Allocated {
            self.fail(&Error::AlreadyStarted);
            return Err(Error::AlreadyStarted);
        }
        let Some(delivery) = &mut self.delivery else {
            self.status_without = Status::Bad;
            return Err(Error::InvalidState);
        };
        let started = delivery.start(&mut self.message, permit);
        self.trace(|| self.status().name().to_owned());
        started.inspect_err(|error| {
            self.fail(error);
            // The caller cannot have seen the socket yet.
            self.close();
        })
    }

    /// Goes on as far as it can without waiting.
    pub fn poll(&mut self) -> Polling {
        match self.status() {
            Status::Ok => Polling::Ok,
            Status::Bad => Polling::Failed,
            _ => self.try_poll(&|| true).unwrap_or(Polling::Failed),
        }
    }

    /// The same, with the reason; nothing of the request leaves without permit.
    pub fn try_poll(&mut self, permit: &dyn Fn() -> bool) -> Result<Polling, Error> {
        let before = self.status();
        let delivery = self.delivery.as_mut().ok_or(Error::InvalidState)?;
        let polling = delivery.advance(permit).inspect_err(|error| self.fail(error))?;
        if self.status() != before {
            self.trace(|| self.status().name().to_owned());
        }
        if polling == Polling::Ok {
            self.close();
            self.message.clear();
        }
        Ok(polling)
    }

    /// Whether the request has left, and only the server's answer to it is waited for.
    pub fn has_sent(&self) -> bool {
        self.delivery.as_ref().is_some_and(|delivery| {
            delivery.machine.status() == Status::AwaitingResponse
                && delivery.link.as_ref().is_some_and(Link::has_sent_all)
        })
    }

    /// Delivers the request, waiting as long as connect_timeout allows. False if that failed.
    pub fn run_blocking(&mut self) -> bool {
        if !self.start() {
            return false;
        }
        let deadline = match self.connect_timeout() {
            Ok(limit) => limit.map(|limit| Instant::now() + limit),
            Err(error) => {
                self.fail(&error);
                return false;
            }
        };
        let mut polling = match self.status() {
            Status::Started => Polling::Writing,
            _ => self.poll(), // it is connected already, as Unix sockets are
        };
        loop {
            let direction = match polling {
                Polling::Ok => return true,
                Polling::Failed => return false,
                Polling::Reading => Direction::Reading,
                Polling::Writing => Direction::Writing,
            };
            if let Err(error) = self.wait_blocking(direction, deadline) {
                self.fail(&error);
                return false;
            }
            let before = self.status();
            polling = self.poll();
            // Where it has only stopped to let its status be seen, nothing has to be waited for.
            if polling == Polling::Writing && self.status() != before {
                polling = self.poll();
            }
        }
    }

    fn connect_timeout(&self) -> Result<Option<std::time::Duration>, Error> {
        self.delivery.as_ref().map_or(Ok(None), |delivery| delivery.target.connect_timeout.limit())
    }

    /// A server that keeps the socket ready, byte by byte, gets no more time than a silent one.
    fn wait_blocking(&self, direction: Direction, deadline: Option<Instant>) -> Result<(), Error> {
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Err(Error::TimeoutExpired);
        }
        let link = self.delivery.as_ref().and_then(|delivery| delivery.link.as_ref());
        match link.ok_or(Error::InvalidState)?.socket().wait_blocking(direction, deadline)? {
            Waited::Ready => Ok(()),
            Waited::TimedOut => Err(Error::TimeoutExpired),
        }
    }

    /// Closes the connection and forgets what became of it; it may be started again.
    pub fn reset(&mut self) {
        self.close();
        self.message.clear();
        match &mut self.delivery {
            Some(delivery) => delivery.machine.reset(),
            None => self.status_without = Status::Allocated,
        }
    }

    /// Makes it bad, with a reason. The socket stays open for the caller to let go of, unless
    /// libpq would close it.
    pub fn fail(&mut self, error: &Error) {
        self.trace(|| format!("failed: {error}"));
        self.message.append_error(error);
        self.status_without = Status::Bad;
        if let Some(delivery) = &mut self.delivery {
            delivery.machine.fail();
            if error.closes_socket() {
                delivery.link = None;
            } else if let Some(link) = &mut delivery.link {
                link.close_cipher();
            }
        }
    }

    /// Makes it bad, with a reason unless it has one already.
    pub fn fail_once(&mut self, error: &Error) {
        if self.status() != Status::Bad {
            self.fail(error);
        }
    }

    fn trace(&self, text: impl FnOnce() -> String) {
        let Some(delivery) = &self.delivery else {
            return;
        };
        trace::step(|| {
            let target = &delivery.target;
            let server = target.failure_prefix.trim_end_matches(" failed: ");
            format!("{server}, backend {}: {}", target.request.backend_pid(), text())
        });
    }

    fn close(&mut self) {
        if let Some(delivery) = &mut self.delivery {
            delivery.link = None;
            delivery.cipher = None;
        }
    }
}

impl Delivery {
    fn start(
        &mut self,
        message: &mut ErrorMessage,
        permit: &dyn Fn() -> bool,
    ) -> Result<(), Error> {
        self.shortages = reserve::shortages();
        let target = &self.target;
        self.cipher = match &target.protection {
            Protection::Gss(options) => Some(Box::new(Gss::new(options)?)),
            Protection::Tls(_) | Protection::Plaintext => None,
        };
        let opened = Socket::open(&target.address);
        message.append(&target.failure_prefix);
        let socket = opened?;
        if !target.address.is_local() {
            socket.set_tcp_options(&target.tcp)?;
        }
        self.connecting = socket.connect(&target.address)?;
        self.link = Some(Link::new(socket));
        self.machine.start();
        if self.connecting == Connecting::Finished {
            self.advance(permit)?;
        }
        Ok(())
    }

    /// Brings about what the machine wants until it yields or the socket has to be waited for.
    fn advance(&mut self, permit: &dyn Fn() -> bool) -> Result<Polling, Error> {
        loop {
            let turn = match self.step(permit)? {
                Step::Done(turn) => turn,
                Step::Blocked(direction) => return Ok(direction.into()),
            };
            if turn == Turn::Yield {
                match self.machine.want() {
                    Want::Nothing => return Ok(Polling::Ok),
                    // What is buffered already would never make the socket readable.
                    Want::Receive if self.has_unread() => {}
                    Want::Receive => return Ok(Polling::Reading),
                    _ => return Ok(Polling::Writing),
                }
            }
        }
    }

    fn has_unread(&self) -> bool {
        self.link.as_ref().is_some_and(Link::has_unread)
    }

    /// One thing that the machine wants.
    fn step(&mut self, permit: &dyn Fn() -> bool) -> Result<Step<Turn>, Error> {
        let target = &self.target;
        let Some(link) = &mut self.link else {
            return Err(Error::InvalidState);
        };
        let event = match self.machine.want() {
            Want::Nothing => return Err(Error::InvalidState),
            Want::Connect => {
                if self.connecting == Connecting::InProgress {
                    link.socket().finish_connect(&target.address)?;
                }
                if let (true, Some(required)) = (target.address.is_local(), &target.requirepeer) {
                    link.socket().require_peer(required)?;
                }
                Event::Connected
            }
            // The call will be reported as failed, so nothing may go out any more.
            Want::Send(_) | Want::Request(_) if reserve::shortages() != self.shortages => {
                return Err(Error::OutOfMemory);
            }
            Want::Send(bytes) => match link.send(bytes, &|| true)? {
                Step::Done(()) => Event::Sent,
                Step::Blocked(direction) => return Ok(Step::Blocked(direction)),
            },
            Want::Request(request) => match link.send(request, permit)? {
                Step::Done(()) => Event::Sent,
                Step::Blocked(direction) => return Ok(Step::Blocked(direction)),
            },
            Want::Receive => return receive(link, &mut self.machine),
            Want::Handshake => match link.handshake(|| prepare(target, self.cipher.take()))? {
                Step::Done(()) => Event::HandshakeFinished,
                Step::Blocked(direction) => return Ok(Step::Blocked(direction)),
            },
        };
        self.machine.handle(event).map(Step::Done)
    }
}

fn receive(link: &mut Link, machine: &mut Machine) -> Result<Step<Turn>, Error> {
    let mut buffer = [0; READ_SIZE];
    let event = match link.receive(&mut buffer)? {
        Step::Done(Receipt::Bytes(length)) => {
            Event::Received(buffer.get(..length).unwrap_or_default())
        }
        Step::Done(Receipt::Closed) => Event::Closed,
        Step::Blocked(direction) => return Ok(Step::Blocked(direction)),
    };
    machine.handle(event).map(Step::Done)
}

/// What encrypts: made before the connection, or now, when libpq makes it.
fn prepare(target: &Target, made: Option<Box<dyn Cipher>>) -> Result<Box<dyn Cipher>, Error> {
    match (&target.protection, made) {
        (Protection::Tls(options), None) => {
            Ok(Box::new(Tls::new(options, target.host_name.as_deref())?))
        }
        (Protection::Gss(_), Some(gss)) => Ok(gss),
        _ => Err(Error::InvalidState),
    }
}

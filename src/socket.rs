//! The cancel connection's socket: non-blocking, close-on-exec, never raising SIGPIPE. System
//! calls go through the C library's functions, so that preloads such as torsocks still see them.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::{
    KeepAlive, PeerCredentials, SocketError, TcpKeepCount, TcpKeepIdle, TcpKeepInterval,
    TcpNoDelay, TcpUserTimeout,
};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SetSockOpt, SockFlag, SockType, SockaddrIn, SockaddrIn6, SockaddrLike,
    UnixAddr, connect, getsockopt, recv, send, setsockopt, socket,
};
use nix::unistd::{Uid, User};

use crate::address::Address;
use crate::error::Error;
use crate::params::TcpOptions;

/// What to wait for before a socket can be used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Until it can be read.
    Reading,
    /// Until it can be written.
    Writing,
}

/// How a wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waited {
    /// The socket is ready, or has an error to report.
    Ready,
    /// The deadline passed.
    TimedOut,
}

/// How a connect began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Connecting {
    /// It is already finished, as it is for Unix sockets.
    Finished,
    /// It goes on in the background; writable means finished.
    InProgress,
}

/// One socket, closed when dropped.
#[derive(Debug)]
pub struct Socket(OwnedFd);

impl Socket {
    /// Opens a socket of the address's family.
    pub fn open(address: &Address) -> Result<Socket, Error> {
        let family = match address {
            Address::V4(_) => AddressFamily::Inet,
            Address::V6(_) => AddressFamily::Inet6,
            Address::UnixPath(_) | Address::UnixAbstract(_) => AddressFamily::Unix,
        };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        socket(family, SockType::Stream, flags, None).map(Socket).map_err(Error::Socket)
    }

    /// Sets what libpq sets on a TCP socket before it connects.
    pub fn set_tcp_options(&self, options: &TcpOptions) -> Result<(), Error> {
        setsockopt(&self.0, TcpNoDelay, &true).map_err(Error::NoDelay)?;
        if options.keepalives.value()? == Some(0) {
            return Ok(()); // libpq then leaves tcp_user_timeout unset, too
        }
        self.set("SO_KEEPALIVE", KeepAlive, &true)?;
        if let Some(seconds) = options.idle.value()? {
            self.set("TCP_KEEPIDLE", TcpKeepIdle, &not_negative(seconds))?;
        }
        if let Some(seconds) = options.interval.value()? {
            self.set("TCP_KEEPINTVL", TcpKeepInterval, &not_negative(seconds))?;
        }
        if let Some(count) = options.count.value()? {
            self.set("TCP_KEEPCNT", TcpKeepCount, &not_negative(count))?;
        }
        if let Some(milliseconds) = options.user_timeout.value()? {
            self.set("TCP_USER_TIMEOUT", TcpUserTimeout, &not_negative(milliseconds))?;
        }
        Ok(())
    }

    fn set<O: SetSockOpt>(
        &self,
        option: &'static str,
        opt: O,
        value: &O::Val,
    ) -> Result<(), Error> {
        setsockopt(&self.0, opt, value).map_err(|errno| Error::SetSockOpt { option, errno })
    }

    /// Begins to connect.
    pub fn connect(&self, address: &Address) -> Result<Connecting, Error> {
        let result = match address {
            Address::V4(v4) => self.connect_to(&SockaddrIn::from(*v4)),
            Address::V6(v6) => self.connect_to(&SockaddrIn6::from(*v6)),
            Address::UnixPath(path) => {
                UnixAddr::new(path.as_slice()).and_then(|a| self.connect_to(&a))
            }
            Address::UnixAbstract(name) => {
                UnixAddr::new_abstract(name).and_then(|a| self.connect_to(&a))
            }
        };
        match result {
            Ok(()) => Ok(Connecting::Finished),
            Err(Errno::EINPROGRESS | Errno::EINTR) => Ok(Connecting::InProgress),
            Err(errno) => Err(Error::Connect { errno, local: address.is_local() }),
        }
    }

    fn connect_to(&self, address: &dyn SockaddrLike) -> Result<(), Errno> {
        connect(self.0.as_raw_fd(), address)
    }

    /// Tells how a connect in the background ended. One that has not ended counts as connected;
    /// the first use of the socket then finds that it has to wait.
    pub fn finish_connect(&self, address: &Address) -> Result<(), Error> {
        match getsockopt(&self.0, SocketError) {
            Ok(0) => Ok(()),
            Ok(errno) => {
                let errno = Errno::from_raw(errno);
                Err(Error::Connect { errno, local: address.is_local() })
            }
            Err(errno) => Err(Error::SocketStatus(errno)),
        }
    }

    /// Checks that the server at the other end of a Unix socket runs as this user.
    pub fn require_peer(&self, required: &[u8]) -> Result<(), Error> {
        let uid = getsockopt(&self.0, PeerCredentials).map_err(Error::PeerCredentials)?.uid();
        let user = User::from_uid(Uid::from_raw(uid)).ok().flatten().ok_or(Error::PeerUser(uid))?;
        if user.name.as_bytes() == required {
            return Ok(());
        }
        let required = String::from_utf8_lossy(required).into_owned();
        Err(Error::RequirePeer { required, actual: user.name })
    }

    /// Sends some bytes; `EAGAIN` when the socket has to be waited for.
    pub fn send(&self, bytes: &[u8]) -> Result<usize, Errno> {
        retry(|| send(self.0.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL))
    }

    /// Receives some bytes, none at the end; `EAGAIN` when the socket has to be waited for.
    pub fn receive(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        retry(|| recv(self.0.as_raw_fd(), buffer, MsgFlags::empty()))
    }

    /// Waits until the socket is ready or the deadline passes, with poll(2), so that descriptors
    /// of any size will do.
    pub fn wait_blocking(
        &self,
        direction: Direction,
        deadline: Option<Instant>,
    ) -> Result<Waited, Error> {
        let events = match direction {
            Direction::Reading => PollFlags::POLLIN,
            Direction::Writing => PollFlags::POLLOUT,
        };
        loop {
            let mut fds = [PollFd::new(self.0.as_fd(), events)];
            match poll(&mut fds, time_left(deadline)) {
                Ok(0) if deadline.is_none_or(|d| Instant::now() < d) => {}
                Ok(0) => return Ok(Waited::TimedOut),
                Ok(_) => return Ok(Waited::Ready),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(Error::Wait(errno)),
            }
        }
    }
}

impl AsFd for Socket {
    /// For whoever waits for it: the caller's event loop, or the courier's.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn not_negative(value: i32) -> u32 {
    u32::try_from(value).unwrap_or(0)
}

fn retry(mut call: impl FnMut() -> Result<usize, Errno>) -> Result<usize, Errno> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// Rounded up, so that a wait never ends early and turns into a busy loop.
fn time_left(deadline: Option<Instant>) -> PollTimeout {
    let Some(deadline) = deadline else {
        return PollTimeout::NONE;
    };
    let left = deadline.saturating_duration_since(Instant::now());
    let milliseconds = left.as_nanos().div_ceil(1_000_000);
    PollTimeout::try_from(milliseconds).unwrap_or(PollTimeout::MAX)
}

//! PQcancel of a session in plaintext: system calls, as in libpq. Reachable from a signal handler:
//! nothing here allocates, locks or panics.

#![allow(unsafe_code)]

use std::ffi::c_int;

use super::errno;
use super::words::Failure;
use crate::host_layout::{CancelBlock, SOCKADDR_SIZE, SocketOptions};
use crate::message::CancelRequest;

/// All that it takes to cancel a session in plaintext.
pub(crate) struct Plaintext {
    /// `struct sockaddr`, as long as it says.
    sockaddr: [u8; SOCKADDR_SIZE],
    sockaddr_length: u32,
    options: SocketOptions,
    request: CancelRequest,
}

impl Plaintext {
    /// To where a block of the host's says, and with its socket options. None if it does not say.
    pub(crate) fn new(block: &CancelBlock, request: CancelRequest) -> Option<Plaintext> {
        let address = block.sockaddr()?;
        let mut sockaddr = [0; SOCKADDR_SIZE];
        sockaddr.iter_mut().zip(address).for_each(|(to, from)| *to = *from);
        let sockaddr_length = u32::try_from(address.len()).ok()?;
        Some(Plaintext { sockaddr, sockaddr_length, options: block.socket_options(), request })
    }

    /// libpq's PQcancel; but never SIGPIPE, and no descriptor left to a program that is executed
    /// meanwhile.
    pub(super) fn deliver(&self) -> Result<(), Failure> {
        let family = self.sockaddr.first_chunk().copied().map_or(0, u16::from_ne_bytes);
        let socket = Socket::open(c_int::from(family))?;
        if c_int::from(family) != libc::AF_UNIX {
            socket.set_options(&self.options)?;
        }
        socket.connect(&self.sockaddr, self.sockaddr_length)?;
        socket.send(self.request.as_bytes())?;
        // Without waiting for the server to close, the cancel could hit the next query. What else
        // comes, and how it ends, does not matter, as in libpq.
        socket.receive_anything();
        Ok(())
    }
}

struct Socket(c_int);

impl Drop for Socket {
    fn drop(&mut self) {
        // SAFETY: the descriptor is ours and closed once.
        unsafe { libc::close(self.0) };
    }
}

impl Socket {
    fn open(family: c_int) -> Result<Socket, Failure> {
        // SAFETY: socket takes any numbers.
        match unsafe { libc::socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) } {
            -1 => Err(Failure::Errno(b"PQcancel() -- socket() failed: ", errno())),
            descriptor => Ok(Socket(descriptor)),
        }
    }

    fn set_options(&self, options: &SocketOptions) -> Result<(), Failure> {
        let tcp = libc::IPPROTO_TCP;
        let settings: [(c_int, c_int, c_int, &'static [u8]); 5] = [
            (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1, b"SO_KEEPALIVE"),
            (tcp, libc::TCP_KEEPIDLE, options.idle, b"TCP_KEEPIDLE"),
            (tcp, libc::TCP_KEEPINTVL, options.interval, b"TCP_KEEPINTVL"),
            (tcp, libc::TCP_KEEPCNT, options.count, b"TCP_KEEPCNT"),
            (tcp, libc::TCP_USER_TIMEOUT, options.user_timeout, b"TCP_USER_TIMEOUT"),
        ];
        for (level, option, value, name) in settings {
            if options.keepalives == 0 || value < 0 {
                continue;
            }
            let (pointer, length) = ((&raw const value).cast(), size_of::<c_int>() as u32);
            // SAFETY: the value is an int, as all of these options take.
            if unsafe { libc::setsockopt(self.0, level, option, pointer, length) } != 0 {
                return Err(Failure::Option(name, errno()));
            }
        }
        Ok(())
    }

    fn connect(&self, sockaddr: &[u8; SOCKADDR_SIZE], length: u32) -> Result<(), Failure> {
        // SAFETY: the address is at least this long.
        let result = unsafe { libc::connect(self.0, sockaddr.as_ptr().cast(), length) };
        let number = match errno() {
            _ if result == 0 => return Ok(()),
            // It goes on without us; to call connect again would be an error.
            libc::EINTR => self.end_of_connect(),
            number => number,
        };
        if number == 0 {
            return Ok(());
        }
        Err(Failure::Errno(b"PQcancel() -- connect() failed: ", number))
    }

    fn end_of_connect(&self) -> c_int {
        let mut fds = libc::pollfd { fd: self.0, events: libc::POLLOUT, revents: 0 };
        // SAFETY: one pollfd, as it says.
        while unsafe { libc::poll(&raw mut fds, 1, -1) } < 0 {
            if errno() != libc::EINTR {
                return errno();
            }
        }
        let (mut number, mut length) = (0, size_of::<c_int>() as u32);
        let pointer = (&raw mut number).cast();
        // SAFETY: the value is an int, as SO_ERROR gives.
        match unsafe {
            libc::getsockopt(self.0, libc::SOL_SOCKET, libc::SO_ERROR, pointer, &raw mut length)
        } {
            0 => number,
            _ => errno(),
        }
    }

    fn send(&self, mut bytes: &[u8]) -> Result<(), Failure> {
        while !bytes.is_empty() {
            // SAFETY: the bytes are readable.
            let sent = unsafe {
                libc::send(self.0, bytes.as_ptr().cast(), bytes.len(), libc::MSG_NOSIGNAL)
            };
            match usize::try_from(sent) {
                Ok(sent) => bytes = bytes.get(sent..).unwrap_or_default(),
                Err(_) if errno() == libc::EINTR => {}
                Err(_) => return Err(Failure::Errno(b"PQcancel() -- send() failed: ", errno())),
            }
        }
        Ok(())
    }

    fn receive_anything(&self) {
        let mut byte = 0_u8;
        // SAFETY: there is room for one byte.
        while unsafe { libc::recv(self.0, (&raw mut byte).cast(), 1, 0) } < 0
            && errno() == libc::EINTR
        {}
    }
}

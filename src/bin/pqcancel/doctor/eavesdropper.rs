//! Listens between us and the server, on the loopback address: so that we know what our cancels
//! show, and not only what they should. It decides what gets through, too: a cancel request that is
//! readable, of a session that is not, never leaves the machine.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use nix::sys::signal::SigSet;

use super::wire::{self, Request};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection that is over for its client is over here a moment later.
const PATIENCE: Duration = Duration::from_secs(2);
const BUFFER_SIZE: usize = 16 << 10;

/// What to do with connections that come.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// The session: passed on, and not recorded.
    Pass,
    /// A cancel: passed on and recorded. Where it must not be readable, that is as far as it gets.
    Record { readable_is_stopped: bool },
    /// A cancel: recorded, and answered here, as a server answers it: by closing.
    Answer,
}

pub(crate) struct Eavesdropper {
    pub(crate) port: u16,
    order: Arc<Mutex<Order>>,
    recorded: Receiver<Request>,
}

impl Eavesdropper {
    /// Its threads last as long as the process.
    pub(crate) fn listen(server: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = listener.local_addr()?.port();
        let order = Arc::new(Mutex::new(Order::Pass));
        let (sender, recorded) = channel();
        let orders = Arc::clone(&order);
        thread::Builder::new().spawn(move || {
            // Signals are for the thread that can put them off.
            let _ = SigSet::all().thread_block();
            for client in listener.incoming().flatten() {
                let (order, sender) = (current(&orders), sender.clone());
                // Where there is no thread for it, it is closed.
                let _ =
                    thread::Builder::new().spawn(move || serve(&client, server, order, &sender));
            }
        })?;
        Ok(Self { port, order, recorded })
    }

    /// For connections from now on.
    pub(crate) fn order(&self, order: Order) {
        *self.order.lock().unwrap_or_else(PoisonError::into_inner) = order;
    }

    /// What was read of the next cancel, which its client has done with.
    pub(crate) fn next(&self) -> Option<Request> {
        self.recorded.recv_timeout(PATIENCE).ok()
    }
}

fn current(order: &Mutex<Order>) -> Order {
    *order.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An error ends the connection: its client sees that, and tells.
fn serve(client: &TcpStream, server: SocketAddr, order: Order, sender: &Sender<Request>) {
    match order {
        Order::Pass => drop(relay(client, server, &mut |_| true)),
        Order::Answer => {
            let mut sent = Vec::new();
            let is_whole = |sent: &[u8]| match wire::read(sent, &[]) {
                Request::Readable { length, .. } => sent.len() >= length as usize,
                _ => false,
            };
            let _ = copy(client, &mut io::sink(), &mut |bytes| {
                sent.extend_from_slice(bytes);
                !is_whole(&sent)
            });
            let _ = client.shutdown(Shutdown::Both);
            let _ = sender.send(wire::read(&sent, &[]));
        }
        Order::Record { readable_is_stopped } => {
            let mut sent = Vec::new();
            let received = relay(client, server, &mut |bytes| {
                sent.extend_from_slice(bytes);
                !(readable_is_stopped && wire::is_readable(&sent))
            });
            let _ = sender.send(wire::read(&sent, &received.unwrap_or_default()));
        }
    }
}

/// Passes bytes both ways until either side closes; returns what the server sent. What the client
/// sends must be permitted first.
fn relay(
    client: &TcpStream,
    server: SocketAddr,
    permits: &mut dyn FnMut(&[u8]) -> bool,
) -> io::Result<Vec<u8>> {
    let upstream = TcpStream::connect_timeout(&server, CONNECT_TIMEOUT)?;
    for stream in [client, &upstream] {
        stream.set_nodelay(true)?; // as PostgreSQL and libpq do
    }
    thread::scope(|scope| {
        let answers = scope.spawn(|| {
            let mut received = Vec::new();
            let _ = copy(&upstream, &mut &*client, &mut |bytes| {
                let room = BUFFER_SIZE.saturating_sub(received.len());
                received.extend(bytes.iter().take(room)); // enough for what is read of a handshake
                true
            });
            let _ = client.shutdown(Shutdown::Both);
            received
        });
        let _ = copy(client, &mut &upstream, permits);
        let _ = upstream.shutdown(Shutdown::Both);
        Ok(answers.join().unwrap_or_default())
    })
}

fn copy(
    from: &TcpStream,
    to: &mut dyn Write,
    permits: &mut dyn FnMut(&[u8]) -> bool,
) -> io::Result<()> {
    let (mut from, mut buffer) = (from, [0; BUFFER_SIZE]);
    loop {
        let length = match from.read(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            other => other?,
        };
        let bytes = buffer.get(..length).unwrap_or_default();
        if bytes.is_empty() || !permits(bytes) {
            return Ok(());
        }
        to.write_all(bytes)?;
    }
}

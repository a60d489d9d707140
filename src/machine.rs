//! The protocol of a cancel connection as a state machine. It does no I/O, knows no clock and no
//! OpenSSL: it says what it wants next, and is told what happened. One driver
//! (`cancel_conn.rs`) brings about what it wants; tests and fuzzing drive it without sockets.
//!
//! Its one duty above all: the request is wanted on the wire only in state `Sending`, and for a
//! protected session the only way into `Sending` is a finished handshake.

use crate::error::Error;
use crate::message::{CancelRequest, SSL_REQUEST, SslReply};
use crate::params::SslNegotiation;

/// What the machine wants its driver to bring about.
#[derive(Debug, PartialEq, Eq)]
pub enum Want<'a> {
    /// The socket's connect to finish: then [`Event::Connected`].
    Connect,
    /// All of these bytes to be sent (through TLS once it is established): then [`Event::Sent`].
    Send(&'a [u8]),
    /// Bytes from the server, or its close: then [`Event::Received`] or [`Event::Closed`].
    Receive,
    /// The TLS handshake, with the server verified: then [`Event::HandshakeFinished`].
    Handshake,
    /// Nothing: it is not started, done, or failed.
    Nothing,
}

/// What the driver saw happen.
#[derive(Debug, Clone, Copy)]
pub enum Event<'a> {
    /// The socket is connected.
    Connected,
    /// The bytes of [`Want::Send`] are all sent.
    Sent,
    /// The server sent these bytes (decrypted, once TLS is established).
    Received(&'a [u8]),
    /// The server closed the connection in good order.
    Closed,
    /// TLS is established and the server is who it should be.
    HandshakeFinished,
}

/// Whether the driver returns to its caller after an event, or goes on at once. The points of
/// return are libpq's, because a caller sees them as statuses between two polls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Return to the caller, who waits for what the machine wants next.
    Yield,
    /// Do what the machine wants next, now.
    Continue,
}

/// Where the cancel connection is, as its caller may know it (`ConnStatusType`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Created, not started.
    Allocated,
    /// Waiting for the connection to be made.
    Started,
    /// Connected (and protected, where the session is); about to send.
    Made,
    /// Establishing TLS.
    SslStartup,
    /// The request is sent; waiting for the server to close.
    AwaitingResponse,
    /// The request is delivered.
    Ok,
    /// Failed.
    Bad,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Allocated,
    Connecting,
    /// About to ask for TLS; direct negotiation asks by sending nothing.
    Negotiating(SslNegotiation),
    AwaitingReply,
    /// `injected`: bytes came with the server's 'S', before anything was encrypted. As in libpq
    /// the handshake is still completed, and then the connection refused (CVE-2021-23222).
    Handshaking {
        injected: bool,
    },
    Sending,
    AwaitingClose,
    Done,
    Failed,
}

/// One cancel connection's protocol state.
#[derive(Debug)]
pub struct Machine {
    state: State,
    /// How TLS is asked for; `None` for a session that runs in plaintext.
    negotiation: Option<SslNegotiation>,
    request: CancelRequest,
}

impl Machine {
    /// A machine that will deliver `request`, over TLS unless `negotiation` is `None`.
    pub fn new(request: CancelRequest, negotiation: Option<SslNegotiation>) -> Machine {
        Machine { state: State::Allocated, negotiation, request }
    }

    /// Begins a delivery: the driver has a socket that is connecting.
    pub fn start(&mut self) {
        self.state = State::Connecting;
    }

    /// Forgets a delivery, whatever became of it.
    pub fn reset(&mut self) {
        self.state = State::Allocated;
    }

    /// Records a failure that the driver met. Nothing is wanted any more.
    pub fn fail(&mut self) {
        self.state = State::Failed;
    }

    /// What the caller may know.
    pub fn status(&self) -> Status {
        match self.state {
            State::Allocated => Status::Allocated,
            State::Connecting => Status::Started,
            State::Negotiating(_) | State::Sending => Status::Made,
            State::AwaitingReply | State::Handshaking { .. } => Status::SslStartup,
            State::AwaitingClose => Status::AwaitingResponse,
            State::Done => Status::Ok,
            State::Failed => Status::Bad,
        }
    }

    /// What the driver must bring about next.
    pub fn want(&self) -> Want<'_> {
        match self.state {
            State::Connecting => Want::Connect,
            State::Negotiating(SslNegotiation::Postgres) => Want::Send(&SSL_REQUEST),
            State::Negotiating(SslNegotiation::Direct) => Want::Send(&[]),
            State::AwaitingReply | State::AwaitingClose => Want::Receive,
            State::Handshaking { .. } => Want::Handshake,
            State::Sending => Want::Send(self.request.as_bytes()),
            State::Allocated | State::Done | State::Failed => Want::Nothing,
        }
    }

    /// Takes in what happened. After an error the machine has failed.
    pub fn handle(&mut self, event: Event<'_>) -> Result<Turn, Error> {
        match self.transition(event) {
            Ok((state, turn)) => {
                self.state = state;
                Ok(turn)
            }
            Err(error) => {
                self.state = State::Failed;
                Err(error)
            }
        }
    }

    fn transition(&self, event: Event<'_>) -> Result<(State, Turn), Error> {
        use Turn::{Continue, Yield};
        match (self.state, event) {
            (State::Connecting, Event::Connected) => match self.negotiation {
                None => Ok((State::Sending, Yield)),
                Some(negotiation) => Ok((State::Negotiating(negotiation), Yield)),
            },
            (State::Negotiating(SslNegotiation::Postgres), Event::Sent) => {
                Ok((State::AwaitingReply, Yield))
            }
            (State::Negotiating(SslNegotiation::Direct), Event::Sent) => {
                Ok((State::Handshaking { injected: false }, Yield))
            }
            (State::AwaitingReply, Event::Received(bytes)) => {
                Ok((reply_to_ssl_request(bytes)?, Continue))
            }
            (State::AwaitingReply, Event::Closed) => Err(Error::ServerClosed),
            (State::Handshaking { injected: false }, Event::HandshakeFinished) => {
                Ok((State::Sending, Yield))
            }
            (State::Handshaking { injected: true }, Event::HandshakeFinished) => {
                Err(Error::UnencryptedData)
            }
            (State::Sending, Event::Sent) => Ok((State::AwaitingClose, Yield)),
            (State::AwaitingClose, Event::Received([])) => Ok((State::AwaitingClose, Yield)),
            (State::AwaitingClose, Event::Received(_)) => Err(Error::UnexpectedResponse),
            (State::AwaitingClose, Event::Closed) => Ok((State::Done, Yield)),
            _ => Err(Error::InvalidState),
        }
    }
}

fn reply_to_ssl_request(bytes: &[u8]) -> Result<State, Error> {
    let Some((&first, rest)) = bytes.split_first() else {
        return Ok(State::AwaitingReply);
    };
    match SslReply::from(first) {
        SslReply::Accepted => Ok(State::Handshaking { injected: !rest.is_empty() }),
        SslReply::Refused => Err(Error::SslRefused),
        SslReply::Error => Err(Error::SslServerError),
        SslReply::Unknown(byte) => Err(Error::SslInvalidReply(byte)),
    }
}

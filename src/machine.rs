//! The protocol of a cancel connection as a state machine. It does no I/O, knows no clock, no
//! OpenSSL and no GSSAPI: it says what it wants next, and is told what happened. One driver
//! (`cancel_conn.rs`) brings about what it wants; tests and fuzzing drive it without sockets.
//!
//! Its one duty above all: the request is wanted on the wire only in state `Sending`, and for a
//! protected session the only way into `Sending` is a finished handshake.

use crate::error::Error;
use crate::message::{CancelRequest, Encryption, Reply};

/// What the machine wants its driver to bring about.
#[derive(Debug, PartialEq, Eq)]
pub enum Want<'a> {
    /// The socket's connect to finish: then [`Event::Connected`].
    Connect,
    /// All of these bytes to be sent, in the clear: then [`Event::Sent`].
    Send(&'a [u8]),
    /// The CancelRequest to be sent, encrypted where the session is protected: then
    /// [`Event::Sent`].
    Request(&'a [u8]),
    /// Bytes from the server, or its close: then [`Event::Received`] or [`Event::Closed`].
    Receive,
    /// The handshake of TLS or GSSAPI, with the server verified: then
    /// [`Event::HandshakeFinished`].
    Handshake,
    /// Nothing: it is not started, done, or failed.
    Nothing,
}

/// What the driver saw happen.
#[derive(Debug, Clone, Copy)]
pub enum Event<'a> {
    /// The socket is connected.
    Connected,
    /// The bytes of [`Want::Send`] or [`Want::Request`] are all sent.
    Sent,
    /// The server sent these bytes (decrypted, once the connection is protected).
    Received(&'a [u8]),
    /// The server closed the connection in good order.
    Closed,
    /// The connection is protected and the server is who it should be.
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
    /// Establishing GSSAPI encryption.
    GssStartup,
    /// The request is sent; waiting for the server to close.
    AwaitingResponse,
    /// The request is delivered.
    Ok,
    /// Failed.
    Bad,
}

impl Status {
    /// Its name in libpq-fe.h.
    pub fn name(self) -> &'static str {
        match self {
            Status::Allocated => "CONNECTION_ALLOCATED",
            Status::Started => "CONNECTION_STARTED",
            Status::Made => "CONNECTION_MADE",
            Status::SslStartup => "CONNECTION_SSL_STARTUP",
            Status::GssStartup => "CONNECTION_GSS_STARTUP",
            Status::AwaitingResponse => "CONNECTION_AWAITING_RESPONSE",
            Status::Ok => "CONNECTION_OK",
            Status::Bad => "CONNECTION_BAD",
        }
    }
}

/// How a protected connection begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Negotiation {
    /// The server is asked first.
    Request(Encryption),
    /// TLS at once (`sslnegotiation=direct`).
    DirectSsl,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Allocated,
    Connecting,
    /// About to ask for encryption; direct negotiation asks by sending nothing.
    Negotiating(Negotiation),
    AwaitingReply(Encryption),
    /// `injected`: bytes came with the server's consent, before anything was encrypted. As in libpq
    /// the handshake is still completed, and then the connection refused (CVE-2021-23222).
    Handshaking {
        encryption: Encryption,
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
    /// `None` for a session that runs in plaintext.
    negotiation: Option<Negotiation>,
    request: CancelRequest,
}

impl Machine {
    /// A machine that will deliver `request`, encrypted unless `negotiation` is `None`.
    pub fn new(request: CancelRequest, negotiation: Option<Negotiation>) -> Machine {
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
            State::AwaitingReply(encryption) | State::Handshaking { encryption, .. } => {
                match encryption {
                    Encryption::Ssl => Status::SslStartup,
                    Encryption::Gss => Status::GssStartup,
                }
            }
            State::AwaitingClose => Status::AwaitingResponse,
            State::Done => Status::Ok,
            State::Failed => Status::Bad,
        }
    }

    /// What the driver must bring about next.
    pub fn want(&self) -> Want<'_> {
        match self.state {
            State::Connecting => Want::Connect,
            State::Negotiating(Negotiation::Request(encryption)) => {
                Want::Send(encryption.request())
            }
            State::Negotiating(Negotiation::DirectSsl) => Want::Send(&[]),
            State::AwaitingReply(_) | State::AwaitingClose => Want::Receive,
            State::Handshaking { .. } => Want::Handshake,
            State::Sending => Want::Request(self.request.as_bytes()),
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
            (State::Negotiating(Negotiation::Request(encryption)), Event::Sent) => {
                Ok((State::AwaitingReply(encryption), Yield))
            }
            (State::Negotiating(Negotiation::DirectSsl), Event::Sent) => {
                Ok((State::Handshaking { encryption: Encryption::Ssl, injected: false }, Yield))
            }
            (State::AwaitingReply(encryption), Event::Received(bytes)) => {
                Ok((reply_to_request(encryption, bytes)?, Continue))
            }
            (State::AwaitingReply(_), Event::Closed) => Err(Error::ServerClosed),
            (State::Handshaking { injected: false, .. }, Event::HandshakeFinished) => {
                Ok((State::Sending, Yield))
            }
            (State::Handshaking { encryption, injected: true }, Event::HandshakeFinished) => {
                Err(Error::UnencryptedData(encryption))
            }
            (State::Sending, Event::Sent) => Ok((State::AwaitingClose, Yield)),
            (State::AwaitingClose, Event::Received([])) => Ok((State::AwaitingClose, Yield)),
            (State::AwaitingClose, Event::Received(_)) => Err(Error::UnexpectedResponse),
            (State::AwaitingClose, Event::Closed) => Ok((State::Done, Yield)),
            _ => Err(Error::InvalidState),
        }
    }
}

fn reply_to_request(encryption: Encryption, bytes: &[u8]) -> Result<State, Error> {
    let Some((&first, rest)) = bytes.split_first() else {
        return Ok(State::AwaitingReply(encryption));
    };
    match encryption.reply(first) {
        Reply::Accepted => Ok(State::Handshaking { encryption, injected: !rest.is_empty() }),
        Reply::Refused => Err(Error::Refused(encryption)),
        Reply::Error => Err(Error::ServerError(encryption)),
        Reply::Unknown(byte) => Err(Error::InvalidReply(encryption, byte)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Event::{Closed, Connected, HandshakeFinished, Received, Sent};
    use Turn::{Continue, Yield};

    const KEY: &[u8] = b"\x11\x22\x33\x44";
    const SSL: Encryption = Encryption::Ssl;
    const GSS: Encryption = Encryption::Gss;
    const NEGOTIATIONS: [Option<Negotiation>; 4] = [
        None,
        Some(Negotiation::Request(SSL)),
        Some(Negotiation::Request(GSS)),
        Some(Negotiation::DirectSsl),
    ];
    const STATES: [State; 15] = [
        State::Allocated,
        State::Connecting,
        State::Negotiating(Negotiation::Request(SSL)),
        State::Negotiating(Negotiation::Request(GSS)),
        State::Negotiating(Negotiation::DirectSsl),
        State::AwaitingReply(SSL),
        State::AwaitingReply(GSS),
        State::Handshaking { encryption: SSL, injected: false },
        State::Handshaking { encryption: SSL, injected: true },
        State::Handshaking { encryption: GSS, injected: false },
        State::Handshaking { encryption: GSS, injected: true },
        State::Sending,
        State::AwaitingClose,
        State::Done,
        State::Failed,
    ];
    const EVENTS: [Event<'static>; 12] = [
        Connected,
        Sent,
        Received(b""),
        Received(b"S"),
        Received(b"G"),
        Received(b"N"),
        Received(b"E"),
        Received(b"?"),
        Received(b"Sx"),
        Received(b"Gx"),
        Closed,
        HandshakeFinished,
    ];

    fn machine(negotiation: Option<Negotiation>) -> Machine {
        Machine::new(CancelRequest::new(1, KEY).unwrap(), negotiation)
    }

    fn machine_in(state: State, negotiation: Option<Negotiation>) -> Machine {
        Machine { state, ..machine(negotiation) }
    }

    /// Everything a machine does; whatever is not here must not happen at all.
    fn expected(
        state: State,
        event: Event<'_>,
        negotiation: Option<Negotiation>,
    ) -> Result<(State, Turn), Error> {
        let handshaking = |encryption, injected| State::Handshaking { encryption, injected };
        match (state, event) {
            (State::Connecting, Connected) => {
                Ok((negotiation.map_or(State::Sending, State::Negotiating), Yield))
            }
            (State::Negotiating(Negotiation::Request(encryption)), Sent) => {
                Ok((State::AwaitingReply(encryption), Yield))
            }
            (State::Negotiating(Negotiation::DirectSsl), Sent) => {
                Ok((handshaking(SSL, false), Yield))
            }
            (State::AwaitingReply(encryption), Received(b"")) => {
                Ok((State::AwaitingReply(encryption), Continue))
            }
            (State::AwaitingReply(SSL), Received([b'S', rest @ ..])) => {
                Ok((handshaking(SSL, !rest.is_empty()), Continue))
            }
            (State::AwaitingReply(GSS), Received([b'G', rest @ ..])) => {
                Ok((handshaking(GSS, !rest.is_empty()), Continue))
            }
            (State::Handshaking { injected: false, .. }, HandshakeFinished) => {
                Ok((State::Sending, Yield))
            }
            (State::Sending, Sent) => Ok((State::AwaitingClose, Yield)),
            (State::AwaitingClose, Received(b"")) => Ok((State::AwaitingClose, Yield)),
            (State::AwaitingClose, Closed) => Ok((State::Done, Yield)),
            (State::AwaitingReply(asked), Received(b"N")) => Err(Error::Refused(asked)),
            (State::AwaitingReply(asked), Received(b"E")) => Err(Error::ServerError(asked)),
            (State::AwaitingReply(asked), Received([byte, ..])) => {
                Err(Error::InvalidReply(asked, *byte))
            }
            (State::AwaitingReply(_), Closed) => Err(Error::ServerClosed),
            (State::Handshaking { encryption, injected: true }, HandshakeFinished) => {
                Err(Error::UnencryptedData(encryption))
            }
            (State::AwaitingClose, Received(_)) => Err(Error::UnexpectedResponse),
            _ => Err(Error::InvalidState),
        }
    }

    #[test]
    fn every_event_at_every_state() {
        for negotiation in NEGOTIATIONS {
            for state in STATES {
                for event in EVENTS {
                    let mut machine = machine_in(state, negotiation);
                    let turn = machine.handle(event);
                    match expected(state, event, negotiation) {
                        Ok((next, expected_turn)) => {
                            assert_eq!(turn, Ok(expected_turn), "{state:?} {event:?}");
                            assert_eq!(machine.state, next, "{state:?} {event:?}");
                        }
                        Err(error) => {
                            assert_eq!(turn, Err(error), "{state:?} {event:?}");
                            assert_eq!(machine.state, State::Failed, "{state:?} {event:?}");
                        }
                    }
                }
            }
        }
    }

    /// Promise 2: whatever happens in whatever order, a protected session's request is wanted on
    /// the wire only when the handshake is finished and nothing was injected before it.
    #[test]
    fn no_order_of_events_sends_a_protected_request_in_the_clear() {
        fn explore(machine: &Machine, protected: bool, depth: usize, count: &mut usize) {
            let wants_request = match machine.want() {
                Want::Send(bytes) => bytes.ends_with(KEY),
                want => matches!(want, Want::Request(_)),
            };
            assert!(!wants_request || protected, "{machine:?}");
            *count += 1;
            if depth == 0 {
                return;
            }
            for event in EVENTS {
                let mut next = machine_in(machine.state, machine.negotiation);
                let injected = matches!(machine.state, State::Handshaking { injected: true, .. });
                let finished = matches!(event, HandshakeFinished)
                    && matches!(machine.want(), Want::Handshake)
                    && !injected;
                let _ = next.handle(event);
                explore(&next, protected || finished, depth - 1, count);
            }
        }
        for negotiation in NEGOTIATIONS.into_iter().filter(Option::is_some) {
            let mut count = 0;
            let mut machine = machine(negotiation);
            machine.start();
            explore(&machine, false, 5, &mut count);
            assert_eq!(count, 271_453); // 12^0 + ... + 12^5
        }
    }

    /// The server's side of a whole conversation, cut into pieces in every possible way: where the
    /// cuts are makes no difference, except that what comes in one piece with the 'S' is known to
    /// be injected. (What comes in a later piece is the handshake's to judge.)
    #[test]
    fn every_split_of_the_servers_bytes() {
        for reply in [&b"S"[..], b"Sx", b"Sxyz", b"N", b"Nx", b"Eerror", b"?", b"\0\0"] {
            for cut in 1..=reply.len() {
                let mut machine = machine_in(State::AwaitingReply(SSL), NEGOTIATIONS[1]);
                assert_eq!(machine.handle(Received(b"")), Ok(Continue));
                let result = machine.handle(Received(&reply[..cut]));
                let expected = match (reply[0], cut) {
                    (b'S', _) => Ok(State::Handshaking { encryption: SSL, injected: cut > 1 }),
                    (b'N', _) => Err(Error::Refused(SSL)),
                    (b'E', _) => Err(Error::ServerError(SSL)),
                    (byte, _) => Err(Error::InvalidReply(SSL, byte)),
                };
                match expected {
                    Ok(state) => assert_eq!((result, machine.state), (Ok(Continue), state)),
                    Err(error) => assert_eq!((result, machine.state), (Err(error), State::Failed)),
                }
            }
        }
        for answer in [&b"x"[..], b"xyz"] {
            for cut in 1..=answer.len() {
                let mut machine = machine_in(State::AwaitingClose, None);
                assert_eq!(
                    machine.handle(Received(&answer[..cut])),
                    Err(Error::UnexpectedResponse)
                );
            }
        }
    }

    #[test]
    fn the_request_goes_out_whole_and_only_in_sending() {
        for negotiation in NEGOTIATIONS {
            for state in STATES {
                let machine = machine_in(state, negotiation);
                let expected = match state {
                    State::Connecting => Want::Connect,
                    State::Negotiating(Negotiation::Request(SSL)) => {
                        Want::Send(b"\0\0\0\x08\x04\xd2\x16\x2f")
                    }
                    State::Negotiating(Negotiation::Request(GSS)) => {
                        Want::Send(b"\0\0\0\x08\x04\xd2\x16\x30")
                    }
                    State::Negotiating(Negotiation::DirectSsl) => Want::Send(b""),
                    State::AwaitingReply(_) | State::AwaitingClose => Want::Receive,
                    State::Handshaking { .. } => Want::Handshake,
                    State::Sending => {
                        Want::Request(b"\0\0\0\x10\x04\xd2\x16\x2e\0\0\0\x01\x11\x22\x33\x44")
                    }
                    State::Allocated | State::Done | State::Failed => Want::Nothing,
                };
                assert_eq!(machine.want(), expected, "{state:?}");
            }
        }
    }

    #[test]
    fn a_failure_of_the_driver_ends_it_in_every_state() {
        for state in STATES {
            let mut machine = machine_in(state, None);
            machine.fail();
            assert_eq!((machine.status(), machine.want()), (Status::Bad, Want::Nothing));
        }
    }

    #[test]
    fn statuses_are_libpqs_on_the_way_and_a_reset_begins_anew() {
        let conversations: [(_, &[Event<'_>], &[Status]); 4] = [
            (
                None,
                &[Connected, Sent, Closed],
                &[Status::Made, Status::AwaitingResponse, Status::Ok],
            ),
            (
                Some(Negotiation::Request(GSS)),
                &[Connected, Sent, Received(b"G"), HandshakeFinished, Sent, Closed],
                &[
                    Status::Made,
                    Status::GssStartup,
                    Status::GssStartup,
                    Status::Made,
                    Status::AwaitingResponse,
                    Status::Ok,
                ],
            ),
            (
                Some(Negotiation::Request(SSL)),
                &[Connected, Sent, Received(b"S"), HandshakeFinished, Sent, Closed],
                &[
                    Status::Made,
                    Status::SslStartup,
                    Status::SslStartup,
                    Status::Made,
                    Status::AwaitingResponse,
                    Status::Ok,
                ],
            ),
            (
                Some(Negotiation::DirectSsl),
                &[Connected, Sent, HandshakeFinished, Sent, Closed],
                &[
                    Status::Made,
                    Status::SslStartup,
                    Status::Made,
                    Status::AwaitingResponse,
                    Status::Ok,
                ],
            ),
        ];
        for (negotiation, events, statuses) in conversations {
            let mut machine = machine(negotiation);
            for given_up_after in 0..=events.len() {
                assert_eq!(machine.status(), Status::Allocated);
                machine.start();
                assert_eq!(machine.status(), Status::Started);
                for (event, status) in events.iter().zip(statuses).take(given_up_after) {
                    machine.handle(*event).unwrap();
                    assert_eq!(machine.status(), *status);
                }
                machine.reset();
            }
        }
    }
}

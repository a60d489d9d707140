//! A server that says anything, in any order: a protected request is never wanted on the wire
//! before the handshake is finished.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pqcancel::machine::{Event, Machine, Negotiation, Want};
use pqcancel::message::{CancelRequest, Encryption};

const KEY: &[u8] = b"\x11\x22\x33\x44";

fuzz_target!(|bytes: &[u8]| {
    let Some((&kind, mut rest)) = bytes.split_first() else { return };
    let negotiation = match kind % 4 {
        0 => None,
        1 => Some(Negotiation::Request(Encryption::Ssl)),
        2 => Some(Negotiation::Request(Encryption::Gss)),
        _ => Some(Negotiation::DirectSsl),
    };
    let Some(request) = CancelRequest::new(1, KEY) else { return };
    let mut machine = Machine::new(request, negotiation);
    machine.start();
    let mut protected = negotiation.is_none();
    while let Some((&code, after)) = rest.split_first() {
        let length = usize::from(code >> 3).min(after.len());
        let (data, after) = after.split_at(length);
        rest = after;
        let event = match code % 8 {
            0 => Event::Connected,
            1 => Event::Sent,
            2 => Event::Closed,
            3 => Event::HandshakeFinished,
            4 => {
                machine.reset();
                machine.start();
                protected = negotiation.is_none();
                continue;
            }
            _ => Event::Received(data),
        };
        protected |= matches!((event, machine.want()), (Event::HandshakeFinished, Want::Handshake));
        let _ = machine.handle(event);
        let wants_request = matches!(machine.want(), Want::Send(sent) | Want::Request(sent) if sent.ends_with(KEY));
        assert!(protected || !wants_request);
    }
});

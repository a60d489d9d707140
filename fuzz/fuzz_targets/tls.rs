//! A server that answers the ClientHello with anything, in any pieces: the client neither panics
//! nor takes it for a handshake.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pqcancel::params::{ConnInfo, TlsOptions};
use pqcancel::tls::Tls;

fuzz_target!(|bytes: &[u8]| {
    let mut conninfo = ConnInfo::default();
    conninfo.note(b"sslmode", b"require");
    conninfo.note(b"sslcertmode", b"disable");
    let Ok(options) = TlsOptions::parse(&conninfo, 18) else { return };
    let Ok(mut tls) = Tls::new(&options, Some("localhost")) else { return };
    let Some((&pieces, answer)) = bytes.split_first() else { return };
    for piece in answer.chunks(usize::from(pieces).max(1)) {
        match tls.handshake() {
            Ok(finished) => assert!(!finished),
            Err(_) => break,
        }
        let unsent = tls.unsent().len();
        tls.sent(unsent);
        tls.received(piece);
    }
    let _ = tls.decrypt(&mut [0; 64]);
    tls.shut_down();
});

//! What is weak, and what to do about it.

use super::examination::{Attempt, Examined};
use super::protection::{Encryption, Protection, Verified};
use super::query::{End, SLEEP_SECONDS};
use super::wire::Request;

/// How it stands; the exit status, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Verdict {
    /// The cancel works, and is protected as the session, whose server is verified or which stays
    /// on this machine.
    Good = 0,
    /// The cancel works, but something is weak.
    Weak = 1,
    /// No session, or no cancel.
    Failed = 2,
}

#[derive(Debug)]
pub(crate) struct Advice {
    pub(crate) verdict: Verdict,
    pub(crate) text: String,
}

impl Advice {
    fn new(verdict: Verdict, text: impl Into<String>) -> Self {
        Self { verdict, text: text.into() }
    }
}

/// The worst of it is the verdict on the whole.
pub(crate) fn advise(examined: &Examined) -> Vec<Advice> {
    let attempts = [("PQcancelPoll", Some(&examined.new)), ("PQcancel", examined.old.as_ref())];
    let mut all = Vec::new();
    for (function, attempt) in attempts {
        let Some(attempt) = attempt else { continue };
        all.extend(of_attempt(function, attempt, &examined.protection));
        if attempt.query_is_left {
            let left = format!(
                "The query could not be ended; it sleeps on, for {SLEEP_SECONDS} seconds at most."
            );
            all.push(Advice::new(Verdict::Failed, left));
        }
    }
    all.extend(of_session(&examined.protection));
    all.extend(of_legacy(examined));
    all
}

fn of_attempt(function: &str, attempt: &Attempt, protection: &Protection) -> Option<Advice> {
    let is_readable = matches!(attempt.wire, Some(Request::Readable { .. }));
    let failed = |text: String| Some(Advice::new(Verdict::Failed, text));
    match &attempt.cancelled.end {
        _ if is_readable && protection.is_encrypted() => None, // see of_legacy()
        End::Cancelled { .. } => None,
        End::NotDelivered(message) if message.contains("no cancellation key received") => failed(
            "The server has sent no cancel key, as some proxies do not (RDS Proxy, for one): over \
             this connection nobody can cancel. Connect past the proxy, or cancel with \
             pg_cancel_backend() from another session."
                .to_owned(),
        ),
        End::NotDelivered(message) => failed(format!("{function} has failed: {message}")),
        End::WentOn => {
            let within = if protection.is_encrypted() { " inside TLS or GSS" } else { "" };
            failed(format!(
                "The cancel request was taken, and the query went on: something between here and \
                 the server drops cancels{within} (pgcat drops those inside TLS). Connect past it, \
                 or cancel with pg_cancel_backend() from another session."
            ))
        }
        End::Otherwise(message) => failed(format!("The query ended by itself: {message}")),
        End::Interrupted => failed("Interrupted.".to_owned()),
    }
}

fn of_session(protection: &Protection) -> Option<Advice> {
    let sslmode = &protection.sslmode;
    match (&protection.encryption, protection.verified) {
        (Encryption::Gss, _) | (Encryption::Tls { .. }, Verified::ChainAndHostName) => None,
        (Encryption::Tls { .. }, Verified::Chain) => Some(Advice::new(
            Verdict::Good,
            "The server's certificate is verified, but not its host name: whoever else has one \
             from the same authority can pass for the server. sslmode=verify-full looks at both.",
        )),
        (Encryption::Tls { .. }, Verified::No) => Some(Advice::new(
            Verdict::Weak,
            format!(
                "sslmode={sslmode} without a root certificate does not verify the server: whoever \
                 sits in between can pass for it, and read session and cancel. Use \
                 sslmode=verify-full, with sslrootcert=FILE (or sslrootcert=system, from libpq 16 \
                 on, for a certificate that public authorities vouch for)."
            ),
        )),
        (Encryption::None, _) => of_plaintext(protection),
    }
}

fn of_plaintext(protection: &Protection) -> Option<Advice> {
    let offered = protection.tls_is_offered?;
    let way = if protection.route.is_local() {
        "The session, and its cancel with it, is in plaintext. It goes to this machine's loopback \
         address; if a tunnel begins there, the tunnel is all that protects it."
    } else {
        "The session, and its cancel with it, is in plaintext, and not to this machine's loopback \
         address: whoever listens on the way can read both, and cancel the session's queries."
    };
    let remedy = if offered {
        "The server offers TLS: use sslmode=verify-full."
    } else {
        "The server offers no TLS (\"ssl = on\" in postgresql.conf makes it); sslmode=verify-full \
         would insist on it."
    };
    let verdict = if protection.route.is_local() { Verdict::Good } else { Verdict::Weak };
    Some(Advice::new(verdict, format!("{way} {remedy}")))
}

fn of_legacy(examined: &Examined) -> Option<Advice> {
    let is_readable = |attempt: &Attempt| matches!(attempt.wire, Some(Request::Readable { .. }));
    let protection = &examined.protection;
    if !protection.is_encrypted() || !examined.new.cancelled.is_success() {
        return None;
    }
    match &examined.old {
        Some(old) if !is_readable(old) => None,
        _ => Some(Advice::new(
            Verdict::Weak,
            "PQCANCEL_LEGACY=plaintext is set: PQcancel, which psql and most programs call, sends \
             the cancel key of this encrypted session in plaintext. Unset it.",
        )),
    }
}

//! The examination: a session, opened as any program opens it; the same once more, past an
//! eavesdropper of our own; and real cancels in that one.

use std::env;
use std::ffi::{CStr, CString};
use std::time::Instant;

use super::eavesdropper::{Eavesdropper, Order};
use super::libpq::{Libpq, Session};
use super::pqcancel::Pqcancel;
use super::protection::{Encryption, Protection, Route};
use super::query::{Cancelled, End, Query};
use super::wire;

const NAME: &CStr = c"pqcancel doctor";
/// Where nobody has said how long a connection may take.
const CONNECT_TIMEOUT: &CStr = c"10";

/// What there is to say of a session.
pub(crate) struct Examined {
    pub(crate) server_version: String,
    pub(crate) host: String,
    pub(crate) port: String,
    pub(crate) protection: Protection,
    /// Why nobody could listen.
    pub(crate) unwatched: Option<String>,
    /// By libpq's own PQcancel. It is answered here, and cancels nothing.
    pub(crate) own: Option<Result<wire::Request, String>>,
    /// By PQcancelCreate, PQcancelStart and PQcancelPoll of pqcancel.
    pub(crate) new: Attempt,
    /// By PQcancel of pqcancel, as programs call it that have it preloaded. Not tried if `new` has
    /// failed.
    pub(crate) old: Option<Attempt>,
}

/// A cancel of a real query.
pub(crate) struct Attempt {
    pub(crate) cancelled: Cancelled,
    pub(crate) wire: Option<wire::Request>,
    /// The query could not be ended by other means, either.
    pub(crate) query_is_left: bool,
}

/// Options as PQconnectdbParams takes them, the later ones counting.
type Options<'o> = Vec<(&'o CStr, &'o CStr)>;

/// Fails if there is no session, with libpq's message.
pub(crate) fn examine(
    libpq: &Libpq,
    pqcancel: &Pqcancel,
    conninfo: Option<&CStr>,
) -> Result<Examined, String> {
    if let Some(conninfo) = conninfo.filter(|it| is_connection_string(it)) {
        libpq.check_conninfo(conninfo).map_err(|message| without_quotations(&message))?;
    }
    let options = options(conninfo);
    let direct = libpq.connect(&options)?;
    let protection = Protection::of(&direct, libpq.version());
    let server_version = direct.parameter(c"server_version").unwrap_or_default();
    let (host, port) = (direct.host(), direct.port());
    let (session, eavesdropper, unwatched) = match watch(libpq, &options, &direct, &protection) {
        Ok((watched, eavesdropper)) => (watched, Some(eavesdropper), None),
        Err(reason) => (direct, None, Some(reason)),
    };
    let patient = Patient {
        libpq,
        pqcancel,
        options,
        session,
        eavesdropper,
        is_encrypted: protection.is_encrypted(),
    };
    let own = patient.cancel_by_libpq();
    let new = patient.cancel_by_new_functions()?;
    let old = if new.cancelled.is_success() && patient.may_call_pqcancel() {
        Some(patient.cancel_by_old_functions()?)
    } else {
        None
    };
    Ok(Examined { server_version, host, port, protection, unwatched, own, new, old })
}

/// Whether libpq would parse it; anything else is the name of a database.
fn is_connection_string(conninfo: &CStr) -> bool {
    let bytes = conninfo.to_bytes();
    bytes.contains(&b'=')
        || ["postgres://", "postgresql://"].iter().any(|uri| bytes.starts_with(uri.as_bytes()))
}

/// libpq quotes what it cannot parse, which may hold a password, and that a quotation mark: nothing
/// from the first to the last is shown.
fn without_quotations(message: &str) -> String {
    let Some((before, quoted)) = message.split_once('"') else { return message.to_owned() };
    let after = quoted.rsplit_once('"').map_or("", |(_, after)| after);
    format!("{before}\"...\"{after}")
}

fn options(conninfo: Option<&CStr>) -> Options<'_> {
    let mut options: Options = vec![(c"fallback_application_name", NAME)];
    // A service may say it, too, and what is given here would outdo that.
    let has_service =
        conninfo.is_some_and(|it| it.to_bytes().windows(7).any(|word| word == b"service"));
    if !has_service
        && ["PGCONNECT_TIMEOUT", "PGSERVICE"].iter().all(|name| env::var_os(name).is_none())
    {
        options.push((c"connect_timeout", CONNECT_TIMEOUT));
    }
    options.extend(conninfo.map(|conninfo| (c"dbname", conninfo)));
    options
}

/// Opens the session once more, to the same server, through an eavesdropper.
fn watch<'l>(
    libpq: &'l Libpq,
    options: &Options,
    direct: &Session,
    protection: &Protection,
) -> Result<(Session<'l>, Eavesdropper), String> {
    let Route::Tcp(server) = protection.route else {
        return Err("a Unix socket leads through no network".to_owned());
    };
    let eavesdropper = Eavesdropper::listen(server).map_err(|error| crate::describe(&error))?;
    let port = CString::new(eavesdropper.port.to_string()).unwrap_or_default();
    let host = CString::new(direct.host()).unwrap_or_default();
    let mut options = options.clone();
    options.extend([(c"hostaddr", c"127.0.0.1"), (c"port", port.as_c_str())]);
    if direct.option(c"host").is_some() {
        options.push((c"host", &host)); // the one of several that was reached
    }
    // It may come from a file, which is searched by port.
    options.extend(direct.password().map(|password| (c"password", password)));
    // libpq says first which server that was; it would be our own port.
    let session = libpq.connect(&options).map_err(|message| {
        let reason =
            message.rsplit_once(" failed: ").map_or(message.as_str(), |(_, reason)| reason);
        format!("a second session failed: {reason}")
    })?;
    if Encryption::of(&session) != protection.encryption {
        return Err("a second session was not encrypted as the first".to_owned());
    }
    Ok((session, eavesdropper))
}

struct Patient<'p> {
    libpq: &'p Libpq,
    pqcancel: &'p Pqcancel,
    options: Options<'p>,
    session: Session<'p>,
    eavesdropper: Option<Eavesdropper>,
    is_encrypted: bool,
}

impl Patient<'_> {
    fn cancel_by_libpq(&self) -> Option<Result<wire::Request, String>> {
        let eavesdropper = self.eavesdropper.as_ref()?;
        eavesdropper.order(Order::Answer);
        let done = self.libpq.cancel(&self.session);
        Some(done.map(|()| eavesdropper.next().unwrap_or(wire::Request::Missing)))
    }

    fn cancel_by_new_functions(&self) -> Result<Attempt, String> {
        let began = Instant::now();
        let cancel = match self.pqcancel.create(&self.session) {
            Ok(cancel) => cancel,
            // No query is begun that cannot be cancelled.
            Err(message) => {
                let cancelled = Cancelled { end: End::NotDelivered(message), steps: Vec::new() };
                return Ok(Attempt { cancelled, wire: None, query_is_left: false });
            }
        };
        let made_in = began.elapsed();
        let (cancelled, query) = self.query()?.cancel(cancel, made_in);
        Ok(self.attempt(cancelled, self.overheard(), query))
    }

    fn cancel_by_old_functions(&self) -> Result<Attempt, String> {
        let mut overheard = None;
        let cancel = || self.pqcancel.cancel(&self.session);
        let (cancelled, query) = self.query()?.cancel_blocking(cancel, || {
            overheard = self.overheard();
            let is_readable = matches!(overheard, Some(wire::Request::Readable { .. }));
            if self.is_encrypted && is_readable {
                Err("readable, and not sent on".to_owned())
            } else {
                Ok(())
            }
        });
        Ok(self.attempt(cancelled, overheard, query))
    }

    /// Not where its request would be readable and nobody could stop it.
    fn may_call_pqcancel(&self) -> bool {
        self.eavesdropper.is_some() || !self.is_encrypted || !pqcancel_is_plaintext()
    }

    fn query(&self) -> Result<Query<'_>, String> {
        if let Some(eavesdropper) = &self.eavesdropper {
            eavesdropper.order(Order::Record { readable_is_stopped: self.is_encrypted });
        }
        Query::start(&self.session)
    }

    fn overheard(&self) -> Option<wire::Request> {
        self.eavesdropper.as_ref()?.next()
    }

    fn attempt(
        &self,
        cancelled: Cancelled,
        wire: Option<wire::Request>,
        mut query: Query,
    ) -> Attempt {
        let query_is_left = !query.end(|| self.libpq.connect(&self.options));
        Attempt { cancelled, wire, query_is_left }
    }
}

/// Whether the environment asks for that.
pub(crate) fn pqcancel_is_plaintext() -> bool {
    env::var_os("PQCANCEL_LEGACY").is_some_and(|value| value == "plaintext")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_libpq_quotes_is_not_shown() {
        for (message, shown) in [
            (r#"missing "=" after "secret" in it"#, r#"missing "..." in it"#),
            (r#"invalid "se"cret" here"#, r#"invalid "..." here"#),
            (r#"broken "secret"#, r#"broken "...""#),
            ("unterminated quoted string", "unterminated quoted string"),
        ] {
            assert_eq!(without_quotations(message), shown);
        }
    }

    #[test]
    fn connection_strings_are_told_from_names_of_databases() {
        for string in [c"dbname=a", c"postgres://h", c"postgresql://h/a", c"="] {
            assert!(is_connection_string(string));
        }
        for name in [c"", c"a", c"postgres", c"http://h"] {
            assert!(!is_connection_string(name));
        }
    }
}

//! All that was found, and the same as JSON.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::advice::{Advice, Verdict, advise};
use super::examination::{Attempt, Examined};
use super::json::Value;
use super::libpq::Libpq;
use super::pqcancel::Pqcancel;
use super::protection::{Encryption, Protection, Route, Verified};
use super::query::{CANCELLED, End};
use super::wire::Request;

pub(crate) struct Findings {
    pub(crate) library: PathBuf,
    pub(crate) openssl: Option<String>,
    pub(crate) libpq: PathBuf,
    pub(crate) libpq_version: String,
    /// What there is to say of it, or why there is none.
    pub(crate) session: Result<Examined, String>,
    pub(crate) advice: Vec<Advice>,
}

impl Findings {
    pub(crate) fn new(
        libpq: &Libpq,
        pqcancel: &Pqcancel,
        library: PathBuf,
        session: Result<Examined, String>,
    ) -> Self {
        Self {
            openssl: pqcancel.shared_openssl.clone().or_else(|| private_openssl(&library)),
            library,
            libpq: libpq.path.clone(),
            libpq_version: version(libpq.version()),
            advice: session.as_ref().map(advise).unwrap_or_default(),
            session,
        }
    }

    pub(crate) fn verdict(&self) -> Verdict {
        match &self.session {
            Ok(_) => self.advice.iter().map(|advice| advice.verdict).max().unwrap_or(Verdict::Good),
            Err(_) => Verdict::Failed,
        }
    }

    pub(crate) fn to_json(&self) -> Value {
        let file = |path: &Path| Value::from(path.to_string_lossy().into_owned());
        let mut members = vec![
            (
                "pqcancel",
                Value::Object(vec![
                    ("version", env!("CARGO_PKG_VERSION").into()),
                    ("library", file(&self.library)),
                    ("openssl", self.openssl.clone().into()),
                ]),
            ),
            (
                "libpq",
                Value::Object(vec![
                    ("version", self.libpq_version.clone().into()),
                    ("library", file(&self.libpq)),
                ]),
            ),
        ];
        match &self.session {
            Ok(examined) => members.extend(examined.members()),
            Err(message) => members.push(("error", message.clone().into())),
        }
        members.push(("advice", Value::List(self.advice.iter().map(Advice::to_json).collect())));
        members.push(("status", f64::from(self.verdict() as u8).into()));
        Value::Object(members)
    }
}

/// As PQlibVersion has it.
fn version(number: i32) -> String {
    format!("{}.{}", number / 10_000, number % 10_000)
}

/// The text that every OpenSSL has inside.
fn private_openssl(library: &Path) -> Option<String> {
    let content = fs::read(library).ok()?;
    content.split(|byte| *byte == 0).find_map(|string| {
        let text = str::from_utf8(string).ok()?;
        let is_version = |rest: &str| {
            rest.starts_with(|c: char| c.is_ascii_digit())
                && rest.ends_with(|c: char| c.is_ascii_digit())
        };
        text.strip_prefix("OpenSSL ").filter(|rest| is_version(rest))?;
        Some(text.to_owned())
    })
}

impl Examined {
    fn members(&self) -> Vec<(&'static str, Value)> {
        let own = match &self.own {
            None => Value::Null,
            Some(Ok(request)) => Value::Object(vec![("wire", request.to_json())]),
            Some(Err(message)) => Value::Object(vec![("error", message.clone().into())]),
        };
        vec![
            (
                "server",
                Value::Object(vec![
                    ("version", self.server_version.clone().into()),
                    ("host", self.host.clone().into()),
                    ("port", self.port.clone().into()),
                    ("address", self.protection.route.address().into()),
                ]),
            ),
            ("session", self.protection.to_json()),
            ("unwatched", self.unwatched.clone().into()),
            (
                "cancels",
                Value::Object(vec![
                    ("libpq", own),
                    ("PQcancelPoll", self.new.to_json()),
                    ("PQcancel", self.old.as_ref().map_or(Value::Null, Attempt::to_json)),
                ]),
            ),
        ]
    }
}

impl Route {
    pub(crate) fn address(self) -> Option<String> {
        match self {
            Route::UnixSocket => None,
            Route::Tcp(address) => Some(address.ip().to_string()),
        }
    }
}

impl Verified {
    pub(crate) fn words(self) -> &'static str {
        match self {
            Verified::No => "not verified",
            Verified::Chain => "verified, but not its host name",
            Verified::ChainAndHostName => "verified, with its host name",
        }
    }
}

impl Protection {
    fn to_json(&self) -> Value {
        let (encryption, protocol, cipher) = match &self.encryption {
            Encryption::Tls { protocol, cipher } => {
                (Some("TLS"), Some(protocol.as_str()), Some(cipher.as_str()))
            }
            Encryption::Gss => (Some("GSS"), None, None),
            Encryption::None => (None, None, None),
        };
        let is_tls = encryption == Some("TLS");
        Value::Object(vec![
            (
                "transport",
                if self.route == Route::UnixSocket { "Unix socket" } else { "TCP" }.into(),
            ),
            ("encryption", encryption.into()),
            ("protocol", protocol.into()),
            ("cipher", cipher.into()),
            ("certificate", is_tls.then(|| self.verified.words()).into()),
            ("sslmode", self.sslmode.clone().into()),
            ("roots", self.roots.clone().into()),
            ("tls_is_offered", self.tls_is_offered.into()),
        ])
    }
}

impl Request {
    /// Without the key, which is not known here, either.
    fn to_json(&self) -> Value {
        let readable = matches!(self, Request::Readable { .. });
        let details = match self {
            Request::Readable { pid, key_length, .. } => {
                vec![("pid", f64::from(*pid).into()), ("key_bytes", (*key_length as f64).into())]
            }
            Request::Encrypted { by, body, .. } => {
                vec![("encryption", by.clone().into()), ("bytes", (body.len() as f64).into())]
            }
            Request::Missing => return Value::Null,
        };
        Value::Object([("readable", readable.into())].into_iter().chain(details).collect())
    }
}

impl Attempt {
    fn to_json(&self) -> Value {
        let steps = self.cancelled.steps.iter().map(|(name, at)| {
            Value::Object(vec![("step", (*name).into()), ("ms", milliseconds(*at).into())])
        });
        let (ended, message, after) = self.cancelled.end.parts();
        Value::Object(vec![
            ("wire", self.wire.as_ref().map_or(Value::Null, Request::to_json)),
            ("steps", Value::List(steps.collect())),
            ("query", ended.into()),
            ("sqlstate", self.cancelled.is_success().then_some(CANCELLED).into()),
            ("message", message.into()),
            ("ms", after.map(milliseconds).into()),
        ])
    }
}

impl End {
    /// What became of the query, the message, and when.
    pub(crate) fn parts(&self) -> (&'static str, Option<&str>, Option<Duration>) {
        match self {
            End::Cancelled { message, after } => ("cancelled", Some(message), Some(*after)),
            End::Otherwise(message) => ("ended by itself", Some(message), None),
            End::NotDelivered(message) => ("not cancelled", Some(message), None),
            End::WentOn => ("went on", None, None),
            End::Interrupted => ("interrupted", None, None),
        }
    }
}

impl Advice {
    fn to_json(&self) -> Value {
        let weight = match self.verdict {
            Verdict::Good => "remark",
            Verdict::Weak => "weak",
            Verdict::Failed => "failed",
        };
        Value::Object(vec![("weight", weight.into()), ("text", self.text.clone().into())])
    }
}

/// To a hundredth.
pub(crate) fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e5).round() / 1e2
}

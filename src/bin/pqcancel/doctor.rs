//! `pqcancel doctor [CONNINFO]`: what protects a session, what protects its cancel, and whether
//! that works. It opens a session as any program does, by the machine's libpq and with the user's
//! own settings; it prints no password and no cancel key, and leaves nothing running.

mod advice;
mod eavesdropper;
mod examination;
mod facts;
mod functions;
mod interrupt;
mod json;
mod libpq;
mod pqcancel;
mod protection;
mod query;
mod table;
mod wire;

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Write};
use std::mem::forget;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use crate::{Refusal, describe, library};
use advice::Verdict;
use facts::Findings;
use functions::c_string;
use libpq::Libpq;
use pqcancel::Pqcancel;

pub(crate) const HELP: &str = "\
usage: pqcancel doctor [--json] [--libpq=FILE] [CONNINFO]

Opens a session, cancels a query of its own in it, and shows what protects the
session and what protects the cancel: what libpq's own PQcancel would put on the
wire, and what goes there with pqcancel. No password and no cancel key is shown.

  CONNINFO        a connection string or URI, or the name of a database; what it
                  leaves out comes from the environment, as in psql
  --json          one JSON object instead of the table
  --libpq=FILE    the libpq to use; the dynamic loader's libpq.so.5 if not given

Environment:
  PQCANCEL_LIBPQ  as --libpq

Exit status: 0 if the cancel works and is protected as the session, and the
session's server is verified or the session stays on this machine; 1 if the
cancel works but something is weak; 2 if there is no session, or the cancel does
not work; 125 if the doctor itself has failed.
";

const LIBPQ: &str = "libpq.so.5";
const LIBPQ_VARIABLE: &str = "PQCANCEL_LIBPQ";

pub(crate) enum Request {
    Help,
    Examine(Options),
}

#[derive(Default)]
pub(crate) struct Options {
    json: bool,
    libpq: Option<OsString>,
    conninfo: Option<OsString>,
}

/// What follows `doctor`. No argument is quoted in an error: it may hold a password.
pub(crate) fn parse(mut arguments: impl Iterator<Item = OsString>) -> Result<Request, Refusal> {
    let mut options = Options::default();
    let mut operands = Vec::new();
    while let Some(argument) = arguments.next() {
        match crate::request::split(&argument) {
            (b"--help", None) => return Ok(Request::Help),
            (b"--json", None) => options.json = true,
            (b"--libpq", Some(file)) => options.libpq = Some(file.to_owned()),
            (b"--", None) => operands.extend(arguments.by_ref()),
            _ if crate::request::is_option(&argument) => {
                return Err(Refusal::refused("doctor: unknown option; see pqcancel doctor --help"));
            }
            _ => operands.push(argument),
        }
    }
    options.conninfo = operands.pop();
    if !operands.is_empty() {
        return Err(Refusal::refused(
            "doctor: more than one connection string (is it quoted as a whole?)",
        ));
    }
    Ok(Request::Examine(options))
}

/// Prints what was found; returns the exit status.
pub(crate) fn run(options: &Options) -> Result<Verdict, Refusal> {
    occupy_standard_descriptors().map_err(|error| Refusal::refused(describe(&error)))?;
    let findings = find(options).map_err(Refusal::refused)?;
    let page =
        if options.json { format!("{}\n", findings.to_json()) } else { table::page(&findings) };
    crate::print(&page)?;
    if let Err(message) = &findings.session {
        let _ = writeln!(io::stderr(), "pqcancel doctor: {message}");
    }
    Ok(findings.verdict())
}

fn find(options: &Options) -> Result<Findings, String> {
    let conninfo = options.conninfo.as_deref().map(c_string).transpose()?;
    let named = options
        .libpq
        .clone()
        .or_else(|| env::var_os(LIBPQ_VARIABLE).filter(|name| !name.is_empty()));
    let libpq =
        Libpq::open(PathBuf::from(named.as_deref().unwrap_or(OsStr::new(LIBPQ))).as_path())?;
    let library = library::find()?;
    let pqcancel = Pqcancel::open(&library)?;
    let session = examination::examine(&libpq, &pqcancel, conninfo.as_deref());
    Ok(Findings::new(&libpq, &pqcancel, library, session))
}

/// A socket that took the place of a closed standard descriptor would get what is printed there: by
/// us, by libpq (the server's notices) or by pqcancel (the trace).
fn occupy_standard_descriptors() -> io::Result<()> {
    loop {
        let file = File::open("/dev/null")?;
        if file.as_raw_fd() > 2 {
            return Ok(());
        }
        forget(file);
    }
}

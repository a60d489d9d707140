//! The command line: what it may say, and what it says.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use crate::Refusal;

pub(crate) const HELP: &str = "\
usage: pqcancel [--trace[=FILE]] [--] PROGRAM [ARGUMENT...]
       pqcancel --help | --version

Runs PROGRAM with every cancel request of its PostgreSQL sessions (Ctrl-C in
psql, for example) protected as the session is: encrypted where that is.

  --trace         show the steps of every cancel on standard error
  --trace=FILE    append them to FILE
  --version       show the version, and which library is used
  --help          show this text

What it cannot do:
  - setuid and setgid programs, programs with file capabilities, statically
    linked programs and those for another machine: refused, because the dynamic
    loader would not load the library into them. PROGRAM itself is checked, and
    the interpreter of a script, but not what they start in their turn.
  - programs that do not use the shared library libpq, or that look up its
    functions by themselves (dlopen and dlsym, Python's ctypes): they run as
    they do without pqcancel.

Environment of PROGRAM:
  LD_PRELOAD        begins with the library
  PQCANCEL_TRACE    stderr, or a file: as --trace
  PQCANCEL_TIMEOUT  how many seconds (1 to 3600) an encrypted cancel may take
                    if the session has no connect_timeout; 10 if unset
  PQCANCEL_LEGACY   plaintext: the old functions (PQcancel) are as libpq's, and
                    their cancels readable on the wire

Exit status: PROGRAM's; 125 if pqcancel refuses, 126 if PROGRAM cannot be
executed, 127 if it is not found.
";

const USAGE: &str = "usage: pqcancel [--trace[=FILE]] [--] PROGRAM [ARGUMENT...]";

/// What PQCANCEL_TRACE calls standard error. A file of this name is `./stderr`.
pub(crate) const STDERR: &str = "stderr";

pub(crate) enum Request {
    Help,
    Version,
    Run(Run),
}

pub(crate) struct Run {
    /// Where the trace goes, as given: STDERR or a file.
    pub(crate) trace: Option<OsString>,
    pub(crate) program: OsString,
    pub(crate) arguments: Vec<OsString>,
}

/// Options end at the first argument that is none, which is the program, or at `--`.
pub(crate) fn parse(mut arguments: impl Iterator<Item = OsString>) -> Result<Request, Refusal> {
    let mut trace = None;
    let program = loop {
        let Some(argument) = arguments.next() else { break None };
        match argument.as_bytes() {
            b"--help" => return Ok(Request::Help),
            b"--version" => return Ok(Request::Version),
            b"--trace" => trace = Some(STDERR.into()),
            [b'-', b'-', b't', b'r', b'a', b'c', b'e', b'=', file @ ..] if !file.is_empty() => {
                trace = Some(OsStr::from_bytes(file).to_owned());
            }
            b"--" => break arguments.next(),
            [b'-', _, ..] => {
                return Err(Refusal::refused(format_args!("unknown option {argument:?}; {USAGE}")));
            }
            _ => break Some(argument),
        }
    };
    match program {
        Some(program) => Ok(Request::Run(Run { trace, program, arguments: arguments.collect() })),
        None => Err(Refusal::refused(format_args!("no program is named; {USAGE}"))),
    }
}

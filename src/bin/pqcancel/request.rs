//! The command line: what it may say, and what it says.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use crate::{Refusal, doctor, dropin};

pub(crate) const HELP: &str = "\
usage: pqcancel [--trace[=FILE]] [--dlopen[=DIR]] [--] PROGRAM [ARGUMENT...]
       pqcancel doctor [--json] [--libpq=FILE] [CONNINFO]
       pqcancel --help | --version

Runs PROGRAM with every cancel request of its PostgreSQL sessions (Ctrl-C in
psql, for example) protected as the session is: encrypted where that is.

  --trace         show the steps of every cancel on standard error
  --trace=FILE    append them to FILE
  --dlopen        reach PROGRAM also if it opens libpq by itself and looks up the
                  functions there (dlopen and dlsym, Python's ctypes): it finds
                  a drop-in, which hands everything on, under libpq's name
  --dlopen=DIR    the same with the drop-in in DIR
  --version       show the version, and which library is used
  --help          show this text

`pqcancel doctor` opens a session and shows what protects it and its cancels,
see `pqcancel doctor --help`. (`pqcancel -- doctor` runs a program of that name.)

What it cannot do:
  - setuid and setgid programs, programs with file capabilities, statically
    linked programs and those for another machine: refused, because the dynamic
    loader would not load the library into them. PROGRAM itself is checked, and
    the interpreter of a script, but not what they start in their turn.
  - programs that do not use the shared library libpq, that open it by its path,
    or, without --dlopen, that open it by themselves: they run as they do
    without pqcancel.
  - with --dlopen, programs that bring a libpq of their own (in their DT_RUNPATH)
    use the drop-in's instead.

Environment of PROGRAM:
  LD_PRELOAD        begins with the library
  LD_LIBRARY_PATH   begins with the drop-in's directory if --dlopen is given
  PQCANCEL_TRACE    stderr, or a file: as --trace
  PQCANCEL_TIMEOUT  how many seconds (1 to 3600) an encrypted cancel may take
                    if the session has no connect_timeout; 10 if unset
  PQCANCEL_LEGACY   plaintext: the old functions (PQcancel) are as libpq's, and
                    their cancels readable on the wire

Exit status: PROGRAM's; 125 if pqcancel refuses, 126 if PROGRAM cannot be
executed, 127 if it is not found.
";

const USAGE: &str = "usage: pqcancel [--trace[=FILE]] [--dlopen[=DIR]] [--] PROGRAM [ARGUMENT...]";

/// What PQCANCEL_TRACE calls standard error. A file of this name is `./stderr`.
pub(crate) const STDERR: &str = "stderr";

/// As the first argument it is no program's name.
const DOCTOR: &str = "doctor";

pub(crate) enum Request {
    Help,
    Version,
    Doctor(doctor::Request),
    Run(Run),
}

pub(crate) struct Run {
    /// Where the trace goes, as given: STDERR or a file.
    pub(crate) trace: Option<OsString>,
    /// The drop-in, if one is asked for.
    pub(crate) dlopen: Option<dropin::Choice>,
    pub(crate) program: OsString,
    pub(crate) arguments: Vec<OsString>,
}

/// Options end at the first argument that is none, which is the program, or at `--`.
pub(crate) fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Request, Refusal> {
    let mut arguments = arguments.peekable();
    if arguments.next_if(|first| first == DOCTOR).is_some() {
        return doctor::parse(arguments).map(Request::Doctor);
    }
    let mut trace = None;
    let mut dlopen = None;
    let program = loop {
        let Some(argument) = arguments.next() else { break None };
        match split(&argument) {
            (b"--help", None) => return Ok(Request::Help),
            (b"--version", None) => return Ok(Request::Version),
            (b"--trace", None) => trace = Some(STDERR.into()),
            (b"--trace", Some(file)) => trace = Some(file.to_owned()),
            (b"--dlopen", None) => dlopen = Some(dropin::Choice::NearTheLibrary),
            (b"--dlopen", Some(directory)) => {
                dlopen = Some(dropin::Choice::In(directory.to_owned()));
            }
            (b"--", None) => break arguments.next(),
            _ if is_option(&argument) => {
                return Err(Refusal::refused(format_args!("unknown option {argument:?}; {USAGE}")));
            }
            _ => break Some(argument),
        }
    };
    match program {
        Some(program) => {
            Ok(Request::Run(Run { trace, dlopen, program, arguments: arguments.collect() }))
        }
        None => Err(Refusal::refused(format_args!("no program is named; {USAGE}"))),
    }
}

/// A lone dash is none.
pub(crate) fn is_option(argument: &OsStr) -> bool {
    matches!(argument.as_bytes(), [b'-', _, ..])
}

/// An option and its value; an empty value makes it an option that there is not.
pub(crate) fn split(argument: &OsStr) -> (&[u8], Option<&OsStr>) {
    let bytes = argument.as_bytes();
    match bytes.iter().position(|byte| *byte == b'=') {
        Some(at) if at + 1 < bytes.len() => {
            let (option, value) = bytes.split_at(at);
            (option, value.get(1..).map(OsStr::from_bytes))
        }
        _ => (bytes, None),
    }
}

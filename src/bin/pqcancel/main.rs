//! The command `pqcancel PROGRAM ARGUMENT...`: puts the library in front of LD_PRELOAD (and, where
//! that is asked for, the drop-in in front of LD_LIBRARY_PATH) and becomes the program. Where the
//! dynamic loader would ignore the library without a word, it says so and runs nothing. It knows
//! the library by name only: no code of it is in here. `pqcancel doctor` runs no program but
//! examines a session, see doctor.rs.
//!
//! The program gets everything as we got it. That is why `main` is C's: Rust's own would change
//! the action of SIGPIPE and open what is closed of the standard descriptors.

#![cfg_attr(not(test), no_main)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]

mod doctor;
mod dropin;
mod image;
mod library;
mod program;
mod request;

use std::convert::Infallible;
use std::env;
use std::ffi::{CString, OsStr, OsString, c_char, c_int};
use std::fmt::Display;
use std::io::{self, Write};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use nix::errno::Errno;
use nix::unistd::execvpe;
use rustix::fs::{Access, access};

use request::{Request, Run};

const PRELOAD: &str = "LD_PRELOAD";
const SEARCH_PATH: &str = "LD_LIBRARY_PATH";
const TRACE: &str = "PQCANCEL_TRACE";

/// Why no program runs: one line, and the exit status that env(1) and nohup(1) give for it.
struct Refusal {
    status: u8,
    reason: String,
}

impl Refusal {
    /// The command itself has failed, or will not do this.
    fn refused(reason: impl Display) -> Self {
        Self { status: 125, reason: reason.to_string() }
    }

    /// The program cannot be executed, or is not there.
    fn of_exec(program: &OsStr, error: &io::Error) -> Self {
        let status = if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 };
        Self { status, reason: format!("{program:?}: {}", describe(error)) }
    }
}

/// The system's own words, without the number that Rust adds.
fn describe(error: &io::Error) -> String {
    error.raw_os_error().map_or_else(|| error.to_string(), |e| Errno::from_raw(e).desc().into())
}

/// What the C library calls. (Rust's standard library finds the arguments without our help.)
#[allow(unsafe_code)] // to have a name that C knows
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn main(_argc: c_int, _argv: *const *const c_char) -> c_int {
    let done = request::parse(env::args_os().skip(1)).and_then(|request| match request {
        Request::Help => print(request::HELP).map(|()| 0),
        Request::Version => print(&version()).map(|()| 0),
        Request::Doctor(doctor::Request::Help) => print(doctor::HELP).map(|()| 0),
        Request::Doctor(doctor::Request::Examine(options)) => {
            doctor::run(&options).map(|verdict| verdict as c_int)
        }
        Request::Run(run) => become_program(run).map(|never| match never {}),
    });
    match done {
        Ok(status) => status,
        Err(Refusal { status, reason }) => {
            // With stderr gone, too, the status has to say it all.
            let _ = writeln!(io::stderr(), "pqcancel: {reason}");
            c_int::from(status)
        }
    }
}

/// Returns only where there is no program to become.
fn become_program(run: Run) -> Result<Infallible, Refusal> {
    let library = library::find().map_err(Refusal::refused)?;
    let preload = library::preload(&library, env::var_os(PRELOAD)).map_err(Refusal::refused)?;
    let path = program::find(&run.program).map_err(|e| Refusal::of_exec(&run.program, &e))?;
    program::check(&path).map_err(Refusal::refused)?;
    let mut changes = vec![(PRELOAD, preload)];
    if let Some(choice) = &run.dlopen {
        let path = dropin::search_path(choice, &library, env::var_os(SEARCH_PATH));
        changes.push((SEARCH_PATH, path.map_err(Refusal::refused)?));
    }
    if let Some(file) = &run.trace {
        changes.push((TRACE, trace_destination(file)?));
    }
    let failed = |errno: Errno| Refusal::of_exec(&run.program, &errno.into());
    let path = c_string(path.into_os_string()).map_err(failed)?;
    let words = [run.program.clone()].into_iter().chain(run.arguments);
    let words = words.map(c_string).collect::<Result<Vec<_>, _>>().map_err(failed)?;
    execvpe(&path, &words, &environment(&changes).map_err(failed)?).map_err(failed)
}

/// The environment as it is, but for some variables.
fn environment(changes: &[(&str, OsString)]) -> Result<Vec<CString>, Errno> {
    let is_kept = |name: &OsStr| changes.iter().all(|(changed, _)| name != *changed);
    let kept = env::vars_os().filter(|(name, _)| is_kept(name));
    let changed = changes.iter().map(|(name, value)| (OsString::from(name), value.clone()));
    kept.chain(changed)
        .map(|(mut variable, value)| {
            variable.push("=");
            variable.push(value);
            c_string(variable)
        })
        .collect()
}

fn c_string(text: OsString) -> Result<CString, Errno> {
    CString::new(text.into_vec()).map_err(|_| Errno::EINVAL)
}

/// Absolute, because the program may change its directory. A file that cannot be written is refused
/// now: the library would have nobody to tell.
fn trace_destination(file: &OsStr) -> Result<OsString, Refusal> {
    if file == request::STDERR {
        return Ok(file.to_owned());
    }
    let writable = std::path::absolute(file).and_then(|path| {
        let place = if path.exists() { &path } else { path.parent().unwrap_or(Path::new("/")) };
        access(place, Access::WRITE_OK)?;
        Ok(path.into_os_string())
    });
    writable.map_err(|e| Refusal::refused(format_args!("trace file {file:?}: {}", describe(&e))))
}

fn version() -> String {
    let library = match library::find() {
        Ok(path) => format!("library: {}", path.display()),
        Err(reason) => format!("no library: {reason}"),
    };
    format!("pqcancel {} ({library})\n", env!("CARGO_PKG_VERSION"))
}

fn print(text: &str) -> Result<(), Refusal> {
    let mut stdout = io::stdout();
    let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    written.map_err(|error| Refusal::refused(format_args!("stdout: {}", describe(&error))))
}

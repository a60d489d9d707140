//! The command `pqcancel PROGRAM ARGUMENT...`: puts the library in front of LD_PRELOAD and becomes
//! the program. Where the dynamic loader would ignore the library without a word, it says so and
//! runs nothing. It knows the library by name only: no code of it is in here.

#![forbid(unsafe_code)]

mod image;
mod library;
mod program;
mod request;

use std::env;
use std::ffi::{OsStr, OsString};
use std::fmt::Display;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use nix::errno::Errno;
use rustix::fs::{Access, access};

use request::{Request, Run};

const PRELOAD: &str = "LD_PRELOAD";
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

fn main() -> ExitCode {
    let done = request::parse(env::args_os().skip(1)).and_then(|request| match request {
        Request::Help => print(request::HELP),
        Request::Version => print(&version()),
        Request::Run(run) => Err(become_program(&run)),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(Refusal { status, reason }) => {
            // With stderr gone, too, the status has to say it all.
            let _ = writeln!(io::stderr(), "pqcancel: {reason}");
            ExitCode::from(status)
        }
    }
}

/// Returns only where there is no program to become.
fn become_program(run: &Run) -> Refusal {
    match prepare(run) {
        Ok(mut command) => Refusal::of_exec(&run.program, &command.exec()),
        Err(refusal) => refusal,
    }
}

fn prepare(run: &Run) -> Result<Command, Refusal> {
    let library = library::find().map_err(Refusal::refused)?;
    let preload = library::preload(&library, env::var_os(PRELOAD)).map_err(Refusal::refused)?;
    let path = program::find(&run.program).map_err(|e| Refusal::of_exec(&run.program, &e))?;
    program::check(&path).map_err(Refusal::refused)?;
    let mut command = Command::new(path);
    command.arg0(&run.program).args(&run.arguments).env(PRELOAD, preload);
    if let Some(file) = &run.trace {
        command.env(TRACE, trace_destination(file)?);
    }
    Ok(command)
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

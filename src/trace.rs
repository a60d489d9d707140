//! The trace (`PQCANCEL_TRACE`): one line a step with the time, so that a user sees what became of
//! a cancel. Never a key, never a password. Off, it costs a look at one variable.
//!
//! A line is written with one write(2), to a file opened for it: we hold no descriptor that the
//! program could close and use for something else.

use std::ffi::OsStr;
use std::path::absolute;

use crate::process::leak_c_string;
use crate::signal_safe::{self, Line};

/// From now on, steps are written to `stderr` or appended to this file.
pub(crate) fn begin(target: &OsStr) {
    if target == "stderr" {
        signal_safe::trace_to_stderr();
        return;
    }
    // The program may change its directory. An empty name is no file, and means no trace.
    let file = absolute(target).ok().and_then(|path| leak_c_string(path.as_os_str()));
    if let Some(file) = file {
        signal_safe::trace_to_file(file);
    }
}

/// Writes a step, if anyone wants to know.
pub(crate) fn step(text: impl FnOnce() -> String) {
    if signal_safe::is_traced() {
        Line::begin().text(text().trim_end().as_bytes()).end();
    }
}

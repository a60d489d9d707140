//! The drop-in (`dropin/libpq.c`): a directory with a libpq.so.5 that programs find in libpq's
//! place, also those that look its functions up by themselves.

use std::ffi::{OsStr, OsString};
use std::fs::metadata;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf, absolute};

use crate::{describe, library};

const LIBPQ: &str = "libpq.so.5";
/// In the drop-in's directory: a link to the libpq that it stands in front of.
const HOST: &str = "libpq-host.so.5";

/// Which one is meant.
pub(crate) enum Choice {
    NearTheLibrary,
    In(OsString),
}

/// The value of LD_LIBRARY_PATH that puts a drop-in's directory in front of what is there.
pub(crate) fn search_path(
    choice: &Choice,
    library: &Path,
    before: Option<OsString>,
) -> Result<OsString, String> {
    let directory = match choice {
        Choice::In(directory) => named(directory)?,
        Choice::NearTheLibrary => near(library)?,
    };
    // ld.so(8): colons and semicolons separate, and a dollar sign may begin a token to be replaced.
    if directory.as_os_str().as_bytes().iter().any(|byte| b":;$".contains(byte)) {
        let reason = "cannot be searched: it contains a colon, a semicolon or a dollar sign";
        return Err(format!("{directory:?} {reason}"));
    }
    let mut path = directory.clone().into_os_string();
    if let Some(before) = before.filter(|before| !before.is_empty()) {
        check_host(&directory, &before)?;
        path.push(":");
        path.push(before);
    }
    Ok(path)
}

/// Absolute, because the program may change its directory.
fn named(directory: &OsStr) -> Result<PathBuf, String> {
    let directory = absolute(directory).map_err(|e| format!("{directory:?}: {}", describe(&e)))?;
    match missing_from(&directory) {
        None => Ok(directory),
        Some(file) => Err(format!(
            "{directory:?} is no drop-in: {file:?} is missing, or no library for this machine"
        )),
    }
}

fn near(library: &Path) -> Result<PathBuf, String> {
    let beside = library.parent().map(Path::to_owned);
    beside
        .into_iter()
        .chain(library::places()?)
        .flat_map(|place| ["dlopen", "pqcancel/dlopen"].map(|name| place.join(name)))
        .find(|directory| missing_from(directory).is_none())
        .ok_or_else(|| format!("no drop-in (dlopen/{LIBPQ} with its {HOST}) is near {library:?}"))
}

/// Which of its files is not there; a dangling link is not, either.
fn missing_from(directory: &Path) -> Option<PathBuf> {
    [LIBPQ, HOST].map(|name| directory.join(name)).into_iter().find(|file| !library::is_one(file))
}

/// The program must not get another libpq than it would get without the drop-in.
fn check_host(directory: &Path, path: &OsStr) -> Result<(), String> {
    let host = directory.join(HOST);
    match first_libpq(path) {
        Some(other) if !is_same(&other, &host) => Err(format!(
            "LD_LIBRARY_PATH leads to {other:?}, and the drop-in to another libpq, {:?}; \
             use --dlopen=DIR with a drop-in for the former",
            host.canonicalize().unwrap_or(host)
        )),
        _ => Ok(()),
    }
}

/// The libpq that LD_LIBRARY_PATH leads to. (Entries with tokens, such as $ORIGIN, are passed over:
/// what they stand for is the loader's knowledge.)
fn first_libpq(path: &OsStr) -> Option<PathBuf> {
    path.as_bytes()
        .split(|byte| b":;".contains(byte))
        .map(|entry| Path::new(OsStr::from_bytes(entry))) // an empty one is the current directory
        .find(|entry| library::is_one(&entry.join(LIBPQ)))
        .map(|entry| [HOST, LIBPQ].map(|name| entry.join(name))) // it may be a drop-in, too
        .and_then(|files| files.into_iter().find(|file| library::is_one(file)))
}

fn is_same(one: &Path, other: &Path) -> bool {
    let identity = |file| metadata(file).map(|file| (file.dev(), file.ino())).ok();
    identity(one) == identity(other)
}

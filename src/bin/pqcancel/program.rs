//! The program: where it is, and whether the dynamic loader would load the library into it.

use std::env;
use std::ffi::OsStr;
use std::fs::metadata;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::unistd::{getegid, geteuid, getgid, getuid};
use rustix::fs::{Access, access, getxattr};
use rustix::io::Errno;

use crate::image::Image;

/// As execvp(3) where PATH is not set.
const DEFAULT_PATH: &str = "/bin:/usr/bin";

const SET_USER: u32 = 0o4000;
/// Without the group's right to execute, the set-group-ID bit means something else.
const SET_GROUP: u32 = 0o2010;

/// What ld.so(8) does in what it calls secure-execution mode.
const IGNORED: &str = "the dynamic loader would ignore the library";

/// A script's interpreter may be a script, this many times (binfmt_script in Linux).
const INTERPRETERS: usize = 5;

/// Searches PATH as execvp(3) does: what cannot be executed is passed over, and remembered.
pub(crate) fn find(name: &OsStr) -> io::Result<PathBuf> {
    if name.is_empty() || name.as_bytes().contains(&b'/') {
        return Ok(name.into());
    }
    let mut error = Errno::NOENT;
    let path = env::var_os("PATH").unwrap_or(DEFAULT_PATH.into());
    for directory in env::split_paths(&path) {
        // An empty entry, the current directory, leaves the name: exec searches again, as here.
        let candidate = directory.join(name);
        match metadata(&candidate) {
            Ok(found) if found.is_file() && access(&candidate, Access::EXEC_OK).is_ok() => {
                return Ok(candidate);
            }
            Err(missing) if missing.kind() != io::ErrorKind::PermissionDenied => {}
            _ => error = Errno::ACCESS,
        }
    }
    Err(error.into())
}

/// Fails with the reason why the dynamic loader would not load the library. Whatever cannot be
/// executed at all passes: exec has the right error for it.
pub(crate) fn check(program: &Path) -> Result<(), String> {
    if getuid() != geteuid() || getgid() != getegid() {
        return Err(format!("real and effective user or group differ: {IGNORED}"));
    }
    let mut file = program.to_owned();
    for _ in 0..INTERPRETERS {
        match Image::of(&file) {
            Image::Script { interpreter } => file = interpreter,
            image => return check_executable(&file, &image),
        }
    }
    Ok(())
}

/// Of a script only the interpreter's privileges count.
fn check_executable(file: &Path, image: &Image) -> Result<(), String> {
    let mode = metadata(file).map_or(0, |metadata| metadata.permissions().mode());
    let (what, why) = if mode & SET_USER == SET_USER {
        ("is setuid", IGNORED)
    } else if mode & SET_GROUP == SET_GROUP {
        ("is setgid", IGNORED)
    } else if getxattr(file, "security.capability", &mut [0; 0][..]).is_ok() {
        ("has file capabilities", IGNORED)
    } else if matches!(image, Image::Static) {
        ("is statically linked", "no dynamic loader would load the library")
    } else if matches!(image, Image::Foreign) {
        ("is for another kind of machine", "its dynamic loader could not load the library")
    } else {
        return Ok(());
    };
    Err(format!("{file:?} {what}: {why}"))
}

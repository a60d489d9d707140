//! Finding the library, and naming it to the dynamic loader.

use std::env;
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::image::Image;

const NAMES: [&str; 2] = ["libpqcancel.so.1", "libpqcancel.so"];

/// LIBDIR of the installation, where whoever built this has named it.
const BUILT_FOR: Option<&str> = option_env!("PQCANCEL_LIBDIR");

/// The library beside this command's real file, or where it was installed. One for another machine,
/// such as a 32-bit one in lib beside lib64, is passed over.
pub(crate) fn find() -> Result<PathBuf, String> {
    let [name, _] = NAMES;
    places()?
        .iter()
        .flat_map(|directory| NAMES.map(|name| directory.join(name)))
        .find(|path| is_one(path))
        .ok_or_else(|| {
            let command = env::current_exe().unwrap_or_default();
            format!("{name} is neither beside {command:?} nor where it was installed")
        })
}

/// The directories that may hold it.
pub(crate) fn places() -> Result<Vec<PathBuf>, String> {
    let command = env::current_exe().map_err(|error| format!("my own file: {error}"))?;
    Ok(directories(&command, BUILT_FOR))
}

/// Is this a file that the dynamic loader could load into programs of this machine?
pub(crate) fn is_one(path: &Path) -> bool {
    matches!(Image::of(path), Image::Static | Image::Dynamic)
}

fn directories(command: &Path, built_for: Option<&str>) -> Vec<PathBuf> {
    let beside = command.parent().unwrap_or(Path::new("/"));
    let prefix = beside.parent().unwrap_or(beside);
    let multiarch = format!("lib/{}-linux-gnu", env::consts::ARCH);
    let installed = ["lib", "lib64", &multiarch, "lib/pqcancel"].map(|place| prefix.join(place));
    [beside.to_owned()].into_iter().chain(installed).chain(built_for.map(PathBuf::from)).collect()
}

/// The value of LD_PRELOAD that puts the library in front of what is there.
pub(crate) fn preload(library: &Path, before: Option<OsString>) -> Result<OsString, String> {
    // ld.so(8): spaces and colons separate, and a dollar sign may begin a token to be replaced.
    if library.as_os_str().as_bytes().iter().any(|byte| b" :$".contains(byte)) {
        let reason = "cannot be preloaded: its path contains a space, a colon or a dollar sign";
        return Err(format!("{library:?} {reason}"));
    }
    let mut preload = library.as_os_str().to_owned();
    if let Some(before) = before.filter(|before| !before.is_empty()) {
        preload.push(":");
        preload.push(before);
    }
    Ok(preload)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beside_the_command_then_where_it_was_installed() {
        let found = directories(Path::new("/opt/bin/pqcancel"), Some("/srv/lib"));
        let multiarch = format!("/opt/lib/{}-linux-gnu", env::consts::ARCH);
        let expected =
            ["/opt/bin", "/opt/lib", "/opt/lib64", &multiarch, "/opt/lib/pqcancel", "/srv/lib"];
        assert_eq!(found, expected.map(PathBuf::from));
    }
}

//! The files that a TLS context was made from: whether it would be made the same today.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// File systems tell the time of a change this exactly at worst. What was changed less long ago may
/// have been changed again since, and look the same.
const COARSEST_TIME: Duration = Duration::from_secs(2);

/// The files, each as it was when it was noted.
#[derive(Default)]
pub(crate) struct TlsFiles {
    noted: Vec<(PathBuf, Option<Identity>)>,
    variables: Vec<(&'static str, Option<OsString>)>,
    hides_changes: bool,
}

/// Where a file is, and when it was written or its rights were changed.
#[derive(PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Identity {
    /// None where there is no such file, or it may not be looked at.
    fn of(path: &Path) -> Option<Identity> {
        let metadata = fs::metadata(path).ok()?;
        Some(Identity {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}

impl TlsFiles {
    /// Notes a file, also one that is not there. To be called before it is read.
    pub(crate) fn note(&mut self, path: &Path) {
        self.noted.push((path.to_owned(), Identity::of(path)));
    }

    /// Notes a variable of the environment that names files, and tells what it is.
    pub(crate) fn note_variable(&mut self, name: &'static str) -> Option<OsString> {
        let value = env::var_os(name);
        self.variables.push((name, value.clone()));
        value
    }

    /// Notes a directory in which OpenSSL finds things when it needs them, and then keeps them. Where
    /// there is nothing to find, nothing can be there before the directory changes. Tells whether there
    /// is something.
    pub(crate) fn note_directory(&mut self, path: &Path) -> bool {
        self.note(path);
        let is_hashed = is_hashed(path);
        self.hides_changes |= is_hashed;
        is_hashed
    }

    /// Notes a directory in which OpenSSL finds things that have other names; or a
    /// file that could not be loaded, perhaps for want of memory.
    pub(crate) fn note_what_hides_changes(&mut self) {
        self.hides_changes = true;
    }

    /// Whether all of them are as they were.
    pub(crate) fn are_unchanged(&self) -> bool {
        self.noted.iter().all(|(path, identity)| Identity::of(path) == *identity)
            && self.variables.iter().all(|(name, value)| env::var_os(name) == *value)
    }

    /// Whether a change would be seen.
    pub(crate) fn show_changes(&self) -> bool {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let settled = now.saturating_sub(COARSEST_TIME).as_secs().cast_signed();
        let is_settled =
            |identity: &Identity| identity.modified.0 < settled && identity.changed.0 < settled;
        !self.hides_changes
            && self.noted.iter().all(|(_, file)| file.as_ref().is_none_or(is_settled))
    }
}

/// Whether OpenSSL finds certificates in a directory: under the hash of their subject, a dot and a
/// number.
fn is_hashed(directory: &Path) -> bool {
    let is_hash = |name: &str| {
        let (hash, number) = name.split_once('.').unwrap_or((name, ""));
        hash.len() == 8
            && hash.bytes().all(|b| b.is_ascii_hexdigit())
            && number.parse::<u8>().is_ok()
    };
    fs::read_dir(directory).is_ok_and(|entries| {
        entries.flatten().any(|entry| entry.file_name().to_str().is_some_and(is_hash))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noted(path: &Path) -> TlsFiles {
        let mut files = TlsFiles::default();
        files.note(path);
        files
    }

    #[test]
    fn every_kind_of_change_is_seen() {
        let directory = std::env::temp_dir().join(format!("pqcancel-files-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let path = directory.join("root.crt");
        let absent = noted(&path);
        assert!(absent.are_unchanged() && absent.show_changes());
        fs::write(&path, "one").unwrap();
        assert!(!absent.are_unchanged());

        let written = noted(&path);
        assert!(written.are_unchanged());
        assert!(!written.show_changes(), "it was written just now");
        fs::write(directory.join("new"), "two").unwrap();
        fs::rename(directory.join("new"), &path).unwrap();
        assert!(!written.are_unchanged(), "another file in its place");

        let replaced = noted(&path);
        fs::write(&path, "three").unwrap();
        assert!(!replaced.are_unchanged(), "another size");
        fs::remove_dir_all(&directory).unwrap();
        assert!(!replaced.are_unchanged());
    }

    #[test]
    fn old_files_show_changes_and_directories_do_not() {
        let mut files = noted(Path::new("/"));
        files.note(Path::new("/proc/version"));
        let mut old = TlsFiles::default();
        old.note(Path::new("/usr"));
        assert!(old.show_changes());
        old.note_what_hides_changes();
        assert!(!old.show_changes());
    }

    #[test]
    fn a_directory_of_certificates_has_their_hashes_for_names() {
        let directory = std::env::temp_dir().join(format!("pqcancel-hash-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        for (name, counts) in [
            ("ca-bundle.crt", false),
            ("README.0", false),
            ("0a1b2c3d.r0", false),
            ("0a1b2c3d.0", true),
        ] {
            fs::write(directory.join(name), "").unwrap();
            assert_eq!(is_hashed(&directory), counts, "{name}");
        }
        fs::remove_dir_all(&directory).unwrap();
        assert!(!is_hashed(&directory));
    }
}

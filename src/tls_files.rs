//! The files that a TLS context was made from: whether it would be made the same today.

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

    /// Notes a directory in which OpenSSL finds things when it needs them, and then keeps them; or a
    /// file that could not be loaded, perhaps for want of memory.
    pub(crate) fn note_what_hides_changes(&mut self) {
        self.hides_changes = true;
    }

    /// Whether all of them are as they were.
    pub(crate) fn are_unchanged(&self) -> bool {
        self.noted.iter().all(|(path, identity)| Identity::of(path) == *identity)
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
}

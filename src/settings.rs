//! The environment variables: read once, at the first call that needs them, and not at all by a
//! program that runs with more rights than its user.
//!
//! | variable           | value                                                                  |
//! |--------------------|------------------------------------------------------------------------|
//! | `PQCANCEL_TRACE`   | `stderr`, or a file to append to                                       |
//! | `PQCANCEL_TIMEOUT` | how long PQcancel of an encrypted session may take where the session has no connect_timeout; whole seconds, 1 to 3600; 10 if unset |
//! | `PQCANCEL_LEGACY`  | `plaintext`: the old functions behave as libpq's                       |

use std::ffi::{OsStr, OsString};
use std::sync::OnceLock;
use std::time::Duration;

use crate::process::environment_variable;
use crate::trace;

const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
const MOST_SECONDS: u64 = 3600;

/// What the environment decides.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Settings {
    /// The bound of PQcancel where the session has none.
    pub(crate) timeout: Duration,
    /// Whether the old functions send the cancel of an encrypted session in plaintext.
    pub(crate) plaintext_legacy: bool,
}

/// What it has decided.
pub(crate) fn settings() -> &'static Settings {
    static SETTINGS: OnceLock<Settings> = OnceLock::new();
    SETTINGS.get_or_init(|| {
        if let Some(target) = environment_variable(c"PQCANCEL_TRACE") {
            trace::begin(&target);
        }
        let timeout = environment_variable(c"PQCANCEL_TIMEOUT");
        let legacy = environment_variable(c"PQCANCEL_LEGACY");
        let (settings, complaints) = Settings::parse(timeout, legacy);
        for complaint in complaints {
            trace::step(|| complaint);
        }
        settings
    })
}

impl Settings {
    /// An empty variable counts as unset; one that makes no sense does so, too, with a complaint.
    fn parse(timeout: Option<OsString>, legacy: Option<OsString>) -> (Settings, Vec<String>) {
        let mut settings = Settings { timeout: DEFAULT_TIMEOUT, plaintext_legacy: false };
        let mut complaints = Vec::new();
        if let Some(value) = timeout.filter(|value| !value.is_empty()) {
            match parse_seconds(&value) {
                Some(timeout) => settings.timeout = timeout,
                None => complaints.push(format!(
                    "PQCANCEL_TIMEOUT={} is ignored: not a whole number of seconds from 1 to {MOST_SECONDS}",
                    value.to_string_lossy()
                )),
            }
        }
        if let Some(value) = legacy.filter(|value| !value.is_empty()) {
            settings.plaintext_legacy = value == "plaintext";
            if !settings.plaintext_legacy {
                complaints.push(format!(
                    "PQCANCEL_LEGACY={} is ignored: the only value it has is plaintext",
                    value.to_string_lossy()
                ));
            }
        }
        (settings, complaints)
    }
}

fn parse_seconds(value: &OsStr) -> Option<Duration> {
    let digits = value.to_str().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()))?;
    let seconds: u64 = digits.parse().ok()?;
    (1..=MOST_SECONDS).contains(&seconds).then(|| Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(timeout: &str, legacy: &str) -> (Settings, Vec<String>) {
        Settings::parse(Some(timeout.into()), Some(legacy.into()))
    }

    #[test]
    fn unset_and_empty_are_the_defaults() {
        let defaults = Settings { timeout: Duration::from_secs(10), plaintext_legacy: false };
        assert_eq!(Settings::parse(None, None), (defaults, vec![]));
        assert_eq!(parse("", ""), Settings::parse(None, None));
    }

    #[test]
    fn good_values_are_taken() {
        let (settings, complaints) = parse("3600", "plaintext");
        let taken = Settings { timeout: Duration::from_secs(3600), plaintext_legacy: true };
        assert_eq!((settings, complaints.len()), (taken, 0));
    }

    #[test]
    fn bad_values_are_complained_of_and_ignored() {
        for timeout in ["0", "3601", "-1", "+5", "1.5", "soon", " 5", "99999999999999999999"] {
            let (settings, complaints) = parse(timeout, "PLAINTEXT");
            assert_eq!(settings, Settings::parse(None, None).0, "{timeout}");
            assert_eq!(complaints.len(), 2, "{timeout}");
        }
    }
}

//! The guard at the border to C and at the courier's: no panic leaves our code, and a shortage of
//! memory is an error like any other.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use crate::error::Error;
use crate::reserve;

/// Runs what may need memory; a panic or a shortage becomes an error.
pub(crate) fn attempt<T>(body: impl FnOnce() -> T) -> Result<T, Error> {
    let shortages = reserve::shortages();
    let result = catch(body)?;
    if reserve::shortages() == shortages { Ok(result) } else { Err(Error::OutOfMemory) }
}

/// Runs something; a panic becomes an error.
pub(crate) fn catch<T>(body: impl FnOnce() -> T) -> Result<T, Error> {
    keep_panics_quiet();
    catch_unwind(AssertUnwindSafe(body)).map_err(|payload| {
        // Dropping it could panic again.
        std::mem::forget(payload);
        Error::Panicked
    })
}

/// A guest does not print. The hook is that of our own copy of Rust's standard library; a host
/// written in Rust has another.
fn keep_panics_quiet() {
    static QUIET: Once = Once::new();
    if cfg!(not(test)) {
        QUIET.call_once(|| std::panic::set_hook(Box::new(|_| {})));
    }
}

//! The TLS contexts made lately, for all cancels of the process: making one takes as long as a
//! handshake, and with all the roots that a machine trusts ten times as long.
//!
//! A context is used again for the same options as long as its files are as they were; what is
//! replaced takes effect with the next cancel. One that is used no more is dropped, after a while,
//! by the next cancel.

use std::process;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use openssl::ssl::{SslContext, SslContextRef};

use crate::error::Error;
use crate::params::TlsOptions;
use crate::recent::Recent;
use crate::reserve;
use crate::signal_safe::now;
use crate::tls_context::{self, HomeDirectory};
use crate::tls_files::TlsFiles;

/// How long a context that nobody uses is kept, in nanoseconds.
const IDLE: u64 = 600 * 1_000_000_000;

struct Known {
    options: TlsOptions,
    home: HomeDirectory,
    files: TlsFiles,
    context: SslContext,
    /// Who made it. A child makes its own: in the middle of what the parent's threads did with
    /// theirs it was forked.
    process: u32,
    last_used: AtomicU64,
}

type Contexts = Recent<Known, 8>;

/// Nobody waits for it, so that nobody finds it locked for ever; who does not get it makes a
/// context that is not kept.
static CONTEXTS: RwLock<Contexts> = RwLock::new(Recent::new());

/// How often to try: a writer needs less than a microsecond.
const TRIES: usize = 100;

/// Whether a context for these options may be kept: not if OpenSSL looks into a directory for it.
pub(crate) fn may_keep(options: &TlsOptions) -> bool {
    options.crldir.is_none()
}

/// A context for these options, from what their files hold now. To be called through
/// `call_openssl`.
pub(crate) fn context_for(options: &TlsOptions) -> Result<SslContext, Error> {
    let home = HomeDirectory::find();
    drop_idle(now());
    if let Some(context) = known(options, &home) {
        return Ok(context);
    }
    let mut files = TlsFiles::default();
    let shortages = reserve::shortages();
    let context = tls_context::build(options, &home, &mut files)?;
    // What was changed meanwhile may have been read half; the reserve is nothing to keep.
    if files.show_changes() && files.are_unchanged() && reserve::shortages() == shortages {
        remember(Known {
            options: options.clone(),
            home,
            files,
            context: context.clone(),
            process: process::id(),
            last_used: AtomicU64::new(now()),
        });
    }
    Ok(context)
}

/// To be called when a handshake has failed: what is wrong may be the context, if memory was short
/// when it was made.
pub(crate) fn forget(context: &SslContextRef) {
    drop_those(|known| std::ptr::eq(&*known.context, context));
}

fn known(options: &TlsOptions, home: &HomeDirectory) -> Option<SslContext> {
    let contexts = read()?;
    let known = contexts.find(|known| {
        known.process == process::id()
            && known.options == *options
            && known.home == *home
            && known.files.are_unchanged()
    })?;
    known.last_used.store(now(), Relaxed);
    Some(known.context.clone())
}

fn remember(known: Known) {
    drop_those(|other| {
        other.process != known.process
            || (other.options == known.options && other.home == known.home)
    });
    let displaced = write().map(|mut contexts| contexts.remember(known));
    drop(displaced);
}

fn drop_idle(now: u64) {
    drop_those(|known| now.saturating_sub(known.last_used.load(Relaxed)) > IDLE);
}

fn drop_those(are_meant: impl Fn(&Known) -> bool) {
    if read().is_some_and(|contexts| contexts.find(&are_meant).is_some()) {
        let taken = write().map(|mut contexts| contexts.take(&are_meant));
        drop(taken); // no more under the lock
    }
}

fn read() -> Option<RwLockReadGuard<'static, Contexts>> {
    (0..TRIES).find_map(|_| CONTEXTS.try_read().ok())
}

fn write() -> Option<RwLockWriteGuard<'static, Contexts>> {
    (0..TRIES).find_map(|_| CONTEXTS.try_write().ok())
}

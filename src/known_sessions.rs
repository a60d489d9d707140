//! The sessions that PQgetCancel and PQcancelCreate were called for lately: a client that does so
//! around every query, as psql does, has the snapshot taken once. A session that was closed is
//! forgotten, and its key wiped, when its place is needed.

use std::sync::{Arc, Mutex};

use crate::error::Error;
use crate::host::Session;
use crate::host_layout::CancelBlock;
use crate::recent::Recent;
use crate::reserve;
use crate::target::Target;

struct Known {
    session: u64,
    target: Arc<Target>,
}

/// Only ever tried, never waited for: without it the snapshot is taken anew, and a child forked
/// while it was locked goes on without it.
static KNOWN: Mutex<Recent<Known, 32>> = Mutex::new(Recent::new());

/// The target of a session that is to be cancelled by the new functions.
pub(crate) fn prepared_target_of(session: &Session<'_>) -> Result<Arc<Target>, Error> {
    let target = target_of(session, &Target::cancel_block(session)?)?;
    target.prepare();
    Ok(target)
}

/// The session's target. What it holds does not change while the session lasts: on the same socket,
/// with the same backend PID and key.
pub(crate) fn target_of(session: &Session<'_>, block: &CancelBlock) -> Result<Arc<Target>, Error> {
    let request = block.request(session.backend_pid()).ok_or_else(|| session.unreadable())?;
    let identity = session.identity();
    if let (Some(identity), Ok(known)) = (identity, KNOWN.try_lock()) {
        let is_meant = |known: &Known| {
            known.session == identity && known.target.request.as_bytes() == request.as_bytes()
        };
        if let Some(known) = known.find(is_meant) {
            return Ok(Arc::clone(&known.target));
        }
    }
    let shortages = reserve::shortages();
    let target = Arc::new(Target::of_block(session, block)?);
    if reserve::shortages() != shortages {
        return Err(Error::OutOfMemory); // the reserve is nothing to keep for long
    }
    if let (Some(identity), Ok(mut known)) = (identity, KNOWN.try_lock()) {
        known.take(|known| known.session == identity);
        known.remember(Known { session: identity, target: Arc::clone(&target) });
    }
    Ok(target)
}

//! The sessions that PQgetCancel was called for lately: a client that calls it around every query,
//! as psql does, has the snapshot taken once.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use crate::error::Error;
use crate::host::Session;
use crate::host_layout::CancelBlock;
use crate::target::Target;

/// More sessions than this take turns in being known.
const MOST_KNOWN: usize = 32;

struct Known {
    session: usize,
    target: Arc<Target>,
}

/// Only ever tried, never waited for: without it the snapshot is taken anew, and a child forked
/// while it was locked goes on without it.
static KNOWN: Mutex<VecDeque<Known>> = Mutex::new(VecDeque::new());

/// The session's target. The same connection with the same backend PID and key is the same session,
/// and what a target holds does not change while it lasts.
pub(crate) fn target_of(session: &Session<'_>, block: &CancelBlock) -> Result<Arc<Target>, Error> {
    let (identity, request) = (session.identity(), block.request(session.backend_pid())?);
    if let Ok(known) = KNOWN.try_lock() {
        let found = known.iter().find(|known| {
            known.session == identity && known.target.request.as_bytes() == request.as_bytes()
        });
        if let Some(known) = found {
            return Ok(Arc::clone(&known.target));
        }
    }
    let target = Arc::new(Target::of_block(session, block)?);
    if let Ok(mut known) = KNOWN.try_lock() {
        // Its address belongs to one open connection at a time.
        known.retain(|known| known.session != identity);
        known.truncate(MOST_KNOWN - 1);
        known.push_front(Known { session: identity, target: Arc::clone(&target) });
    }
    Ok(target)
}

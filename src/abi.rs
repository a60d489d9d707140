//! What C sees: libpq's constants and opaque types, and the turns from ours to them.

use std::ffi::c_uint;

use crate::cancel_conn::Polling;
use crate::machine::Status;

/// `ConnStatusType` of libpq-fe.h.
pub type ConnStatusType = c_uint;

/// `PostgresPollingStatusType` of libpq-fe.h.
pub type PostgresPollingStatusType = c_uint;

/// `CONNECTION_BAD`: what there is to say of no connection.
pub const CONNECTION_BAD: ConnStatusType = 1;

/// `PGRES_POLLING_FAILED`.
pub const PGRES_POLLING_FAILED: PostgresPollingStatusType = 0;

impl From<Status> for ConnStatusType {
    fn from(status: Status) -> ConnStatusType {
        match status {
            Status::Ok => 0,
            Status::Bad => CONNECTION_BAD,
            Status::Started => 2,
            Status::Made => 3,
            Status::AwaitingResponse => 4,
            Status::SslStartup => 7,
            Status::GssStartup => 11,
            Status::Allocated => 14,
        }
    }
}

impl From<Polling> for PostgresPollingStatusType {
    fn from(polling: Polling) -> PostgresPollingStatusType {
        match polling {
            Polling::Failed => PGRES_POLLING_FAILED,
            Polling::Reading => 1,
            Polling::Writing => 2,
            Polling::Ok => 3,
        }
    }
}

//! What has to be read from the host's objects because no function of libpq tells it: the peer's
//! address and the cancel key in `struct pg_cancel`. Layouts are those of x86-64 and every other
//! LP64 platform, per major version; each read is checked against what the host says elsewhere,
//! and refused where the check fails. Never a guess.
//!
//! | host libpq | backend PID | key              | before that |
//! |------------|-------------|------------------|-------------|
//! | 13 to 17   | at 136      | at 140, 4 bytes  | sockaddr_storage at 0, its length at 128 |
//! | 18         | in packet   | in packet        | the same; packet: length at 160, code at 164, PID at 168, key from 172 |

#![allow(unsafe_code)]

use std::ptr::NonNull;

use zeroize::Zeroize;

use crate::address::Address;
use crate::error::Error;
use crate::message::{CANCEL_KEY_LENGTHS, CANCEL_REQUEST_CODE, CancelRequest};

/// `SockAddr raddr`: the size of `struct sockaddr_storage`, then the length in use.
const SOCKADDR_SIZE: usize = 128;
const SOCKADDR_LENGTH: usize = 128;

/// `int be_pid`, `int be_key`, libpq 17 and older.
const PID: usize = 136;
const KEY: usize = 140;
const KEY_END: usize = 144;

/// `int32 cancel_pkt_len`, `char cancel_req[]`, libpq 18. Before the key: length, code, PID.
const PACKET: usize = 160;
const PACKET_HEAD: usize = 12;

/// Whether the layout of this version is known.
pub fn is_known(version: i32) -> bool {
    matches!(version / 10_000, 13..=18)
}

/// What it takes to reach and cancel a session.
pub struct CancelSecret {
    /// The address the session is connected to.
    pub address: Address,
    /// The complete request.
    pub request: CancelRequest,
}

impl CancelSecret {
    /// Reads a block of the host's PQgetCancel for a session with this backend PID, which is not 0
    /// (such a session has no key), and wipes the key in it.
    ///
    /// # Safety
    ///
    /// A libpq of this version made `block` and has not freed it.
    pub unsafe fn read(
        block: NonNull<u8>,
        version: i32,
        backend_pid: i32,
    ) -> Result<CancelSecret, Error> {
        let layout_error = || Error::HostLayout(version);
        // SAFETY: in all known versions the block is at least KEY_END bytes long.
        let head = unsafe { std::slice::from_raw_parts_mut(block.as_ptr(), KEY_END) };
        let request = match version / 10_000 {
            13..=17 => request_from_fields(head, backend_pid),
            // SAFETY: libpq 18 made the block.
            18 => unsafe { request_from_packet(block, backend_pid) },
            _ => return Err(Error::HostUnsupported(version)),
        };
        let length = usize::try_from(i32_at(head, SOCKADDR_LENGTH).unwrap_or(0)).unwrap_or(0);
        let address = head.get(..length.min(SOCKADDR_SIZE)).and_then(Address::from_sockaddr);
        match request {
            Ok(request) => Ok(CancelSecret { address: address.ok_or_else(layout_error)?, request }),
            Err(Mismatch::NoKey) => Err(Error::NoCancelKey),
            Err(Mismatch::Layout) => Err(layout_error()),
        }
    }
}

enum Mismatch {
    NoKey,
    Layout,
}

fn i32_at(block: &[u8], offset: usize) -> Option<i32> {
    let bytes = block.get(offset..offset + 4)?;
    Some(i32::from_ne_bytes(bytes.try_into().ok()?))
}

fn request_from_fields(head: &mut [u8], backend_pid: i32) -> Result<CancelRequest, Mismatch> {
    let pid = i32_at(head, PID).ok_or(Mismatch::Layout)?;
    let key = i32_at(head, KEY).ok_or(Mismatch::Layout)?;
    if let Some(bytes) = head.get_mut(KEY..KEY_END) {
        bytes.zeroize();
    }
    if pid != backend_pid {
        return Err(Mismatch::Layout);
    }
    CancelRequest::new(pid, &key.to_be_bytes()).ok_or(Mismatch::Layout)
}

/// # Safety
///
/// libpq 18 made the block: it is zero up to and including the packet's length, or as long as
/// that says.
unsafe fn request_from_packet(
    block: NonNull<u8>,
    backend_pid: i32,
) -> Result<CancelRequest, Mismatch> {
    // SAFETY: the fixed part of the block, with the packet's length, is this long.
    let head = unsafe { std::slice::from_raw_parts(block.as_ptr().add(PACKET), 4) };
    let length = head.try_into().map(u32::from_be_bytes).unwrap_or(0) as usize;
    if length == 0 {
        return Err(Mismatch::NoKey);
    }
    let key_length = length.checked_sub(PACKET_HEAD).ok_or(Mismatch::Layout)?;
    if !CANCEL_KEY_LENGTHS.contains(&key_length) {
        return Err(Mismatch::Layout);
    }
    // SAFETY: the length was just found to be that of a CancelRequest, which libpq 18 writes only
    // when it has allocated that much.
    let packet = unsafe { std::slice::from_raw_parts_mut(block.as_ptr().add(PACKET), length) };
    let field = |offset: usize| packet.get(offset..offset + 4).and_then(|b| b.try_into().ok());
    let code = field(4).map(u32::from_be_bytes);
    let pid = field(8).map(i32::from_be_bytes);
    if code != Some(CANCEL_REQUEST_CODE) || pid != Some(backend_pid) {
        return Err(Mismatch::Layout);
    }
    let key = packet.get_mut(PACKET_HEAD..).ok_or(Mismatch::Layout)?;
    let request = CancelRequest::new(backend_pid, key);
    key.zeroize();
    request.ok_or(Mismatch::Layout)
}

//! What has to be read from the host's objects because no function of libpq tells it: the peer's
//! address and the cancel key in `struct pg_cancel`. Layouts are those of x86-64 and every other
//! LP64 platform, per major version; each read is checked against what the host says elsewhere,
//! and refused where the check fails. Never a guess.
//!
//! | host libpq | backend PID | key              | socket options | before that |
//! |------------|-------------|------------------|----------------|-------------|
//! | 13, 14     | at 136      | at 140, 4 bytes  | none           | sockaddr_storage at 0, its length at 128 |
//! | 15 to 17   | at 136      | at 140, 4 bytes  | from 144       | the same |
//! | 18         | in packet   | in packet        | from 140       | the same; packet: length at 160, code at 164, PID at 168, key from 172 |

#![allow(unsafe_code)]

use std::ptr::NonNull;

use zeroize::{Zeroize, Zeroizing};

use crate::address::Address;
use crate::error::Error;
use crate::message::{CANCEL_KEY_LENGTHS, CANCEL_REQUEST_CODE, CancelRequest, LONGEST_REQUEST};

/// `SockAddr raddr`: the size of `struct sockaddr_storage`, then the length in use.
pub const SOCKADDR_SIZE: usize = 128;
/// Where the length of the address in use is.
pub const SOCKADDR_LENGTH: usize = 128;

/// `int be_pid`, `int be_key`, libpq 17 and older.
const PID: usize = 136;
const KEY: usize = 140;
const KEY_END: usize = 144;

/// Five socket options, where the host has them.
const OPTIONS_15: usize = 144;
const OPTIONS_15_END: usize = 164;
const OPTIONS_18: usize = 140;

/// `int32 cancel_pkt_len`, `char cancel_req[]`, libpq 18. Before the key: length, code, PID.
pub const PACKET: usize = 160;
const PACKET_LENGTH_END: usize = 164;
const PACKET_HEAD: usize = 12;

/// The longest `struct pg_cancel` there is.
pub const LONGEST_BLOCK: usize = PACKET + LONGEST_REQUEST;

/// Whether the layout of this version is known.
pub fn is_known(version: i32) -> bool {
    matches!(version / 10_000, 13..=18)
}

/// What PQcancel sets on its socket; -1 stands for "not given".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketOptions {
    /// `tcp_user_timeout`, milliseconds.
    pub user_timeout: i32,
    /// `keepalives`; 0 turns all of them off.
    pub keepalives: i32,
    /// `keepalives_idle`, seconds.
    pub idle: i32,
    /// `keepalives_interval`, seconds.
    pub interval: i32,
    /// `keepalives_count`.
    pub count: i32,
}

/// A copy of what the host's PQgetCancel made; wiped when dropped, because the key is in it.
pub struct CancelBlock {
    version: i32,
    bytes: Zeroizing<[u8; LONGEST_BLOCK]>,
}

impl CancelBlock {
    /// Copies a block of the host's PQgetCancel for a session that has a backend PID (without one
    /// it has no key), and wipes the original, which the host frees as it is.
    ///
    /// # Safety
    ///
    /// A libpq of this version made `block` and has not freed it.
    pub unsafe fn take(block: NonNull<u8>, version: i32) -> Result<CancelBlock, Error> {
        let length = match version / 10_000 {
            13 | 14 => KEY_END,
            15..=17 => OPTIONS_15_END,
            18 => {
                // SAFETY: the fixed part of the block, with the packet's length, is this long.
                let fixed =
                    unsafe { std::slice::from_raw_parts(block.as_ptr(), PACKET_LENGTH_END) };
                if i32_at(fixed, PACKET) == Some(0) {
                    return Err(Error::NoCancelKey);
                }
                PACKET + packet_length(fixed).ok_or(Error::HostLayout(version))?
            }
            _ => return Err(Error::HostUnsupported(version)),
        };
        // SAFETY: the block is this long: all versions up to 17 have one length, and libpq 18
        // writes the length of a packet only when it has allocated that much.
        let original = unsafe { std::slice::from_raw_parts_mut(block.as_ptr(), length) };
        let mut bytes = Zeroizing::new([0; LONGEST_BLOCK]);
        for (to, from) in bytes.iter_mut().zip(&*original) {
            *to = *from;
        }
        original.zeroize();
        Ok(CancelBlock { version, bytes })
    }

    /// The bytes as the host wrote them, and zeros behind them.
    pub fn as_bytes(&self) -> &[u8; LONGEST_BLOCK] {
        &self.bytes
    }

    /// The request that cancels the session with this backend PID, as it is in the block.
    pub fn request(&self, backend_pid: i32) -> Result<CancelRequest, Error> {
        let request = match self.version / 10_000 {
            18 => self.request_from_packet(backend_pid),
            _ => self.request_from_fields(backend_pid),
        };
        request.ok_or(Error::HostLayout(self.version))
    }

    /// The address that the session is connected to, as `struct sockaddr`.
    pub fn sockaddr(&self) -> Result<&[u8], Error> {
        let length = i32_at(&*self.bytes, SOCKADDR_LENGTH).and_then(|l| usize::try_from(l).ok());
        length
            .filter(|length| *length <= SOCKADDR_SIZE)
            .and_then(|length| self.bytes.get(..length))
            .ok_or(Error::HostLayout(self.version))
    }

    /// The same address.
    pub fn address(&self) -> Result<Address, Error> {
        Address::from_sockaddr(self.sockaddr()?).ok_or(Error::HostLayout(self.version))
    }

    /// The socket options that the host's PQcancel would set. Before libpq 15 it set none.
    pub fn socket_options(&self) -> SocketOptions {
        let option = |number: usize| {
            let start = match self.version / 10_000 {
                18 => OPTIONS_18,
                15..=17 => OPTIONS_15,
                _ => return -1,
            };
            i32_at(&*self.bytes, start + 4 * number).unwrap_or(-1)
        };
        SocketOptions {
            user_timeout: option(0),
            keepalives: option(1),
            idle: option(2),
            interval: option(3),
            count: option(4),
        }
    }

    fn request_from_fields(&self, backend_pid: i32) -> Option<CancelRequest> {
        let pid = i32_at(&*self.bytes, PID)?;
        let key = i32_at(&*self.bytes, KEY)?;
        if pid != backend_pid {
            return None;
        }
        CancelRequest::new(pid, &key.to_be_bytes())
    }

    fn request_from_packet(&self, backend_pid: i32) -> Option<CancelRequest> {
        let packet = self.bytes.get(PACKET..PACKET + packet_length(&*self.bytes)?)?;
        let (head, key) = packet.split_at_checked(PACKET_HEAD)?;
        let code = i32_at(head, 4).map(i32::cast_unsigned).map(u32::from_be);
        let pid = i32_at(head, 8).map(i32::from_be);
        if code != Some(CANCEL_REQUEST_CODE) || pid != Some(backend_pid) {
            return None;
        }
        CancelRequest::new(backend_pid, key)
    }
}

fn i32_at(block: &[u8], offset: usize) -> Option<i32> {
    let bytes = block.get(offset..offset + 4)?;
    Some(i32::from_ne_bytes(bytes.try_into().ok()?))
}

/// The length of the packet in a block of libpq 18, if it can be that of a CancelRequest.
fn packet_length(block: &[u8]) -> Option<usize> {
    let length = usize::try_from(i32_at(block, PACKET).map(i32::from_be)?).ok()?;
    let key_length = length.checked_sub(PACKET_HEAD)?;
    CANCEL_KEY_LENGTHS.contains(&key_length).then_some(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PID_VALUE: i32 = 0x0102_0304;
    const KEY_VALUE: i32 = 0x1122_3344;

    fn put(block: &mut [u8], offset: usize, value: i32) {
        block[offset..offset + 4].copy_from_slice(&value.to_ne_bytes());
    }

    /// What a libpq of this version would have made, as the table at the top says.
    fn host_block(version: i32) -> Vec<u8> {
        let mut block = vec![0; LONGEST_BLOCK];
        put(&mut block, SOCKADDR_LENGTH, 16);
        let options = match version / 10_000 {
            18 => {
                put(&mut block, PACKET, 16_i32.to_be());
                put(&mut block, PACKET + 4, CANCEL_REQUEST_CODE.cast_signed().to_be());
                put(&mut block, PACKET + 8, PID_VALUE.to_be());
                put(&mut block, PACKET + 12, KEY_VALUE.to_be());
                OPTIONS_18
            }
            _ => {
                put(&mut block, PID, PID_VALUE);
                put(&mut block, KEY, KEY_VALUE);
                OPTIONS_15
            }
        };
        for number in 0..5 {
            put(&mut block, options + 4 * number, 100 + i32::try_from(number).unwrap());
        }
        block
    }

    fn take(block: &mut [u8], version: i32) -> Result<CancelBlock, Error> {
        // SAFETY: the block is as long as the longest there is.
        unsafe { CancelBlock::take(NonNull::new(block.as_mut_ptr()).unwrap(), version) }
    }

    #[test]
    fn every_known_layout_is_read_and_the_original_wiped() {
        for version in [130_000, 140_022, 150_018, 160_003, 170_000, 180_006] {
            let mut original = host_block(version);
            let block = take(&mut original, version).unwrap();
            let request = block.request(PID_VALUE).unwrap();
            assert_eq!(request.as_bytes()[12..], KEY_VALUE.to_be_bytes(), "{version}");
            assert_eq!(block.sockaddr().unwrap().len(), 16);
            let key = KEY_VALUE.to_ne_bytes();
            assert!(!original.windows(4).any(|w| w == key || w == KEY_VALUE.to_be_bytes()));
            let first = if version < 150_000 { -1 } else { 100 };
            assert_eq!(block.socket_options().user_timeout, first, "{version}");
        }
    }

    #[test]
    fn what_does_not_agree_is_refused() {
        for version in [150_018, 180_006] {
            let mut original = host_block(version);
            let block = take(&mut original, version).unwrap();
            assert_eq!(block.request(7).unwrap_err(), Error::HostLayout(version));
        }
        for length in [1, 15, 269, -1] {
            let mut original = host_block(180_006);
            put(&mut original, PACKET, i32::to_be(length));
            assert!(take(&mut original, 180_006).is_err(), "{length}");
        }
        let mut original = host_block(180_006);
        put(&mut original, PACKET, 0);
        assert_eq!(take(&mut original, 180_006).err(), Some(Error::NoCancelKey));
        let mut original = host_block(150_018);
        put(&mut original, SOCKADDR_LENGTH, 129);
        assert!(take(&mut original, 150_018).unwrap().sockaddr().is_err());
        assert!(take(&mut host_block(150_018), 190_000).is_err());
    }
}

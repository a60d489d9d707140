//! What has to be read from the host's objects because no function of libpq tells it: the peer's
//! address and the cancel key in `struct pg_cancel`. Layouts are those of x86-64 and every other
//! LP64 platform, per major version; each read is checked against what the host says elsewhere,
//! and refused where the check fails. Never a guess.
//!
//! | host libpq | backend PID | key              | socket options | before that |
//! |------------|-------------|------------------|----------------|-------------|
//! | 10 to 14   | at 136      | at 140, 4 bytes  | none           | sockaddr_storage at 0, its length at 128 |
//! | 15 to 17   | at 136      | at 140, 4 bytes  | from 144       | the same |
//! | 18         | in packet   | in packet        | from 140       | the same; packet: length at 160, code at 164, PID at 168, key from 172 |
//!
//! A libpq newer than 18 is read as one of 18: whether that is right, the packet tells.

#![allow(unsafe_code)]

use std::ptr::NonNull;

use zeroize::{Zeroize, Zeroizing};

use crate::address::Address;
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
const PACKET: usize = 160;
const PACKET_LENGTH_END: usize = 164;
const PACKET_HEAD: usize = 12;

/// The longest `struct pg_cancel` there is.
pub const LONGEST_BLOCK: usize = PACKET + LONGEST_REQUEST;

/// What stands behind the address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// PID and key (libpq 14 and older).
    Key,
    /// PID, key and socket options (15 to 17).
    KeyAndOptions,
    /// Socket options and the packet to be sent (18 and newer).
    Packet,
}

impl Layout {
    /// That of a version, as PQlibVersion gives it.
    pub fn of(version: i32) -> Option<Layout> {
        match version / 10_000 {
            10..=14 => Some(Layout::Key),
            15..=17 => Some(Layout::KeyAndOptions),
            18.. => Some(Layout::Packet),
            _ => None,
        }
    }

    /// How long a block is, of which so many bytes can be read.
    ///
    /// # Safety
    ///
    /// `block` is as long as that.
    unsafe fn length(self, block: NonNull<u8>, room: usize) -> Option<usize> {
        let length = match self {
            Layout::Key => KEY_END,
            Layout::KeyAndOptions => OPTIONS_15_END,
            Layout::Packet if room < PACKET_LENGTH_END => return None,
            Layout::Packet => {
                // SAFETY: the block is at least this long.
                let fixed =
                    unsafe { std::slice::from_raw_parts(block.as_ptr(), PACKET_LENGTH_END) };
                if i32_at(fixed, PACKET)? == 0 {
                    PACKET_LENGTH_END
                } else {
                    PACKET + packet_length(fixed)?
                }
            }
        };
        (length <= room).then_some(length)
    }
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
    layout: Layout,
    bytes: Zeroizing<[u8; LONGEST_BLOCK]>,
}

impl CancelBlock {
    /// Copies a block of the host's PQgetCancel, and wipes the original, which the host frees as it
    /// is. None, and nothing is wiped, if the version is unknown or the block not what it should be.
    ///
    /// # Safety
    ///
    /// A libpq of this version made `block` and has not freed it.
    pub unsafe fn take(block: NonNull<u8>, version: i32) -> Option<CancelBlock> {
        let layout = Layout::of(version)?;
        // Up to 18 it is certain that the block is long enough. (Not every allocator that a program
        // brings along tells.)
        let is_certain = version < 190_000;
        // SAFETY: malloc made the block.
        let room = if is_certain { usize::MAX } else { unsafe { room(block) } };
        // SAFETY: the block has this room, or is long enough.
        let length = unsafe { layout.length(block, room) }?;
        // SAFETY: the block is this long: all versions up to 17 have one length, and libpq 18
        // writes the length of a packet only when it has allocated that much.
        let original = unsafe { std::slice::from_raw_parts_mut(block.as_ptr(), length) };
        let copy = CancelBlock::copy(layout, original);
        original.zeroize();
        Some(copy)
    }

    /// Copies a block that a libpq made, of which version nobody knows. Reachable from a signal
    /// handler. What tells the layouts apart: a packet holds its code, and a block with neither
    /// packet nor options has no room for them.
    ///
    /// # Safety
    ///
    /// A libpq made `block` with malloc and has not freed it.
    pub unsafe fn of_unknown(block: NonNull<u8>) -> Option<CancelBlock> {
        // SAFETY: malloc made the block.
        let room = unsafe { room(block) };
        for layout in [Layout::Packet, Layout::KeyAndOptions, Layout::Key] {
            // SAFETY: the block is as long as its room.
            if let Some(length) = unsafe { layout.length(block, room) } {
                // SAFETY: length is within the room.
                let original = unsafe { std::slice::from_raw_parts(block.as_ptr(), length) };
                let copy = CancelBlock::copy(layout, original);
                if layout != Layout::Packet || copy.packet().is_some() {
                    return Some(copy);
                }
            }
        }
        None
    }

    fn copy(layout: Layout, original: &[u8]) -> CancelBlock {
        let mut bytes = Zeroizing::new([0; LONGEST_BLOCK]);
        for (to, from) in bytes.iter_mut().zip(original) {
            *to = *from;
        }
        CancelBlock { layout, bytes }
    }

    /// How it is laid out.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The bytes as the host wrote them, and zeros behind them.
    pub fn as_bytes(&self) -> &[u8; LONGEST_BLOCK] {
        &self.bytes
    }

    /// Whether the server has sent a key: without one libpq 18 makes a block of zeros, and older ones
    /// have a PID and a key of zero.
    pub fn has_key(&self) -> bool {
        let is_zero = |offset: usize| i32_at(&*self.bytes, offset) == Some(0);
        match self.layout {
            Layout::Packet => !is_zero(PACKET),
            Layout::Key | Layout::KeyAndOptions => !(is_zero(PID) && is_zero(KEY)),
        }
    }

    /// The request that cancels the session with this backend PID, if that is what is in the block.
    pub fn request(&self, backend_pid: i32) -> Option<CancelRequest> {
        self.any_request().filter(|request| request.backend_pid() == backend_pid)
    }

    /// The request that is in the block.
    pub fn any_request(&self) -> Option<CancelRequest> {
        if self.layout == Layout::Packet {
            let (head, key) = self.packet()?;
            return CancelRequest::new(i32_at(head, 8).map(i32::from_be)?, key);
        }
        let key = i32_at(&*self.bytes, KEY)?.to_be_bytes();
        CancelRequest::new(i32_at(&*self.bytes, PID)?, &key)
    }

    /// The address that the session is connected to, as `struct sockaddr`.
    pub fn sockaddr(&self) -> Option<&[u8]> {
        let length = usize::try_from(i32_at(&*self.bytes, SOCKADDR_LENGTH)?).ok()?;
        if length > SOCKADDR_SIZE { None } else { self.bytes.get(..length) }
    }

    /// The same address.
    pub fn address(&self) -> Option<Address> {
        Address::from_sockaddr(self.sockaddr()?)
    }

    /// The socket options that the host's PQcancel would set. Before libpq 15 it set none.
    pub fn socket_options(&self) -> SocketOptions {
        let option = |number: usize| {
            let start = match self.layout {
                Layout::Key => return -1,
                Layout::KeyAndOptions => OPTIONS_15,
                Layout::Packet => OPTIONS_18,
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

    /// What comes before the key, and the key, if this is a CancelRequest.
    fn packet(&self) -> Option<(&[u8], &[u8])> {
        let packet = self.bytes.get(PACKET..PACKET + packet_length(&*self.bytes)?)?;
        let (head, key) = packet.split_at_checked(PACKET_HEAD)?;
        let code = i32_at(head, 4).map(i32::cast_unsigned).map(u32::from_be);
        (code == Some(CANCEL_REQUEST_CODE)).then_some((head, key))
    }
}

/// How much of a block can be read: a look at what malloc has written before it.
///
/// # Safety
///
/// malloc made the block, and it is not freed.
unsafe fn room(block: NonNull<u8>) -> usize {
    // SAFETY: the caller's promise.
    unsafe { libc::malloc_usable_size(block.as_ptr().cast()) }
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

    fn take(block: &mut [u8], version: i32) -> Option<CancelBlock> {
        // SAFETY: the block is as long as the longest there is.
        unsafe { CancelBlock::take(NonNull::new(block.as_mut_ptr()).unwrap(), version) }
    }

    #[test]
    fn every_known_layout_is_read_and_the_original_wiped() {
        for version in [100_023, 110_022, 130_000, 140_022, 150_018, 160_003, 170_000, 180_006] {
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
            assert!(block.request(7).is_none());
        }
        for length in [1, 15, 269, -1] {
            let mut original = host_block(180_006);
            put(&mut original, PACKET, i32::to_be(length));
            assert!(take(&mut original, 180_006).is_none(), "{length}");
            assert_eq!(original[PACKET + 12..PACKET + 16], KEY_VALUE.to_be_bytes(), "as it was");
        }
        let mut original = host_block(150_018);
        put(&mut original, SOCKADDR_LENGTH, 129);
        assert!(take(&mut original, 150_018).unwrap().sockaddr().is_none());
        assert!(take(&mut host_block(150_018), 90_624).is_none());
    }

    #[test]
    fn a_server_that_sends_no_key_is_told_from_one_whose_pid_is_zero() {
        for (version, first, second) in [(150_018, PID, KEY), (180_006, PACKET, PACKET + 12)] {
            let mut original = host_block(version);
            put(&mut original, first, 0);
            assert_eq!(take(&mut original, version).unwrap().has_key(), version < 180_000);
            let mut original = host_block(version);
            put(&mut original, first, 0);
            put(&mut original, second, 0);
            assert!(!take(&mut original, version).unwrap().has_key());
        }
    }

    /// A block of malloc's own, as long as a libpq of this version makes it.
    fn with_malloced(version: i32, test: impl FnOnce(NonNull<u8>)) {
        let original = host_block(version);
        let length = match version / 10_000 {
            ..15 => KEY_END,
            15..18 => OPTIONS_15_END,
            _ => PACKET + 16,
        };
        // SAFETY: the block is this long, freed once and not used afterwards.
        unsafe {
            let block = NonNull::new(libc::malloc(length).cast::<u8>()).unwrap();
            block.as_ptr().copy_from_nonoverlapping(original.as_ptr(), length);
            test(block);
            libc::free(block.as_ptr().cast());
        }
    }

    #[test]
    fn a_newer_block_is_read_as_far_as_it_goes() {
        for (version, is_read) in [(180_006, true), (150_000, false), (140_000, false)] {
            // SAFETY: malloc made the block.
            with_malloced(version, |block| unsafe {
                let request = CancelBlock::take(block, 190_000).and_then(|b| b.request(PID_VALUE));
                assert_eq!(request.is_some(), is_read, "{version}");
            });
        }
    }

    #[test]
    fn a_block_tells_its_layout() {
        for version in [140_000, 150_018, 180_006] {
            // SAFETY: malloc made the block.
            with_malloced(version, |block| unsafe {
                let copy = CancelBlock::of_unknown(block).unwrap();
                assert_eq!(Some(copy.layout), Layout::of(version));
                let request = copy.any_request().unwrap();
                assert_eq!(request.as_bytes()[12..], KEY_VALUE.to_be_bytes(), "{version}");
            });
        }
    }
}

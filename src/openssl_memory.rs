//! OpenSSL reports a failed allocation properly, except at two moments: while it initializes
//! itself it may hang or remember the failure for ever, and while a thread has no error state yet
//! it recurses until the stack ends. At these moments its allocations do not fail: a reserve of
//! their own stands behind them. (Only the private OpenSSL's. The system's is the host's.)

#![allow(unsafe_code)]

use std::alloc::Layout;
use std::ffi::{c_char, c_int, c_void};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use openssl::error::ErrorStack;

use crate::reserve::{self, Arena};

/// 4 MiB, twice what the first TLS connection of a process allocates. Untouched, it costs address space
/// only.
static RESERVE: Arena<512, 32> = Arena::new();

/// How many calls into OpenSSL may use the reserve right now.
static SHELTERED: AtomicUsize = AtomicUsize::new(0);

/// Whether a handshake has been completed in this process: then all that OpenSSL prepares once is
/// prepared.
static INITIALIZED: AtomicBool = AtomicBool::new(false);

/// Calls into OpenSSL, with an empty error queue and, where it is needed, sheltered from a
/// shortage of memory. Every call from our threads goes through here.
pub(crate) fn call_openssl<T>(body: impl FnOnce() -> T) -> T {
    stand_behind_openssl();
    let shelter = Shelter::take();
    // Makes the thread's error state. With `OPENSSL=system` the queue is the host's, too, and its
    // old entries would be taken for answers to our calls, as libpq knows.
    drop(ErrorStack::get());
    let _shelter = (!INITIALIZED.load(Ordering::Relaxed)).then_some(shelter);
    body()
}

/// Initializes OpenSSL, which is done once in a process and takes milliseconds.
pub(crate) fn prepare() {
    call_openssl(openssl::init);
}

/// Tells that a handshake has been completed.
pub(crate) fn openssl_is_initialized() {
    INITIALIZED.store(true, Ordering::Relaxed);
}

struct Shelter;

impl Shelter {
    fn take() -> Shelter {
        SHELTERED.fetch_add(1, Ordering::Relaxed);
        Shelter
    }
}

impl Drop for Shelter {
    fn drop(&mut self) {
        SHELTERED.fetch_sub(1, Ordering::Relaxed);
    }
}

/// To be called before the first use of OpenSSL, which later refuses it and goes on with malloc.
fn stand_behind_openssl() {
    static ONCE: Once = Once::new();
    if cfg!(feature = "vendored") {
        // SAFETY: the three functions keep malloc's contract, and free and reallocate what they
        // allocated as well as what malloc did.
        ONCE.call_once(|| unsafe {
            CRYPTO_set_mem_functions(allocate, reallocate, free);
        });
    }
}

unsafe extern "C" {
    fn CRYPTO_set_mem_functions(
        malloc: unsafe extern "C" fn(usize, *const c_char, c_int) -> *mut c_void,
        realloc: unsafe extern "C" fn(*mut c_void, usize, *const c_char, c_int) -> *mut c_void,
        free: unsafe extern "C" fn(*mut c_void, *const c_char, c_int),
    ) -> c_int;
}

unsafe extern "C" fn allocate(size: usize, _: *const c_char, _: c_int) -> *mut c_void {
    // SAFETY: malloc takes any size.
    let pointer = unsafe { libc::malloc(size) };
    if pointer.is_null() && size > 0 { take(size) } else { pointer }
}

unsafe extern "C" fn reallocate(
    pointer: *mut c_void,
    size: usize,
    file: *const c_char,
    line: c_int,
) -> *mut c_void {
    if !RESERVE.holds(pointer.cast()) {
        // SAFETY: not the reserve's, so malloc's or NULL; the caller's promise otherwise.
        let moved = unsafe { libc::realloc(pointer, size) };
        if !moved.is_null() || size == 0 {
            return moved;
        }
    }
    // SAFETY: takes any size.
    let moved = unsafe { allocate(size, file, line) };
    if !moved.is_null() && !pointer.is_null() {
        // SAFETY: the new block has this size, and the old one as much as size_of_block says. They
        // do not overlap, and the old one is freed once.
        unsafe {
            let length = size_of_block(pointer).min(size);
            std::ptr::copy_nonoverlapping(pointer.cast::<u8>(), moved.cast::<u8>(), length);
            free(pointer, file, line);
        }
    }
    moved
}

unsafe extern "C" fn free(pointer: *mut c_void, _: *const c_char, _: c_int) {
    if RESERVE.holds(pointer.cast()) {
        let block = pointer.cast::<u8>().wrapping_sub(HEADER);
        // SAFETY: a block that take made.
        let size = unsafe { size_of_block(pointer) };
        if let Some(layout) = layout_of(size) {
            RESERVE.give_back(block, layout);
        }
    } else {
        // SAFETY: not the reserve's, so malloc's or NULL; the caller's promise otherwise.
        unsafe { libc::free(pointer) }
    }
}

/// Blocks of the reserve begin with their size, in as much as keeps them aligned.
const HEADER: usize = 16;

fn take(size: usize) -> *mut c_void {
    let (Some(layout), true) = (layout_of(size), SHELTERED.load(Ordering::Relaxed) > 0) else {
        reserve::note_shortage();
        return std::ptr::null_mut();
    };
    let block = RESERVE.take(layout);
    if block.is_null() {
        return std::ptr::null_mut();
    }
    // SAFETY: the block is aligned for it and longer than the header.
    unsafe { block.cast::<usize>().write(size) };
    block.wrapping_add(HEADER).cast()
}

/// Of a block for so many bytes, with its header.
fn layout_of(size: usize) -> Option<Layout> {
    Layout::from_size_align(size.checked_add(HEADER)?, HEADER).ok()
}

/// # Safety
///
/// The block came from malloc or from `take`.
unsafe fn size_of_block(pointer: *mut c_void) -> usize {
    if RESERVE.holds(pointer.cast()) {
        // SAFETY: take wrote it there.
        unsafe { pointer.cast::<u8>().sub(HEADER).cast::<usize>().read() }
    } else {
        // SAFETY: a block of malloc's.
        unsafe { libc::malloc_usable_size(pointer) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_serves_only_who_is_sheltered_and_knows_its_blocks() {
        assert!(take(100).is_null());
        let shelter = Shelter::take();
        let block = take(100);
        assert!(RESERVE.holds(block.cast()));
        assert_eq!(block.addr() % 16, 0);
        assert!(take(usize::MAX).is_null());
        // SAFETY: take made the block, and it is reallocated and freed once.
        unsafe {
            assert_eq!(size_of_block(block), 100);
            block.cast::<u8>().write_bytes(7, 100);
            let moved = reallocate(block, 200, std::ptr::null(), 0);
            assert!(!RESERVE.holds(moved.cast()));
            assert_eq!(std::slice::from_raw_parts(moved.cast::<u8>(), 100), [7; 100]);
            free(moved, std::ptr::null(), 0);
        }
        drop(shelter);
        assert!(take(100).is_null());
    }
}

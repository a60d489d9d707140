//! What keeps a shortage of memory from ending the host process. Rust aborts when an allocation
//! fails, and OpenSSL hangs or recurses for ever where one fails while it initializes itself; so
//! theirs do not fail. When malloc has nothing left they are served from a reserve, and the entry
//! points, which see that it was used, report "out of memory" in libpq's way.

#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::UnsafeCell;
use std::ffi::{c_char, c_int, c_void};
use std::sync::Once;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Twice what the first cancel over TLS needs, which initializes OpenSSL. Untouched, it costs
/// address space only.
const SIZE: usize = 4 * 1024 * 1024;

#[global_allocator]
static ALLOCATOR: Reserve = Reserve {
    memory: Memory(UnsafeCell::new([0; SIZE])),
    state: AtomicU64::new(0),
    shortages: AtomicUsize::new(0),
};

/// How often the reserve had to help out so far. A call that finds it changed has met a shortage,
/// its own or another thread's.
pub(crate) fn shortages() -> usize {
    ALLOCATOR.shortages.load(Ordering::Relaxed)
}

/// Puts the reserve behind the private OpenSSL's allocations; to be called before its first use.
/// An OpenSSL that belongs to the system is the host's, and left alone.
pub(crate) fn stand_behind_openssl() {
    static ONCE: Once = Once::new();
    if cfg!(feature = "vendored") {
        // SAFETY: the three functions keep malloc's contract, and free and reallocate what they
        // allocated. If OpenSSL has allocated before, it refuses them and goes on with malloc.
        ONCE.call_once(|| unsafe {
            CRYPTO_set_mem_functions(openssl_malloc, openssl_realloc, openssl_free);
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

/// Blocks of the reserve that C asked for begin with their size, in as much as keeps them aligned.
const HEADER: usize = 16;

unsafe extern "C" fn openssl_malloc(size: usize, _: *const c_char, _: c_int) -> *mut c_void {
    // SAFETY: malloc takes any size.
    let pointer = unsafe { libc::malloc(size) };
    if pointer.is_null() && size > 0 { ALLOCATOR.take_sized(size) } else { pointer }
}

unsafe extern "C" fn openssl_realloc(
    pointer: *mut c_void,
    size: usize,
    _: *const c_char,
    _: c_int,
) -> *mut c_void {
    if !ALLOCATOR.holds(pointer.cast()) {
        // SAFETY: not the reserve's, so malloc's or NULL; the caller's promise otherwise.
        let moved = unsafe { libc::realloc(pointer, size) };
        if !moved.is_null() || size == 0 {
            return moved;
        }
    }
    let moved = ALLOCATOR.take_sized(size);
    if !moved.is_null() && !pointer.is_null() {
        // SAFETY: the new block has this size, and the old one as much as size_of_block says. They
        // do not overlap, and the old one is freed once.
        unsafe {
            let length = ALLOCATOR.size_of_block(pointer).min(size);
            std::ptr::copy_nonoverlapping(pointer.cast::<u8>(), moved.cast::<u8>(), length);
            openssl_free(pointer, std::ptr::null(), 0);
        }
    }
    moved
}

unsafe extern "C" fn openssl_free(pointer: *mut c_void, _: *const c_char, _: c_int) {
    if ALLOCATOR.holds(pointer.cast()) {
        ALLOCATOR.give_back();
    } else {
        // SAFETY: not the reserve's, so malloc's or NULL; the caller's promise otherwise.
        unsafe { libc::free(pointer) }
    }
}

/// The system's allocator, and behind it a block that is handed out from one end to the other and
/// is whole again when everything has been given back.
struct Reserve {
    memory: Memory,
    state: AtomicU64,
    shortages: AtomicUsize,
}

#[repr(align(16))]
struct Memory(UnsafeCell<[u8; SIZE]>);

// SAFETY: the bytes are only handed out, each to one allocation at a time.
unsafe impl Sync for Memory {}

/// How much is handed out (high half), and in how many allocations (low half).
#[derive(Clone, Copy)]
struct Use {
    end: usize,
    live: usize,
}

impl Use {
    fn unpack(state: u64) -> Use {
        Use { end: (state >> 32) as usize, live: (state & 0xffff_ffff) as usize }
    }

    fn pack(self) -> u64 {
        (self.end as u64) << 32 | self.live as u64
    }
}

impl Reserve {
    fn base(&self) -> *mut u8 {
        self.memory.0.get().cast()
    }

    fn holds(&self, pointer: *const u8) -> bool {
        (self.base().addr()..self.base().addr() + SIZE).contains(&pointer.addr())
    }

    fn take(&self, layout: Layout) -> *mut u8 {
        let mut start = 0;
        let taken = self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, |state| {
            let used = Use::unpack(state);
            start = used.end.checked_next_multiple_of(layout.align().max(16))?;
            let end = start.checked_add(layout.size()).filter(|end| *end <= SIZE)?;
            Some(Use { end, live: used.live + 1 }.pack())
        });
        self.shortages.fetch_add(1, Ordering::Relaxed);
        match taken {
            Ok(_) => self.base().wrapping_add(start),
            Err(_) => std::ptr::null_mut(),
        }
    }

    /// A block that knows its size.
    fn take_sized(&self, size: usize) -> *mut c_void {
        let layout = size.checked_add(HEADER).map(|size| Layout::from_size_align(size, HEADER));
        let Some(Ok(layout)) = layout else {
            return std::ptr::null_mut();
        };
        let block = self.take(layout);
        if block.is_null() {
            return std::ptr::null_mut();
        }
        // SAFETY: the block is aligned for it and longer than the header.
        unsafe { block.cast::<usize>().write(size) };
        block.wrapping_add(HEADER).cast()
    }

    /// # Safety
    ///
    /// The block came from malloc or from `take_sized`.
    unsafe fn size_of_block(&self, pointer: *mut c_void) -> usize {
        if self.holds(pointer.cast()) {
            // SAFETY: take_sized wrote it there.
            unsafe { pointer.cast::<u8>().sub(HEADER).cast::<usize>().read() }
        } else {
            // SAFETY: a block of malloc's.
            unsafe { libc::malloc_usable_size(pointer) }
        }
    }

    fn give_back(&self) {
        // The update always succeeds; the last one out makes the reserve whole again.
        let _ = self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, |state| {
            let used = Use::unpack(state);
            let live = used.live.saturating_sub(1);
            Some(Use { end: if live == 0 { 0 } else { used.end }, live }.pack())
        });
    }
}

// SAFETY: every block comes from the system's allocator or, by `take`, is a part of the reserve
// that nothing else has until it is given back; which of the two, its address tells.
unsafe impl GlobalAlloc for Reserve {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise about the layout.
        let pointer = unsafe { System.alloc(layout) };
        if pointer.is_null() { self.take(layout) } else { pointer }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        if self.holds(pointer) {
            self.give_back();
        } else {
            // SAFETY: not the reserve's, so the system's; the caller's promise otherwise.
            unsafe { System.dealloc(pointer, layout) }
        }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        if !self.holds(pointer) {
            // SAFETY: not the reserve's, so the system's; the caller's promise otherwise.
            let moved = unsafe { System.realloc(pointer, layout, new_size) };
            if !moved.is_null() {
                return moved;
            }
        }
        let Ok(new_layout) = Layout::from_size_align(new_size, layout.align()) else {
            return std::ptr::null_mut();
        };
        let moved = self.take(new_layout);
        if !moved.is_null() {
            // SAFETY: both blocks are at least this long and, being different allocations, do not
            // overlap; the old one is freed once, by whom it came from.
            unsafe {
                std::ptr::copy_nonoverlapping(pointer, moved, layout.size().min(new_size));
                self.dealloc(pointer, layout);
            }
        }
        moved
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Static, as the real one is: too large for a stack.
    macro_rules! reserve {
        () => {{
            static RESERVE: Reserve = Reserve {
                memory: Memory(UnsafeCell::new([0; SIZE])),
                state: AtomicU64::new(0),
                shortages: AtomicUsize::new(0),
            };
            &RESERVE
        }};
    }

    #[test]
    fn the_reserve_is_handed_out_in_order_and_whole_again_in_the_end() {
        let reserve = reserve!();
        let layout = Layout::from_size_align(100, 64).unwrap();
        let first = reserve.take(layout);
        let second = reserve.take(layout);
        assert!(reserve.holds(first) && reserve.holds(second));
        assert!(second.addr() >= first.addr() + 100);
        assert_eq!((first.addr() - reserve.base().addr()) % 64, 0);
        assert_eq!(reserve.shortages.load(Ordering::Relaxed), 2);

        let too_much = Layout::from_size_align(SIZE, 1).unwrap();
        assert!(reserve.take(too_much).is_null());
        reserve.give_back();
        assert!(reserve.take(too_much).is_null());
        reserve.give_back();
        assert_eq!(reserve.take(too_much), reserve.base());
    }

    #[test]
    fn a_block_of_the_reserve_grows_within_it() {
        let reserve = reserve!();
        let layout = Layout::from_size_align(4, 1).unwrap();
        let block = reserve.take(layout);
        // SAFETY: the block is 4 bytes long, then 40, and freed once.
        unsafe {
            block.copy_from_nonoverlapping(b"abcd".as_ptr(), 4);
            let grown = reserve.realloc(block, layout, 40);
            assert!(reserve.holds(grown) && grown != block);
            assert_eq!(std::slice::from_raw_parts(grown, 4), b"abcd");
            reserve.dealloc(grown, Layout::from_size_align(40, 1).unwrap());
        }
        assert_eq!(reserve.state.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_block_for_c_knows_its_size() {
        let reserve = reserve!();
        let block = reserve.take_sized(100);
        assert!(reserve.holds(block.cast()));
        assert_eq!(block.addr() % 16, 0);
        // SAFETY: take_sized made it.
        assert_eq!(unsafe { reserve.size_of_block(block) }, 100);
        assert!(reserve.take_sized(usize::MAX).is_null());
    }
}

//! What keeps a shortage of memory from ending the host process: Rust aborts when an allocation
//! fails, so ours do not fail. When malloc has nothing left they are served from a small reserve,
//! and the entry points, which see that it was used, report "out of memory" in libpq's way.
//!
//! OpenSSL has a reserve of its own, for the few moments when it needs one: `openssl_memory.rs`.

#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

#[global_allocator]
static ALLOCATOR: Allocator = Allocator(Arena::new());

static SHORTAGES: AtomicUsize = AtomicUsize::new(0);

/// How often a reserve had to help out so far. A call that finds it changed has met a shortage,
/// its own or another thread's.
pub(crate) fn shortages() -> usize {
    SHORTAGES.load(Ordering::Relaxed)
}

/// A block of memory that is handed out from one end to the other, and is whole again when
/// everything has been given back.
pub(crate) struct Arena<const SIZE: usize> {
    memory: Memory<SIZE>,
    state: AtomicU64,
}

#[repr(align(16))]
struct Memory<const SIZE: usize>(UnsafeCell<[u8; SIZE]>);

// SAFETY: the bytes are only handed out, each to one allocation at a time.
unsafe impl<const SIZE: usize> Sync for Memory<SIZE> {}

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

impl<const SIZE: usize> Arena<SIZE> {
    pub(crate) const fn new() -> Self {
        Arena { memory: Memory(UnsafeCell::new([0; SIZE])), state: AtomicU64::new(0) }
    }

    fn base(&self) -> *mut u8 {
        self.memory.0.get().cast()
    }

    /// Whether this is a block of the arena's.
    pub(crate) fn holds(&self, pointer: *const u8) -> bool {
        (self.base().addr()..self.base().addr() + SIZE).contains(&pointer.addr())
    }

    /// Hands out a block, and counts the shortage that made it necessary. NULL if there is no room.
    pub(crate) fn take(&self, layout: Layout) -> *mut u8 {
        SHORTAGES.fetch_add(1, Ordering::Relaxed);
        let mut start = 0;
        let taken = self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, |state| {
            let used = Use::unpack(state);
            start = used.end.checked_next_multiple_of(layout.align().max(16))?;
            let end = start.checked_add(layout.size()).filter(|end| *end <= SIZE)?;
            Some(Use { end, live: used.live + 1 }.pack())
        });
        match taken {
            Ok(_) => self.base().wrapping_add(start),
            Err(_) => std::ptr::null_mut(),
        }
    }

    /// Takes a block of this size back. The room of the one handed out last is free at once.
    pub(crate) fn give_back(&self, pointer: *const u8, size: usize) {
        let start = pointer.addr() - self.base().addr();
        // The update always succeeds.
        let _ = self.state.fetch_update(Ordering::AcqRel, Ordering::Acquire, |state| {
            let used = Use::unpack(state);
            let live = used.live.saturating_sub(1);
            let end = match live {
                0 => 0,
                _ if start + size == used.end => start,
                _ => used.end,
            };
            Some(Use { end, live }.pack())
        });
    }
}

/// The system's allocator, and the reserve behind it: far more than one call needs at a time.
/// Untouched, it costs address space only.
struct Allocator(Arena<{ 256 * 1024 }>);

// SAFETY: every block comes from the system's allocator or, by `take`, is a part of the reserve
// that nothing else has until it is given back; which of the two, its address tells.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise about the layout.
        let pointer = unsafe { System.alloc(layout) };
        if pointer.is_null() { self.0.take(layout) } else { pointer }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        if self.0.holds(pointer) {
            self.0.give_back(pointer, layout.size());
        } else {
            // SAFETY: not the reserve's, so the system's; the caller's promise otherwise.
            unsafe { System.dealloc(pointer, layout) }
        }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        if !self.0.holds(pointer) {
            // SAFETY: not the reserve's, so the system's; the caller's promise otherwise.
            let moved = unsafe { System.realloc(pointer, layout, new_size) };
            if !moved.is_null() {
                return moved;
            }
        }
        let Ok(new_layout) = Layout::from_size_align(new_size, layout.align()) else {
            return std::ptr::null_mut();
        };
        // SAFETY: the new layout is valid and, as the caller promised, not of size zero.
        let moved = unsafe { self.alloc(new_layout) };
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

    const SIZE: usize = 4096;

    fn layout(size: usize, align: usize) -> Layout {
        Layout::from_size_align(size, align).unwrap()
    }

    #[test]
    fn an_arena_is_handed_out_in_order_and_whole_again_in_the_end() {
        let arena = Arena::<SIZE>::new();
        let before = shortages();
        let first = arena.take(layout(100, 64));
        let second = arena.take(layout(100, 16));
        assert!(arena.holds(first) && arena.holds(second));
        assert!(second.addr() >= first.addr() + 100);
        assert_eq!(shortages(), before + 2);
        assert!(arena.take(layout(SIZE, 1)).is_null());
        arena.give_back(first, 100);
        assert!(arena.take(layout(SIZE, 1)).is_null());
        arena.give_back(second, 100);
        assert_eq!(arena.take(layout(SIZE, 1)), arena.base());
    }

    #[test]
    fn the_block_handed_out_last_makes_room_at_once() {
        let arena = Arena::<SIZE>::new();
        let first = arena.take(layout(16, 16));
        for _ in 0..1000 {
            let block = arena.take(layout(1000, 16));
            assert_eq!(block, first.wrapping_add(16));
            arena.give_back(block, 1000);
        }
    }

    #[test]
    fn a_block_of_the_reserve_moves_to_malloc_as_soon_as_that_has_memory() {
        let block = ALLOCATOR.0.take(layout(4, 1));
        let before = shortages();
        // SAFETY: the block is 4 bytes long, then 40, and freed once.
        unsafe {
            block.copy_from_nonoverlapping(b"abcd".as_ptr(), 4);
            let grown = ALLOCATOR.realloc(block, layout(4, 1), 40);
            assert!(!ALLOCATOR.0.holds(grown));
            assert_eq!(std::slice::from_raw_parts(grown, 4), b"abcd");
            ALLOCATOR.dealloc(grown, layout(40, 1));
        }
        assert_eq!(shortages(), before);
    }
}

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

/// Counts one that nothing could help: a context that OpenSSL makes meanwhile may lack something.
pub(crate) fn note_shortage() {
    SHORTAGES.fetch_add(1, Ordering::Relaxed);
}

/// Memory that is handed out in blocks: short ones from one half, long ones from the other. What is
/// lost (the openssl crate loses some bytes when it meets a shortage) is lost, and no more.
pub(crate) struct Arena<const SHORT: usize, const LONG: usize> {
    short: Half<SHORT, 64>,
    long: Half<LONG, 1024>,
}

impl<const SHORT: usize, const LONG: usize> Arena<SHORT, LONG> {
    pub(crate) const fn new() -> Self {
        Arena { short: Half::new(), long: Half::new() }
    }

    /// Whether this is a block of the arena's.
    pub(crate) fn holds(&self, pointer: *const u8) -> bool {
        self.short.holds(pointer) || self.long.holds(pointer)
    }

    /// Hands out a block, and counts the shortage that made it necessary. NULL if there is no room.
    pub(crate) fn take(&self, layout: Layout) -> *mut u8 {
        note_shortage();
        let (size, align) = (layout.size(), layout.align());
        let short = (size <= 1024 && align <= 64).then(|| self.short.take(size)).flatten();
        let long = || (align <= 1024).then(|| self.long.take(size)).flatten();
        short.or_else(long).unwrap_or(std::ptr::null_mut())
    }

    /// Takes a block of this layout back.
    pub(crate) fn give_back(&self, pointer: *const u8, layout: Layout) {
        if self.short.holds(pointer) {
            self.short.give_back(pointer, layout.size());
        } else {
            self.long.give_back(pointer, layout.size());
        }
    }
}

/// Groups of 64 units of so many bytes, each aligned to its size, and a bit for each that is in use. A block lies within one
/// group, so that a single word says all about it and no lock is needed.
struct Half<const GROUPS: usize, const UNIT: usize> {
    memory: Memory<GROUPS, UNIT>,
    used: [AtomicU64; GROUPS],
}

#[repr(align(1024))]
struct Memory<const GROUPS: usize, const UNIT: usize>(UnsafeCell<[[[u8; UNIT]; 64]; GROUPS]>);

// SAFETY: the bytes are only handed out, each to one allocation at a time.
unsafe impl<const GROUPS: usize, const UNIT: usize> Sync for Memory<GROUPS, UNIT> {}

impl<const GROUPS: usize, const UNIT: usize> Half<GROUPS, UNIT> {
    const fn new() -> Self {
        let memory = Memory(UnsafeCell::new([[[0; UNIT]; 64]; GROUPS]));
        Half { memory, used: [const { AtomicU64::new(0) }; GROUPS] }
    }

    fn base(&self) -> *mut u8 {
        self.memory.0.get().cast()
    }

    fn holds(&self, pointer: *const u8) -> bool {
        let size = GROUPS * 64 * UNIT;
        (self.base().addr()..self.base().addr() + size).contains(&pointer.addr())
    }

    /// As many ones as the block has units; none if it is too long.
    fn units(size: usize) -> Option<u64> {
        let count = u32::try_from(size.div_ceil(UNIT)).ok().filter(|count| *count <= 64)?;
        Some(u64::MAX.checked_shr(64 - count).unwrap_or(0))
    }

    fn take(&self, size: usize) -> Option<*mut u8> {
        let units = Self::units(size)?;
        for (group, used) in self.used.iter().enumerate() {
            let mut first = 0;
            let taken = used.fetch_update(Ordering::AcqRel, Ordering::Acquire, |bits| {
                first = (0..=units.leading_zeros()).find(|shift| bits & units << shift == 0)?;
                Some(bits | units << first)
            });
            if taken.is_ok() {
                return Some(self.base().wrapping_add((group * 64 + first as usize) * UNIT));
            }
        }
        None
    }

    fn give_back(&self, pointer: *const u8, size: usize) {
        let unit = (pointer.addr() - self.base().addr()) / UNIT;
        if let (Some(used), Some(units)) = (self.used.get(unit / 64), Self::units(size)) {
            used.fetch_and(!(units << (unit % 64)), Ordering::AcqRel);
        }
    }
}

/// The system's allocator, and the reserve behind it: 384 KiB, far more than one call needs at a
/// time. Untouched, it costs address space only.
struct Allocator(Arena<32, 4>);

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
            self.0.give_back(pointer, layout);
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

    fn layout(size: usize, align: usize) -> Layout {
        Layout::from_size_align(size, align).unwrap()
    }

    #[test]
    fn blocks_do_not_overlap_and_their_room_is_free_again() {
        let arena = Arena::<1, 1>::new();
        let before = shortages();
        let long = arena.take(layout(60 * 1024, 8));
        let blocks: Vec<_> = (0..4).map(|_| arena.take(layout(1024, 64))).collect();
        assert!(blocks.iter().all(|block| arena.holds(*block) && block.addr() % 64 == 0));
        assert!(blocks.windows(2).all(|pair| pair[1].addr() >= pair[0].addr() + 1024));
        // The short half is full; the long one has 4 units left.
        let more: Vec<_> = (0..4).map(|_| arena.take(layout(1, 1))).collect();
        assert!(more.iter().all(|block| arena.long.holds(*block)));
        assert!(arena.take(layout(1, 1)).is_null());
        assert_eq!(shortages(), before + 10);
        arena.give_back(blocks[2], layout(1024, 64));
        assert_eq!(arena.take(layout(1000, 1)), blocks[2]);
        arena.give_back(long, layout(60 * 1024, 8));
        assert_eq!(arena.take(layout(60 * 1024, 8)), long);
    }

    #[test]
    fn what_is_too_long_is_refused_and_what_just_fits_is_not() {
        let arena = Arena::<1, 1>::new();
        assert!(arena.take(layout(64 * 1024 + 1, 1)).is_null());
        let all = arena.take(layout(64 * 1024, 1));
        assert!(arena.long.holds(all) && arena.take(layout(1025, 1)).is_null());
        arena.give_back(all, layout(64 * 1024, 1));
        assert_eq!(arena.take(layout(1025, 1)), all);
    }

    #[test]
    fn blocks_are_aligned_or_refused() {
        let arena = Arena::<1, 1>::new();
        for align in [1, 64, 128, 1024] {
            let block = arena.take(layout(1, align));
            assert!(!block.is_null() && block.addr().is_multiple_of(align));
        }
        assert!(arena.take(layout(1, 2048)).is_null());
    }

    #[test]
    fn what_is_lost_costs_nothing_else() {
        let arena = Arena::<1, 1>::new();
        arena.take(layout(8, 8));
        let block = arena.take(layout(500, 8));
        for _ in 0..1000 {
            arena.give_back(block, layout(500, 8));
            assert_eq!(arena.take(layout(500, 8)), block);
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

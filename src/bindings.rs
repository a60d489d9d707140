//! What the loader has bound an object's calls to. Where several objects export a function, neither
//! the order in which they were loaded nor who depends on whom tells which of them an object calls:
//! what was bound when does. Read from the object's own dynamic section, see elf(5).

#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_void};

use crate::loader::LinkMap;

/// `Elf64_Dyn`, in a section that ends with an entry without a tag.
#[repr(C)]
struct Dynamic {
    tag: i64,
    value: usize,
}

const DT_PLTRELSZ: i64 = 2;
const DT_STRTAB: i64 = 5;
const DT_SYMTAB: i64 = 6;
const DT_RELA: i64 = 7;
const DT_RELASZ: i64 = 8;
const DT_JMPREL: i64 = 23;

/// `Elf64_Rela`. The lower half of `info` is a type, the upper one the number of a symbol.
#[repr(C)]
struct Relocation {
    offset: usize,
    info: u64,
    addend: i64,
}

/// The types of those that the loader fills with the address of a function: R_*_JUMP_SLOT,
/// R_*_GLOB_DAT.
#[cfg(target_arch = "x86_64")]
const FUNCTIONS: [u64; 2] = [7, 6];
#[cfg(target_arch = "aarch64")]
const FUNCTIONS: [u64; 2] = [1026, 1025];

/// `Elf64_Sym`.
#[repr(C)]
struct Symbol {
    name: u32,
    kind: [u8; 4],
    value: usize,
    size: usize,
}

/// A loaded object's tables.
pub(crate) struct Bindings {
    load_address: usize,
    strings: *const c_char,
    symbols: *const Symbol,
    tables: [(*const Relocation, usize); 2],
}

impl Bindings {
    /// # Safety
    ///
    /// The link map is that of an object that stays loaded while the bindings are in use.
    pub(crate) unsafe fn of(map: &LinkMap) -> Option<Bindings> {
        let value = |wanted: i64| {
            let mut next = map.dynamic.cast::<Dynamic>();
            // SAFETY: the section of a loaded object is readable, and ends with DT_NULL.
            unsafe {
                while (*next).tag != 0 && (*next).tag != wanted {
                    next = next.add(1);
                }
                ((*next).tag != 0).then_some((*next).value)
            }
        };
        // The loader has made addresses of the offsets in there, if it could write there.
        let address = |tag: i64| {
            let is_offset = |value: usize| value < map.load_address;
            value(tag).map(|value| if is_offset(value) { value + map.load_address } else { value })
        };
        let table = |start: i64, size: i64| {
            let bytes = value(size).unwrap_or(0);
            let start = std::ptr::with_exposed_provenance(address(start).unwrap_or(0));
            (start, bytes / size_of::<Relocation>())
        };
        Some(Bindings {
            load_address: map.load_address,
            strings: std::ptr::with_exposed_provenance(address(DT_STRTAB)?),
            symbols: std::ptr::with_exposed_provenance(address(DT_SYMTAB)?),
            tables: [table(DT_JMPREL, DT_PLTRELSZ), table(DT_RELA, DT_RELASZ)],
        })
    }

    /// Where the functions are that the object calls by names with this beginning. What has not been
    /// called yet may be bound to the object itself: to what will look it up.
    pub(crate) fn functions(&self, beginning: &str) -> impl Iterator<Item = *const c_void> {
        let relocations = self.tables.iter().flat_map(|(table, length)| {
            // SAFETY: the tables are as long as the dynamic section says, and within the object.
            (0..*length).map(|number| unsafe { &*table.add(number) })
        });
        relocations
            .filter(|relocation| FUNCTIONS.contains(&(relocation.info & 0xffff_ffff)))
            .filter(move |relocation| self.name(relocation).starts_with(beginning.as_bytes()))
            .map(|relocation| {
                let slot = self.load_address.wrapping_add(relocation.offset);
                // SAFETY: the slot is within the object, and holds an address.
                unsafe { *std::ptr::with_exposed_provenance::<*const c_void>(slot) }
            })
    }

    fn name(&self, relocation: &Relocation) -> &[u8] {
        let number = (relocation.info >> 32) as usize;
        // SAFETY: a relocation refers to a symbol of the object's, and that to a C string of its.
        unsafe {
            let symbol = &*self.symbols.add(number);
            CStr::from_ptr(self.strings.add(symbol.name as usize)).to_bytes()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::c_void;

    use crate::loader::Object;

    #[test]
    fn calls_are_bound_to_who_exports_the_function() {
        let here = Object::containing(calls_are_bound_to_who_exports_the_function as *const c_void);
        let here = here.unwrap();
        let libc = Object::containing(libc::getpid as *const c_void).unwrap();
        let bound: Vec<_> =
            here.bindings().unwrap().functions("getpid").filter_map(Object::containing).collect();
        assert!(!bound.is_empty());
        assert!(bound.iter().all(|object| object.base == libc.base));
        assert_eq!(here.bindings().unwrap().functions("no such name").count(), 0);
    }
}

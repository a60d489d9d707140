//! The dynamic loader: which object an address belongs to, what is found in it and behind it, and
//! whether anything was loaded or unloaded since. It never loads anything.

#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr::NonNull;

use crate::bindings::Bindings;

/// A loaded object, as the dynamic loader knows it.
pub(crate) struct Object {
    /// Where it is loaded: what tells one object from another.
    pub(crate) base: *const c_void,
    /// Points into the loader's own list. The main program's name is empty there.
    name: *const c_char,
    map: *const LinkMap,
}

impl Object {
    /// The object that an address lies in.
    pub(crate) fn containing(address: *const c_void) -> Option<Object> {
        let mut info = std::mem::MaybeUninit::<libc::Dl_info>::zeroed();
        let mut map: *mut LinkMap = std::ptr::null_mut();
        // SAFETY: dladdr1 only looks the address up; both out parameters are valid for it, and
        // with RTLD_DL_LINKMAP the last one receives a pointer to the loader's link map.
        let found = unsafe {
            dladdr1(
                address,
                info.as_mut_ptr(),
                (&raw mut map).cast::<*mut c_void>(),
                RTLD_DL_LINKMAP,
            )
        };
        if found == 0 || map.is_null() {
            return None;
        }
        // SAFETY: dladdr1 filled info, and the link map of a loaded object is readable.
        unsafe { Some(Object { base: info.assume_init().dli_fbase, name: (*map).name, map }) }
    }

    /// What its calls are bound to. It must stay loaded meanwhile.
    pub(crate) fn bindings(&self) -> Option<Bindings> {
        // SAFETY: the link map of a loaded object is readable.
        unsafe { Bindings::of(&*self.map) }
    }
}

/// The documented beginning of glibc's `struct link_map` (link.h).
#[repr(C)]
pub(crate) struct LinkMap {
    pub(crate) load_address: usize,
    name: *const c_char,
    /// Its dynamic section.
    pub(crate) dynamic: *const c_void,
}

const RTLD_DL_LINKMAP: c_int = 2;

unsafe extern "C" {
    fn dladdr1(
        address: *const c_void,
        info: *mut libc::Dl_info,
        extra: *mut *mut c_void,
        flags: c_int,
    ) -> c_int;
}

/// A counted handle to a loaded object, for looking into it and its dependencies.
pub(crate) struct Library(NonNull<c_void>);

impl Library {
    /// Opens an object that is loaded already; it never loads one.
    pub(crate) fn open(object: &Object) -> Option<Library> {
        // SAFETY: the name comes from the loader's list and is a C string there.
        let is_main_program = object.name.is_null() || unsafe { *object.name } == 0;
        let name = if is_main_program { std::ptr::null() } else { object.name };
        // SAFETY: NULL, or the C string.
        unsafe { Library::open_by_name(name) }
    }

    /// # Safety
    ///
    /// `name` is NULL, for the main program, or a C string.
    unsafe fn open_by_name(name: *const c_char) -> Option<Library> {
        // SAFETY: dlopen takes NULL or a C string; RTLD_NOLOAD keeps it from loading anything or
        // running anyone's constructors.
        NonNull::new(unsafe { libc::dlopen(name, libc::RTLD_LAZY | libc::RTLD_NOLOAD) })
            .map(Library)
    }

    /// Looks a symbol up, by a name that ends in NUL, here and then in the dependencies.
    pub(crate) fn symbol(&self, name: &str) -> Option<NonNull<c_void>> {
        symbol_in(self.0.as_ptr(), name)
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        // SAFETY: the handle came from dlopen and is closed once.
        unsafe { libc::dlclose(self.0.as_ptr()) };
    }
}

/// Looks a symbol up, by a name that ends in NUL, in the objects behind us, and then in the whole
/// global scope.
pub(crate) fn symbol_in_scope(name: &str) -> Option<NonNull<c_void>> {
    symbol_in(libc::RTLD_NEXT, name).or_else(|| symbol_in(libc::RTLD_DEFAULT, name))
}

/// All that a symbol's name, which ends in NUL, stands for in this process: objects may be loaded
/// privately (RTLD_LOCAL) and have symbols of the same name.
pub(crate) fn symbols_anywhere(name: &str) -> BTreeSet<NonNull<c_void>> {
    let mut objects = Vec::<CString>::new();
    // SAFETY: the callback gets the pointer that is passed here, and uses it as what it is.
    unsafe { libc::dl_iterate_phdr(Some(note_name), (&raw mut objects).cast()) };
    // They are opened only now: the callback runs under one of the loader's locks.
    // SAFETY: C strings.
    let open = |name: &CString| unsafe { Library::open_by_name(name.as_ptr()) };
    objects.iter().filter_map(open).filter_map(|library| library.symbol(name)).collect()
}

unsafe extern "C" fn note_name(
    info: *mut libc::dl_phdr_info,
    _size: usize,
    objects: *mut c_void,
) -> c_int {
    // SAFETY: dl_iterate_phdr passes a valid info, whose name is a C string, and the pointer that
    // it was given.
    let (name, objects) =
        unsafe { (CStr::from_ptr((*info).dlpi_name), &mut *objects.cast::<Vec<CString>>()) };
    objects.push(name.to_owned());
    0 // go on
}

fn symbol_in(handle: *mut c_void, name: &str) -> Option<NonNull<c_void>> {
    let name = CStr::from_bytes_with_nul(name.as_bytes()).ok()?;
    // SAFETY: the handle is open or one of the loader's own, the name a C string.
    NonNull::new(unsafe { libc::dlsym(handle, name.as_ptr()) })
}

/// How many objects were loaded and unloaded so far. While it stays the same, so does whatever the
/// loader answered.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Generation {
    loaded: u64,
    unloaded: u64,
}

/// Asks the loader; fast, because only the first object is looked at.
pub(crate) fn generation() -> Generation {
    let mut generation = Generation { loaded: 0, unloaded: 0 };
    // SAFETY: the callback gets the pointer that is passed here, and uses it as what it is.
    unsafe { libc::dl_iterate_phdr(Some(note_generation), (&raw mut generation).cast()) };
    generation
}

unsafe extern "C" fn note_generation(
    info: *mut libc::dl_phdr_info,
    _size: usize,
    generation: *mut c_void,
) -> c_int {
    // SAFETY: dl_iterate_phdr passes a valid info (with these fields since glibc 2.4), and the
    // pointer that it was given.
    unsafe {
        generation
            .cast::<Generation>()
            .write(Generation { loaded: (*info).dlpi_adds, unloaded: (*info).dlpi_subs });
    }
    1 // enough
}

//! The process we are loaded into: its environment, its threads, its forks and its exit.

#![allow(unsafe_code)]

use std::ffi::{CStr, CString, OsStr, OsString, c_char, c_int, c_void};
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow};

unsafe extern "C" {
    fn secure_getenv(name: *const c_char) -> *const c_char;
}

/// The value of an environment variable, unless the process runs with more rights than its user.
pub(crate) fn environment_variable(name: &CStr) -> Option<OsString> {
    // SAFETY: the name is a C string.
    let value = unsafe { secure_getenv(name.as_ptr()) };
    if value.is_null() {
        return None;
    }
    // SAFETY: the environment's values are C strings; it is copied at once, as getenv demands.
    let value = unsafe { CStr::from_ptr(value) };
    Some(OsStr::from_bytes(value.to_bytes()).to_owned())
}

/// Makes a C string that is never freed; of a text with a zero byte, none.
pub(crate) fn leak_c_string(text: &OsStr) -> Option<&'static CStr> {
    let text = CString::new(text.as_bytes()).ok()?;
    Some(Box::leak(text.into_boxed_c_str()))
}

/// Starts a detached thread with all signals blocked, which it inherits. Not by the standard library:
/// its threads begin by registering destructors, for which they wait for the loader's lock.
pub(crate) fn start_thread(
    name: &CStr,
    stack_size: usize,
    body: extern "C" fn(*mut c_void) -> *mut c_void,
) -> Result<(), Errno> {
    let mask = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
    let mut thread = MaybeUninit::uninit();
    let mut attributes = MaybeUninit::uninit();
    // SAFETY: the attributes are initialized before they are used, and destroyed afterwards; the
    // body takes any argument, and, as this library is never unloaded, stays; the thread is named
    // only if there is one.
    let result = unsafe {
        libc::pthread_attr_init(attributes.as_mut_ptr());
        libc::pthread_attr_setstacksize(attributes.as_mut_ptr(), stack_size);
        libc::pthread_attr_setdetachstate(attributes.as_mut_ptr(), libc::PTHREAD_CREATE_DETACHED);
        let argument = std::ptr::null_mut();
        let result = libc::pthread_create(thread.as_mut_ptr(), attributes.as_ptr(), body, argument);
        libc::pthread_attr_destroy(attributes.as_mut_ptr());
        if result == 0 {
            libc::pthread_setname_np(thread.assume_init(), name.as_ptr());
        }
        result
    };
    mask.thread_set_mask()?;
    if result == 0 { Ok(()) } else { Err(Errno::from_raw(result)) }
}

/// Has this called when this thread ends before the process does: one thread of a process, once.
/// Without memory for that, it is not.
pub(crate) fn on_end_of_this_thread(function: unsafe extern "C" fn(*mut c_void)) {
    static MADE: AtomicBool = AtomicBool::new(false);
    if MADE.swap(true, Relaxed) {
        return; // a forked child inherits it
    }
    let mut key = 0;
    // SAFETY: the key is made before it is used; its value is not NULL, so that the function is
    // called, and never looked at.
    unsafe {
        if libc::pthread_key_create(&raw mut key, Some(function)) == 0 {
            libc::pthread_setspecific(key, std::ptr::without_provenance(1));
        }
    }
}

/// Has these called around every fork(): before it, after it in the parent, after it in the child.
/// False if there is no memory for that.
pub(crate) fn on_fork(
    before: unsafe extern "C" fn(),
    in_parent: unsafe extern "C" fn(),
    in_child: unsafe extern "C" fn(),
) -> bool {
    // SAFETY: the functions take nothing and, as this library is never unloaded, stay.
    unsafe { libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child)) == 0 }
}

/// Has this called when the process exits in good order. False if there is no memory for that.
pub(crate) fn on_exit(function: extern "C" fn()) -> bool {
    // SAFETY: the function takes nothing and, as this library is never unloaded, stays.
    unsafe { libc::atexit(function) == 0 }
}

/// Closes a descriptor that nothing of ours stands for any more, if it is one.
pub(crate) fn close(descriptor: c_int) {
    if descriptor >= 0 {
        // SAFETY: close takes any number; what it is, the caller knows.
        unsafe { libc::close(descriptor) };
    }
}

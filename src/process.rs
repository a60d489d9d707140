//! The process we are loaded into: its environment, its forks and its exit.

#![allow(unsafe_code)]

use std::ffi::{CStr, CString, OsStr, OsString, c_char, c_int};
use std::os::unix::ffi::OsStrExt;

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

/// Has these called around every fork(): before it, after it in the parent, after it in the child.
/// False if there is no memory for that.
pub(crate) fn on_fork(
    before: extern "C" fn(),
    in_parent: extern "C" fn(),
    in_child: extern "C" fn(),
) -> bool {
    // SAFETY: the functions take nothing and, as this library is never unloaded, stay.
    let result = unsafe {
        libc::pthread_atfork(Some(raw(before)), Some(raw(in_parent)), Some(raw(in_child)))
    };
    result == 0
}

fn raw(function: extern "C" fn()) -> unsafe extern "C" fn() {
    function
}

/// Has this called when the process exits in good order. False if there is no memory for that.
pub(crate) fn on_exit(function: extern "C" fn()) -> bool {
    // SAFETY: the function takes nothing and, as this library is never unloaded, stays.
    let result: c_int = unsafe { libc::atexit(function) };
    result == 0
}

/// Closes a descriptor that nothing of ours stands for any more, if it is one.
pub(crate) fn close(descriptor: c_int) {
    if descriptor >= 0 {
        // SAFETY: close takes any number; what it is, the caller knows.
        unsafe { libc::close(descriptor) };
    }
}

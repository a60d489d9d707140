//! What the session's own TLS connection tells that libpq does not: the group of its key exchange.
//! For that the OpenSSL is asked which the program's libpq uses.

#![allow(unsafe_code)]

use std::ffi::{c_int, c_long, c_void};
use std::ptr::NonNull;

use crate::host::Host;
use crate::params::Group;

/// Numbers of OpenSSL's that never change (ssl.h, obj_mac.h, RFC 8446).
const SSL_CTRL_GET_NEGOTIATED_GROUP: c_int = 134;
const NID_X9_62_PRIME256V1: c_long = 415;
const NID_SECP384R1: c_long = 715;
const NID_SECP521R1: c_long = 716;
const NID_X25519: c_long = 1034;
const NID_X448: c_long = 1035;
/// Set in the number of a group that OpenSSL knows by its TLS number only.
const TLSEXT_NID_UNKNOWN: c_long = 0x0100_0000;
const X25519MLKEM768: c_long = 0x11ec;

/// `SSL_get_negotiated_group`, which OpenSSL has from 3.0 on; before, `SSL_ctrl` answers 0.
///
/// # Safety
///
/// `ssl` is the live `SSL` object of a connection of this libpq's, and no other thread uses it.
pub(crate) unsafe fn negotiated_group(host: &Host, ssl: NonNull<c_void>) -> Option<Group> {
    type Ctrl = unsafe extern "C" fn(*mut c_void, c_int, c_long, *mut c_void) -> c_long;
    let symbol = host.library()?.symbol("SSL_ctrl\0")?;
    // SAFETY: the symbol comes from what the libpq depends on, whose function of this name has this
    // type since there is OpenSSL.
    let ctrl = unsafe { std::mem::transmute::<*mut c_void, Ctrl>(symbol.as_ptr()) };
    // SAFETY: the caller's promise; this command only reads.
    let number =
        unsafe { ctrl(ssl.as_ptr(), SSL_CTRL_GET_NEGOTIATED_GROUP, 0, std::ptr::null_mut()) };
    match number {
        NID_X9_62_PRIME256V1 => Some(Group::P256),
        NID_SECP384R1 => Some(Group::P384),
        NID_SECP521R1 => Some(Group::P521),
        NID_X25519 => Some(Group::X25519),
        NID_X448 => Some(Group::X448),
        _ if number == TLSEXT_NID_UNKNOWN | X25519MLKEM768 => Some(Group::X25519MlKem768),
        _ => None,
    }
}

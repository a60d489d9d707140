//! Addresses of any bytes and any text.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pqcancel::address::{Address, inet_aton, ip_address};

fuzz_target!(|bytes: &[u8]| {
    if let Some(address) = Address::from_sockaddr(bytes) {
        assert_eq!(address.is_local(), address.ip().is_none());
    }
    if let Ok(text) = std::str::from_utf8(bytes) {
        if let Ok(ip) = text.parse() {
            assert_eq!(inet_aton(text), Some(ip));
        }
        assert_eq!(inet_aton(text).is_some(), ip_address(text).is_some_and(|ip| ip.is_ipv4()));
    }
});

//! Prints include/pqcancel.h as generated from src/ffi.rs: what `make header` writes.

use std::io::Write;

fn main() -> std::io::Result<()> {
    std::io::stdout().write_all(include_bytes!(concat!(env!("OUT_DIR"), "/pqcancel.h")))
}

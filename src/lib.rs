//! Encrypted, non-blocking PostgreSQL query cancellation for any libpq: the cancel API of libpq
//! 17 and 18 as one shared library with a C interface.
//!
//! The way of a cancel request, top down: [`ffi`] takes the C call; [`host`] finds the libpq that
//! made the session and [`target`] takes a snapshot of it; [`cancel_conn`] drives the protocol
//! ([`machine`]) over a [`link`], which is a [`socket`] and over it [`tls`] or [`gss`].
//!
//! Of the old functions, `legacy` makes and frees what PQcancel needs; `signal_safe` is PQcancel,
//! and hands the request of an encrypted session over to the `courier`, a thread that drives a
//! [`cancel_conn`] for it.
//!
//! C programs use `include/pqcancel.h`. The Rust form exists for tests and fuzzing and promises
//! nothing.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic))]

pub mod abi;
pub mod address;
mod bindings;
pub mod cancel_conn;
pub mod cipher;
mod courier;
pub mod error;
#[allow(non_snake_case, clippy::missing_safety_doc)]
pub mod ffi;
pub mod gss;
pub mod gssapi;
mod guard;
pub mod host;
pub mod host_layout;
mod host_tls;
mod known_contexts;
mod known_sessions;
mod legacy;
pub mod link;
mod loader;
pub mod machine;
pub mod message;
mod openssl_memory;
pub mod params;
mod process;
mod recent;
mod reserve;
mod settings;
mod signal_safe;
pub mod socket;
pub mod target;
pub mod tls;
mod tls_context;
mod tls_files;
mod trace;
pub mod verify;

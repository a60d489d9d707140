//! Makes what is generated: the declarations of libpq-fe.h for `src/host.rs`, the C header, and
//! how the shared library is linked.

// A build script reports by panicking.
#![allow(clippy::expect_used)]

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    declare_libpq(&out.join("libpq_fe.rs"));
    write_header(&out.join("pqcancel.h"));
    link_unwinder();
    link_shared_library();
}

/// libpq-fe.h as the build machine has it (13 or later). Only declarations: nothing links libpq.
fn declare_libpq(output: &Path) {
    let libpq = pkg_config::Config::new()
        .cargo_metadata(false)
        .atleast_version("13")
        .probe("libpq")
        .expect("libpq-fe.h of libpq 13 or later (Debian: libpq-dev)");
    let includes = libpq.include_paths.iter().map(|path| format!("-I{}", path.display()));
    bindgen::Builder::default()
        .header_contents("libpq.h", "#include <libpq-fe.h>")
        .clang_args(includes)
        .allowlist_function("PQ.*")
        .allowlist_type("PG.*|PQ.*|ConnStatusType|PostgresPollingStatusType|pg_cancel")
        .blocklist_function("PQ.*print.*|PQtrace|PQuntrace|PQcancel(Create|Start|Poll|Blocking|Status|Socket|ErrorMessage|Reset|Finish)")
        .layout_tests(false)
        .generate_comments(false)
        .rust_edition(bindgen::RustEdition::Edition2024)
        .generate()
        .expect("declarations from libpq-fe.h (Debian: libclang-dev)")
        .write_to_file(output)
        .expect("declarations written");
}

fn write_header(output: &Path) {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).expect("cbindgen.toml");
    cbindgen::Builder::new()
        .with_config(config)
        .with_src(root.join("src/ffi.rs"))
        .generate()
        .expect("the header from src/ffi.rs")
        .write_to_file(output);
    println!("cargo:rerun-if-changed=src/ffi.rs");
    println!("cargo:rerun-if-changed=cbindgen.toml");
    println!("cargo:rerun-if-changed=build.rs");
}

/// The guard's unwinder out of the compiler's archive, where it has one. Otherwise every program that
/// we are preloaded into would load libgcc_s for us, a fifth of what loading us takes.
fn link_unwinder() {
    let compiler = env::var_os("CC").unwrap_or_else(|| "cc".into());
    let found = Command::new(compiler).arg("-print-file-name=libgcc_eh.a").output();
    let path = found.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    let archive = path.map(PathBuf::from).unwrap_or_default();
    if let (true, Some(directory)) = (archive.is_absolute(), archive.parent()) {
        println!("cargo:rustc-link-search=native={}", directory.display());
        println!("cargo:rustc-link-lib=static:-bundle=gcc_eh");
    }
}

/// rustc exports the functions marked no_mangle and hides everything else, OpenSSL included.
/// The library is never unloaded: OpenSSL and a libpq may still hold on to it.
fn link_shared_library() {
    let mut arguments = vec!["-soname,libpqcancel.so.1", "-z,nodelete"];
    // OpenSSL's tables take 26,000 relocations, a tenth of the file.
    if has_packed_relocations() {
        arguments.push("-z,pack-relative-relocs");
    }
    for argument in arguments {
        println!("cargo:rustc-cdylib-link-arg=-Wl,{argument}");
    }
}

/// Whether the C library can read them: glibc from 2.36 on. (A linker that cannot write them says so
/// and goes on.)
fn has_packed_relocations() -> bool {
    let is_native = env::var_os("HOST") == env::var_os("TARGET");
    let told = Command::new("getconf").arg("GNU_LIBC_VERSION").output();
    let told = told.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let version = told.unwrap_or_default();
    let minor = version.trim().strip_prefix("glibc 2.").and_then(|minor| minor.parse().ok());
    is_native && minor.is_some_and(|minor: u32| minor >= 36)
}

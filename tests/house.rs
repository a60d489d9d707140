//! Rules of the house that no compiler checks: generated files are current, the state machine
//! stays free of I/O, unsafe code stays in its rooms.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn source(name: &str) -> String {
    fs::read_to_string(root().join("src").join(name)).unwrap()
}

/// Every file below src, by its path from there.
fn source_names() -> Vec<String> {
    let source = root().join("src");
    let (mut folders, mut names) = (vec![source.clone()], vec![]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                names.push(path.strip_prefix(&source).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    names
}

#[test]
fn the_committed_header_is_the_generated_one() {
    let committed = fs::read_to_string(root().join("include/pqcancel.h")).unwrap();
    let generated = include_str!(concat!(env!("OUT_DIR"), "/pqcancel.h"));
    assert!(committed == generated, "include/pqcancel.h is stale: run `make header`");
}

#[test]
fn the_state_machine_and_the_messages_know_nothing_of_the_world() {
    let allowed = ["crate::error::", "crate::message::", "crate::params::", "zeroize::", "super::"];
    for name in ["machine.rs", "message.rs"] {
        for line in source(name).lines().map(str::trim) {
            let Some(path) = line.strip_prefix("use ") else { continue };
            let local = ["Event::", "Turn::"].iter().any(|own| path.starts_with(own));
            let known = allowed.iter().any(|module| path.starts_with(module));
            assert!(local || known, "{name}: {line}");
        }
        for forbidden in
            ["std::net", "std::fs", "std::io", "std::time", "std::env", "nix::", "openssl::"]
        {
            assert!(!source(name).contains(forbidden), "{name}: {forbidden}");
        }
    }
}

#[test]
fn unsafe_code_is_in_these_files_only() {
    let allowed = [
        "bin/pqcancel/doctor/functions.rs",
        "bin/pqcancel/doctor/libpq.rs",
        "bin/pqcancel/doctor/pqcancel.rs",
        "bin/pqcancel/main.rs", // the name `main`
        "bindings.rs",
        "ffi.rs",
        "gssapi.rs",
        "host.rs",
        "host_layout.rs",
        "host_tls.rs",
        "legacy.rs",
        "loader.rs",
        "openssl_memory.rs",
        "process.rs",
        "reserve.rs",
        "signal_safe.rs",
        "signal_safe/handover.rs",
        "signal_safe/plaintext.rs",
        "signal_safe/words.rs",
    ];
    for name in source_names() {
        let has_unsafe = source(&name).lines().any(|line| {
            let code = line.split("//").next().unwrap_or_default();
            code.contains("unsafe ") || code.contains("allow(unsafe_code)")
        });
        assert_eq!(has_unsafe, allowed.contains(&name.as_str()), "{name}");
    }
}

#[test]
fn no_file_and_no_function_outgrows_a_reader() {
    for name in source_names() {
        let text = source(&name);
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        let lines = code.lines().count();
        assert!(lines <= 500, "{name} has {lines} lines without its tests");
        let mut function: Option<(usize, &str)> = None;
        for (number, line) in code.lines().enumerate() {
            let word = line.trim_start();
            let begins = ["fn ", "pub fn ", "pub(crate) fn ", "unsafe fn ", "pub unsafe fn "];
            if begins.iter().any(|b| word.starts_with(b)) && line.ends_with('{') {
                function = Some((number, line));
            }
            let ends = line == "}" || line == "    }";
            if let Some((start, head)) = function.take_if(|_| ends) {
                assert!(number - start <= 60, "{name}: {head} has {} lines", number - start);
            }
        }
    }
}

#[test]
fn the_readme_shows_the_program_that_the_demo_runs() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let program = fs::read_to_string(root().join("demo/cancel.c")).unwrap();
    let shown = readme.split("```c\n").nth(1).and_then(|rest| rest.split("```").next());
    assert_eq!(shown, Some(program.as_str()), "README.md and demo/cancel.c differ");
}

#[test]
fn both_commands_are_in_the_readme() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    for command in ["make demo", "make test"] {
        assert!(readme.contains(command), "{command}");
    }
    assert!(Path::new(&root().join(".ci/run")).exists());
}

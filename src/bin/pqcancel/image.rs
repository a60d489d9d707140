//! What kind of executable a file holds, as far as its headers tell.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The kernel looks at this much to tell what a file is (BINPRM_BUF_SIZE).
const HEAD_SIZE: u64 = 256;

/// In the ELF64 header: class and byte order; machine; the program headers' place, size and number.
const IDENT: std::ops::Range<usize> = 4..6;
const MACHINE: std::ops::Range<usize> = 18..20;
const HEADERS_AT: usize = 32;
const HEADER_SIZE_AT: usize = 54;
const HEADER_COUNT_AT: usize = 56;
/// An ELF64 program header, which begins with its type. PT_INTERP names the dynamic loader.
const HEADER_SIZE: u16 = 56;
const PT_INTERP: u32 = 3;

pub(crate) enum Image {
    Script {
        interpreter: PathBuf,
    },
    /// An ELF file for another machine, or another class of this one.
    Foreign,
    /// Without a dynamic loader: a program that is linked statically, or a shared library.
    Static,
    Dynamic,
    /// None of these, or not to be read.
    Unknown,
}

impl Image {
    pub(crate) fn of(path: &Path) -> Self {
        Self::read(path).ok().flatten().unwrap_or(Self::Unknown)
    }

    fn read(path: &Path) -> io::Result<Option<Self>> {
        if !fs::metadata(path)?.is_file() {
            return Ok(None); // opening a FIFO would wait for a writer
        }
        let file = File::open(path)?;
        let head = head(&file)?;
        if let Some(line) = head.strip_prefix(b"#!") {
            return Ok(script(line));
        }
        if !head.starts_with(b"\x7fELF") {
            return Ok(None);
        }
        let ours = self::head(&File::open("/proc/self/exe")?)?;
        if head.get(IDENT) != ours.get(IDENT) || head.get(MACHINE) != ours.get(MACHINE) {
            return Ok(Some(Self::Foreign));
        }
        Ok(Some(if has_loader(&file, &head)? { Self::Dynamic } else { Self::Static }))
    }
}

fn head(file: &File) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    file.take(HEAD_SIZE).read_to_end(&mut head)?;
    Ok(head)
}

/// The line behind `#!`: the interpreter's path, and perhaps an argument.
fn script(line: &[u8]) -> Option<Image> {
    let line = line.split(|byte| *byte == b'\n').next()?;
    let path = line.split(|byte| b" \t\0".contains(byte)).find(|word| !word.is_empty())?;
    Some(Image::Script { interpreter: OsStr::from_bytes(path).into() })
}

fn has_loader(file: &File, head: &[u8]) -> io::Result<bool> {
    let (Some(start), Some(HEADER_SIZE), Some(count)) = (
        array(head, HEADERS_AT).map(u64::from_ne_bytes),
        array(head, HEADER_SIZE_AT).map(u16::from_ne_bytes),
        array(head, HEADER_COUNT_AT).map(u16::from_ne_bytes),
    ) else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    let mut headers = vec![0; usize::from(HEADER_SIZE) * usize::from(count)];
    file.read_exact_at(&mut headers, start)?;
    let mut headers = headers.chunks_exact(HEADER_SIZE.into());
    Ok(headers.any(|header| header.starts_with(&PT_INTERP.to_ne_bytes())))
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

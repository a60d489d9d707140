//! What PQcancel says, to the caller and to the trace, made without an allocator. Reachable from a
//! signal handler: nothing here allocates, locks or panics.

#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int};
use std::sync::atomic::AtomicPtr;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use super::{clock, errno, set_errno};

/// The recommended size of PQcancel's error buffer.
pub(crate) const MESSAGE_SIZE: usize = 256;

/// Why PQcancel returns 0, in libpq's words where it has some.
pub(super) enum Failure {
    /// As it is: libpq ends these without a newline.
    Bare(&'static [u8]),
    /// To be ended with a newline, as everything below.
    Line(&'static [u8]),
    /// To be followed by the error number: strerror may not be called in a handler.
    Errno(&'static [u8], c_int),
    /// A socket option that could not be set, and the error number.
    Option(&'static [u8], c_int),
    Message(Message),
    /// The host has written it.
    Written,
}

/// A message without its newline, ended by a zero byte unless it is as long as can be.
#[derive(Clone)]
pub(crate) struct Message(pub(super) [u8; MESSAGE_SIZE]);

impl Message {
    /// As much of a text as fits.
    pub(crate) fn new(text: &str) -> Message {
        let mut message = Message([0; MESSAGE_SIZE]);
        for (to, from) in message.0.iter_mut().zip(text.trim_end().bytes()) {
            *to = from;
        }
        message
    }
}

/// The caller's buffer.
pub(super) struct Errbuf {
    pub(super) start: *mut u8,
    pub(super) size: usize,
}

impl Failure {
    /// What it says, and how much of that is the opening: libpq ends a message in a newline where
    /// the buffer has room for the opening and that.
    fn words(&self) -> (Line, usize) {
        let mut line = Line::empty();
        let opening = match self {
            Failure::Bare(text) => {
                line.text(text);
                usize::MAX // never
            }
            Failure::Line(text) => line.text(text).length.min(1),
            Failure::Message(message) => {
                let text = message.0.split(|byte| *byte == 0).next().unwrap_or_default();
                line.text(text).length.min(1)
            }
            Failure::Errno(text, number) => line.text(text).and_error(*number),
            Failure::Option(name, number) => {
                line.text(b"PQcancel() -- setsockopt(").text(name).text(b") failed: ");
                line.and_error(*number)
            }
            Failure::Written => line.text(b"as libpq told").length,
        };
        (line, opening)
    }

    /// Cut short where the buffer is small.
    pub(super) fn write_to(&self, errbuf: &Errbuf) {
        let (line, opening) = self.words();
        let has_room = opening.checked_add(2).is_some_and(|needed| needed <= errbuf.size);
        if !matches!(self, Failure::Written) {
            errbuf.put(&line, if has_room { b"\n" } else { b"" });
        }
    }

    /// The last line of a PQcancel's trace.
    pub(super) fn trace(&self, line: &mut Line) {
        line.text(b": ").text(self.words().0.as_bytes());
    }
}

impl Errbuf {
    /// Writes as much of a line as fits in front of its ending and a zero byte.
    fn put(&self, line: &Line, ending: &[u8]) {
        let Some(room) = self.size.checked_sub(ending.len() + 1) else {
            return;
        };
        let text = line.as_bytes().iter().take(room).chain(ending).chain(b"\0");
        for (offset, byte) in text.enumerate() {
            // SAFETY: at most room, the ending and one byte more, which is the buffer's size.
            unsafe { self.start.add(offset).write(*byte) };
        }
    }
}

/// A line of text, made without an allocator. What does not fit is left out.
pub(crate) struct Line {
    bytes: [u8; 512],
    length: usize,
}

impl Line {
    pub(super) const fn empty() -> Line {
        Line { bytes: [0; 512], length: 0 }
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }

    /// Appends a text.
    pub(crate) fn text(&mut self, text: &[u8]) -> &mut Line {
        // One byte is kept for the newline.
        let room = self.bytes.iter_mut().skip(self.length).rev().skip(1).rev();
        self.length += room.zip(text).map(|(to, from)| *to = *from).count();
        self
    }

    /// Appends a number in decimal.
    pub(crate) fn number(&mut self, number: u64) -> &mut Line {
        self.padded(number, 1)
    }

    /// Appends an error number; tells how long the line was before.
    fn and_error(&mut self, number: c_int) -> usize {
        let opening = self.length;
        self.text(b"error ").number(u64::from(number.unsigned_abs()));
        opening
    }

    fn padded(&mut self, mut number: u64, width: usize) -> &mut Line {
        let mut digits = [b'0'; 20];
        let mut used = 0;
        for digit in digits.iter_mut().rev() {
            *digit = b'0' + (number % 10) as u8;
            number /= 10;
            used += 1;
            if number == 0 && used >= width {
                break;
            }
        }
        self.text(digits.get(digits.len() - used..).unwrap_or_default())
    }

    /// Begins a line of the trace.
    pub(crate) fn begin() -> Line {
        let (time, mut line) = (clock(libc::CLOCK_REALTIME), Line::empty());
        // SAFETY: getpid takes nothing.
        let process = unsafe { libc::getpid() }.unsigned_abs();
        line.text(b"pqcancel[").number(u64::from(process)).text(b"] ");
        line.number(time / 1_000_000_000).text(b".").padded(time / 1000 % 1_000_000, 6).text(b" ");
        line
    }

    /// Writes the line to the trace, at once and whole.
    pub(crate) fn end(&mut self) {
        let path = TRACE.load(Acquire);
        if path.is_null() {
            return;
        }
        // What it says comes from outside in parts, and it is one line all the same.
        self.bytes
            .iter_mut()
            .take(self.length)
            .filter(|byte| byte.is_ascii_control())
            .for_each(|byte| *byte = b' ');
        if let Some(last) = self.bytes.get_mut(self.length) {
            *last = b'\n';
            self.length += 1;
        }
        let (kept, line) = (errno(), self.as_bytes());
        // SAFETY: the path is a C string that is never freed, the line is as long as it says, and
        // what is opened is closed once.
        unsafe {
            if *path == 0 {
                libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), line.len());
            } else {
                let flags = libc::O_WRONLY | libc::O_APPEND | libc::O_CREAT | libc::O_CLOEXEC;
                let file = libc::open(path, flags | libc::O_NOCTTY, 0o600);
                if file >= 0 {
                    libc::write(file, line.as_ptr().cast(), line.len());
                    libc::close(file);
                }
            }
        }
        set_errno(kept);
    }
}

/// The file that the trace is written to; an empty name is stderr, NULL is none.
static TRACE: AtomicPtr<c_char> = AtomicPtr::new(std::ptr::null_mut());

/// Whether anyone wants to know.
pub(crate) fn is_traced() -> bool {
    !TRACE.load(Relaxed).is_null()
}

/// From now on the trace is written to stderr.
pub(crate) fn trace_to_stderr() {
    TRACE.store(c"".as_ptr().cast_mut(), Release);
}

/// From now on the trace is appended to this file.
pub(crate) fn trace_to_file(path: &'static CStr) {
    TRACE.store(path.as_ptr().cast_mut(), Release);
}

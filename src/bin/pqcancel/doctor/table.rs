//! The page that is shown: everything aligned, and nothing wider than WIDTH but what is one word.

use std::path::Path;

use super::advice::Verdict;
use super::examination::{Attempt, Examined};
use super::facts::{Findings, milliseconds};
use super::protection::{Encryption, Protection, Route};
use super::query::End;
use super::wire::Request;

const WIDTH: usize = 96;
/// Where the second column begins.
const MARGIN: usize = 13;
/// The left one of the two columns of bytes.
const LEFT: usize = 44;
const BYTES_IN_ROW: usize = 8;
const KEY_BYTES_IN_ROW: usize = 4;
/// Of a request none takes more, unless its key is longer than those of today.
const MOST_ROWS: usize = 10;

pub(crate) fn page(findings: &Findings) -> String {
    let mut lines = Vec::new();
    let openssl = findings.openssl.as_deref().unwrap_or("OpenSSL");
    row(&mut lines, "pqcancel", &format!("{} with {openssl}", env!("CARGO_PKG_VERSION")));
    row(&mut lines, "", &name(&findings.library));
    row(&mut lines, "libpq", &findings.libpq_version);
    row(&mut lines, "", &name(&findings.libpq));
    if let Ok(examined) = &findings.session {
        session(&mut lines, examined);
        wire(&mut lines, examined);
        cancels(&mut lines, examined);
        verdict(&mut lines, findings);
    }
    lines.join("\n") + "\n"
}

fn name(path: &Path) -> String {
    path.display().to_string()
}

/// A label, and beside it whatever else there is, over as many lines as it takes.
fn row(lines: &mut Vec<String>, label: &str, text: &str) {
    let mut label = label;
    for part in wrapped(text, WIDTH - MARGIN) {
        lines.push(format!("{label:MARGIN$}{part}"));
        label = "";
    }
}

fn heading(lines: &mut Vec<String>, text: &str) {
    lines.extend([String::new(), text.to_owned()]);
}

fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

fn session(lines: &mut Vec<String>, examined: &Examined) {
    let protection = &examined.protection;
    row(lines, "server", &format!("PostgreSQL {}", examined.server_version));
    let address = protection.route.address().filter(|address| *address != examined.host);
    let address = address.map(|address| format!(" ({address})")).unwrap_or_default();
    row(lines, "", &format!("{}, port {}{address}", examined.host, examined.port));
    row(lines, "session", &encryption(protection));
    if let Encryption::Tls { .. } = protection.encryption {
        let roots = protection
            .roots
            .as_ref()
            .map_or("no root certificate".into(), |it| format!("sslrootcert={it}"));
        let words = protection.verified.words();
        row(lines, "certificate", &format!("{words} (sslmode={}, {roots})", protection.sslmode));
    }
}

fn encryption(protection: &Protection) -> String {
    match (&protection.encryption, protection.route) {
        (Encryption::Tls { protocol, cipher }, _) => format!("{protocol}, {cipher}"),
        (Encryption::Gss, _) => "encrypted with GSSAPI".to_owned(),
        (Encryption::None, Route::UnixSocket) => "on a Unix socket".to_owned(),
        (Encryption::None, Route::Tcp(_)) => {
            let offered = match protection.tls_is_offered {
                Some(true) => ", though the server offers TLS",
                Some(false) => "; the server offers no TLS",
                None => "",
            };
            format!("in plaintext (sslmode={}){offered}", protection.sslmode)
        }
    }
}

fn wire(lines: &mut Vec<String>, examined: &Examined) {
    if let Some(reason) = &examined.unwatched {
        row(lines, "wire", &format!("not watched: {reason}"));
        return;
    }
    heading(lines, "What an eavesdropper reads of a cancel (the key itself is not shown here)");
    lines.push(String::new());
    let own = match &examined.own {
        Some(Ok(request)) => bytes(request),
        Some(Err(message)) => wrapped(message, LEFT),
        None => Vec::new(),
    };
    let ours = examined.new.wire.as_ref().map_or(vec!["nothing was sent".to_owned()], bytes);
    lines.push(format!("{:LEFT$} | pqcancel's", "libpq's own PQcancel"));
    lines.push(format!("{0:-<LEFT$}-+-{0:-<1$}", "", WIDTH - LEFT - 3));
    for at in 0..own.len().max(ours.len()) {
        let line = |column: &[String]| column.get(at).cloned().unwrap_or_default();
        lines.push(format!("{:LEFT$} | {}", line(&own), line(&ours)).trim_end().to_owned());
    }
}

/// Rows of hexadecimal numbers, and what they are.
fn bytes(request: &Request) -> Vec<String> {
    match request {
        Request::Missing => vec!["nothing was sent".to_owned()],
        Request::Readable { length, pid, key_length } => {
            let key = vec!["xx"; (*key_length).min(MOST_ROWS * KEY_BYTES_IN_ROW)];
            let labels = ["cancel key   <== readable"].into_iter().chain(std::iter::repeat(""));
            let key = key.chunks(KEY_BYTES_IN_ROW).zip(labels);
            let key =
                key.map(|(row, label)| format!("{}  {label}", row.join(" ")).trim_end().to_owned());
            let pid_label = format!("PID {pid}");
            [
                format!("{}  length {length}", hexadecimal(&length.to_be_bytes())),
                "04 d2 16 2e  CancelRequest".to_owned(),
                format!("{}  {pid_label:12} <== readable", hexadecimal(&pid.to_be_bytes())),
            ]
            .into_iter()
            .chain(key)
            .collect()
        }
        Request::Encrypted { by, header, body } => {
            let column = 3 * BYTES_IN_ROW;
            let size = format!("{} bytes of ciphertext", body.len());
            let labels = [size.as_str()].into_iter().chain(std::iter::repeat(""));
            let rows = body.chunks(BYTES_IN_ROW).take(MOST_ROWS).zip(labels);
            let rows = rows.map(|(row, label)| {
                format!("{:column$} {label}", hexadecimal(row)).trim_end().to_owned()
            });
            [format!("{:column$} {by} header", hexadecimal(header))]
                .into_iter()
                .chain(rows)
                .collect()
        }
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")
}

fn cancels(lines: &mut Vec<String>, examined: &Examined) {
    heading(lines, "Real queries, cancelled through pqcancel");
    time_line(lines, "PQcancelPoll", &examined.new);
    if let Some(old) = &examined.old {
        time_line(lines, "PQcancel", old);
    }
}

fn time_line(lines: &mut Vec<String>, function: &str, attempt: &Attempt) {
    let way = match &attempt.wire {
        Some(Request::Encrypted { by, .. }) => format!(", over {by}"),
        Some(Request::Readable { .. }) => ", in plaintext".to_owned(),
        Some(Request::Missing) | None => String::new(),
    };
    lines.extend([String::new(), format!("  {function}{way}")]);
    let mut steps: Vec<_> =
        attempt.cancelled.steps.iter().map(|(name, at)| ((*name).to_owned(), *at)).collect();
    let failure = match &attempt.cancelled.end {
        End::Cancelled { message, after } => {
            steps.push((format!("the query has ended: {message} (57014)"), *after));
            None
        }
        End::NotDelivered(message) => Some(format!("failed: {message}")),
        End::WentOn => Some("the query went on".to_owned()),
        End::Otherwise(message) => Some(format!("the query ended by itself: {message}")),
        End::Interrupted => Some("interrupted".to_owned()),
    };
    steps.sort_by_key(|(_, at)| *at);
    lines.extend(steps.iter().map(|(step, at)| format!("{:9.2} ms  {step}", milliseconds(*at))));
    lines.extend(
        failure
            .iter()
            .flat_map(|text| wrapped(text, WIDTH - MARGIN))
            .map(|line| format!("{:14}{line}", "")),
    );
}

fn verdict(lines: &mut Vec<String>, findings: &Findings) {
    for advice in &findings.advice {
        lines.push(String::new());
        lines.extend(wrapped(&advice.text, WIDTH));
    }
    heading(
        lines,
        match findings.verdict() {
            Verdict::Good => "Good: the cancel works, and is protected as the session.",
            Verdict::Weak => "Weak: the cancel works, but see above.",
            Verdict::Failed => "Failed: the cancel does not work; see above.",
        },
    );
}

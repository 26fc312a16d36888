//! Answers to bytes, in the form of the command that asked.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::{Item, Outcome, Request, Verb};
use crate::error::{Error, Kind, plain};

/// The bytes of an answer, and what they mean for those behind it.
#[derive(Default)]
pub struct Said {
    pub(super) bytes: Vec<u8>,
    pub(super) moved: usize, // for it, in bytes
    pub(super) is_error: bool,
    pub(super) goes_on: bool, // it is of a get, of which other keys follow
    pub(super) closes: bool,  // the connection
}

impl Said {
    /// A line, or nothing.
    pub(super) fn line(line: &str, closes: bool) -> Self {
        let end = if line.is_empty() { "" } else { "\r\n" };
        Said {
            bytes: [line, end].concat().into(),
            closes,
            ..Said::default()
        }
    }

    /// The answer to a request, at this time.
    pub(super) fn to(request: &Request, outcome: Result<Outcome, Error>, now: u64) -> Self {
        let is_left_out = request.is_quiet
            && match (&outcome, request.verb) {
                _ if request.meta.is_none() => true, // it would be taken for the next answer
                (Ok(Outcome::Missing), verb) => verb == Verb::Get,
                (Ok(Outcome::Done(_)), verb) => verb != Verb::Get,
                _ => false,
            };
        let (is_error, goes_on) = (outcome.is_err(), request.goes_on);
        let bytes = match (outcome, &request.meta) {
            _ if is_left_out => Vec::new(),
            (Err(error), _) => line(&error),
            (Ok(outcome), None) => classic(request, &outcome),
            (Ok(outcome), Some(flags)) => meta(request, flags, &outcome, now),
        };
        Said {
            bytes,
            moved: request.moved,
            is_error,
            goes_on,
            closes: false,
        }
    }
}

/// An error as a line.
fn line(error: &Error) -> Vec<u8> {
    let text = match error.kind {
        Kind::TooLarge => "SERVER_ERROR object too large for cache".to_owned(),
        Kind::NoSuchMethod => format!("SERVER_ERROR {}", plain(&error.why)),
        Kind::BadRequest => format!("CLIENT_ERROR {}", plain(&error.why)),
        _ => format!("SERVER_ERROR {}", plain(error.to_string())),
    };
    (text + "\r\n").into()
}

fn classic(request: &Request, outcome: &Outcome) -> Vec<u8> {
    let end = if request.goes_on { "" } else { "END\r\n" };
    let said: &[u8] = match (outcome, request.verb) {
        (Outcome::Done(item), Verb::Get) => {
            let cas = if request.wants_cas {
                format!(" {}", item.cas)
            } else {
                String::new()
            };
            let about = format!(" {} {}{cas}\r\n", item.flags, item.data.len());
            let parts = [
                b"VALUE ",
                &*request.key,
                about.as_bytes(),
                &item.data,
                b"\r\n",
                end.as_bytes(),
            ];
            return parts.concat();
        }
        (Outcome::Missing, Verb::Get) => return end.into(),
        (Outcome::Done(item), Verb::Incr | Verb::Decr) => &item.data,
        (Outcome::Done(_), Verb::Touch) => b"TOUCHED",
        (Outcome::Done(_), Verb::Delete) => b"DELETED",
        (Outcome::Done(_), Verb::Flush) => b"OK",
        (Outcome::Done(_), _) => b"STORED",
        (Outcome::Missing, _) => b"NOT_FOUND",
        (Outcome::NotStored, _) => b"NOT_STORED",
        (Outcome::Exists, _) => b"EXISTS",
    };
    [said, b"\r\n"].concat()
}

fn meta(request: &Request, flags: &[u8], outcome: &Outcome, now: u64) -> Vec<u8> {
    let key = key(request, flags);
    let (code, hit) = match outcome {
        Outcome::Missing if matches!(request.verb, Verb::Get | Verb::Debug) => ("EN", None),
        Outcome::Missing => ("NF", None),
        Outcome::NotStored => ("NS", None),
        Outcome::Exists => ("EX", None),
        Outcome::Done(item) if request.verb == Verb::Debug => {
            let (end, cas, size) = (left(item, now), item.cas, item.data.len());
            let about = format!(" exp={end} cas={cas} size={size}\r\n");
            return [b"ME ", &*key, about.as_bytes()].concat();
        }
        Outcome::Done(item) => ("HD", Some(item)),
    };
    let value = hit.filter(|item| request.wants_value && !item.is_known);
    let code = value.map_or(code.to_owned(), |item| format!("VA {}", item.data.len()));
    let mut said = code.into_bytes();
    for flag in flags.split(|byte| *byte == b' ') {
        match (flag, hit) {
            ([b'O', ..], _) => said.extend_from_slice(&[b" ", flag].concat()),
            ([b'k', ..], _) => said.extend_from_slice(&[b" k", &*key, base64(flags)].concat()),
            ([flag, ..], Some(item)) => said.extend_from_slice(about(*flag, item, now).as_bytes()),
            _ => {}
        }
    }
    if let (Some(item), Verb::Get) = (hit, request.verb) {
        said.extend_from_slice(marks(item).as_bytes());
    }
    said.extend_from_slice(b"\r\n");
    if let Some(item) = value {
        said.extend_from_slice(&[&*item.data, b"\r\n"].concat());
    }
    said
}

/// What is said of an item that is to be made anew.
fn marks(item: &Item) -> String {
    let is_of_another = item.is_being_made && !item.wins;
    let marks = [
        (is_of_another, " Z"),
        (item.is_stale, " X"),
        (item.wins, " W"),
    ];
    let marks = marks.into_iter().filter(|(is_set, _)| *is_set);
    marks.map(|(_, mark)| mark).collect()
}

/// What a flag of a meta command asks about an item. Nodes do not note who reads it, and when.
fn about(flag: u8, item: &Item, now: u64) -> String {
    match flag {
        b's' => format!(" s{}", item.data.len()),
        b't' => format!(" t{}", left(item, now)),
        b'c' => format!(" c{}", item.cas),
        b'f' => format!(" f{}", item.flags),
        b'h' => " h0".to_owned(),
        b'l' => " l0".to_owned(),
        _ => String::new(),
    }
}

/// The seconds that an item still has; -1 is without end.
fn left(item: &Item, now: u64) -> i64 {
    let left = item.end.map(|end| end.saturating_sub(now).div_ceil(1000));
    left.map_or(-1, |left| left.try_into().unwrap_or(i64::MAX))
}

/// What stands behind a key that is in base64.
fn base64(flags: &[u8]) -> &'static [u8] {
    let is_base64 = flags
        .split(|byte| *byte == b' ')
        .any(|flag| flag.starts_with(b"b"));
    if is_base64 { b" b" } else { b"" }
}

/// The key as it was asked for.
fn key(request: &Request, flags: &[u8]) -> Vec<u8> {
    match base64(flags) {
        b"" => request.key.clone(),
        _ => BASE64.encode(&request.key).into(),
    }
}

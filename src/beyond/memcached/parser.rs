//! Bytes to requests. A classic command and the meta command that replaces it become the same
//! [`Request`]; only their answers look different.

use std::iter;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::{Buf as _, BytesMut};
use smallvec::SmallVec;

use super::VERSION;
use crate::cluster::MAX_VALUE;
use crate::rpc::take;

/// The longest key, in bytes.
const MAX_KEY: usize = 250;
/// The longest line, in bytes; and that of a get, which may name many keys.
const MAX_LINE: usize = 2 << 10;
const MAX_GET: usize = 1 << 20;
/// The longest opaque token, with its flag.
const MAX_OPAQUE: usize = 32;

const FORMAT: &str = "CLIENT_ERROR bad command line format";
const TOKEN: &str = "CLIENT_ERROR bad token in command line format";
const DELTA: &str = "CLIENT_ERROR invalid numeric delta argument";
const USAGE: &str = "CLIENT_ERROR bad command line format.  Usage: delete <key> [noreply]";
const EXPTIME: &str = "CLIENT_ERROR invalid exptime argument";
const TOO_LARGE: &str = "SERVER_ERROR object too large for cache";
const NO_ORDER: &str =
    "CLIENT_ERROR E, and I with ms, are not taken: here a cas unique has no order";

/// What is asked, by the name of a command.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Verb {
    #[default]
    Get,
    Touch,
    Debug,
    Set,
    Add,
    Replace,
    Append,
    Prepend,
    Incr,
    Decr,
    Delete,
    Flush,
    Stats,
    /// Nothing: this line is the answer, and perhaps the last one.
    Said {
        line: &'static str,
        closes: bool,
    },
}

impl Verb {
    fn said(line: &'static str, closes: bool) -> Self {
        Verb::Said { line, closes }
    }
}

/// One request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools)] // each is a word of the protocol
pub struct Request {
    /// What is asked.
    pub verb: Verb,
    /// About which key.
    pub key: Vec<u8>,
    /// The data to store.
    pub value: BytesMut,
    /// The client's flags, which are kept beside the data.
    pub flags: u32,
    /// When the item ends from now on, as memcached counts: 0 is never, below 0 at once.
    pub ttl: Option<i64>,
    /// An absent item is made, which ends then.
    pub vivify: Option<i64>,
    /// If the item ends before that, one client is to make it anew.
    pub recache: Option<i64>,
    /// It is done only where the item has this cas unique.
    pub compare: Option<u64>,
    /// How much to add or take away; for `flush_all`, how long to wait.
    pub number: u64,
    /// The number that is made where there is none.
    pub initial: u64,
    /// A delete leaves the item, and marks it as stale.
    pub makes_stale: bool,
    /// Whether the answer has the data in it.
    pub wants_value: bool,
    /// Whether the answer has the cas unique in it.
    pub wants_cas: bool,
    /// Whether the usual answer is left out.
    pub is_quiet: bool,
    /// Whether the same command names other keys.
    pub is_of_many: bool,
    /// Whether some of them come after this one.
    pub goes_on: bool,
    /// The flags of a meta command, as they came.
    pub meta: Option<Vec<u8>>,
    /// How many bytes of values were moved for the answer.
    pub moved: usize,
}

/// How far a connection is in its requests and answers.
#[derive(Default)]
pub struct Stream {
    seen: usize,          // bytes in which no line ends
    needed: usize,        // bytes that a request takes with its data
    skipped: usize,       // bytes still to come of data that is refused
    get: Option<Request>, // a get of which some keys are still to be taken
    is_closed: bool,      // what still comes means nothing
}

/// The words of a line.
type Words<'a> = SmallVec<[&'a [u8]; 8]>;

/// A request, or the line that refuses it.
type Parsed = Result<Request, &'static str>;

impl Request {
    fn of(verb: Verb) -> Self {
        Request {
            verb,
            ..Request::default()
        }
    }

    fn on(verb: Verb, key: &[u8]) -> Parsed {
        let key = checked(key)?.to_owned();
        Ok(Request {
            key,
            ..Request::of(verb)
        })
    }

    /// Makes it one that is refused. A meta command hears that also where it wants no answer.
    fn refuse(&mut self, why: &'static str) {
        if !matches!(self.verb, Verb::Said { .. }) {
            self.verb = Verb::said(why, false);
            self.is_quiet &= self.meta.is_none();
        }
    }
}

impl Stream {
    /// Takes the next request off the front; `None` if its end is still to come.
    pub fn next(&mut self, input: &mut BytesMut) -> Option<Request> {
        if self.is_closed {
            input.clear();
        }
        let skipped = self.skipped.min(input.len());
        input.advance(skipped);
        self.skipped -= skipped;
        if self.get.is_some() {
            return self.next_key(input);
        }
        if input.is_empty() || input.len() < self.needed {
            return None;
        }
        let unseen = input.get(self.seen..).unwrap_or_default();
        let end = unseen.iter().position(|byte| *byte == b'\n');
        let length = end.map_or(input.len(), |end| self.seen + end + 1);
        let line = input.get(..length).unwrap_or_default();
        if length > if is_get(line) { MAX_GET } else { MAX_LINE } {
            self.is_closed = true;
            return Some(Request::of(Verb::said("CLIENT_ERROR line too long", true)));
        }
        if end.is_none() {
            self.seen = length;
            return None;
        }
        let request = self.read(length, input);
        if request.is_some() {
            (self.seen, self.needed) = (0, 0);
        }
        request
    }

    /// Reads a request of which the line is there.
    fn read(&mut self, line: usize, input: &mut BytesMut) -> Option<Request> {
        let text = input.get(..line)?.strip_suffix(b"\n")?;
        let (mut request, data, keys) = read(text.strip_suffix(b"\r").unwrap_or(text));
        if let Some(keys) = keys {
            input.advance(keys);
            self.get = Some(request);
            return self.next_key(input);
        }
        let Some(length) = data else {
            input.advance(line);
            self.is_closed = matches!(request.verb, Verb::Said { closes: true, .. });
            return Some(request);
        };
        let all = line + length + 2;
        if length > MAX_VALUE {
            request.refuse(TOO_LARGE);
        }
        if matches!(request.verb, Verb::Said { .. }) {
            self.skipped = all;
            return Some(request);
        }
        if input.len() < all {
            self.needed = all;
            return None;
        }
        let mut data = take(input, all);
        data.advance(line);
        if !data.ends_with(b"\r\n") {
            request.refuse("CLIENT_ERROR bad data chunk");
        }
        data.truncate(length);
        request.value = data;
        Some(request)
    }

    /// The get of the next key, which the input begins with.
    fn next_key(&mut self, input: &mut BytesMut) -> Option<Request> {
        let end = input.iter().position(|byte| b" \n".contains(byte))?;
        let mut request = self.get.clone()?;
        let key = input.get(..end)?;
        request
            .key
            .extend_from_slice(key.strip_suffix(b"\r").unwrap_or(key));
        input.advance(end);
        while input.first().is_some_and(|byte| b" \r".contains(byte)) {
            input.advance(1);
        }
        if input.starts_with(b"\n") {
            input.advance(1);
            self.get = None;
            request.goes_on = false;
        }
        Some(request)
    }
}

/// What a line asks, how many bytes of data follow it, and where the keys of a get begin in it.
fn read(text: &[u8]) -> (Request, Option<usize>, Option<usize>) {
    let refused = |why| Request::of(Verb::said(why, false));
    if is_get(text) {
        return match get(text) {
            Ok((get, keys)) => (get, None, Some(keys)),
            Err(why) => (refused(why), None, None),
        };
    }
    let words: Words = words(text).collect();
    let (words, is_quiet) = without_noreply(&words);
    let mut request = parsed(words).unwrap_or_else(refused);
    request.is_quiet |= is_quiet;
    (request, length(words), None)
}

/// Takes the next word off a line.
fn word<'a>(line: &mut &'a [u8]) -> Option<&'a [u8]> {
    let start = line.iter().position(|byte| *byte != b' ')?;
    let rest = line.get(start..)?;
    let end = rest.iter().position(|byte| *byte == b' ');
    let (word, rest) = rest.split_at(end.unwrap_or(rest.len()));
    *line = rest;
    Some(word)
}

fn words(mut line: &[u8]) -> impl Iterator<Item = &[u8]> {
    iter::from_fn(move || word(&mut line))
}

/// Whether it begins as a line that may name many keys.
fn is_get(line: &[u8]) -> bool {
    let name = words(line).next().unwrap_or_default();
    matches!(name, b"get" | b"gets" | b"gat" | b"gats")
}

fn number<N: FromStr>(word: &[u8]) -> Option<N> {
    std::str::from_utf8(word).ok()?.parse().ok()
}

fn checked(key: &[u8]) -> Result<&[u8], &'static str> {
    match key.len() <= MAX_KEY && !key.iter().any(u8::is_ascii_control) {
        true => Ok(key),
        false => Err(FORMAT),
    }
}

/// What is asked about each key of a get, and where in its line the keys begin.
fn get(text: &[u8]) -> Result<(Request, usize), &'static str> {
    let mut rest = text;
    let name = word(&mut rest).ok_or("ERROR")?;
    let mut get = Request {
        wants_value: true,
        wants_cas: name.ends_with(b"s"),
        goes_on: true,
        ..Request::of(Verb::Get)
    };
    if name.starts_with(b"gat") {
        let exptime = word(&mut rest).ok_or("ERROR")?;
        get.ttl = Some(number(exptime).ok_or(EXPTIME)?);
    }
    let first = rest.iter().position(|byte| *byte != b' ').ok_or("ERROR")?;
    words(rest).try_for_each(|key| checked(key).map(drop))?;
    get.is_of_many = words(rest).nth(1).is_some();
    Ok((get, text.len() - rest.len() + first))
}

/// The words before `noreply`, and whether that is the last one of a command that takes it.
fn without_noreply<'w, 'a>(words: &'w [&'a [u8]]) -> (&'w [&'a [u8]], bool) {
    match words {
        [before @ .., b"noreply"] => match before {
            [b"flush_all" | b"verbosity", ..] => (before, true),
            [name, _, ..] if classic(name).is_some() => (before, true),
            _ => (words, false),
        },
        _ => (words, false),
    }
}

/// How long the data is that follows a line; also where the line is wrong.
fn length(words: &[&[u8]]) -> Option<usize> {
    let at = match *words.first()? {
        b"set" | b"add" | b"replace" | b"append" | b"prepend" | b"cas" => 4,
        b"ms" => 2,
        _ => return None,
    };
    let length: i32 = number(words.get(at)?)?;
    usize::try_from(length)
        .ok()
        .filter(|_| length < i32::MAX - 2)
}

/// What a classic command does with its key.
fn classic(name: &[u8]) -> Option<Verb> {
    Some(match name {
        b"set" | b"cas" => Verb::Set,
        b"add" => Verb::Add,
        b"replace" => Verb::Replace,
        b"append" => Verb::Append,
        b"prepend" => Verb::Prepend,
        b"incr" => Verb::Incr,
        b"decr" => Verb::Decr,
        b"touch" => Verb::Touch,
        b"delete" => Verb::Delete,
        _ => return None,
    })
}

/// Reads the words of a line.
fn parsed(words: &[&[u8]]) -> Parsed {
    let name = *words.first().ok_or("ERROR")?;
    let Some(verb) = classic(name) else {
        return match name {
            b"mg" | b"ms" | b"md" | b"ma" | b"me" => meta(name, words),
            _ => without_key(words),
        };
    };
    let [_, key, ref args @ ..] = *words else {
        return Err("ERROR");
    };
    let mut request = Request::on(verb, key)?;
    match (verb, args) {
        (Verb::Incr | Verb::Decr, [by]) => request.number = number(by).ok_or(DELTA)?,
        (Verb::Touch, [exptime]) => request.ttl = Some(number(exptime).ok_or(EXPTIME)?),
        (Verb::Delete, [] | [b"0"]) => {}
        (Verb::Delete, _) => return Err(USAGE),
        (_, [flags, exptime, _, unique @ ..]) if unique.len() == usize::from(name == b"cas") => {
            request.flags = number(flags).ok_or(FORMAT)?;
            request.ttl = Some(number(exptime).ok_or(FORMAT)?);
            let compare = unique.first().map(|unique| number(unique).ok_or(FORMAT));
            request.compare = compare.transpose()?;
            length(words).ok_or(FORMAT)?;
        }
        _ => return Err("ERROR"),
    }
    Ok(request)
}

fn without_key(words: &[&[u8]]) -> Parsed {
    let mut request = Request::default();
    request.verb = match *words {
        [b"flush_all"] => Verb::Flush,
        [b"flush_all", delay] => {
            let delay: i64 = number(delay).ok_or(EXPTIME)?;
            request.number = delay.try_into().unwrap_or(0);
            Verb::Flush
        }
        [b"verbosity", level, ..] if number::<u32>(level).is_some() => Verb::said("OK", false),
        [b"verbosity", _, ..] => return Err(FORMAT),
        [b"version", ..] => Verb::said(VERSION, false),
        [b"mn", ..] => Verb::said("MN", false),
        [b"quit", ..] => Verb::said("", true),
        [b"stats", ref of @ ..] => {
            request.key = of.concat();
            Verb::Stats
        }
        // A web page can have a browser send commands behind such a line.
        [.., last] if last.starts_with(b"HTTP/") => Verb::said("", true),
        _ => return Err("ERROR"),
    };
    Ok(request)
}

/// Reads a meta command. Its flags are looked at again when they are answered.
fn meta(name: &[u8], words: &[&[u8]]) -> Parsed {
    let (verb, of_flags, taken): (_, _, &[u8]) = match name {
        b"mg" => (Verb::Get, 2, b"bcCfhklOqstuvNRTPL"),
        b"ms" => (Verb::Set, 3, b"bcCFkOqsTMNPL"),
        b"md" => (Verb::Delete, 2, b"bCIkOqTPL"),
        b"ma" => (Verb::Incr, 2, b"bCNJDTMOqtcvkPL"),
        _ => (Verb::Debug, 2, b"b"),
    };
    let key = words.get(1).ok_or(FORMAT)?;
    if name == b"ms" {
        length(words).ok_or(FORMAT)?;
    }
    let mut request = Request::on(verb, key)?;
    request.number = 1;
    let flags = words.get(of_flags..).unwrap_or_default();
    let mut seen = Vec::new();
    for (flag, token) in flags.iter().filter_map(|word| word.split_first()) {
        match taken.contains(flag) {
            _ if seen.contains(flag) => return Err("CLIENT_ERROR duplicate flag"),
            false if b"EI".contains(flag) => return Err(NO_ORDER),
            false => return Err("CLIENT_ERROR invalid flag"),
            true => request.take_flag(*flag, token)?,
        }
        seen.push(*flag);
    }
    if let Verb::Append | Verb::Prepend | Verb::Incr | Verb::Decr = request.verb {
        request.compare = request.compare.filter(|cas| *cas != 0); // it is none, as in memcached
    }
    request.meta = Some(flags.join(&b' '));
    Ok(request)
}

impl Request {
    fn take_flag(&mut self, flag: u8, token: &[u8]) -> Result<(), &'static str> {
        match flag {
            b'b' => {
                let key = BASE64.decode(&self.key).ok().filter(|key| !key.is_empty());
                self.key = key.ok_or("CLIENT_ERROR error decoding key")?;
            }
            b'q' => self.is_quiet = true,
            b'v' => self.wants_value = true,
            b'c' => self.wants_cas = true,
            b'I' => self.makes_stale = true,
            b'T' => self.ttl = Some(number(token).ok_or(TOKEN)?),
            b'N' => self.vivify = Some(number(token).ok_or(TOKEN)?),
            b'R' => self.recache = Some(number(token).ok_or(TOKEN)?),
            b'C' => self.compare = Some(number(token).ok_or(TOKEN)?),
            b'F' => self.flags = number(token).ok_or(FORMAT)?,
            b'D' => self.number = number(token).ok_or(TOKEN)?,
            b'J' => self.initial = number(token).ok_or(TOKEN)?,
            b'O' if token.len() >= MAX_OPAQUE => return Err("CLIENT_ERROR opaque token too long"),
            b'M' => {
                self.verb = match (self.verb, token) {
                    (Verb::Set, b"E" | b"e") => Verb::Add,
                    (Verb::Set, b"A" | b"a") => Verb::Append,
                    (Verb::Set, b"P" | b"p") => Verb::Prepend,
                    (Verb::Set, b"R" | b"r") => Verb::Replace,
                    (Verb::Set, b"S" | b"s") => Verb::Set,
                    (Verb::Incr, b"I" | b"i" | b"+") => Verb::Incr,
                    (Verb::Incr, b"D" | b"d" | b"-") => Verb::Decr,
                    (Verb::Set, _) => return Err("CLIENT_ERROR invalid mode for ms M token"),
                    _ => return Err("CLIENT_ERROR invalid mode for ma M token"),
                };
            }
            _ => {}
        }
        Ok(())
    }
}

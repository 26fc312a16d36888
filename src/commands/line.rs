//! A key and its value as one line of a dump: JSON that reads back as exactly the same
//! MessagePack, or a command that Redis understands.

use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use serde_json::Value as Json;

use super::{Failure, text};
use crate::cluster::{MAX_KEY, MAX_VALUE};
use crate::entry::{self, Packed, check_key, check_value};
use crate::error::Error;

/// The longest line: JSON writes some bytes as six, as in `\u0001`, and none as more.
pub(super) const MAX_LINE: usize = 6 * (MAX_KEY + MAX_VALUE) + 1024;

/// `{"key": …, "value": …}`; `key_base64` where the key is not UTF-8, and `value_msgpack`
/// (MessagePack, as base64) where JSON would read back as another value; `ends` where the value ends by itself.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Line {
    key: Option<String>,
    key_base64: Option<String>,
    value: Option<Json>,
    value_msgpack: Option<String>,
    ends: Option<String>,
}

/// The line of a key and its value. An import of it gives the value back byte for byte.
pub(super) fn json(key: &[u8], value: &Packed) -> Result<Vec<u8>, Error> {
    let ends = value
        .end()
        .map(|end| ("ends".to_owned(), moment(end).into()));
    let value = value.clone().plain();
    let json = text::json(&value.value()?);
    let reread: Option<Json> = serde_json::from_str(&json.to_string()).ok();
    let repacked = reread.and_then(|json| rmp_serde::to_vec(&json).ok());
    let value = match repacked.is_some_and(|repacked| repacked == *value) {
        true => ("value".to_owned(), json),
        false => ("value_msgpack".to_owned(), BASE64.encode(&*value).into()),
    };
    let fields = [text::field("key", &key.into()), value];
    let line = fields.into_iter().chain(ends).collect();
    Ok((text::json_line(&line) + "\n").into_bytes())
}

/// `SET key value` in the protocol of Redis. A value that is no string goes as `get` prints it.
pub(super) fn resp(key: &[u8], value: &Packed) -> Result<Vec<u8>, Error> {
    let ends = value.end().map(|end| end.to_string().into_bytes());
    let value = text::printed(&value.clone().plain().value()?);
    let mut words = vec![b"SET".to_vec(), key.to_vec(), value];
    words.extend(ends.into_iter().flat_map(|end| [b"PXAT".to_vec(), end]));
    let word = |word: &Vec<u8>| [format!("${}\r\n", word.len()).as_bytes(), word, b"\r\n"].concat();
    let begin = format!("*{}\r\n", words.len()).into_bytes();
    Ok([begin, words.iter().flat_map(word).collect()].concat())
}

/// A moment, in milliseconds since 1970, as people and other programs read it.
fn moment(ms: u64) -> String {
    let moment = SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(ms));
    let most = SystemTime::UNIX_EPOCH + Duration::from_secs(253_402_300_799); // the end of the year 9999
    humantime::format_rfc3339_millis(moment.unwrap_or(most).min(most)).to_string()
}

/// Reads such a moment.
fn ms(moment: &str) -> Result<u64, Failure> {
    let moment = humantime::parse_rfc3339(moment).map_err(Failure::usage)?;
    let since = moment
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    Ok(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// Reads a line like those that [`json`] makes: its key and its value.
pub(super) fn read(line: &[u8]) -> Result<(Vec<u8>, Packed), Failure> {
    let line = line.trim_ascii();
    if line.first() == Some(&b'[') {
        return Err(Failure::usage("a line is an object, not an array")); // serde would read its items as the fields
    }
    let line: Line = serde_json::from_slice(line).map_err(|error| {
        // It names a line too, but it was given only one.
        let why = error.to_string();
        Failure::usage(why.replace(" at line 1 column ", " at column "))
    })?;
    let unclear = |what| Failure::usage(format!("a line has {what}"));
    let key = match (line.key, line.key_base64) {
        (Some(key), None) => key.into_bytes(),
        (None, Some(key)) => base64(&key).map_err(|failure| failure.of("key_base64"))?,
        _ => return Err(unclear("key or key_base64")),
    };
    let value = match (line.value, line.value_msgpack) {
        (Some(value), None) => checked(&rmp_serde::to_vec(&value).map_err(Failure::usage)?)?,
        (None, Some(value)) => base64(&value)
            .and_then(|value| checked(&value))
            .map_err(|failure| failure.of("value_msgpack"))?,
        _ => return Err(unclear("value or value_msgpack, and neither is null")),
    };
    check_key(&key)?;
    let ends = line.ends.as_deref().map(ms).transpose();
    Ok((
        key,
        value.until(ends.map_err(|failure| failure.of("ends"))?),
    ))
}

fn base64(text: &str) -> Result<Vec<u8>, Failure> {
    BASE64.decode(text).map_err(Failure::usage)
}

/// A value that may be written.
pub(super) fn checked(value: &[u8]) -> Result<Packed, Failure> {
    check_value(entry::value(value)?)?;
    let value = Packed::from(value);
    let nil = "nil is an absent key: kv54 delete makes one";
    match value.is_nil() {
        true => Err(Failure::usage(nil)),
        false => Ok(value),
    }
}

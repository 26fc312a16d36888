//! A key and its value as one line of a dump: JSON that reads back as exactly the same
//! MessagePack, or a command that Redis understands.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use serde_json::Value as Json;

use super::{Failure, text};
use crate::cluster::{MAX_KEY, MAX_VALUE};
use crate::entry::{Packed, check_key, check_value};
use crate::error::Error;

/// The longest line: JSON writes some bytes as six, as in `\u0001`, and none as more.
pub(super) const MAX_LINE: usize = 6 * (MAX_KEY + MAX_VALUE) + 1024;

/// `{"key": …, "value": …}`; `key_base64` where the key is not UTF-8, and `value_msgpack`
/// (MessagePack, as base64) where JSON would read back as another value.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Line {
    key: Option<String>,
    key_base64: Option<String>,
    value: Option<Json>,
    value_msgpack: Option<String>,
}

/// The line of a key and its value. An import of it gives the value back byte for byte.
pub(super) fn json(key: &[u8], value: &Packed) -> Result<Vec<u8>, Error> {
    let json = text::json(&value.value()?);
    let reread: Option<Json> = serde_json::from_str(&json.to_string()).ok();
    let repacked = reread.and_then(|json| rmp_serde::to_vec(&json).ok());
    let value = match repacked.is_some_and(|repacked| repacked == **value) {
        true => ("value".to_owned(), json),
        false => ("value_msgpack".to_owned(), BASE64.encode(&**value).into()),
    };
    let line = Json::from_iter([text::field("key", &key.into()), value]);
    Ok((text::json_line(&line) + "\n").into_bytes())
}

/// `SET key value` in the protocol of Redis. A value that is no string goes as `get` prints it.
pub(super) fn resp(key: &[u8], value: &Packed) -> Result<Vec<u8>, Error> {
    let value = text::printed(&value.value()?);
    let word = |word: &[u8]| [format!("${}\r\n", word.len()).as_bytes(), word, b"\r\n"].concat();
    Ok([b"*3\r\n".to_vec(), word(b"SET"), word(key), word(&value)].concat())
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
    Ok((key, value))
}

fn base64(text: &str) -> Result<Vec<u8>, Failure> {
    BASE64.decode(text).map_err(Failure::usage)
}

/// A value that may be written.
pub(super) fn checked(value: &[u8]) -> Result<Packed, Failure> {
    check_value(value)?;
    let value = Packed::from(value);
    let nil = "nil is an absent key: kv54 delete makes one";
    match value.is_nil() {
        true => Err(Failure::usage(nil)),
        false => Ok(value),
    }
}

//! A key and its value as one line of a dump: JSON that reads back as exactly the same
//! MessagePack, or a command that Redis understands.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use msgpack_rpc::Value;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use super::text;
use crate::cluster::{MAX_KEY, MAX_VALUE};
use crate::entry::{Packed, check_key, check_value};
use crate::rpc::codec::encode;

/// The longest line. JSON makes six bytes of one where it must, and nothing makes more.
pub(super) const MAX_LINE: usize = 6 * (MAX_KEY + MAX_VALUE) + 1024;

#[derive(Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
struct Line {
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_base64: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<Json>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value_msgpack: Option<String>,
}

/// `{"key": …, "value": …}`; `key_base64` where the key is not UTF-8, and `value_msgpack`
/// (MessagePack, as base64) where JSON would read back as another value.
pub(super) fn json(key: &[u8], value: &Value) -> Vec<u8> {
    let mut line = Line::default();
    match std::str::from_utf8(key) {
        Ok(key) => line.key = Some(key.to_owned()),
        Err(_) => line.key_base64 = Some(BASE64.encode(key)),
    }
    match exact(value) {
        Some(json) => line.value = Some(json),
        None => line.value_msgpack = Some(BASE64.encode(encode(value))),
    }
    let mut line = serde_json::to_vec(&line).unwrap_or_default(); // strings and values, no map with odd keys
    line.push(b'\n');
    line
}

/// The value as JSON, if that is the same value when it is read.
fn exact(value: &Value) -> Option<Json> {
    let json = text::json(value);
    let read = serde_json::from_str(&json.to_string()).ok()?;
    (encode(&packed(&read)) == encode(value)).then_some(json)
}

/// JSON as MessagePack.
fn packed(json: &Json) -> Value {
    match json {
        Json::Null => Value::Nil,
        Json::Bool(truth) => (*truth).into(),
        Json::Number(number) => match (number.as_u64(), number.as_i64(), number.as_f64()) {
            (Some(number), _, _) => number.into(),
            (_, Some(number), _) => number.into(),
            (_, _, number) => number.map_or(Value::Nil, Value::from),
        },
        Json::String(text) => text.as_str().into(),
        Json::Array(items) => items.iter().map(packed).collect::<Vec<_>>().into(),
        Json::Object(fields) => fields
            .iter()
            .map(|(name, value)| (name.as_str().into(), packed(value)))
            .collect::<Vec<_>>()
            .into(),
    }
}

/// `SET key value` in the protocol of Redis. A value that is no string goes as `get` prints it.
pub(super) fn resp(key: &[u8], value: &Value) -> Vec<u8> {
    let value = text::printed(value);
    let words = [b"SET", key, &value];
    let mut command = format!("*{}\r\n", words.len()).into_bytes();
    for word in words {
        command.extend(format!("${}\r\n", word.len()).bytes());
        command.extend(word);
        command.extend(b"\r\n");
    }
    command
}

/// The key and the value of a line that [`json`] could have made.
pub(super) fn read(line: &[u8]) -> Result<(Vec<u8>, Packed), String> {
    let line: Line = serde_json::from_slice(line.trim_ascii_end()).map_err(|error| {
        // It counts the lines of what it was given, which is one.
        let said = error.to_string();
        said.replace(" at line 1 column ", " at column ")
    })?;
    let base64 = |name, text: &str| {
        let bytes = BASE64.decode(text);
        bytes.map_err(|error| format!("{name}: {error}"))
    };
    let key = match (line.key, line.key_base64) {
        (Some(key), None) => key.into_bytes(),
        (None, Some(key)) => base64("key_base64", &key)?,
        _ => return Err("a line has key or key_base64".to_owned()),
    };
    let value = match (line.value, line.value_msgpack) {
        (Some(value), None) => checked("", Packed::of(packed(&value)))?,
        (None, Some(value)) => {
            let value = base64("value_msgpack", &value)?;
            checked("value_msgpack: ", Packed::from(&*value))?
        }
        _ => return Err("a line has value or value_msgpack, and neither is null".to_owned()),
    };
    check_key(&key).map_err(|error| error.to_string())?;
    Ok((key, value))
}

fn checked(field: &str, value: Packed) -> Result<Packed, String> {
    match check_value(&value) {
        _ if value.is_nil() => Err(format!("{field}nil is an absent key")),
        Ok(()) => Ok(value),
        Err(error) => Err(format!("{field}{error}")),
    }
}

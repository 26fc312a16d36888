//! Keys and values as people and other programs read them.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use msgpack_rpc::Value;
use serde_json::{Map, Value as Json, json};

use crate::cluster::Node;
use crate::error::{Error, Kind};

/// Bytes that a person typed, as a value: str where they are UTF-8, else bin.
pub(super) fn typed(bytes: Vec<u8>) -> Value {
    String::from_utf8(bytes).map_or_else(|e| Value::Binary(e.into_bytes()), Value::from)
}

/// The bytes to print for a value: a string's own, JSON for everything else.
pub(super) fn printed(value: &Value) -> Vec<u8> {
    match value.as_slice() {
        Some(bytes) => bytes.to_vec(),
        None => json(value).to_string().into_bytes(),
    }
}

/// Adds `name: value` to an object, or `name_base64` where the value is bytes that are not UTF-8.
pub(super) fn put(object: &mut Map<String, Json>, name: &str, value: &Value) {
    match value.as_slice().map(std::str::from_utf8) {
        Some(Ok(text)) => object.insert(name.to_owned(), text.into()),
        Some(Err(_)) => object.insert(format!("{name}_base64"), base64(value).into()),
        None => object.insert(name.to_owned(), json(value)),
    };
}

/// A value as a field of an object: `name`, or `name_base64` for bytes that are not UTF-8.
pub(super) fn field(name: &str, value: &Value) -> (String, Json) {
    let is_text = std::str::from_utf8(value.as_slice().unwrap_or_default()).is_ok();
    let end = if is_text { "" } else { "_base64" };
    (format!("{name}{end}"), json(value))
}

/// A value as JSON. What JSON lacks is told in words: bytes as base64, an extension as
/// `{"ext": type, "base64": …}`, a map's key that is no string as its JSON, NaN as null.
pub(super) fn json(value: &Value) -> Json {
    match value {
        Value::Nil => Json::Null,
        Value::Boolean(truth) => json!(truth),
        Value::Integer(number) => match (number.as_u64(), number.as_i64()) {
            (Some(number), _) => json!(number),
            (_, number) => json!(number),
        },
        Value::F32(number) => json!(number),
        Value::F64(number) => json!(number),
        Value::String(text) => text
            .as_str()
            .map_or_else(|| base64(value).into(), Json::from),
        Value::Binary(bytes) => match std::str::from_utf8(bytes) {
            Ok(text) => text.into(),
            Err(_) => base64(value).into(),
        },
        Value::Array(items) => items.iter().map(json).collect(),
        Value::Map(pairs) => pairs
            .iter()
            .map(|(key, value)| (name(key), json(value)))
            .collect(),
        Value::Ext(kind, bytes) => json!({ "ext": kind, "base64": BASE64.encode(bytes) }),
    }
}

fn name(key: &Value) -> String {
    match json(key) {
        Json::String(text) => text,
        other => other.to_string(),
    }
}

fn base64(value: &Value) -> String {
    BASE64.encode(value.as_slice().unwrap_or_default())
}

/// Names as a sentence has them: `alice, bob and carol`.
pub(super) fn and(names: &[impl AsRef<str>]) -> String {
    let names: Vec<&str> = names.iter().map(AsRef::as_ref).collect();
    match names.split_last() {
        Some((last, [])) => (*last).to_owned(),
        Some((last, others)) => format!("{} and {last}", others.join(", ")),
        None => String::new(),
    }
}

/// Rows in columns, two spaces apart; the last column is not padded.
pub(super) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column| {
        rows.iter()
            .filter_map(|row| row.get::<usize>(column))
            .map(|cell| shown(cell))
            .max()
    };
    let widths: Vec<usize> = (0..columns)
        .map(|column| width(column).unwrap_or(0))
        .collect();
    let mut table = String::new();
    for row in rows {
        let padded = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell}{}", " ".repeat(width - shown(cell))));
        table += padded.collect::<Vec<_>>().join("  ").trim_end();
        table.push('\n');
    }
    table
}

/// The width of a cell on a terminal: colours take none.
fn shown(cell: &str) -> usize {
    anstream::adapter::strip_str(cell)
        .to_string()
        .chars()
        .count()
}

/// The state of a node that answered with such an error, or not at all.
pub(super) fn state(kind: Kind) -> &'static str {
    match kind {
        Kind::Unavailable | Kind::UnknownOutcome => "down",
        kind => kind.word(),
    }
}

/// Why a node cannot be asked, beside its address: the address need not be said again.
pub(super) fn cause(error: &Error, node: &Node) -> String {
    let address = format!("{}: ", node.address);
    error.why.trim_start_matches(&address).to_owned()
}

/// A node's state in its colour; the colour goes where no terminal wants it.
pub(super) fn coloured(state: &str) -> String {
    let colour = match state {
        "ready" => 32,
        "joining" => 33,
        _ => 31,
    };
    format!("\x1b[{colour}m{state}\x1b[0m")
}

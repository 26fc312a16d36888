//! Keys and values as people and other programs read them.

use std::borrow::Borrow;

use anstream::adapter::strip_str;
use anstream::{AutoStream, ColorChoice};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use msgpack_rpc::Value;
use serde_json::{Value as Json, json};

use crate::cluster::Node;
use crate::error::{Error, Kind, escaped, is_control};

/// Bytes that a person typed, as a value: str where they are UTF-8, else bin.
pub(super) fn typed(bytes: Vec<u8>) -> Value {
    String::from_utf8(bytes).map_or_else(|e| Value::Binary(e.into_bytes()), Value::from)
}

/// The bytes to print for a value: a string's own, JSON for everything else.
pub(super) fn printed(value: &Value) -> Vec<u8> {
    match value.as_slice() {
        Some(bytes) => bytes.to_vec(),
        None => json_line(&json(value)).into_bytes(),
    }
}

/// A key or a value as a field of a line. Nothing in it ends the field or the line.
pub(super) fn in_a_line(value: &Value) -> String {
    escaped(&printed(value), |c| c == '\\' || is_control(c))
}

/// JSON as one line. A character that a terminal obeys can only stand in a string, which may have
/// it as `\u009b`.
pub(super) fn json_line(json: &Json) -> String {
    let plain = |c| match is_control(c) {
        true => format!("\\u{:04x}", u32::from(c)),
        false => String::from(c),
    };
    match json.to_string() {
        text if text.contains(is_control) => text.chars().map(plain).collect(),
        text => text,
    }
}

/// A key in a sentence.
pub(super) fn quoted(key: &Value) -> String {
    format!("\"{}\"", in_a_line(key))
}

/// So many things in a sentence: `1 key`, `2 keys`.
pub(super) fn count(number: usize, thing: &str) -> String {
    let s = if number == 1 { "" } else { "s" };
    format!("{number} {thing}{s}")
}

/// So many things as one says it: `1.2 million keys`.
pub(super) fn about(number: usize, thing: &str) -> String {
    match number {
        0..10_000 => count(number, thing),
        10_000..999_500 => format!("{} thousand {thing}s", (number + 500) / 1000),
        _ => {
            let tenths = (number + 50_000) / 100_000;
            format!("{}.{} million {thing}s", tenths / 10, tenths % 10)
        }
    }
}

/// A key alone as an object.
pub(super) fn key(key: &[u8]) -> Json {
    Json::from_iter([field("key", &key.into())])
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
        Value::Integer(number) => match number.as_u64() {
            Some(number) => json!(number),
            None => json!(number.as_i64()),
        },
        Value::F32(number) => json!(number),
        Value::F64(number) => json!(number),
        Value::String(_) | Value::Binary(_) => {
            let bytes = value.as_slice().unwrap_or_default();
            let text = std::str::from_utf8(bytes).map(Json::from);
            text.unwrap_or_else(|_| BASE64.encode(bytes).into())
        }
        Value::Array(items) => items.iter().map(json).collect(),
        Value::Map(pairs) => Json::Object(pairs.iter().map(named).collect()),
        Value::Ext(kind, bytes) => json!({ "ext": kind, "base64": BASE64.encode(bytes) }),
    }
}

fn named((key, value): &(Value, Value)) -> (String, Json) {
    match json(key) {
        Json::String(name) => (name, json(value)),
        other => (other.to_string(), json(value)),
    }
}

/// Names as a sentence has them: `alice, bob and carol`.
pub(super) fn and(names: &[impl Borrow<str>]) -> String {
    match names.split_last() {
        Some((last, others)) if !others.is_empty() => {
            format!("{} and {}", others.join(", "), last.borrow())
        }
        _ => names.concat(),
    }
}

/// Rows in columns, two spaces apart; the last column is not padded.
pub(super) fn table<const N: usize>(head: [&str; N], mut rows: Vec<[String; N]>) -> String {
    rows.insert(0, head.map(String::from));
    let shown = |cell: &str| strip_str(cell).to_string().chars().count(); // colours take no width
    let mut widths = [0; N];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = shown(cell).max(*width);
        }
    }
    let line = |row: &[String; N]| {
        let cells = row.iter().zip(widths);
        let padded = cells.map(|(cell, width)| cell.to_owned() + &" ".repeat(width - shown(cell)));
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

/// Why a node cannot be asked, beside its address: the address need not be said again.
pub(super) fn cause(error: &Error, node: &Node) -> String {
    let address = format!("{}: ", node.address);
    error.why.trim_start_matches(&address).to_owned()
}

/// The state of a node that was asked and gave this error.
pub(super) fn state(kind: Kind) -> &'static str {
    match kind {
        Kind::Unavailable | Kind::UnknownOutcome => "down",
        kind => kind.word(),
    }
}

/// A node's state in its colour, if standard output is a terminal that wants colours.
pub(super) fn coloured(state: &str) -> String {
    let colour = match state {
        "ready" => 32,
        "joining" => 33,
        _ => 31,
    };
    match AutoStream::choice(&std::io::stdout()) {
        ColorChoice::Never => state.to_owned(),
        _ => format!("\x1b[{colour}m{state}\x1b[0m"),
    }
}

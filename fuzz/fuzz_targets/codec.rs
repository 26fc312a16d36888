//! Any bytes through the codec, and after them zeros until the message that they began is whole:
//! it ends within the bounds or is refused, however the stream is cut, and rmpv reads the same.
#![no_main]

use std::io::{Read as _, repeat};

use bytes::BytesMut;
use kv54::error::{Error, Kind};
use kv54::rpc::codec::{self, Codec, MESSAGE, Malformed, decode, encode};
use libfuzzer_sys::fuzz_target;
use msgpack_rpc::Value;
use msgpack_rpc::message::{Message, Notification, Request, Response};
use rmpv::decode::read_value_with_max_depth;

static ZEROS: [u8; MESSAGE.bytes] = [0; MESSAGE.bytes];

fuzz_target!(|stream: &[u8]| {
    let read = read_all(stream.chunks(stream.len().max(1)));
    assert_eq!(read, read_all(stream.chunks(1)), "byte by byte");
    assert_eq!(read, read_all(cut_by_itself(stream)), "in pieces");
    for (at, message) in read {
        judge(stream.get(at..).unwrap_or_default(), message);
    }
});

/// A message as rmpv writes it, and its length; or why there is none.
type Read = Result<(Vec<u8>, usize), (Error, Option<u32>, bool)>;

/// All that the codec makes of a stream, each with its place in it.
fn read_all<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Vec<(usize, Read)> {
    let (mut codec, mut input) = (Codec::default(), BytesMut::new());
    let (mut at, mut read) = (0, Vec::new());
    // More and more of them, since most messages end soon.
    let zeros = (5..=MESSAGE.bytes.ilog2()).map(|power| &ZEROS[..1 << power]);
    for piece in pieces.chain(zeros) {
        input.extend_from_slice(piece);
        loop {
            let before = input.len();
            let message = match next(&mut codec, &mut input) {
                Ok(None) => {
                    assert_eq!(input.len(), before, "it takes bytes and says nothing");
                    break;
                }
                Ok(Some(message)) => {
                    let length = before - input.len();
                    Ok((encode(&message.as_value()), length))
                }
                Err(Malformed {
                    id,
                    recoverable,
                    error,
                }) => Err((error, id, recoverable)),
            };
            let ended = matches!(message, Err((.., false)));
            read.push((at, message));
            if ended {
                return read; // at the latest at a zero, with which no message begins
            }
            assert!(input.len() < before, "no step forward");
            at += before - input.len();
        }
    }
    panic!("it waits for more than a message may be");
}

/// The next message, taken off the front, as one who answers or else one who asked reads it.
fn next(codec: &mut Codec, input: &mut BytesMut) -> Result<Option<Message>, Malformed> {
    let Some(end) = codec.next(input)? else {
        return Ok(None);
    };
    let message = input.split_to(end);
    let value = |bytes: &&[u8]| decode(bytes).expect("a whole value");
    if let Ok(codec::Response { id, result }) = codec::Response::read(&message) {
        let result = result.as_ref().map(value).map_err(value);
        return Ok(Some(Message::Response(Response { id, result })));
    }
    let codec::Request { id, method, params } = codec::Request::read(&message)?;
    let method = method.to_owned();
    let params = params.iter().map(value).collect();
    Ok(Some(match id {
        Some(id) => Message::Request(Request { id, method, params }),
        None => Message::Notification(Notification { method, params }),
    }))
}

/// Pieces as long as their first bytes say.
fn cut_by_itself(mut stream: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let length = usize::from(stream.first()? % 16) + 1;
        let (piece, rest) = stream.split_at(length.min(stream.len()));
        stream = rest;
        Some(piece)
    })
}

/// Whether rmpv agrees about the message that begins with these bytes.
fn judge(bytes: &[u8], message: Read) {
    // What the codec has read to its end, so can rmpv. The rest need not have one: more zeros than
    // this are more values than a message has, or the inside of a long string.
    let most = match &message {
        Ok(_) | Err((.., true)) => MESSAGE.bytes + 1,
        Err((.., false)) => bytes.len() + 2 * MESSAGE.values,
    };
    let mut rest = bytes.chain(repeat(0)).take(most as u64);
    let value = read_value_with_max_depth(&mut rest, 4 * MESSAGE.depth);
    let length = most - usize::try_from(rest.limit()).expect("at most what it was");
    let whole = value.ok().filter(|value| {
        let (values, depth) = inside(value);
        length <= MESSAGE.bytes && values <= MESSAGE.values && depth <= MESSAGE.depth
    });
    match (message, whole) {
        (Ok(message), whole) => {
            let whole = whole.expect("what is accepted is within the bounds");
            let plain = plain(whole).expect("what is accepted has the shape of a message");
            assert_eq!(message, (encode(&plain), length));
        }
        (Err((error, ..)), Some(_)) if error.kind == Kind::TooLarge => {
            panic!("{length} bytes within the bounds are refused: {error}");
        }
        // rmpv takes the byte that MessagePack never uses for nil.
        (Err((error, ..)), _) if error.why.contains("0xc1") => {}
        (Err((error, id, recoverable)), Some(value)) => {
            if recoverable {
                assert_eq!(id.map(u64::from), value[1].as_u64(), "{error}");
            }
            assert!(plain(value).is_none(), "a message is refused: {error}");
        }
        (Err((.., recoverable)), None) => assert!(!recoverable, "the next message is nowhere"),
    }
}

/// The values inside a value, and its levels.
fn inside(value: &Value) -> (usize, usize) {
    let children: Vec<&Value> = match value {
        Value::Array(items) => items.iter().collect(),
        Value::Map(pairs) => pairs.iter().flat_map(|(key, value)| [key, value]).collect(),
        _ => return (0, 0),
    };
    let inner = children.iter().map(|child| inside(child));
    inner.fold((children.len(), 1), |(values, depth), (more, below)| {
        (values + more, depth.max(below + 1))
    })
}

/// A message as it is usually sent: its method as str, nothing beside an error.
fn plain(value: Value) -> Option<Value> {
    let Value::Array(mut items) = value else {
        return None;
    };
    let name = match items.as_mut_slice() {
        [kind, id, name, Value::Array(_)] if *kind == 0.into() => {
            u32::try_from(id.as_u64()?).ok()?;
            name
        }
        [kind, id, error, result] if *kind == 1.into() => {
            u32::try_from(id.as_u64()?).ok()?;
            if !error.is_nil() {
                *result = Value::Nil;
            }
            return Some(Value::Array(items));
        }
        [kind, name, Value::Array(_)] if *kind == 2.into() => name,
        _ => return None,
    };
    *name = std::str::from_utf8(name.as_slice()?).ok()?.into();
    Some(Value::Array(items))
}

//! Bytes to messages and back. Every arriving byte is looked at once, however
//! the network cuts the stream, and a message is refused as soon as it is seen
//! to be over a limit, before anything is allocated for it.

use bytes::BytesMut;
use msgpack_rpc::Value;
use msgpack_rpc::message::{Message, Notification, Request, Response};
use rmpv::ValueRef;

use crate::error::{Error, Kind};

/// How much one MessagePack value may be.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Its length, in bytes.
    pub bytes: usize,
    /// The values in it, nested ones counted.
    pub values: usize,
    /// How deep its arrays and maps nest.
    pub depth: usize,
}

/// How much one message may be.
pub const MESSAGE: Bounds = Bounds {
    bytes: 4 << 20,
    values: 65_536,
    depth: 16,
};

/// Why some bytes are not a message.
#[derive(Debug)]
pub struct Malformed {
    /// The request that an error answer can be sent to.
    pub id: Option<u32>,
    /// Whether the next byte still starts a message; if not, close.
    pub in_step: bool,
    /// What is wrong.
    pub error: Error,
}

/// Cuts a stream of bytes into messages.
///
/// ```
/// use kv54::rpc::codec::Codec;
/// use msgpack_rpc::message::Message;
///
/// let (mut codec, mut input) = (Codec::default(), bytes::BytesMut::new());
/// input.extend(b"\x94\x00\x07\xa3get\x91\xa3te");
/// assert!(codec.decode(&mut input).is_ok_and(|message| message.is_none())); // an a is to come
/// input.extend(b"a");
/// let Ok(Some(Message::Request(request))) = codec.decode(&mut input) else {
///     panic!("no request");
/// };
/// assert_eq!((request.id, &*request.method), (7, "get"));
/// ```
#[derive(Debug, Default)]
pub struct Codec {
    walk: Walk,
    weight: usize,
}

impl Codec {
    /// The next whole message, taken off the front of `input`; `None` if its end is still to come.
    pub fn decode(&mut self, input: &mut BytesMut) -> Result<Option<Message>, Malformed> {
        if let Some(0x00..=0x8f | 0xa0..=0xdb | 0xde..) = input.first() {
            return Err(out_of_step(
                input,
                Error::new(Kind::BadRequest, "not MessagePack-RPC"),
            ));
        }
        match self.walk.advance(input, MESSAGE) {
            Ok(false) => return Ok(None),
            Ok(true) => {}
            Err(error) => {
                // No further than it has looked: what lies behind that may be here or still to come.
                let seen = input.get(..self.walk.at).unwrap_or_default();
                return Err(out_of_step(seen, error));
            }
        }
        let Walk { at, values, .. } = std::mem::take(&mut self.walk);
        self.weight = 2 * at + values * size_of::<Value>();
        let frame = input.split_to(at);
        message(&frame).map(Some).map_err(|error| {
            let id = msgid(&frame);
            Malformed {
                id,
                in_step: id.is_some(),
                error,
            }
        })
    }

    /// About what the message decoded last takes in memory, in bytes: its values, and once
    /// more itself, encoded for others.
    pub fn weight(&self) -> usize {
        self.weight
    }
}

fn out_of_step(bytes: &[u8], error: Error) -> Malformed {
    Malformed {
        id: msgid(bytes),
        in_step: false,
        error,
    }
}

/// The msgid of what begins like a request, even if the rest of it is broken.
fn msgid(mut bytes: &[u8]) -> Option<u32> {
    let len = rmp::decode::read_array_len(&mut bytes).ok()?;
    let kind: u64 = rmp::decode::read_int(&mut bytes).ok()?;
    let id = rmp::decode::read_int(&mut bytes).ok()?;
    (len >= 2 && kind == 0).then_some(id)
}

/// The message that a whole MessagePack value is, if its shape is right: the crate's own
/// decoder copies every parameter, drops a method sent as bin and panics on short responses.
fn message(mut bytes: &[u8]) -> Result<Message, Error> {
    let bytes = &mut bytes;
    let items = rmp::decode::read_array_len(bytes).ok();
    let kind: Option<u8> = rmp::decode::read_int(bytes).ok();
    match (kind, items) {
        (Some(0), Some(4)) => Ok(Message::Request(Request {
            id: id(bytes)?,
            method: method(bytes)?,
            params: params(bytes)?,
        })),
        (Some(1), Some(4)) => Ok(Message::Response(Response {
            id: id(bytes)?,
            result: match (read(bytes)?, read(bytes)?) {
                (Value::Nil, result) => Ok(result),
                (error, _) => Err(error),
            },
        })),
        (Some(2), Some(3)) => Ok(Message::Notification(Notification {
            method: method(bytes)?,
            params: params(bytes)?,
        })),
        _ => Err(Error::new(
            Kind::BadRequest,
            "a message is [0, msgid, method, [params]], [1, msgid, error, result] or [2, method, [params]]",
        )),
    }
}

fn id(bytes: &mut &[u8]) -> Result<u32, Error> {
    let why = "a msgid is an integer from 0 to 4294967295";
    rmp::decode::read_int(bytes).map_err(|_| Error::new(Kind::BadRequest, why))
}

fn method(bytes: &mut &[u8]) -> Result<String, Error> {
    let name = match leaf(bytes)? {
        ValueRef::String(name) => name.into_str(),
        ValueRef::Binary(name) => std::str::from_utf8(name).ok(),
        _ => None,
    };
    name.map(String::from)
        .ok_or_else(|| Error::new(Kind::BadRequest, "a method is a string"))
}

fn params(bytes: &mut &[u8]) -> Result<Vec<Value>, Error> {
    match read(bytes)? {
        Value::Array(params) => Ok(params),
        _ => Err(Error::new(
            Kind::BadRequest,
            "a request's parameters are an array",
        )),
    }
}

/// Takes one value off the front. How much it may be has been checked: its nesting is followed.
pub fn read(bytes: &mut &[u8]) -> Result<Value, Error> {
    let short = |_| Error::new(Kind::BadRequest, "the value breaks off");
    match bytes.first() {
        Some(0x90..=0x9f | 0xdc | 0xdd) => {
            let len = rmp::decode::read_array_len(bytes).map_err(short)?;
            let mut items = Vec::with_capacity((len as usize).min(bytes.len()));
            for _ in 0..len {
                items.push(read(bytes)?);
            }
            Ok(Value::Array(items))
        }
        Some(0x80..=0x8f | 0xde | 0xdf) => {
            let len = rmp::decode::read_map_len(bytes).map_err(short)?;
            let mut pairs = Vec::with_capacity((len as usize).min(bytes.len()));
            for _ in 0..len {
                pairs.push((read(bytes)?, read(bytes)?));
            }
            Ok(Value::Map(pairs))
        }
        _ => Ok(leaf(bytes)?.to_owned()),
    }
}

/// The same, borrowed: a large string is then copied once, at its size.
fn leaf<'a>(bytes: &mut &'a [u8]) -> Result<ValueRef<'a>, Error> {
    rmpv::decode::read_value_ref(bytes)
        .map_err(|error| Error::new(Kind::BadRequest, error.to_string()))
}

/// Refuses what is over these bounds; `bytes` are one whole MessagePack value.
pub fn check(bytes: &[u8], bounds: Bounds) -> Result<(), Error> {
    Walk::default().advance(bytes, bounds).map(drop)
}

/// Appends a value as MessagePack.
pub fn write_value(out: &mut Vec<u8>, value: &Value) {
    let written = rmpv::encode::write_value(out, value);
    debug_assert!(written.is_ok(), "a Vec takes every byte");
}

fn write_str(out: &mut Vec<u8>, text: &str) {
    let written = rmp::encode::write_str(out, text);
    debug_assert!(written.is_ok(), "a Vec takes every byte");
}

/// A value as MessagePack.
pub fn encode(value: &Value) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(value.as_slice().map_or(16, |bytes| bytes.len() + 5));
    write_value(&mut bytes, value);
    bytes
}

/// The same for a value that is borrowed.
pub fn encode_ref(value: &ValueRef<'_>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length(value));
    let written = rmpv::encode::write_value_ref(&mut bytes, value);
    debug_assert!(written.is_ok(), "a Vec takes every byte");
    bytes
}

/// About how long this will be, in bytes: most values then need not grow.
fn length(value: &ValueRef<'_>) -> usize {
    match value {
        ValueRef::Array(items) => 5 + items.iter().map(length).sum::<usize>(),
        ValueRef::String(text) => 5 + text.as_bytes().len(),
        ValueRef::Binary(bytes) => 5 + bytes.len(),
        _ => 9,
    }
}

/// Bytes as a MessagePack bin.
pub fn encode_bytes(bytes: &[u8]) -> Vec<u8> {
    encode_ref(&ValueRef::Binary(bytes))
}

/// Appends a request. Its parameters, 15 at most, come encoded: what goes to three nodes is encoded once.
pub fn write_request(out: &mut Vec<u8>, id: u32, method: &str, params: &[&[u8]]) {
    out.extend([0x94, 0x00, 0xce]);
    out.extend(id.to_be_bytes());
    write_str(out, method);
    out.push(0x90 | u8::try_from(params.len()).unwrap_or(0x0f) & 0x0f);
    out.extend(params.iter().copied().flatten());
}

/// Appends the answer to request `id`.
pub fn write_response(out: &mut Vec<u8>, id: u32, answer: &Result<Value, Error>) {
    out.extend([0x94, 0x01, 0xce]);
    out.extend(id.to_be_bytes());
    match answer {
        Ok(value) => {
            out.push(0xc0);
            write_value(out, value);
        }
        Err(error) => {
            write_str(out, &error.to_string());
            out.push(0xc0);
        }
    }
}

/// How far into one MessagePack value the bytes seen so far reach.
#[derive(Debug, Default)]
struct Walk {
    at: usize,        // bytes done with
    skip: usize,      // bytes of a string or number still to pass over
    values: usize,    // values announced in arrays and maps
    open: Vec<usize>, // values still to come in each open array or map
}

impl Walk {
    /// Goes on to the end of the value or of the bytes; `true` at the end of the value.
    fn advance(&mut self, bytes: &[u8], limits: Bounds) -> Result<bool, Error> {
        loop {
            let passed = self.skip.min(bytes.len() - self.at);
            self.at += passed;
            self.skip -= passed;
            if self.skip > 0 {
                return Ok(false);
            }
            while self.open.last() == Some(&0) {
                self.open.pop();
            }
            if self.at > 0 && self.open.is_empty() {
                return Ok(true);
            }
            let Some(head) = Head::read(bytes.get(self.at..).unwrap_or_default())? else {
                return Ok(false);
            };
            if let Some(left) = self.open.last_mut() {
                *left -= 1;
            }
            self.skip = head.size;
            if let Some(children) = head.children {
                self.values += children;
                self.open.push(children);
            }
            let end = self.at + head.size;
            let (found, most, of) = match () {
                () if end > limits.bytes => (end, limits.bytes, "bytes"),
                () if self.values > limits.values => (self.values, limits.values, "values"),
                () if self.open.len() > limits.depth => {
                    (self.open.len(), limits.depth, "levels of nesting")
                }
                () => continue,
            };
            return Err(Error::new(
                Kind::TooLarge,
                format!("{found} {of}, at most {most} are taken"),
            ));
        }
    }
}

/// One MessagePack header: how many bytes the value takes without its children, and how many children follow.
struct Head {
    size: usize,
    children: Option<usize>,
}

impl Head {
    /// The header at the front of `bytes`; `None` if it is not all there yet.
    fn read(bytes: &[u8]) -> Result<Option<Head>, Error> {
        let Some(&first) = bytes.first() else {
            return Ok(None);
        };
        // A length of 1, 2 or 4 bytes, big endian, after the first byte.
        let length = |width: usize| {
            let digits = bytes.get(1..=width)?;
            let n = digits.iter().fold(0, |n, digit| n << 8 | u32::from(*digit));
            Some((n as usize).min(1 << 29)) // far over every limit, and sums of it fit
        };
        let low = |bits: u8| usize::from(first & bits);
        let flat = |size| {
            Some(Head {
                size,
                children: None,
            })
        };
        let sized = |width, extra| {
            length(width).map(|n| Head {
                size: 1 + width + extra + n,
                children: None,
            })
        };
        let nested = |width, each| {
            length(width).map(|n| Head {
                size: 1 + width,
                children: Some(n * each),
            })
        };
        Ok(match first {
            0x00..=0x7f | 0xc0 | 0xc2 | 0xc3 | 0xe0.. => flat(1),
            0x80..=0x8f => Some(Head {
                size: 1,
                children: Some(low(0x0f) * 2),
            }),
            0x90..=0x9f => Some(Head {
                size: 1,
                children: Some(low(0x0f)),
            }),
            0xa0..=0xbf => flat(1 + low(0x1f)),
            0xc1 => return Err(Error::new(Kind::BadRequest, "0xc1 is no MessagePack")),
            0xc4 | 0xd9 => sized(1, 0),
            0xc5 | 0xda => sized(2, 0),
            0xc6 | 0xdb => sized(4, 0),
            0xc7 => sized(1, 1),
            0xc8 => sized(2, 1),
            0xc9 => sized(4, 1),
            0xcc | 0xd0 => flat(2),
            0xcd | 0xd1 => flat(3),
            0xca | 0xce | 0xd2 => flat(5),
            0xcb | 0xcf | 0xd3 => flat(9),
            0xd4..=0xd8 => flat(2 + (1 << (first - 0xd4))),
            0xdc => nested(2, 1),
            0xdd => nested(4, 1),
            0xde => nested(2, 2),
            0xdf => nested(4, 2),
        })
    }
}

//! Bytes to messages and back. Every arriving byte is looked at once, however
//! the network cuts the stream, and a message is refused as soon as it is seen
//! to be over a limit, before anything is allocated for it.

use msgpack_rpc::Value;
use msgpack_rpc::message::Response;
use rmpv::ValueRef;
use smallvec::SmallVec;

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

/// Finds where the messages in a stream of bytes end.
///
/// ```
/// use kv54::rpc::codec::{Codec, Request};
///
/// let (mut codec, get) = (Codec::default(), b"\x94\x00\x07\xa3get\x91\xa3tea");
/// assert!(codec.next(&get[..11]).is_ok_and(|end| end.is_none())); // an a is to come
/// assert!(codec.next(get).is_ok_and(|end| end == Some(12)));
/// let request = Request::read(get).map_err(|malformed| malformed.error)?;
/// assert_eq!((request.id, request.method, request.params.len()), (Some(7), "get", 1));
/// # Ok::<(), kv54::error::Error>(())
/// ```
#[derive(Debug, Default)]
pub struct Codec {
    walk: Walk,
    weight: usize,
}

impl Codec {
    /// The length in bytes of the message that `input` begins with; `None` if its end is still to
    /// come. What was looked at is not looked at again: `input` may only have grown by then.
    pub fn next(&mut self, input: &[u8]) -> Result<Option<usize>, Malformed> {
        if let Some(0x00..=0x8f | 0xa0..=0xdb | 0xde..) = input.first() {
            let error = Error::bad_request("not MessagePack-RPC");
            return Err(out_of_step(input, error));
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
        let Walk { at, room, .. } = std::mem::take(&mut self.walk);
        self.weight = 2 * at + room * size_of::<ValueRef<'_>>();
        Ok(Some(at))
    }

    /// About what the message found last takes in memory, in bytes: itself, its values, which
    /// borrow from it, and once more itself, encoded for others.
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

/// A request as it lies in its message: the crate's own takes an allocation for each of its
/// parts, and its decoder drops a method sent as bin, so that the caller hangs.
#[derive(Debug, PartialEq)]
pub struct Request<'a> {
    /// What its answer is to carry; `None` if it is a notification, which gets none.
    pub id: Option<u32>,
    /// What is asked.
    pub method: &'a str,
    /// About what.
    pub params: SmallVec<[ValueRef<'a>; 3]>,
}

impl<'a> Request<'a> {
    /// Reads a whole message.
    pub fn read(message: &'a [u8]) -> Result<Self, Malformed> {
        let mut rest = message;
        request(&mut rest).map_err(|error| {
            let id = msgid(message);
            Malformed {
                id,
                in_step: id.is_some(),
                error,
            }
        })
    }
}

fn request<'a>(bytes: &mut &'a [u8]) -> Result<Request<'a>, Error> {
    let id = match kind(bytes) {
        (Some(0), Some(4)) => Some(id(bytes)?),
        (Some(2), Some(3)) => None,
        (Some(1), _) => return Err(Error::bad_request("an answer, and nothing was asked")),
        _ => {
            return Err(Error::bad_request(
                "a request is [0, msgid, method, [params]] or [2, method, [params]]",
            ));
        }
    };
    let method = match borrow(bytes)? {
        ValueRef::String(name) => name.into_str(),
        ValueRef::Binary(name) => std::str::from_utf8(name).ok(),
        _ => None,
    };
    let method = method.ok_or_else(|| Error::bad_request("a method is a string"))?;
    let count = rmp::decode::read_array_len(bytes);
    let count = count.map_err(|_| Error::bad_request("a request's parameters are an array"))?;
    let mut params = SmallVec::new();
    for _ in 0..count {
        params.push(borrow(bytes)?);
    }
    Ok(Request { id, method, params })
}

/// Reads the answer that a whole message at the front is to be. (The crate's decoder panics on short ones.)
pub fn response(mut message: &[u8]) -> Result<Response, Error> {
    let bytes = &mut message;
    match kind(bytes) {
        (Some(1), Some(4)) => Ok(Response {
            id: id(bytes)?,
            result: match (read(bytes)?, read(bytes)?) {
                (Value::Nil, result) => Ok(result),
                (error, _) => Err(error),
            },
        }),
        (Some(0 | 2), _) => Err(Error::bad_request("it asks where it should answer")),
        _ => Err(Error::bad_request("an answer is [1, msgid, error, result]")),
    }
}

/// Which kind of message it is, and of how many parts.
fn kind(bytes: &mut &[u8]) -> (Option<u8>, Option<u32>) {
    let parts = rmp::decode::read_array_len(bytes).ok();
    (rmp::decode::read_int(bytes).ok(), parts)
}

fn id(bytes: &mut &[u8]) -> Result<u32, Error> {
    rmp::decode::read_int(bytes)
        .map_err(|_| Error::bad_request("a msgid is an integer from 0 to 4294967295"))
}

/// Takes one value off the front. How much it may be has been checked: its nesting is followed.
pub fn read(bytes: &mut &[u8]) -> Result<Value, Error> {
    Ok(borrow(bytes)?.to_owned())
}

/// The same, borrowed.
fn borrow<'a>(bytes: &mut &'a [u8]) -> Result<ValueRef<'a>, Error> {
    rmpv::decode::read_value_ref(bytes).map_err(|error| Error::bad_request(error.to_string()))
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

/// Appends a str as decoders from before 2013 read it too: they know no length of one byte.
fn write_str(out: &mut Vec<u8>, text: &str) {
    if let (32..=0xff, Ok(len)) = (text.len(), u16::try_from(text.len())) {
        out.push(0xda);
        out.extend(len.to_be_bytes());
        return out.extend_from_slice(text.as_bytes());
    }
    let written = rmp::encode::write_str(out, text);
    debug_assert!(written.is_ok(), "a Vec takes every byte");
}

/// A value as MessagePack.
pub fn encode(value: &Value) -> Vec<u8> {
    let mut bytes = Vec::new();
    write_value(&mut bytes, value);
    bytes
}

/// MessagePack that is short: a key, a stamp.
pub type Short = SmallVec<[u8; 36]>;

/// Bytes as a MessagePack bin.
pub fn encode_bytes(bytes: &[u8]) -> Short {
    let mut short = Short::new();
    let written = rmp::encode::write_bin(&mut short, bytes);
    debug_assert!(written.is_ok(), "a Vec takes every byte");
    short
}

/// Appends a borrowed value as MessagePack.
pub fn write_ref(out: &mut Vec<u8>, value: &ValueRef<'_>) {
    let written = rmpv::encode::write_value_ref(out, value);
    debug_assert!(written.is_ok(), "a Vec takes every byte");
}

/// Appends a request. Its parameters, 15 at most, come encoded: what goes to three nodes is encoded once.
pub fn write_request(out: &mut Vec<u8>, id: u32, method: &str, params: &[&[u8]]) {
    out.extend([0x94, 0x00, 0xce]);
    out.extend(id.to_be_bytes());
    write_str(out, method);
    out.push(0x90 | u8::try_from(params.len()).unwrap_or(0x0f) & 0x0f);
    for param in params {
        out.extend_from_slice(param);
    }
}

/// Appends the answer to request `id`.
pub fn write_response(out: &mut Vec<u8>, id: u32, answer: &Result<Value, Error>) {
    out.extend([0x94, 0x01, 0xce]);
    out.extend(id.to_be_bytes());
    match answer {
        Ok(value) => {
            out.push(0xc0);
            match value.as_str() {
                Some(text) => write_str(out, text),
                None => write_value(out, value),
            }
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
    room: usize,      // what they take, read: the places in their vectors
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
                self.room += match self.open.len() {
                    ..=2 => children, // the message and its parameters
                    // The crate makes room for four values or pairs, and then doubles it.
                    _ => children.next_power_of_two().max(8),
                };
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
            0xc1 => return Err(Error::bad_request("0xc1 is no MessagePack")),
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

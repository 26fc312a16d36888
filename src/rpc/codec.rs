//! Bytes to messages and back. Every arriving byte is looked at once, however the network cuts
//! the stream. A message that is over a limit is refused at its header, before anything is
//! allocated for it. A value is not decoded: it stays the MessagePack that came.

use msgpack_rpc::Value;
use rmp::Marker;
use smallvec::SmallVec;

use super::Answer;
use crate::error::{Error, beginning};

/// How much one MessagePack value may be.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Its length, in bytes.
    pub bytes: usize,
    /// The values in it, nested ones counted.
    pub values: usize,
    /// How deep its arrays and maps nest: 16 at most.
    pub depth: usize,
}

/// How much one message may be.
pub const MESSAGE: Bounds = Bounds {
    bytes: 4 << 20,
    values: 65_536,
    depth: 16,
};

/// Nil as MessagePack.
pub const NIL: &[u8] = &[0xc0];

/// MessagePack on its way: what is short (a key, a stamp, most answers) needs no allocation.
pub type Encoded = SmallVec<[u8; 36]>;

/// The values of an array: those of a request or an entry need no allocation.
pub type Items<'a> = SmallVec<[&'a [u8]; 4]>;

/// Why some bytes are not a message.
#[derive(Debug)]
pub struct Malformed {
    /// The request that an error answer can be sent to.
    pub id: Option<u32>,
    /// Whether the next message can still be found. If not, the connection must be closed.
    pub recoverable: bool,
    /// What is wrong.
    pub error: Error,
}

impl Malformed {
    /// A message whose end cannot be found, by what was seen of it.
    pub fn lost(seen: &[u8], error: Error) -> Self {
        Malformed {
            id: msgid(seen),
            recoverable: false,
            error,
        }
    }
}

/// Finds where the messages in a stream of bytes end: how far into one MessagePack value the bytes
/// seen so far reach.
#[derive(Debug, Default)]
pub struct Codec {
    at: usize,                   // where the next value begins, also if that is still to come
    left: u32,                   // values still to come in the innermost open array or map
    outer: [u32; MESSAGE.depth], // the same in those around it
    depth: usize,                // how many those are
    values: usize,               // values announced in arrays and maps
    /// The values that were in the message found last.
    pub last_values: usize,
}

impl Codec {
    /// The length in bytes of the message that `input` begins with; `None` if its end is still to
    /// come. Bytes that were looked at are not looked at again: `input` may only have grown by then.
    pub fn next(&mut self, input: &[u8]) -> Result<Option<usize>, Malformed> {
        if let Some(0x00..=0x8f | 0xa0..=0xdb | 0xde..) = input.first() {
            let error = Error::bad_request("not MessagePack-RPC");
            return Err(Malformed::lost(input, error));
        }
        let whole = self.advance(input, MESSAGE).map_err(|error| {
            // Without the bad byte: the error must not depend on how the network cut the stream.
            let seen = input.get(..self.at).unwrap_or_default();
            Malformed::lost(seen, error)
        })?;
        if !whole {
            return Ok(None);
        }
        let found = std::mem::take(self);
        self.last_values = found.values;
        Ok(Some(found.at))
    }
}

/// The msgid of bytes that begin like a request, even if the rest of it is broken.
fn msgid(mut bytes: &[u8]) -> Option<u32> {
    match kind(&mut bytes) {
        (Some(0), Some(2..)) => id(&mut bytes).ok(),
        _ => None,
    }
}

const SHAPES: &str = "a request is [0, msgid, method, [params]] or [2, method, [params]]";

/// A request as it lies in its message. (The crate's own takes an allocation for each of its
/// parts, and its decoder drops a method sent as bin, so that the caller hangs.)
#[derive(Debug, PartialEq)]
pub struct Request<'a> {
    /// The msgid that its answer carries; `None` for a notification, which gets no answer.
    pub id: Option<u32>,
    /// What is asked.
    pub method: &'a str,
    /// About what: each parameter as its MessagePack.
    pub params: Items<'a>,
}

impl<'a> Request<'a> {
    /// Reads a message whose end was found.
    pub fn read(message: &'a [u8]) -> Result<Self, Malformed> {
        Request::parse(message).map_err(|error| Malformed {
            recoverable: msgid(message).is_some(),
            ..Malformed::lost(message, error)
        })
    }

    fn parse(mut message: &'a [u8]) -> Result<Self, Error> {
        let rest = &mut message;
        let id = match kind(rest) {
            (Some(0), Some(4)) => Some(id(rest)?),
            (Some(2), Some(3)) => None,
            (Some(1), _) => return Err(Error::bad_request("an answer, and nothing was asked")),
            _ => return Err(Error::bad_request(SHAPES)),
        };
        let method = take(rest).and_then(string).map(std::str::from_utf8);
        let Some(Ok(method)) = method else {
            return Err(Error::bad_request("a method is a string"));
        };
        let no_array = || Error::bad_request("a request's parameters are an array");
        let params = items_of_whole(rest).ok_or_else(no_array)?;
        Ok(Request { id, method, params })
    }
}

/// An answer as it lies in its message. (The crate's decoder panics on short ones.)
#[derive(Debug, PartialEq)]
pub struct Response<'a> {
    /// The msgid of the request.
    pub id: u32,
    /// The result or the error, as MessagePack.
    pub result: Result<&'a [u8], &'a [u8]>,
}

impl<'a> Response<'a> {
    /// Reads a message whose end was found.
    pub fn read(mut message: &'a [u8]) -> Result<Self, Error> {
        let rest = &mut message;
        let id = match kind(rest) {
            (Some(1), Some(4)) => id(rest)?,
            (Some(0 | 2), _) => return Err(Error::bad_request("it asks where it should answer")),
            _ => return Err(Error::bad_request("an answer is [1, msgid, error, result]")),
        };
        let result = match take(rest) {
            Some(NIL) => Ok(*rest), // it ends where the message ends
            error => Err(error.unwrap_or_default()),
        };
        Ok(Response { id, result })
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

/// Takes one value off the front, as its bytes; `None` if it is not whole.
fn take<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (size, children) = header(bytes)?;
    let mut end = size as usize;
    if children.is_some() {
        let mut codec = Codec::default();
        codec.advance(bytes, MESSAGE).ok().filter(|whole| *whole)?;
        end = codec.at;
    }
    let (value, rest) = bytes.split_at_checked(end)?;
    *bytes = rest;
    Some(value)
}

/// The values of an array, each as its bytes; `None` if it is not one whole array.
pub fn items(array: &[u8]) -> Option<Items<'_>> {
    let is_whole = |last: &&[u8]| check(last, MESSAGE).is_ok();
    items_of_whole(array).filter(|items| items.last().is_none_or(is_whole))
}

/// The same for an array that was found to be whole, so that its last value ends where the array does.
pub fn items_of_whole(mut array: &[u8]) -> Option<Items<'_>> {
    let mut items = Items::new();
    for behind in (0..rmp::decode::read_array_len(&mut array).ok()?).rev() {
        items.push(match behind {
            0 if !array.is_empty() => array,
            _ => take(&mut array)?,
        });
    }
    Some(items)
}

/// The bytes of a string, whether it is written as str, bin or the raw of 2009.
pub fn string(value: &[u8]) -> Option<&[u8]> {
    let header = match Marker::from_u8(*value.first()?) {
        Marker::FixStr(_) => 1,
        Marker::Str8 | Marker::Bin8 => 2,
        Marker::Str16 | Marker::Bin16 => 3,
        Marker::Str32 | Marker::Bin32 => 5,
        _ => return None,
    };
    value.get(header..)
}

/// An integer from 0, in whichever width it is written.
pub fn number(mut value: &[u8]) -> Option<u64> {
    rmp::decode::read_int(&mut value).ok()
}

/// Any integer.
pub fn integer(mut value: &[u8]) -> Option<i128> {
    rmp::decode::read_int(&mut value).ok()
}

/// A value that a stranger sent as it is quoted to them: in a few words, however large it is.
pub fn quoted(value: &[u8]) -> String {
    match (string(value).map(std::str::from_utf8), header(value)) {
        (Some(Ok(text)), _) => format!("{:?}", beginning(text)),
        (None, Some((..=9, None))) => decode(value).map_or_else(|e| e.why, |v| v.to_string()),
        (None, Some((_, Some(_)))) => "an array or a map".to_owned(),
        _ => "bytes".to_owned(),
    }
}

/// Refuses bytes that are not one whole value within these bounds.
pub fn check(bytes: &[u8], bounds: Bounds) -> Result<(), Error> {
    let mut codec = Codec::default();
    match codec.advance(bytes, bounds)? {
        true if codec.at == bytes.len() => Ok(()),
        true => Err(Error::bad_request("more than one value")),
        false => Err(Error::bad_request("a value without its end")),
    }
}

/// A value that people made, as MessagePack.
pub fn encode(value: &Value) -> Vec<u8> {
    let mut bytes = Vec::new();
    written(rmpv::encode::write_value(&mut bytes, value));
    bytes
}

/// MessagePack as a value that people read.
pub fn decode(bytes: &[u8]) -> Result<Value, Error> {
    check(bytes, MESSAGE)?;
    rmpv::decode::read_value(&mut &*bytes).map_err(|error| Error::bad_request(error.to_string()))
}

/// Bytes as a MessagePack bin.
pub fn encode_bytes(bytes: &[u8]) -> Encoded {
    let mut encoded = Encoded::new();
    written(rmp::encode::write_bin(&mut encoded, bytes));
    encoded
}

/// Integers from 0, one after the other.
pub fn encode_numbers<const N: usize>(numbers: [u64; N]) -> Encoded {
    encode_array(None, numbers)
}

/// The same, up to three, behind the first byte of their array.
pub fn encode_array<const N: usize>(first: Option<u8>, numbers: [u64; N]) -> Encoded {
    const { assert!(N <= 3, "there is no room for more") };
    let (mut bytes, mut end) = (
        [first.unwrap_or_default(); 36],
        usize::from(first.is_some()),
    );
    for number in numbers {
        let [.., low] = number.to_be_bytes();
        let (marker, width) = match number {
            0..=0x7f => (low, 0),
            0x80..=0xff => (0xcc, 1),
            0x100..=0xffff => (0xcd, 2),
            0x1_0000..=0xffff_ffff => (0xce, 4),
            _ => (0xcf, 8),
        };
        if let Some([at, digits @ ..]) = bytes.get_mut(end..).and_then(<[u8]>::first_chunk_mut::<9>)
        {
            *at = marker;
            *digits = number.rotate_right(8 * width).to_be_bytes(); // those that count come first
        }
        end += 1 + width as usize;
    }
    Encoded::from_buf_and_len(bytes, end)
}

/// Writing to memory cannot fail.
#[allow(clippy::needless_pass_by_value)]
fn written<T, E>(result: Result<T, E>) {
    debug_assert!(result.is_ok());
}

/// Appends a request. Its parameters, 15 at most, come as MessagePack in any number of pieces.
pub fn write_request(out: &mut Vec<u8>, id: u32, method: &str, params: u8, pieces: &[&[u8]]) {
    out.extend([0x94, 0x00, 0xce]);
    out.extend(id.to_be_bytes());
    write_text(out, method);
    out.push(0x90 | params & 0x0f);
    for piece in pieces {
        out.extend_from_slice(piece);
    }
}

/// Appends the answer to request `id`.
pub fn write_response(out: &mut Vec<u8>, id: u32, answer: &Result<Answer, Error>) {
    out.extend([0x94, 0x01, 0xce]);
    out.extend(id.to_be_bytes());
    match answer {
        Ok(answer) => {
            out.push(0xc0);
            let start = out.len();
            answer.write(out);
            widen(out, start);
        }
        Err(error) => {
            write_text(out, &error.to_string());
            out.push(0xc0);
        }
    }
}

/// Appends a str.
fn write_text(out: &mut Vec<u8>, text: &str) {
    let start = out.len();
    written(rmp::encode::write_str(out, text));
    widen(out, start);
}

/// Gives a str of 32 to 255 bytes, which is the last value of `out`, a length of two bytes:
/// decoders from before 2013 know no length of one byte.
fn widen(out: &mut Vec<u8>, start: usize) {
    if let Some(header @ 0xd9) = out.get_mut(start) {
        *header = 0xda;
        out.insert(start + 1, 0);
    }
}

impl Codec {
    /// Goes on to the end of the value or of the bytes; `true` at the end of the value.
    fn advance(&mut self, bytes: &[u8], limits: Bounds) -> Result<bool, Error> {
        let (mut at, mut left) = (self.at, self.left); // in registers
        let ended = self.walk(bytes, limits, &mut at, &mut left);
        (self.at, self.left) = (at, left);
        ended
    }

    #[inline]
    fn walk(
        &mut self,
        bytes: &[u8],
        limits: Bounds,
        at: &mut usize,
        left: &mut u32,
    ) -> Result<bool, Error> {
        loop {
            if *left == 0 && *at > 0 {
                let Some(outer) = self.depth.checked_sub(1) else {
                    return Ok(*at <= bytes.len());
                };
                self.depth = outer;
                *left = self.outer.get(outer).copied().unwrap_or_default();
                continue;
            }
            let Some((size, children)) = header(bytes.get(*at..).unwrap_or_default()) else {
                return match bytes.get(*at) {
                    Some(0xc1) => Err(Error::bad_request("0xc1 is no MessagePack")),
                    _ => Ok(false),
                };
            };
            let end = *at + size as usize;
            if end > limits.bytes {
                return Err(too_much(end, limits.bytes, "bytes"));
            }
            let beside = left.saturating_sub(1); // the message itself is in none
            let Some(children) = children else {
                (*at, *left) = (end, beside);
                continue;
            };
            self.enter(beside, children, limits)?;
            (*at, *left) = (end, children);
        }
    }

    /// Notes an array or a map, beside which so many values are still to come.
    fn enter(&mut self, beside: u32, children: u32, limits: Bounds) -> Result<(), Error> {
        self.values += children as usize;
        if self.values > limits.values {
            return Err(too_much(self.values, limits.values, "values"));
        }
        let (outer, deeper) = (self.outer.get_mut(self.depth), self.depth + 1);
        match outer.filter(|_| deeper <= limits.depth) {
            Some(outer) => *outer = beside,
            None => return Err(too_much(deeper, limits.depth, "levels of nesting")),
        }
        self.depth = deeper;
        Ok(())
    }
}

/// The error of what a header announces.
#[cold]
fn too_much(found: usize, most: usize, of: &str) -> Error {
    Error::too_large(format!("{found} {of}, at most {most} are taken"))
}

/// How long a value is, by its first byte; 0 where that alone does not say it. A table, since this is asked of each
/// value of each message.
#[allow(clippy::indexing_slicing)] // when it is compiled, not when it runs
const FLAT: [u8; 256] = {
    let (mut sizes, mut first) = ([1; 256], 0x80_u8); // before and behind these are small integers
    while first < 0xe0 {
        sizes[first as usize] = match first {
            0xa0..=0xbf => 1 + first % 32,            // str
            0xcc | 0xd0 => 2,                         // integers of 8 bits,
            0xcd | 0xd1 => 3,                         // 16,
            0xce | 0xd2 | 0xca => 5,                  // 32, and a float
            0xcf | 0xd3 | 0xcb => 9,                  // 64, and a float
            0xd4..=0xd8 => 2 + (1 << (first - 0xd4)), // ext
            0xc0 | 0xc2 | 0xc3 => 1,                  // nil, false, true
            _ => 0,
        };
        first += 1;
    }
    sizes
};

/// One MessagePack header, at the front of `bytes`: the bytes of the value without its children, and
/// how many values are in it if it is an array or a map. `None` if the header is not all there yet.
#[inline(always)] // it is most of the loop that calls it
#[allow(clippy::inline_always)]
fn header(bytes: &[u8]) -> Option<(u32, Option<u32>)> {
    let first = *bytes.first()?;
    match FLAT.get(usize::from(first)) {
        None | Some(0) => {}
        Some(size) => return Some((u32::from(*size), None)),
    }
    // A length of 1, 2 or 4 bytes, big endian, after the first byte.
    let length = |width: u32| {
        let digits = bytes.get(1..=width as usize)?;
        let n = digits.iter().fold(0, |n, digit| n << 8 | u32::from(*digit));
        Some(n.min(1 << 29)) // far over every limit, and sums of it fit
    };
    let sized = |width, beside| length(width).map(|n| (1 + width + beside + n, None));
    let nested = |children| Some((1, Some(u32::from(children))));
    let counted = |width, each| length(width).map(|n| (1 + width, Some(n * each)));
    match first {
        0xc4 | 0xd9 => sized(1, 0), // bin, str
        0xc5 | 0xda => sized(2, 0),
        0xc6 | 0xdb => sized(4, 0),
        0xc7 => sized(1, 1), // ext
        0xc8 => sized(2, 1),
        0xc9 => sized(4, 1),
        0x90..=0x9f => nested(first % 16), // array
        0xdc => counted(2, 1),
        0xdd => counted(4, 1),
        0x80..=0x8f => nested(2 * (first % 16)), // map
        0xde => counted(2, 2),
        0xdf => counted(4, 2),
        _ => None,
    }
}

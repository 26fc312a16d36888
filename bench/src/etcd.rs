//! etcd v3: its KV service over gRPC over HTTP/2 with prior knowledge, as much of it as
//! `Range` (linearizable, one key) and `Put` need. A stream per request, headers never indexed.

use crate::load::{Answer, Op, Parsed, Response, Values, Wire, key};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// What may come before it is acknowledged: the most there is, on the connection too.
const WINDOW: u32 = 0x7fff_ffff;
/// What was read of it before more is granted.
const GRANT: u32 = 1 << 28;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;

const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;

pub struct Etcd {
    next: u32,
    asked: Vec<(u32, u32)>, // streams and whose they are
    read: u32,
    range: Vec<u8>,
    put: Vec<u8>,
}

impl Default for Etcd {
    fn default() -> Self {
        Etcd {
            next: 1,
            asked: Vec::new(),
            read: 0,
            range: headers("/etcdserverpb.KV/Range"),
            put: headers("/etcdserverpb.KV/Put"),
        }
    }
}

impl Wire for Etcd {
    fn hello(&mut self, out: &mut Vec<u8>) {
        out.extend(PREFACE);
        // ENABLE_PUSH 0, INITIAL_WINDOW_SIZE, HEADER_TABLE_SIZE 0
        let settings = [(2, 0), (4, WINDOW), (1, 0)];
        frame(out, SETTINGS, 0, 0, 6 * settings.len());
        for (name, value) in settings {
            out.extend(u16::to_be_bytes(name));
            out.extend(u32::to_be_bytes(value));
        }
        frame(out, WINDOW_UPDATE, 0, 0, 4);
        out.extend((WINDOW - 65_535).to_be_bytes());
    }

    fn request(&mut self, out: &mut Vec<u8>, id: u32, op: Op, number: u32, values: &Values) {
        let stream = self.next;
        self.next += 2;
        self.asked.push((stream, id));
        let headers = match op {
            Op::Get => &self.range,
            Op::Set => &self.put,
        };
        frame(out, HEADERS, END_HEADERS, stream, headers.len());
        out.extend(headers);
        // Both messages: 1 = key; PutRequest: 2 = value.
        let len = values.len();
        let size = 2
            + 16
            + match op {
                Op::Get => 0,
                Op::Set => 1 + varint_size(len) + len,
            };
        frame(out, DATA, END_STREAM, stream, 5 + size);
        out.push(0); // not compressed
        out.extend((size as u32).to_be_bytes());
        out.extend([0x0a, 16]);
        out.extend(key(number));
        if op == Op::Set {
            out.push(0x12);
            write_varint(out, len);
            values.write(out, number);
        }
    }

    fn response<'a>(&mut self, input: &'a [u8], out: &mut Vec<u8>) -> Parsed<'a> {
        let Some(([a, b, c, kind, flags, i, j, k, l], rest)) = input.split_first_chunk::<9>()
        else {
            return Ok(None);
        };
        let size = u32::from_be_bytes([0, *a, *b, *c]) as usize;
        let Some(payload) = rest.get(..size) else {
            return Ok(None);
        };
        let stream = u32::from_be_bytes([*i & 0x7f, *j, *k, *l]);
        let mut answer = None;
        match *kind {
            SETTINGS if flags & ACK == 0 => frame(out, SETTINGS, ACK, 0, 0),
            PING if flags & ACK == 0 => {
                frame(out, PING, ACK, 0, 8);
                out.extend(payload);
            }
            GOAWAY => {
                return Err(format!(
                    "etcd goes away: {}",
                    String::from_utf8_lossy(payload)
                ));
            }
            DATA if flags & PADDED != 0 => return Err("a padded frame".to_owned()),
            DATA if size > 0 => {
                self.read += size as u32;
                if self.read > GRANT {
                    frame(out, WINDOW_UPDATE, 0, 0, 4);
                    out.extend(self.read.to_be_bytes());
                    self.read = 0;
                }
                let id = self.taken(stream).ok_or("an answer to nothing")?;
                answer = Some((id, message(payload)?));
            }
            // A stream that ends before its message did is an error; after it, these are its trailers.
            HEADERS if flags & END_STREAM != 0 => {
                answer = self
                    .taken(stream)
                    .map(|id| (id, Answer::Error("grpc-status".to_owned())));
            }
            RST_STREAM => {
                answer = self
                    .taken(stream)
                    .map(|id| (id, Answer::Error("rst-stream".to_owned())));
            }
            _ => {}
        }
        let len = 9 + size;
        Ok(Some(Response { len, answer }))
    }
}

impl Etcd {
    /// Whose stream this is; it is so no more.
    fn taken(&mut self, stream: u32) -> Option<u32> {
        let place = self.asked.iter().position(|(asked, _)| *asked == stream)?;
        Some(self.asked.swap_remove(place).1)
    }
}

fn frame(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, size: usize) {
    out.extend(&(size as u32).to_be_bytes()[1..]);
    out.extend([kind, flags]);
    out.extend(stream.to_be_bytes());
}

/// The header block of a request: indexed where HPACK's static table has it, else literal without indexing.
fn headers(path: &str) -> Vec<u8> {
    let mut block = vec![0x83, 0x86]; // :method POST, :scheme http
    let mut literal = |name: &[u8], value: &str| {
        block.extend(name);
        block.push(value.len() as u8);
        block.extend(value.bytes());
    };
    literal(&[0x04], path); // :path
    literal(&[0x01], "127.0.0.1"); // :authority
    literal(&[0x0f, 0x10], "application/grpc"); // content-type
    literal(b"\0\x02te", "trailers");
    block
}

/// RangeResponse: 2 = KeyValue { 5 = value }. PutResponse has only a header (1).
fn message(data: &[u8]) -> Result<Answer<'_>, String> {
    let (head, message) = data.split_first_chunk::<5>().ok_or("a short message")?;
    let size = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    if head[0] != 0 || size != message.len() {
        return Err("a message in more than one frame, or compressed".to_owned());
    }
    Ok(field(message, 2)?
        .map(|pair| field(pair, 5))
        .transpose()?
        .flatten()
        .map_or(Answer::Nil, Answer::Value))
}

/// The first field of this number in a protocol buffer, if there is one.
fn field(mut bytes: &[u8], wanted: u64) -> Result<Option<&[u8]>, String> {
    while !bytes.is_empty() {
        let tag = varint(&mut bytes)?;
        match tag & 7 {
            0 => drop(varint(&mut bytes)?),
            2 => {
                let size = varint(&mut bytes)? as usize;
                let (value, rest) = bytes.split_at_checked(size).ok_or("a short field")?;
                if tag >> 3 == wanted {
                    return Ok(Some(value));
                }
                bytes = rest;
            }
            other => return Err(format!("wire type {other}")),
        }
    }
    Ok(None)
}

fn varint(bytes: &mut &[u8]) -> Result<u64, String> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first().ok_or("a short number")?;
        *bytes = rest;
        number |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Ok(number);
        }
    }
    Err("a long number".to_owned())
}

fn write_varint(out: &mut Vec<u8>, mut number: usize) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn varint_size(number: usize) -> usize {
    (number.max(1).ilog2() / 7 + 1) as usize
}

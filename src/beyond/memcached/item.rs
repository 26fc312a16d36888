//! What memcached calls an item, and the value that kv54 keeps for it. Data without flags is a plain
//! string: what others set, memcached's clients read, and the other way round.

use msgpack_rpc::Value;

use crate::entry::{Packed, Stamp};
use crate::rpc::codec;

/// The type of the MessagePack ext that an item with flags is: the flags in 4 bytes, the marks in one,
/// and the data.
const FLAGGED: i8 = -55;
/// The marks.
const STALE: u8 = 1;
const BEING_MADE: u8 = 2;

/// An item.
#[derive(Clone, Debug, Default, PartialEq)]
#[allow(clippy::struct_excessive_bools)] // each is a letter of the protocol
pub struct Item {
    /// The bytes that the client stored.
    pub data: Vec<u8>,
    /// The number that it stored beside them.
    pub flags: u32,
    /// When it ends, in milliseconds since 1970.
    pub end: Option<u64>,
    /// It changes with every write.
    pub cas: u64,
    /// It is to be made anew, and may be used meanwhile.
    pub is_stale: bool,
    /// A client has been told to make it anew.
    pub is_being_made: bool,
    /// The client that asked is to make it anew.
    pub(super) wins: bool,
    /// The client that asked knows it by its cas unique.
    pub(super) is_known: bool,
    /// The value that the data shows, in the form in which it is kept.
    pub(super) value: Option<Packed>,
}

impl Item {
    /// Reads what is kept. What memcached's clients have not written is the text that people read.
    pub(super) fn read(kept: &Packed, stamp: Stamp) -> Option<Self> {
        let (end, value) = (kept.end(), kept.clone().plain());
        let item = match flagged(&value) {
            _ if value.is_nil() => return None,
            Some((flags, marks, data)) => Item {
                data: data.to_owned(),
                flags,
                is_stale: marks & STALE != 0,
                is_being_made: marks & BEING_MADE != 0,
                ..Item::default()
            },
            None => {
                let string = codec::string(&value).map(<[u8]>::to_owned);
                let text = || value.value().map_or_else(|e| e.why, |v| v.to_string());
                Item {
                    data: string.unwrap_or_else(|| text().into()),
                    value: Some(value),
                    ..Item::default()
                }
            }
        };
        Some(Item {
            end,
            cas: unique(stamp),
            ..item
        })
    }

    /// The same item with other data, new.
    pub(super) fn with(&self, data: Vec<u8>) -> Self {
        Item {
            data,
            flags: self.flags,
            end: self.end,
            ..Item::default()
        }
    }

    /// What is to be kept, at this time: nil where it has ended.
    pub(super) fn kept(&self, now: u64) -> Packed {
        if self.end.is_some_and(|end| end <= now) {
            return Packed::default();
        }
        let marks = u8::from(self.is_stale) * STALE + u8::from(self.is_being_made) * BEING_MADE;
        if let (0, 0, Some(value)) = (self.flags, marks, &self.value) {
            return value.clone().until(self.end);
        }
        let value = match (self.flags, marks, std::str::from_utf8(&self.data)) {
            (0, 0, Ok(text)) => text.into(),
            (0, 0, Err(_)) => self.data.clone().into(),
            (flags, ..) => Value::Ext(
                FLAGGED,
                [&flags.to_be_bytes()[..], &[marks], &self.data].concat(),
            ),
        };
        Packed::of(value).until(self.end)
    }
}

fn flagged(mut value: &[u8]) -> Option<(u32, u8, &[u8])> {
    let ext = rmp::decode::read_ext_meta(&mut value).ok()?;
    let (flags, value) = value.split_first_chunk()?;
    let (marks, data) = value.split_first()?;
    (ext.typeid == FLAGGED).then_some((u32::from_be_bytes(*flags), *marks, data))
}

/// A stamp in 63 bits: libmemcached has no room for a twentieth digit. It tells the writes of a key apart,
/// through every gateway, and does not order them.
fn unique(stamp: Stamp) -> u64 {
    let mix = |hash: u64, part: u64| {
        let mixed = (hash ^ part).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mixed ^ mixed >> 32
    };
    let parts = [stamp.counter, stamp.writer, stamp.ballot];
    parts.into_iter().fold(0, mix) >> 1
}

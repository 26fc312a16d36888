//! What is written under a key: a value, and the stamp that orders writes. Here is also their
//! one wire form, `[counter, writer, value]`, or `[counter, writer, value, ballot]` after a swap.

use std::ops::Deref;
use std::sync::Arc;

use msgpack_rpc::Value;

use crate::cluster::{MAX_KEY, MAX_VALUE};
use crate::error::{Error, Kind};
use crate::rpc::Answer;
use crate::rpc::codec::{self, Encoded, MESSAGE, NIL, encode_array, encode_numbers, quoted};
use crate::sabotage::{Bug, planted};

/// Where the epoch begins in a counter, which has 63 bits.
const EPOCH: u32 = 37;

/// The type of the MessagePack ext that a value with a time to live is: in 8 bytes the milliseconds since
/// 1970 at which it ends, and the value. Nodes keep it as any other value; who reads it looks at the clock.
const ENDS: i8 = -54;

/// When a write happened, in an order that all nodes agree on: by counter, by writer, by ballot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stamp {
    /// One more than the highest that the writer saw at a majority.
    pub counter: u64,
    /// Drawn at random for each write: no two writes share a stamp.
    pub writer: u64,
    /// Of the swaps that build on this write, the latest; 0 is the write itself.
    pub ballot: u64,
}

impl Stamp {
    /// Above every stamp of a write. An asker that names it is answered with a stamp alone.
    pub const MAX: Stamp = Stamp::new(u64::MAX, u64::MAX, u64::MAX);

    /// Its three parts, as they are compared.
    pub const fn new(counter: u64, writer: u64, ballot: u64) -> Stamp {
        Stamp {
            counter,
            writer,
            ballot,
        }
    }

    /// What a set names as known. It needs no value, and says in the writer's place how many
    /// bytes it brings: a replica without room refuses it before anything is written.
    pub fn of_a_set(value: &[u8]) -> Stamp {
        Stamp::new(u64::MAX, size(value) as u64, u64::MAX)
    }

    /// How many bytes a set brings that names this as known.
    pub fn bytes_to_set(self) -> Option<usize> {
        let bytes = usize::try_from(self.writer).ok()?;
        (self.counter == u64::MAX && bytes <= MESSAGE.bytes).then_some(bytes)
    }

    /// How often the ring had begun to change when it was chosen.
    pub fn epoch(self) -> u64 {
        self.counter >> EPOCH
    }

    /// The last counter of an epoch.
    pub fn last(epoch: u64) -> u64 {
        ((epoch + 1) << EPOCH) - 1
    }

    /// Whether its key has used half of the stamps of an epoch.
    pub fn is_worn(self) -> bool {
        self.counter & 1 << (EPOCH - 1) != 0
    }

    /// What swaps build on where nothing is that was written in this epoch: below all its writes,
    /// and the same for everybody.
    pub fn nothing(epoch: u64) -> Stamp {
        Stamp::new(epoch << EPOCH, 0, 0)
    }

    /// The set or delete on which a swap builds.
    #[must_use]
    pub fn base(self) -> Stamp {
        Stamp { ballot: 0, ..self }
    }

    /// The same write after a swap with this ballot.
    #[must_use]
    pub fn swapped(self, ballot: u64) -> Stamp {
        Stamp { ballot, ..self }
    }

    /// A new write of this value, over what has this stamp.
    #[must_use]
    pub fn newer<V>(self, value: V) -> Entry<V> {
        let counter = self.counter.saturating_add(1);
        let writer = match planted(Bug::SameStampForTwoSets) {
            true => 0,
            false => fastrand::u64(..),
        };
        let stamp = Stamp::new(counter, writer, 0);
        Entry { stamp, value }
    }

    /// The beginning of an array of so many values, of which the first two are the stamp's: with 2,
    /// all of `[counter, writer]`.
    pub fn begin(self, values: u8) -> Encoded {
        encode_array(Some(0x90 | values), [self.counter, self.writer])
    }

    /// What stands before the value in an entry, and behind it, and where that begins.
    pub fn around(self) -> (Encoded, usize) {
        let mut around = self.begin(3 + u8::from(self.ballot > 0));
        let at = around.len();
        if self.ballot > 0 {
            around.extend_from_slice(&encode_numbers([self.ballot]));
        }
        (around, at)
    }
}

/// A ballot above this one. The last bits say whose it is.
pub fn next_ballot(ballot: u64, coordinator: u16) -> u64 {
    ((ballot >> 16) + 1) << 16 | u64::from(coordinator)
}

/// Whether one coordinator has drawn both ballots.
pub fn are_of_one_coordinator(one: u64, other: u64) -> bool {
    (one ^ other).trailing_zeros() >= 16
}

/// A value as the MessagePack that came: a node never looks into it. A clone shares the bytes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Packed(Option<Arc<[u8]>>); // nil, the value of an absent key, takes no memory

impl Packed {
    /// A value that people made.
    pub fn of(value: impl Into<Value>) -> Self {
        Packed::from(&*codec::encode(&value.into()))
    }

    /// The value as people read it. An error means that the bytes are not one MessagePack value.
    pub fn value(&self) -> Result<Value, Error> {
        codec::decode(self)
    }

    /// The same value, which ends at this time, in milliseconds since 1970; or never.
    #[must_use]
    pub fn until(self, end: Option<u64>) -> Self {
        match (self.plain(), end) {
            (value, Some(end)) if !value.is_nil() => {
                Packed::of(Value::Ext(ENDS, [&end.to_be_bytes(), &*value].concat()))
            }
            (value, _) => value,
        }
    }

    /// When it ends, if it does.
    pub fn end(&self) -> Option<u64> {
        Some(ending(self)?.0)
    }

    /// The value alone, whether it ends or not.
    #[must_use]
    pub fn plain(self) -> Self {
        match ending(&self) {
            Some((_, value)) => value.into(),
            None => self,
        }
    }

    /// Whether it is nil: no value at all.
    pub fn is_nil(&self) -> bool {
        self.0.is_none()
    }

    /// Replaces the value; in the same memory if the length is the same and no answer shares it.
    pub(crate) fn replace(&mut self, value: &[u8]) {
        match self.0.as_mut().and_then(Arc::get_mut) {
            Some(old) if old.len() == value.len() && value != NIL => old.copy_from_slice(value),
            _ => *self = value.into(),
        }
    }

    /// The value as the end of an answer.
    fn after(self, mut made: Encoded) -> Answer {
        if self.is_nil() {
            made.extend_from_slice(NIL);
        }
        Answer { made, kept: self.0 }
    }
}

impl From<&[u8]> for Packed {
    fn from(value: &[u8]) -> Self {
        Packed((value != NIL).then(|| value.into()))
    }
}

impl Deref for Packed {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or(NIL)
    }
}

impl From<Packed> for Answer {
    fn from(value: Packed) -> Self {
        value.after(Encoded::new())
    }
}

/// When a value ends, and the value alone; `None` if it does not end.
fn ending(mut value: &[u8]) -> Option<(u64, &[u8])> {
    // Most values are no extension: this is asked about each one, more than once.
    if !matches!(value.first()?, 0xc7..=0xc9 | 0xd4..=0xd8) {
        return None;
    }
    let ext = rmp::decode::read_ext_meta(&mut value).ok()?;
    let is_whole = ext.size as usize == value.len();
    let (end, value) = value.split_first_chunk()?;
    (ext.typeid == ENDS && is_whole).then_some((u64::from_be_bytes(*end), value))
}

/// Whether a value ends.
pub(crate) fn ends(value: &[u8]) -> bool {
    ending(value).is_some()
}

/// The bytes that a value takes in memory.
pub(crate) fn size(value: &[u8]) -> usize {
    match value {
        NIL => 0,
        value => value.len(),
    }
}

/// A value and when it was written. The value is kept in memory, or borrowed from a message.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Entry<V = Packed> {
    /// When it was written.
    pub stamp: Stamp,
    /// What was written. Nil is an absent key.
    pub value: V,
}

impl<V> Entry<V> {
    /// The same with a stamp above those of all earlier epochs. A new ring does not know what was
    /// deleted before it: its counters must not begin anew.
    #[must_use]
    pub fn of_epoch(mut self, epoch: u64) -> Self {
        if !planted(Bug::StampsWithoutEpoch) {
            self.stamp.counter = self.stamp.counter.max((epoch << EPOCH) + 1);
        }
        self
    }
}

impl Entry<&[u8]> {
    /// The same in memory of its own.
    pub fn to_owned(self) -> Entry {
        let (stamp, value) = (self.stamp, self.value.into());
        Entry { stamp, value }
    }
}

impl<'a> Entry<&'a Packed> {
    /// The same, borrowed from where it is kept.
    pub fn borrow(self) -> Entry<&'a [u8]> {
        let (stamp, value): (_, &[u8]) = (self.stamp, self.value);
        Entry { stamp, value }
    }
}

impl Entry {
    /// The same, borrowed.
    pub fn borrow(&self) -> Entry<&[u8]> {
        let (stamp, value) = (self.stamp, &*self.value);
        Entry { stamp, value }
    }
}

/// What a replica answers to `load`: the value is left out if the asker has it already.
pub type Loaded = Entry<Option<Packed>>;

impl From<Loaded> for Answer {
    fn from(Entry { stamp, value }: Loaded) -> Self {
        match value {
            None => stamp.begin(2).into(),
            Some(value) => Entry { stamp, value }.into(),
        }
    }
}

impl From<Entry> for Answer {
    fn from(Entry { stamp, value }: Entry) -> Self {
        let (around, at) = stamp.around();
        if at == around.len() {
            return value.after(around);
        }
        let (begin, end) = around.split_at(at);
        Encoded::from([begin, &*value, end].concat()).into() // an answer ends with the value that it shares
    }
}

/// Reads `[counter, writer]`, `[counter, writer, value]` or `[counter, writer, value, ballot]`.
fn read(bytes: &[u8]) -> Result<(Stamp, Option<&[u8]>), Error> {
    let items = codec::items_of_whole(bytes).unwrap_or_default();
    let number = |at: usize| codec::number(items.get(at)?);
    let ballot = items.get(3).map_or(Some(0), |ballot| codec::number(ballot));
    match (items.len(), number(0), number(1), ballot) {
        (2..=4, Some(counter), Some(writer), Some(ballot)) => {
            let stamp = Stamp::new(counter, writer, ballot);
            Ok((stamp, items.get(2).copied()))
        }
        _ => Err(odd()),
    }
}

fn odd() -> Error {
    Error::bad_request(
        "a stamp is [counter, writer], an entry [counter, writer, value] or [counter, writer, value, ballot], \
         numbers from 0 to 2^64-1",
    )
}

/// Reads an entry.
pub fn entry(bytes: &[u8]) -> Result<Entry<&[u8]>, Error> {
    let (stamp, value) = read(bytes)?;
    let value = value.ok_or_else(odd)?;
    Ok(Entry { stamp, value })
}

/// Reads the answer to a `load`.
pub fn loaded(bytes: &[u8]) -> Result<Loaded, Error> {
    let (stamp, value) = read(bytes)?;
    let value = value.map(Packed::from);
    Ok(Entry { stamp, value })
}

/// The stamp that the asker knows, if the request names one.
pub fn stamp(known: &[&[u8]]) -> Result<Option<Stamp>, Error> {
    match known {
        [] => Ok(None),
        [stamp] => Ok(Some(read(stamp)?.0)),
        _ => Err(Error::not_a_request("load", known.len() + 2)),
    }
}

/// The bytes of a key. Str, bin and old raw with the same bytes are the same key.
pub fn key(value: &[u8]) -> Result<&[u8], Error> {
    codec::string(value).ok_or_else(|| {
        let what = quoted(value);
        Error::bad_request(format!("a key is a string or bytes, not {what}"))
    })
}

/// The value that a guest sends: how long it lives is a parameter of its own.
pub fn value(value: &[u8]) -> Result<&[u8], Error> {
    match ends(value) {
        false => Ok(value),
        true => Err(Error::bad_request("a value cannot be an ext of type -54")),
    }
}

/// Refuses a key that is too long.
pub fn check_key(key: &[u8]) -> Result<(), Error> {
    let why = |len| format!("a key of {len} bytes, at most {MAX_KEY} are taken");
    match key.len() {
        ..=MAX_KEY => Ok(()),
        len => Err(Error::too_large(why(len))),
    }
}

/// How much a value that is no string may be. It must fit into every message that carries it.
const NESTED: codec::Bounds = codec::Bounds {
    bytes: MAX_VALUE,
    values: 60_000,
    depth: 10,
};

/// Refuses a value that is too large to be kept, or to fit into every message that carries it.
pub fn check_value(value: &[u8]) -> Result<(), Error> {
    let inner = ending(value).map(|(_, inner)| inner);
    if inner.is_some_and(|inner| inner == NIL || ends(inner)) {
        let why = "what ends is a value, which is not nil and does not end";
        return Err(Error::bad_request(why));
    }
    let value = inner.unwrap_or(value);
    let (length, bounds) = match codec::string(value) {
        Some(string) => (string.len(), MESSAGE),
        None => (0, NESTED),
    };
    let why = match codec::check(value, bounds) {
        Ok(()) if length <= MAX_VALUE => return Ok(()),
        Ok(()) => format!("{length} bytes, at most {MAX_VALUE} are taken"),
        Err(error) if error.kind == Kind::TooLarge => error.why,
        Err(error) => return Err(error),
    };
    Err(Error::too_large(format!("a value of {why}")))
}

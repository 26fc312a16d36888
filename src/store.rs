//! What a replica keeps in memory: for each part of the ring that it holds, a map
//! from key to the newest entry that it has been told. Entries are never removed, so
//! the place at which a key was first inserted is its number for good.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex};

use indexmap::IndexMap;
use msgpack_rpc::Value;
use rmpv::ValueRef;
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;
use tokio::time::Instant;

use crate::cluster::{Cluster, MAX_KEY, MAX_VALUE};
use crate::error::{Error, Kind, quoted};
use crate::rpc::codec::{self, Short};
use crate::rpc::lock;
use crate::sabotage::{Bug, planted};

/// When a write happened, in an order that all nodes agree on: by counter, then by writer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stamp {
    /// One more than the highest that the writer saw at a majority.
    pub counter: u64,
    /// Drawn at random for each write: no two writes share a stamp.
    pub writer: u64,
}

impl Stamp {
    /// Above every stamp of a write: who knows it asks for stamps alone.
    pub const MAX: Stamp = Stamp {
        counter: u64::MAX,
        writer: u64::MAX,
    };

    fn read(counter: Option<u64>, writer: Option<u64>) -> Result<Self, Error> {
        match (counter, writer) {
            (Some(counter), Some(writer)) => Ok(Stamp { counter, writer }),
            _ => Err(Error::bad_request(
                "a stamp is [counter, writer], both from 0 to 2^64-1",
            )),
        }
    }

    /// Appends its two numbers as MessagePack.
    fn write(self, out: &mut impl io::Write) {
        for number in [self.counter, self.writer] {
            let written = rmp::encode::write_uint(out, number);
            debug_assert!(written.is_ok(), "memory takes every byte");
        }
    }

    /// `[counter, writer]` as MessagePack.
    pub fn encode(self) -> Short {
        let mut encoded = Short::from_slice(&[0x92]);
        self.write(&mut encoded);
        encoded
    }

    /// A new write of this value, over what has this stamp.
    #[must_use]
    pub fn newer<V>(self, value: V) -> Entry<V> {
        let counter = self.counter.saturating_add(1);
        let writer = if planted(Bug::SameStampForTwoSets) {
            0
        } else {
            fastrand::u64(..)
        };
        Entry {
            stamp: Stamp { counter, writer },
            value,
        }
    }
}

/// A value, or a reference to one, and when it was written. A nil value is an absent key.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Entry<V = Value> {
    /// When it was written.
    pub stamp: Stamp,
    /// What was written.
    pub value: V,
}

impl Entry {
    /// The entry as it travels; refuses a value that is too large to be kept.
    pub fn encode(&self) -> Result<Encoded, Error> {
        let value = &self.value.as_ref();
        let stamp = self.stamp;
        Entry { stamp, value }.encode()
    }
}

impl Entry<&ValueRef<'_>> {
    /// The entry as it travels; refuses a value that is too large to be kept.
    pub fn encode(self) -> Result<Encoded, Error> {
        let mut bytes = Vec::with_capacity(24 + string(self.value).map_or(8, <[u8]>::len));
        bytes.push(0x93);
        self.stamp.write(&mut bytes);
        let head = bytes.len();
        write(&mut bytes, self.value)?;
        let stamp = self.stamp;
        Ok(Encoded { stamp, bytes, head })
    }
}

/// An entry as it travels: `[counter, writer, value]` as MessagePack.
pub struct Encoded {
    stamp: Stamp,
    bytes: Vec<u8>,
    head: usize, // of the bytes, those before the value
}

impl Encoded {
    /// All of it.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The value as it is kept.
    fn packed(&self) -> &[u8] {
        match self.bytes.get(self.head..).unwrap_or_default() {
            [0xc0] => &[],
            value => value,
        }
    }
}

/// What a replica answers to `load`: its stamp, and the value unless the asker has it already.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    /// The stamp of what the replica has; zero where it has nothing.
    pub stamp: Stamp,
    /// The value, if its stamp is above the one that the asker knows.
    pub value: Option<Value>,
}

/// How much a value that is no string may be. It must fit into every message that carries it.
const NESTED: codec::Bounds = codec::Bounds {
    bytes: MAX_VALUE,
    values: 60_000,
    depth: 10,
};
/// What an entry takes beside its key and value, in bytes: its place in the map, and two allocations.
const OVERHEAD: usize = 100;

/// What one page of a scan may take, in bytes, unless it is a single entry: little enough to
/// be made while others wait, and for its values to fit into one message.
const PAGE: usize = 16 << 10;

/// The memory of one node.
///
/// ```
/// use kv54::{cluster::Cluster, store::{Stamp, Store}};
///
/// let alone = Cluster::parse("cluster.toml".as_ref(), "[nodes]\nalice = 'alice:5401'")?;
/// let store = Store::new(alone.into(), 0);
/// let (green, black) = ("green".into(), "black".into());
/// let first = Stamp::default().newer(&green);
/// let second = first.stamp.newer(&black);
/// store.store(b"tea", second)?;
/// store.store(b"tea", first)?; // comes late, and is older
/// assert_eq!(store.load(b"tea", None)?.value, Some("black".into()));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Store {
    cluster: Arc<Cluster>,
    me: usize,
    ring: u32, // the fingerprint that who asks must name
    started: Instant,
    start_id: u64,
    kept: Mutex<Kept>,
}

struct Kept {
    bytes: usize,
    parts: BTreeMap<usize, Part>,
}

#[derive(Default)]
struct Part {
    entries: IndexMap<SmallVec<[u8; 16]>, Packed>,
    tombstones: usize,
    digest: u64,
    missing: BTreeMap<usize, Progress>, // its replicas that have not been read to the end
}

/// How far another replica's entries of a part have been read.
#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    read: usize,
    of: usize,
}

/// An entry as it is kept: its value as MessagePack, no bytes at all where it is nil.
struct Packed {
    stamp: Stamp,
    value: Box<[u8]>,
}

impl Store {
    /// An empty store for the node at place `me`. It knows nothing of what the node may have
    /// answered before it started, and must hear from the other replicas first.
    pub fn new(cluster: Arc<Cluster>, me: usize) -> Self {
        let mut parts = BTreeMap::new();
        for part in 0..cluster.nodes().len() {
            let (mine, others): (Vec<usize>, _) =
                cluster.replicas(part).partition(|node| *node == me);
            if !mine.is_empty() {
                let missing = others
                    .into_iter()
                    .map(|node| (node, Progress::default()))
                    .collect();
                parts.insert(
                    part,
                    Part {
                        missing,
                        ..Part::default()
                    },
                );
            }
        }
        Store {
            ring: cluster.fingerprint(cluster.name(me)),
            cluster,
            me,
            started: Instant::now(),
            start_id: fastrand::u64(..),
            kept: Mutex::new(Kept { bytes: 0, parts }),
        }
    }

    /// This store, for who asks on the same `ring`.
    pub fn on(&self, ring: &ValueRef<'_>) -> Result<&Self, Error> {
        if ring.as_u64() == Some(self.ring.into()) {
            return Ok(self);
        }
        let (name, ours, names) = (self.name(), self.ring, self.cluster.names());
        Err(Error::new(
            Kind::WrongRing,
            format!(
                "{name}'s ring is {ours} ({}, window {:?}), yours is {}: use the same cluster.toml",
                names.join(" "),
                self.cluster.window,
                quoted(ring),
            ),
        ))
    }

    /// What is kept under this key, without the value where `known` is as new. Refused
    /// while another replica may know of a write that was here before this node's start.
    pub fn load(&self, key: &[u8], known: Option<Stamp>) -> Result<Loaded, Error> {
        let kept = lock(&self.kept);
        let part = kept.part(self.part(key)?)?;
        if !part.missing.is_empty() && !planted(Bug::JoiningAnswersLoad) {
            let names = self.names(part.missing.keys()).join(", ");
            return Err(Error::new(Kind::Joining, format!("waiting for {names}")));
        }
        let packed = part.entries.get(key);
        let stamp = packed.map_or(Stamp::default(), |packed| packed.stamp);
        let value = match packed {
            _ if known.is_some_and(|known| known >= stamp) => None,
            Some(packed) => Some(unpack(&packed.value)?),
            None => Some(Value::Nil),
        };
        Ok(Loaded { stamp, value })
    }

    /// Keeps the entry if it is newer than what is kept under this key; answers nil either way.
    pub fn store(&self, key: &[u8], entry: Entry<&ValueRef<'_>>) -> Result<Value, Error> {
        self.keep(key, &entry.encode()?)
    }

    /// The same for an entry that is encoded already.
    pub fn keep(&self, key: &[u8], entry: &Encoded) -> Result<Value, Error> {
        let (stamp, value) = (entry.stamp, entry.packed());
        if !(1..1 << 63).contains(&stamp.counter) {
            return Err(Error::bad_request(
                "a stamp's counter is from 1 to 2^63 - 1",
            ));
        }
        let number = self.part(key)?;
        let mut kept = lock(&self.kept);
        let Kept { bytes, parts } = &mut *kept;
        let part = parts.entry(number).or_default();
        let old = part.entries.get_mut(key);
        if old.as_ref().is_some_and(|old| old.stamp >= stamp) && !planted(Bug::OldEntryReplacesNew)
        {
            return Ok(Value::Nil);
        }
        let freed = old.as_ref().map_or(0, |old| old.value.len());
        let taken = value.len()
            + if old.is_some() {
                0
            } else {
                key.len() + OVERHEAD
            };
        if taken > freed && *bytes + taken - freed > self.cluster.memory {
            let why = format!(
                "{} keeps {bytes} bytes, at most {}",
                self.name(),
                self.cluster.memory
            );
            return Err(Error::new(Kind::Full, why));
        }
        *bytes = *bytes + taken - freed;
        let key_hash = crc32fast::hash(key);
        part.digest ^= digest(key_hash, stamp);
        part.tombstones += usize::from(value.is_empty());
        let Some(old) = old else {
            let (key, value) = (SmallVec::from_slice(key), value.into());
            part.entries.insert(key, Packed { stamp, value });
            return Ok(Value::Nil);
        };
        part.digest ^= digest(key_hash, old.stamp);
        part.tombstones -= usize::from(old.value.is_empty());
        old.stamp = stamp;
        match old.value.len() == value.len() {
            true => old.value.copy_from_slice(value), // nothing to free, nothing to take
            false => old.value = value.into(),
        }
        Ok(Value::Nil)
    }

    /// One page of a part: `[start id, next cursor or nil, [[key, entry] …]]`. A cursor is the
    /// number of entries before it, from 0; it holds for as long as the start id stays the same.
    pub fn scan(&self, part: &ValueRef<'_>, cursor: &ValueRef<'_>) -> Result<Value, Error> {
        let place = |value: &ValueRef<'_>| {
            value
                .as_u64()
                .and_then(|number| usize::try_from(number).ok())
        };
        let (number, cursor) = place(part)
            .zip(place(cursor))
            .ok_or_else(|| Error::bad_request("a part and a cursor are integers from 0"))?;
        let kept = lock(&self.kept);
        let entries = &kept.part(number)?.entries;
        let (mut page, mut size) = (Vec::new(), 0);
        for (key, packed) in entries.get_range(cursor..).into_iter().flatten() {
            size += key.len() + packed.value.len() + OVERHEAD;
            if size > PAGE && !page.is_empty() {
                break;
            }
            let entry = Loaded {
                stamp: packed.stamp,
                value: Some(unpack(&packed.value)?),
            };
            page.push(Value::Array(vec![Value::from(&key[..]), entry.into()]));
        }
        let next = cursor.saturating_add(page.len());
        let next = if next < entries.len() {
            next.into()
        } else {
            Value::Nil
        };
        Ok(Value::Array(vec![self.start_id.into(), next, page.into()]))
    }

    /// The parts that this node holds together with each other node.
    pub fn shared(&self) -> BTreeMap<usize, Vec<usize>> {
        let mut shared = BTreeMap::<_, Vec<_>>::new();
        for part in lock(&self.kept).parts.keys() {
            for node in self.cluster.replicas(*part).filter(|node| *node != self.me) {
                shared.entry(node).or_default().push(*part);
            }
        }
        shared
    }

    /// Notes how many of a part's entries at another replica have been read.
    pub fn has_read(&self, part: usize, place: usize, read: usize, of: usize) {
        if let Some(part) = lock(&self.kept).parts.get_mut(&part) {
            part.missing
                .entry(place)
                .and_modify(|progress| *progress = Progress { read, of });
        }
    }

    /// Notes that another replica of a part has been read to the end.
    pub fn has_all(&self, part: usize, place: usize) {
        if let Some(part) = lock(&self.kept).parts.get_mut(&part) {
            part.missing.remove(&place);
            if planted(Bug::ReadyAfterOneNeighbour) {
                part.missing.clear();
            }
        }
    }

    /// When this node started.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// What there is to say about this node.
    pub fn status(&self) -> Status {
        let kept = lock(&self.kept);
        let parts = || kept.parts.values();
        let tombstones = parts().map(|part| part.tombstones).sum();
        let missing: BTreeSet<usize> = parts()
            .flat_map(|part| part.missing.keys().copied())
            .collect();
        let owner = |number: &usize| self.cluster.name(*number).to_owned();
        Status {
            name: self.name().to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            state: if missing.is_empty() {
                "ready"
            } else {
                "joining"
            }
            .to_owned(),
            waiting_for: self.names(&missing).into_iter().map(String::from).collect(),
            progress: kept.progress(self.cluster.copies()),
            ring: self.ring,
            keys: parts().map(|part| part.entries.len()).sum::<usize>() - tombstones,
            tombstones,
            bytes: kept.bytes,
            entries: kept
                .parts
                .iter()
                .map(|(n, part)| (owner(n), part.entries.len()))
                .collect(),
            digests: kept
                .parts
                .iter()
                .map(|(n, part)| (owner(n), part.digest()))
                .collect(),
            uptime_s: self.started.elapsed().as_secs(),
        }
    }

    /// The ring that this node is part of.
    pub fn cluster(&self) -> &Arc<Cluster> {
        &self.cluster
    }

    /// This node's place in the ring.
    pub fn place(&self) -> usize {
        self.me
    }

    /// This node's name.
    pub fn name(&self) -> &str {
        self.cluster.name(self.me)
    }

    fn names<'a>(&self, places: impl IntoIterator<Item = &'a usize>) -> Vec<&str> {
        places
            .into_iter()
            .map(|place| self.cluster.name(*place))
            .collect()
    }

    /// The part of this key, if it is one that this node holds.
    fn part(&self, key: &[u8]) -> Result<usize, Error> {
        check_key(key)?;
        let part = self.cluster.owner(key);
        if self.cluster.replicas(part).any(|node| node == self.me) {
            return Ok(part);
        }
        let why = format!(
            "{:?} is not a key of {}",
            String::from_utf8_lossy(key),
            self.name()
        );
        Err(Error::new(Kind::WrongRing, why))
    }
}

impl Part {
    fn digest(&self) -> String {
        format!("{:016x}", self.digest)
    }
}

impl Kept {
    fn part(&self, number: usize) -> Result<&Part, Error> {
        let missing = || Error::new(Kind::WrongRing, format!("part {number} is not kept here"));
        self.parts.get(&number).ok_or_else(missing)
    }

    /// How much of what the other replicas keep has been read, in percent.
    fn progress(&self, copies: usize) -> usize {
        let of_part = |part: &Part| {
            let reading = part.missing.values().map(|reading| match reading.of {
                0 => 0,
                of => (reading.read.saturating_mul(100) / of).min(99), // as told by the other
            });
            (copies - 1 - part.missing.len()) * 100 + reading.sum::<usize>()
        };
        let whole = self.parts.len() * (copies - 1);
        self.parts
            .values()
            .map(of_part)
            .sum::<usize>()
            .checked_div(whole)
            .unwrap_or(100)
    }
}

/// What a node answers to `status`.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)] // a node of another version may tell less
pub struct Status {
    /// The node's name.
    pub name: String,
    /// The version of kv54 that runs there.
    pub version: String,
    /// `joining` or `ready`.
    pub state: String,
    /// The nodes that it must hear from before it is ready.
    pub waiting_for: Vec<String>,
    /// How much it has heard of what it must hear, in percent.
    pub progress: usize,
    /// The fingerprint that `load`, `store` and `scan` to this node must carry.
    pub ring: u32,
    /// Keys with a value.
    pub keys: usize,
    /// Keys that were deleted: their stamps stay, so that no old copy comes back.
    pub tombstones: usize,
    /// Keys, values and overhead, in bytes.
    pub bytes: usize,
    /// How many entries it holds of each part, by the part's owner: keys and tombstones.
    pub entries: BTreeMap<String, usize>,
    /// A digest of each part, by its owner: equal where two nodes hold the same.
    pub digests: BTreeMap<String, String>,
    /// Seconds since the node started.
    pub uptime_s: u64,
}

impl From<Status> for Value {
    fn from(status: Status) -> Self {
        // By way of JSON, whose maps stay maps: alone, rmpv makes an array of a struct.
        let status = serde_json::to_value(status).map(rmpv::ext::to_value);
        status.map_or(Value::Nil, |status| status.unwrap_or(Value::Nil)) // neither lacks a part of it
    }
}

impl TryFrom<Value> for Status {
    type Error = Error;

    fn try_from(value: Value) -> Result<Self, Error> {
        rmpv::ext::from_value(value).map_err(|error| Error::bad_request(error.to_string()))
    }
}

/// The bytes of a string, whichever way it is written.
fn string<'a>(value: &'a ValueRef<'_>) -> Option<&'a [u8]> {
    match value {
        ValueRef::String(text) => Some(text.as_bytes()),
        ValueRef::Binary(bytes) => Some(bytes),
        _ => None,
    }
}

/// The bytes of a key. Str, bin and old raw with the same bytes are the same key.
pub fn key<'a>(value: &'a ValueRef<'_>) -> Result<&'a [u8], Error> {
    string(value).ok_or_else(|| {
        let what = quoted(value);
        Error::bad_request(format!("a key is a string or bytes, not {what}"))
    })
}

/// The stamp that the asker knows, if the request names one.
pub fn stamp(known: &[ValueRef<'_>]) -> Result<Option<Stamp>, Error> {
    match known {
        [] => Ok(None),
        [stamp] => stamp.try_into().map(Some),
        _ => Err(Error::not_a_request("load", known.len() + 2)),
    }
}

/// Refuses a key that is too long.
pub fn check_key(key: &[u8]) -> Result<(), Error> {
    match key.len() {
        ..=MAX_KEY => Ok(()),
        len => Err(Error::new(
            Kind::TooLarge,
            format!("a key of {len} bytes, at most {MAX_KEY} are taken"),
        )),
    }
}

/// Refuses a value that is too large to be kept, or to fit into every message that carries it.
pub fn check_value(value: &ValueRef<'_>) -> Result<(), Error> {
    write(&mut Vec::new(), value)
}

/// Appends a value as MessagePack, if it is not too large.
fn write(out: &mut Vec<u8>, value: &ValueRef<'_>) -> Result<(), Error> {
    let start = out.len();
    let size = string(value).map(<[u8]>::len);
    if let Some(length) = size.filter(|size| *size > MAX_VALUE) {
        let why = format!("a value of {length} bytes, at most {MAX_VALUE} are taken");
        return Err(Error::new(Kind::TooLarge, why));
    }
    codec::write_ref(out, value);
    if size.is_some() {
        return Ok(());
    }
    codec::check(out.get(start..).unwrap_or_default(), NESTED)
        .map_err(|e| Error::new(e.kind, format!("a value of {}", e.why)))
}

fn unpack(mut packed: &[u8]) -> Result<Value, Error> {
    match packed {
        [] => Ok(Value::Nil),
        _ => codec::read(&mut packed),
    }
}

/// One entry's share of a part's digest. The writer is random, which does most of the
/// work; the rest is the finalizer of `SplitMix64` (Steele, Lea, Flood 2014).
fn digest(key_hash: u32, stamp: Stamp) -> u64 {
    let mut hash = stamp.writer ^ stamp.counter.rotate_left(32) ^ u64::from(key_hash) << 16;
    hash = (hash ^ hash >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ hash >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ hash >> 31
}

impl From<Loaded> for Value {
    fn from(Loaded { stamp, value }: Loaded) -> Self {
        let mut items = Vec::with_capacity(3);
        items.extend([stamp.counter.into(), stamp.writer.into()]);
        items.extend(value);
        Value::Array(items)
    }
}

impl From<Entry> for Value {
    fn from(Entry { stamp, value }: Entry) -> Self {
        let value = Some(value);
        Loaded { stamp, value }.into()
    }
}

impl From<Stamp> for Value {
    fn from(stamp: Stamp) -> Self {
        Loaded { stamp, value: None }.into()
    }
}

impl TryFrom<&ValueRef<'_>> for Stamp {
    type Error = Error;

    fn try_from(value: &ValueRef<'_>) -> Result<Self, Error> {
        let numbers = value.as_array();
        let number = |n: usize| numbers?.get(n)?.as_u64();
        Stamp::read(number(0), number(1))
    }
}

impl TryFrom<Value> for Loaded {
    type Error = Error;

    fn try_from(value: Value) -> Result<Self, Error> {
        let mut items = if let Value::Array(items) = value {
            items
        } else {
            Vec::new()
        };
        let value = if items.len() == 3 { items.pop() } else { None };
        match items.as_slice() {
            [counter, writer] => {
                let stamp = Stamp::read(counter.as_u64(), writer.as_u64())?;
                Ok(Loaded { stamp, value })
            }
            _ => Err(Error::bad_request("an entry is [counter, writer, value]")),
        }
    }
}

impl<'a> TryFrom<&'a ValueRef<'a>> for Entry<&'a ValueRef<'a>> {
    type Error = Error;

    fn try_from(value: &'a ValueRef<'a>) -> Result<Self, Error> {
        let stamp = value.try_into()?;
        match value.as_array().map(Vec::as_slice) {
            Some([_, _, value]) => Ok(Entry { stamp, value }),
            _ => Err(Error::bad_request("an entry is [counter, writer, value]")),
        }
    }
}

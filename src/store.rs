//! What a replica keeps in memory: for each part of the ring that it holds, a map
//! from key to the newest entry that it has been told. Entries are never removed, so
//! the place at which a key was first inserted never changes: the cursor of a scan counts on it.

mod memory;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use bytesize::ByteSize;
use indexmap::IndexMap;
use smallvec::SmallVec;
use tokio::time::Instant;

use crate::cluster::{Cluster, Limits};
use crate::entry::{Entry, Loaded, Packed, Stamp, check_key, check_value, size};
use crate::error::{Error, Kind};
use crate::rpc::codec::{self, Encoded, quoted};
use crate::rpc::{Answer, lock};
use crate::sabotage::{Bug, planted};
use crate::status::Status;
use memory::{Memory, Refusal, Usage};

/// What an entry takes beside its key and value, in bytes: its place in the map, and two allocations.
pub(crate) const OVERHEAD: usize = 100;

/// What one page of a scan takes, in bytes, unless its asker names another size.
const PAGE: usize = 16 << 10;
/// What one page may take, unless it is a single entry: little enough to be made while others wait,
/// and for its values, which may be as many as its bytes, to fit into one message.
pub const MAX_PAGE: usize = 64 << 10;

/// The memory of one node.
pub struct Store {
    /// The ring that this node is part of.
    pub cluster: Arc<Cluster>,
    /// This node's place in the ring.
    pub place: usize,
    /// When this node started.
    pub started: Instant,
    start_id: u64,
    fingerprint: u32, // what a call from another node must name
    limits: Mutex<Limits>,
    kept: Mutex<Kept>,
}

struct Kept {
    memory: Memory,
    parts: Parts,
    // How each other node was read lately: bytes in a second, or why it could not be read.
    reading: BTreeMap<usize, Result<usize, String>>,
}

/// The parts that this node holds, by their owners' places.
type Parts = BTreeMap<usize, Part>;

/// A short key lies beside its entry.
type Key = SmallVec<[u8; 16]>;

#[derive(Default)]
struct Part {
    entries: IndexMap<Key, Entry>,
    tombstones: usize,
    digest: u64,
    // Its replicas that were not read to the end: how many entries were read, and of how many.
    missing: BTreeMap<usize, (usize, usize)>,
    had_entries: bool,     // at another replica
    doubt: Option<String>, // why this node cannot vouch for it
}

impl Store {
    /// An empty store for the node at this place. It knows nothing of what the node may have
    /// answered before it started, and must hear from the other replicas first.
    pub fn new(cluster: Arc<Cluster>, place: usize) -> Self {
        let held = |number: &usize| cluster.replicas(*number).any(|node| node == place);
        let part = |number| {
            let others = cluster.replicas(number).filter(|node| *node != place);
            let missing = others.map(|node| (node, (0, 0))).collect();
            let part = Part {
                missing,
                ..Part::default()
            };
            (number, part)
        };
        let kept = Kept {
            memory: Memory::new(cluster.limits.memory, cluster.limits.window),
            parts: (0..cluster.nodes().len()).filter(held).map(part).collect(),
            reading: BTreeMap::new(),
        };
        Store {
            fingerprint: cluster.fingerprint(cluster.name(place)),
            limits: Mutex::new(cluster.limits),
            cluster,
            place,
            started: Instant::now(),
            start_id: fastrand::u64(..),
            kept: Mutex::new(kept),
        }
    }

    /// The limits of this node now; those in `cluster` are the ones that it started with.
    pub fn limits(&self) -> Limits {
        *lock(&self.limits)
    }

    /// Keeps to these limits from now on. What is kept stays.
    pub fn limit(&self, limits: Limits) {
        *lock(&self.limits) = limits;
        lock(&self.kept).memory.own.limit = limits.memory;
    }

    /// This store, for an asker that names its `ring` by the fingerprint.
    pub fn on(&self, ring: &[u8]) -> Result<&Self, Error> {
        if codec::number(ring) == Some(self.fingerprint.into()) {
            return Ok(self);
        }
        let why = format!(
            "{}'s ring is {} ({}), yours is {}: use the same cluster.toml",
            self.name(),
            self.fingerprint,
            self.cluster.ring(),
            quoted(ring),
        );
        Err(Error::new(Kind::WrongRing, why))
    }

    /// What is kept under this key, without the value where `known` is as new. Refused
    /// while another replica may know of a write that was here before this node's start, and for a
    /// set that brings more than there is memory for.
    pub fn load(&self, key: &[u8], known: Option<Stamp>) -> Result<Loaded, Error> {
        let mut kept = lock(&self.kept);
        let Kept { memory, parts, .. } = &mut *kept;
        let (number, part) = self.part(key, parts)?;
        if !part.missing.is_empty() && !planted(Bug::JoiningAnswersLoad) {
            let names = part.missing.keys().map(|place| self.cluster.name(*place));
            let why = format!("waiting for {}", names.collect::<Vec<_>>().join(", "));
            return Err(Error::new(Kind::Joining, why));
        }
        let entry = part.entries.get(key);
        let stamp = entry.map_or(Stamp::default(), |entry| entry.stamp);
        let value = match known {
            Some(known) if known >= stamp => None,
            _ => Some(entry.map_or(Packed::default(), |entry| entry.value.clone())),
        };
        if let Some(bytes) = known.and_then(Stamp::bytes_to_set) {
            let added = match entry {
                Some(old) => bytes.saturating_sub(size(&old.value)),
                None => bytes + key.len() + OVERHEAD,
            };
            let allowed = memory.allow(key, added, self.others(number));
            allowed.map_err(|refusal| self.full(&refusal, added))?;
        }
        Ok(Entry { stamp, value })
    }

    fn full(&self, refusal: &Refusal, added: usize) -> Error {
        let name = self.cluster.name(refusal.place.unwrap_or(self.place));
        let Usage { bytes, limit } = refusal.usage;
        let kept = format!("{name} keeps {bytes} bytes of at most {limit}");
        match refusal.coming {
            0 => Error::new(Kind::Full, format!("{kept}, no room for {added} more")),
            coming => Error::new(Kind::Busy, format!("{kept}, and {coming} may come")),
        }
    }

    /// Keeps the entry if it is newer than what is kept under this key. Refuses a value that is
    /// too large.
    pub fn store(&self, key: &[u8], entry: Entry<&[u8]>) -> Result<(), Error> {
        check_value(entry.value)?;
        self.keep(key, entry)
    }

    /// The same for a value that was checked before.
    pub fn keep(&self, key: &[u8], entry: Entry<&[u8]>) -> Result<(), Error> {
        if !(1..1 << 63).contains(&entry.stamp.counter) {
            let why = "a stamp's counter is from 1 to 2^63 - 1";
            return Err(Error::bad_request(why));
        }
        let mut kept = lock(&self.kept);
        let Kept { memory, parts, .. } = &mut *kept;
        let (_, part) = self.part(key, parts)?;
        let found = part.entries.get_full(key);
        let (index, old) = found.map(|(index, _, old)| (index, old)).unzip();
        if old.is_some_and(|old| old.stamp >= entry.stamp) && !planted(Bug::OldEntryReplacesNew) {
            return Ok(());
        }
        let freed = old.map_or(0, |old| size(&old.value));
        let added = size(entry.value) + old.map_or(key.len() + OVERHEAD, |_| 0);
        if planted(Bug::FullReplicaRefusesToStore) && !memory.own.has_room(added) {
            return Err(Error::new(Kind::Full, "planted"));
        }
        memory.keep(key, added, freed);
        part.put(index, key, entry);
        Ok(())
    }

    /// One page of a part: `[start id, next cursor or nil, [[key, entry] …]]`. A cursor is the
    /// number of entries before it, from 0; it holds for as long as the start id stays the same.
    /// `page` is the cursor, and how many bytes are wanted at most.
    pub fn scan(&self, part: &[u8], page: &[&[u8]]) -> Result<Answer, Error> {
        let (cursor, most) = match *page {
            [cursor] => (cursor, None),
            [cursor, most] => (cursor, Some(most)),
            _ => return Err(Error::not_a_request("scan", page.len() + 2)),
        };
        let place = |value| codec::number(value).and_then(|number| usize::try_from(number).ok());
        let most = most.map_or(Some(PAGE), place);
        let Some(((number, cursor), most)) = place(part).zip(place(cursor)).zip(most) else {
            let why = "a part, a cursor and a size are integers from 0";
            return Err(Error::bad_request(why));
        };
        let kept = lock(&self.kept);
        let not_kept = || Error::new(Kind::WrongRing, format!("part {number} is not kept here"));
        let entries = &kept.parts.get(&number).ok_or_else(not_kept)?.entries;
        let (mut page, mut count, mut bytes) = (Vec::new(), 0_u32, 0);
        for (key, entry) in entries.get_range(cursor..).into_iter().flatten() {
            bytes += key.len() + size(&entry.value) + OVERHEAD;
            if bytes > most.min(MAX_PAGE) && count > 0 {
                break;
            }
            count += 1;
            page.push(0x92);
            page.extend_from_slice(&codec::encode_bytes(key));
            page.extend_from_slice(&entry.stamp.begin(3));
            page.extend_from_slice(&entry.value);
        }
        let next = match cursor.saturating_add(count as usize) {
            next if next < entries.len() => codec::encode_numbers([next as u64]),
            _ => Encoded::from_slice(codec::NIL),
        };
        let header = [&[0xdd], &count.to_be_bytes()[..]].concat();
        let start_id = codec::encode_numbers([self.start_id]);
        let answer = [&[0x93], &*start_id, &next, &header, &page].concat();
        Ok(Encoded::from(answer).into())
    }

    /// The parts that this node holds together with each other node.
    pub fn shared(&self) -> BTreeMap<usize, Vec<usize>> {
        let mut shared = BTreeMap::<_, Vec<_>>::new();
        for part in lock(&self.kept).parts.keys() {
            for node in self.others(*part) {
                shared.entry(node).or_default().push(*part);
            }
        }
        shared
    }

    /// Notes what another node says of itself: how much it keeps, and of which parts.
    pub fn note_status(&self, place: usize, theirs: &Status) {
        let mut kept = lock(&self.kept);
        let (bytes, limit) = (theirs.bytes, theirs.memory);
        if limit > 0 {
            let seen = (Instant::now(), Usage { bytes, limit });
            kept.memory.others.insert(place, seen); // an older version has none
        }
        for (number, part) in &mut kept.parts {
            let entries = theirs.entries.get(self.cluster.name(*number));
            part.had_entries |= entries.is_some_and(|entries| *entries > 0);
        }
    }

    /// Notes how many of a part's entries at another replica have been read: it can be read.
    pub fn note_progress(&self, part: usize, place: usize, read: usize, of: usize) {
        let mut kept = lock(&self.kept);
        let reading = kept.reading.entry(place).or_insert(Ok(0));
        *reading = Ok(reading.as_ref().map_or(0, |rate| *rate));
        let part = kept.parts.get_mut(&part);
        if let Some(progress) = part.and_then(|part| part.missing.get_mut(&place)) {
            *progress = (read, of);
        }
    }

    /// Notes how many bytes came from another node in a second, if it can be read.
    pub fn note_rate(&self, place: usize, rate: usize) {
        if let Some(Ok(old)) = lock(&self.kept).reading.get_mut(&place) {
            *old = rate;
        }
    }

    /// Notes why another node cannot be read.
    pub fn note_trouble(&self, place: usize, why: String) {
        lock(&self.kept).reading.insert(place, Err(why));
    }

    /// Notes that another replica of a part has been read to the end.
    pub fn mark_read(&self, part: usize, place: usize) {
        if let Some(part) = lock(&self.kept).parts.get_mut(&part) {
            part.missing.remove(&place);
            if planted(Bug::ReadyAfterOneNeighbour) {
                part.missing.clear();
            }
        }
    }

    /// Whether this node's word counts for a part.
    pub fn is_ready_for(&self, part: usize) -> bool {
        let kept = lock(&self.kept);
        let part = kept.parts.get(&part);
        part.is_none_or(|part| part.missing.is_empty())
    }

    /// The parts of which this node or another one has, or had, an entry.
    pub fn parts_with_entries(&self) -> Vec<usize> {
        let kept = lock(&self.kept);
        let known = |part: &Part| part.had_entries || !part.entries.is_empty();
        let parts = kept.parts.iter().filter(|(_, part)| known(part));
        parts.map(|(number, _)| *number).collect()
    }

    /// Notes why this node cannot vouch for a part; false if it has a doubt about it already.
    pub fn doubt(&self, part: usize, why: &str) -> bool {
        let mut kept = lock(&self.kept);
        let part = kept.parts.get_mut(&part);
        let part = part.filter(|part| part.doubt.is_none() && !planted(Bug::DoubtsNeverNoted));
        part.map(|part| part.doubt = Some(why.to_owned())).is_some()
    }

    /// Forgets all doubts: a person has read them.
    pub fn acknowledge(&self) -> Answer {
        for part in lock(&self.kept).parts.values_mut() {
            part.doubt = None;
        }
        ().into()
    }

    /// What there is to say about this node.
    pub fn status(&self) -> Status {
        let kept = lock(&self.kept);
        let mut status = Status {
            name: self.name().to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            progress: kept.progress(self.cluster.copies()),
            ring: self.fingerprint,
            bytes: kept.memory.own.bytes,
            memory: kept.memory.own.limit,
            full: kept.memory.is_full(),
            uptime_s: self.started.elapsed().as_secs(),
            ..Status::default()
        };
        let mut missing = BTreeSet::<&usize>::new();
        for (number, part) in &kept.parts {
            part.tell(self.cluster.name(*number), &mut status);
            missing.extend(part.missing.keys());
        }
        let is_ready = missing.is_empty();
        for place in missing {
            let name = self.cluster.name(*place).to_owned();
            let remark = match kept.reading.get(place) {
                None | Some(Ok(0)) => None,
                Some(Ok(rate)) => Some(format!("{}/s", ByteSize(*rate as u64).display().si())),
                Some(Err(why)) => Some(why.clone()),
            };
            let remark = remark.map(|remark| (name.clone(), remark));
            status.remarks.extend(remark);
            status.waiting_for.push(name);
        }
        let state = if is_ready { "ready" } else { "joining" };
        state.clone_into(&mut status.state);
        status
    }

    /// This node's name.
    pub fn name(&self) -> &str {
        self.cluster.name(self.place)
    }

    /// The places of a part's other replicas.
    fn others(&self, part: usize) -> impl Iterator<Item = usize> {
        let replicas = self.cluster.replicas(part);
        replicas.filter(|place| *place != self.place)
    }

    /// The part of this key, if it is one that this node holds.
    fn part<'a>(&self, key: &[u8], parts: &'a mut Parts) -> Result<(usize, &'a mut Part), Error> {
        check_key(key)?;
        let number = self.cluster.owner(key);
        let part = parts.get_mut(&number).map(|part| (number, part));
        part.ok_or_else(|| {
            let (key, name) = (String::from_utf8_lossy(key), self.name());
            Error::new(Kind::WrongRing, format!("{key:?} is not a key of {name}"))
        })
    }
}

impl Part {
    /// Keeps an entry in the place of the one before it, or in a new one.
    fn put(&mut self, index: Option<usize>, key: &[u8], entry: Entry<&[u8]>) {
        let key_hash = crc32fast::hash(key);
        self.digest ^= digest(key_hash, entry.stamp);
        self.tombstones += usize::from(entry.value == codec::NIL);
        let old = index.and_then(|index| self.entries.get_index_mut(index));
        let Some((_, old)) = old else {
            let (stamp, value) = (entry.stamp, entry.value.into());
            let key = SmallVec::from_slice(key);
            self.entries.insert(key, Entry { stamp, value });
            return;
        };
        self.digest ^= digest(key_hash, old.stamp);
        self.tombstones -= usize::from(old.value.is_nil());
        old.stamp = entry.stamp;
        old.value.replace(entry.value);
    }

    /// Adds what there is to say about it, under its owner's name.
    fn tell(&self, owner: &str, status: &mut Status) {
        let (owner, entries, tombstones) = (owner.to_owned(), self.entries.len(), self.tombstones);
        let digest = format!("{:016x}", self.digest);
        status.keys += entries - tombstones;
        status.tombstones += tombstones;
        status.entries.insert(owner.clone(), entries);
        status.deleted.insert(owner.clone(), tombstones);
        status.digests.insert(owner.clone(), digest);
        status.doubts.extend(self.doubt.clone());
        if !self.missing.is_empty() {
            status.not_ready.push(owner);
        }
    }
}

impl Kept {
    /// How much of what the other replicas keep has been read, in percent.
    fn progress(&self, copies: usize) -> usize {
        let missing = self.parts.values().flat_map(|part| part.missing.values());
        let left = missing.map(|(read, of)| {
            let percent = read.saturating_mul(100).checked_div(*of); // `of` is the other's word
            100 - percent.unwrap_or(0).min(99)
        });
        let whole = self.parts.len() * (copies - 1);
        100 - left.sum::<usize>().div_ceil(whole.max(1))
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

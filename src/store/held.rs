//! What a node holds of one ring: its parts, and in each the newest entry of every key.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound::{Excluded, Unbounded};
use std::sync::Arc;
use std::time::Duration;

use foldhash::fast::RandomState;
use indexmap::IndexMap;
use smallvec::SmallVec;
use tokio::time::Instant;

use super::memory::Seen;
use super::{Key, OVERHEAD, SWAPS};
use crate::cluster::Cluster;
use crate::entry::{Entry, Packed, Stamp, are_of_one_coordinator, check_key, ends};
use crate::error::{Error, Kind};
use crate::rpc::codec;
use crate::sabotage::{Bug, planted};
use crate::status::Status;

/// What a node keeps as a member of one ring.
pub(super) struct Held {
    pub(super) ring: u64, // what a call must name
    pub(super) born: u64,
    pub(super) cluster: Arc<Cluster>,
    pub(super) place: Option<usize>, // of this node
    pub(super) parts: Parts,
    pub(super) bytes: usize, // also those that it shares with another ring
    pub(super) worn: bool,   // some key has used half of its stamps
    pub(super) others: BTreeMap<usize, Seen>, // the memory of other nodes
}

/// How many keys are settled, or ended, at a time.
const AT_ONCE: usize = 64;
/// How many entries are looked at while others wait, for those that have ended.
const PAGE: usize = 1024;

/// Keys, and what a swap has left there at another replica.
pub(crate) type Unsettled = Vec<(Key, Entry)>;

/// The parts that this node holds, by their owners' places.
pub(super) type Parts = BTreeMap<usize, Part>;

#[derive(Default)]
pub(super) struct Part {
    pub(super) entries: IndexMap<Key, Slot>,
    swaps: HashMap<usize, Swaps, RandomState>, // by the entry's place
    pub(super) unsettled: BTreeMap<Key, Entry>, // what is elsewhere, and was not accepted here
    promises: usize,                           // without an entry
    epoch: u64,                                // in which the ring was first asked
    garbage: Garbage,
    tombstones: usize,
    values: usize,
    ending: usize, // of them, those that end
    digest: u64,
    // Its replicas that were not read to the end: how many entries were read, and of how many.
    pub(super) missing: BTreeMap<usize, (usize, usize)>,
    pub(super) had_entries: bool,     // at another replica
    pub(super) doubt: Option<String>, // why this node cannot vouch for it
}

/// What takes memory and is no value: tombstones, and promises for absent keys.
#[derive(Clone, Copy, Default)]
pub(super) struct Garbage {
    pub(super) bytes: usize,
    pub(super) carried: usize, // of them, of an earlier epoch
}

impl Garbage {
    fn with(self, more: Garbage) -> Garbage {
        let (bytes, carried) = (self.bytes + more.bytes, self.carried + more.carried);
        Garbage { bytes, carried }
    }

    fn without(self, less: Garbage) -> Garbage {
        let (bytes, carried) = (self.bytes - less.bytes, self.carried - less.carried);
        Garbage { bytes, carried }
    }
}

/// An entry without what only few have: its ballot.
pub(super) struct Slot {
    counter: u64,
    writer: u64,
    value: Packed,
}

/// What is found under a key.
pub(super) struct Found<'a> {
    pub(super) place: usize,
    pub(super) entry: Entry<&'a Packed>,
    pub(super) swaps: Option<&'a Swaps>, // where it was ever swapped
}

impl Found<'_> {
    pub(super) fn is_swapped(&self) -> bool {
        self.swaps.is_some()
    }

    /// Whether the swap of another coordinator is under way.
    pub(super) fn is_held_by_another(&self, ballot: u64, now: Instant) -> bool {
        let is_another = |swaps: &&Swaps| !are_of_one_coordinator(swaps.promised, ballot);
        let hold = self.swaps.filter(is_another).and_then(|swaps| swaps.hold);
        hold.is_some_and(|(since, moment)| now.saturating_duration_since(since) < moment)
    }
}

/// The highest ballot that was promised for what is found.
pub(super) fn promised(found: Option<&Found<'_>>) -> u64 {
    let swaps = found.and_then(|found| found.swaps);
    swaps.map_or(0, |swaps| swaps.promised)
}

/// What a key has that was ever swapped.
#[derive(Default)]
pub(super) struct Swaps {
    ballot: u64,
    pub(super) promised: u64, // the highest ballot for which this replica has spoken
    hold: Option<(Instant, Duration)>, // since when, and how long, no other coordinator is promised anything
}

impl Held {
    /// An empty share of a ring. What it holds counts once every other replica has been read; at
    /// once in a ring that was never asked before.
    pub(super) fn new(cluster: &Arc<Cluster>, name: &str, counts: bool, born: u64) -> Self {
        let place = cluster.place(name);
        let mut parts = Parts::new();
        for number in 0..cluster.nodes().len() {
            let replicas: Vec<usize> = cluster.replicas(number).collect();
            if place.is_some_and(|place| replicas.contains(&place)) {
                let others = replicas
                    .into_iter()
                    .filter(|at| Some(*at) != place || cluster.copies() == 1);
                let missing = others.filter(|_| !counts).map(|at| (at, (0, 0))).collect();
                let part = Part {
                    missing,
                    epoch: born.div_ceil(2),
                    ..Part::default()
                };
                parts.insert(number, part);
            }
        }
        Held {
            ring: 0,
            born,
            cluster: cluster.clone(),
            place,
            parts,
            bytes: 0,
            worn: false,
            others: BTreeMap::new(),
        }
    }

    /// The part of this key, if it is one that this node holds.
    pub(super) fn part(&self, key: &[u8], name: &str) -> Result<(usize, &Part), Error> {
        check_key(key)?;
        let number = self.cluster.owner(key);
        let part = self.parts.get(&number).map(|part| (number, part));
        part.ok_or_else(|| {
            let key = String::from_utf8_lossy(key);
            Error::new(Kind::WrongRing, format!("{key:?} is not a key of {name}"))
        })
    }

    /// Refuses while another replica may know what this node has forgotten.
    pub(super) fn is_ready(&self, part: &Part) -> Result<(), Error> {
        if part.missing.is_empty() {
            return Ok(());
        }
        let places = part.missing.keys();
        let names: Vec<&str> = places.map(|place| self.cluster.name(*place)).collect();
        let why = format!("waiting for {}", names.join(", "));
        Err(Error::new(Kind::Joining, why))
    }

    /// Whether promises bind what has this stamp: a swap has left it, or it is older than this ring, of
    /// which swaps may have found nothing there.
    pub(super) fn is_bound(&self, stamp: Stamp) -> bool {
        let nothing = Stamp::nothing(self.born.div_ceil(2));
        stamp.ballot > 0 || stamp < nothing && !planted(Bug::OldWriteIgnoresPromises)
    }

    /// Refuses what promises bind if this replica is not ready, or has promised a higher ballot.
    pub(super) fn accepts(
        &self,
        part: &Part,
        found: Option<&Found<'_>>,
        stamp: Stamp,
    ) -> Result<(), Error> {
        if !self.is_bound(stamp) {
            return Ok(());
        }
        if !planted(Bug::JoiningNodePromises) {
            self.is_ready(part)?;
        }
        let is_superseded = found.is_some_and(|found| found.entry.stamp.base() > stamp.base());
        let may_pass = planted(Bug::AcceptIgnoresPromises)
            || is_superseded && planted(Bug::SupersededIgnoresPromises);
        if stamp.ballot < promised(found) && !may_pass {
            let why = "another swap has a higher promise";
            return Err(Error::new(Kind::Busy, why));
        }
        Ok(())
    }

    /// Notes a promise; how many more bytes are kept now.
    pub(super) fn promise(
        &mut self,
        number: usize,
        place: Option<usize>,
        key: &[u8],
        ballot: u64,
        hold: Option<(Instant, Duration)>,
    ) -> usize {
        let part = self.parts.get_mut(&number);
        let added = part.map_or(0, |part| part.promise(place, key, ballot, hold));
        self.bytes += added;
        added
    }

    /// How many entries there are.
    pub(super) fn count(&self) -> usize {
        self.parts.values().map(Part::count).sum()
    }

    /// What a change of the ring frees.
    pub(super) fn garbage(&self) -> Garbage {
        let parts = self.parts.values().map(|part| part.garbage);
        parts.fold(Garbage::default(), Garbage::with)
    }

    pub(super) fn entry(&self, key: &[u8]) -> Option<Entry<&Packed>> {
        let part = self.parts.get(&self.cluster.owner(key))?;
        Some(part.find(key)?.entry)
    }

    /// The places of a part's other replicas.
    pub(super) fn others_of(&self, part: usize) -> impl Iterator<Item = usize> + use<> {
        let (lone, own) = (self.cluster.copies() == 1, self.place);
        let replicas = self.cluster.replicas(part);
        replicas.filter(move |place| lone || Some(*place) != own) // without others, it waits all the same
    }
}

impl Part {
    /// How many entries there are. A promise that has none shows no write: one replica alone makes it.
    pub(super) fn count(&self) -> usize {
        self.values + self.tombstones
    }

    /// What is kept under a key.
    pub(super) fn find(&self, key: &[u8]) -> Option<Found<'_>> {
        let (place, _, slot) = self.entries.get_full(key)?;
        Some(self.found(place, slot))
    }

    /// What is kept in this place.
    pub(super) fn found<'a>(&'a self, place: usize, slot: &'a Slot) -> Found<'a> {
        let swaps = self.swaps.get(&place);
        let ballot = swaps.map_or(0, |swaps| swaps.ballot);
        let stamp = Stamp::new(slot.counter, slot.writer, ballot);
        let value = &slot.value;
        let entry = Entry { stamp, value };
        Found {
            place,
            entry,
            swaps,
        }
    }

    /// Adds a key to a page, with its entry and the promise that it has.
    pub(super) fn list(&self, place: usize, key: &[u8], slot: &Slot, page: &mut Vec<u8>) {
        let Found { entry, swaps, .. } = self.found(place, slot);
        let (around, at) = entry.stamp.around();
        let (begin, end) = around.split_at(at);
        page.push(0x92 + u8::from(swaps.is_some()));
        page.extend_from_slice(&codec::encode_bytes(key));
        for piece in [begin, entry.value, end] {
            page.extend_from_slice(piece);
        }
        if let Some(swaps) = swaps {
            page.extend_from_slice(&codec::encode_numbers([swaps.promised]));
        }
    }

    /// Notes a promise that holds others off for a moment; how many bytes that takes. A key that has no
    /// entry gets a place for it, which looks like no entry at all.
    pub(super) fn promise(
        &mut self,
        place: Option<usize>,
        key: &[u8],
        ballot: u64,
        hold: Option<(Instant, Duration)>,
    ) -> usize {
        let (place, new) = place.map_or((self.entries.len(), key.len() + OVERHEAD), |place| {
            (place, 0)
        });
        if new > 0 {
            let (stamp, value) = (Stamp::default(), codec::NIL); // not the empty slice of a default
            self.put(None, key, Entry { stamp, value }, None);
        }
        let (before, garbage) = (self.swaps.len(), self.garbage_at(place));
        let swaps = self.swaps.entry(place).or_default();
        swaps.promised = swaps.promised.max(ballot);
        swaps.hold = hold.or(swaps.hold);
        self.garbage = self.garbage.without(garbage).with(self.garbage_at(place));
        new + (self.swaps.len() - before) * SWAPS
    }

    /// What stays behind of this place when the ring changes: all of what is no value. Who has read a tombstone during
    /// a change, so that it was taken along, may do so again.
    fn garbage_at(&self, place: usize) -> Garbage {
        match self.entries.get_index(place) {
            Some((key, slot)) if slot.value.is_nil() => {
                let Found { entry, swaps, .. } = self.found(place, slot);
                let was_carried =
                    entry.stamp != Stamp::default() && entry.stamp.epoch() < self.epoch;
                let bytes = key.len() + OVERHEAD + usize::from(swaps.is_some()) * SWAPS;
                let carried = usize::from(was_carried) * bytes;
                Garbage { bytes, carried }
            }
            _ => Garbage::default(),
        }
    }

    /// Ends the hold of this promise.
    pub(super) fn let_go(&mut self, key: &[u8], ballot: u64) -> Option<()> {
        let swaps = self.swaps.get_mut(&self.entries.get_index_of(key)?)?;
        if swaps.promised == ballot {
            swaps.hold = None;
        }
        Some(())
    }

    /// Keys behind a cursor whose values have ended by this time, and where the next ones begin.
    pub(super) fn ended(&self, cursor: usize, now: u64) -> (Vec<Key>, Option<usize>) {
        let (mut keys, mut next) = (Vec::new(), cursor);
        let entries = self.entries.get_range(cursor..).filter(|_| self.ending > 0);
        for (key, slot) in entries.into_iter().flatten().take(PAGE) {
            if keys.len() == AT_ONCE {
                break;
            }
            next += 1;
            if slot.value.end().is_some_and(|end| end <= now) {
                keys.push(key.clone());
            }
        }
        let more = self.ending > 0 && next < self.entries.len();
        (keys, more.then_some(next))
    }

    /// Some of what was not accepted, behind this key: what may be kept, since no replica that was read has
    /// promised more, what else there is, and the last key.
    pub(super) fn unsettled_after(
        &self,
        after: Option<Key>,
    ) -> (Unsettled, Unsettled, Option<Key>) {
        let behind = (after.map_or(Unbounded, Excluded), Unbounded);
        let found = self.unsettled.range(behind).take(AT_ONCE);
        let page = found.map(|(key, entry)| (key.clone(), entry.clone()));
        let page: Unsettled = page.collect();
        let last = page.last().map(|(key, _)| key.clone());
        let may_be_kept =
            |(key, entry): &(Key, Entry)| entry.stamp.ballot >= promised(self.find(key).as_ref());
        let (clear, unclear) = page.into_iter().partition(may_be_kept);
        (clear, unclear, last)
    }

    /// Keeps an entry in the place of the one before it, or in a new one.
    pub(super) fn put(
        &mut self,
        place: Option<usize>,
        key: &[u8],
        entry: Entry<&[u8]>,
        shared: Option<&Packed>,
    ) {
        let (hash, place) = (crc32fast::hash(key), place.unwrap_or(self.entries.len()));
        self.garbage = self.garbage.without(self.garbage_at(place));
        self.digest ^= digest(hash, entry.stamp);
        *self.counter(entry.stamp, entry.value == codec::NIL) += 1;
        self.ending += usize::from(ends(entry.value));
        let (counter, writer) = (entry.stamp.counter, entry.stamp.writer);
        let old_ballot = self.note_ballot(place, entry.stamp.ballot);
        if let Some((_, slot)) = self.entries.get_index_mut(place) {
            let old = Stamp::new(slot.counter, slot.writer, old_ballot);
            let is_nil = slot.value.is_nil();
            self.ending -= usize::from(ends(&slot.value));
            (slot.counter, slot.writer) = (counter, writer);
            match shared {
                Some(shared) => slot.value = shared.clone(),
                None => slot.value.replace(entry.value),
            }
            self.digest ^= digest(hash, old);
            *self.counter(old, is_nil) -= 1;
        } else {
            let value = shared.cloned().unwrap_or_else(|| entry.value.into());
            let slot = Slot {
                counter,
                writer,
                value,
            };
            self.entries.insert(SmallVec::from_slice(key), slot);
        }
        self.garbage = self.garbage.with(self.garbage_at(place));
    }

    /// Notes the ballot of what is kept now in this place; the one before it.
    fn note_ballot(&mut self, place: usize, ballot: u64) -> u64 {
        if ballot == 0 {
            let swaps = self.swaps.get_mut(&place);
            return swaps.map_or(0, |swaps| std::mem::take(&mut swaps.ballot));
        }
        let swaps = self.swaps.entry(place).or_default();
        swaps.promised = swaps.promised.max(ballot);
        if let Some((since, moment)) = &mut swaps.hold {
            // The others accept it about as long after this one as it has come after its promise.
            *moment = (*moment).min(2 * since.elapsed());
        }
        std::mem::replace(&mut swaps.ballot, ballot)
    }

    /// What counts such an entry.
    fn counter(&mut self, stamp: Stamp, is_nil: bool) -> &mut usize {
        match is_nil {
            _ if stamp == Stamp::default() => &mut self.promises,
            true => &mut self.tombstones,
            false => &mut self.values,
        }
    }

    /// Adds what there is to say about it, under its owner's name.
    pub(super) fn tell(&self, owner: &str, status: &mut Status) {
        let (owner, entries, tombstones) = (owner.to_owned(), self.count(), self.tombstones);
        let digest = format!("{:016x}", self.digest);
        status.keys += self.values;
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

/// One entry's share of a part's digest; none where only a promise is. The writer is random, which does
/// most of the work; the rest is the finalizer of `SplitMix64` (Steele, Lea, Flood 2014).
fn digest(key_hash: u32, stamp: Stamp) -> u64 {
    if stamp == Stamp::default() {
        return 0;
    }
    let mut hash = stamp.writer ^ stamp.counter.rotate_left(32) ^ u64::from(key_hash) << 16;
    hash ^= stamp.ballot.rotate_left(48);
    hash = (hash ^ hash >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ hash >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ hash >> 31
}

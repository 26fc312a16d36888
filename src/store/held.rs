//! What a node holds of one ring: its parts, and in each the newest entry of every key.

use std::collections::BTreeMap;
use std::sync::Arc;

use indexmap::IndexMap;
use smallvec::SmallVec;

use super::Key;
use super::memory::Seen;
use crate::cluster::Cluster;
use crate::entry::{Entry, Packed, Stamp, check_key};
use crate::error::{Error, Kind};
use crate::rpc::codec;
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

/// The parts that this node holds, by their owners' places.
pub(super) type Parts = BTreeMap<usize, Part>;

#[derive(Default)]
pub(super) struct Part {
    pub(super) entries: IndexMap<Key, Entry>,
    tombstones: usize,
    digest: u64,
    // Its replicas that were not read to the end: how many entries were read, and of how many.
    pub(super) missing: BTreeMap<usize, (usize, usize)>,
    pub(super) had_entries: bool,     // at another replica
    pub(super) doubt: Option<String>, // why this node cannot vouch for it
}

impl Held {
    /// An empty share of a ring. What it holds counts once every other replica has been read; at
    /// once in a ring that was never asked before.
    pub(super) fn new(cluster: &Arc<Cluster>, name: &str, counts: bool) -> Self {
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
                    ..Part::default()
                };
                parts.insert(number, part);
            }
        }
        Held {
            ring: 0,
            born: 0,
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

    /// How many entries there are.
    pub(super) fn count(&self) -> usize {
        self.parts.values().map(|part| part.entries.len()).sum()
    }

    pub(super) fn entry(&self, key: &[u8]) -> Option<&Entry> {
        self.parts.get(&self.cluster.owner(key))?.entries.get(key)
    }

    /// The places of a part's other replicas.
    pub(super) fn others_of(&self, part: usize) -> impl Iterator<Item = usize> + use<> {
        let (lone, own) = (self.cluster.copies() == 1, self.place);
        let replicas = self.cluster.replicas(part);
        replicas.filter(move |place| lone || Some(*place) != own) // without others, it waits all the same
    }
}

impl Part {
    /// Keeps an entry in the place of the one before it, or in a new one.
    pub(super) fn put(
        &mut self,
        index: Option<usize>,
        key: &[u8],
        entry: Entry<&[u8]>,
        shared: Option<&Packed>,
    ) {
        let key_hash = crc32fast::hash(key);
        self.digest ^= digest(key_hash, entry.stamp);
        self.tombstones += usize::from(entry.value == codec::NIL);
        let old = index.and_then(|index| self.entries.get_index_mut(index));
        let Some((_, old)) = old else {
            let value = shared.cloned().unwrap_or_else(|| entry.value.into());
            let stamp = entry.stamp;
            let key = SmallVec::from_slice(key);
            self.entries.insert(key, Entry { stamp, value });
            return;
        };
        self.digest ^= digest(key_hash, old.stamp);
        self.tombstones -= usize::from(old.value.is_nil());
        old.stamp = entry.stamp;
        match shared {
            Some(shared) => old.value = shared.clone(),
            None => old.value.replace(entry.value),
        }
    }

    /// Adds what there is to say about it, under its owner's name.
    pub(super) fn tell(&self, owner: &str, status: &mut Status) {
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

/// One entry's share of a part's digest. The writer is random, which does most of the
/// work; the rest is the finalizer of `SplitMix64` (Steele, Lea, Flood 2014).
fn digest(key_hash: u32, stamp: Stamp) -> u64 {
    let mut hash = stamp.writer ^ stamp.counter.rotate_left(32) ^ u64::from(key_hash) << 16;
    hash = (hash ^ hash >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ hash >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ hash >> 31
}

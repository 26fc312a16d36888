//! What a replica keeps in memory: for each part of the ring that it holds, a map
//! from key to the newest entry that it has been told. Entries are never removed, so
//! the place at which a key was first inserted never changes: the cursor of a scan counts on it.
//! While the ring changes, a node holds its parts of the old ring and those of the new one.

mod hearing;
mod held;
pub mod journal;
mod memory;
mod promise;
mod replay;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};

use bytesize::ByteSize;
use smallvec::SmallVec;
use tokio::time::Instant;

use crate::cluster::{Cluster, Limits, Rings, State};
use crate::entry::{Entry, Loaded, Packed, Stamp, check_value, size};
use crate::error::{Error, Kind};
use crate::rpc::codec::{self, Encoded, quoted};
use crate::rpc::{Answer, Meter, lock};
use crate::sabotage::{Bug, planted};
use crate::status::{Status, micros};
use held::{Found, Held, Part, Unsettled, promised};
use journal::Journal;
use memory::{Memory, Refusal, Usage};

pub use promise::{Prepare, Promise};
pub use replay::At;

/// What an entry takes beside its key and value, in bytes: its place in the map, and two allocations.
pub(crate) const OVERHEAD: usize = 100;
/// What a key takes beside that which was ever swapped, in bytes.
const SWAPS: usize = 80;

/// How many bytes of what was deleted a round frees at each node at least, unless memory is scarce.
pub(crate) const FORGETS_FROM: usize = 64 << 10;

/// What one page of a scan takes, in bytes, unless its asker names another size.
const PAGE: usize = 16 << 10;
/// What one page may take, unless it is a single entry: little enough to be made while others wait,
/// and for its values, which may be as many as its bytes, to fit into one message.
pub const MAX_PAGE: usize = 64 << 10;

/// The memory of one node.
pub struct Store {
    /// The rings that it knows of.
    pub rings: Arc<Rings>,
    /// When this node started.
    pub started: Instant,
    meters: Mutex<Vec<Arc<Meter>>>, // what each thread has answered
    name: String,
    start_id: u64,
    forgets_from: AtomicUsize,
    limits: Mutex<Limits>,
    journal: OnceLock<Arc<Journal>>, // where it has a disk
    kept: Mutex<Kept>,
}

/// A node as a replica on one ring, which is named by its fingerprint.
pub struct Replica<'a> {
    store: &'a Store,
    ring: u64,
}

#[allow(clippy::struct_excessive_bools)] // each says something of its own
struct Kept {
    memory: Memory,
    epoch: u64,
    held: Vec<Held>,            // for each ring that is asked
    starting: bool,             // some part was not ready yet since the node started
    is_noted: bool,             // it is written down that it is ready
    unheard: bool, // it does not know yet whether the ring has changed: it answers nothing
    heard: BTreeSet<String>, // who has said how the ring is
    member: bool,  // it has been in a ring that was asked
    resize: Option<Instant>, // when somebody last waited to change the ring
    collected: Option<Instant>, // when what was deleted was last forgotten
    doubts: BTreeSet<String>, // about rings that are not asked any more
    // How each other node was read lately: bytes in a second, or why it could not be read.
    reading: BTreeMap<String, Result<usize, String>>,
}

/// A short key lies beside its entry.
pub(crate) type Key = SmallVec<[u8; 16]>;

impl Store {
    /// An empty store for the node at this place. It knows nothing of what the node may have
    /// answered before it started, and must hear from the other replicas first.
    pub fn new(cluster: Arc<Cluster>, place: usize) -> Self {
        let name = cluster.name(place).to_owned();
        let (limits, rings) = (cluster.limits, Rings::new(cluster));
        let mut kept = Kept {
            memory: Memory::new(limits.memory, limits.window),
            epoch: 0,
            held: Vec::new(),
            starting: true,
            is_noted: false,
            unheard: true,
            heard: BTreeSet::new(),
            member: false,
            resize: None,
            collected: None,
            doubts: BTreeSet::new(),
            reading: BTreeMap::new(),
        };
        kept.move_to(&rings.known().state, &name);
        Store {
            rings,
            started: Instant::now(),
            meters: Mutex::default(),
            name,
            start_id: fastrand::u64(..),
            forgets_from: AtomicUsize::new(FORGETS_FROM),
            limits: Mutex::new(limits),
            journal: OnceLock::new(),
            kept: Mutex::new(kept),
        }
    }

    /// Where one more thread counts what it answers.
    pub fn meter(&self) -> Arc<Meter> {
        let meter = Arc::<Meter>::default();
        lock(&self.meters).push(meter.clone());
        meter
    }

    /// The limits of this node now; those of the rings are the ones that it started with.
    pub fn limits(&self) -> Limits {
        *lock(&self.limits)
    }

    /// Keeps to these limits from now on. What is kept stays.
    pub fn limit(&self, limits: Limits) {
        *lock(&self.limits) = limits;
        lock(&self.kept).memory.own.limit = limits.memory;
    }

    /// How many bytes of what was deleted a round must free at each node, unless memory is scarce.
    pub fn forgets_from(&self) -> usize {
        self.forgets_from.load(Relaxed)
    }

    /// Has this node begin rounds for so few bytes, or none, with `usize::MAX`; for tests.
    pub fn forget_from(&self, bytes: usize) {
        self.forgets_from.store(bytes, Relaxed);
    }

    /// This node as a replica, for an asker that names its `ring` by the fingerprint.
    pub fn on(&self, ring: &[u8]) -> Result<Replica<'_>, Error> {
        match codec::number(ring) {
            Some(ring) => Ok(Replica { store: self, ring }),
            None => Err(self.wrong_ring(&quoted(ring))),
        }
    }

    /// The same for this one of the rings that are asked: 0, or 1 for the new one.
    pub fn at(&self, ring: usize) -> Replica<'_> {
        let state = self.rings.known().state;
        let ring = state.fingerprint(ring, &self.name).into();
        Replica { store: self, ring }
    }

    fn wrong_ring(&self, asked: &str) -> Error {
        let state = self.rings.known().state;
        let why = format!(
            "{}'s ring is {} ({}), yours is {asked}: use the same cluster.toml",
            self.name,
            state.fingerprint(0, &self.name),
            state.ring.ring(),
        );
        Error::new(Kind::WrongRing, why)
    }
}

impl Replica<'_> {
    /// What is kept under this key, without the value where `known` is as new. Refused
    /// while another replica may know of a write that was here before this node's start, and for a
    /// set that brings more than there is memory for.
    pub fn load(&self, key: &[u8], known: Option<Stamp>) -> Result<Loaded, Error> {
        let mut kept = lock(&self.store.kept);
        let (memory, held, _) = self.held(&mut kept)?;
        let held = &*held;
        let (number, part) = held.part(key, &self.store.name)?;
        if !planted(Bug::JoiningAnswersLoad) {
            held.is_ready(part)?;
        }
        let entry = part.find(key).map(|found| found.entry);
        let stamp = entry.map_or(Stamp::default(), |entry| entry.stamp);
        let value = match known {
            Some(known) if known >= stamp => None,
            _ => Some(entry.map_or(Packed::default(), |entry| entry.value.clone())),
        };
        if let Some(bytes) = known.and_then(Stamp::bytes_to_set) {
            self.store.has_room(bytes > 0)?;
            let added = match entry {
                Some(old) => bytes.saturating_sub(size(old.value)),
                None if bytes == 0 => 0,
                None => bytes + key.len() + OVERHEAD,
            };
            let others = held
                .others_of(number)
                .map(|place| (place, held.others.get(&place).copied()));
            let allowed = memory.allow(key, added, others);
            allowed.map_err(|refusal| self.full(held, &refusal, added))?;
        }
        Ok(Entry { stamp, value })
    }

    fn full(&self, held: &Held, refusal: &Refusal, added: usize) -> Error {
        let name = refusal
            .place
            .map_or(&*self.store.name, |place| held.cluster.name(place));
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

    /// The same for a value that was checked before. What a swap has left is refused where another
    /// swap has a higher promise, also if it is older than what is kept: else both could succeed.
    pub fn keep(&self, key: &[u8], entry: Entry<&[u8]>) -> Result<(), Error> {
        let mut kept = lock(&self.store.kept);
        kept.check(entry.stamp)?;
        self.keep_in(&mut kept, key, entry, true)
    }

    /// Keeps what a majority has.
    pub fn settle(&self, key: &[u8], entry: Entry<&[u8]>) -> Result<(), Error> {
        let mut kept = lock(&self.store.kept);
        let (_, held, _) = self.held(&mut kept)?;
        let number = held.part(key, &self.store.name)?.0;
        self.copy(&mut kept, key, entry)?;
        self.note_settled(&mut kept, number, key)
    }

    /// Once it is kept: what could not be kept yet is still known.
    fn note_settled(&self, kept: &mut Kept, part: usize, key: &[u8]) -> Result<(), Error> {
        let (_, held, _) = self.held(kept)?;
        if let Some(part) = held.parts.get_mut(&part) {
            part.unsettled.remove(key);
        }
        Ok(())
    }

    fn copy(&self, kept: &mut Kept, key: &[u8], entry: Entry<&[u8]>) -> Result<(), Error> {
        match entry.stamp {
            stamp if stamp == Stamp::default() => Ok(()), // nothing was ever there
            stamp => {
                kept.check(stamp)?;
                self.keep_in(kept, key, entry, false)
            }
        }
    }

    fn keep_in(
        &self,
        kept: &mut Kept,
        key: &[u8],
        entry: Entry<&[u8]>,
        is_vote: bool,
    ) -> Result<(), Error> {
        let ballot = entry.stamp.ballot;
        let (memory, held, other) = self.held(kept)?;
        let (number, part) = held.part(key, &self.store.name)?;
        let found = part.find(key);
        let accepts = || held.accepts(part, found.as_ref(), entry.stamp);
        is_vote.then(accepts).transpose()?;
        let is_first_swap = ballot > 0 && !found.as_ref().is_some_and(Found::is_swapped);
        let (place, old) = found.map(|found| (found.place, found.entry)).unzip();
        if old.is_some_and(|old| old.stamp >= entry.stamp) && !planted(Bug::OldEntryReplacesNew) {
            if is_vote && ballot > 0 {
                self.store.has_room(false)?;
                self.note_promise((memory, held), (number, place), key, ballot, None);
            }
            return Ok(());
        }
        self.store.has_room(false)?;
        // A value that the other ring's part has too lies in memory once.
        let twin = other.and_then(|other| other.entry(key));
        let is_twin = |entry: Entry<&[u8]>| twin.is_some_and(|twin| twin.borrow() == entry);
        let shared = twin.filter(|_| is_twin(entry)).map(|twin| twin.value);
        let new_key = old.map_or(key.len() + OVERHEAD, |_| 0) + usize::from(is_first_swap) * SWAPS;
        let (new, gone) = (size(entry.value), old.map_or(0, |old| size(old.value)));
        let added = new_key + shared.map_or(new, |_| 0);
        let freed = usize::from(!old.is_some_and(|old| is_twin(old.borrow()))) * gone;
        memory.keep(key, added, freed)?;
        held.worn |= entry.stamp.is_worn();
        held.bytes = held.bytes + new_key + new - gone;
        if let Some(part) = held.parts.get_mut(&number) {
            part.put(place, key, entry, shared);
        }
        self.note(held.born, key, entry);
        Ok(())
    }

    /// Promises a swap to accept none with a lower ballot, and says what is kept under its key. Refused if
    /// this replica has promised this ballot or a higher one, or something to another coordinator a moment
    /// ago: two swaps that take each other's promises away both fail. A joining node does not remember
    /// what it promised. For a read, no memory is lacking.
    pub fn promise(&self, key: &[u8], prepare: Prepare) -> Result<Promise, Error> {
        let Prepare {
            ballot,
            is_read,
            known,
        } = prepare;
        let mut kept = lock(&self.store.kept);
        let (memory, held, _) = self.held(&mut kept)?;
        let (number, part) = held.part(key, &self.store.name)?;
        if !planted(Bug::JoiningNodePromises) {
            held.is_ready(part)?;
        }
        let found = part.find(key);
        let promised = promised(found.as_ref());
        let now = Instant::now();
        let is_held = |found: &Found<'_>| found.is_held_by_another(ballot, now);
        if ballot <= promised || found.as_ref().is_some_and(is_held) {
            return Ok(Promise::Refused(promised));
        }
        let added = match &found {
            None => key.len() + OVERHEAD + SWAPS,
            Some(found) => usize::from(!found.is_swapped()) * SWAPS,
        };
        if added > 0 && !is_read && !memory.own.has_room(added) {
            return Err(self.full(held, &Refusal::of(memory.own), added));
        }
        self.store.has_room(!is_read)?;
        let (place, found) = found.map(|found| (found.place, found.entry)).unzip();
        let stamp = found.map(|entry| entry.stamp).unwrap_or_default();
        let promise = match known == Some(stamp) {
            true => Promise::Same,
            false => Promise::Given(Entry {
                stamp,
                value: found.map(|entry| entry.value.clone()).unwrap_or_default(),
            }),
        };
        let moment = (now, held.cluster.limits.window / 64);
        self.note_promise((memory, held), (number, place), key, ballot, Some(moment));
        Ok(promise)
    }

    /// Ends the hold of this promise: another replica has refused the ballot.
    pub fn let_go(&self, key: &[u8], ballot: u64) {
        self.with(|held| {
            let part = held.parts.get_mut(&held.cluster.owner(key))?;
            part.let_go(key, ballot)
        });
    }

    /// The value of a key, and the highest ballot that is promised for it.
    pub fn value_and_promise(&self, key: &[u8]) -> Option<(Packed, u64)> {
        let find = |held: &mut Held| {
            let found = held.part(key, &self.store.name).ok()?.1.find(key);
            let value = found.as_ref().map(|found| found.entry.value.clone());
            Some((value.unwrap_or_default(), promised(found.as_ref())))
        };
        self.with(find).flatten()
    }

    /// Takes over what another replica has, a promise too. What promises bind may be what no majority ever
    /// took: where this node cannot accept it, it is noted, and [`Replica::settle`] keeps what a
    /// majority says.
    pub fn take_over(&self, key: &[u8], entry: Entry<&[u8]>, promises: u64) -> Result<(), Error> {
        check_value(entry.value)?;
        let mut kept = lock(&self.store.kept);
        let (memory, held, _) = self.held(&mut kept)?;
        self.store.has_room(false)?;
        let (number, part) = held.part(key, &self.store.name)?;
        if promises > 0 && !planted(Bug::PromisesNotCopied) {
            let place = part.find(key).map(|found| found.place);
            self.note_promise((memory, held), (number, place), key, promises, None);
        }
        if entry.stamp == Stamp::default() {
            return Ok(()); // there is only the promise
        }
        kept.check(entry.stamp)?;
        let (_, held, _) = self.held(&mut kept)?;
        let (_, part) = held.part(key, &self.store.name)?;
        let found = part.find(key);
        let own = found.as_ref().map(|own| own.entry.borrow());
        let newest = own.filter(|own| own.stamp >= entry.stamp).unwrap_or(entry);
        let is_joining = held.is_ready(part).is_err();
        let is_refused = match is_joining {
            // A copy looks like a vote, as soon as this node answers.
            true if planted(Bug::JoinerCopiesBallots) => false,
            true => held.is_bound(newest.stamp) && promised(found.as_ref()) > 0,
            false if planted(Bug::RepairIgnoresPromises) => false,
            false => newest == entry && held.accepts(part, found.as_ref(), entry.stamp).is_err(),
        };
        if !is_refused {
            return self.copy(&mut kept, key, entry);
        }
        let newest = newest.to_owned();
        if let Some(part) = held.parts.get_mut(&number) {
            let found = part.unsettled.entry(key.into()).or_default();
            if found.stamp < newest.stamp {
                *found = newest;
            }
        }
        Ok(())
    }

    /// Of what is in a part at other replicas and this one could not accept, some keys behind this one, and
    /// the last of them. It is kept where no replica that was read has promised more; of the others that are
    /// listed a majority must say what is there.
    pub fn unsettled(
        &self,
        part: usize,
        after: Option<Key>,
    ) -> Result<(Unsettled, Option<Key>), Error> {
        let mut kept = lock(&self.store.kept);
        let (_, held, _) = self.held(&mut kept)?;
        let found = held.parts.get(&part);
        let (clear, unclear, last) = found
            .map(|part| part.unsettled_after(after))
            .unwrap_or_default();
        for (key, entry) in clear {
            self.copy(&mut kept, &key, entry.borrow())?;
            self.note_settled(&mut kept, part, &key)?;
        }
        Ok((unclear, last))
    }

    /// One page of a part: `[start id, next cursor or nil, [[key, entry] …]]`, with the promise behind
    /// an entry that has one. A cursor is the number of entries before it, from 0; it holds for as long
    /// as the start id stays the same.
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
        let mut kept = lock(&self.store.kept);
        let (_, held, _) = self.held(&mut kept)?;
        let not_kept = || Error::new(Kind::WrongRing, format!("part {number} is not kept here"));
        let part = held.parts.get(&number).ok_or_else(not_kept)?;
        let (mut page, mut count, mut bytes) = (Vec::new(), 0_u32, 0);
        let slots = part.entries.get_range(cursor..).into_iter().flatten();
        for ((key, slot), place) in slots.zip(cursor..) {
            bytes += key.len() + size(part.found(place, slot).entry.value) + OVERHEAD;
            if bytes > most.min(MAX_PAGE) && count > 0 {
                break;
            }
            count += 1;
            part.list(place, key, slot, &mut page);
        }
        let next = match cursor.saturating_add(count as usize) {
            next if next < part.entries.len() => codec::encode_numbers([next as u64]),
            _ => Encoded::from_slice(codec::NIL),
        };
        let header = [&[0xdd], &count.to_be_bytes()[..]].concat();
        let start_id = codec::encode_numbers([self.store.start_id]);
        let answer = [&[0x93], &*start_id, &next, &header, &page].concat();
        Ok(Encoded::from(answer).into())
    }

    /// The parts that this node holds together with each other node.
    pub fn shared(&self) -> BTreeMap<usize, Vec<usize>> {
        let mut shared = BTreeMap::<_, Vec<_>>::new();
        self.with(|held| {
            for part in held.parts.keys() {
                for node in held.others_of(*part) {
                    shared.entry(node).or_default().push(*part);
                }
            }
        });
        shared
    }

    /// Notes what another node says of itself: how much it keeps, and of which parts.
    pub fn note_status(&self, place: usize, theirs: &Status) {
        let (bytes, limit) = (theirs.bytes, theirs.memory);
        self.with(|held| {
            if limit > 0 {
                held.others
                    .insert(place, (Instant::now(), Usage { bytes, limit })); // an older version has none
            }
            for (number, part) in &mut held.parts {
                let entries = theirs.entries.get(held.cluster.name(*number));
                part.had_entries |= entries.is_some_and(|entries| *entries > 0);
            }
        });
    }

    /// Notes how many of a part's entries at another replica have been read: it can be read.
    pub fn note_progress(&self, part: usize, place: usize, read: usize, of: usize) {
        self.with(|held| {
            let part = held.parts.get_mut(&part);
            if let Some(progress) = part.and_then(|part| part.missing.get_mut(&place)) {
                *progress = (read, of);
            }
        });
    }

    /// Notes that another replica of a part has been read to the end. False if it is the last one, and
    /// something is [`Replica::unsettled`].
    pub fn mark_read(&self, part: usize, place: usize) -> bool {
        let marked = self.with(|held| {
            let Some(part) = held.parts.get_mut(&part) else {
                return true;
            };
            if part.missing.keys().eq([&place]) && !part.unsettled.is_empty() {
                return false;
            }
            part.missing.remove(&place);
            if planted(Bug::ReadyAfterOneNeighbour) {
                part.missing.clear();
            }
            true
        });
        let mut kept = lock(&self.store.kept);
        kept.starting &= kept.is_joining();
        if !kept.unheard && !kept.is_joining() && !kept.is_noted {
            self.store.note_state(&mut kept);
        }
        marked != Some(false)
    }

    /// Whether another replica of a part is still to be read.
    pub fn is_missing(&self, part: usize, place: usize) -> bool {
        let missing = self.with(|held| {
            held.parts
                .get(&part)
                .is_some_and(|part| part.missing.contains_key(&place))
        });
        missing == Some(true)
    }

    /// The parts that this node holds.
    pub(crate) fn parts(&self) -> Vec<usize> {
        let parts = self.with(|held| held.parts.keys().copied().collect());
        parts.unwrap_or_default()
    }

    /// Keys of a part whose values have ended by this time, from a cursor on, and the next cursor.
    pub(crate) fn ended(&self, part: usize, cursor: usize, now: u64) -> (Vec<Key>, Option<usize>) {
        let ended = self.with(|held| Some(held.parts.get(&part)?.ended(cursor, now)));
        ended.flatten().unwrap_or_default()
    }

    /// This node's place in the ring; one behind its end where it is not in it.
    pub fn place(&self) -> usize {
        self.with(|held| held.place.unwrap_or(held.cluster.nodes().len()))
            .unwrap_or(usize::MAX)
    }

    /// Whether this node's word counts for a part.
    pub fn is_ready_for(&self, part: usize) -> bool {
        let ready = self.with(|held| {
            held.parts
                .get(&part)
                .is_none_or(|part| part.missing.is_empty())
        });
        ready.unwrap_or(true)
    }

    /// The parts of which this node or another one has, or had, an entry.
    pub fn parts_with_entries(&self) -> Vec<usize> {
        let known = |part: &Part| part.had_entries || part.count() > 0;
        let parts = self.with(|held| {
            let parts = held.parts.iter().filter(|(_, part)| known(part));
            parts.map(|(number, _)| *number).collect()
        });
        parts.unwrap_or_default()
    }

    /// Notes why this node cannot vouch for a part; false if it has a doubt about it already.
    pub fn doubt(&self, part: usize, why: &str) -> bool {
        let noted = self.with(|held| {
            let part = held.parts.get_mut(&part);
            let part = part.filter(|part| part.doubt.is_none() && !planted(Bug::DoubtsNeverNoted));
            part.map(|part| part.doubt = Some(why.to_owned())).is_some()
        });
        noted == Some(true)
    }

    /// Looks at what is held of this ring, if it is still asked.
    fn with<T>(&self, look: impl FnOnce(&mut Held) -> T) -> Option<T> {
        let mut kept = lock(&self.store.kept);
        kept.held
            .iter_mut()
            .find(|held| held.ring == self.ring)
            .map(look)
    }

    /// What is held of this ring, and of the other one while it changes. Refused if the asker knows
    /// another state than this node.
    fn held<'k>(
        &self,
        kept: &'k mut Kept,
    ) -> Result<(&'k mut Memory, &'k mut Held, Option<&'k Held>), Error> {
        if kept.unheard && !planted(Bug::ServesBeforeHearing) {
            let why = format!(
                "waiting to hear from {}",
                self.store.unheard_in(kept).join(", ")
            );
            return Err(Error::new(Kind::Joining, why));
        }
        let (memory, held) = (&mut kept.memory, &mut kept.held);
        let at = held.iter().position(|held| held.ring == self.ring);
        let served = if planted(Bug::LowerStateServed) {
            0
        } else {
            held.len()
        };
        let at = at.unwrap_or(served.min(held.len()));
        let (before, from) = held.split_at_mut(at);
        match from {
            [found, after @ ..] => Ok((memory, found, before.first().or(after.first()))),
            [] => Err(self.store.wrong_ring(&self.ring.to_string())),
        }
    }
}

impl Store {
    /// The names of the other nodes that keep what this node keeps.
    pub fn neighbours(&self) -> Vec<String> {
        let state = self.rings.known().state;
        let names = state.rings().flat_map(|ring| ring.neighbours(&self.name));
        names.map(str::to_owned).collect()
    }

    /// Whether it or another node has, or had, an entry.
    pub fn knows_entries(&self) -> bool {
        let rings = self.rings.known().state.rings().count();
        (0..rings).any(|ring| !self.at(ring).parts_with_entries().is_empty())
    }

    /// Notes how many bytes came from another node in a second, if it can be read.
    pub fn note_rate(&self, name: &str, rate: usize) {
        if let Some(Ok(old)) = lock(&self.kept).reading.get_mut(name) {
            *old = rate;
        }
    }

    /// Notes that another node can be read, or why it cannot be.
    pub fn note_reading(&self, name: &str, why_not: Option<String>) {
        let mut kept = lock(&self.kept);
        match (why_not, kept.reading.get(name)) {
            (Some(why), _) => drop(kept.reading.insert(name.to_owned(), Err(why))),
            (None, Some(Ok(_))) => {}
            (None, _) => drop(kept.reading.insert(name.to_owned(), Ok(0))),
        }
    }

    /// Forgets all doubts: a person has read them.
    pub fn acknowledge(&self) -> Answer {
        let mut kept = lock(&self.kept);
        kept.doubts.clear();
        for held in &mut kept.held {
            held.parts.values_mut().for_each(|part| part.doubt = None);
        }
        ().into()
    }

    /// What there is to say about this node.
    pub fn status(&self) -> Status {
        let (counted, uptime) = (self.counted(), self.started.elapsed()); // other threads want the lock
        let (kept, known) = (lock(&self.kept), self.rings.known());
        let mut status = Status {
            name: self.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            progress: kept.progress(),
            ring: known.state.fingerprint(0, &self.name),
            epoch: known.state.epoch(),
            handed_over: kept.held.get(1).map_or(0, Held::count),
            garbage: kept.held.first().map_or(0, |held| held.garbage().bytes),
            carried: kept.held.first().map_or(0, |held| held.garbage().carried),
            forgot_s: kept.collected.map(|ended| ended.elapsed().as_secs()),
            bytes: kept.memory.own.bytes,
            memory: kept.memory.own.limit,
            full: kept.memory.is_full(),
            worn: kept.held.iter().any(|held| held.worn),
            start_id: self.start_id,
            uptime_s: uptime.as_secs(),
            uptime_us: micros(uptime),
            doubts: kept.doubts.iter().cloned().collect(),
            ..counted
        };
        // What it holds of the old ring counts, or of the new one where it was not in the old one.
        if let Some(held) = kept.held.first() {
            for (number, part) in &held.parts {
                part.tell(held.cluster.name(*number), &mut status);
            }
        }
        let waits = self.waits_for(&kept);
        let state = match known.state.has(&self.name) {
            _ if kept.unheard || !waits.is_empty() => "joining",
            true => "ready",
            false if kept.member || known.file.place(&self.name).is_none() => "left",
            false => "waiting",
        };
        state.clone_into(&mut status.state);
        kept.tell_waiting(waits, &mut status);
        status
    }

    /// The nodes that it must hear from, and after that those that it must read.
    fn waits_for(&self, kept: &Kept) -> BTreeSet<String> {
        if kept.unheard {
            return self.unheard_in(kept).into_iter().collect();
        }
        let missing = kept.held.iter().flat_map(|held| {
            let places = held.parts.values().flat_map(|part| part.missing.keys());
            places.map(|place| held.cluster.name(*place).to_owned())
        });
        missing.collect()
    }

    /// This node's name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Kept {
    /// Takes what is held of the rings of this state along. In a ring that is new, this node's word
    /// counts at once: nobody has asked it before. But a node that has started a moment ago may have
    /// been asked before its start.
    fn move_to(&mut self, state: &State, name: &str) {
        let names = |held: &Held| held.cluster.names().join(" ");
        if matches!(&self.held[..], [old, new] if names(old) == names(new)) {
            self.collected = Some(Instant::now()); // a round has ended
        }
        let mut old = std::mem::take(&mut self.held);
        self.epoch = state.epoch();
        for (ring, cluster) in state.rings().enumerate() {
            let born = state.born(ring);
            let same = |held: &Held| held.born == born && held.cluster.names() == cluster.names();
            let held = if let Some(at) = old.iter().position(same) {
                old.swap_remove(at)
            } else {
                let counts = !self.starting || planted(Bug::StartingNodeTakesNewRingAsRead);
                Held::new(cluster, name, ring == 1 && counts, born)
            };
            self.held.push(Held {
                ring: state.fingerprint(ring, name).into(),
                ..held
            });
        }
        self.member |= !self.unheard && state.has(name);
        let parts = old.iter_mut().flat_map(|held| held.parts.values_mut());
        self.doubts
            .extend(parts.filter_map(|part| part.doubt.take()));
        if !old.is_empty() {
            self.memory.own.bytes = self.held.iter().map(|held| held.bytes).sum(); // the others shared with them
            // Millions of entries take a while. Without a thread for them, they are dropped here.
            let _ = std::thread::Builder::new().spawn(move || drop(old));
        }
    }

    /// Adds the nodes that it waits for, and how well it reads each.
    fn tell_waiting(&self, names: BTreeSet<String>, status: &mut Status) {
        for name in names {
            let remark = match self.reading.get(&name) {
                None | Some(Ok(0)) => None,
                Some(Ok(rate)) => Some(format!("{}/s", ByteSize(*rate as u64).display().si())),
                Some(Err(why)) => Some(why.clone()),
            };
            let remark = remark.map(|remark| (name.clone(), remark));
            status.remarks.extend(remark);
            status.waiting_for.push(name);
        }
    }

    /// Refuses what no write can have.
    fn check(&self, stamp: Stamp) -> Result<(), Error> {
        if (stamp.counter, stamp.ballot) != (0, 0) && stamp.epoch() <= self.epoch {
            return Ok(());
        }
        let why = format!(
            "a stamp's counter is from 1 to {} now; kv54 resize --again begins anew",
            Stamp::last(self.epoch)
        );
        Err(Error::bad_request(why))
    }

    fn is_joining(&self) -> bool {
        let parts = self.held.iter().flat_map(|held| held.parts.values());
        parts.into_iter().any(|part| !part.missing.is_empty())
    }

    /// How much of what the other replicas keep has been read, in percent.
    fn progress(&self) -> usize {
        let (mut left, mut whole) = (0, 0);
        for held in &self.held {
            whole += held.parts.len() * (held.cluster.copies() - 1).max(1);
            let missing = held.parts.values().flat_map(|part| part.missing.values());
            left += missing
                .map(|(read, of)| {
                    let percent = read.saturating_mul(100).checked_div(*of); // `of` is the other's word
                    100 - percent.unwrap_or(0).min(99)
                })
                .sum::<usize>();
        }
        100 - left.div_ceil(whole.max(1))
    }
}

//! What a store writes down for the time after its node has stopped, and how it takes that back. A record is
//! `[ring, [key, entry, promised]]`, where the ring is the step at which it was first asked, or `[state]`, which also
//! says whether the node's word counted.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::journal::Journal;
use super::{Held, Kept, Memory, Replica, Store};
use crate::cluster::{Cluster, Told};
use crate::entry::{Entry, Stamp, entry, key};
use crate::error::{Error, Kind};
use crate::rpc::codec::{self, NIL, encode_bytes, encode_numbers};
use crate::rpc::{Reached, lock};
use crate::sabotage::{Bug, planted};
use crate::status::Status;

/// What a log may hold beyond twice the memory: a running node keeps more than its limit where it must.
const MORE: usize = 1 << 20;

/// Where the pages of a store go on: the step at which a ring was first asked, a part and a cursor in it, and whether
/// the node's word has counted so far.
pub type At = (u64, usize, usize, bool);

impl Store {
    /// Writes down from now on what it keeps.
    pub fn write_down(&self, journal: Arc<Journal>) {
        let _ = self.journal.set(journal);
    }

    /// What is written down and not on disk yet; none without `[disk]`.
    pub fn journal(&self) -> Option<&Arc<Journal>> {
        self.journal.get()
    }

    /// Writes down how the ring is, and whether this node's word counts.
    pub(super) fn note_state(&self, kept: &mut Kept) {
        kept.is_noted = !kept.unheard && !kept.is_joining();
        if let Some(journal) = self.journal.get() {
            journal.append(None, &[&self.state_record(kept.is_noted)]);
        }
    }

    fn state_record(&self, is_ready: bool) -> Vec<u8> {
        let joining = !is_ready;
        let told = Told {
            joining,
            ..self.rings.told("", 0)
        }; // without a name it goes by what it says
        [&[0x91], &*told.packed()].concat()
    }

    /// Refuses what the disk has no room for, or does not keep up with.
    pub(super) fn has_room(&self, is_new: bool) -> Result<(), Error> {
        match self
            .journal
            .get()
            .and_then(|journal| journal.refuses(is_new))
        {
            Some((kind, what)) => Err(Error::new(
                kind,
                format!("the disk of {} {what}", self.name),
            )),
            None => Ok(()),
        }
    }

    /// What has been counted, and what there is to say about the disk.
    pub(super) fn counted(&self) -> Status {
        let mut status = Status::counted(&lock(&self.meters));
        if let Some(journal) = self.journal.get() {
            let told = journal.told();
            status.disk = Some(told.bytes);
            status.commit_us = Some(told.commit_us);
            status.disk_full = Some(told.is_full);
        }
        status
    }

    /// Takes records back, oldest first, into a store that has written nothing down.
    pub fn replay(&self, records: &[u8]) -> Result<(), Error> {
        let mut kept = lock(&self.kept);
        kept.unheard = false; // else it takes nothing
        for record in codec::items(records).ok_or_else(odd)? {
            match codec::items(record).as_deref() {
                Some([state]) => self.replay_state(&mut kept, Told::read(state)?)?,
                Some([ring, item]) => {
                    let item = codec::items(item).ok_or_else(odd)?;
                    self.replay_entry(&mut kept, codec::number(ring).ok_or_else(odd)?, &item)?;
                }
                _ => return Err(odd()),
            }
        }
        Ok(())
    }

    /// The end of it. Whether this node's word counts; refused if its ring is another than the file's, or if it is
    /// far more than fits.
    pub fn replayed(&self) -> Result<bool, Error> {
        let Status { bytes, memory, .. } = self.status();
        if bytes > 2 * memory + MORE {
            let why = format!("{bytes} bytes, and memory in [limits] is {memory}");
            return Err(Error::new(Kind::Full, why));
        }
        let mut kept = lock(&self.kept);
        if kept.is_noted || planted(Bug::NoReadyMark) {
            for part in kept
                .held
                .iter_mut()
                .flat_map(|held| held.parts.values_mut())
            {
                part.missing.clear();
            }
            (kept.starting, kept.member) = (false, self.rings.known().state.has(&self.name));
            self.rings.is_certain();
        }
        kept.unheard = kept.starting;
        let known = self.rings.known();
        let unnamed = |ring: &Arc<Cluster>| {
            let mut names = ring.names().into_iter();
            let unnamed = names.find(|name| known.file.node(name).is_none());
            unnamed.map(str::to_owned)
        };
        // While it changes, the file may know one of the two.
        let mut unnamed: Vec<_> = known.state.rings().map(unnamed).collect();
        match (unnamed.pop().flatten(), unnamed.pop()) {
            (Some(name), None | Some(Some(_))) => {
                let (ring, file) = (known.state.told(), "[nodes] nor in [leaving]");
                let why = format!("{ring}, and {name} is neither in {file}");
                Err(Error::new(Kind::WrongRing, why))
            }
            _ => Ok(kept.is_noted),
        }
    }

    /// The window is the file's: it may have another one now.
    fn replay_state(&self, kept: &mut Kept, mut told: Told) -> Result<(), Error> {
        let file = self.rings.known().file.clone();
        told.window = self.rings.told("", 0).window;
        if let Some(state) = self.rings.hear(&told, false)? {
            kept.move_to(&state, &self.name);
        }
        if told.certain && told.state(&file)?.is(&self.rings.known().state) {
            kept.is_noted = !told.joining;
        }
        Ok(())
    }

    fn replay_entry(&self, kept: &mut Kept, born: u64, item: &[&[u8]]) -> Result<(), Error> {
        let (name, found, promised) = match *item {
            [name, found] => (key(name)?, entry(found)?, 0),
            [name, found, promised] => {
                let promised = codec::number(promised).ok_or_else(odd)?;
                (key(name)?, entry(found)?, promised)
            }
            _ => return Err(odd()),
        };
        let Some(held) = kept.held.iter().find(|held| held.born == born) else {
            return Ok(()); // its ring is not asked any more
        };
        let (store, ring) = (self, held.ring);
        let replica = Replica { store, ring };
        if promised > 0 {
            let (memory, held, _) = replica.held(kept)?;
            let (number, part) = held.part(name, &self.name)?;
            let place = part.find(name).map(|found| found.place);
            memory.own.bytes += held.promise(number, place, name, promised, None);
        }
        match found.stamp == Stamp::default() {
            true => Ok(()),
            false => replica.keep_in(kept, name, found, false),
        }
    }

    /// How many bytes it keeps, where a log has what two rings share once for each.
    pub fn bytes(&self) -> usize {
        lock(&self.kept).held.iter().map(|held| held.bytes).sum()
    }

    /// A page of all that is kept, as an array of records, and where the next one begins. Each begins with the state:
    /// a ring that is not asked any more is left out. This node's word counts in it if it did at all pages before.
    pub fn page(&self, (ring, part, cursor, ready): At, most: usize) -> (Vec<u8>, Option<At>) {
        let kept = lock(&self.kept);
        let ready = ready && kept.is_noted;
        let (mut page, mut count) = (self.state_record(ready), 1_u32);
        // What is kept in a newer ring is written down anyway.
        let held = kept.held.iter().find(|held| held.born >= ring);
        let (part, cursor) = match held {
            Some(held) if held.born == ring => (part, cursor),
            _ => (0, 0),
        };
        let mut next = held.map(|held| (held.born + 1, 0, 0, ready));
        let found = held.and_then(|held| Some((held.born, held.parts.values().nth(part)?)));
        if let Some((born, found)) = found {
            next = Some((born, part + 1, 0, ready));
            let slots = found.entries.get_range(cursor..).into_iter().flatten();
            for ((key, slot), place) in slots.zip(cursor..) {
                if page.len() > most && place > cursor {
                    next = Some((born, part, place, ready));
                    break;
                }
                page.push(0x92);
                page.extend_from_slice(&encode_numbers([born]));
                found.list(place, key, slot, &mut page);
                count += 1;
            }
        }
        ([&[0xdd], &count.to_be_bytes()[..], &page].concat(), next)
    }
}

impl Replica<'_> {
    /// Writes down an entry of a key in the ring that was first asked at this step.
    pub(super) fn note(&self, born: u64, key: &[u8], Entry { stamp, value }: Entry<&[u8]>) {
        if let Some(journal) = self.store.journal.get() {
            let (around, at) = stamp.around();
            let (begin, end) = around.split_at(at);
            let (ring, name) = (encode_numbers([born]), encode_bytes(key));
            journal.append(
                Some(key),
                &[&[0x92], &ring, &[0x92], &name, begin, value, end],
            );
        }
    }

    /// Ready when what is kept of a key now is on disk; `None` if it is, or need not be.
    pub fn settling(&self, key: &[u8]) -> Option<Reached> {
        self.store.journal.get()?.settling(Some(key))
    }

    /// Keeps a promise, and writes it down.
    pub(super) fn note_promise(
        &self,
        (memory, held): (&mut Memory, &mut Held),
        (part, place): (usize, Option<usize>), // in it, if the key has an entry
        key: &[u8],
        ballot: u64,
        moment: Option<(Instant, Duration)>,
    ) {
        memory.own.bytes += held.promise(part, place, key, ballot, moment);
        if let Some(journal) = self.store.journal.get() {
            let (ring, name) = (encode_numbers([held.born]), encode_bytes(key));
            let nothing = [&*Stamp::default().begin(3), NIL].concat();
            let ballot = encode_numbers([ballot]);
            journal.append(
                Some(key),
                &[&[0x92], &ring, &[0x93], &name, &nothing, &ballot],
            );
        }
    }
}

fn odd() -> Error {
    Error::bad_request("a record is [ring, [key, entry, promised ballot or nothing]] or [state]")
}

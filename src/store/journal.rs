//! What a store keeps that is not on disk yet, in the order in which it was kept. It is there for a node with
//! `[disk]` alone. An answer about a key waits until what it may reveal is on disk.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::OptionFuture;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use crate::error::Kind;
use crate::rpc::{Gate, HEDGE, Reached, lock};
use crate::status::micros;

/// What is committed together, in bytes, unless it is one record: the frame of it must fit into a segment.
const BATCH: usize = 1 << 20;
/// Places of keys, see [`place`].
const PLACES: usize = 1 << 12;
/// What most batches of a busy node have, in bytes.
const FEW: usize = 4 << 10;
/// How many bytes may wait for the disk before more is refused.
const MOST: usize = 16 << 20;

/// What is to be written, and who waits for it.
#[derive(Default)]
pub struct Journal {
    kept: Mutex<Kept>,
    grown: Notify,
    gate: Arc<Gate>,   // a step of it is a batch
    newest: AtomicU64, // batch; it grows under the lock
}

#[derive(Default)]
struct Kept {
    batches: VecDeque<Batch>,
    unsettled: usize, // the bytes that are not on disk
    keys: Vec<u64>,   // by their hashes: the batch of the last record of each
    all: u64,         // that of the last one that concerns all keys
    is_stuck: bool,   // the disk has no room for what is under way
    told: Told,
}

/// What there is to say about the disk.
#[derive(Clone, Copy, Debug, Default)]
pub struct Told {
    /// How many bytes its files have.
    pub bytes: usize,
    /// How long a commit takes, in microseconds: a decaying maximum of the last ones.
    pub commit_us: u64,
    /// Whether it has no room for more than what is under way.
    pub is_full: bool,
}

/// Records that are committed together.
#[derive(Default)]
pub struct Batch {
    records: Vec<u8>,
    count: u32,
}

impl Kept {
    fn is_behind(&self) -> bool {
        self.is_stuck || self.unsettled > MOST
    }
}

impl Batch {
    /// The records as one array.
    pub fn array(&self) -> Vec<u8> {
        [&[0xdd], &self.count.to_be_bytes()[..], &self.records].concat()
    }
}

impl Journal {
    /// Appends a record, which concerns this key, or all of them.
    pub fn append(&self, key: Option<&[u8]>, record: &[&[u8]]) {
        let mut kept = lock(&self.kept);
        let is_full = |batch: &Batch| batch.records.len() >= BATCH;
        let begins = kept.batches.back().is_none_or(is_full);
        if begins {
            kept.batches.push_back(Batch {
                records: Vec::with_capacity(FEW),
                count: 0,
            });
            self.newest.fetch_add(1, SeqCst);
        }
        let newest = self.newest.load(SeqCst);
        kept.keys.resize(PLACES, 0);
        match key.and_then(|key| kept.keys.get_mut(place(key))) {
            Some(of_key) => *of_key = newest,
            None => kept.all = newest,
        }
        if let Some(batch) = kept.batches.back_mut() {
            let before = batch.records.len();
            for piece in record {
                batch.records.extend_from_slice(piece);
            }
            batch.count += 1;
            let added = batch.records.len() - before;
            kept.unsettled += added;
        }
        drop(kept);
        if begins {
            self.grown.notify_one();
        }
    }

    /// The next records to be written.
    pub fn take(&self) -> Option<Batch> {
        lock(&self.kept).batches.pop_front()
    }

    /// Waits until there may be some.
    pub async fn grown(&self) {
        self.grown.notified().await;
    }

    /// These are on disk, which took so long and has so many bytes now.
    pub fn note_settled(&self, batch: &Batch, took: Duration, bytes: usize) {
        let mut kept = lock(&self.kept);
        (kept.unsettled, kept.is_stuck) = (kept.unsettled - batch.records.len(), false);
        let (told, took) = (&mut kept.told, micros(took));
        (told.bytes, told.commit_us) = (bytes, took.max(told.commit_us - told.commit_us / 8));
        drop(kept);
        self.gate.advance();
    }

    /// Ready when what is kept of a key now is on disk, and what concerns all keys; `None` if it is.
    pub fn settling(&self, key: Option<&[u8]>) -> Option<Reached> {
        if self.gate.has_done(self.newest.load(SeqCst)) {
            return None; // as always where nobody writes
        }
        let kept = lock(&self.kept);
        let of_key = key.and_then(|key| kept.keys.get(place(key))).copied();
        self.gate.reached(kept.all.max(of_key.unwrap_or(0)))
    }

    /// Ready when all is on disk that is kept now.
    pub async fn all_settled(&self) {
        let newest = self.newest.load(SeqCst);
        OptionFuture::from(self.gate.reached(newest)).await;
    }

    /// Does this, and wakes now and then those who wait for what is not on disk yet: they may turn elsewhere.
    /// `woken` is when that was last.
    pub async fn late<T>(&self, work: impl Future<Output = T>, woken: &mut Instant) -> T {
        let mut work = pin!(work);
        loop {
            match timeout_at(*woken + HEDGE, &mut work).await {
                Ok(done) => return done,
                Err(_) => self.gate.wake(),
            }
            *woken = Instant::now();
        }
    }

    /// What there is to say about the disk.
    pub fn told(&self) -> Told {
        lock(&self.kept).told
    }

    /// Whether more waits to be written than a disk should leave, or there is no room for any.
    pub fn is_behind(&self) -> bool {
        lock(&self.kept).is_behind()
    }

    /// Why nothing more is taken, or nothing new, if so.
    pub fn refuses(&self, is_new: bool) -> Option<(Kind, &'static str)> {
        let kept = lock(&self.kept);
        match (kept.told.is_full, kept.is_behind()) {
            (true, _) if is_new => Some((Kind::Full, "is full")),
            (true, true) => Some((Kind::Unavailable, "is full")),
            (false, true) => Some((Kind::Unavailable, "does not keep up")),
            (_, false) => None,
        }
    }

    /// The disk has no room for what is to be written next: until it has, nothing more is taken.
    pub fn note_stuck(&self) {
        lock(&self.kept).is_stuck = true;
    }

    /// Notes whether the disk is full; whether it was before.
    pub fn note_full(&self, is_full: bool) -> bool {
        std::mem::replace(&mut lock(&self.kept).told.is_full, is_full)
    }
}

/// Keys that share a place wait for each other.
fn place(key: &[u8]) -> usize {
    crc32fast::hash(key) as usize >> 20
}

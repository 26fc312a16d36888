//! What a store keeps that is not on disk yet, in the order in which it was kept. It is there for a node with
//! `[disk]` alone. An answer about a key waits until what it may reveal is on disk.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Notify;

use crate::rpc::lock;
use crate::status::micros;

/// What is committed together, in bytes, unless it is one record: the frame of it must fit into a segment.
const BATCH: usize = 1 << 20;
/// How many bytes may wait for the disk before more is refused.
const MOST: usize = 16 << 20;

/// Ready when something is on disk.
pub type Settling = Pin<Box<dyn Future<Output = ()> + Send + Sync>>;

/// What is to be written, and who waits for it.
#[derive(Default)]
pub struct Journal {
    kept: Mutex<Kept>,
    grown: Notify,
    settled: Notify,
}

#[derive(Default)]
struct Kept {
    batches: VecDeque<Batch>,
    appended: u64,           // so many records
    settled: u64,            // of them, so many are on disk
    unsettled: usize,        // the bytes of the others
    keys: HashMap<u16, u64>, // by their hashes: the last record of each
    all: u64,                // the last one that concerns all keys
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
    last: u64,
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
        kept.appended += 1;
        let last = kept.appended;
        match key {
            Some(key) => drop(kept.keys.insert(place(key), last)),
            None => kept.all = last,
        }
        let is_full = |batch: &Batch| batch.records.len() >= BATCH;
        if kept.batches.back().is_none_or(is_full) {
            kept.batches.push_back(Batch::default());
        }
        if let Some(batch) = kept.batches.back_mut() {
            let before = batch.records.len();
            for piece in record {
                batch.records.extend_from_slice(piece);
            }
            (batch.count, batch.last) = (batch.count + 1, last);
            let added = batch.records.len() - before;
            kept.unsettled += added;
        }
        self.grown.notify_one();
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
        kept.settled = batch.last;
        kept.unsettled -= batch.records.len();
        let (told, took) = (&mut kept.told, micros(took));
        (told.bytes, told.commit_us) = (bytes, took.max(told.commit_us - told.commit_us / 8));
        drop(kept);
        self.settled.notify_waiters();
    }

    /// Ready when what is kept of a key now is on disk, and what concerns all keys; `None` if it is.
    pub fn settling(self: &Arc<Self>, key: Option<&[u8]>) -> Option<Settling> {
        let kept = lock(&self.kept);
        let of_key = key.and_then(|key| kept.keys.get(&place(key)));
        let until = kept.all.max(of_key.copied().unwrap_or(0));
        let journal = (kept.settled < until).then(|| self.clone())?;
        Some(Box::pin(async move { journal.reached(until).await }))
    }

    /// Ready when all is on disk that is kept now.
    pub async fn all_settled(&self) {
        let until = lock(&self.kept).appended;
        self.reached(until).await;
    }

    async fn reached(&self, until: u64) {
        loop {
            let mut settled = pin!(self.settled.notified());
            settled.as_mut().enable();
            if lock(&self.kept).settled >= until {
                return;
            }
            settled.await;
        }
    }

    /// What there is to say about the disk.
    pub fn told(&self) -> Told {
        lock(&self.kept).told
    }

    /// Whether more waits to be written than a disk should leave.
    pub fn is_behind(&self) -> bool {
        lock(&self.kept).unsettled > MOST
    }

    /// Notes whether the disk is full; whether it was before.
    pub fn note_full(&self, is_full: bool) -> bool {
        std::mem::replace(&mut lock(&self.kept).told.is_full, is_full)
    }
}

/// Keys that share a place wait for each other.
fn place(key: &[u8]) -> u16 {
    (crc32fast::hash(key) >> 20) as u16
}

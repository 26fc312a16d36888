//! What a store keeps that is not on disk yet, in the order in which it was kept. It is there for a node with
//! `[disk]` alone. An answer about a key waits until what it may reveal is on disk.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex};

use tokio::sync::Notify;

use crate::rpc::lock;

/// What is committed together, in bytes, unless it is one record: the frame of it must fit into a segment.
const BATCH: usize = 1 << 20;
/// Keys that share a place wait for each other.
const PLACES: usize = 4096;

/// Ready when something is on disk.
pub type Settling = Pin<Box<dyn Future<Output = ()> + Send + Sync>>;

/// What is to be written, and who waits for it.
pub struct Journal {
    kept: Mutex<Kept>,
    grown: Notify,
    settled: Notify,
}

struct Kept {
    batches: VecDeque<Batch>,
    appended: u64,  // so many records
    settled: u64,   // of them, so many are on disk
    keys: Vec<u64>, // by their hashes: the last record of each
    all: u64,       // the last one that concerns all keys
    room: Room,
    told: Told,
}

/// What there is to say about the disk.
#[derive(Clone, Copy, Debug, Default)]
pub struct Told {
    /// How many bytes its files have.
    pub bytes: usize,
    /// How long the last commits took, each in microseconds.
    pub commits_us: [u64; 16],
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

/// How much the disk can still take.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd)]
pub enum Room {
    /// As much as comes.
    #[default]
    Enough,
    /// What is under way: new sets are refused.
    Little,
    /// Nothing.
    None,
}

impl Default for Journal {
    fn default() -> Self {
        Journal {
            kept: Mutex::new(Kept {
                batches: VecDeque::new(),
                appended: 0,
                settled: 0,
                keys: vec![0; PLACES],
                all: 0,
                room: Room::Enough,
                told: Told::default(),
            }),
            grown: Notify::new(),
            settled: Notify::new(),
        }
    }
}

impl Journal {
    /// Appends a record, which concerns this key, or all of them.
    pub fn append(&self, key: Option<&[u8]>, record: &[&[u8]]) {
        let mut kept = lock(&self.kept);
        kept.appended += 1;
        let last = kept.appended;
        match key.and_then(|key| kept.keys.get_mut(place(key))) {
            Some(key) => *key = last,
            None => kept.all = last,
        }
        if kept
            .batches
            .back()
            .is_none_or(|batch| batch.records.len() >= BATCH)
        {
            kept.batches.push_back(Batch::default());
        }
        if let Some(batch) = kept.batches.back_mut() {
            for piece in record {
                batch.records.extend_from_slice(piece);
            }
            (batch.count, batch.last) = (batch.count + 1, last);
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

    /// These are on disk, which took so many microseconds and has so many bytes now.
    pub fn note_settled(&self, batch: &Batch, commit_us: u64, bytes: usize) {
        let mut kept = lock(&self.kept);
        kept.settled = batch.last;
        kept.told.bytes = bytes;
        kept.told.commits_us.rotate_right(1);
        kept.told.commits_us[0] = commit_us;
        drop(kept);
        self.settled.notify_waiters();
    }

    /// Ready when what is kept of a key now is on disk; `None` if it is.
    pub fn settling(self: &Arc<Self>, key: &[u8]) -> Option<Settling> {
        let kept = lock(&self.kept);
        let until = kept
            .keys
            .get(place(key))
            .copied()
            .unwrap_or(0)
            .max(kept.all);
        let journal = (kept.settled < until).then(|| self.clone())?;
        Some(Box::pin(async move { journal.reached(until).await }))
    }

    /// The same for all keys.
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

    /// How much the disk can still take.
    pub fn room(&self) -> Room {
        lock(&self.kept).room
    }

    /// Notes it; what it was before.
    pub fn note_room(&self, room: Room) -> Room {
        std::mem::replace(&mut lock(&self.kept).room, room)
    }
}

fn place(key: &[u8]) -> usize {
    crc32fast::hash(key) as usize % PLACES
}

//! What a thread of a node counts: how many requests it has answered, and how long its guests waited. All these
//! numbers only grow, so what a moment brought is the difference between two readings.

use std::array;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use tokio::runtime::{Handle, RuntimeMetrics};
use tokio::time::Instant;

use crate::methods::{AMONG_NODES, FOR_GUESTS};

/// Eight buckets for each doubling: a latency is known to an eighth, or better. The last one begins
/// after half an hour.
const BUCKETS: usize = 232;
/// Room for so many batches of one connection stays behind.
const FEW: usize = 16;

/// The counters of one thread of a node.
pub struct Meter {
    runtime: Option<RuntimeMetrics>,
    started: Instant,
    answered: [AtomicU64; FOR_GUESTS.len() + AMONG_NODES.len()],
    failed: AtomicU64,
    waited: [AtomicU64; BUCKETS],
    waited_us: AtomicU64,
    connections: AtomicUsize,
    accepted: AtomicU64,
    batch: AtomicU64, // when the requests came that are being taken, or UNKNOWN
}

/// The clock was not looked at yet.
const UNKNOWN: u64 = u64::MAX;

/// A request that is counted: the place of its method, and when it came where a guest waits for it.
#[derive(Clone, Copy)]
pub struct Counted {
    place: usize,
    begun: u64,
}

/// The answers of one connection, on their way into the counters.
pub(super) struct Tally<'a> {
    pub(super) meter: &'a Meter,
    waiting: Vec<(u64, u64)>, // answers whose time is not taken yet: when they were asked for, how many
}

impl Default for Meter {
    fn default() -> Self {
        Meter {
            runtime: Handle::try_current().ok().map(|runtime| runtime.metrics()),
            started: Instant::now(),
            answered: Default::default(),
            failed: AtomicU64::default(),
            waited: array::from_fn(|_| AtomicU64::default()),
            waited_us: AtomicU64::default(),
            connections: AtomicUsize::default(),
            accepted: AtomicU64::default(),
            batch: AtomicU64::new(UNKNOWN),
        }
    }
}

impl Meter {
    /// How many requests were answered, by their methods.
    pub fn answered(&self) -> impl Iterator<Item = (&'static str, u64)> {
        methods()
            .zip(&self.answered)
            .map(|(method, count)| (method, count.load(Relaxed)))
    }

    /// How many requests of guests got an error.
    pub fn failed(&self) -> u64 {
        self.failed.load(Relaxed)
    }

    /// How many requests of guests were answered in less than so many microseconds, and not in less
    /// than the number before.
    pub fn waited(&self) -> impl Iterator<Item = (u64, u64)> {
        let counts = self.waited.iter().map(|count| count.load(Relaxed));
        (0..).map(end).zip(counts).filter(|(_, count)| *count > 0)
    }

    /// How long the guests have waited in all, in microseconds.
    pub fn waited_us(&self) -> u64 {
        self.waited_us.load(Relaxed)
    }

    /// How long the runtime in which it was made was at work.
    pub fn busy(&self) -> Duration {
        let runtime = self.runtime.iter();
        runtime
            .map(|runtime| runtime.worker_total_busy_duration(0))
            .sum()
    }

    /// How many connections are open now, and how many were ever accepted.
    pub fn connections(&self) -> (usize, u64) {
        (self.connections.load(Relaxed), self.accepted.load(Relaxed))
    }

    pub(super) fn open(&self, connections: usize) {
        self.connections.store(connections, Relaxed);
    }

    /// A connection more.
    pub(super) fn tally(&self) -> Tally<'_> {
        add(&self.accepted, 1);
        let (meter, waiting) = (self, Vec::new());
        Tally { meter, waiting }
    }

    /// Requests are taken that came together.
    pub(super) fn begin_batch(&self) {
        self.batch.store(UNKNOWN, Relaxed);
    }

    /// One of them. The clock is read for the first that a guest waits for.
    pub(super) fn begin(&self, method: &str) -> Option<Counted> {
        let place = place(method)?;
        if place < FOR_GUESTS.len() && self.batch.load(Relaxed) == UNKNOWN {
            self.batch.store(self.now(), Relaxed);
        }
        let begun = self.batch.load(Relaxed);
        Some(Counted { place, begun })
    }

    /// Microseconds since the start.
    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_micros()).unwrap_or(UNKNOWN)
    }
}

impl Tally<'_> {
    /// Counts an answer.
    pub(super) fn count(&mut self, of: Counted, failed: bool) {
        if let Some(count) = self.meter.answered.get(of.place) {
            add(count, 1);
        }
        if of.place >= FOR_GUESTS.len() {
            return;
        }
        add(&self.meter.failed, failed.into());
        match self.waiting.last_mut() {
            Some((same, count)) if *same == of.begun => *count += 1,
            _ => self.waiting.push((of.begun, 1)),
        }
    }

    /// Takes the time of all answers since the last time: the clock is read once for them.
    pub(super) fn take_time(&mut self) {
        if self.waiting.is_empty() {
            return;
        }
        let now = self.meter.now();
        for (begun, count) in self.waiting.drain(..) {
            let us = now.saturating_sub(begun);
            if let Some(bucket) = self.meter.waited.get(bucket(us).min(BUCKETS - 1)) {
                add(bucket, count);
            }
            add(&self.meter.waited_us, us.saturating_mul(count));
        }
        self.waiting.shrink_to(FEW);
    }
}

/// The place of a method in the counters, among [`methods`].
fn place(method: &str) -> Option<usize> {
    Some(match method {
        "get" => 0,
        "set" => 1,
        "delete" => 2,
        "cas" => 3,
        "incr" => 4,
        "swap" => 5,
        "promise" => 6,
        "load" => 7,
        "store" => 8,
        "scan" => 9,
        "status" => 10,
        "ring" => 11,
        "acknowledge" => 12,
        _ => return None,
    })
}

fn methods() -> impl Iterator<Item = &'static str> {
    FOR_GUESTS.into_iter().chain(AMONG_NODES)
}

/// Adds without a locked instruction: the one task that serves is the only one that counts.
fn add(counter: &AtomicU64, more: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(more), Relaxed);
}

/// The bucket of so many microseconds: 0, 1, … 15, 16 to 17, … 30 to 31, 32 to 35, …
fn bucket(us: u64) -> usize {
    let bucket = match us.checked_ilog2() {
        Some(power @ 3..) => u64::from(power - 2) * 8 + (us >> (power - 3)) % 8,
        _ => us,
    };
    usize::try_from(bucket).unwrap_or(usize::MAX)
}

/// Where a bucket ends: the first number that is not in it.
fn end(bucket: usize) -> u64 {
    let next = bucket as u64 + 1;
    match next / 8 {
        0 => next,
        power => (8 + next % 8) << (power - 1),
    }
}

//! Whether a set may take more of a node's memory. It asks before anything is written, together
//! with its question for the stamp. What is written after that is kept, however little is left:
//! a majority may have answered for it.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::error::{Error, Kind};
use crate::sabotage::{Bug, planted};

use super::Key;

/// How long a node believes what a neighbour said of its memory: one that is down may be emptied, or
/// be given a larger limit.
const NEWS: Duration = Duration::from_secs(3);

/// What the entries of a node take, in bytes, and what they may take.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Usage {
    pub(super) bytes: usize,
    pub(super) limit: usize,
}

impl Usage {
    pub(super) fn has_room(self, added: usize) -> bool {
        self.bytes.saturating_add(added) <= self.limit
    }
}

/// A node that has no room for a set.
pub(super) struct Refusal {
    pub(super) place: Option<usize>, // `None`: this one
    pub(super) usage: Usage,
    pub(super) coming: usize, // what sets may add that were allowed: without them there is room
}

impl Refusal {
    /// By a node that is full.
    pub(super) fn of(usage: Usage) -> Self {
        Refusal {
            place: None,
            usage,
            coming: 0,
        }
    }
}

/// The memory of another node, and when it was seen.
pub(super) type Seen = (Instant, Usage);

/// The memory of a node.
pub(super) struct Memory {
    pub(super) own: Usage,
    allowed: HashMap<Key, (Instant, usize)>, // sets that have not written yet: since when, how much
    coming: usize,                           // the sum of those
    cleaned: Instant,                        // of sets that will not write
    refused: usize,                          // what the last set that was refused would have added
    window: Duration,
}

impl Memory {
    pub(super) fn new(limit: usize, window: Duration) -> Self {
        Memory {
            own: Usage { bytes: 0, limit },
            allowed: HashMap::new(),
            coming: 0,
            cleaned: Instant::now(),
            refused: 0,
            window,
        }
    }

    /// Allows a set of this key to add so many bytes here and at these other nodes of its part. A
    /// set that adds nothing takes back what was allowed before.
    pub(super) fn allow(
        &mut self,
        key: &[u8],
        added: usize,
        mut others: impl Iterator<Item = (usize, Option<Seen>)>,
    ) -> Result<(), Refusal> {
        self.arrived(key);
        if added == 0 {
            return Ok(());
        }
        if !self.own.has_room(added) {
            self.refused = added;
            return Err(Refusal::of(self.own));
        }
        let is_full = |(place, seen): (usize, Option<Seen>)| {
            let (seen, usage) = seen?;
            let is_full = !usage.has_room(added) && seen.elapsed() < NEWS;
            is_full.then(|| Refusal {
                place: Some(place),
                ..Refusal::of(usage)
            })
        };
        if let Some(refusal) = others.find_map(is_full) {
            return Err(refusal);
        }
        // A few bytes on their way are not worth the counting while half of the memory is free.
        if self.own.bytes > self.own.limit / 2 || added > self.own.limit >> 16 {
            self.count(key, added)?;
        }
        Ok(())
    }

    /// Counts a set that is on its way. All sets that were allowed may together exceed the limit by
    /// a sixteenth: those that slip through, since nobody asked this node, need room as well.
    fn count(&mut self, key: &[u8], added: usize) -> Result<(), Refusal> {
        if self.cleaned.elapsed() > self.window / 8 {
            self.cleaned = Instant::now();
            let window = self.window;
            self.allowed
                .retain(|_, (since, _)| since.elapsed() <= window);
            self.coming = self.allowed.values().map(|(_, added)| added).sum();
        }
        let (usage, coming) = (self.own, self.coming);
        if usage.bytes + coming + added > usage.limit.saturating_add(usage.limit / 16) {
            let place = None;
            return Err(Refusal {
                place,
                usage,
                coming,
            });
        }
        self.allowed.insert(key.into(), (Instant::now(), added));
        self.coming += added;
        Ok(())
    }

    /// Counts an entry of this key that is kept now. There is always room for it.
    pub(super) fn keep(&mut self, key: &[u8], added: usize, freed: usize) -> Result<(), Error> {
        if planted(Bug::FullReplicaRefusesToStore) && !self.own.has_room(added) {
            return Err(Error::new(Kind::Full, "planted"));
        }
        self.arrived(key);
        self.own.bytes = self.own.bytes + added - freed;
        Ok(())
    }

    fn arrived(&mut self, key: &[u8]) {
        if self.allowed.is_empty() {
            return; // as long as nothing is counted, no key is hashed
        }
        if let Some((_, added)) = self.allowed.remove(key) {
            self.coming -= added;
        }
    }

    /// Whether the last set that was refused would still be, or more is kept than the limit.
    pub(super) fn is_full(&self) -> bool {
        !self.own.has_room(self.refused)
    }
}

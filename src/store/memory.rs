//! Whether a set may take more of a node's memory. It asks before anything is written, together
//! with its question for the stamp. What is written after that is kept, however little is left:
//! a majority may have answered for it.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use tokio::time::Instant;

use super::Key;

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

/// The memory of a node, and as much as it knows of its neighbours' memory.
#[derive(Default)]
pub(super) struct Memory {
    pub(super) own: Usage,
    /// Each when last seen, and what was written since then.
    pub(super) others: BTreeMap<usize, Usage>,
    allowed: HashMap<Key, (Instant, usize)>, // sets that have not written yet: since when, how much
    coming: usize,                           // the sum of those
    refused: usize,                          // what the last set that was refused would have added
    window: Duration,
}

impl Memory {
    pub(super) fn new(limit: usize, window: Duration) -> Self {
        Memory {
            own: Usage { bytes: 0, limit },
            window,
            ..Memory::default()
        }
    }

    /// Allows a set of this key to add so many bytes here and at the part's other nodes. An error
    /// is the node that has no room for them (`None`: this one), and what it uses.
    pub(super) fn allow(
        &mut self,
        key: &[u8],
        added: usize,
        others: impl Iterator<Item = usize>,
    ) -> Result<(), (Option<usize>, Usage)> {
        if added == 0 {
            return Ok(());
        }
        if !self.own.has_room(added) || !self.has_room_beside_others(added) {
            self.refused = added;
            return Err((None, self.own));
        }
        for place in others {
            let usage = self.others.get(&place);
            if let Some(full) = usage.filter(|usage| !usage.has_room(added)) {
                return Err((Some(place), *full));
            }
        }
        // With half of the memory free, sets on their way are not worth the counting.
        if self.own.bytes > self.own.limit / 2 {
            let before = self.allowed.insert(key.into(), (Instant::now(), added));
            self.coming = self.coming + added - before.map_or(0, |(_, added)| added);
        }
        Ok(())
    }

    /// Whether this fits if all sets that were allowed do write: together they may exceed the limit
    /// by a sixteenth. A set that did not write within the window will not.
    fn has_room_beside_others(&mut self, added: usize) -> bool {
        let limit = self.own.limit.saturating_add(self.own.limit / 16);
        let fits = |coming: usize| self.own.bytes + coming + added <= limit;
        if !fits(self.coming) {
            self.allowed
                .retain(|_, (since, _)| since.elapsed() <= self.window);
            self.coming = self.allowed.values().map(|(_, added)| added).sum();
        }
        fits(self.coming)
    }

    /// Counts an entry of this key that is kept now, here and soon at these other nodes.
    pub(super) fn keep(
        &mut self,
        key: &[u8],
        added: usize,
        freed: usize,
        others: impl Iterator<Item = usize>,
    ) {
        let coming = self.allowed.remove(key);
        self.coming -= coming.map_or(0, |(_, added)| added);
        self.own.bytes = self.own.bytes + added - freed;
        for place in others {
            let theirs = self.others.entry(place);
            theirs.and_modify(|usage| usage.bytes = (usage.bytes + added).saturating_sub(freed));
        }
    }

    /// Whether the last set that was refused would still be, or more is kept than the limit.
    pub(super) fn is_full(&self) -> bool {
        !self.own.has_room(self.refused)
    }
}

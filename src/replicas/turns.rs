//! Swaps of one key take turns at the node that does them: those that wait are done at once, in the
//! order in which they came, so that many clients of one key do not cost many times as much. Only
//! speed depends on it.

use std::collections::HashMap;
use std::collections::hash_map::Entry::{Occupied, Vacant};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use foldhash::fast::RandomState;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::Change;
use crate::entry::Packed;
use crate::error::Error;
use crate::rpc::lock;
use crate::store::Key;

/// How long a key's owner is asked to do its swaps, after another node was in the way of one.
const CONTENDED: Duration = Duration::from_secs(1);

/// Of how many keys that is noted.
const MOST_CONTENDED: usize = 1024;

/// What became of a swap.
#[derive(Clone, Debug)]
pub enum Swapped {
    /// It was done: this value is there now.
    Done(Packed),
    /// The function wanted nothing changed: this is the value.
    Not(Packed),
}

/// A swap that waits for its turn.
pub(crate) struct Waiting {
    /// Since when.
    pub(crate) since: Instant,
    /// What it makes of the value, whichever stamp that has: it may be what another one has made.
    pub(crate) change: Box<Change<'static>>,
    /// Whether it tries again where swaps of other nodes are in the way.
    pub(crate) insists: bool,
    /// Where the answer goes.
    pub(crate) answer: oneshot::Sender<Result<Swapped, Error>>,
}

/// The swaps that wait at one node, by their keys.
#[derive(Default)]
pub(crate) struct Turns {
    waiting: Mutex<HashMap<Key, Line, RandomState>>,
    given: AtomicU64, // numbers, to turns
    contended: Mutex<HashMap<Key, Instant, RandomState>>,
}

/// Those behind one swap, or some that are done together.
struct Line {
    turn: u64,
    waiting: Vec<Waiting>, // since this turn began
}

impl Line {
    fn of(turn: u64) -> Self {
        let waiting = Vec::new();
        Line { turn, waiting }
    }
}

impl Turns {
    /// The first swap of a key has its turn at once, with this number; later ones wait behind it. The first
    /// must call [`Turns::next`] when it ends.
    pub(crate) fn enter(&self, key: &[u8], swap: impl FnOnce() -> Waiting) -> Option<u64> {
        match lock(&self.waiting).entry(Key::from_slice(key)) {
            Occupied(mut line) => {
                line.get_mut().waiting.push(swap());
                None
            }
            Vacant(place) => Some(place.insert(Line::of(self.number())).turn),
        }
    }

    /// All that wait for a key, when this turn ends. Where there are none, or others did not wait for its end,
    /// it was the last.
    pub(crate) fn next(&self, key: &[u8], turn: u64) -> Option<Vec<Waiting>> {
        let mut waiting = lock(&self.waiting);
        let Occupied(mut line) = waiting.entry(Key::from_slice(key)) else {
            return None;
        };
        if line.get().turn != turn {
            return None;
        }
        if line.get().waiting.is_empty() {
            line.remove();
            return None;
        }
        Some(std::mem::take(&mut line.get_mut().waiting))
    }

    /// All that wait for a key, if one of them has for so long, and the number of their turn: most likely the
    /// guest of the one before reads no answers, so that nothing is done for it.
    pub(crate) fn take_over(&self, key: &[u8], longest: Duration) -> Option<(u64, Vec<Waiting>)> {
        let mut waiting = lock(&self.waiting);
        let line = waiting.get_mut(key)?;
        if line.waiting.first()?.since.elapsed() < longest {
            return None;
        }
        let taken = std::mem::replace(line, Line::of(self.number()));
        Some((line.turn, taken.waiting))
    }

    fn number(&self) -> u64 {
        self.given.fetch_add(1, Relaxed)
    }

    /// Those who do not wait any more hold no memory.
    pub(crate) fn leave(&self, key: &[u8]) {
        if let Some(line) = lock(&self.waiting).get_mut(key) {
            line.waiting.retain(|swap| !swap.answer.is_closed());
        }
    }

    /// Notes that swaps of another node are in the way of this key's.
    pub(crate) fn note_contended(&self, key: &[u8]) {
        let mut contended = lock(&self.contended);
        if contended.len() >= MOST_CONTENDED {
            contended.clear();
        }
        contended.insert(Key::from_slice(key), Instant::now());
    }

    /// Whether that was so a short time ago.
    pub(crate) fn is_contended(&self, key: &[u8]) -> bool {
        let since = lock(&self.contended).get(key).copied();
        since.is_some_and(|since| since.elapsed() < CONTENDED)
    }
}

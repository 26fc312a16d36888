//! Swaps of one key take turns at the node that does them: those that wait are done at once, in the
//! order in which they came, so that many clients of one key do not cost many times as much. Only
//! speed depends on it.

use std::collections::HashMap;
use std::collections::hash_map::Entry::{Occupied, Vacant};
use std::sync::Mutex;
use std::time::Duration;

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
    waiting: Mutex<HashMap<Key, Line>>,
    contended: Mutex<HashMap<Key, Instant>>,
}

/// Those behind one swap.
struct Line {
    begun: Instant,
    waiting: Vec<Waiting>,
}

impl Turns {
    /// The first swap of a key begins at once; later ones wait behind it. The first must call
    /// [`Turns::next`] when it ends. After `longest` it is waited for no more: most likely its guest reads no
    /// answers, so that nothing is done for it.
    pub(crate) fn enter(&self, key: &[u8], longest: Duration, swap: impl FnOnce() -> Waiting) {
        let (mut waiting, begun) = (lock(&self.waiting), Instant::now());
        match waiting.entry(Key::from_slice(key)) {
            Occupied(mut line) if line.get().begun + longest <= begun => {
                line.get_mut().begun = begun;
            }
            Occupied(mut line) => {
                let others = &mut line.get_mut().waiting;
                if others.len() % 64 == 63 {
                    others.retain(|swap| !swap.answer.is_closed()); // whose guests are gone
                }
                others.push(swap());
            }
            Vacant(place) => {
                let waiting = Vec::new();
                place.insert(Line { begun, waiting });
            }
        }
    }

    /// All that wait for a key. Where there are none, its turn is over.
    pub(crate) fn next(&self, key: &[u8]) -> Option<Vec<Waiting>> {
        let mut waiting = lock(&self.waiting);
        let Occupied(mut line) = waiting.entry(Key::from_slice(key)) else {
            return None;
        };
        if line.get().waiting.is_empty() {
            line.remove();
            return None;
        }
        line.get_mut().begun = Instant::now();
        Some(std::mem::take(&mut line.get_mut().waiting))
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

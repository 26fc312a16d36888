//! Swaps of one key take turns at the node that does them: those that wait are done at once, in the
//! order in which they came, so that many clients of one key do not cost many times as much. Only
//! speed depends on it.

use std::collections::HashMap;
use std::sync::Mutex;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::Change;
use crate::entry::Packed;
use crate::error::Error;
use crate::rpc::lock;

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
    /// What it makes of the value.
    pub(crate) change: Box<Change<'static>>,
    /// Where the answer goes.
    pub(crate) answer: oneshot::Sender<Result<Swapped, Error>>,
}

/// The swaps that wait at one node, by their keys.
#[derive(Default)]
pub(crate) struct Turns(Mutex<HashMap<Vec<u8>, Vec<Waiting>>>);

impl Turns {
    /// Puts a swap behind the others of its key. Whether there was none: then somebody must begin to
    /// take the [`Turns::next`] ones, until there is none any more.
    pub(crate) fn wait(&self, key: &[u8], swap: Waiting) -> bool {
        let mut waiting = lock(&self.0);
        match waiting.get_mut(key) {
            Some(others) => {
                others.push(swap);
                false
            }
            None => waiting.insert(key.to_vec(), vec![swap]).is_none(),
        }
    }

    /// All that wait for a key.
    pub(crate) fn next(&self, key: &[u8]) -> Option<Vec<Waiting>> {
        let mut waiting = lock(&self.0);
        let next = std::mem::take(waiting.get_mut(key)?);
        if next.is_empty() {
            waiting.remove(key);
            return None;
        }
        Some(next)
    }
}

//! Queues of requests, one for each key that somebody asks about. Requests take their turns in the order in
//! which they came; those that only read, beside each other.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use tokio::sync::Semaphore;

use crate::error::{Error, Kind};
use crate::rpc::lock;

/// All of a queue's turn, of which those that only read take 1 each.
const ALONE: u32 = 1 << 20;

/// A queue.
pub struct Queue(Semaphore);

/// The queues, by their keys.
#[derive(Default)]
pub struct Queues(Mutex<HashMap<Arc<[u8]>, Arc<Queue>>>);

/// A place at a queue, which is forgotten with the last one.
pub struct Place {
    /// Where it is.
    pub queue: Arc<Queue>,
    key: Arc<[u8]>,
    queues: Arc<Queues>,
}

impl Default for Queue {
    fn default() -> Self {
        Queue(Semaphore::new(ALONE as usize))
    }
}

impl Queue {
    /// Waits for a turn from the first poll on, and has it until this is dropped.
    pub async fn turn(&self, is_alone: bool) -> impl Sized {
        self.0.acquire_many(if is_alone { ALONE } else { 1 }).await
    }
}

impl Queues {
    /// The queue of a key.
    pub fn place(self: &Arc<Self>, key: &[u8]) -> Place {
        let (key, mut queues) = (Arc::from(key), lock(&self.0));
        Place {
            queue: queues.entry(Arc::clone(&key)).or_default().clone(),
            key,
            queues: self.clone(),
        }
    }
}

impl Place {
    /// What is said to a request whose time was over before its turn came.
    pub(super) fn late(&self) -> Error {
        let key = String::from_utf8_lossy(&self.key);
        let why = format!("key {key:?}: others that came before are not answered");
        Error::new(Kind::Unavailable, why)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut queues = lock(&self.queues.0);
        if Arc::strong_count(&self.queue) == 2 {
            // Only the table has it beside this place. Places of one connection are dropped in one task.
            queues.remove(&self.key);
        }
    }
}

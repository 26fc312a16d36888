//! What all connections of a node hold together: unfinished input, requests in flight and
//! unsent answers. When that is too much, the connection that holds the most is closed.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::task::Context;

use futures::task::AtomicWaker;

use super::lock;

/// What all connections hold together, in bytes.
#[derive(Default)]
pub(super) struct Buffers {
    limit: AtomicUsize,
    total: AtomicUsize,
    shares: Mutex<Vec<Arc<Held>>>,
}

/// What one connection holds of it.
pub(super) struct Share {
    buffers: Arc<Buffers>,
    held: Arc<Held>,
}

#[derive(Default)]
struct Held {
    bytes: AtomicUsize,
    over: AtomicBool, // this connection is to be closed
    waker: AtomicWaker,
}

impl Buffers {
    pub(super) fn new(limit: usize) -> Self {
        Buffers {
            limit: limit.into(),
            ..Buffers::default()
        }
    }

    /// From now on they may hold so many bytes.
    pub(super) fn limit(&self, bytes: usize) {
        self.limit.store(bytes, Relaxed);
    }

    /// How many connections there are.
    pub(super) fn connections(&self) -> usize {
        lock(&self.shares).len()
    }

    /// The share of one more connection.
    pub(super) fn join(self: &Arc<Self>) -> Share {
        let (buffers, held) = (self.clone(), Arc::<Held>::default());
        lock(&self.shares).push(held.clone());
        Share { buffers, held }
    }

    /// Marks the largest connections until the rest of them fits.
    fn make_room(&self) {
        let mut shares = lock(&self.shares);
        shares.sort_by_cached_key(|held| held.bytes.load(Relaxed)); // other threads change them
        let (mut total, limit) = (self.total.load(Relaxed), self.limit.load(Relaxed));
        for held in shares.iter().rev() {
            if total <= limit {
                break;
            }
            total = total.saturating_sub(held.bytes.load(Relaxed));
            if !held.over.swap(true, Relaxed) {
                held.waker.wake();
            }
        }
    }
}

impl Share {
    /// Notes how much this connection holds now; fails if it is the one to be closed.
    pub(super) fn hold(&self, bytes: usize, context: &Context<'_>) -> io::Result<()> {
        let before = self.held.bytes.swap(bytes, Relaxed);
        let changed = bytes.wrapping_sub(before);
        if changed != 0 {
            let total = self.buffers.total.fetch_add(changed, Relaxed);
            if bytes > before && total + changed > self.buffers.limit.load(Relaxed) {
                self.buffers.make_room();
            }
        }
        self.held.waker.register(context.waker());
        if self.held.over.load(Relaxed) {
            log::warn!(
                "a connection is closed: its {bytes} bytes are the most of all buffers, which are full"
            );
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        Ok(())
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let bytes = self.held.bytes.load(Relaxed);
        self.buffers.total.fetch_sub(bytes, Relaxed);
        lock(&self.buffers.shares).retain(|held| !Arc::ptr_eq(held, &self.held));
    }
}

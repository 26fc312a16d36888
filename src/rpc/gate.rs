//! What holds answers back until a step is done: until a disk has what they reveal.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use super::lock;

/// Steps that are done one after the other, and who waits for which of them.
#[derive(Default)]
pub struct Gate {
    done: AtomicU64, // steps; it grows under the lock
    steps: Mutex<Steps>,
}

#[derive(Default)]
struct Steps {
    given: u64,                           // numbers, to those who wait
    waiting: BTreeMap<(u64, u64), Waker>, // by the step, and the number of who waits for it
}

impl Gate {
    /// Ready when this step is done, which must have begun; `None` if it is.
    pub fn reached(self: &Arc<Self>, step: u64) -> Option<Reached> {
        if self.has_done(step) {
            return None;
        }
        let mut steps = lock(&self.steps);
        steps.given += 1;
        let (gate, number) = (self.clone(), steps.given);
        Some(Reached { gate, step, number })
    }

    /// Whether this step is done.
    pub fn has_done(&self, step: u64) -> bool {
        step <= self.done.load(SeqCst)
    }

    /// The next step is done.
    pub fn advance(&self) {
        let mut steps = lock(&self.steps);
        let done = self.done.fetch_add(1, SeqCst) + 1;
        let later = steps.waiting.split_off(&(done + 1, 0));
        let ready = std::mem::replace(&mut steps.waiting, later);
        drop(steps);
        ready.into_values().for_each(Waker::wake);
    }

    /// Wakes all who wait, since what they wait for is late.
    pub fn wake(&self) {
        let steps = lock(&self.steps);
        steps.waiting.values().for_each(Waker::wake_by_ref);
    }
}

/// Ready when a step is done. May wake its task earlier.
pub struct Reached {
    gate: Arc<Gate>,
    step: u64,
    number: u64,
}

impl Reached {
    /// Whether this one is ready only when the other one is.
    pub fn is_behind(&self, other: &Reached) -> bool {
        self.step >= other.step
    }
}

impl Future for Reached {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let mut steps = lock(&self.gate.steps); // first: no step is done between
        if self.gate.has_done(self.step) {
            return Poll::Ready(());
        }
        let waiting = steps.waiting.entry((self.step, self.number));
        waiting
            .and_modify(|waker| waker.clone_from(context.waker()))
            .or_insert_with(|| context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Reached {
    fn drop(&mut self) {
        let waker = lock(&self.gate.steps)
            .waiting
            .remove(&(self.step, self.number));
        drop(waker); // not under the lock
    }
}

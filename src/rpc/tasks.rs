//! Futures of one type, of which those are polled that were woken. `FuturesUnordered` allocates for each one, and
//! polls it once more; here places and memory are used again, and the first poll may be the last.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::AcqRel;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

use futures::task::AtomicWaker;

use super::lock;

/// So much memory for futures is kept for the next ones.
const MAX_SPARES: usize = 256;
/// So many places stay where none is taken: most connections are idle for most of their time.
const MAX_PLACES: usize = 32;

/// Memory for futures, which all sets of a thread share: one is so large that the allocator would look for a place
/// each time.
pub(super) type Spares<F> = Arc<Mutex<Vec<Pin<Box<Option<F>>>>>>;

/// Futures that are awaited, each with what belongs to it.
pub(super) struct Tasks<T, F> {
    places: Vec<Place<T, F>>,
    free: Vec<usize>,
    woken: Arc<Woken>,
    spares: Spares<F>,
}

struct Place<T, F> {
    task: Option<(T, Pin<Box<Option<F>>>)>,
    alarm: Arc<Alarm>,
    waker: Waker, // the same alarm
}

/// The places that were woken, and who polls them.
#[derive(Default)]
struct Woken {
    places: Mutex<VecDeque<usize>>,
    all: AtomicWaker,
}

/// Wakes the task of a place. A waker that an earlier one has left behind may do so too: that is one poll in vain.
struct Alarm {
    at: usize,            // its place
    is_woken: AtomicBool, // or its place is free: then nobody need poll it
    woken: Arc<Woken>,
}

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.is_woken.swap(true, AcqRel) {
            lock(&self.woken.places).push_back(self.at);
            self.woken.all.wake();
        }
    }
}

impl<T, F: Future> Tasks<T, F> {
    pub(super) fn new(spares: Spares<F>) -> Self {
        Tasks {
            places: Vec::new(),
            free: Vec::new(),
            woken: Arc::default(),
            spares,
        }
    }

    /// How many are awaited.
    pub(super) fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    /// Polls a future once. If it is not ready, it stays here.
    pub(super) fn start(&mut self, belongs: T, future: F) -> Option<(T, F::Output)> {
        let mut memory = lock(&self.spares).pop().unwrap_or_else(|| Box::pin(None));
        memory.set(Some(future));
        let at = self.free.pop().unwrap_or_else(|| {
            let at = self.places.len();
            self.places.push(Place::new(at, &self.woken));
            at
        });
        self.places.get_mut(at)?.task = Some((belongs, memory));
        self.poll(at)
    }

    /// The next one that is ready. If none is, the context is woken with the next one.
    pub(super) fn next(&mut self, context: &mut Context<'_>) -> Option<(T, F::Output)> {
        if self.len() == 0 {
            return None;
        }
        for _ in 0..=self.places.len() {
            let at = self.woken.next(context)?;
            if let Some(ready) = self.poll(at) {
                return Some(ready);
            }
        }
        context.waker().wake_by_ref(); // some wake themselves: now it is the turn of the other connections
        None
    }

    fn poll(&mut self, at: usize) -> Option<(T, F::Output)> {
        let place = self.places.get_mut(at)?;
        let (_, memory) = place.task.as_mut()?;
        let future = memory.as_mut().as_pin_mut()?;
        place.alarm.is_woken.swap(false, AcqRel); // before the look: what comes after it wakes again
        let Poll::Ready(output) = future.poll(&mut Context::from_waker(&place.waker)) else {
            return None;
        };
        let (belongs, mut memory) = place.task.take()?;
        memory.set(None);
        let is_woken = place.alarm.is_woken.swap(true, AcqRel);
        let mut spares = lock(&self.spares);
        if spares.len() < MAX_SPARES {
            spares.push(memory);
        }
        drop(spares);
        self.free.push(at);
        if is_woken && self.len() == 0 {
            lock(&self.woken.places).clear(); // by those who wake themselves, and are ready
        }
        if self.len() == 0 && self.places.len() > MAX_PLACES {
            *self = Tasks::new(self.spares.clone());
        }
        Some((belongs, output))
    }
}

impl<T, F> Drop for Tasks<T, F> {
    /// Wakers that are left behind hold the connection no longer.
    fn drop(&mut self) {
        self.woken.all.take();
    }
}

impl<T, F> Place<T, F> {
    fn new(at: usize, woken: &Arc<Woken>) -> Self {
        let alarm = Arc::new(Alarm {
            at,
            is_woken: AtomicBool::new(true),
            woken: woken.clone(),
        });
        Place {
            task: None,
            waker: alarm.clone().into(),
            alarm,
        }
    }
}

impl Woken {
    fn next(&self, context: &mut Context<'_>) -> Option<usize> {
        let next = || lock(&self.places).pop_front();
        next().or_else(|| {
            self.all.register(context.waker()); // before the look: no place is woken unseen between
            next()
        })
    }
}

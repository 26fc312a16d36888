//! Asking a key's replicas. A coordinator that is a replica itself asks its own store first, by
//! a function call. Then it asks as few of the others as are needed, and the next one when one
//! fails or is slow. All of an attempt happens within one window. While the ring changes, the old
//! ring and the new one are asked, each for a majority of its own.

mod attempt;
mod nodes;
mod swap;
mod turns;

use std::future;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use smallvec::SmallVec;
use tokio::time::{Instant, sleep, timeout};

use crate::cluster::{COPIES, Told};
use crate::entry::{Entry, Loaded, Packed, Stamp, check_key, check_value, loaded};
use crate::error::{Error, Kind};
use crate::rpc::codec::{Encoded, NIL, encode_bytes};
use crate::rpc::lock;
use crate::sabotage::{Bug, planted};
use crate::store::{OVERHEAD, Replica};
use Target::{AllRings, OldRing};
use attempt::{Answered, Answers, Attempt, Awaited, Read, Sent, poll_all};
use nodes::{At, View};
use swap::give_way;

pub(crate) use attempt::said;
pub(crate) use nodes::now;
pub use nodes::{Clock, Replicas, Source};
pub use swap::Change;
pub use turns::Swapped;
pub(crate) use turns::{Turns, Waiting};

/// Between two attempts of one operation.
const PAUSE: Duration = Duration::from_millis(50);
/// The least time that an attempt is given: with less, healthy replicas would seem silent.
const MIN_ATTEMPT: Duration = Duration::from_millis(50);

/// A set of so many bytes asks all replicas for their stamps, a smaller one only as often as that:
/// so a replica without memory is noticed, also if it is none of those that are needed.
const ASKS_ALL: usize = 4 << 10;

/// One operation on one key.
pub struct Operation<'a> {
    replicas: &'a Replicas,
    key: &'a [u8],
    encoded_key: Encoded,
    view: Mutex<Arc<View>>, // under which it has loaded
    highest: AtomicU64,     // ballot that it has seen
    deadline: Instant,
}

/// What a majority knows of a key.
pub struct Newest {
    /// The entry with the highest stamp.
    pub entry: Entry,
    /// Whether every replica of the majority had it.
    pub agreed: bool,
}

impl Newest {
    fn agreed(stamp: Stamp, value: Packed) -> Self {
        let (entry, agreed) = (Entry { stamp, value }, true);
        Newest { entry, agreed }
    }

    fn of(answers: Few<Loaded>) -> Result<Self, Error> {
        let stamp = highest(&answers);
        let agreed = answers.iter().all(|answer| answer.stamp == stamp);
        let mut newest = answers.into_iter().filter(|answer| answer.stamp == stamp);
        let value = newest.find_map(|answer| answer.value);
        let left_out = || Error::new(Kind::Unavailable, "a replica left the value out");
        let value = value.ok_or_else(left_out)?;
        let entry = Entry { stamp, value };
        Ok(Newest { entry, agreed })
    }
}

/// Why there is no majority.
enum Failed {
    RingChanged, // what was counted is worth nothing
    For(Error),
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Failed::For(error)
    }
}

/// The rings in which a majority must keep an entry.
#[derive(Clone, Copy, PartialEq)]
enum Target {
    AllRings,
    OldRing, // the entry's stamp was chosen before the new ring was asked
}

/// One phase of an operation: a question to the replicas of its key, in each ring that is asked.
#[derive(Clone, Copy)]
struct Phase<'a> {
    view: &'a View,
    rings: usize,    // so many of the view's are asked, the old one first
    opened: Instant, // the window; before the first question
    is_store: bool,
    asks_all: bool, // at once; else as few as are needed
    is_swap: bool,  // a swap makes its next attempt itself
}

/// A list of up to three, without an allocation.
type Few<T> = SmallVec<[T; COPIES]>;

/// An attempt in each ring that is asked.
type Attempts<'a, T> = SmallVec<[Attempt<'a, T>; 1]>;

impl Replicas {
    /// Begins an operation on a key.
    pub fn of<'a>(&'a self, key: &'a [u8]) -> Result<Operation<'a>, Error> {
        self.of_until(key, Instant::now() + self.timeout)
    }

    /// The same, with another time than usual.
    pub(crate) fn of_until<'a>(
        &'a self,
        key: &'a [u8],
        deadline: Instant,
    ) -> Result<Operation<'a>, Error> {
        check_key(key)?;
        Ok(Operation {
            replicas: self,
            key,
            encoded_key: encode_bytes(key),
            view: Mutex::new(self.view()),
            highest: AtomicU64::new(0),
            deadline,
        })
    }
}

impl Operation<'_> {
    /// The newest entry that a majority has, and whether all of it has it. A value whose time is over
    /// becomes nil before this returns: gone for one is gone for all.
    pub async fn load(&self) -> Result<Newest, Error> {
        loop {
            let newest = Newest::of(self.load_above(None, false).await?)?;
            if !self.is_over(&newest.entry.value) {
                return Ok(newest);
            }
            match Box::pin(self.end(newest.entry.stamp)).await {
                // Others may just have ended it.
                Err(error) if !self.is_late() && !error.kind.is_refusal() => give_way(PAUSE).await,
                ended => return ended,
            }
        }
    }

    /// The highest stamp that a majority has, for a set of this value. Refused with `full:` if one
    /// that was asked has no memory for it.
    pub async fn load_stamp(&self, value: &[u8]) -> Result<Stamp, Error> {
        let asks_all = fastrand::usize(..ASKS_ALL) < self.key.len() + value.len() + OVERHEAD;
        let known = Some(Stamp::of_a_set(value));
        Ok(highest(&self.load_above(known, asks_all).await?))
    }

    /// Has a majority keep the entry, which is new, and tells the other replicas too.
    pub async fn store(&self, entry: Entry<&[u8]>) -> Result<(), Error> {
        check_value(entry.value).map_err(|error| self.error(error.kind, &error.why))?;
        let (mut chosen, mut taken) = (self.loaded_under(), false);
        let (mut view, mut entry) = (chosen.clone(), entry.of_epoch(chosen.state.epoch()));
        loop {
            let target = match target(&view, &chosen) {
                Some(_) if planted(Bug::OldStampForNewRing) => Some(AllRings),
                Some(AllRings) if planted(Bug::SetWaitsForOldRingAlone) => Some(OldRing),
                target => target,
            };
            let Some(target) = target else {
                return Err(self.changed_too_early());
            };
            let is_all = target == AllRings || planted(Bug::SetWaitsForOldRingAlone);
            match self.store_in(&view, target, entry, &mut taken).await {
                Ok(()) if is_all => return Ok(()),
                Ok(()) => return Box::pin(self.take_along(&chosen, entry.stamp)).await,
                Err(Failed::For(error)) => return Err(error),
                Err(Failed::RingChanged) if taken && !planted(Bug::NewStampAfterChange) => {
                    view = self.replicas.view();
                }
                Err(Failed::RingChanged) => {
                    // No replica has taken it, nor will: it may have another stamp.
                    let stamp = match entry.value {
                        NIL => Box::pin(self.load()).await?.entry.stamp, // a delete is never refused for memory
                        value => Box::pin(self.load_stamp(value)).await?,
                    };
                    (chosen, view) = (self.loaded_under(), self.loaded_under());
                    entry = stamp.newer(entry.value).of_epoch(chosen.state.epoch());
                }
            }
        }
    }

    /// Takes what the old ring has to the new one, or what is newer there, while both are asked.
    async fn take_along(&self, chosen: &View, stamp: Stamp) -> Result<(), Error> {
        let newest = self.get().await.map_err(Error::of_a_write)?;
        let nothing = Stamp::nothing(self.loaded_under().state.epoch());
        let is_hidden = newest.entry.stamp.base() == nothing && stamp < nothing;
        if is_hidden && !planted(Bug::HiddenSetAnswered) {
            let why = "the ring has changed, and a swap has not found it there";
            return Err(self.error(Kind::UnknownOutcome, why));
        }
        match target(&self.loaded_under(), chosen) {
            Some(OldRing) => Ok(()),
            _ if planted(Bug::SetAnsweredAfterChange) => Ok(()),
            _ => Err(self.changed_too_early()), // the new ring alone may never have heard of it
        }
    }

    fn changed_too_early(&self) -> Error {
        let why = "the ring has changed before enough replicas had answered";
        self.error(Kind::UnknownOutcome, why)
    }

    /// Has a majority keep an entry that another coordinator wrote. If the ring changes meanwhile, it
    /// reads again. For a read, an unknown outcome is only unavailable.
    pub async fn repair(&self, mut newest: Newest) -> Result<Newest, Error> {
        while !newest.agreed && !planted(Bug::GetWithoutRepair) {
            let view = self.loaded_under();
            let target = match planted(Bug::GetRepairsOldRingAlone) {
                true => OldRing,
                false => AllRings,
            };
            let entry = newest.entry.borrow();
            match Box::pin(self.store_in(&view, target, entry, &mut false)).await {
                Ok(()) => newest.agreed = true,
                // A swap has a higher promise. A load finds what it writes; if it writes no more, one of our own
                // ends it.
                Err(Failed::For(error)) if error.kind == Kind::Busy => {
                    match Box::pin(self.read_by_swap(false)).await {
                        Ok(read) => newest = read,
                        Err(error) if self.is_late() => return Err(error),
                        Err(_) => {
                            give_way(PAUSE).await;
                            newest = Box::pin(self.load()).await?;
                        }
                    }
                }
                Err(Failed::RingChanged) => newest = Box::pin(self.load()).await?,
                Err(Failed::For(error)) => return Err(error.of_read()),
            }
        }
        Ok(newest)
    }

    /// What a get answers.
    pub(crate) async fn get(&self) -> Result<Newest, Error> {
        self.repair(self.load().await?).await
    }

    /// The rings that were asked for what this operation knows.
    fn loaded_under(&self) -> Arc<View> {
        lock(&self.view).clone()
    }

    /// Has a majority keep the entry, in one ring or in each of two. `taken` becomes true if any
    /// replica may have it now.
    async fn store_in(
        &self,
        view: &View,
        target: Target,
        entry: Entry<&[u8]>,
        taken: &mut bool,
    ) -> Result<(), Failed> {
        let phase = Phase {
            view,
            rings: match target {
                OldRing => 1,
                AllRings => view.rings.len(),
            },
            opened: Instant::now(),
            is_store: true,
            asks_all: true,
            is_swap: false,
        };
        self.store_by(&phase, entry, taken).await
    }

    async fn store_by(
        &self,
        phase: &Phase<'_>,
        entry: Entry<&[u8]>,
        taken: &mut bool,
    ) -> Result<(), Failed> {
        let (around, at) = entry.stamp.around();
        let (begin, end) = around.split_at(at);
        let mut ask = |at| match self.own_store_at(phase.view, at) {
            Some(store) => Sent::own(store.keep(self.key, entry), store.settling(self.key)),
            None => self.send(phase.view, at, "store", [begin, entry.value, end]),
        };
        let stored = self.majority(phase, |_| Ok(()), &mut ask, taken).await;
        stored.map(drop)
    }

    /// What a majority has, without the values where `known` is as new. If the ring changes
    /// meanwhile, it is asked anew.
    async fn load_above(&self, known: Option<Stamp>, asks_all: bool) -> Result<Few<Loaded>, Error> {
        let (mut view, mut opened) = (self.loaded_under(), Instant::now());
        loop {
            // Our own replica answers first (see `order`). The others are told its stamp, and leave out
            // a value that we hold, and that our disk has.
            let mut told = known;
            let mut ask = |at| {
                if let Some(store) = self.own_store_at(&view, at) {
                    let own = store.load(self.key, known);
                    let settling = store.settling(self.key);
                    told = match &settling {
                        None => known.max(own.as_ref().ok().map(|own| own.stamp)),
                        Some(_) => known,
                    };
                    return Sent::own(own, settling);
                }
                let told = told.map(|told| told.begin(2)).unwrap_or_default();
                self.send(&view, at, "load", [&told, &[], &[]])
            };
            let phase = Phase {
                view: &view,
                rings: view.rings.len(),
                opened,
                is_store: false,
                asks_all,
                is_swap: false,
            };
            match self.majority(&phase, loaded, &mut ask, &mut false).await {
                Ok(answers) => return Ok(answers),
                Err(Failed::For(error)) => return Err(error),
                Err(Failed::RingChanged) => {
                    (view, opened) = (self.replicas.view(), Instant::now());
                }
            }
            lock(&self.view).clone_from(&view);
        }
    }

    /// The answers of a majority of different replicas of each ring. All of them came within one
    /// window, which opened before the first was asked. An attempt that fails is made again until the
    /// deadline, or until the ring has changed.
    async fn majority<T: Answered>(
        &self,
        phase: &Phase<'_>,
        read: Read<T>,
        ask: &mut impl FnMut(At) -> Sent<T>,
        taken: &mut bool,
    ) -> Result<Few<T>, Failed> {
        if phase.opened >= self.deadline {
            return Err(self.no_time(*taken).into());
        }
        // The whole ring is this node, and its store looks at the ring under its lock: its answer is the majority.
        let mut own = match phase.view.is_alone().then(|| ask((0, 0))) {
            Some(Sent::Answered(Ok(answer))) => return Ok(Few::from_iter([answer])),
            own => own,
        };
        let ask = &mut |at| own.take().unwrap_or_else(|| ask(at));
        let (mut opened, mut kept) = (phase.opened, Vec::new()); // nothing is kept, but with a bug
        loop {
            let mut attempts = self.attempts(phase, opened, &mut kept);
            future::poll_fn(|context| poll_all(&mut attempts, ask, read, context)).await;
            if attempts.iter().all(Attempt::has_majority) {
                return Ok(counted(&mut attempts));
            }
            *taken |= self.give_up(phase.view, &mut attempts);
            let told = Box::pin(self.follow(phase.view, &attempts)).await; // it is long, and rare
            if !self.replicas.view().state.is(&phase.view.state) {
                return Err(Failed::RingChanged);
            }
            let hopeless = !told && attempts.iter().any(Attempt::is_hopeless);
            let is_last = phase.is_swap || attempts.iter().any(Attempt::is_outbid);
            if hopeless || is_last || self.is_late() {
                return Err(self.no_majority(&attempts, hopeless, *taken).into());
            }
            kept = kept_across_windows(attempts);
            if !told {
                Box::pin(sleep(PAUSE.mul_f32(0.5 + fastrand::f32()))).await; // not in step with another set
            }
            opened = Instant::now();
        }
    }

    /// The time was over before it began. If `taken`, a replica has it from before the ring changed.
    fn no_time(&self, taken: bool) -> Error {
        let kind = match taken {
            true => Kind::UnknownOutcome,
            false => Kind::Unavailable,
        };
        self.error(kind, "no time is left to ask its replicas")
    }

    /// Whether there is no time left for another attempt.
    fn is_late(&self) -> bool {
        Instant::now() + PAUSE + MIN_ATTEMPT >= self.deadline
    }

    /// Opens a window in each ring that is asked.
    fn attempts<'v, T: Answered>(
        &self,
        phase: &Phase<'v>,
        opened: Instant,
        kept: &mut [Answers<T>],
    ) -> Attempts<'v, T> {
        let rings = phase.view.rings.iter().enumerate().take(phase.rings);
        let attempts = rings.map(|(number, ring)| {
            let answers = kept.get_mut(number).map(std::mem::take).unwrap_or_default();
            let cluster = &ring.cluster;
            let part = cluster.owner(self.key);
            let mut to_ask = match phase.is_store {
                false => ring.order(part, opened),
                true => cluster.replicas(part).collect(),
            };
            to_ask.retain(|place| answers.iter().all(|(counted, _)| counted != place));
            Attempt {
                ring,
                number,
                opened,
                closes: self.deadline.min(opened + cluster.limits.window),
                is_store: phase.is_store,
                needed: match phase.is_store && planted(Bug::SetWaitsForOne) {
                    true => 1,
                    false => cluster.majority(),
                },
                one_by_one: phase.is_swap && !phase.asks_all,
                due: match phase.asks_all {
                    true => cluster.copies(),
                    false if phase.is_swap => 1,
                    false => cluster.majority(),
                },
                to_ask: to_ask.into_iter(),
                calls: Few::new(),
                answers,
                errors: Vec::new(),
            }
        });
        attempts.collect()
    }

    /// Closes the window of attempts without a majority. Whether a replica may have stored something.
    fn give_up<T: Answered>(&self, view: &View, attempts: &mut [Attempt<'_, T>]) -> bool {
        for attempt in &mut *attempts {
            if attempt.has_no_room(&[Kind::Full, Kind::Busy]) {
                self.take_back(view, attempt);
            }
            attempt.give_up();
        }
        attempts.iter().any(Attempt::may_have_stored)
    }

    /// Tells the nodes how the ring is that know another state, and moves on if they know a later
    /// one. Where no node has answered, any other one may know why. Whether a node has moved on.
    async fn follow<T: Answered>(&self, view: &View, attempts: &[Attempt<'_, T>]) -> bool {
        let own = self.replicas.own_store.as_ref().map(|own| own.name());
        let is_other = |name: &&str| Some(*name) != own;
        let names = attempts.iter().flat_map(Attempt::of_another_state);
        let mut names: Few<&str> = names.filter(is_other).collect();
        let is_told = !names.is_empty();
        let mut all = view.peers.iter().map(|(node, _)| &*node.name);
        if is_told && !self.replicas.rings.known().certain {
            names = all.collect(); // not by the first to say so
        } else if !is_told {
            let any = all.nth(fastrand::usize(..all.len().max(1)));
            names.extend(any.filter(is_other));
        }
        let patience = match is_told {
            true => 2 * view.state.ring.limits.window,
            false => PAUSE,
        };
        let exchange = self.replicas.exchange_with(&names, false);
        let told = timeout(patience, exchange).await.unwrap_or_default();
        if told
            .iter()
            .filter_map(|told| told.as_ref().err())
            .any(|error| error.kind == Kind::WrongRing)
        {
            let _ = timeout(patience, self.replicas.begin_anew()).await;
        }
        let state = |told: &Told| told.state(&view.state.ring).ok();
        let mut states = told.iter().flatten().filter_map(state);
        is_told && states.any(|state| state.is(&view.state))
    }

    /// The coordinator's own node, if that is the one there.
    fn own_store_at(&self, view: &View, at: At) -> Option<Replica<'_>> {
        let (_, ring) = view.node(at).ok().filter(|_| view.is_own(at))?;
        self.replicas.own_store.as_ref()?.on(ring).ok()
    }

    /// Sends one replica a question about the key. `rest` is the parameter that follows the key, in
    /// three pieces; without the first there is none.
    fn send<T>(&self, view: &View, at: At, method: &str, rest: [&[u8]; 3]) -> Sent<T> {
        let (peer, ring) = match view.node(at) {
            Ok(node) => node,
            Err(error) => return Sent::Answered(Err(error)),
        };
        let params = 2 + u8::from(!rest[0].is_empty());
        let pieces = [ring, &self.encoded_key, rest[0], rest[1], rest[2]];
        Sent::Awaited(Awaited::Call(peer.call_in_pieces(method, params, &pieces)))
    }

    /// Takes back what replicas have allowed to a set that another one refuses.
    fn take_back<T: Answered>(&self, view: &View, refused: &Attempt<'_, T>) {
        let nothing = Stamp::of_a_set(NIL);
        let answered = refused.answers.iter().map(|(place, _)| *place);
        for place in answered.chain(refused.calls.iter().map(|(place, _)| *place)) {
            let at = (refused.number, place);
            match self.own_store_at(view, at) {
                Some(store) => drop(store.load(self.key, Some(nothing))),
                None => drop(self.send::<()>(view, at, "load", [&nothing.begin(2), &[], &[]])),
            }
        }
    }

    /// An error of this key.
    fn error(&self, kind: Kind, why: &str) -> Error {
        let key = String::from_utf8_lossy(self.key);
        Error::new(kind, format!("key {key:?}: {why}"))
    }

    /// Why there is no majority: what each replica said, or the refusal that most of them mean.
    fn no_majority<T: Answered>(
        &self,
        attempts: &[Attempt<'_, T>],
        refused: bool,
        taken: bool,
    ) -> Error {
        let lacking = attempts.iter().find(|attempt| !attempt.has_majority());
        let Some(attempt) = lacking else {
            return self.error(Kind::Unavailable, "no ring is known");
        };
        let (cluster, errors) = (&attempt.ring.cluster, &attempt.errors);
        let refusals = errors.iter().filter(|(_, error)| error.kind.is_refusal());
        let refusal = refusals.max_by_key(|(_, error)| error.kind == Kind::Full);
        if let (true, false, Some((place, error))) = (refused, taken, refusal) {
            let name = cluster.name(*place);
            return self.error(error.kind, &format!("{name}: {}", error.why));
        }
        let (said, answered) = (said(cluster, errors), attempt.answers.len());
        let (copies, needed) = (cluster.copies(), cluster.majority());
        let why = format!("{answered} of {copies} replicas answered, {needed} needed ({said})");
        match taken {
            _ if attempts.iter().any(Attempt::is_outbid) => self.error(Kind::Busy, &why),
            true => self.error(Kind::UnknownOutcome, &why),
            false => self.error(Kind::Unavailable, &why),
        }
    }
}

/// Where an entry goes whose stamp was chosen under another view. `None` where the newest ring of that
/// view is not asked any more: the entry could be behind what the rings of now have answered.
fn target(now: &View, chosen: &View) -> Option<Target> {
    let newest = |view: &View| view.state.born(view.rings.len() - 1);
    match now.rings.len() {
        _ if now.state.step == chosen.state.step => Some(AllRings),
        1 if newest(now) == newest(chosen) => Some(AllRings),
        2 if now.state.born(0) == newest(chosen) => Some(OldRing),
        _ => None,
    }
}

/// The answers, where they lie: an attempt is long, and moving it costs more than they do.
fn counted<T>(attempts: &mut [Attempt<'_, T>]) -> Few<T> {
    let all = attempts.iter_mut();
    let answers = all.flat_map(|attempt| attempt.answers.drain(..));
    answers.map(|(_, answer)| answer).collect()
}

/// The answers of one attempt that count in the next one: none.
fn kept_across_windows<T>(attempts: Attempts<'_, T>) -> Vec<Answers<T>> {
    match planted(Bug::AnswersCountedAcrossWindows) {
        true => attempts
            .into_iter()
            .map(|attempt| attempt.answers)
            .collect(),
        false => Vec::new(),
    }
}

fn highest(answers: &[Loaded]) -> Stamp {
    let stamps = answers.iter().map(|answer| answer.stamp);
    stamps.max().unwrap_or_default()
}

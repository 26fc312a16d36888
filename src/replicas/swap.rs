//! A swap: a value is replaced by what a function makes of it, once, by the promises of a majority
//! (Rystsov, "CASPaxos: Replicated State Machines without logs", 2018). It builds on the newest write
//! of the register and takes a ballot below the stamp of the next one: no set or delete can come
//! between, and none of them waits for a swap. What was written before the ring changed is known
//! differently to its nodes: there, all swaps build on the beginning of the epoch.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::attempt::Sent;
use super::nodes::View;
use super::turns::Swapped;
use super::{Failed, Few, Newest, Operation, PAUSE, Phase, target};
use crate::entry::{Entry, Loaded, Packed, Stamp, check_value, next_ballot, size};
use crate::error::{Error, Kind};
use crate::rpc::codec::NIL;
use crate::rpc::lock;
use crate::sabotage::{Bug, planted};
use crate::store::{Prepare, Promise, Replica};

/// What a swap makes of a value (see [`Packed::plain`]) with this stamp: another one, nil to delete it, or
/// `None` to leave it. It may be asked several times, of which one counts.
pub type Change<'f> = dyn FnMut(&Packed, Stamp) -> Option<Packed> + Send + 'f;

/// What a counter takes at most, in bytes: no memory is asked for before it grows so far.
const COUNTER: usize = 16;

/// The end of a swap.
pub(crate) struct Ended {
    /// What was there, before it wrote.
    pub(crate) found: Stamp,
    /// What is there now.
    pub(crate) stamp: Stamp,
    pub(crate) value: Packed,
    /// Which of the changes that were asked for was made, from 1; `None` if the last one left the value.
    pub(crate) change: Option<usize>,
}

/// A swap of one key. What it has sent to be kept may be kept at any later time.
struct Swap<'a> {
    of: &'a Operation<'a>,
    is_read: bool, // of a value that is there: no memory may be lacking for it
    frees: bool,   // most likely: nor for this
    change: &'a mut Change<'a>,
    asked: usize,                      // how often
    first: Option<Arc<View>>,          // the rings to which it was first sent
    sent: Few<(Stamp, Option<usize>)>, // what was sent, and the change that it carries
}

/// Where an attempt leads, once a majority has kept an entry or without that.
enum Next {
    End(Ended),
    Again,
    Unknown, // what was sent before may have been kept, and hidden since
}

/// What a majority's newest entry says of what was sent.
enum Fate {
    Nowhere,             // no replica of this majority has it
    Kept(Option<usize>), // this change, or what was found
    Unknown,
}

impl Ended {
    /// Of what was noted each time when a change was asked for, and whether it left the value: what counts.
    pub(crate) fn noted<T>(&self, notes: Vec<(bool, T)>) -> Option<T> {
        let at = match self.change {
            Some(change) => change.checked_sub(1),
            None => notes.iter().rposition(|(leaves_it, _)| *leaves_it),
        };
        notes.into_iter().nth(at?).map(|(_, note)| note)
    }
}

impl From<Ended> for Swapped {
    fn from(Ended { value, change, .. }: Ended) -> Self {
        match change {
            Some(_) => Swapped::Done(value.plain()),
            None => Swapped::Not(value.plain()),
        }
    }
}

impl Operation<'_> {
    /// Replaces the value, and tries again where other swaps are in the way, if it insists.
    pub(crate) async fn swap(
        &self,
        change: &mut Change<'_>,
        insists: bool,
    ) -> Result<Ended, Error> {
        let mut view = self.replicas.view();
        let own = self.own_value(&view).filter(|value| !self.is_over(value));
        let mut asked = usize::from(own.is_some());
        if own.is_some_and(|value| change(&value, Stamp::default()).is_none()) {
            // What would change nothing takes no promises, if a get says so too.
            let Entry { stamp, value } = Box::pin(self.get()).await?.entry;
            asked += 1;
            view = self.replicas.view();
            if change(&value, stamp).is_none() {
                return Ok(end(stamp, stamp, value, None));
            }
        }
        let mut change = |old: &Packed, stamp| change(old, stamp);
        let mut swap = Swap::new(self, &mut change, asked);
        self.attempt(&mut swap, view, insists).await
    }

    /// What a swap finds that changes nothing. It is written anew: what one replica has and no majority
    /// has accepted is over.
    pub(crate) async fn read_by_swap(&self, insists: bool) -> Result<Newest, Error> {
        let mut change = |_: &Packed, _| None;
        let mut swap = Swap::new(self, &mut change, 0);
        swap.is_read = true;
        let view = self.replicas.view();
        let Ended { found, value, .. } = self.attempt(&mut swap, view, insists).await?;
        Ok(Newest::agreed(found, value))
    }

    /// Whether the time of a value is over, by this coordinator's clock.
    pub(super) fn is_over(&self, value: &Packed) -> bool {
        value.end().is_some_and(|end| end <= self.replicas.now())
    }

    /// Makes nil of a value whose time is over. What has come in between stays.
    pub(super) async fn end(&self, stamp: Stamp) -> Result<Newest, Error> {
        self.highest.fetch_max(stamp.ballot, Relaxed);
        if planted(Bug::ExpiredBlindly) {
            self.store(stamp.newer(NIL)).await?;
        }
        match planted(Bug::ExpiredWithoutSwap) || planted(Bug::ExpiredBlindly) {
            true => Ok(Newest::agreed(stamp, Packed::default())),
            false => self.read_by_swap(false).await,
        }
    }

    async fn attempt(
        &self,
        swap: &mut Swap<'_>,
        mut view: Arc<View>,
        insists: bool,
    ) -> Result<Ended, Error> {
        let mut attempts = 0_u8;
        loop {
            let begun = Instant::now();
            let error = match Box::pin(swap.attempt(&view, begun)).await {
                Ok(Next::End(ended)) => {
                    lock(&self.view).clone_from(&view); // what builds on it belongs to these rings
                    return Ok(ended);
                }
                Ok(Next::Unknown) => {
                    let why = "it was sent, and other writes may have hidden it";
                    return Err(self.error(Kind::UnknownOutcome, why));
                }
                Err(Failed::For(error)) if error.kind == Kind::Full && swap.may_free() => {
                    match Box::pin(swap.without_memory()).await? {
                        Some(ended) => return Ok(ended),
                        None if swap.frees => continue,
                        None => error,
                    }
                }
                next => self.hindrance(next),
            };
            match swap.first {
                Some(_) if self.is_late() => return Err(error.of_a_write()),
                None if self.is_late() || error.kind.is_refusal() || !insists => {
                    return Err(error.of_read());
                }
                _ => attempts = attempts.saturating_add(1).min(8),
            }
            give_way(begun.elapsed().mul_f32(attempts.into())).await;
            view = self.replicas.view();
            self.own_value(&view); // others may have gone on meanwhile
        }
    }

    /// Why an attempt has not come to an end.
    fn hindrance(&self, next: Result<Next, Failed>) -> Error {
        let why = match next {
            Err(Failed::For(error)) if error.kind == Kind::Busy => {
                return Error::new(Kind::Unavailable, error.why); // the word is for nodes
            }
            Err(Failed::For(error)) => return error,
            Err(Failed::RingChanged) => "the ring has changed meanwhile",
            Ok(_) => "other swaps of it are in the way",
        };
        self.error(Kind::Unavailable, why)
    }

    /// Refuses a value that is too large, or for which there is no memory.
    async fn check(&self, value: &Packed, old: &Packed) -> Result<(), Error> {
        check_value(value).map_err(|error| self.error(error.kind, &error.why))?;
        if size(value) > size(old).max(COUNTER) {
            Box::pin(self.load_stamp(value)).await?;
        }
        Ok(())
    }

    /// The value that this node itself has. What it has promised is seen.
    fn own_value(&self, view: &View) -> Option<Packed> {
        let own = self.own_stores(view).last()?;
        let (value, promised) = own.value_and_promise(self.key)?;
        self.highest.fetch_max(promised, Relaxed);
        Some(value)
    }

    /// This node's own replicas, of each ring that is asked and has one.
    fn own_stores<'v>(&self, view: &'v View) -> impl Iterator<Item = Replica<'_>> + use<'_, 'v> {
        let rings = view.rings.iter().enumerate();
        rings.filter_map(move |(number, ring)| {
            let mut places = ring.cluster.replicas(ring.cluster.owner(self.key));
            places.find_map(|place| self.own_store_at(view, (number, place)))
        })
    }
}

impl<'a> Swap<'a> {
    fn new(of: &'a Operation<'a>, change: &'a mut Change<'a>, asked: usize) -> Self {
        Swap {
            of,
            is_read: false,
            frees: false,
            change,
            asked,
            first: None,
            sent: Few::new(),
        }
    }

    /// One attempt, in one window and with one ballot.
    async fn attempt(&mut self, view: &Arc<View>, opened: Instant) -> Result<Next, Failed> {
        let ballot = next_ballot(self.of.highest.load(Relaxed), self.of.replicas.id);
        self.of.highest.fetch_max(ballot, Relaxed);
        let promises = Phase {
            view,
            rings: view.rings.len(),
            opened,
            is_store: false,
            asks_all: false,
            is_swap: true,
        };
        let Some(newest) = self.promised(&promises, ballot).await? else {
            return Ok(Next::Again);
        };
        if planted(Bug::SwapDeletesNothing) && newest.entry.stamp < nothing(view) {
            Box::pin(self.of.store(nothing(view).newer(NIL))).await?;
            return Ok(Next::Again);
        }
        let (entry, next) = self.decide(view, newest, ballot, opened).await?;
        if let Some(entry) = entry {
            let accepts = Phase {
                is_store: true,
                asks_all: true,
                ..promises
            };
            let mut taken = false;
            let stored = self.of.store_by(&accepts, entry.borrow(), &mut taken);
            if let Err(failed) = stored.await {
                if !taken || planted(Bug::SilentTakenForRefused) {
                    self.was_refused();
                }
                return Err(failed);
            }
        }
        Ok(next)
    }

    fn may_free(&self) -> bool {
        !self.frees && self.first.is_none()
    }

    /// Looks what it does where there is no memory for a promise: a delete is never refused for that, nor what
    /// changes nothing, which ends here.
    async fn without_memory(&mut self) -> Result<Option<Ended>, Error> {
        let Entry { stamp, value } = self.of.get().await?.entry;
        self.asked += 1;
        match (self.change)(&value, stamp) {
            None => Ok(Some(end(stamp, stamp, value, None))),
            Some(new) => {
                self.frees = new.is_nil();
                Ok(None)
            }
        }
    }

    /// What was sent last has been refused by all who were asked, for example since the ring has changed:
    /// nobody will ever keep it.
    fn was_refused(&mut self) {
        self.sent.pop();
        if self.sent.iter().all(|(_, change)| change.is_none()) {
            self.first = None;
        }
    }

    /// What a majority has that promises to accept nothing below this ballot; `None` if one of it has
    /// promised as much before.
    async fn promised(&mut self, phase: &Phase<'_>, ballot: u64) -> Result<Option<Newest>, Failed> {
        let mut prepare = Prepare::of(ballot);
        let has_begun = self.first.is_some(); // it must come to an end
        prepare.is_read = self.is_read || self.frees || has_begun;
        let mut ask = |at| match self.of.own_store_at(phase.view, at) {
            Some(store) => {
                let own = store.promise(self.of.key, prepare);
                let settling = store.settling(self.of.key);
                if let (Ok(Promise::Given(own)), None, None) = (&own, prepare.known, &settling) {
                    // The others leave out what we hold; a counter is no longer than its stamp.
                    prepare.known = Some(own.stamp).filter(|_| own.value.len() > COUNTER);
                }
                Sent::own(own, settling)
            }
            None => (self.of).send(phase.view, at, "promise", [&prepare.encoded(), &[], &[]]),
        };
        let taken = &mut false;
        let promises = self
            .of
            .majority(phase, Promise::read, &mut ask, taken)
            .await?;
        let mut given = Few::<Loaded>::new();
        for promise in promises {
            let (stamp, value) = match promise {
                Promise::Given(Entry { stamp, value }) => (stamp, Some(value)),
                Promise::Same => (prepare.known.unwrap_or_default(), None),
                Promise::Refused(higher) => {
                    self.of.highest.fetch_max(higher, Relaxed);
                    let own = self.of.own_stores(phase.view);
                    own.for_each(|store| store.let_go(self.of.key, ballot));
                    return Ok(None);
                }
            };
            given.push(Entry { stamp, value });
        }
        Ok(Some(Newest::of(given)?))
    }

    /// What a majority must keep now that has this entry, and what that leads to.
    async fn decide(
        &mut self,
        view: &Arc<View>,
        Newest { entry, agreed }: Newest,
        ballot: u64,
        opened: Instant,
    ) -> Result<(Option<Entry>, Next), Failed> {
        let (found, nothing) = (entry.stamp, nothing(view));
        let (value, change) = match self.fate(view, found) {
            Fate::Unknown => return Ok((None, Next::Unknown)),
            Fate::Kept(change) => (entry.value, change),
            Fate::Nowhere => {
                self.asked += 1;
                let is_over = self.of.is_over(&entry.value);
                let old = match is_over {
                    true => Packed::default(),
                    false => entry.value,
                };
                match (self.change)(&old, found) {
                    Some(value) => {
                        self.of.check(&value, &old).await?;
                        (value, Some(self.asked))
                    }
                    None if agreed && !is_over && self.may_leave_it() => {
                        return Ok((None, Next::End(end(found, found, old, None))));
                    }
                    None => (old, None),
                }
            }
        };
        self.check_time(view, opened)?;
        let stamp = found.max(nothing).swapped(ballot);
        if change.is_some() {
            self.first.get_or_insert_with(|| view.clone());
        }
        self.sent.push((stamp, change));
        let end = Next::End(end(found, stamp, value.clone(), change));
        Ok((Some(Entry { stamp, value }), end))
    }

    /// What is sent too late for an answer may be kept all the same: better not to send it.
    fn check_time(&self, view: &View, opened: Instant) -> Result<(), Failed> {
        let closes = self.of.deadline.min(opened + view.state.ring.limits.window);
        let now = Instant::now();
        if closes.saturating_duration_since(now) >= 2 * (now - opened) {
            return Ok(());
        }
        let why = "its replicas answer too slowly for a swap";
        Err(self.of.error(Kind::Unavailable, why).into())
    }

    /// Whether nothing need be written where nothing changes. What was sent before must not be found and
    /// made any more, nor what a read has found at one replica alone.
    fn may_leave_it(&self) -> bool {
        let is_sent = self.first.is_some() && !planted(Bug::NoWithoutAccept);
        !is_sent && !self.is_read
    }

    /// What has become of what was sent, when this is the newest entry of a majority that accepts none of
    /// it any more.
    fn fate(&self, view: &View, found: Stamp) -> Fate {
        let Some(first) = &self.first else {
            return Fate::Nowhere;
        };
        if planted(Bug::SwapAlwaysStartsOver) {
            return Fate::Nowhere;
        }
        if target(view, first).is_none() {
            return Fate::Unknown;
        }
        let forgotten = match planted(Bug::LastOwnBallotAlone) {
            true => self.sent.len() - 1,
            false => 0,
        };
        let sent = self.sent.iter().skip(forgotten);
        let kept = sent.clone().find(|(stamp, _)| *stamp == found);
        // It builds on what is found, as a swap of the epoch does in which it was sent.
        let is_above = |stamp: &Stamp| {
            let found = found.max(Stamp::nothing(stamp.epoch()));
            stamp.base() == found.base() && found.ballot < stamp.ballot
        };
        let mut changes = sent.filter(|(_, change)| change.is_some());
        match kept.map(|(_, change)| *change) {
            Some(Some(change)) => Fate::Kept(Some(change)),
            _ if changes.all(|(stamp, _)| is_above(stamp)) => Fate::Nowhere,
            Some(None) => Fate::Kept(None),
            None => Fate::Unknown,
        }
    }
}

/// Waits for a part of this time, as others do: not in step with another swap, which takes as long.
pub(super) async fn give_way(most: Duration) {
    sleep(most.clamp(PAUSE / 50, 8 * PAUSE).mul_f32(fastrand::f32())).await;
}

fn end(found: Stamp, stamp: Stamp, value: Packed, change: Option<usize>) -> Ended {
    Ended {
        found,
        stamp,
        value,
        change,
    }
}

/// What a swap builds on where nothing was written in this epoch.
fn nothing(view: &View) -> Stamp {
    match planted(Bug::SwapBuildsOnOldEpoch) {
        true => Stamp::default(),
        false => Stamp::nothing(view.state.epoch()),
    }
}

//! One attempt to hear from a majority of a key's replicas in one ring, within one window.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::time::Instant;

use super::Few;
use super::nodes::{At, Ring};
use crate::cluster::{COPIES, Cluster};
use crate::entry::Loaded;
use crate::error::{Error, Kind};
use crate::rpc::{Call, HEDGE, Reached};
use crate::store::Promise;

/// What became of a question to one replica.
pub(super) enum Sent<T> {
    Answered(Result<T, Error>),
    Awaited(Awaited<T>),
}

/// An answer on its way.
pub(super) enum Awaited<T> {
    Call(Call),
    /// From the coordinator's own replica, once its disk has what the answer reveals.
    Own(Box<(Option<T>, Reached)>), // which is rare, and large
}

impl<T: Answered> Sent<T> {
    /// What the coordinator's own replica answers.
    pub(super) fn own(answer: Result<T, Error>, settling: Option<Reached>) -> Self {
        match (answer, settling) {
            (Ok(answer), Some(settling)) => {
                Sent::Awaited(Awaited::Own(Box::new((Some(answer), settling))))
            }
            (answer, _) => Sent::Answered(answer),
        }
    }
}

impl<T> Awaited<T> {
    fn poll(
        &mut self,
        read: Read<T>,
        context: &mut Context<'_>,
    ) -> Poll<(Instant, Result<T, Error>)> {
        match self {
            Awaited::Call(call) => {
                let call = Pin::new(call).poll(context);
                call.map(|(arrived, answer)| (arrived, answer.and_then(|bytes| read(&bytes))))
            }
            Awaited::Own(own) => {
                let (own, settling) = &mut **own;
                let settled = Pin::new(settling).poll(context);
                settled.map(|()| (Instant::now(), own.take().ok_or_else(late)))
            }
        }
    }
}

pub(super) type Read<T> = fn(&[u8]) -> Result<T, Error>;

/// The places of replicas that did not answer, and why.
type Errors = Vec<(usize, Error)>;

/// Answers, each with the place of its replica.
pub(super) type Answers<T> = Few<(usize, T)>;

/// An answer that is counted.
pub(super) trait Answered: Send + Sync + 'static {
    /// Whether it is enough to know that the others are not needed.
    fn ends_all(&self) -> bool {
        false
    }
}

impl Answered for () {}
impl Answered for Loaded {}
impl Answered for Promise {
    fn ends_all(&self) -> bool {
        matches!(self, Promise::Refused(_))
    }
}

/// The questions that are asked in one window, and their answers.
pub(super) struct Attempt<'a, T> {
    pub(super) ring: &'a Ring,
    pub(super) number: usize, // of the ring among those that are asked
    pub(super) opened: Instant,
    pub(super) closes: Instant,
    pub(super) is_store: bool,
    pub(super) one_by_one: bool, // each is asked when the one before has answered, or is late
    pub(super) needed: usize,
    pub(super) due: usize, // how many replicas are to be asked now
    pub(super) to_ask: smallvec::IntoIter<[usize; COPIES]>, // the replicas that were not asked yet
    pub(super) calls: Few<(usize, Awaited<T>)>,
    pub(super) answers: Answers<T>,
    pub(super) errors: Errors,
}

/// Ready when each ring's attempt is.
pub(super) fn poll_all<T: Answered>(
    attempts: &mut [Attempt<'_, T>],
    ask: &mut impl FnMut(At) -> Sent<T>,
    read: Read<T>,
    context: &mut Context<'_>,
) -> Poll<()> {
    let mut all = Poll::Ready(());
    for attempt in attempts {
        if attempt.poll(ask, read, context).is_pending() {
            all = Poll::Pending;
        }
    }
    all
}

impl<T: Answered> Attempt<'_, T> {
    /// Asks, collects what has arrived, and asks one replica more where that is needed. Ready
    /// when the majority is there or cannot come any more. It needs no timer: what is awaited wakes this
    /// task when it is there, and now and then while it is late.
    fn poll(
        &mut self,
        ask: &mut impl FnMut(At) -> Sent<T>,
        read: Read<T>,
        context: &mut Context<'_>,
    ) -> Poll<()> {
        loop {
            let started = self.start(ask);
            self.collect(read, context);
            if self.has_no_room(&[Kind::Full, Kind::Busy]) || self.has_majority() {
                return Poll::Ready(());
            }
            let now = started.unwrap_or_else(Instant::now);
            let left = self.answers.len() + self.calls.len() + self.to_ask.len();
            if left < self.needed && self.is_outbid() || now > self.closes {
                return Poll::Ready(());
            }
            if !self.needs_another(now) {
                return match self.calls.is_empty() {
                    true => Poll::Ready(()),
                    false => Poll::Pending,
                };
            }
            self.due = 1;
        }
    }

    /// Asks as many replicas as are due. Reads the clock after our own store has answered, if it has.
    fn start(&mut self, ask: &mut impl FnMut(At) -> Sent<T>) -> Option<Instant> {
        let mut answered = Few::<(usize, Result<T, Error>)>::new();
        let due = std::mem::take(&mut self.due);
        for place in self.to_ask.by_ref().take(due) {
            match ask((self.number, place)) {
                Sent::Answered(answer) => answered.push((place, answer)),
                Sent::Awaited(call) => self.calls.push((place, call)),
            }
        }
        let now = (!answered.is_empty()).then(Instant::now)?;
        for (place, answer) in answered {
            self.count(place, now, answer);
        }
        Some(now)
    }

    /// Takes the answers that are there.
    fn collect(&mut self, read: Read<T>, context: &mut Context<'_>) {
        let mut calls = std::mem::take(&mut self.calls);
        calls.retain_mut(|(place, awaited)| {
            let Poll::Ready((arrived, answer)) = awaited.poll(read, context) else {
                return true;
            };
            self.count(*place, arrived, answer);
            false
        });
        self.calls = calls;
    }

    /// Counts one answer, if it came within the window.
    fn count(&mut self, place: usize, arrived: Instant, answer: Result<T, Error>) {
        match answer {
            Ok(answer) if arrived <= self.closes => self.answers.push((place, answer)),
            Ok(_) => self.errors.push((place, late())),
            Err(error) => {
                if error.kind == Kind::WrongRing {
                    // The ring may have changed: who is silent is not waited for to the end.
                    let moment = self.closes.saturating_duration_since(arrived) / 4;
                    self.closes = self.closes.min(arrived + moment);
                }
                self.errors.push((place, error));
            }
        }
    }

    /// Whether a majority has answered. A set goes to all replicas or to none.
    pub(super) fn has_majority(&self) -> bool {
        let has_all = self.answers.len() >= self.needed || self.ends_all();
        has_all && !self.has_no_room(&[Kind::Full, Kind::Busy])
    }

    fn ends_all(&self) -> bool {
        let mut answers = self.answers.iter();
        answers.any(|(_, answer)| answer.ends_all())
    }

    /// Whether a replica has no memory for this set, for one of these reasons.
    pub(super) fn has_no_room(&self, reasons: &[Kind]) -> bool {
        let mut errors = self.errors.iter();
        !self.is_store && errors.any(|(_, error)| reasons.contains(&error.kind))
    }

    /// Whether a replica has a higher promise than what it was told to store.
    pub(super) fn is_outbid(&self) -> bool {
        self.is_store && self.count_errors(|kind| kind == Kind::Busy) > 0
    }

    /// Whether asking again cannot help.
    pub(super) fn is_hopeless(&self) -> bool {
        self.has_no_room(&[Kind::Full])
            || self.count_errors(Kind::is_refusal) > self.ring.cluster.copies() - self.needed
    }

    /// Whether a replica may have stored what it was told.
    pub(super) fn may_have_stored(&self) -> bool {
        let may_have = |kind| kind == Kind::UnknownOutcome;
        self.is_store && (!self.answers.is_empty() || self.count_errors(may_have) > 0)
    }

    /// The names of the nodes that know another state.
    pub(super) fn of_another_state(&self) -> impl Iterator<Item = &str> {
        let others = self
            .errors
            .iter()
            .filter(|(_, error)| error.kind == Kind::WrongRing);
        others.map(|(place, _)| self.ring.cluster.name(*place))
    }

    fn count_errors(&self, is: fn(Kind) -> bool) -> usize {
        let kinds = self.errors.iter().map(|(_, error)| error.kind);
        kinds.filter(|kind| is(*kind)).count()
    }

    /// Whether the next replica must be asked: one has failed, or an answer is late. Our own disk is not
    /// waited for.
    fn needs_another(&self, now: Instant) -> bool {
        let too_few = self.answers.len() + self.calls.len() < self.needed;
        let is_own = |(_, awaited): &(_, Awaited<T>)| matches!(awaited, Awaited::Own(_));
        let too_few = too_few && (!self.one_by_one || self.calls.iter().all(is_own));
        self.to_ask.len() > 0 && (too_few || now - self.opened >= HEDGE)
    }

    /// A call that is still open was not answered in time.
    pub(super) fn give_up(&mut self) {
        let open = self.calls.drain(..).map(|(place, _)| (place, late()));
        self.errors.extend(open);
    }
}

fn late() -> Error {
    Error::new(Kind::UnknownOutcome, "no answer in time")
}

/// What nodes said instead of an answer: `bob: connection refused; carol: joining: …`.
pub(crate) fn said(cluster: &Cluster, errors: &[(usize, Error)]) -> String {
    let said = errors.iter().map(|(place, error)| {
        let name = cluster.name(*place);
        match error.kind {
            Kind::Unavailable | Kind::UnknownOutcome => format!("{name}: {}", error.why),
            _ => format!("{name}: {error}"),
        }
    });
    said.collect::<Vec<_>>().join("; ")
}

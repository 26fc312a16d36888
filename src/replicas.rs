//! Asking a key's replicas. A coordinator that is a replica itself asks its own store first, by
//! a function call. Then it asks as few of the others as are needed, and the next one when one
//! fails or is slow. All of an attempt happens within one window.

use std::future::{self, Future as _};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use smallvec::SmallVec;
use tokio::time::{Instant, sleep};

use crate::cluster::{COPIES, Cluster};
use crate::entry::{Entry, Loaded, Stamp, check_key, check_value, loaded};
use crate::error::{Error, Kind};
use crate::rpc::codec::{Encoded, NIL, encode_bytes, encode_numbers};
use crate::rpc::{Call, Dial, HEDGE, Peer};
use crate::sabotage::{Bug, planted};
use crate::status::Status;
use crate::store::{OVERHEAD, Store};

/// Between two attempts of one operation.
const PAUSE: Duration = Duration::from_millis(50);
/// The least time that an attempt is given: with less, healthy replicas would seem silent.
const MIN_ATTEMPT: Duration = Duration::from_millis(50);

/// A set of so many bytes asks all replicas for their stamps, a smaller one only as often as that:
/// so a replica without memory is noticed, also if it is none of those that are needed.
const ASKS_ALL: usize = 4 << 10;

/// The nodes of a ring, as one coordinator reaches them.
pub struct Replicas {
    /// The ring.
    pub cluster: Arc<Cluster>,
    own_store: Option<Arc<Store>>, // where the coordinator is a node itself
    nodes: Vec<(Peer, Encoded)>,   // how each is asked, and what it wants to hear as `ring`
    timeout: Duration,
}

/// One operation on one key.
pub struct Operation<'a> {
    replicas: &'a Replicas,
    key: &'a [u8],
    encoded_key: Encoded,
    part: usize,
    begun: Instant,
    deadline: Instant,
}

/// What a majority knows of a key.
pub struct Newest {
    /// The entry with the highest stamp.
    pub entry: Entry,
    /// Whether every replica of the majority had it.
    pub agreed: bool,
}

/// What became of a question to one replica.
enum Sent<T> {
    Answered(Result<T, Error>),
    Awaited(Call),
}

type Read<T> = fn(&[u8]) -> Result<T, Error>;

/// The places of replicas that did not answer, and why.
type Errors = Vec<(usize, Error)>;

/// A list of up to three, without an allocation.
type Few<T> = SmallVec<[T; COPIES]>;

/// Answers, each with the place of its replica.
type Answers<T> = Few<(usize, T)>;

/// What is asked, and of how many replicas at once: a load of a majority or of more, a store of all.
#[derive(Clone, Copy, PartialEq)]
enum First {
    Load(usize),
    Store,
}

impl Replicas {
    /// The nodes of `cluster`, asked by a coordinator that is none of them. An operation is
    /// tried again until `timeout`; what one attempt may take is the ring's window.
    pub fn new(cluster: Arc<Cluster>, timeout: Duration, dial: &Dial) -> Self {
        let nodes = cluster.nodes().iter().map(|node| {
            let ring = encode_numbers([cluster.fingerprint(&node.name).into()]);
            (Peer::new(node, cluster.limits.window, dial.clone()), ring)
        });
        Replicas {
            own_store: None,
            nodes: nodes.collect(),
            timeout,
            cluster,
        }
    }

    /// The same, asked by the node that this store belongs to.
    pub fn at_home(store: &Arc<Store>, timeout: Duration, dial: &Dial) -> Self {
        Replicas {
            own_store: Some(store.clone()),
            ..Replicas::new(store.cluster.clone(), timeout, dial)
        }
    }

    /// Asks each node at the address that it has in this file of the same ring.
    pub fn move_to(&self, cluster: &Cluster) {
        for ((peer, _), node) in self.nodes.iter().zip(cluster.nodes()) {
            peer.move_to(&node.address);
        }
    }

    /// The same nodes on connections of their own, where an answer may take as long as bytes arrive,
    /// and the questions of operations do not wait behind it.
    pub(crate) fn apart(&self, patience: Duration) -> Self {
        let nodes = self.nodes.iter();
        let apart = |(peer, ring): &(Peer, Encoded)| (peer.apart(patience), ring.clone());
        Replicas {
            own_store: None,
            nodes: nodes.map(apart).collect(),
            timeout: Duration::MAX,
            cluster: self.cluster.clone(),
        }
    }

    /// Begins an operation on a key.
    pub fn of<'a>(&'a self, key: &'a [u8]) -> Result<Operation<'a>, Error> {
        check_key(key)?;
        let begun = Instant::now();
        Ok(Operation {
            replicas: self,
            key,
            encoded_key: encode_bytes(key),
            part: self.cluster.owner(key),
            begun,
            deadline: begun + self.timeout,
        })
    }

    /// Asks one node, on the ring that this coordinator knows. The parameters are MessagePack.
    pub async fn ask(&self, at: usize, method: &str, params: &[&[u8]]) -> Result<Encoded, Error> {
        let (peer, ring) = self.node(at)?;
        let params = [&[ring.as_slice()], params].concat();
        peer.call(method, &params).within(self.timeout).await
    }

    /// Asks one node how it is.
    pub async fn status(&self, place: usize) -> Result<Status, Error> {
        let (peer, _) = self.node(place)?;
        Status::read(&peer.call("status", &[]).within(self.timeout).await?)
    }

    /// How many bytes of a node's answers came since this was last asked.
    pub fn take_received(&self, place: usize) -> usize {
        self.node(place).map_or(0, |(peer, _)| peer.take_received())
    }

    /// Waits until what was told in the background has arrived, for a moment at most.
    pub async fn settle(&self) {
        let until = Instant::now() + 10 * HEDGE;
        while Instant::now() < until && self.nodes.iter().any(|(peer, _)| peer.is_busy()) {
            sleep(Duration::from_millis(1)).await;
        }
    }

    /// What nodes said instead of an answer: `bob: connection refused; carol: joining: …`.
    pub(crate) fn said(&self, errors: &Errors) -> String {
        let said = errors.iter().map(|(place, error)| {
            let name = self.cluster.name(*place);
            match error.kind {
                Kind::Unavailable | Kind::UnknownOutcome => format!("{name}: {}", error.why),
                _ => format!("{name}: {error}"),
            }
        });
        said.collect::<Vec<_>>().join("; ")
    }

    fn node(&self, place: usize) -> Result<&(Peer, Encoded), Error> {
        let nowhere = || Error::bad_request("the ring has no such place");
        self.nodes.get(place).ok_or_else(nowhere)
    }

    /// The store of this coordinator's own node, if that node is at `place`.
    fn own_store_at(&self, place: usize) -> Option<&Store> {
        let own = self.own_store.as_deref();
        own.filter(|store| store.place == place)
    }

    /// The places of a part's replicas in the order of asking: the coordinator's own node, then
    /// along the ring from there (or from the owner), but as [`Peer::turn`] has it.
    fn order(&self, part: usize, now: Instant) -> Few<usize> {
        let mut places: Few<usize> = self.cluster.replicas(part).collect();
        let is_own = |place: usize| self.own_store_at(place).is_some();
        let own = places.iter().position(|place| is_own(*place));
        places.rotate_left(own.unwrap_or(0));
        let turn = |place: &usize| {
            let peer = self.nodes.get(*place).filter(|_| !is_own(*place));
            peer.map(|(peer, _)| peer.turn(now)) // none, which is ourselves, is the lowest
        };
        if !places.is_sorted_by_key(turn) {
            places.sort_by_cached_key(turn);
        }
        places
    }
}

impl Operation<'_> {
    /// The newest entry that a majority has, and whether all of it has it.
    pub async fn load(&self) -> Result<Newest, Error> {
        let majority = self.replicas.cluster.majority();
        let answers = self.load_above(None, majority).await?;
        let stamp = highest(&answers);
        let agreed = answers.iter().all(|answer| answer.stamp == stamp);
        let mut newest = answers.into_iter().filter(|answer| answer.stamp == stamp);
        let value = newest.find_map(|answer| answer.value);
        let left_out = || Error::new(Kind::Unavailable, "a replica left the value out");
        let value = value.ok_or_else(left_out)?;
        let entry = Entry { stamp, value };
        Ok(Newest { entry, agreed })
    }

    /// The highest stamp that a majority has, for a set of this value. Refused with `full:` if one
    /// that was asked has no memory for it.
    pub async fn load_stamp(&self, value: &[u8]) -> Result<Stamp, Error> {
        let cluster = &self.replicas.cluster;
        let first = match fastrand::usize(..ASKS_ALL) < self.key.len() + value.len() + OVERHEAD {
            true => cluster.copies(),
            false => cluster.majority(),
        };
        let known = Some(Stamp::of_a_set(value));
        Ok(highest(&self.load_above(known, first).await?))
    }

    /// Has a majority keep the entry, and tells the other replicas too.
    pub async fn store(&self, entry: Entry<&[u8]>) -> Result<(), Error> {
        check_value(entry.value).map_err(|error| self.error(error.kind, &error.why))?;
        let head = entry.stamp.begin(3);
        let ask = |place| match self.replicas.own_store_at(place) {
            Some(store) => Sent::Answered(store.keep(self.key, entry)),
            None => self.send(place, "store", 3, [&head, entry.value]),
        };
        self.majority(First::Store, |_| Ok(()), ask).await.map(drop)
    }

    /// The same for an entry that another coordinator wrote. For a read, an unknown outcome is
    /// only unavailable.
    pub async fn repair(&self, entry: &Entry) -> Result<(), Error> {
        if planted(Bug::GetWithoutRepair) {
            return Ok(());
        }
        self.store(entry.borrow()).await.map_err(Error::of_read)
    }

    /// What a majority has, without the values where `known` is as new.
    async fn load_above(&self, known: Option<Stamp>, first: usize) -> Result<Few<Loaded>, Error> {
        // Our own replica answers first (see `order`). The others are told its stamp, and leave out
        // a value that we hold.
        let mut told = known;
        let ask = |place| {
            if let Some(store) = self.replicas.own_store_at(place) {
                let own = store.load(self.key, known);
                told = known.max(own.as_ref().ok().map(|own| own.stamp));
                return Sent::Answered(own);
            }
            match told.map(|told| told.begin(2)) {
                Some(told) => self.send(place, "load", 3, [&told, &[]]),
                None => self.send(place, "load", 2, [&[], &[]]),
            }
        };
        self.majority(First::Load(first), loaded, ask).await
    }

    /// The answers of a majority of different replicas. All of them came within one window, which
    /// opened before the first was asked. An attempt that fails is made again until the deadline.
    async fn majority<T>(
        &self,
        first: First,
        read: Read<T>,
        mut ask: impl FnMut(usize) -> Sent<T>,
    ) -> Result<Few<T>, Error> {
        let mut opened = match first {
            First::Load(_) => self.begun, // an operation begins with a load
            First::Store => Instant::now(),
        };
        if opened >= self.deadline {
            return Err(self.error(Kind::Unavailable, "no time is left to ask its replicas"));
        }
        let mut answers = Few::new();
        let mut heard = false; // whether a replica may have stored what the majority did not
        loop {
            let mut attempt = self.attempt(opened, first, answers);
            future::poll_fn(|context| attempt.poll(&mut ask, read, context)).await;
            if attempt.has_majority() {
                let answers = attempt.answers.into_iter();
                return Ok(answers.map(|(_, answer)| answer).collect());
            }
            if attempt.has_no_room(&[Kind::Full, Kind::Busy]) {
                self.take_back(&attempt);
            }
            attempt.give_up();
            heard |= first == First::Store && attempt.may_have_stored();
            let hopeless = attempt.is_hopeless(self.replicas.cluster.copies());
            if hopeless || Instant::now() + PAUSE + MIN_ATTEMPT >= self.deadline {
                return Err(self.no_majority(&attempt, hopeless, heard));
            }
            answers = attempt.answers;
            sleep(PAUSE.mul_f32(0.5 + fastrand::f32())).await; // not in step with another set
            opened = Instant::now();
        }
    }

    /// Opens a window.
    fn attempt<T>(&self, opened: Instant, first: First, mut answers: Answers<T>) -> Attempt<T> {
        if !planted(Bug::AnswersCountedAcrossWindows) {
            answers.clear(); // each attempt has a window of its own, and counts afresh
        }
        let mut to_ask = match first {
            First::Load(_) => self.replicas.order(self.part, opened),
            First::Store => self.replicas.cluster.replicas(self.part).collect(), // all at once
        };
        to_ask.retain(|place| answers.iter().all(|(counted, _)| counted != place));
        let cluster = &self.replicas.cluster;
        Attempt {
            opened,
            closes: self.deadline.min(opened + cluster.limits.window),
            needed: match first {
                First::Store if planted(Bug::SetWaitsForOne) => 1,
                _ => cluster.majority(),
            },
            due: match first {
                First::Load(first) => first,
                First::Store => COPIES,
            },
            first,
            to_ask: to_ask.into_iter(),
            calls: Few::new(),
            answers,
            errors: Vec::new(),
        }
    }

    /// Sends one replica a question about the key.
    fn send<T>(
        &self,
        place: usize,
        method: &str,
        params: u8,
        rest: [&[u8]; 2], // what follows the ring and the key
    ) -> Sent<T> {
        let (peer, ring) = match self.replicas.node(place) {
            Ok(node) => node,
            Err(error) => return Sent::Answered(Err(error)),
        };
        let pieces = [ring, &self.encoded_key, rest[0], rest[1]];
        Sent::Awaited(peer.call_in_pieces(method, params, &pieces))
    }

    /// Takes back what replicas have allowed to a set that another one refuses.
    fn take_back<T>(&self, refused: &Attempt<T>) {
        let nothing = Stamp::of_a_set(NIL);
        let answered = refused.answers.iter().map(|(place, _)| *place);
        for place in answered.chain(refused.calls.iter().map(|(place, _)| *place)) {
            match self.replicas.own_store_at(place) {
                Some(store) => drop(store.load(self.key, Some(nothing))),
                None => drop(self.send::<()>(place, "load", 3, [&nothing.begin(2), &[]])),
            }
        }
    }

    /// An error of this key.
    fn error(&self, kind: Kind, why: &str) -> Error {
        let key = String::from_utf8_lossy(self.key);
        Error::new(kind, format!("key {key:?}: {why}"))
    }

    /// Why there is no majority: what each replica said, or the refusal that most of them mean.
    fn no_majority<T>(&self, attempt: &Attempt<T>, refused: bool, heard: bool) -> Error {
        let (cluster, errors) = (&self.replicas.cluster, &attempt.errors);
        let refusals = errors.iter().filter(|(_, error)| error.kind.is_refusal());
        let refusal = refusals.max_by_key(|(_, error)| error.kind == Kind::Full);
        if let (true, false, Some((place, error))) = (refused, heard, refusal) {
            let name = cluster.name(*place);
            return self.error(error.kind, &format!("{name}: {}", error.why));
        }
        let (said, answered) = (self.replicas.said(errors), attempt.answers.len());
        let (copies, needed) = (cluster.copies(), cluster.majority());
        let why = format!("{answered} of {copies} replicas answered, {needed} needed ({said})");
        match heard {
            true => self.error(Kind::UnknownOutcome, &why),
            false => self.error(Kind::Unavailable, &why),
        }
    }
}

/// One attempt: the questions that are asked in one window, and their answers.
struct Attempt<T> {
    opened: Instant,
    closes: Instant,
    first: First,
    needed: usize,
    due: usize,                                  // how many replicas are to be asked now
    to_ask: smallvec::IntoIter<[usize; COPIES]>, // the replicas that were not asked yet
    calls: Few<(usize, Call)>,
    answers: Answers<T>,
    errors: Errors,
}

impl<T> Attempt<T> {
    /// Asks, collects what has arrived, and asks one replica more where that is needed. Ready
    /// when the majority is there or cannot come any more. It needs no timer: a `Call` wakes this
    /// task when it is answered, and every 10 ms while it is late.
    fn poll(
        &mut self,
        ask: &mut impl FnMut(usize) -> Sent<T>,
        read: Read<T>,
        context: &mut Context<'_>,
    ) -> Poll<()> {
        loop {
            self.start(ask);
            let now = Instant::now();
            self.collect(read, context);
            if self.has_majority()
                || self.has_no_room(&[Kind::Full, Kind::Busy])
                || now > self.closes
            {
                return Poll::Ready(());
            }
            if !self.needs_another(now) {
                return match self.calls.len() {
                    0 => Poll::Ready(()),
                    _ => Poll::Pending,
                };
            }
            self.due = 1;
        }
    }

    /// Asks as many replicas as are due. The clock is read after our own store has answered.
    fn start(&mut self, ask: &mut impl FnMut(usize) -> Sent<T>) {
        for _ in 0..std::mem::take(&mut self.due) {
            match self.to_ask.next().map(|place| (place, ask(place))) {
                Some((place, Sent::Answered(answer))) => self.count(place, Instant::now(), answer),
                Some((place, Sent::Awaited(call))) => self.calls.push((place, call)),
                None => {}
            }
        }
    }

    /// Takes the answers that are there.
    fn collect(&mut self, read: Read<T>, context: &mut Context<'_>) {
        let mut calls = std::mem::take(&mut self.calls);
        calls.retain_mut(|(place, call)| {
            let Poll::Ready((arrived, answer)) = Pin::new(call).poll(context) else {
                return true;
            };
            self.count(*place, arrived, answer.and_then(|bytes| read(&bytes)));
            false
        });
        self.calls = calls;
    }

    /// Counts one answer, if it came within the window.
    fn count(&mut self, place: usize, arrived: Instant, answer: Result<T, Error>) {
        match answer {
            Ok(answer) if arrived <= self.closes => self.answers.push((place, answer)),
            Ok(_) => self.errors.push((place, late())),
            Err(error) => self.errors.push((place, error)),
        }
    }

    /// Whether a majority has answered. A set goes to all replicas or to none.
    fn has_majority(&self) -> bool {
        self.answers.len() >= self.needed && !self.has_no_room(&[Kind::Full, Kind::Busy])
    }

    /// Whether a replica has no memory for this set, for one of these reasons.
    fn has_no_room(&self, reasons: &[Kind]) -> bool {
        let mut errors = self.errors.iter();
        self.first != First::Store && errors.any(|(_, error)| reasons.contains(&error.kind))
    }

    /// Whether asking again cannot help.
    fn is_hopeless(&self, copies: usize) -> bool {
        self.has_no_room(&[Kind::Full])
            || self.count_errors(Kind::is_refusal) > copies - self.needed
    }

    /// Whether a replica may have done what it was asked.
    fn may_have_stored(&self) -> bool {
        !self.answers.is_empty() || self.count_errors(|kind| kind == Kind::UnknownOutcome) > 0
    }

    fn count_errors(&self, is: fn(Kind) -> bool) -> usize {
        let kinds = self.errors.iter().map(|(_, error)| error.kind);
        kinds.filter(|kind| is(*kind)).count()
    }

    /// Whether the next replica must be asked: one has failed, or an answer is late.
    fn needs_another(&self, now: Instant) -> bool {
        let too_few = self.answers.len() + self.calls.len() < self.needed;
        self.to_ask.len() > 0 && (too_few || now - self.opened >= HEDGE)
    }

    /// A call that is still open was not answered in time.
    fn give_up(&mut self) {
        let open = self.calls.drain(..).map(|(place, _)| (place, late()));
        self.errors.extend(open);
    }
}

fn late() -> Error {
    Error::new(Kind::UnknownOutcome, "no answer in time")
}

fn highest(answers: &[Loaded]) -> Stamp {
    let stamps = answers.iter().map(|answer| answer.stamp);
    stamps.max().unwrap_or_default()
}

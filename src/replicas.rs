//! Asking a key's replicas. A coordinator that is a replica itself asks its own store first, by
//! a function call. Then it asks as few of the others as are needed, and the next one when one
//! fails or is slow. All of an attempt happens within one window. While the ring changes, the old
//! ring and the new one are asked, each for a majority of its own.

use std::future::{self, Future as _};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::join_all;
use smallvec::SmallVec;
use tokio::time::{Instant, sleep, timeout};

use crate::cluster::{COPIES, Cluster, Node, Rings, State, Told};
use crate::entry::{Entry, Loaded, Stamp, check_key, check_value, loaded};
use crate::error::{Error, Kind};
use crate::rpc::codec::{Encoded, NIL, encode_bytes, encode_numbers};
use crate::rpc::{Call, Dial, HEDGE, Peer, lock};
use crate::sabotage::{Bug, planted};
use crate::status::Status;
use crate::store::{OVERHEAD, Replica, Store};

/// Between two attempts of one operation.
const PAUSE: Duration = Duration::from_millis(50);
/// The least time that an attempt is given: with less, healthy replicas would seem silent.
const MIN_ATTEMPT: Duration = Duration::from_millis(50);

/// A set of so many bytes asks all replicas for their stamps, a smaller one only as often as that:
/// so a replica without memory is noticed, also if it is none of those that are needed.
const ASKS_ALL: usize = 4 << 10;

/// The nodes of a ring, as one coordinator reaches them. The ring may change meanwhile.
pub struct Replicas {
    rings: Arc<Rings>,
    own_store: Option<Arc<Store>>, // where the coordinator is a node itself
    asks_itself: bool,             // its own store, by a function call
    dial: Dial,
    patience: Option<Duration>, // of connections apart, where an answer may take as long as bytes come
    timeout: Duration,
    view: Mutex<Arc<View>>,
}

/// The rings of one state, and how their nodes are asked.
struct View {
    version: u64,
    state: Arc<State>,
    peers: Vec<(Node, Peer)>, // of these rings and of the file
    rings: SmallVec<[Ring; 1]>,
}

/// One of the rings that are asked.
struct Ring {
    cluster: Arc<Cluster>,
    nodes: Vec<(Peer, Encoded)>, // how each is asked, and what it wants to hear as `ring`
    own: Option<usize>,          // the place of the coordinator's own node
}

/// One node as a replica on one ring.
#[derive(Clone)]
pub struct Source {
    peer: Peer,
    ring: Encoded,
    timeout: Duration,
}

/// One operation on one key.
pub struct Operation<'a> {
    replicas: &'a Replicas,
    key: &'a [u8],
    encoded_key: Encoded,
    view: Mutex<Arc<View>>, // under which it has loaded
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

/// Why there is no majority.
enum Failed {
    Moved, // the ring has changed: what was counted is worth nothing
    For(Error),
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Failed::For(error)
    }
}

/// Of which rings a majority must have an entry.
#[derive(Clone, Copy, PartialEq)]
enum Where {
    All,
    OldRing, // its stamp was chosen before the new one was asked
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

impl Replicas {
    /// The nodes of `cluster`, asked by a coordinator that is none of them. An operation is
    /// tried again until `timeout`; what one attempt may take is the ring's window.
    pub fn new(cluster: Arc<Cluster>, timeout: Duration, dial: &Dial) -> Self {
        Replicas::with(Rings::new(cluster), None, timeout, dial)
    }

    /// The same, asked by the node that this store belongs to.
    pub fn at_home(store: &Arc<Store>, timeout: Duration, dial: &Dial) -> Self {
        Replicas::with(store.rings.clone(), Some(store.clone()), timeout, dial)
    }

    fn with(
        rings: Arc<Rings>,
        own_store: Option<Arc<Store>>,
        timeout: Duration,
        dial: &Dial,
    ) -> Self {
        let nowhere = View {
            version: u64::MAX,
            state: rings.known().state,
            peers: Vec::new(),
            rings: SmallVec::new(),
        };
        Replicas {
            rings,
            asks_itself: own_store.is_some(),
            own_store,
            dial: dial.clone(),
            patience: None,
            timeout,
            view: Mutex::new(Arc::new(nowhere)),
        }
    }

    /// The same nodes on connections of their own, where an answer may take as long as bytes arrive,
    /// and the questions of operations do not wait behind it.
    pub(crate) fn apart(&self, patience: Duration) -> Self {
        let (rings, own_store) = (self.rings.clone(), self.own_store.clone());
        Replicas {
            asks_itself: false,
            patience: Some(patience),
            ..Replicas::with(rings, own_store, Duration::MAX, &self.dial)
        }
    }

    /// Asks each node at the address that it has in this file.
    pub fn move_to(&self, file: &Arc<Cluster>) {
        self.rings.read_again(file.clone());
    }

    /// The state of the ring, as far as this coordinator knows.
    pub fn state(&self) -> Arc<State> {
        self.view().state.clone()
    }

    /// The ring; while it changes, the old one.
    pub fn cluster(&self) -> Arc<Cluster> {
        self.state().ring.clone()
    }

    /// The rings that are asked now.
    fn view(&self) -> Arc<View> {
        let mut view = lock(&self.view);
        if view.version != self.rings.version() {
            *view = Arc::new(self.renewed(&view));
        }
        view.clone()
    }

    /// The view of what is known now. Who was asked before is asked on the same connection.
    fn renewed(&self, old: &View) -> View {
        let version = self.rings.version(); // first: what changes from here on is seen the next time
        let known = self.rings.known();
        let (state, file) = (known.state, known.file);
        let in_rings = state.rings().flat_map(|ring| ring.nodes());
        let mut peers = Vec::<(Node, Peer)>::new();
        for node in file.nodes().iter().chain(file.leaving()).chain(in_rings) {
            if peers.iter().any(|(known, _)| known.name == node.name) {
                continue;
            }
            let peer = old.peers.iter().find(|(known, _)| known.name == node.name);
            let peer = peer.map_or_else(|| self.peer(node), |(_, peer)| peer.clone());
            peer.move_to(&node.address);
            peers.push((node.clone(), peer));
        }
        let ring = |(number, cluster): (usize, &Arc<Cluster>)| {
            let nodes = cluster.nodes().iter().filter_map(|node| {
                let ring = encode_numbers([state.fingerprint(number, &node.name).into()]);
                let (_, peer) = peers.iter().find(|(known, _)| known.name == node.name)?;
                Some((peer.clone(), ring))
            });
            let own = self.own_store.as_ref().filter(|_| self.asks_itself);
            let own = own.and_then(|store| cluster.place(store.name()));
            Ring {
                cluster: cluster.clone(),
                nodes: nodes.collect(),
                own,
            }
        };
        let rings = state.rings().enumerate().map(ring).collect();
        View {
            version,
            state,
            peers,
            rings,
        }
    }

    fn peer(&self, node: &Node) -> Peer {
        let (dial, window) = (self.dial.clone(), self.rings.known().file.limits.window);
        match self.patience {
            None => Peer::new(node, window, dial),
            Some(patience) => Peer::apart(node, patience, dial),
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
            view: Mutex::new(self.view()),
            begun,
            deadline: begun + self.timeout,
        })
    }

    /// Asks one node of the ring, on the state that this coordinator knows. The parameters are
    /// MessagePack.
    pub async fn ask(&self, at: usize, method: &str, params: &[&[u8]]) -> Result<Encoded, Error> {
        self.source(0, at)?.ask(method, params).await
    }

    /// A node of one of the rings that are asked (0, or 1 for the new one), as it is asked now: once
    /// the ring has changed, it refuses.
    pub fn source(&self, ring: usize, place: usize) -> Result<Source, Error> {
        let (peer, ring) = self.view().node(ring, place)?.clone();
        let timeout = self.timeout;
        Ok(Source {
            peer,
            ring,
            timeout,
        })
    }

    /// Asks one node of the ring how it is.
    pub async fn status(&self, place: usize) -> Result<Status, Error> {
        self.source(0, place)?.status().await
    }

    /// Tells a node how the ring is, and hears how it is for that node: who is behind moves on.
    pub async fn exchange(&self, name: &str) -> Result<Told, Error> {
        let told = self.tell(name).await?;
        self.hear(&told)?;
        Ok(told)
    }

    /// The same with several nodes at once. Who knows only what its file says moves on if those that
    /// are certain are of one ring.
    pub async fn exchange_with(&self, names: &[&str]) -> Vec<Result<Told, Error>> {
        let mut told = join_all(names.iter().map(|name| self.tell(name))).await;
        if !self.rings.known().certain {
            if let Err(error) = self.are_of_one_ring(&told) {
                return names.iter().map(|_| Err(error.clone())).collect();
            }
        }
        let mut latest: Vec<&mut Result<Told, Error>> = told.iter_mut().collect();
        latest.sort_by_key(|told| std::cmp::Reverse(told.as_ref().map_or(0, |told| told.step)));
        for told in latest {
            let heard = told.as_ref().map(|told| self.hear(told));
            if let Ok(Err(error)) = heard {
                *told = Err(error);
            }
        }
        told
    }

    /// The same with all nodes of the file and of the rings.
    pub async fn exchange_all(&self) -> Vec<(Node, Result<Told, Error>)> {
        let view = self.view();
        let names: Vec<&str> = view.peers.iter().map(|(node, _)| &*node.name).collect();
        let nodes = view.peers.iter().map(|(node, _)| node.clone());
        nodes.zip(self.exchange_with(&names).await).collect()
    }

    /// Tells a node how the ring is, and returns how it is for that node.
    async fn tell(&self, name: &str) -> Result<Told, Error> {
        let peer = self.peer_of(name)?;
        let own = match &self.own_store {
            Some(store) => store.told(),
            None => self.rings.told("", 0),
        };
        let told = Told::read(&peer.ask("ring", &[&own.packed()]).await?)?;
        if told.name != name {
            let why = format!("{} answers in the place of {name}", told.name);
            return Err(Error::new(Kind::WrongRing, why));
        }
        Ok(told)
    }

    /// Refuses nodes that serve in two rings, of which neither can have become the other.
    fn are_of_one_ring(&self, told: &[Result<Told, Error>]) -> Result<(), Error> {
        let file = self.rings.known().file;
        let mut states = Vec::new();
        for told in told.iter().flatten().filter(|told| told.certain) {
            states.extend(
                told.state(&file)
                    .ok()
                    .filter(|state| state.has(&told.name))
                    .map(|state| (&told.name, state)),
            );
        }
        states.sort_by_key(|(_, state)| state.step);
        for pair in states.windows(2) {
            if let [(one, before), (other, after)] = pair
                && !before.is(after)
                && !before.is_followed_by(after)
            {
                let (before, after) = (before.told(), after.told());
                let why = format!("of two rings: {one} says that {before}, {other} that {after}");
                return Err(Error::new(Kind::WrongRing, why));
            }
        }
        Ok(())
    }

    /// Asks the node of this name, in whichever ring it is, something without parameters.
    pub async fn ask_node(&self, name: &str, method: &str) -> Result<Encoded, Error> {
        self.peer_of(name)?
            .call(method, &[])
            .within(self.timeout)
            .await
    }

    fn peer_of(&self, name: &str) -> Result<Peer, Error> {
        let view = self.view();
        let peer = view.peers.iter().find(|(node, _)| node.name == name);
        let nowhere = || Error::bad_request(format!("there is no node {name:?}"));
        peer.map(|(_, peer)| peer.clone()).ok_or_else(nowhere)
    }

    /// Moves to a state, as if a node had told it.
    pub fn hear(&self, told: &Told) -> Result<(), Error> {
        match &self.own_store {
            Some(store) => store.hear(told),
            None => self.rings.hear(told, false).map(drop),
        }
    }

    /// How many bytes of a node's answers came since this was last asked.
    pub fn take_received(&self, name: &str) -> usize {
        self.peer_of(name).map_or(0, |peer| peer.take_received())
    }

    /// Waits until what was told in the background has arrived, for a moment at most.
    pub async fn settle(&self) {
        let (until, view) = (Instant::now() + 10 * HEDGE, self.view());
        while Instant::now() < until && view.peers.iter().any(|(_, peer)| peer.is_busy()) {
            sleep(Duration::from_millis(1)).await;
        }
    }
}

impl Source {
    /// Asks; the fingerprint of the ring goes before the parameters.
    pub async fn ask(&self, method: &str, params: &[&[u8]]) -> Result<Encoded, Error> {
        let params = [&[self.ring.as_slice()], params].concat();
        self.peer.call(method, &params).within(self.timeout).await
    }

    /// Asks how it is.
    pub async fn status(&self) -> Result<Status, Error> {
        Status::read(&self.peer.call("status", &[]).within(self.timeout).await?)
    }
}

impl View {
    fn node(&self, ring: usize, place: usize) -> Result<&(Peer, Encoded), Error> {
        let nowhere = || Error::bad_request("the ring has no such place");
        let ring = self.rings.get(ring);
        ring.and_then(|ring| ring.nodes.get(place))
            .ok_or_else(nowhere)
    }

    /// Where an entry goes whose stamp was chosen under the state of `chosen`; `None` where it was
    /// chosen before the only ring that is asked now.
    fn takes(&self, chosen: &View) -> Option<Where> {
        let home = |view: &View| view.state.born(view.rings.len() - 1);
        match self.state.step == chosen.state.step
            || self.rings.len() == 1 && home(self) == home(chosen)
        {
            true => Some(Where::All),
            false => (self.rings.len() == 2 && self.state.born(0) == home(chosen))
                .then_some(Where::OldRing),
        }
    }
}

impl Ring {
    /// The places of a part's replicas in the order of asking: the coordinator's own node, then
    /// along the ring from there (or from the owner), but as [`Peer::turn`] has it.
    fn order(&self, part: usize, now: Instant) -> Few<usize> {
        let mut places: Few<usize> = self.cluster.replicas(part).collect();
        let own = places.iter().position(|place| Some(*place) == self.own);
        places.rotate_left(own.unwrap_or(0));
        let turn = |place: &usize| {
            let peer = self.nodes.get(*place).filter(|_| Some(*place) != self.own);
            peer.map(|(peer, _)| peer.turn(now)) // none, which is ourselves, is the lowest
        };
        if !places.is_sorted_by_key(turn) {
            places.sort_by_cached_key(turn);
        }
        places
    }
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

impl Operation<'_> {
    /// The newest entry that a majority has, and whether all of it has it.
    pub async fn load(&self) -> Result<Newest, Error> {
        let answers = self.load_above(None, Cluster::majority).await?;
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
        let asks_all = fastrand::usize(..ASKS_ALL) < self.key.len() + value.len() + OVERHEAD;
        let first = |cluster: &Cluster| match asks_all {
            true => cluster.copies(),
            false => cluster.majority(),
        };
        let known = Some(Stamp::of_a_set(value));
        Ok(highest(&self.load_above(known, first).await?))
    }

    /// Has a majority keep the entry, which is new, and tells the other replicas too.
    pub async fn store(&self, entry: Entry<&[u8]>) -> Result<(), Error> {
        check_value(entry.value).map_err(|error| self.error(error.kind, &error.why))?;
        let (mut chosen, mut heard) = (self.loaded_under(), false);
        let (mut view, mut entry) = (chosen.clone(), entry.of_epoch(chosen.state.epoch()));
        loop {
            let place = match view.takes(&chosen) {
                Some(_) if planted(Bug::OldStampForNewRing) => Some(Where::All),
                Some(Where::All) if planted(Bug::SetWaitsForOldRingAlone) => Some(Where::OldRing),
                place => place,
            };
            let Some(place) = place else {
                let why = "the ring has changed before enough replicas had answered";
                return Err(self.error(Kind::UnknownOutcome, why));
            };
            match self.store_in(&view, place, entry, &mut heard).await {
                Ok(()) if place == Where::All || planted(Bug::SetWaitsForOldRingAlone) => {
                    return Ok(());
                }
                // The old ring has it. A get takes it to the new one, or what is newer there.
                Ok(()) => return self.get().await.map(drop).map_err(Error::of_a_write),
                Err(Failed::For(error)) => return Err(error),
                Err(Failed::Moved) if heard && !planted(Bug::NewStampAfterChange) => {
                    view = self.replicas.view();
                }
                Err(Failed::Moved) => {
                    // No replica has taken it, nor will: it may have another stamp.
                    let stamp = match entry.value {
                        NIL => self.load().await?.entry.stamp, // a delete is never refused for memory
                        value => self.load_stamp(value).await?,
                    };
                    (chosen, view) = (self.loaded_under(), self.loaded_under());
                    entry = stamp.newer(entry.value).of_epoch(chosen.state.epoch());
                }
            }
        }
    }

    /// Has a majority keep an entry that another coordinator wrote. If the ring changes meanwhile, it
    /// reads again. For a read, an unknown outcome is only unavailable.
    pub async fn repair(&self, mut newest: Newest) -> Result<Newest, Error> {
        while !newest.agreed && !planted(Bug::GetWithoutRepair) {
            let view = self.loaded_under();
            let place = match planted(Bug::GetRepairsOldRingAlone) {
                true => Where::OldRing,
                false => Where::All,
            };
            match self
                .store_in(&view, place, newest.entry.borrow(), &mut false)
                .await
            {
                Ok(()) => newest.agreed = true,
                Err(Failed::Moved) => newest = self.load().await?,
                Err(Failed::For(error)) => return Err(error.of_read()),
            }
        }
        Ok(newest)
    }

    /// What a get answers.
    async fn get(&self) -> Result<Newest, Error> {
        self.repair(self.load().await?).await
    }

    /// The rings that were asked for what this operation knows.
    fn loaded_under(&self) -> Arc<View> {
        lock(&self.view).clone()
    }

    /// Has a majority keep the entry, in one ring or in each of two. `heard` becomes true if any
    /// replica may have it now.
    async fn store_in(
        &self,
        view: &View,
        place: Where,
        entry: Entry<&[u8]>,
        heard: &mut bool,
    ) -> Result<(), Failed> {
        let stamp = entry.stamp.begin(3);
        let ask = |ring, place| match self.own_store_at(view, ring, place) {
            Some(store) => Sent::Answered(store.keep(self.key, entry)),
            None => self.send(view, (ring, place), "store", 3, [&stamp, entry.value]),
        };
        let rings = match place {
            Where::OldRing => 1,
            Where::All => view.rings.len(),
        };
        let first = |_: &Cluster| COPIES;
        let opened = Instant::now();
        let asked = Asked {
            opened,
            first: &first,
            is_store: true,
            rings,
        };
        self.majority(view, asked, |_| Ok(()), ask, heard)
            .await
            .map(drop)
    }

    /// What a majority has, without the values where `known` is as new. If the ring changes
    /// meanwhile, it is asked anew.
    async fn load_above(
        &self,
        known: Option<Stamp>,
        first: impl Fn(&Cluster) -> usize + Sync,
    ) -> Result<Few<Loaded>, Error> {
        let (mut view, mut opened) = (self.loaded_under(), self.begun);
        loop {
            // Our own replica answers first (see `order`). The others are told its stamp, and leave out
            // a value that we hold.
            let mut told = known;
            let ask = |ring, place| {
                if let Some(store) = self.own_store_at(&view, ring, place) {
                    let own = store.load(self.key, known);
                    told = told.max(own.as_ref().ok().map(|own| own.stamp));
                    return Sent::Answered(own);
                }
                match told.map(|told| told.begin(2)) {
                    Some(told) => self.send(&view, (ring, place), "load", 3, [&told, &[]]),
                    None => self.send(&view, (ring, place), "load", 2, [&[], &[]]),
                }
            };
            let rings = view.rings.len();
            let asked = Asked {
                opened,
                first: &first,
                is_store: false,
                rings,
            };
            match self.majority(&view, asked, loaded, ask, &mut false).await {
                Ok(answers) => {
                    *lock(&self.view) = view;
                    return Ok(answers);
                }
                Err(Failed::For(error)) => return Err(error),
                Err(Failed::Moved) => (view, opened) = (self.replicas.view(), Instant::now()),
            }
        }
    }

    /// The answers of a majority of different replicas of each ring. All of them came within one
    /// window, which opened before the first was asked. An attempt that fails is made again until the
    /// deadline, or until the ring has changed.
    async fn majority<T>(
        &self,
        view: &View,
        mut asked: Asked<'_>,
        read: Read<T>,
        mut ask: impl FnMut(usize, usize) -> Sent<T>,
        heard: &mut bool,
    ) -> Result<Few<T>, Failed> {
        if asked.opened >= self.deadline {
            let why = "no time is left to ask its replicas";
            return Err(self.error(Kind::Unavailable, why).into());
        }
        let mut kept = [Answers::new(), Answers::new()];
        loop {
            let mut attempts = self.attempts(view, asked, kept);
            future::poll_fn(|context| poll_all(&mut attempts, &mut ask, read, context)).await;
            if attempts.iter().all(Attempt::has_majority) {
                let answers = attempts.into_iter().flat_map(|attempt| attempt.answers);
                return Ok(answers.map(|(_, answer)| answer).collect());
            }
            *heard |= self.give_up(view, &mut attempts);
            let told = self.follow(view, &attempts).await;
            if !self.replicas.view().state.is(&view.state) {
                return Err(Failed::Moved);
            }
            let hopeless = !told && attempts.iter().any(Attempt::is_hopeless);
            if hopeless || Instant::now() + PAUSE + MIN_ATTEMPT >= self.deadline {
                return Err(self.no_majority(view, &attempts, hopeless, *heard).into());
            }
            kept = kept_across_windows(attempts);
            if !told {
                sleep(PAUSE.mul_f32(0.5 + fastrand::f32())).await; // not in step with another set
            }
            asked.opened = Instant::now();
        }
    }

    /// Opens a window in each ring that is asked.
    fn attempts<T>(
        &self,
        view: &View,
        asked: Asked<'_>,
        kept: [Answers<T>; 2],
    ) -> SmallVec<[Attempt<T>; 1]> {
        let rings = view.rings.iter().enumerate().take(asked.rings).zip(kept);
        let attempts =
            rings.map(|((number, ring), answers)| self.attempt(number, ring, asked, answers));
        attempts.collect()
    }

    /// Closes the window of attempts without a majority. Whether a replica may have stored something.
    fn give_up<T>(&self, view: &View, attempts: &mut [Attempt<T>]) -> bool {
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
    async fn follow<T>(&self, view: &View, attempts: &[Attempt<T>]) -> bool {
        let mut names: Few<&str> = Few::new();
        for attempt in attempts {
            let others = attempt
                .errors
                .iter()
                .filter(|(_, error)| error.kind == Kind::WrongRing);
            let ring = view.rings.get(attempt.ring);
            names.extend(others.filter_map(|(place, _)| Some(ring?.cluster.name(*place))));
        }
        let own = self.replicas.own_store.as_ref().map(|own| own.name());
        names.retain(|name| Some(*name) != own);
        let is_told = !names.is_empty();
        if is_told && !self.replicas.rings.known().certain {
            names = view.peers.iter().map(|(node, _)| &*node.name).collect(); // not by the first to say so
        } else if !is_told {
            let any = fastrand::usize(..view.peers.len().max(1));
            let any = view.peers.get(any).map(|(node, _)| &*node.name);
            names.extend(any.filter(|name| Some(*name) != own));
        }
        let patience = if is_told {
            2 * view.state.ring.limits.window
        } else {
            PAUSE
        };
        let exchange = self.replicas.exchange_with(&names);
        let told = timeout(patience, exchange).await.unwrap_or_default();
        let same = |told: &Told| {
            told.state(&view.state.ring)
                .is_ok_and(|state| state.is(&view.state))
        };
        is_told && told.iter().flatten().any(same)
    }

    /// Opens a window.
    fn attempt<T>(
        &self,
        number: usize,
        ring: &Ring,
        asked: Asked<'_>,
        answers: Answers<T>,
    ) -> Attempt<T> {
        let (cluster, opened) = (&ring.cluster, asked.opened);
        let part = cluster.owner(self.key);
        let mut to_ask = match asked.is_store {
            false => ring.order(part, opened),
            true => cluster.replicas(part).collect(), // all at once
        };
        to_ask.retain(|place| answers.iter().all(|(counted, _)| counted != place));
        Attempt {
            ring: number,
            opened,
            closes: self.deadline.min(opened + cluster.limits.window),
            needed: match asked.is_store && planted(Bug::SetWaitsForOne) {
                true => 1,
                false => cluster.majority(),
            },
            copies: cluster.copies(),
            due: (asked.first)(cluster),
            is_store: asked.is_store,
            to_ask: to_ask.into_iter(),
            calls: Few::new(),
            answers,
            errors: Vec::new(),
        }
    }

    /// The coordinator's own node, if that is at this place of the ring.
    fn own_store_at(&self, view: &View, ring: usize, place: usize) -> Option<Replica<'_>> {
        let asked = view
            .rings
            .get(ring)
            .filter(|ring| ring.own == Some(place))?;
        let (_, ring) = asked.nodes.get(place)?;
        self.replicas.own_store.as_ref()?.on(ring).ok()
    }

    /// Sends one replica a question about the key.
    fn send<T>(
        &self,
        view: &View,
        (ring, place): (usize, usize),
        method: &str,
        params: u8,
        rest: [&[u8]; 2], // what follows the ring and the key
    ) -> Sent<T> {
        let (peer, ring) = match view.node(ring, place) {
            Ok(node) => node,
            Err(error) => return Sent::Answered(Err(error)),
        };
        let pieces = [ring, &self.encoded_key, rest[0], rest[1]];
        Sent::Awaited(peer.call_in_pieces(method, params, &pieces))
    }

    /// Takes back what replicas have allowed to a set that another one refuses.
    fn take_back<T>(&self, view: &View, refused: &Attempt<T>) {
        let nothing = Stamp::of_a_set(NIL);
        let answered = refused.answers.iter().map(|(place, _)| *place);
        for place in answered.chain(refused.calls.iter().map(|(place, _)| *place)) {
            match self.own_store_at(view, refused.ring, place) {
                Some(store) => drop(store.load(self.key, Some(nothing))),
                None => drop(self.send::<()>(
                    view,
                    (refused.ring, place),
                    "load",
                    3,
                    [&nothing.begin(2), &[]],
                )),
            }
        }
    }

    /// An error of this key.
    fn error(&self, kind: Kind, why: &str) -> Error {
        let key = String::from_utf8_lossy(self.key);
        Error::new(kind, format!("key {key:?}: {why}"))
    }

    /// Why there is no majority: what each replica said, or the refusal that most of them mean.
    fn no_majority<T>(
        &self,
        view: &View,
        attempts: &[Attempt<T>],
        refused: bool,
        heard: bool,
    ) -> Error {
        let lacking = attempts.iter().find(|attempt| !attempt.has_majority());
        let ring = lacking.and_then(|attempt| view.rings.get(attempt.ring));
        let (Some(attempt), Some(Ring { cluster, .. })) = (lacking, ring) else {
            return self.error(Kind::Unavailable, "no ring is known");
        };
        let errors = &attempt.errors;
        let refusals = errors.iter().filter(|(_, error)| error.kind.is_refusal());
        let refusal = refusals.max_by_key(|(_, error)| error.kind == Kind::Full);
        if let (true, false, Some((place, error))) = (refused, heard, refusal) {
            let name = cluster.name(*place);
            return self.error(error.kind, &format!("{name}: {}", error.why));
        }
        let (said, answered) = (said(cluster, errors), attempt.answers.len());
        let (copies, needed) = (cluster.copies(), cluster.majority());
        let why = format!("{answered} of {copies} replicas answered, {needed} needed ({said})");
        match heard {
            true => self.error(Kind::UnknownOutcome, &why),
            false => self.error(Kind::Unavailable, &why),
        }
    }
}

/// What is asked: how many replicas at once, and of how many rings.
#[derive(Clone, Copy)]
struct Asked<'a> {
    opened: Instant, // before the first question
    first: &'a (dyn Fn(&Cluster) -> usize + Sync),
    is_store: bool,
    rings: usize,
}

/// The answers of one attempt that count in the next one: none.
fn kept_across_windows<T>(attempts: SmallVec<[Attempt<T>; 1]>) -> [Answers<T>; 2] {
    let mut kept = [Answers::new(), Answers::new()];
    if planted(Bug::AnswersCountedAcrossWindows) {
        let answers = attempts.into_iter().map(|attempt| attempt.answers);
        kept.iter_mut()
            .zip(answers)
            .for_each(|(kept, answers)| *kept = answers);
    }
    kept
}

/// Ready when each ring's attempt is.
fn poll_all<T>(
    attempts: &mut [Attempt<T>],
    ask: &mut impl FnMut(usize, usize) -> Sent<T>,
    read: Read<T>,
    context: &mut Context<'_>,
) -> Poll<()> {
    let mut all = Poll::Ready(());
    for attempt in attempts {
        let number = attempt.ring;
        if attempt
            .poll(&mut |place| ask(number, place), read, context)
            .is_pending()
        {
            all = Poll::Pending;
        }
    }
    all
}

/// One attempt: the questions that are asked in one window, and their answers.
struct Attempt<T> {
    ring: usize,
    opened: Instant,
    closes: Instant,
    is_store: bool,
    needed: usize,
    copies: usize,
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
        !self.is_store && errors.any(|(_, error)| reasons.contains(&error.kind))
    }

    /// Whether asking again cannot help.
    fn is_hopeless(&self) -> bool {
        self.has_no_room(&[Kind::Full])
            || self.count_errors(Kind::is_refusal) > self.copies - self.needed
    }

    /// Whether a replica may have stored what it was told.
    fn may_have_stored(&self) -> bool {
        let may_have = |kind| kind == Kind::UnknownOutcome;
        self.is_store && (!self.answers.is_empty() || self.count_errors(may_have) > 0)
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

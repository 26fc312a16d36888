//! The nodes of the rings, as one coordinator reaches them: the state of the ring that it knows, and
//! a connection to each node. The ring may change meanwhile.

use std::cmp::Reverse;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::future::join_all;
use futures::stream::{FuturesUnordered, StreamExt as _};
use smallvec::SmallVec;
use tokio::time::{Instant, sleep, timeout};

use super::Few;
use super::turns::Turns;
use crate::cluster::{Cluster, Node, Rings, State, Told};
use crate::entry::Stamp;
use crate::error::{Error, Kind};
use crate::rpc::codec::{Encoded, encode_bytes, encode_numbers};
use crate::rpc::{Dial, HEDGE, Peer, Turn, lock};
use crate::sabotage::{Bug, planted};
use crate::status::Status;
use crate::store::Store;

/// How long silent nodes are waited for when another one has said how the ring is.
const MOMENT: Duration = Duration::from_millis(250);

/// The nodes of a ring, as one coordinator reaches them. The ring may change meanwhile.
pub struct Replicas {
    pub(super) rings: Arc<Rings>,
    pub(super) own_store: Option<Arc<Store>>, // where the coordinator is a node itself
    asks_itself: bool,                        // its own store, by a function call
    dial: Dial,
    patience: Option<Duration>, // of connections apart, where an answer may take as long as bytes come
    pub(crate) timeout: Duration, // of an operation
    pub(super) id: u16,         // the last bits of its ballots
    pub(crate) turns: Arc<Turns>, // of all threads of a node
    clock: OnceLock<Clock>,     // instead of the system's
    view: Mutex<Arc<View>>,
}

/// The rings of one state, and how their nodes are asked. It never changes: another state has another
/// view.
pub(super) struct View {
    version: u64, // of what was known when it was made
    pub(super) state: Arc<State>,
    pub(super) peers: Vec<(Node, Peer)>, // of these rings and of the file
    pub(super) rings: SmallVec<[Ring; 1]>, // the old one first
}

/// One of the rings that are asked.
pub(super) struct Ring {
    pub(super) cluster: Arc<Cluster>,
    nodes: Vec<(Peer, Encoded)>, // how each is asked, and the fingerprint that a call must carry
    own: Option<usize>,          // the place of the coordinator's own node
}

/// A node's ring among those of a view, and its place in it.
pub(super) type At = (usize, usize);

/// One node as a replica on one ring.
#[derive(Clone)]
pub struct Source {
    peer: Peer,
    ring: Encoded,
    timeout: Duration,
}

/// The time of day, in milliseconds since 1970.
pub type Clock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// What time it is by the system's clock.
pub(crate) fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    u64::try_from(since.unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}

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
            id: fastrand::u16(..),
            turns: Arc::default(),
            clock: OnceLock::new(),
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
            clock: self.clock.clone(),
            ..Replicas::with(rings, own_store, Duration::MAX, &self.dial)
        }
    }

    /// The same node in another thread, on connections of its own. Their swaps of one key take turns.
    pub(crate) fn beside(&self) -> Self {
        let (rings, own_store) = (self.rings.clone(), self.own_store.clone());
        Replicas {
            id: self.id, // else a replica would take a swap of one thread for a stranger to those of the others
            turns: self.turns.clone(),
            clock: self.clock.clone(),
            ..Replicas::with(rings, own_store, self.timeout, &self.dial)
        }
    }

    /// What time it is for this coordinator, in milliseconds since 1970.
    pub fn now(&self) -> u64 {
        self.clock.get().map_or_else(now, |clock| clock())
    }

    /// A coordinator that is no node, on the same network and with the same time and clock.
    pub(crate) fn of_a_client(&self, file: Arc<Cluster>) -> Self {
        Replicas {
            clock: self.clock.clone(),
            ..Replicas::new(file, self.timeout, &self.dial)
        }
    }

    /// Goes by another clock than the system's from now on, but for the first time only.
    pub fn go_by(&self, clock: Clock) {
        let _ = self.clock.set(clock);
    }

    /// Asks each node at the address that it has in this file.
    pub fn move_to(&self, file: &Arc<Cluster>) {
        self.rings.read_again(file.clone());
    }

    /// Says to the nodes that it waits to change their ring.
    pub(crate) fn resize(&self) {
        self.rings.resize();
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
    pub(super) fn view(&self) -> Arc<View> {
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
            if named(&node.name, &peers).is_none() {
                let peer = named(&node.name, &old.peers).cloned();
                let peer = peer.unwrap_or_else(|| self.peer(node));
                peer.move_to(&node.address);
                peers.push((node.clone(), peer));
            }
        }
        let own = self.own_store.as_ref().filter(|_| self.asks_itself);
        let ring = |(number, cluster): (usize, &Arc<Cluster>)| {
            let nodes = cluster.nodes().iter().filter_map(|node| {
                let fingerprint = state.fingerprint(number, &node.name).into();
                Some((
                    named(&node.name, &peers)?.clone(),
                    encode_numbers([fingerprint]),
                ))
            });
            Ring {
                cluster: cluster.clone(),
                nodes: nodes.collect(),
                own: own.and_then(|store| cluster.place(store.name())),
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

    /// Asks one node of the ring, on the state that this coordinator knows. The parameters are
    /// MessagePack.
    pub async fn ask(&self, at: usize, method: &str, params: &[&[u8]]) -> Result<Encoded, Error> {
        self.source(0, at)?.ask(method, params).await
    }

    /// A node of one of the rings that are asked (0, or 1 for the new one), as it is asked now: once
    /// the ring has changed, it refuses.
    pub fn source(&self, ring: usize, place: usize) -> Result<Source, Error> {
        let (peer, ring) = self.view().node((ring, place))?.clone();
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
    /// Who asks in the middle of an operation is not patient.
    pub async fn exchange_with(&self, names: &[&str], patient: bool) -> Vec<Result<Told, Error>> {
        let mut told = self.tell_all(names, patient).await;
        if !self.rings.known().certain {
            if let Err(error) = self.are_of_one_ring(&told) {
                return names.iter().map(|_| Err(error.clone())).collect();
            }
        }
        let mut latest: Vec<_> = told.iter_mut().collect();
        latest.sort_by_key(|told| Reverse(told.as_ref().map_or(0, |told| told.step)));
        for told in latest {
            if let Ok(Err(error)) = told.as_ref().map(|told| self.hear(told)) {
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
        nodes.zip(self.exchange_with(&names, true).await).collect()
    }

    /// Tells several nodes. Who is not patient, or knows only its file, waits most of a window, and not for
    /// those that stay silent when one that is certain has answered: they have a moment more, until most have.
    async fn tell_all(&self, names: &[&str], patient: bool) -> Vec<Result<Told, Error>> {
        let late = || Error::new(Kind::UnknownOutcome, "no answer in time");
        let mut told: Vec<_> = names.iter().map(|_| Err(late())).collect();
        let tell = async |(at, name): (usize, &&str)| (at, self.tell(name).await);
        let mut coming: FuturesUnordered<_> = names.iter().enumerate().map(tell).collect();
        let (known, mut certain) = (self.rings.known(), 0);
        let is_waiting = patient && (self.own_store.is_some() || known.certain);
        let mut patience = match is_waiting {
            true => Duration::MAX,
            false => known.file.limits.window.min(self.timeout) * 3 / 4,
        };
        while let Ok(Some((at, answer))) = timeout(patience, coming.next()).await {
            if !is_waiting && answer.as_ref().is_ok_and(|told| told.certain) {
                certain += 1;
                patience = match 2 * certain > names.len() {
                    true => Duration::ZERO,
                    false => MOMENT,
                };
            }
            if let Some(told) = told.get_mut(at) {
                *told = answer;
            }
        }
        told
    }

    /// Tells a node how the ring is, and returns how it is for that node.
    async fn tell(&self, name: &str) -> Result<Told, Error> {
        let own = match &self.own_store {
            Some(store) => {
                let told = store.told();
                if let Some(settling) = store.journal().and_then(|journal| journal.settling(None)) {
                    settling.await;
                }
                told
            }
            None => self.rings.told("", 0),
        };
        self.told_by(name, &[&own.packed()]).await
    }

    /// Tells one node of a state that nobody has yet, this coordinator included; how the ring is for that node.
    pub(crate) async fn propose(&self, name: &str, state: &State) -> Result<Told, Error> {
        self.told_by(name, &[&Told::of(state, true).packed()]).await
    }

    /// How the ring is for a node, which is told this.
    async fn told_by(&self, name: &str, telling: &[&[u8]]) -> Result<Told, Error> {
        let told = Told::read(&self.peer_of(name)?.ask("ring", telling).await?)?;
        if told.name != name {
            let why = format!("{} answers in the place of {name}", told.name);
            return Err(Error::new(Kind::WrongRing, why));
        }
        Ok(told)
    }

    /// Takes a state that does not follow its own, if most nodes of the ring say so: all have lost their memory
    /// since. Else each would know this state or one that leads to it: none serves before it has heard the others.
    pub(super) async fn begin_anew(&self) {
        let (known, view) = (self.rings.known(), self.view());
        if self.own_store.is_some() || !known.certain || planted(Bug::ClientKeepsFormerRing) {
            return;
        }
        let names = view.state.ring.names();
        let told = join_all(names.iter().map(|name| self.told_by(name, &[]))).await;
        let states = told.iter().flatten().filter(|told| told.certain);
        let states: Result<Vec<State>, _> = states.map(|told| told.state(&known.file)).collect();
        let mut states = states.unwrap_or_default();
        let leads_here =
            |state: &State| state.is(&known.state) || state.is_followed_by(&known.state);
        let is_over = 2 * states.len() > names.len() && !states.iter().any(leads_here);
        states.sort_by_key(|state| state.step);
        if let (true, Ok(()), Some(latest)) = (is_over, self.are_of_one_ring(&told), states.pop()) {
            self.rings.begin_anew(latest, &known.state);
        }
    }

    /// Refuses nodes that serve in two rings, of which neither can have become the other.
    fn are_of_one_ring(&self, told: &[Result<Told, Error>]) -> Result<(), Error> {
        let file = self.rings.known().file;
        let certain = told.iter().flatten().filter(|told| told.certain);
        let states = certain.filter_map(|told| Some((&told.name, told.state(&file).ok()?)));
        let mut states: Vec<_> = states.filter(|(name, state)| state.has(name)).collect();
        states.sort_by_key(|(_, state)| state.step);
        for ((one, before), (other, after)) in states.iter().zip(states.iter().skip(1)) {
            if !before.is(after) && !before.is_followed_by(after) {
                let (before, after) = (before.told(), after.told());
                let why = format!("of two rings: {one} says that {before}, {other} that {after}");
                return Err(Error::new(Kind::WrongRing, why));
            }
        }
        Ok(())
    }

    /// Asks the node of this name, in whichever ring it is, something without parameters.
    pub async fn ask_node(&self, name: &str, method: &str) -> Result<Encoded, Error> {
        let peer = self.peer_of(name)?;
        peer.call(method, &[]).within(self.timeout).await
    }

    /// Asks the owner of this key, or the next of its replicas where that one cannot be asked. `None` if
    /// the coordinator's own node comes first, or nobody can be asked.
    pub(crate) async fn ask_owner(
        &self,
        key: &[u8],
        method: &str,
        params: &[&[u8]],
    ) -> Option<Result<Encoded, Error>> {
        let (view, begun) = (self.view(), Instant::now());
        let ring = view.rings.len().checked_sub(1)?;
        let cluster = &view.rings.get(ring)?.cluster;
        let mut places: Few<usize> = cluster.replicas(cluster.owner(key)).collect();
        let late = |(peer, _): &(Peer, _)| peer.turn(begun) == Turn::Late;
        let is_late = |place| view.node((ring, place)).is_ok_and(late);
        places.sort_by_key(|place| is_late(*place));
        for place in places {
            if view.is_own((ring, place)) {
                return None;
            }
            let (peer, fingerprint) = view.node((ring, place)).ok()?;
            // Nobody knows what a node that may be frozen will do with a swap when it wakes.
            let load: [&[u8]; 3] = [fingerprint, &encode_bytes(key), &Stamp::MAX.begin(2)];
            if !peer.is_heard_since(begun.checked_sub(cluster.limits.window))
                && peer.call("load", &load).within(5 * HEDGE).await.is_err()
            {
                continue;
            }
            let answer = peer.call(method, params).within(self.timeout).await;
            let is_gone = |error: &Error| matches!(error.kind, Kind::Unavailable | Kind::Joining);
            if !answer.as_ref().is_err_and(is_gone) || begun.elapsed() > cluster.limits.window {
                return Some(answer);
            }
        }
        None
    }

    fn peer_of(&self, name: &str) -> Result<Peer, Error> {
        let peer = named(name, &self.view().peers).cloned();
        peer.ok_or_else(|| Error::bad_request(format!("there is no node {name:?}")))
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
    pub(super) fn node(&self, (ring, place): At) -> Result<&(Peer, Encoded), Error> {
        let node = self.rings.get(ring).and_then(|ring| ring.nodes.get(place));
        node.ok_or_else(|| Error::bad_request("the ring has no such place"))
    }

    /// Whether the coordinator's own node is there.
    pub(super) fn is_own(&self, (ring, place): At) -> bool {
        let ring = self.rings.get(ring);
        ring.is_some_and(|ring| ring.own == Some(place))
    }

    /// Whether the coordinator's own node is all that is asked.
    pub(super) fn is_alone(&self) -> bool {
        let rings = self.rings.as_slice();
        matches!(rings, [ring] if ring.nodes.len() == 1 && self.is_own((0, 0)))
    }
}

impl Ring {
    /// The places of a part's replicas in the order of asking: the coordinator's own node, then
    /// along the ring from there (or from the owner), but as [`Peer::turn`] has it.
    pub(super) fn order(&self, part: usize, now: Instant) -> Few<usize> {
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

/// The peer of this name.
fn named<'a>(name: &str, peers: &'a [(Node, Peer)]) -> Option<&'a Peer> {
    let peer = peers.iter().find(|(node, _)| node.name == name);
    peer.map(|(_, peer)| peer)
}

//! Asking a key's replicas: oneself first and by a function call, as few as are
//! needed, the next one when one fails or is slow, and all of it within one window.

use std::borrow::Cow;
use std::future::{self, Future as _};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use msgpack_rpc::Value;
use rmpv::ValueRef;
use smallvec::SmallVec;
use tokio::time::{Instant, sleep};

use crate::cluster::{COPIES, Cluster, Node};
use crate::error::{Error, Kind};
use crate::rpc::codec::{Short, encode, encode_bytes};
use crate::rpc::{Call, Dial, HEDGE, Peer};
use crate::sabotage::{Bug, planted};
use crate::store::{Entry, Loaded, Stamp, Status, Store, check_key};

/// Between two attempts of one operation.
const PAUSE: Duration = Duration::from_millis(50);
/// The least time that an attempt is given: with less, healthy replicas would seem silent.
const FAIR: Duration = Duration::from_millis(50);

/// The nodes of a ring, as one coordinator reaches them.
pub struct Replicas {
    cluster: Arc<Cluster>,
    home: Option<Arc<Store>>,
    here: Option<usize>,
    peers: Vec<Peer>,
    rings: Vec<Vec<u8>>, // what each node wants to hear as `ring`, encoded
    timeout: Duration,
}

/// One operation on one key.
pub struct Operation<'a> {
    replicas: &'a Replicas,
    key: &'a [u8],
    part: usize,
    encoded: Short,
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

/// One replica, asked.
enum Asked<T> {
    Answered(Result<T, Error>),
    Calling(Call, fn(Value) -> Result<T, Error>),
}

/// One for each copy, in place.
type Few<T> = SmallVec<[T; COPIES]>;

/// Which replicas are asked at once.
#[derive(Clone, Copy, PartialEq)]
enum First {
    Majority,
    All,
}

impl Replicas {
    /// The nodes of `cluster`, asked by a coordinator that is none of them. An operation is
    /// tried again until `timeout`; what one attempt may take is the ring's window.
    pub fn new(cluster: Arc<Cluster>, timeout: Duration, dial: &Dial) -> Self {
        let nodes = cluster.nodes();
        let peer = |node: &Node| Peer::new(node, cluster.window, dial.clone());
        let ring = |node: &Node| encode(&cluster.fingerprint(&node.name).into());
        Replicas {
            home: None,
            here: None,
            peers: nodes.iter().map(peer).collect(),
            rings: nodes.iter().map(ring).collect(),
            timeout,
            cluster,
        }
    }

    /// The same, asked by the node that this store belongs to.
    pub fn at_home(home: &Arc<Store>, timeout: Duration, dial: &Dial) -> Self {
        let replicas = Replicas::new(home.cluster().clone(), timeout, dial);
        Replicas {
            home: Some(home.clone()),
            here: Some(home.place()),
            ..replicas
        }
    }

    /// The ring.
    pub fn cluster(&self) -> &Arc<Cluster> {
        &self.cluster
    }

    /// Begins an operation on a key.
    pub fn of<'a>(&'a self, key: &'a [u8]) -> Result<Operation<'a>, Error> {
        check_key(key)?;
        let begun = Instant::now();
        Ok(Operation {
            replicas: self,
            key,
            part: self.cluster.owner(key),
            encoded: encode_bytes(key),
            begun,
            deadline: begun + self.timeout,
        })
    }

    /// Asks one node, on the ring that this coordinator knows.
    pub async fn ask(&self, place: usize, method: &str, params: &[Value]) -> Result<Value, Error> {
        let (peer, ring) = self
            .peers
            .get(place)
            .zip(self.rings.get(place))
            .ok_or_else(nowhere)?;
        let encoded: Vec<Vec<u8>> = params.iter().map(encode).collect();
        let params: Vec<&[u8]> = [ring]
            .into_iter()
            .chain(&encoded)
            .map(Vec::as_slice)
            .collect();
        peer.call(method, &params).await.1
    }

    /// Asks one node how it is.
    pub async fn status(&self, place: usize) -> Result<Status, Error> {
        let peer = self.peers.get(place).ok_or_else(nowhere)?;
        Status::try_from(peer.call("status", &[]).await.1?)
    }

    /// Waits until what was told in the background has arrived, for a moment at most.
    pub async fn settle(&self) {
        let until = Instant::now() + 10 * HEDGE;
        while Instant::now() < until && self.peers.iter().any(Peer::is_busy) {
            sleep(Duration::from_millis(1)).await;
        }
    }

    /// The places of a part's replicas in the order of asking: oneself, then along the ring
    /// (from the owner, where one is none of them), and whoever was late a moment ago last.
    fn order(&self, part: usize, now: Instant) -> Few<usize> {
        let mut places: Few<usize> = self.cluster.replicas(part).collect();
        let here = places.iter().position(|place| self.here == Some(*place));
        places.rotate_left(here.unwrap_or(0));
        let is_late = |place: &usize| {
            let peer = self.peers.get(*place).filter(|_| self.here != Some(*place));
            peer.is_some_and(|peer| peer.is_suspect(now))
        };
        let (late, mut order): (Few<_>, Few<_>) = places.into_iter().partition(is_late);
        order.extend(late);
        order
    }
}

impl Operation<'_> {
    /// The newest entry that a majority has, and whether all of it has it.
    pub async fn load(&self) -> Result<Newest, Error> {
        let mut answers = self.load_above(None).await?;
        let stamp = highest(&answers);
        let agreed = answers.iter().all(|(_, answer)| answer.stamp == stamp);
        let mut newest = answers
            .iter_mut()
            .filter(|(_, answer)| answer.stamp == stamp);
        let value = newest.find_map(|(_, answer)| answer.value.take());
        let left_out = || Error::new(Kind::Unavailable, "a replica left the value out");
        let value = value.ok_or_else(left_out)?;
        Ok(Newest {
            entry: Entry { stamp, value },
            agreed,
        })
    }

    /// The highest stamp that a majority has.
    pub async fn load_stamp(&self) -> Result<Stamp, Error> {
        Ok(highest(&self.load_above(Some(Stamp::MAX)).await?))
    }

    /// Has a majority keep the entry, and tells the others too; answers nil.
    pub async fn store(&self, entry: Entry<&ValueRef<'_>>) -> Result<Value, Error> {
        let of_key = |e: Error| Error::new(e.kind, format!("key {:?}: {}", self.name(), e.why));
        let entry = entry.encode().map_err(of_key)?;
        let ask = |place| match self.home_at(place) {
            Some(store) => Asked::Answered(store.keep(self.key, &entry)),
            None => self.call(place, "store", Some(entry.bytes()), Ok),
        };
        self.majority(First::All, ask).await.map(|_| Value::Nil)
    }

    /// The same for an entry that somebody else wrote.
    pub async fn repair(&self, entry: &Entry) -> Result<Value, Error> {
        if planted(Bug::GetWithoutRepair) {
            return Ok(Value::Nil);
        }
        let (stamp, value) = (entry.stamp, &entry.value.as_ref());
        let entry = Entry { stamp, value };
        self.store(entry).await.map_err(Error::of_read)
    }

    /// What a majority has, without the values where `known` is as new.
    async fn load_above(&self, known: Option<Stamp>) -> Result<Few<(usize, Loaded)>, Error> {
        // What is at home, which is asked first, need not be sent: the others are told its stamp.
        let mut told = known;
        let ask = |place| {
            if let Some(store) = self.home_at(place) {
                let own = store.load(self.key, known);
                told = known.max(own.as_ref().ok().map(|own| own.stamp));
                return Asked::Answered(own);
            }
            let told = told.map(Stamp::encode);
            self.call(place, "load", told.as_deref(), Loaded::try_from)
        };
        self.majority(First::Majority, ask).await
    }

    /// What a majority of different replicas answered, each by its place, all within one window of the moment
    /// before the first was asked. An attempt that fails is made again until the deadline.
    async fn majority<T>(
        &self,
        first: First,
        mut ask: impl FnMut(usize) -> Asked<T>,
    ) -> Result<Few<(usize, T)>, Error> {
        let (copies, mut needed) = (
            self.replicas.cluster.copies(),
            self.replicas.cluster.majority(),
        );
        if first == First::All && planted(Bug::SetWaitsForOne) {
            needed = 1;
        }
        let mut opened = match first {
            First::Majority => self.begun, // an operation begins with a load
            First::All => Instant::now(),
        };
        if opened >= self.deadline {
            let why = format!("key {:?}: no time is left to ask its replicas", self.name());
            return Err(Error::new(Kind::Unavailable, why));
        }
        let mut answers = Few::new();
        let mut heard = false; // whether a replica may have stored what the majority did not
        loop {
            if !planted(Bug::AnswersCountedAcrossWindows) {
                answers.clear(); // each attempt has a window of its own, and counts afresh
            }
            let errors = self
                .attempt(opened, first, needed, &mut ask, &mut answers)
                .await;
            if answers.len() >= needed {
                return Ok(answers);
            }
            let count = |is: fn(Kind) -> bool| errors.iter().filter(|(_, e)| is(e.kind)).count();
            let unknown = count(|kind| kind == Kind::UnknownOutcome);
            heard |= first == First::All && unknown + answers.len() > 0;
            let hopeless = count(Kind::is_refusal) > copies - needed;
            if hopeless || Instant::now() + PAUSE + FAIR >= self.deadline {
                return Err(self.no_majority(answers.len(), &errors, hopeless, heard));
            }
            sleep(PAUSE).await;
            opened = Instant::now();
        }
    }

    /// One window: asks until so many have answered, adds the answers and returns the errors.
    async fn attempt<T>(
        &self,
        opened: Instant,
        first: First,
        needed: usize,
        mut ask: impl FnMut(usize) -> Asked<T>,
        answers: &mut Few<(usize, T)>,
    ) -> Vec<(usize, Error)> {
        let closes = self.deadline.min(opened + self.replicas.cluster.window);
        let late = |place| (place, Error::new(Kind::UnknownOutcome, "no answer in time"));
        let mut order = self.replicas.order(self.part, opened);
        order.retain(|place| answers.iter().all(|(counted, _)| counted != place));
        let mut order = order.into_iter();
        let mut asking = match first {
            First::Majority => needed,
            First::All => order.len(),
        };
        let (mut calls, mut errors) = (Few::new(), Vec::new());
        future::poll_fn(|context| {
            loop {
                let so_far = answers.len();
                for place in order.by_ref().take(asking) {
                    match ask(place) {
                        Asked::Answered(Ok(answer)) => answers.push((place, answer)),
                        Asked::Answered(Err(error)) => errors.push((place, error)),
                        Asked::Calling(call, read) => calls.push((place, call, read)),
                    }
                }
                let now = Instant::now(); // what is at home has answered before
                if now > closes {
                    let too_late = answers.drain(so_far..);
                    errors.extend(too_late.map(|(place, _)| late(place)));
                }
                calls.retain_mut(|(place, call, read)| {
                    let answer = Pin::new(call).poll(context);
                    match answer.map(|(arrived, answer)| (arrived, answer.and_then(*read))) {
                        Poll::Pending => return true,
                        Poll::Ready((arrived, Ok(answer))) if arrived <= closes => {
                            answers.push((*place, answer));
                        }
                        Poll::Ready((_, Ok(_))) => errors.push(late(*place)),
                        Poll::Ready((_, Err(error))) => errors.push((*place, error)),
                    }
                    false
                });
                if answers.len() >= needed || now > closes {
                    break Poll::Ready(());
                }
                let wanting = answers.len() + calls.len() < needed;
                asking = usize::from(wanting || now - opened >= HEDGE);
                if asking == 0 || order.len() == 0 {
                    break match calls.len() {
                        0 => Poll::Ready(()),
                        _ => Poll::Pending,
                    };
                }
            }
        })
        .await;
        errors.extend(calls.into_iter().map(|(place, ..)| late(place)));
        errors
    }

    fn call<T>(
        &self,
        place: usize,
        method: &str,
        last: Option<&[u8]>,
        read: fn(Value) -> Result<T, Error>,
    ) -> Asked<T> {
        let Replicas { peers, rings, .. } = self.replicas;
        let (Some(peer), Some(ring)) = (peers.get(place), rings.get(place)) else {
            return Asked::Answered(Err(nowhere()));
        };
        let call = match last {
            Some(last) => peer.call(method, &[ring, &self.encoded, last]),
            None => peer.call(method, &[ring, &self.encoded]),
        };
        Asked::Calling(call, read)
    }

    /// The key as people read it.
    fn name(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(self.key)
    }

    /// The store of this coordinator's own node, if that is at `place`.
    fn home_at(&self, place: usize) -> Option<&Store> {
        self.replicas
            .home
            .as_deref()
            .filter(|_| self.replicas.here == Some(place))
    }

    /// Why there is no majority: what each replica said, or the refusal that most of them mean.
    fn no_majority(
        &self,
        answered: usize,
        errors: &[(usize, Error)],
        refused: bool,
        heard: bool,
    ) -> Error {
        let cluster = &self.replicas.cluster;
        let key = self.name();
        let refusal = errors.iter().find(|(_, error)| error.kind.is_refusal());
        if let (true, false, Some((place, error))) = (refused, heard, refusal) {
            return Error::new(
                error.kind,
                format!("key {key:?}: {}: {}", cluster.name(*place), error.why),
            );
        }
        let said = errors.iter().map(|(place, error)| match error.kind {
            Kind::Unavailable | Kind::UnknownOutcome => {
                format!("{}: {}", cluster.name(*place), error.why)
            }
            _ => format!("{}: {error}", cluster.name(*place)),
        });
        let said = said.collect::<Vec<_>>().join("; ");
        let (copies, needed) = (cluster.copies(), cluster.majority());
        let why = format!(
            "key {key:?}: {answered} of {copies} replicas answered, {needed} needed ({said})"
        );
        Error::new(
            if heard {
                Kind::UnknownOutcome
            } else {
                Kind::Unavailable
            },
            why,
        )
    }
}

fn highest(answers: &[(usize, Loaded)]) -> Stamp {
    answers
        .iter()
        .map(|(_, answer)| answer.stamp)
        .max()
        .unwrap_or_default()
}

fn nowhere() -> Error {
    Error::bad_request("the ring has no such place")
}

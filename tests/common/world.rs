//! One simulated run: a ring, its clients, and what befalls them, all drawn from a seed.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use futures::stream;
use kv54::client::Client;
use kv54::cluster::Cluster;
use kv54::error::{Error, Kind};
use kv54::join::join;
use kv54::replicas::Replicas;
use kv54::rpc::codec::encode;
use kv54::rpc::{Connection, Dial, Limits, Peer, serve};
use kv54::server::Node;
use kv54::store::Store;
use msgpack_rpc::Value;
use tokio_util::sync::CancellationToken;
use turmoil::net::{TcpListener, TcpStream};
use turmoil::{Builder, Sim};

use crate::history::{Content, End, History, Operation};

/// Short enough for many windows in one run, long against the usual latency.
const WINDOW: Duration = Duration::from_millis(300);
const TICK: Duration = Duration::from_millis(4);
const TIMEOUT: Duration = Duration::from_secs(5);
const TROUBLE: Duration = Duration::from_secs(9);
/// How long anything may take that is to happen at all.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long copies may differ on a quiet network.
const REPAIR: Duration = Duration::from_secs(10);
const LIMITS: Limits = Limits {
    connections: 1024,
    buffers: 64 << 20,
};
const NAMES: [&str; 7] = ["alice", "bob", "carol", "dave", "erin", "frank", "grace"];

/// What a run's clients and nodes share with the one who looks on.
struct World {
    cluster: Arc<Cluster>,
    keys: Vec<String>,
    history: History,
    stores: RefCell<BTreeMap<usize, Arc<Store>>>,
    calm: Cell<bool>,
    blameless: Cell<usize>, // failed because the one node that was asked was the failed one
    next_value: Cell<u64>,
}

/// Runs one seed: a line that tells what happened, or what went wrong.
pub fn run(seed: u64) -> Result<String, String> {
    fastrand::seed(seed);
    let mut rng = Rng::with_seed(seed);
    let size = rng.usize(1..=7);
    // Every third run does not keep to one failure at a time: then refusals are allowed.
    let harsh = rng.u8(..3) == 0 && size >= 3;
    let nodes: String = NAMES[..size]
        .iter()
        .map(|name| format!("{name} = \"{name}:54\"\n"))
        .collect();
    let file = format!(
        "[nodes]\n{nodes}[limits]\nwindow = \"{}ms\"",
        WINDOW.as_millis()
    );
    let cluster = Cluster::parse("cluster.toml".as_ref(), &file).unwrap();
    let world = Rc::new(World {
        cluster: Arc::new(cluster),
        keys: (0..rng.usize(1..=4))
            .map(|n| format!("key{n}-{seed}"))
            .collect(),
        history: History::default(),
        stores: RefCell::default(),
        calm: Cell::new(false),
        blameless: Cell::new(0),
        next_value: Cell::new(0),
    });
    let usual = Duration::from_millis(rng.u64(5..40));
    let mut sim = Builder::new()
        .rng_seed(seed)
        .tick_duration(TICK)
        .min_message_latency(Duration::from_millis(1))
        .max_message_latency(usual)
        .simulation_duration(Duration::from_secs(3600))
        .tcp_capacity(4096)
        .build();
    for (place, name) in NAMES.iter().enumerate().take(size) {
        let world = world.clone();
        sim.host(*name, move || node(world.clone(), place));
    }
    let clients = rng.usize(2..=5);
    for number in 0..clients {
        let world = world.clone();
        let coordinates = rng.bool() || number == 0;
        sim.host(client_name(number), move || {
            client(world.clone(), coordinates)
        });
    }
    let (ill, [crashes, cuts, slow, dead]) = (BTreeMap::new(), [0; 4]);
    let mut trouble = Trouble {
        world: world.clone(),
        sim,
        rng,
        harsh,
        clients,
        usual,
        ill,
        crashes,
        cuts,
        slow,
        dead,
    };
    trouble
        .run()
        .map_err(|why| format!("seed {seed}, ring of {size}: {why}"))?;
    world
        .history
        .check()
        .map_err(|why| format!("seed {seed}, ring of {size}: {why}"))?;
    let tally = world.history.tally();
    let blameless = world.blameless.get();
    let counted = tally.done + tally.refused + tally.unknown - blameless;
    let line = format!(
        "seed {seed}: ring of {size}{}, done {}, refused {}, unknown {}, blameless {blameless}, crashes {}, cuts {}, slow {}, dead {}, fingerprint {}",
        if harsh { " in harsh times" } else { "" },
        tally.done,
        tally.refused,
        tally.unknown,
        trouble.crashes,
        trouble.cuts,
        trouble.slow,
        trouble.dead,
        world.history.fingerprint(),
    );
    let wanted = match (size, harsh) {
        (1, _) => counted - trouble.dead,
        (2, _) | (_, true) => 30.min(counted),
        _ => (counted - trouble.dead) * 99 / 100,
    };
    match tally.done >= wanted && tally.done >= 30 {
        true => Ok(line),
        false => Err(format!("too little succeeded: {line}")),
    }
}

/// The number after a field's name in a line of [`run`].
pub fn field(line: &str, name: &str) -> u64 {
    let start = line.find(&format!("{name} ")).unwrap() + name.len() + 1;
    let digits: String = line[start..]
        .chars()
        .take_while(char::is_ascii_digit)
        .collect();
    digits.parse().unwrap()
}

fn dial() -> Dial {
    Arc::new(|address| {
        let address = address.to_owned();
        Box::pin(async move {
            let stream = TcpStream::connect(address).await?;
            Ok(Box::new(stream) as Box<dyn Connection>)
        })
    })
}

async fn node(world: Rc<World>, place: usize) -> turmoil::Result {
    let listener = TcpListener::bind("0.0.0.0:54").await?;
    let store = Arc::new(Store::new(world.cluster.clone(), place));
    world.stores.borrow_mut().insert(place, store.clone());
    let node = Node {
        client: Client {
            replicas: Replicas::at_home(&store, TIMEOUT, &dial()),
        },
        store,
    };
    let incoming = pin!(stream::unfold(listener, async |listener| {
        let accepted: io::Result<_> = listener.accept().await;
        let accepted = accepted.map(|(stream, _)| Box::new(stream) as Box<dyn Connection>);
        Some((accepted, listener))
    }));
    tokio::select! {
        biased;
        () = serve(incoming, &node, LIMITS, CancellationToken::new()) => {}
        () = join(&node.store, &node.client.replicas) => {}
    }
    Ok(())
}

/// Reads and writes until all is calm, then reads every key a last time.
async fn client(world: Rc<World>, coordinates: bool) -> turmoil::Result {
    let client = Client {
        replicas: Replicas::new(world.cluster.clone(), TIMEOUT, &dial()),
    };
    let peer = |node: &kv54::cluster::Node| Peer::new(&node.address, TIMEOUT, dial());
    let peers: Vec<Peer> = world.cluster.nodes().iter().map(peer).collect();
    while !world.calm.get() {
        let key = &world.keys[fastrand::usize(..world.keys.len())];
        let operation = match fastrand::u8(..20) {
            0..10 => Operation::Get,
            10 => Operation::Set(None),
            _ => {
                world.next_value.set(world.next_value.get() + 1);
                Operation::Set(Some(world.next_value.get()))
            }
        };
        let began = world.history.begin(key, operation);
        let answer = if coordinates {
            ask_majority(&client, key, operation).await
        } else {
            ask_node(&peers[fastrand::usize(..peers.len())], key, operation).await
        };
        let failed = answer.is_err();
        world.history.end(began, end(operation, answer));
        if failed && !coordinates {
            world.blameless.set(world.blameless.get() + 1);
        }
        tokio::time::sleep(Duration::from_millis(fastrand::u64(1..30))).await;
    }
    if coordinates {
        for key in &world.keys {
            let began = world.history.begin(key, Operation::Get);
            let answer = ask_majority(&client, key, Operation::Get).await;
            world.history.end(began, end(Operation::Get, answer));
        }
    }
    Ok(())
}

async fn ask_majority(client: &Client, key: &str, operation: Operation) -> Result<Value, Error> {
    match operation {
        Operation::Get => client.get(key.as_bytes()).await,
        Operation::Set(Some(value)) => client.set(key.as_bytes(), value.into()).await,
        Operation::Set(None) => client.delete(key.as_bytes()).await,
    }
}

async fn ask_node(peer: &Peer, key: &str, operation: Operation) -> Result<Value, Error> {
    let key = encode(&key.into());
    let answer = match operation {
        Operation::Get => peer.call("get", &[&key]),
        Operation::Set(Some(value)) => peer.call("set", &[&key, &encode(&value.into())]),
        Operation::Set(None) => peer.call("delete", &[&key]),
    };
    answer.await.1
}

fn end(operation: Operation, answer: Result<Value, Error>) -> End {
    match (operation, answer) {
        (Operation::Get, Ok(value)) => End::Got(content(&value)),
        (Operation::Set(_), Ok(_)) => End::Done,
        (
            Operation::Set(_),
            Err(Error {
                kind: Kind::UnknownOutcome,
                ..
            }),
        ) => End::Unknown,
        (_, Err(_)) => End::Refused,
    }
}

fn content(value: &Value) -> Content {
    assert!(value.is_nil() || value.is_u64(), "nobody wrote {value}");
    value.as_u64()
}

/// What befalls the ring, and for how long.
struct Trouble<'a> {
    world: Rc<World>,
    sim: Sim<'a>,
    rng: Rng,
    harsh: bool,
    clients: usize,
    usual: Duration, // the longest that a message takes on a healthy link
    ill: BTreeMap<usize, (Ill, Duration)>,
    crashes: usize,
    cuts: usize,
    slow: usize,
    dead: usize,
}

/// What a node suffers from. The first two have lost their memory.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Ill {
    Down,
    Joining,
    Cut,
    Recovering, // its links work again, but connections that lost something are still to break
}

impl Trouble<'_> {
    fn run(&mut self) -> Result<(), String> {
        let nodes = 0..self.world.cluster.nodes().len();
        self.pass(PATIENCE, "getting ready", |trouble| {
            nodes.clone().all(|node| trouble.is_ready(node))
        })?;
        let end = self.sim.elapsed() + TROUBLE;
        let mut next = self.sim.elapsed();
        while self.sim.elapsed() < end {
            self.sim.step().map_err(|error| error.to_string())?;
            self.recover();
            if self.sim.elapsed() >= next {
                self.befall();
                next = self.sim.elapsed() + self.milliseconds(50..700);
            }
        }
        for ill in self.ill.values_mut() {
            ill.1 = Duration::ZERO;
        }
        self.pass(PATIENCE, "recovering", |trouble| {
            trouble.recover();
            trouble.ill.is_empty()
        })?;
        self.world.calm.set(true);
        self.pass(PATIENCE, "answering the last questions", |trouble| {
            (0..trouble.clients).all(|n| !trouble.sim.is_host_running(client_name(n)))
        })?;
        self.pass(REPAIR, "making copies equal", |trouble| {
            trouble.copies_are_equal()
        })
    }

    /// Lets time pass until something holds.
    fn pass(
        &mut self,
        limit: Duration,
        what: &str,
        mut holds: impl FnMut(&mut Self) -> bool,
    ) -> Result<(), String> {
        let end = self.sim.elapsed() + limit;
        while !holds(self) {
            self.sim.step().map_err(|error| error.to_string())?;
            if self.sim.elapsed() > end {
                let stores = self.world.stores.borrow();
                let nodes: Vec<String> = stores
                    .values()
                    .map(|store| format!("{:?}", store.status()))
                    .collect();
                return Err(format!(
                    "after {limit:?} it is still {what}:\n{}",
                    nodes.join("\n")
                ));
            }
        }
        Ok(())
    }

    fn milliseconds(&mut self, range: Range<u64>) -> Duration {
        Duration::from_millis(self.rng.u64(range))
    }

    fn is_ready(&self, node: usize) -> bool {
        let stores = self.world.stores.borrow();
        stores
            .get(&node)
            .is_some_and(|store| store.status().state == "ready")
    }

    /// Whether two nodes hold copies of the same keys.
    fn share(&self, one: usize, other: usize) -> bool {
        let cluster = &self.world.cluster;
        (0..cluster.nodes().len()).any(|part| {
            let holds = |node| cluster.replicas(part).any(|holder| holder == node);
            holds(one) && holds(other)
        })
    }

    /// Whether this may happen to a node: in ordinary times one of a key's replicas is ill at
    /// a time; and never have two of them lost their memory, for then nothing is promised.
    fn may_suffer(&self, node: usize, ill: Ill) -> bool {
        self.world.cluster.nodes().len() > 1
            && !self.ill.contains_key(&node)
            && self.ill.iter().all(|(other, (others, _))| {
                let both_forget = ill == Ill::Down && matches!(others, Ill::Down | Ill::Joining);
                !self.share(node, *other) || self.harsh && !both_forget
            })
    }

    fn befall(&mut self) {
        let node = self.rng.usize(..self.world.cluster.nodes().len());
        let client = client_name(self.rng.usize(..self.clients));
        match self.rng.u8(..12) {
            0..4 => {
                let longest = if self.rng.bool() { 20 } else { 1500 };
                self.crash(node, longest);
            }
            4..8 => self.cut(node, &self.everybody_else(node)),
            8 => self.slow_down(node, &self.everybody_else(node)),
            9 => {
                // It dies in the middle of whatever it does, and another takes its place.
                self.sim.crash(&*client);
                self.sim.bounce(&*client);
                self.dead += 1;
            }
            _ if self.harsh => self.desert(&client, node),
            _ => self.cut(node, &[client]),
        }
    }

    /// A client reaches one replica of a part well, another late or not at all and the third
    /// not at all, and the first one restarts: the way to lose a write that two have confirmed.
    fn desert(&mut self, client: &str, part: usize) {
        let mut replicas: Vec<usize> = self.world.cluster.replicas(part).collect();
        self.rng.shuffle(&mut replicas);
        let [restarts, late, gone] = replicas[..] else {
            return;
        };
        if self.rng.bool() {
            self.slow_down(late, &[client.to_owned()]);
        } else {
            self.cut(late, &[client.to_owned()]);
        }
        self.cut(gone, &[client.to_owned()]);
        let end = self.sim.elapsed() + self.milliseconds(0..400);
        while self.sim.elapsed() < end && self.sim.step().is_ok() {
            self.recover();
        }
        self.crash(restarts, 5);
    }

    fn crash(&mut self, node: usize, longest: u64) {
        if self.may_suffer(node, Ill::Down) {
            self.sim.crash(NAMES[node]);
            self.world.stores.borrow_mut().remove(&node);
            let until = self.sim.elapsed() + self.milliseconds(0..longest);
            self.ill.insert(node, (Ill::Down, until));
            self.crashes += 1;
        }
    }

    /// Cuts a node off from these, both ways or one.
    fn cut(&mut self, node: usize, from: &[String]) {
        if self.may_suffer(node, Ill::Cut) {
            let way = self.rng.u8(..3);
            for other in from {
                match way {
                    0 => self.sim.partition_oneway(NAMES[node], &**other),
                    1 => self.sim.partition_oneway(&**other, NAMES[node]),
                    _ => self.sim.partition(NAMES[node], &**other),
                }
            }
            let until = self.sim.elapsed() + self.milliseconds(100..2500);
            self.ill.insert(node, (Ill::Cut, until));
            self.cuts += 1;
        }
    }

    fn slow_down(&mut self, node: usize, towards: &[String]) {
        if self.may_suffer(node, Ill::Cut) {
            let latency = self.milliseconds(50..220);
            for other in towards {
                self.sim.set_link_latency(NAMES[node], &**other, latency);
            }
            let until = self.sim.elapsed() + self.milliseconds(100..2500);
            self.ill.insert(node, (Ill::Cut, until));
            self.slow += 1;
        }
    }

    /// Ends what has lasted long enough.
    fn recover(&mut self) {
        let now = self.sim.elapsed();
        for (node, (ill, until)) in self.ill.clone() {
            match ill {
                Ill::Down if now >= until => {
                    self.sim.bounce(NAMES[node]);
                    self.ill.insert(node, (Ill::Joining, until));
                }
                Ill::Joining if self.is_ready(node) => drop(self.ill.remove(&node)),
                Ill::Cut if now >= until => {
                    for other in self.everybody_else(node) {
                        let (other, quick) = (&*other, Duration::from_millis(1));
                        self.sim.repair(NAMES[node], other);
                        self.sim.set_link_latency(NAMES[node], other, quick);
                        self.sim
                            .set_link_max_message_latency(NAMES[node], other, self.usual);
                    }
                    self.ill.insert(node, (Ill::Recovering, now + 2 * WINDOW));
                }
                Ill::Recovering if now >= until => drop(self.ill.remove(&node)),
                _ => {}
            }
        }
    }

    fn everybody_else(&self, node: usize) -> Vec<String> {
        let nodes = self
            .world
            .cluster
            .nodes()
            .iter()
            .map(|node| node.name.clone());
        let others = nodes.filter(|name| *name != NAMES[node]);
        others.chain((0..self.clients).map(client_name)).collect()
    }

    fn copies_are_equal(&self) -> bool {
        let mut seen = BTreeMap::new();
        self.world.stores.borrow().values().all(|store| {
            let digests = store.status().digests;
            digests
                .into_iter()
                .all(|(part, digest)| *seen.entry(part).or_insert_with(|| digest.clone()) == digest)
        })
    }
}

fn client_name(number: usize) -> String {
    format!("client{number}")
}

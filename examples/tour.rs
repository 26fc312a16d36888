//! A tour of kv54: five nodes in this process, a sixth one in the end, one key, and what befalls it.
//!
//! `cargo example tour` takes seven seconds. First comes the story; below it, how
//! a node is started, killed and cut off.
#![allow(clippy::indexing_slicing)] // a host's number is one of the six

use std::collections::BTreeSet;
use std::error::Error;
use std::future::ready;
use std::io::{self, ErrorKind::ConnectionRefused};
use std::net::TcpListener;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kv54::beyond::rings::Driver;
use kv54::client::Client;
use kv54::cluster::{self, Cluster};
use kv54::entry::Packed;
use kv54::replicas::Replicas;
use kv54::rpc::{self, Dial, Peer, codec};
use kv54::server::Node;
use kv54::status::Status;
use kv54::store::Store;
use msgpack_rpc::Value;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

const NAMES: [&str; 6] = ["alice", "bob", "carol", "dave", "erin", "frank"];
const ALICE: usize = 0;
const CAROL: usize = 2;
const ERIN: usize = 4;
const FRANK: usize = 5;
/// How long an operation is tried again before it is refused.
const TIMEOUT: Duration = Duration::from_secs(2);

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Outcome {
    let mut ring = Ring::bind()?;
    all_is_well(&mut ring).await?;
    one_is_killed(&mut ring).await?;
    two_are_cut_off(&mut ring).await?;
    one_comes(&mut ring).await
}

async fn all_is_well(ring: &mut Ring) -> Outcome {
    println!("start alice, bob, carol, dave and erin");
    (ALICE..=ERIN).try_for_each(|place| ring.start(place))?;
    let took = ring.wait_until("ready", ALICE..=ERIN).await;
    println!("    ready after {took:.1?}: nobody has missed anything (src/join.rs)");

    println!("set tea green");
    ring.client.set(b"tea", &Packed::of("green")).await?;
    println!("    ok: two of three have it (src/client.rs)");

    println!("where is tea?");
    let (owner, names) = ring.replicas("tea");
    println!("    crc32(\"tea\") % 5 = {owner}: {names} (src/cluster.rs)");

    println!("get tea through carol, who has no copy");
    let tea = ring.get_through(CAROL, "tea").await?;
    println!("    {tea}: a node is a client of the others (src/server.rs)");
    Ok(())
}

async fn one_is_killed(ring: &mut Ring) -> Outcome {
    println!("kill erin: its memory is gone");
    ring.kill(ERIN);
    let tea = ring.client.get(b"tea").await?.value()?;
    println!("    get tea: {tea}, from the other two (src/replicas.rs)");
    ring.client.set(b"tea", &Packed::of("black")).await?;
    println!("    set tea black: ok, two of three are enough (src/client.rs)");

    println!("start erin again");
    ring.start(ERIN)?;
    let status = ring.status(ERIN).await;
    let (state, others) = (status.state, status.waiting_for.join(", "));
    println!("    {state}: waiting for {others} (src/join.rs)");
    let took = ring.wait_until("ready", ALICE..=ERIN).await;
    println!("    ready after {took:.1?}: it has read what it missed (src/join.rs)");
    let tea = ring.get_through(ERIN, "tea").await?;
    println!("    get tea through erin: {tea} (src/store.rs)");
    Ok(())
}

async fn two_are_cut_off(ring: &mut Ring) -> Outcome {
    println!("cut erin and alice off: they keep their memory, but nobody reaches them");
    ring.cut_off(ERIN);
    ring.cut_off(ALICE);
    match ring.client.get(b"tea").await {
        Ok(tea) => println!("    get tea: {} (src/client.rs)", tea.value()?),
        Err(error) => println!("    get tea: {error} (src/replicas.rs)"),
    }
    println!("    bob alone cannot know that the others know nothing newer (src/client.rs)");

    println!("let them back");
    ring.start(ERIN)?;
    ring.start(ALICE)?;
    let tea = ring.client.get(b"tea").await?.value()?;
    println!("    get tea: {tea}, as soon as two of three are there (src/client.rs)");
    Ok(())
}

async fn one_comes(ring: &mut Ring) -> Outcome {
    println!("take frank into the ring");
    ring.wait_until("ready", ALICE..=ERIN).await;
    ring.cluster = cluster_of(&ring.hosts)?;
    ring.start(FRANK)?;
    ring.client.replicas.move_to(&ring.cluster);
    ring.wait_until("waiting", FRANK..=FRANK).await;
    let driver = Driver {
        client: &ring.client,
        file: &ring.cluster,
        again: false,
        rest: 1,
        progress: &|_| {},
    };
    let plan = driver.plan().await?;
    let asking = async {
        loop {
            if let Err(error) = ring.client.get(b"tea").await {
                return error;
            }
        }
    };
    tokio::select! {
        changed = driver.carry_out(&plan) => changed?,
        error = asking => return Err(error.into()),
    }
    println!("    every get was answered meanwhile, by two rings (src/beyond/rings.rs)");
    let (owner, names) = ring.replicas("tea");
    println!("    crc32(\"tea\") % 6 = {owner}: {names} (src/cluster.rs)");
    let tea = ring.get_through(FRANK, "tea").await?;
    println!("    get tea through frank: {tea} (src/server.rs)");
    Ok(())
}

/// Six hosts, the network between them, and somebody who asks.
struct Ring {
    cluster: Arc<Cluster>,
    hosts: Vec<Host>,
    unreachable: Unreachable,
    client: Client,
}

/// What stays when a node stops: its socket, so that nobody else takes the port, and perhaps
/// its memory.
struct Host {
    listener: TcpListener,
    memory: Option<Arc<Store>>,
    running: Option<(CancellationToken, JoinHandle<()>)>,
}

/// The addresses at which nobody answers now.
type Unreachable = Arc<Mutex<BTreeSet<String>>>;

/// TCP, where somebody is there.
fn network(unreachable: &Unreachable) -> Dial {
    let (unreachable, tcp) = (unreachable.clone(), rpc::tcp());
    Arc::new(move |node| {
        if rpc::lock(&unreachable).contains(&node.address) {
            return Box::pin(ready(Err(ConnectionRefused.into())));
        }
        tcp(node)
    })
}

/// A node's life. When it ends, so do its connections, and its memory unless somebody keeps it.
#[tokio::main(flavor = "current_thread")]
async fn live(store: Arc<Store>, listener: TcpListener, network: &Dial, stop: &CancellationToken) {
    let Ok(listener) = tokio::net::TcpListener::from_std(listener) else {
        return;
    };
    let node = Node::new(store, TIMEOUT, network);
    let incoming = rpc::incoming(&listener, |stream, _| rpc::connected(stream));
    let connections = rpc::admit(incoming, || node.store.limits());
    tokio::select! {
        () = node.live(connections, CancellationToken::new()) => {}
        () = stop.cancelled() => {} // in the middle of whatever it does
    }
}

/// The file that has these hosts.
fn cluster_of(hosts: &[Host]) -> Outcome<Arc<Cluster>> {
    let mut file = vec!["[nodes]".to_owned()];
    for (name, host) in NAMES.iter().zip(hosts) {
        file.push(format!("{name} = \"{}\"", host.listener.local_addr()?));
    }
    let cluster = Cluster::parse("cluster.toml".as_ref(), &file.join("\n"))?;
    Ok(Arc::new(cluster))
}

impl Ring {
    fn bind() -> Outcome<Ring> {
        let mut hosts = Vec::new();
        for _ in NAMES {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            listener.set_nonblocking(true)?;
            hosts.push(Host {
                listener,
                memory: None,
                running: None,
            });
        }
        let cluster = cluster_of(&hosts[..=ERIN])?;
        let unreachable = Unreachable::default();
        let replicas = Replicas::new(cluster.clone(), TIMEOUT, &network(&unreachable));
        Ok(Ring {
            cluster,
            hosts,
            unreachable,
            client: Client { replicas },
        })
    }

    /// Starts a node with the memory that it has kept, or with an empty one.
    fn start(&mut self, place: usize) -> io::Result<()> {
        let host = &mut self.hosts[place];
        let empty = || Arc::new(Store::new(self.cluster.clone(), place));
        let store = host.memory.get_or_insert_with(empty).clone();
        let (listener, network) = (host.listener.try_clone()?, network(&self.unreachable));
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let thread = thread::spawn(move || live(store, listener, &network, &stopped));
        host.running = Some((stop, thread));
        rpc::lock(&self.unreachable).remove(&self.node(place).address);
        Ok(())
    }

    /// A node that reaches nobody is a memory, and nothing else: its thread can go.
    fn cut_off(&mut self, place: usize) {
        rpc::lock(&self.unreachable).insert(self.node(place).address.clone());
        if let Some((stop, thread)) = self.hosts[place].running.take() {
            stop.cancel();
            let _ = thread.join();
        }
    }

    fn kill(&mut self, place: usize) {
        self.cut_off(place);
        self.hosts[place].memory = None;
    }

    /// What a node says of itself, as soon as it says anything.
    async fn status(&self, place: usize) -> Status {
        let (replicas, name) = (&self.client.replicas, NAMES[place]);
        loop {
            let told = replicas.ask_node(name, "status").await;
            if let Ok(status) = told.and_then(|told| Status::read(&told)) {
                return status;
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    async fn wait_until(&self, state: &str, places: RangeInclusive<usize>) -> Duration {
        let began = Instant::now();
        for place in places {
            while self.status(place).await.state != state {
                sleep(Duration::from_millis(20)).await;
            }
        }
        began.elapsed()
    }

    /// Asks one node, as a program does that knows one address.
    async fn get_through(&self, place: usize, key: &str) -> Result<Value, kv54::error::Error> {
        let peer = Peer::new(self.node(place), TIMEOUT, network(&self.unreachable));
        let (_, answer) = peer.call("get", &[&Packed::of(key)]).await;
        codec::decode(&answer?)
    }

    /// The place of a key's owner, and the names of those that keep it.
    fn replicas(&self, key: &str) -> (usize, String) {
        let owner = self.cluster.owner(key.as_bytes());
        let names = self.cluster.replicas(owner);
        let names: Vec<&str> = names.map(|place| self.cluster.name(place)).collect();
        (owner, names.join(", "))
    }

    fn node(&self, place: usize) -> &cluster::Node {
        &self.cluster.nodes()[place]
    }
}

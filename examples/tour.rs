//! A tour of kv54: five nodes in this process, one key, and what befalls it.
//!
//! `cargo example tour` takes six seconds. First comes the story; below it, how
//! a node is started, killed and cut off.
#![allow(clippy::indexing_slicing)] // a host's number is one of the five

use std::collections::BTreeSet;
use std::error::Error;
use std::future::ready;
use std::io::{self, ErrorKind::ConnectionRefused};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

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

const NAMES: [&str; 5] = ["alice", "bob", "carol", "dave", "erin"];
const ALICE: usize = 0;
const CAROL: usize = 2;
const ERIN: usize = 4;
/// How long an operation is tried again before it is refused.
const TIMEOUT: Duration = Duration::from_secs(2);

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Outcome {
    let mut ring = Ring::bind()?;
    all_is_well(&mut ring).await?;
    one_is_killed(&mut ring).await?;
    two_are_cut_off(&mut ring).await
}

async fn all_is_well(ring: &mut Ring) -> Outcome {
    println!("start alice, bob, carol, dave and erin");
    (ALICE..=ERIN).try_for_each(|place| ring.start(place))?;
    let took = ring.wait_until_ready().await;
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
    let took = ring.wait_until_ready().await;
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

/// Five hosts, the network between them, and somebody who asks.
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
    tokio::select! {
        () = node.live(incoming, CancellationToken::new()) => {}
        () = stop.cancelled() => {} // in the middle of whatever it does
    }
}

impl Ring {
    fn bind() -> Outcome<Ring> {
        let (mut file, mut hosts) = (vec!["[nodes]".to_owned()], Vec::new());
        for name in NAMES {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            listener.set_nonblocking(true)?;
            file.push(format!("{name} = \"{}\"", listener.local_addr()?));
            hosts.push(Host {
                listener,
                memory: None,
                running: None,
            });
        }
        let cluster = Arc::new(Cluster::parse("cluster.toml".as_ref(), &file.join("\n"))?);
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
        loop {
            if let Ok(status) = self.client.replicas.status(place).await {
                return status;
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    async fn wait_until_ready(&self) -> Duration {
        let began = Instant::now();
        for place in ALICE..=ERIN {
            while self.status(place).await.state != "ready" {
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

//! What befalls a cluster of real processes while clients read and write: kills, stops, cuts,
//! restarts. Whatever happens, every answer is one that a single register could have given.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::history::{Content, End, History, Operation};
use common::{Cluster, FIVE, Ports};
use fastrand::Rng;
use futures::future::join_all;
use futures::stream::{self, StreamExt as _};
use kv54::client::Client;
use kv54::entry::Packed;
use kv54::error::{Error, Kind};
use kv54::rpc::codec::{decode, encode};
use kv54::rpc::{Peer, tcp};
use msgpack_rpc::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};

/// Long enough for anything that will happen at all.
const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn thirty_seconds_of_kills_stops_and_cuts_show_no_answer_that_one_register_would_not_give() {
    let _alone = alone();
    let seed = number("KV54_SEED").unwrap_or_else(|| fastrand::u64(..));
    let seconds = number("KV54_CHAOS_SECONDS").unwrap_or(30);
    println!("KV54_SEED={seed} KV54_CHAOS_SECONDS={seconds}");
    let runtime = runtime();
    let (mut net, mut rng) = (Net::of_five(&runtime), Rng::with_seed(seed));
    let traffic = Traffic::new(&net.cluster, 6, 100);
    let coordinators = (0..6).map(|number| {
        let client = traffic.clone().coordinate(number, rng.fork());
        runtime.spawn(client)
    });
    let mut clients: Vec<_> = coordinators.collect();
    clients.extend((0..4).map(|_| runtime.spawn(traffic.clone().be_a_guest(rng.fork()))));

    let (start, mut faults) = (Instant::now(), BTreeMap::new());
    let (mut deck, mut victim) = (Vec::new(), 0);
    while start.elapsed() < Duration::from_secs(seconds) {
        if deck.is_empty() {
            deck.extend(Fault::ALL);
            rng.shuffle(&mut deck);
        }
        // Often a neighbour of the last one, which may still lack what was written meanwhile.
        victim = match rng.bool() {
            true => (victim + rng.choice([1, 4]).unwrap()) % FIVE.len(),
            false => rng.usize(..FIVE.len()),
        };
        let fault = deck.pop().unwrap();
        let begun = start.elapsed();
        net.befall(victim, fault, &mut rng);
        net.cluster.wait_until_ready();
        runtime.block_on(traffic.wait_until_all_reach(victim));
        *faults.entry(fault).or_insert(0) += 1;
        println!(
            "{begun:>6.1?} to {:>6.1?}: {fault:?} {}",
            start.elapsed(),
            FIVE[victim]
        );
    }
    traffic.done.store(true, Relaxed);
    for ended in runtime.block_on(join_all(clients)) {
        ended.unwrap();
    }
    runtime.block_on(traffic.read_every_key());
    let waited = net.cluster.wait_until_equal();

    let tally = traffic.history.tally();
    let (asked, failed) = (traffic.asked.load(Relaxed), traffic.failed());
    println!(
        "{faults:?}\n{tally:?}, coordinating clients: {asked} asked, {} failed; equal after {waited:.1?}",
        failed.len()
    );
    failed.iter().take(20).for_each(|error| println!("{error}"));
    traffic
        .history
        .check()
        .unwrap_or_else(|why| panic!("seed {seed}: {why}"));
    assert!(
        faults.len() >= 5.min(usize::try_from(seconds / 5).unwrap()),
        "few faults: {faults:?}"
    );
    let enough = usize::try_from(seconds * 30).unwrap();
    assert!(
        tally.done >= enough,
        "seed {seed}: {tally:?}, {enough} wanted"
    );
    assert!(
        failed.len() * 100 <= asked,
        "seed {seed}: {} of {asked} failed: {failed:#?}",
        failed.len()
    );
}

#[test]
fn a_rolling_restart_of_all_five_under_load_loses_nothing_and_refuses_nothing() {
    let _alone = alone();
    let runtime = runtime();
    let mut cluster = Cluster::five();
    let traffic = Traffic::new(&cluster, 4, 20);
    let clients: Vec<_> = (0..4)
        .map(|number| runtime.spawn(traffic.clone().coordinate(number, Rng::new())))
        .collect();
    for name in FIVE {
        let before = traffic.asked.load(Relaxed);
        cluster.stop(name);
        cluster.start(name);
        cluster.wait_until_ready();
        let during = traffic.asked.load(Relaxed) - before;
        assert!(
            during >= 50,
            "only {during} operations while {name} restarted"
        );
    }
    traffic.done.store(true, Relaxed);
    for ended in runtime.block_on(join_all(clients)) {
        ended.unwrap();
    }
    runtime.block_on(traffic.read_every_key());
    println!("{:?}", traffic.history.tally());
    assert_eq!(traffic.failed(), [""; 0]);
    traffic
        .history
        .check()
        .unwrap_or_else(|why| panic!("{why}"));
    cluster.wait_until_equal();
}

#[test]
fn a_hundred_thousand_keys_survive_every_node_restarting_once() {
    const KEYS: u64 = 100_000;
    let _alone = alone();
    let mut cluster = Cluster::five();
    let runtime = runtime();
    let start = Instant::now();
    let client = cluster.client();
    runtime.block_on(async {
        let writes = (0..KEYS).map(|n| {
            let client = &client;
            async move {
                client
                    .set(format!("key{n}").as_bytes(), &Packed::of(n))
                    .await
            }
        });
        let mut writes = stream::iter(writes).buffer_unordered(256);
        while let Some(written) = writes.next().await {
            written.unwrap();
        }
    });
    println!("written after {:.1?}", start.elapsed());
    for name in FIVE {
        cluster.restart(name);
        println!("{name} is ready after {:.1?}", start.elapsed());
    }
    let differ = runtime.block_on(async {
        let reads = (0..KEYS).map(|n| {
            let client = &client;
            async move { (n, client.get(format!("key{n}").as_bytes()).await.unwrap()) }
        });
        let reads = stream::iter(reads).buffer_unordered(256);
        let differ = reads.filter(|(n, value)| std::future::ready(*value != Packed::of(*n)));
        differ.collect::<Vec<_>>().await
    });
    println!("read after {:.1?}", start.elapsed());
    let some = &differ[..differ.len().min(10)];
    assert!(
        differ.is_empty(),
        "{} keys differ, among them {some:?}",
        differ.len()
    );
}

/// What may befall a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    /// `kill -9`, and a new start.
    Kill,
    /// SIGTERM, and a new start.
    Restart,
    /// SIGSTOP for a while.
    Stop,
    /// Its connections break, and no new ones are made for a while.
    CutOff,
    /// Its connections stay, but nothing goes through until later.
    Silence,
    /// The same towards it alone.
    Deafness,
    /// The same from it alone.
    Muteness,
    /// The same between it and the other nodes alone: its guests still reach it.
    Isolation,
    /// `kill -9` in a silence; what it said before arrives after its new start.
    KillInSilence,
}

impl Fault {
    const ALL: [Fault; 9] = [
        Fault::Kill,
        Fault::Restart,
        Fault::Stop,
        Fault::CutOff,
        Fault::Silence,
        Fault::Deafness,
        Fault::Muteness,
        Fault::Isolation,
        Fault::KillInSilence,
    ];
}

/// Who is cut off at the moment, and how.
type Weather = Option<(usize, Fault)>;

/// How clients are called where a node has its place.
const CLIENTS: usize = FIVE.len();

/// Five nodes and a network between them that can be cut: everybody dials everybody else at
/// a port of their own, behind which a small proxy dials the node.
struct Net {
    cluster: Cluster,
    ports: Vec<Ports>, // of each node: where each other one dials it, and where it listens
    weather: watch::Sender<Weather>,
}

impl Net {
    fn of_five(runtime: &Runtime) -> Net {
        let mut net = Net {
            cluster: Cluster::of(&FIVE),
            ports: FIVE.iter().map(|_| Ports::block()).collect(),
            weather: watch::Sender::new(None),
        };
        for from in 0..=CLIENTS {
            let lines = FIVE.iter().enumerate().map(|(to, name)| {
                let (door, behind) = (net.door(from, to), net.address(to));
                let line = format!("{name} = {door:?}\n");
                let listener = runtime.block_on(TcpListener::bind(door)).unwrap();
                let weather = net.weather.subscribe();
                runtime.spawn(proxy(listener, behind, from, to, weather));
                line
            });
            let both = |_| (1 + from % 2).to_string(); // side by side
            let threads = std::env::var("KV54_TEST_THREADS").unwrap_or_else(both);
            let lines = lines.collect::<String>();
            let file = format!("[nodes]\n{lines}[limits]\nthreads = {threads}\n");
            net.cluster.file(&file_of(from), &file);
        }
        (0..FIVE.len()).for_each(|place| net.start(place));
        net.cluster.wait_until_ready();
        net
    }

    /// Where `from` dials `to`.
    fn door(&self, from: usize, to: usize) -> String {
        format!("127.0.0.1:{}", self.ports[to].port(from + 1))
    }

    /// Where a node listens.
    fn address(&self, place: usize) -> String {
        self.door(CLIENTS + 1, place)
    }

    fn start(&mut self, place: usize) {
        let (file, listen) = (file_of(place), self.address(place));
        self.cluster.start_behind(FIVE[place], &file, &listen);
    }

    /// Lets it happen to a node, lets it last, and ends it.
    fn befall(&mut self, victim: usize, fault: Fault, rng: &mut Rng) {
        let name = FIVE[victim];
        let lasting = Duration::from_millis(rng.u64(300..2_500));
        match fault {
            Fault::Kill => {
                self.cluster.kill(name);
                self.start(victim);
            }
            Fault::Restart => {
                self.cluster.stop(name);
                self.start(victim);
            }
            Fault::Stop => {
                self.cluster.signal(name, "STOP");
                std::thread::sleep(lasting);
                self.cluster.signal(name, "CONT");
            }
            Fault::KillInSilence => {
                self.weather.send_replace(Some((victim, fault)));
                std::thread::sleep(lasting / 8);
                self.cluster.kill(name);
                self.start(victim);
                std::thread::sleep(lasting);
                self.weather.send_replace(None);
            }
            _ => {
                self.weather.send_replace(Some((victim, fault)));
                std::thread::sleep(lasting);
                self.weather.send_replace(None);
            }
        }
    }
}

/// The file that a node, or the clients, read.
fn file_of(place: usize) -> String {
    match FIVE.get(place) {
        Some(name) => format!("{name}.toml"),
        None => "cluster.toml".to_owned(),
    }
}

/// Dials `behind` for everybody who dials the listener: what `from` says goes to `to`, and
/// what `to` says comes back, as the weather allows.
async fn proxy(
    listener: TcpListener,
    behind: String,
    from: usize,
    to: usize,
    weather: watch::Receiver<Weather>,
) {
    loop {
        let (near, _) = listener.accept().await.unwrap();
        let (behind, weather) = (behind.clone(), weather.clone());
        tokio::spawn(async move {
            let talk = async {
                pass(&mut weather.clone(), from, to).await;
                let far = TcpStream::connect(behind).await?;
                near.set_nodelay(true)?;
                far.set_nodelay(true)?;
                let ((read, write), (far_read, far_write)) = (near.into_split(), far.into_split());
                tokio::join!(
                    carry(read, far_write, weather.clone(), from, to),
                    carry(far_read, write, weather.clone(), to, from),
                );
                std::io::Result::Ok(())
            };
            let mut storm = weather.clone();
            tokio::select! {
                _ = talk => {}
                () = wait_for(&mut storm, |now| breaks(now, from, to)) => {}
            }
        });
    }
}

/// Carries bytes from one to the other. What cannot pass yet is kept, so that it arrives later.
async fn carry(
    mut read: OwnedReadHalf,
    mut write: OwnedWriteHalf,
    mut weather: watch::Receiver<Weather>,
    from: usize,
    to: usize,
) {
    let (sender, mut kept) = mpsc::unbounded_channel::<Vec<u8>>();
    let reading = async move {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count @ 1..) = read.read(&mut buffer).await {
            let _ = sender.send(buffer[..count].to_vec());
        }
    };
    let writing = async move {
        while let Some(bytes) = kept.recv().await {
            // Without this, a write reaches all its replicas at very nearly the same moment.
            if fastrand::u8(..3) == 0 {
                tokio::time::sleep(Duration::from_millis(fastrand::u64(1..25))).await;
            }
            pass(&mut weather, from, to).await;
            if write.write_all(&bytes).await.is_err() {
                break;
            }
        }
        pass(&mut weather, from, to).await;
        let _ = write.shutdown().await;
    };
    tokio::join!(reading, writing);
}

/// Waits until bytes from one to the other can pass.
async fn pass(weather: &mut watch::Receiver<Weather>, from: usize, to: usize) {
    wait_for(weather, |now| {
        now.is_none_or(|(victim, fault)| match fault {
            Fault::Deafness => to != victim,
            Fault::Muteness => from != victim,
            Fault::Isolation if from == CLIENTS || to == CLIENTS => true,
            _ => from != victim && to != victim,
        })
    })
    .await;
}

fn breaks(now: Weather, from: usize, to: usize) -> bool {
    now.is_some_and(|(victim, fault)| fault == Fault::CutOff && (from == victim || to == victim))
}

async fn wait_for(weather: &mut watch::Receiver<Weather>, allows: impl Fn(Weather) -> bool) {
    if weather.wait_for(|now| allows(*now)).await.is_err() {
        std::future::pending::<()>().await; // the story is over
    }
}

/// Clients, what they ask for, and what they were told.
struct Traffic {
    cluster: Arc<kv54::cluster::Cluster>,
    clients: Vec<Client>,
    keys: Vec<String>,
    start: Instant,
    history: History,
    values: AtomicU64,
    asked: AtomicUsize,
    failed: Mutex<Vec<String>>,
    done: AtomicBool,
}

impl Traffic {
    fn new(cluster: &Cluster, clients: usize, keys: usize) -> Arc<Traffic> {
        Arc::new(Traffic {
            cluster: cluster.ring(),
            clients: (0..clients).map(|_| cluster.client()).collect(),
            keys: (0..keys).map(|n| format!("key{n}")).collect(),
            start: Instant::now(),
            history: History::default(),
            values: AtomicU64::new(1),
            asked: AtomicUsize::new(0),
            failed: Mutex::default(),
            done: AtomicBool::new(false),
        })
    }

    /// Reads and writes, asking a majority for each, until all is done.
    async fn coordinate(self: Arc<Self>, number: usize, mut rng: Rng) {
        while !self.done.load(Relaxed) {
            let (key, operation) = self.choose(&mut rng);
            self.ask_majority(&self.clients[number], &key, operation)
                .await;
            pause(&mut rng).await;
        }
    }

    /// The same, asking one node at a time, as a client in another language does.
    async fn be_a_guest(self: Arc<Self>, mut rng: Rng) {
        let peer =
            |node: &kv54::cluster::Node| Peer::new(node, 2 * self.cluster.limits.window, tcp());
        let peers: Vec<Peer> = self.cluster.nodes().iter().map(peer).collect();
        let mut at = rng.usize(..peers.len());
        while !self.done.load(Relaxed) {
            let (key, operation) = self.choose(&mut rng);
            let encoded = encode(&(*key).into());
            let began = self.history.begin(&key, operation);
            let answer = match operation {
                Operation::Get => peers[at].call("get", &[&encoded]),
                Operation::Set(Some(value)) => {
                    peers[at].call("set", &[&encoded, &encode(&value.into())])
                }
                Operation::Set(None) => peers[at].call("delete", &[&encoded]),
                _ => unreachable!("nobody swaps here"),
            };
            let answer = answer.await.1.and_then(|answer| decode(&answer));
            if answer.is_err() || rng.u8(..) == 0 {
                at = (at + rng.usize(1..peers.len())) % peers.len();
            }
            self.history.end(began, end(operation, &answer));
            pause(&mut rng).await;
        }
    }

    async fn ask_majority(&self, client: &Client, key: &str, operation: Operation) {
        self.asked.fetch_add(1, Relaxed);
        let (start, began) = (Instant::now(), self.history.begin(key, operation));
        let answer = match operation {
            Operation::Get => client.get(key.as_bytes()).await,
            Operation::Set(Some(value)) => {
                done(client.set(key.as_bytes(), &Packed::of(value)).await)
            }
            Operation::Set(None) => done(client.delete(key.as_bytes()).await),
            _ => unreachable!("nobody swaps here"),
        };
        let answer = answer.and_then(|value| value.value());
        self.history.end(began, end(operation, &answer));
        if let Err(error) = answer {
            let line = format!("{operation:?} after {:.1?}: {error}", start.elapsed());
            self.failed.lock().unwrap().push(line);
        }
    }

    fn choose(&self, rng: &mut Rng) -> (String, Operation) {
        let liked = self.start.elapsed().as_millis() / 100; // for a moment everybody likes the same key
        let place = match rng.bool() {
            true => usize::try_from(liked).unwrap() % self.keys.len(),
            false => rng.usize(..self.keys.len()),
        };
        let key = self.keys[place].clone();
        let operation = match rng.u8(..20) {
            0..10 => Operation::Get,
            10 => Operation::Set(None),
            _ => Operation::Set(Some(self.values.fetch_add(1, Relaxed))),
        };
        (key, operation)
    }

    async fn read_every_key(&self) {
        for key in &self.keys {
            self.ask_majority(&self.clients[0], key, Operation::Get)
                .await;
        }
    }

    /// Waits until the node answers every coordinating client.
    async fn wait_until_all_reach(&self, place: usize) {
        let start = Instant::now();
        for client in &self.clients {
            while let Err(error) = client.replicas.status(place).await {
                assert!(
                    start.elapsed() < PATIENCE,
                    "{} is out of reach: {error}",
                    FIVE[place]
                );
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }

    fn failed(&self) -> Vec<String> {
        self.failed.lock().unwrap().clone()
    }
}

/// How an operation ended, for a history: what is unknown may still take effect.
fn done(written: Result<(), Error>) -> Result<Packed, Error> {
    written.map(|()| Packed::default())
}

fn end(operation: Operation, answer: &Result<Value, Error>) -> End {
    match (operation, answer) {
        (Operation::Get, Ok(value)) => End::Got(content(value)),
        (_, Ok(_)) => End::Done,
        (Operation::Set(_), Err(error)) if error.kind == Kind::UnknownOutcome => End::Unknown,
        (_, Err(_)) => End::Refused,
    }
}

fn content(value: &Value) -> Content {
    assert!(value.is_nil() || value.is_u64(), "nobody wrote {value}");
    value.as_u64()
}

/// Between some operations of a client: a few hundred a second together are plenty.
async fn pause(rng: &mut Rng) {
    if rng.bool() {
        tokio::time::sleep(Duration::from_millis(rng.u64(5..30))).await;
    }
}

/// Each of these stories wants the machine for itself.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A thread for clients and proxies, beside the one that tells the story.
fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable)
        .ok()
        .map(|text| text.parse().unwrap())
}

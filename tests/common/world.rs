//! One simulated run: a ring, its clients, and what befalls them, all drawn from a seed.

#![allow(dead_code)]

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::pin::pin;
use std::process::Command;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fastrand::Rng;
use futures::FutureExt as _;
use futures::stream;
use kv54::beyond::log::Disk;
use kv54::beyond::rings::{Driver, Progress};
use kv54::beyond::swap::Swapped;
use kv54::client::Client;
use kv54::cluster::{Cluster, State};
use kv54::entry::Packed;
use kv54::error::{Error, Kind};
use kv54::replicas::{Clock, Replicas};
use kv54::rpc::codec::{decode, encode};
use kv54::rpc::{Connection, Dial, Peer, admit, connected, insist};
use kv54::server::Node;
use kv54::store::Store;
use msgpack_rpc::Value;
use rustix::time::{ClockId, clock_gettime};
use tokio_util::sync::CancellationToken;
use turmoil::net::{TcpListener, TcpStream};
use turmoil::{Builder, Sim};

use crate::history::{Content, End, History, Operation};
use crate::ram::{Part, Ram};

/// Short enough for many windows in one run, long against the usual latency.
pub const WINDOW: Duration = Duration::from_millis(300);
pub const TICK: Duration = Duration::from_millis(4);
const TIMEOUT: Duration = Duration::from_secs(5);
const TROUBLE: Duration = Duration::from_secs(9);
/// How long anything may take that is to happen at all.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// How long a node that has started may take to hear how the others are.
const HEARD: Duration = Duration::from_millis(500);
/// How long copies may differ on a quiet network.
const REPAIR: Duration = Duration::from_secs(10);
/// How long clients go on when nothing fails any more.
const CALM: Duration = Duration::from_millis(1500);
/// How long a run and the check of its history may compute: usually a second. What else the machine does costs
/// no seed its time.
const CHECKED: i64 = 60; // seconds
/// The size of a segment of a log: each goes on in a few.
const SEGMENT: u32 = 32 << 10;
/// How many drive the same change at once, at most.
const DRIVERS: usize = 2;
/// Whose clock clients go by.
const CLIENT: usize = 6;
pub const NAMES: [&str; 7] = ["alice", "bob", "carol", "dave", "erin", "frank", "grace"];

/// What a run's clients and nodes share with the one who looks on.
#[allow(clippy::struct_excessive_bools)] // each run has some of these troubles
struct World {
    ring: RefCell<Arc<Cluster>>,           // the newest that is alone
    target: RefCell<Option<Arc<Cluster>>>, // the file of the ring that is wanted, until it is alone
    former: RefCell<Arc<Cluster>>,         // the file before it
    resizes: bool,
    halved: Cell<Option<Duration>>, // when a ring of two was last without one of them: it refuses then
    changes: Cell<usize>,
    seen: RefCell<BTreeMap<*const Store, u64>>, // the step that each node knew
    keys: Vec<String>,
    history: History,
    stores: RefCell<BTreeMap<usize, Arc<Store>>>,
    pace: u64,       // the longest pause between a client's operations, in milliseconds
    harsh: bool,     // more than one failure at a time
    lonely: bool,    // only the first client writes
    forgetful: bool, // replicas of one key lose their memories at once
    doubts: RefCell<BTreeSet<String>>, // all that any node ever had
    unseen: RefCell<BTreeSet<usize>>, // parts whose loss nobody can know of
    memory: Option<Vec<usize>>, // what each node may keep, in bytes, where that is little
    written: RefCell<Option<(String, u64)>>, // by the first client, at this moment
    calm: Cell<bool>,
    steps: Cell<u64>,                 // that all nodes have made
    busy: Cell<usize>, // failed since other sets were allowed the last memory of a node
    blameless: Cell<usize>, // failed because the one node that was asked was the failed one, or one of two
    full: Cell<usize>,      // sets refused for memory
    outrun: Cell<usize>, // swaps that were refused, as those of clients that do not take turns are
    wronged: RefCell<Option<String>>, // for memory, what must not be
    next_value: AtomicU64,
    swaps: Swaps,
    forgets_from: usize, // how many bytes of what was deleted a round frees at least
    clocks: Option<[u64; NAMES.len()]>, // how far each node's is ahead, and a client's, where values end
    ends: Ends,
    disks: Option<Vec<Ram>>, // of each node, where the nodes have disks
}

/// Of values: from when on they may be nil.
#[derive(Default)]
struct Ends(Mutex<Vec<(Duration, String, u64)>>);

impl Ends {
    fn note(&self, end: Duration, key: &str, value: u64) {
        self.0.lock().unwrap().push((end, key.to_owned(), value));
    }
}

/// How much of what clients write is swapped.
#[derive(Clone, Copy, PartialEq)]
enum Swaps {
    None,
    /// A part, and of the first key most.
    Some,
    /// All, by many clients.
    All,
}

/// Runs a seed in a process of its own, where nothing that another run left can disturb it,
/// by way of a test that calls [`print`]; perhaps with a bug planted.
pub fn alone(test: &str, seed: u64, sabotage: &str) -> Result<String, String> {
    let output = Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env("KV54_SEED", seed.to_string())
        .env("KV54_SABOTAGE", sabotage)
        .output()
        .unwrap();
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = out
        .lines()
        .find(|line| line.starts_with("seed "))
        .map(String::from);
    match (output.status.success(), line) {
        (true, Some(line)) => Ok(line),
        _ => Err(format!(
            "{out}\n{}",
            String::from_utf8_lossy(&output.stderr)
        )),
    }
}

/// Runs a seed and prints what happened; panics if that is not what was promised.
pub fn print(seed: u64, on_disk: bool) {
    // Whether a history is linearizable may take for ever to find out, where many writes are unknown.
    std::thread::spawn(move || {
        while clock_gettime(ClockId::ProcessCPUTime).tv_sec < CHECKED {
            std::thread::sleep(Duration::from_secs(1));
        }
        eprintln!("seed {seed}: after {CHECKED} s it is still not clear whether it is right");
        std::process::exit(2);
    });
    println!(
        "{}",
        run(seed, on_disk).unwrap_or_else(|why| panic!("{why}"))
    );
}

/// A number from the environment.
pub fn number(variable: &str) -> Option<u64> {
    std::env::var(variable)
        .ok()
        .map(|text| text.parse().unwrap())
}

/// Runs one seed: a line that tells what happened, or what went wrong.
pub fn run(seed: u64, on_disk: bool) -> Result<String, String> {
    fastrand::seed(seed);
    let mut rng = Rng::with_seed(seed);
    let mut world = World::draw(seed, &mut rng);
    if on_disk {
        world.write_down(seed);
    }
    let world = Rc::new(world);
    let size = world.ring().nodes().len();
    let usual = if world.lonely || rng.bool() {
        rng.u64(4..12)
    } else {
        rng.u64(12..80)
    };
    let usual = Duration::from_millis(usual);
    let mut sim = Builder::new()
        .rng_seed(seed)
        .tick_duration(TICK)
        .min_message_latency(Duration::from_millis(1))
        .max_message_latency(usual)
        .simulation_duration(Duration::from_secs(3600))
        .tcp_capacity(4096)
        .build();
    sim.set_message_latency_curve(rng.f64() * 4.0 + 1.0);
    for (place, name) in NAMES.iter().enumerate() {
        if world.resizes || world.is_asked(name) {
            let world = world.clone();
            sim.host(*name, move || node(world.clone(), place));
        }
        if world.resizes && !world.is_asked(name) {
            sim.crash(*name);
        }
    }
    for number in 0..if world.resizes { DRIVERS } else { 0 } {
        let world = world.clone();
        sim.host(driver_name(number), move || driver(world.clone(), number));
    }
    let clients = match (if world.lonely { 3 } else { rng.usize(2..=6) }, world.swaps) {
        (usual, Swaps::All) => 2 * usual,
        (usual, _) => usual,
    };
    for number in 0..clients {
        let (world, first) = (world.clone(), number == 0);
        let coordinates = rng.u8(..3) == 0 || first;
        sim.host(client_name(number), move || {
            client(world.clone(), first, coordinates)
        });
    }
    let (ill, [crashes, cuts, slow, dead, blackouts]) = (BTreeMap::new(), [0; 5]);
    let mut trouble = Trouble {
        world: world.clone(),
        sim,
        rng,
        clients,
        usual,
        ill,
        crashes,
        cuts,
        slow,
        dead,
        blackouts,
        started: Vec::new(),
    };
    trouble
        .run()
        .map_err(|why| format!("seed {seed}, ring of {size}: {why}"))?;
    if let Some(why) = world.wronged.take() {
        return Err(format!("seed {seed}, ring of {size}: {why}"));
    }
    for store in world.stores.borrow().values() {
        world.doubts.borrow_mut().extend(store.status().doubts);
    }
    world
        .check()
        .map_err(|why| format!("seed {seed}, ring of {size}: {why}"))?;
    trouble.report(seed)
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

impl World {
    fn draw(seed: u64, rng: &mut Rng) -> World {
        let size = rng.usize(1..=7);
        // Two runs in five do not keep to one failure at a time: then refusals are allowed.
        let harsh = rng.u8(..5) < 2 && size >= 3;
        // Two in three of those have one writer, one key and few readers, so that nobody repairs
        // by the way what the worst of accidents has done.
        let lonely = harsh && rng.u8(..3) > 0;
        let keys = if lonely { 1 } else { rng.usize(1..=3) };
        let pace = if lonely {
            50
        } else {
            [5, 20, 150][rng.usize(..3)]
        };
        // One run in four: not all keys fit into memory, and into some nodes fewer than into others.
        let little = !lonely && rng.u8(..4) == 0;
        let keys = if little { keys + 5 } else { keys };
        let memory = little.then(|| NAMES.map(|_| rng.usize(250..900)).to_vec());
        // One run in eight: drawn from another number, so that the others stay what they are.
        let forgetful = size >= 2 && Rng::with_seed(!seed).u8(..8) == 0;
        // Five runs in eight: the ring changes meanwhile.
        let mut other = Rng::with_seed(seed.wrapping_mul(54));
        let resizes = !forgetful && other.u8(..8) < 5;
        let mut names = NAMES.to_vec();
        if resizes {
            other.shuffle(&mut names);
        }
        let first = file_of(&names[..size], &[]);
        let swaps = match Rng::with_seed(seed.wrapping_mul(1998)).u8(..8) {
            0..2 => Swaps::None,
            2..4 if !lonely && !little => Swaps::All,
            _ => Swaps::Some,
        };
        let (keys, pace) = match swaps {
            Swaps::All => (keys.min(2), pace.max(20)), // a long history takes long to check
            _ => (keys, pace),
        };
        // One run in three: values end by themselves, and clocks differ: not at all, a little, or much.
        let mut third = Rng::with_seed(seed.wrapping_mul(1969));
        let ends = !lonely && !little && !forgetful && third.u8(..3) == 0;
        let most = [1, 100, 120_000][third.usize(..3)];
        let clocks = ends.then(|| NAMES.map(|_| third.u64(..most)));
        // In a quarter of the runs nothing is forgotten, and where the worst of accidents are, in most.
        let mut fourth = Rng::with_seed(!seed.wrapping_mul(54));
        let forgets_from = match lonely && fourth.u8(..4) > 0 {
            true => usize::MAX,
            false => [1, 300, 2000, usize::MAX][fourth.usize(..4)],
        };
        World {
            ring: RefCell::new(first.clone()),
            target: RefCell::default(),
            former: RefCell::new(first),
            resizes,
            halved: Cell::default(),
            changes: Cell::new(0),
            seen: RefCell::default(),
            keys: (0..keys).map(|n| format!("key{n}-{seed}")).collect(),
            pace,
            memory,
            harsh,
            lonely,
            history: History::default(),
            stores: RefCell::default(),
            forgetful,
            doubts: RefCell::default(),
            unseen: RefCell::default(),
            written: RefCell::default(),
            calm: Cell::new(false),
            steps: Cell::new(0),
            busy: Cell::new(0),
            blameless: Cell::new(0),
            full: Cell::new(0),
            outrun: Cell::new(0),
            wronged: RefCell::default(),
            next_value: AtomicU64::new(0),
            swaps,
            forgets_from,
            clocks,
            ends: Ends::default(),
            disks: None,
        }
    }

    /// Every node has a disk. All may lose their power at once then; and more than one is ill at a time.
    fn write_down(&mut self, seed: u64) {
        let mut rng = Rng::with_seed(seed.wrapping_mul(2024));
        let disk = |_| Ram::slow([2, 5, 15][rng.usize(..3)], rng.fork());
        self.disks = Some(NAMES.iter().map(disk).collect());
        (self.harsh, self.forgetful) = (true, false);
    }
}

impl World {
    fn ring(&self) -> Arc<Cluster> {
        self.ring.borrow().clone()
    }

    /// The rings that are asked, or are to be.
    fn rings(&self) -> Vec<Arc<Cluster>> {
        let target = self.target.borrow().clone();
        [self.ring()].into_iter().chain(target).collect()
    }

    fn is_asked(&self, name: &str) -> bool {
        self.rings().iter().any(|ring| ring.place(name).is_some())
    }

    /// Whether a ring has this node alone: then nothing is promised when it crashes.
    fn is_alone(&self, node: usize) -> bool {
        let alone = |ring: &Arc<Cluster>| ring.names() == [NAMES[node]];
        self.rings().iter().any(alone)
    }

    /// The nodes that are asked, or are to be.
    fn nodes(&self) -> Vec<usize> {
        (0..NAMES.len())
            .filter(|node| self.is_asked(NAMES[*node]))
            .collect()
    }

    /// A file that a program may have now: the newest one, or while the ring changes the one before
    /// it. A node that is alone needs the newest.
    fn file(&self, name: Option<&str>) -> Arc<Cluster> {
        let (ring, former) = (self.ring(), self.former.borrow().clone());
        let lone = ring.nodes().len() == 1;
        let files = match self.target.borrow().clone() {
            Some(target) if self.disks.is_some() && name.is_some() => vec![target], // it names all whom a log may know
            Some(target) if lone && name.is_some() => vec![target],
            Some(target) => vec![former, target],
            None => vec![ring],
        };
        let has = |file: &Arc<Cluster>| name.is_none_or(|name| file.node(name).is_some());
        let files: Vec<_> = files.into_iter().filter(has).collect();
        files[fastrand::usize(..files.len())].clone()
    }

    /// Looks at the store of this node from now on.
    fn adopt(&self, number: usize, store: Arc<Store>) -> Arc<Store> {
        store.forget_from(self.forgets_from);
        self.stores.borrow_mut().insert(number, store.clone());
        store
    }

    /// Only a set is refused for memory, or a swap, which needs it for promises; and then for sure.
    fn note_full(&self, operation: Operation, error: &Error) {
        match (operation, error.kind) {
            (operation, Kind::Full)
                if is_swap(operation) || matches!(operation, Operation::Set(Some(_))) =>
            {
                self.full.set(self.full.get() + 1);
            }
            _ if error.to_string().contains("full: ") => {
                let wrong = format!("{operation:?} failed for memory: {error}");
                self.wronged.borrow_mut().get_or_insert(wrong);
            }
            _ => {}
        }
    }

    /// The ring of this file is alone.
    fn end(&self, file: &Arc<Cluster>) {
        let mut target = self.target.borrow_mut();
        if target.take_if(|target| Arc::ptr_eq(target, file)).is_some() {
            let names: Vec<&str> = file.names();
            *self.ring.borrow_mut() = file_of(&names, &[]);
            self.changes.set(self.changes.get() + 1);
        }
    }

    /// A set that was done in a changed ring has a stamp above all that were chosen before.
    fn note_stamp(&self, before: &State, client: &Client, key: &str) {
        let (state, stores) = (client.replicas.state(), self.stores.borrow());
        let stamps = stores
            .values()
            .filter(|store| store.rings.known().state.is(&state));
        let stamps = stamps.filter_map(|store| store.at(0).load(key.as_bytes(), None).ok());
        let epochs: Vec<u64> = stamps.map(|loaded| loaded.stamp.epoch()).collect();
        let all = epochs.len() == state.ring.copies(); // else those that have it may not be among them
        let was_alone = state.next.is_none() && state.is(before); // also when the set began
        if all && was_alone && epochs.iter().all(|epoch| *epoch < state.epoch()) {
            let wrong = format!("{key} has a stamp of an epoch before its ring");
            self.wronged.borrow_mut().get_or_insert(wrong);
        }
    }

    /// A hand-over begins only when every node has known of the change at one moment.
    fn note_progress(&self, progress: &Progress, file: &Arc<Cluster>) {
        let target = self.target.borrow();
        let is_own = target
            .as_ref()
            .is_some_and(|target| Arc::ptr_eq(target, file));
        if matches!(progress, Progress::Keys(_)) && is_own && self.latest_step() % 2 == 1 {
            let is_asked = |name: &str| self.is_asked(name);
            self.note_behind(self.latest_step(), "handed over before", &is_asked);
        }
    }

    /// Notes in the history that a node has moved to another state of the ring.
    fn note_changes(&self) {
        let stores = self.stores.borrow();
        let steps = stores.values().map(|store| store.rings.known().state.step);
        let steps = steps.sum();
        if self.steps.replace(steps) != steps {
            self.history.ring_changed();
        }
    }

    /// And so does the new ring stand alone. A node that has just started must read its part of it.
    fn note_steps(&self) {
        let mut seen = self.seen.borrow_mut();
        for store in self.stores.borrow().values() {
            let state = store.rings.known().state;
            let step = seen.entry(Arc::as_ptr(store)).or_default();
            if *step < state.step && state.next.is_some() {
                let own = |ring: &Arc<Cluster>| ring.place(store.name());
                let own: Vec<Option<usize>> = state.rings().map(own).collect();
                let is_ready = |ring: usize| own[ring].map(|own| store.at(ring).is_ready_for(own));
                if [is_ready(0), is_ready(1)] == [Some(false), Some(true)] {
                    let wrong = format!("{} took its part of a new ring as read", store.name());
                    self.wronged.borrow_mut().get_or_insert(wrong);
                }
            }
            *step = state.step;
        }
        drop(seen);
        // Who has left hears of the end of that change alone, and not of the rounds that follow.
        let (ring, has_rounds) = (self.ring(), self.forgets_from < usize::MAX);
        let latest = self.latest();
        let stays = |name: &str| latest.as_ref().is_some_and(|latest| latest.has(name));
        let was_asked = |name: &str| ring.place(name).is_some() && (!has_rounds || stays(name));
        let step = self.latest_step().saturating_sub(1);
        self.note_behind(step, "ended before", &was_asked);
    }

    /// The latest state that a node knows.
    fn latest(&self) -> Option<Arc<State>> {
        let stores = self.stores.borrow();
        let states = stores.values().map(|store| store.rings.known().state);
        states.max_by_key(|state| state.step)
    }

    fn latest_step(&self) -> u64 {
        self.latest().map_or(0, |state| state.step)
    }

    fn note_behind(&self, step: u64, what: &str, is_asked: &dyn Fn(&str) -> bool) {
        let stores = self.stores.borrow();
        let asked = stores.values().filter(|store| is_asked(store.name()));
        for store in asked.filter(|store| store.unheard().is_empty()) {
            if store.rings.known().state.step < step {
                let steps: Vec<_> = asked_steps(&stores);
                let wrong = format!(
                    "the change {what} {} knew of it: {steps:?} at {:?}",
                    store.name(),
                    turmoil::sim_elapsed()
                );
                self.wronged.borrow_mut().get_or_insert(wrong);
            }
        }
    }

    /// What a client does next to a key of which it saw this last.
    fn operation(&self, key: &str, seen: Content, first: bool, coordinates: bool) -> Operation {
        match fastrand::u8(..20) {
            _ if self.lonely && !first => Operation::Get,
            0..10 => Operation::Get,
            _ if self.is_swapped(key) => self.swap(seen, coordinates),
            10 => Operation::Set(None),
            11..14 if self.resizes => Operation::Set(None), // what is deleted stays behind
            _ => Operation::Set(Some(self.number())),
        }
    }

    fn is_swapped(&self, key: &str) -> bool {
        match self.swaps {
            Swaps::None => false,
            Swaps::Some if key == self.keys[0] => fastrand::u8(..10) < 7,
            Swaps::Some => fastrand::u8(..10) < 3,
            Swaps::All => true,
        }
    }

    /// A swap of what the client saw, of nothing, or of what nobody wrote. What it expects is never
    /// what only an unknown write may have brought: so says the check of the history.
    fn swap(&self, seen: Content, coordinates: bool) -> Operation {
        if coordinates && !self.lonely && fastrand::u8(..3) == 0 {
            return Operation::Replace;
        }
        if coordinates && self.clocks.is_some() && fastrand::u8(..3) == 0 {
            return Operation::Renew;
        }
        let expected = match fastrand::u8(..10) {
            0 => None,
            1 => Some(self.number()),
            _ => seen,
        };
        let new = fastrand::u8(..6) > 0;
        let new = new.then(|| self.number());
        Operation::Cas { expected, new }
    }

    /// A number that nobody had.
    fn number(&self) -> u64 {
        self.next_value.fetch_add(1, Relaxed) + 1
    }

    fn value(&self, number: u64) -> Packed {
        value(number, self.memory.is_some())
    }

    /// The clock of a node, or of a client, in milliseconds; the system's, in truth, where no values end.
    fn clock(&self, whose: usize) -> Option<Clock> {
        let ahead = self.clocks?[whose];
        Some(Arc::new(move || now() + ahead))
    }

    /// How long what one with this clock writes now is to last, and from when on the first clock may say that
    /// it is over.
    fn lifetime(&self, whose: usize) -> Option<(u64, Duration)> {
        let ahead = self.clocks?;
        let ttl = fastrand::bool().then(|| fastrand::u64(1..1_000))?;
        let first = (ttl + ahead[whose]).saturating_sub(ahead.into_iter().max().unwrap_or(0));
        Some((ttl, Duration::from_millis(now() + first)))
    }

    /// The time to live of a value that one with this clock writes now.
    fn time_to_live(&self, key: &str, value: u64, whose: usize) -> Option<u64> {
        let (ttl, end) = self.lifetime(whose)?;
        self.ends.note(end, key, value);
        Some(ttl)
    }

    fn lasting(&self, key: &str, value: u64, client: &Client) -> Result<Packed, Error> {
        let packed = self.value(value);
        match self.time_to_live(key, value, CLIENT) {
            Some(ttl) => client.lasting(&packed, Duration::from_millis(ttl)),
            None => Ok(packed),
        }
    }

    /// Begins what happens by itself, before any clock says so.
    fn note_ends(&self, elapsed: Duration) {
        self.ends.0.lock().unwrap().retain(|(end, key, value)| {
            let is_coming = *end > elapsed + TICK;
            if !is_coming {
                self.history.begin(key, Operation::Expiry(*value));
            }
            is_coming
        });
    }

    fn packed(&self, content: Content) -> Packed {
        content.map_or_else(Packed::default, |number| self.value(number))
    }

    /// Whether a node ever said that it cannot vouch for this key's part.
    fn is_doubted(&self, key: &str) -> bool {
        let ring = self.ring();
        let owner = ring.name(ring.owner(key.as_bytes()));
        let doubts = self.doubts.borrow();
        doubts
            .iter()
            .any(|doubt| doubt.starts_with(&format!("{owner}'s keys: ")))
    }

    /// Whether a key was doubted and did show wrong answers.
    fn was_rightly_doubted(&self) -> bool {
        let told = self.history.check_but(|key| !self.is_doubted(key));
        told.is_err()
    }

    /// Whether every answer was right, or else somebody said that it might not be.
    fn check(&self) -> Result<(), String> {
        if self.forgetful {
            return self.history.check_but(|key| {
                let part = self.ring().owner(key.as_bytes());
                self.is_doubted(key) || self.unseen.borrow().contains(&part)
            });
        }
        self.history.check()?;
        self.history.check_calm()?;
        let doubts = self.doubts.borrow();
        let alarm = doubts.first();
        alarm.map_or(Ok(()), |doubt| Err(format!("a false alarm: {doubt}")))
    }
}

/// A value that is large at times, where memory is little.
fn value(number: u64, is_memory_little: bool) -> Packed {
    let long = is_memory_little && number % 3 == 0;
    Packed::of(match long {
        true => Value::Array(vec![number.into(), "x".repeat(150).into()]),
        false => number.into(),
    })
}

pub fn dial() -> Dial {
    Arc::new(|node| {
        let address = node.address.clone();
        Box::pin(async move {
            let stream = insist(|| TcpStream::connect(address.clone())).await?;
            Ok(Box::new(stream) as Box<dyn Connection>)
        })
    })
}

/// What stands in a file.
pub fn file_of(names: &[&str], leaving: &[&str]) -> Arc<Cluster> {
    let table = |names: &[&str]| {
        let lines = names.iter().map(|name| format!("{name} = \"{name}:54\"\n"));
        lines.collect::<String>()
    };
    let (nodes, leaving, window) = (table(names), table(leaving), WINDOW.as_millis());
    let file = format!("[nodes]\n{nodes}[leaving]\n{leaving}[limits]\nwindow = \"{window}ms\"");
    Arc::new(Cluster::parse("cluster.toml".as_ref(), &file).unwrap())
}

async fn node(world: Rc<World>, number: usize) -> turmoil::Result {
    let listener = TcpListener::bind("0.0.0.0:54").await?;
    let mut cluster = (*world.file(Some(NAMES[number]))).clone();
    if let Some(memory) = &world.memory {
        cluster.limits.memory = memory[number];
    }
    let mut nodes = cluster.nodes().iter().chain(cluster.leaving());
    let place = nodes.position(|node| node.name == NAMES[number]).unwrap();
    let Some(disks) = &world.disks else {
        let store = Arc::new(Store::new(Arc::new(cluster), place));
        has_heard(&world, &store);
        return serve_on(world.adopt(number, store), listener, world.clock(number)).await;
    };
    let (disk, cluster) = (disks[number].clone(), Arc::new(cluster));
    let adopt = |store| world.adopt(number, store);
    serve_from(
        &disk,
        (cluster, place),
        adopt,
        listener,
        world.clock(number),
    )
    .await
}

/// A node with a disk.
async fn serve_from(
    disk: &Ram,
    (cluster, place): (Arc<Cluster>, usize),
    adopt: impl FnOnce(Arc<Store>) -> Arc<Store>,
    listener: TcpListener,
    clock: Option<Clock>,
) -> turmoil::Result {
    let (store, mut log) = Disk::open(cluster, place, || Ok(disk.clone()), SEGMENT)?;
    disk.settle();
    let store = adopt(Arc::new(store));
    tokio::select! {
        biased; // else a seed would not replay
        served = serve_on(store.clone(), listener, clock) => served,
        // Whoever broke it starts the node again.
        failed = log.write(&store) => failed.or_else(|error| match error.to_string().contains("is kept as aside") {
            true => Ok(()),
            false => Err(error.into()),
        }),
    }
}

/// Whether its disk, if it has one, has all that it keeps.
fn is_settled(store: &Store) -> bool {
    let settled = store
        .journal()
        .map(|journal| journal.all_settled().now_or_never());
    settled.is_none_or(|settled| settled.is_some())
}

/// A node that has forgotten everything may have answered before.
fn has_heard(world: &World, store: &Store) {
    // It may have answered before, in a state that it does not know yet.
    let part = store.at(0).place() as u64;
    let [part, cursor] = [part, 0].map(|number| encode(&number.into()));
    if store.at(0).scan(&part, &[&cursor]).is_ok() {
        let wrong = format!("{} answered before it had heard", store.name());
        world.wronged.borrow_mut().get_or_insert(wrong);
    }
}

pub async fn serve(store: Arc<Store>) -> turmoil::Result {
    let listener = TcpListener::bind("0.0.0.0:54").await?;
    store.forget_from(usize::MAX); // a story drives its changes itself
    serve_on(store, listener, None).await
}

/// The same of the first node of a ring, which has a disk.
pub async fn serve_first(disk: Ram, cluster: Arc<Cluster>) -> turmoil::Result {
    let listener = TcpListener::bind("0.0.0.0:54").await?;
    serve_from(&disk, (cluster, 0), |store| store, listener, None).await
}

async fn serve_on(
    store: Arc<Store>,
    listener: TcpListener,
    clock: Option<Clock>,
) -> turmoil::Result {
    let node = Node::new(store, TIMEOUT, &dial());
    if let Some(clock) = clock {
        node.client.replicas.go_by(clock);
    }
    let incoming = pin!(stream::unfold(listener, async |listener| {
        let accepted: io::Result<_> = listener.accept().await;
        let accepted = accepted.map(|(stream, _)| connected(Box::new(stream)));
        Some((accepted, listener))
    }));
    let (never, limits) = (CancellationToken::new(), || node.store.limits());
    node.live(admit(incoming, limits), never).await;
    Ok(())
}

/// Changes the ring to the one that is wanted, whenever another one is.
async fn driver(world: Rc<World>, number: usize) -> turmoil::Result {
    loop {
        let target = world.target.borrow().clone();
        let is_same = |file: &Arc<Cluster>| file.names() == world.ring().names();
        let again = target.as_ref().is_some_and(is_same);
        // Two would change again and again into the same names.
        if let Some(file) = target.filter(|_| number == 0 || !again) {
            let replicas = Replicas::new(file.clone(), TIMEOUT, &dial());
            if let Some(clock) = world.clock(number) {
                replicas.go_by(clock);
            }
            let driver = Driver {
                client: &Client { replicas },
                file: &file,
                again,
                rest: 1,
                progress: |progress| world.note_progress(&progress, &file),
            };
            let done = match driver.plan().await {
                Ok(plan) => driver.carry_out(&plan).await,
                Err(error) => Err(error),
            };
            if done.is_ok() {
                world.end(&file);
            }
        }
        tokio::time::sleep(Duration::from_millis(fastrand::u64(1..100))).await;
    }
}

/// Reads and writes until all is calm, then reads every key a last time.
async fn client(world: Rc<World>, first: bool, coordinates: bool) -> turmoil::Result {
    let client = Client {
        replicas: Replicas::new(world.file(None), TIMEOUT, &dial()),
    };
    if let Some(clock) = world.clock(CLIENT) {
        client.replicas.go_by(clock);
    }
    let all = file_of(&NAMES, &[]);
    let mut all: Vec<_> = all.nodes().iter().collect();
    all.sort_by_key(|node| NAMES.iter().position(|name| *name == node.name));
    let peers: Vec<Peer> = all
        .into_iter()
        .map(|node| Peer::new(node, TIMEOUT, dial()))
        .collect();
    let mut seen: BTreeMap<&str, Content> = BTreeMap::new();
    while !world.calm.get() {
        let key = &world.keys[fastrand::usize(..world.keys.len())];
        let last = seen.get(&**key).copied().flatten();
        let operation = world.operation(key, last, first, coordinates);
        let (began, before) = (world.history.begin(key, operation), client.replicas.state());
        let asked = turmoil::sim_elapsed();
        if let (true, Some(value)) = (first, brought(operation)) {
            *world.written.borrow_mut() = Some((key.clone(), value));
        }
        let answer = if coordinates {
            ask_majority(&world, &client, key, began, operation).await
        } else {
            let nodes = world.nodes();
            let node = nodes[fastrand::usize(..nodes.len())];
            ask_node(&world, &peers[node], node, key, operation).await
        };
        if let Err(error) = &answer {
            world.note_full(operation, error);
        }
        let failed = matches!(&answer, Err(error) if error.kind != Kind::Full);
        let busy = matches!(&answer, Err(error) if error.why.contains(": busy: "));
        if let (Operation::Set(Some(_)), true, Ok(_)) = (operation, coordinates, &answer) {
            world.note_stamp(&before, &client, key);
        }
        let is_silent = is_silent(operation, &answer);
        let end = end(operation, answer);
        if !is_silent {
            world.history.end(began, end);
        }
        match end {
            End::Got(content) | End::Replaced(content) => drop(seen.insert(key, content)),
            End::Done => drop(seen.insert(key, brought(operation))),
            End::Refused | End::Unknown => {}
        }
        let was_halved = world.halved.get() >= asked;
        if failed && (!coordinates || was_halved && end == End::Refused) {
            world.blameless.set(world.blameless.get() + 1);
        } else if failed && is_swap(operation) && end == End::Refused {
            world.outrun.set(world.outrun.get() + 1);
        } else if failed && busy {
            world.busy.set(world.busy.get() + 1);
        }
        tokio::time::sleep(Duration::from_millis(fastrand::u64(..world.pace))).await;
    }
    if coordinates {
        for key in &world.keys {
            let began = world.history.begin(key, Operation::Get);
            let answer = ask_majority(&world, &client, key, began, Operation::Get).await;
            world.history.end(began, end(Operation::Get, answer));
        }
    }
    Ok(())
}

/// The value that is there once this is done.
fn brought(operation: Operation) -> Content {
    match operation {
        Operation::Set(new) | Operation::Cas { new, .. } => new,
        Operation::Get | Operation::Replace | Operation::Renew | Operation::Expiry(_) => None,
    }
}

async fn ask_majority(
    world: &World,
    client: &Client,
    key: &str,
    began: usize,
    operation: Operation,
) -> Result<End, Error> {
    let bytes = key.as_bytes();
    match operation {
        Operation::Get | Operation::Expiry(_) => got(&client.get(bytes).await?),
        Operation::Renew => {
            let (ends, lifetime) = (&world.ends, world.lifetime(CLIENT));
            let until = lifetime.map(|(ttl, _)| client.replicas.now() + ttl);
            let renew = |old: &Packed| {
                let value = content(&old.value().unwrap())?;
                if let Some((_, end)) = lifetime {
                    ends.note(end, key, value);
                }
                Some(old.clone().until(until))
            };
            let (Swapped::Done(value) | Swapped::Not(value)) = client.swap(bytes, renew).await?;
            got(&value)
        }
        Operation::Set(Some(value)) => {
            let value = world.lasting(key, value, client)?;
            client.set(bytes, &value).await.map(|()| End::Done)
        }
        Operation::Set(None) => client.delete(bytes).await.map(|()| End::Done),
        Operation::Cas { expected, new } => {
            let expected = world.packed(expected);
            let new = match new {
                Some(new) => world.lasting(key, new, client)?,
                None => Packed::default(),
            };
            let swapped = match fastrand::bool() {
                true => client.cas(bytes, &expected, &new).await?,
                false => {
                    client
                        .swap(bytes, |value| (*value == expected).then(|| new.clone()))
                        .await?
                }
            };
            match swapped {
                Swapped::Done(value) if value == new.clone().plain() => Ok(End::Done),
                Swapped::Done(value) => panic!("{value:?} is not the new value {new:?}"),
                Swapped::Not(value) => got(&value),
            }
        }
        Operation::Replace => {
            let (history, next) = (&world.history, &world.next_value);
            let little = world.memory.is_some();
            let swap = |old: &Packed| {
                let new = next.fetch_add(1, Relaxed) + 1;
                history.made(began, content(&old.value().unwrap()), new);
                Some(value(new, little))
            };
            match client.swap(bytes, swap).await? {
                Swapped::Done(value) => Ok(End::Replaced(content(&value.value()?))),
                Swapped::Not(value) => got(&value),
            }
        }
    }
}

async fn ask_node(
    world: &World,
    peer: &Peer,
    node: usize,
    name: &str,
    operation: Operation,
) -> Result<End, Error> {
    let key = encode(&name.into());
    let answer = match operation {
        Operation::Get | Operation::Replace | Operation::Renew | Operation::Expiry(_) => {
            peer.call("get", &[&key])
        }
        Operation::Set(Some(value)) => match world.time_to_live(name, value, node) {
            Some(ttl) => peer.call("set", &[&key, &world.value(value), &encode(&ttl.into())]),
            None => peer.call("set", &[&key, &world.value(value)]),
        },
        Operation::Set(None) => peer.call("delete", &[&key]),
        Operation::Cas { expected, new } => {
            let ttl = new.and_then(|new| world.time_to_live(name, new, node));
            let (expected, new) = (world.packed(expected), world.packed(new));
            match ttl {
                Some(ttl) => peer.call("cas", &[&key, &expected, &new, &encode(&ttl.into())]),
                None => peer.call("cas", &[&key, &expected, &new]),
            }
        }
    };
    let answer = decode(&answer.await.1?)?;
    Ok(match (operation, answer.as_array().map(Vec::as_slice)) {
        (Operation::Set(_), _)
        | (Operation::Cas { .. }, Some([Value::Boolean(true), Value::Nil])) => End::Done,
        (Operation::Cas { .. }, Some([Value::Boolean(false), value])) => End::Got(content(value)),
        (Operation::Cas { .. }, _) => panic!("cas was answered with {answer}"),
        _ => End::Got(content(&answer)),
    })
}

/// What time it is, in the simulation, and in milliseconds.
fn now() -> u64 {
    let elapsed = turmoil::sim_elapsed().unwrap_or_default();
    u64::try_from(elapsed.as_millis()).unwrap()
}

fn got(value: &Packed) -> Result<End, Error> {
    Ok(End::Got(content(&value.value()?)))
}

fn end(operation: Operation, answer: Result<End, Error>) -> End {
    match answer {
        Ok(end) => end,
        Err(error) if error.kind == Kind::UnknownOutcome && operation != Operation::Get => {
            End::Unknown
        }
        Err(_) => End::Refused,
    }
}

/// Whether a node that was asked to write did not answer. Its connection may have been cut before, or be one to the
/// process before this one: then the write never ends, which is unknown, too.
fn is_silent(operation: Operation, answer: &Result<End, Error>) -> bool {
    let ends = |why| matches!(answer, Err(error) if error.why.ends_with(why));
    is_swap(operation) && ends(":54: no answer in time")
        || operation != Operation::Get && ends(":54: connection reset")
}

fn is_swap(operation: Operation) -> bool {
    matches!(
        operation,
        Operation::Cas { .. } | Operation::Replace | Operation::Renew
    )
}

fn content(value: &Value) -> Content {
    let number = value.as_array().map_or(value, |long| &long[0]);
    assert!(number.is_nil() || number.is_u64(), "nobody wrote {value}");
    number.as_u64()
}

/// What befalls the ring, and for how long.
struct Trouble<'a> {
    world: Rc<World>,
    sim: Sim<'a>,
    rng: Rng,
    clients: usize,
    usual: Duration, // the longest that a message takes on a healthy link
    ill: BTreeMap<usize, (Ill, Duration)>,
    crashes: usize,
    cuts: usize,
    slow: usize,
    dead: usize,
    blackouts: usize,
    started: Vec<usize>,
}

/// What a node suffers from. The first two have lost their memory.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Ill {
    Down,
    Joining,
    Cut,
    Recovering, // its links work again, but connections that lost something are still to break
}

/// Which messages of a cut link are lost: the node's own, those to it, or both.
#[derive(Clone, Copy)]
enum Way {
    Out,
    In,
    Both,
}

impl Trouble<'_> {
    fn run(&mut self) -> Result<(), String> {
        self.pass(PATIENCE, "getting ready", |trouble| {
            trouble
                .world
                .nodes()
                .into_iter()
                .all(|node| trouble.is_ready(node))
        })?;
        let end = self.sim.elapsed() + TROUBLE;
        let mut next = self.sim.elapsed();
        while self.sim.elapsed() < end {
            self.sim.step().map_err(|error| error.to_string())?;
            self.world.note_steps();
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
            trouble.ill.is_empty() && trouble.world.target.borrow().is_none()
        })?;
        if self.world.swaps != Swaps::None {
            if self.world.disks.is_some() {
                // Who waits over a link that was cut for a node that then lost its power learns of nothing before.
                let end = self.sim.elapsed() + TIMEOUT;
                self.pass(PATIENCE, "giving up", |trouble| trouble.sim.elapsed() > end)?;
            }
            self.world.history.calm();
            let end = self.sim.elapsed() + CALM;
            self.pass(PATIENCE, "calm", |trouble| trouble.sim.elapsed() > end)?;
        }
        self.world.calm.set(true);
        self.pass(PATIENCE, "answering the last questions", |trouble| {
            (0..trouble.clients).all(|n| !trouble.sim.is_host_running(client_name(n)))
        })?;
        self.pass(REPAIR, "making copies equal", |trouble| {
            trouble.copies_are_equal()
        })
    }

    /// What happened, in one line; an error if too little of it succeeded.
    fn report(&self, seed: u64) -> Result<String, String> {
        let Trouble {
            world,
            crashes,
            cuts,
            slow,
            dead,
            blackouts,
            ..
        } = self;
        let (size, tally) = (world.ring().nodes().len(), world.history.tally());
        let (blameless, full) = (world.blameless.get(), world.full.get());
        let line = format!(
            "seed {seed}: ring of {size}{}, done {}, refused {}, unknown {}, ended {}, blameless {blameless}, \
             swapped {}, unknown swaps {}, outrun {}, full {full}, changes {}, rounds {}, crashes {crashes}, cuts {cuts}, slow {slow}, dead {dead}, blackouts {blackouts}, forgetful {}, doubts {}, \
             wrong {}, fingerprint {}",
            if world.harsh { " in harsh times" } else { "" },
            tally.done,
            tally.refused,
            tally.unknown,
            tally.ended,
            tally.swapped,
            tally.unknown_swaps,
            world.outrun.get(),
            world.changes.get(),
            (world.latest_step() / 2).saturating_sub(world.changes.get() as u64),
            u8::from(world.forgetful),
            world.doubts.borrow().len(),
            u8::from(world.forgetful && world.was_rightly_doubted()),
            world.history.fingerprint(),
        );
        // What a dying client leaves open, and what was asked of a failed node, is nobody's fault; nor
        // is it that clients which do not take turns hide each other's swaps: an owner does its own
        // without the network in between, and may outrun such a client for as long as it tries.
        let all = tally.done + tally.refused + tally.unknown;
        let outrun = world.outrun.get().min(tally.swapped / 20);
        let fair = all.saturating_sub(blameless + full + dead + tally.unknown_swaps + outrun);
        // During a change a small node holds keys of two rings: a few sets wait for memory to the end.
        let busy = world.busy.get().min(tally.done / 10);
        let wanted = match size {
            _ if world.disks.is_some() => 10,
            _ if world.resizes && !world.harsh => fair.saturating_sub(busy) * 97 / 100,
            _ if world.resizes => 30,
            1 => fair,
            2 => 10,
            _ if world.forgetful => 10,
            _ if world.harsh => 30,
            _ => (fair * 99 / 100).max(30),
        };
        match tally.done >= wanted {
            true => Ok(line),
            false => Err(format!("too little succeeded: {line}")),
        }
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
            self.world.note_ends(self.sim.elapsed());
            self.world.note_changes();
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
            .is_some_and(|store| store.status().state != "joining" && is_settled(store))
    }

    /// Whether two nodes hold copies of the same keys.
    fn share(&self, one: usize, other: usize) -> bool {
        let shares = |ring: &Arc<Cluster>| ring.neighbours(NAMES[one]).contains(&NAMES[other]);
        self.world.rings().iter().any(shares)
    }

    /// Whether this may happen to a node: in ordinary times one of a key's replicas is ill at
    /// a time; and never have two of them lost their memory, for then nothing is promised.
    fn may_suffer(&self, node: usize, ill: Ill) -> bool {
        !self.world.is_alone(node)
            && !self.ill.contains_key(&node)
            && self.ill.iter().all(|(other, (others, _))| {
                if self.world.forgetful {
                    return true;
                }
                let both_forget = ill == Ill::Down && matches!(others, Ill::Down | Ill::Joining);
                !self.share(node, *other) || self.world.harsh && !both_forget
            })
    }

    fn befall(&mut self) {
        let nodes = self.world.nodes();
        let node = nodes[self.rng.usize(..nodes.len())];
        let client = client_name(self.rng.usize(..self.clients));
        let way = [Way::Out, Way::In, Way::Both][self.rng.usize(..3)];
        if self.world.resizes && self.rng.u8(..3) == 0 {
            return self.resize();
        }
        if self.world.disks.is_some() && self.rng.u8(..3) == 0 {
            return self.lose_power();
        }
        match self.rng.u8(..16) {
            0..8 if self.world.forgetful => self.forget(node),
            4.. if self.world.lonely => self.desert(),
            0..4 => {
                let longest = if self.rng.bool() { 20 } else { 1500 };
                self.crash(node, longest);
            }
            4..8 => self.cut(node, &self.everybody_else(node), way, 100..2500),
            8 => self.slow_down(node, &self.everybody_else(node)),
            9 => {
                // It dies in the middle of whatever it does, and another takes its place.
                self.sim.crash(&*client);
                self.sim.bounce(&*client);
                self.dead += 1;
            }
            10..12 => self.cut(node, &[client], way, 100..2500),
            _ if self.world.harsh => self.desert(),
            _ => {}
        }
    }

    /// Another ring is wanted: its file is there, and its new nodes are started. If one is wanted
    /// already, who drives the change may be killed, and begins again.
    fn resize(&mut self) {
        let world = self.world.clone();
        if world.target.borrow().is_some() {
            if self.rng.bool() {
                let driver = driver_name(self.rng.usize(..DRIVERS));
                self.sim.crash(&*driver);
                self.sim.bounce(&*driver);
            }
            return;
        }
        let (old, mut names) = (world.ring(), NAMES.to_vec());
        self.rng.shuffle(&mut names);
        names.truncate(self.rng.usize(1..=NAMES.len()));
        let is_gone = |name: &&str| !names.contains(name);
        let leaving: Vec<&str> = old.names().into_iter().filter(is_gone).collect();
        let file = file_of(&names, &leaving);
        for (node, name) in NAMES.iter().enumerate() {
            if names.contains(name)
                && !self.sim.is_host_running(*name)
                && !self.ill.contains_key(&node)
            {
                self.started.push(node);
            }
        }
        *world.former.borrow_mut() = old.clone();
        *world.target.borrow_mut() = Some(file.clone());
        for node in std::mem::take(&mut self.started) {
            if let Some(disks) = &world.disks {
                disks[node].lose(); // it has left before, and comes as a new one
            }
            self.sim.bounce(NAMES[node]);
        }
        for store in world.stores.borrow().values() {
            if old.nodes().len() == 1 || self.rng.bool() {
                store.rings.read_again(file.clone());
            }
        }
    }

    /// Stops the nodes that have left the ring. One that comes again is started anew if it has not
    /// heard of the end of the change in which it left: it takes nothing that is so much later.
    fn stop_leavers(&mut self) {
        let latest = self.world.latest_step();
        for (node, name) in NAMES.iter().enumerate() {
            if !self.world.resizes
                || self.ill.contains_key(&node)
                || !self.sim.is_host_running(*name)
            {
                continue;
            }
            let step = self
                .world
                .stores
                .borrow()
                .get(&node)
                .map(|store| store.rings.known().state.step);
            let is_member = self.world.ring().place(name).is_some();
            if !self.world.is_asked(name) {
                if self.rng.u8(..100) == 0 {
                    self.sim.crash(*name);
                    self.world.stores.borrow_mut().remove(&node);
                }
            } else if !is_member && step.is_some_and(|step| step % 2 == 1 && step + 1 < latest) {
                self.sim.crash(*name);
                if let Some(disks) = &self.world.disks {
                    disks[node].lose();
                }
                self.sim.bounce(*name);
            }
        }
    }

    /// A client reaches one replica of a key well, another late or not at all and the third
    /// not at all. Just when the first one has what the others have not, it may lose its
    /// memory: the way to lose a write that two replicas have confirmed.
    fn desert(&mut self) {
        let client = client_name(0); // one that asks the replicas itself
        let rings = self.world.rings();
        let cluster = &rings[self.rng.usize(..rings.len())];
        let key = self.world.keys[self.rng.usize(..self.world.keys.len())].clone();
        let part = cluster.owner(key.as_bytes());
        let mut replicas: Vec<usize> = cluster
            .replicas(part)
            .map(|place| number_of(cluster, place))
            .collect();
        self.rng.shuffle(&mut replicas);
        let [first, late, gone] = replicas[..] else {
            return;
        };
        if !self.may_suffer(first, Ill::Down)
            || !self.may_suffer(late, Ill::Cut)
            || !self.may_suffer(gone, Ill::Cut)
        {
            return;
        }
        if self.rng.bool() {
            self.slow_down(late, std::slice::from_ref(&client));
        } else {
            self.cut(late, std::slice::from_ref(&client), Way::In, 800..2000);
        }
        self.cut(gone, &[client], Way::Both, 2000..4000);
        let forgets = self.rng.u8(..4) > 0;
        let end = self.sim.elapsed() + Duration::from_secs(2);
        while forgets && self.sim.elapsed() < end && self.sim.step().is_ok() {
            self.recover();
            if self.has_what_is_written(first, &key) && !self.has_what_is_written(late, &key) {
                return self.crash(first, 5);
            }
        }
    }

    /// A node and its successor lose their memories, one after the other and perhaps at once, after
    /// a time in which they were the only two that clients could reach. Perhaps the third follows.
    fn forget(&mut self, node: usize) {
        let size = self.world.ring().nodes().len();
        let [next, third] = [1, 2].map(|step| (node + step) % size);
        let clients: Vec<String> = (0..self.clients).map(client_name).collect();
        if third != node && self.rng.bool() {
            self.cut(third, &clients, Way::Both, 300..1500);
        }
        let all = self.rng.u8(..3) == 0;
        for node in [node, next, third]
            .into_iter()
            .take(if all { 3 } else { 2 })
        {
            let end = self.sim.elapsed() + self.milliseconds(0..1000);
            while self.sim.elapsed() < end && self.sim.step().is_ok() {
                self.recover();
            }
            self.crash(node, 300);
        }
    }

    /// Notes the parts whose last memory goes with this node while nobody can have seen it: every
    /// other replica is down, was started so little before that it has not heard this node yet, or
    /// was cut off and knows of no entry there: for that one, this is how a part first starts.
    fn note_what_nobody_sees(&self, node: usize) {
        let (cluster, now) = (&self.world.ring(), self.sim.elapsed());
        let sees = |other: usize| match self.ill.get(&other) {
            Some((Ill::Down, _)) => false,
            Some((Ill::Joining, since)) => now > *since + HEARD,
            _ => true,
        };
        let stores = self.world.stores.borrow();
        let knows = |other: usize, part| {
            let store = stores.get(&other);
            store.is_some_and(|store| store.at(0).parts_with_entries().contains(&part))
        };
        for part in 0..cluster.nodes().len() {
            let replicas: Vec<usize> = cluster
                .replicas(part)
                .map(|place| number_of(cluster, place))
                .collect();
            let mut others = replicas.iter().filter(|other| **other != node);
            if replicas.contains(&node) && !others.any(|other| sees(*other) && knows(*other, part))
            {
                self.world.unseen.borrow_mut().insert(part);
            }
        }
    }

    /// Whether a node has the value that the first client is writing to the key at this moment.
    fn has_what_is_written(&self, node: usize, key: &str) -> bool {
        let (stores, written) = (self.world.stores.borrow(), self.world.written.borrow());
        let loaded = stores
            .get(&node)
            .and_then(|store| store.at(0).load(key.as_bytes(), None).ok());
        let value = written
            .as_ref()
            .filter(|(written, _)| written == key)
            .map(|(_, value)| *value);
        let held = loaded.and_then(|loaded| content(&loaded.value?.plain().value().ok()?));
        value.is_some() && value == held
    }

    fn crash(&mut self, node: usize, longest: u64) {
        if self.may_suffer(node, Ill::Down) {
            self.note_what_nobody_sees(node);
            self.stop(node);
            if let Some(disks) = &self.world.disks {
                disks[node].kill(&mut self.rng);
            }
            let until = self.sim.elapsed() + self.milliseconds(0..longest);
            self.ill.insert(node, (Ill::Down, until));
            self.crashes += 1;
        }
    }

    /// Power is lost: that of all nodes, or of one, which may lose its disk as well if no other one has to catch up. Or
    /// it is only a process that ends.
    fn lose_power(&mut self) {
        let world = self.world.clone();
        let disks = world.disks.as_deref().unwrap_or_default();
        let nodes = world.nodes();
        let one = nodes[self.rng.usize(..nodes.len())];
        let is_down = |node: &usize| matches!(self.ill.get(node), Some((Ill::Down, _)));
        let (nodes, way) = match self.rng.u8(..6) {
            0..3 => (nodes, 3),
            way => (vec![one], way),
        };
        let nodes: Vec<usize> = nodes.into_iter().filter(|node| !is_down(node)).collect();
        let may_forget = self.may_suffer(one, Ill::Down);
        for node in nodes {
            match way {
                5 if may_forget && self.rng.bool() => {
                    let part = [Part::Bytes, Part::Names][self.rng.usize(..2)];
                    disks[node].break_down(part); // its process ends by itself
                }
                _ => self.stop(node),
            }
            self.mend(node);
            match way {
                3 => disks[node].cut(&mut self.rng),
                4 if may_forget && self.rng.bool() => disks[node].lose(),
                4 if may_forget => disks[node].damage(&mut self.rng),
                _ if self.world.stores.borrow().contains_key(&node) => {}
                _ => disks[node].kill(&mut self.rng),
            }
            let until = self.sim.elapsed() + self.milliseconds(0..400);
            self.ill.insert(node, (Ill::Down, until));
        }
        self.blackouts += usize::from(way == 3);
    }

    /// Ends a node's process.
    fn stop(&mut self, node: usize) {
        self.sim.crash(NAMES[node]);
        let store = self.world.stores.borrow_mut().remove(&node);
        let doubts = store.map(|store| store.status().doubts);
        let mut all = self.world.doubts.borrow_mut();
        all.extend(doubts.unwrap_or_default());
    }

    /// Cuts a node off from these for a while.
    fn cut(&mut self, node: usize, from: &[String], way: Way, milliseconds: Range<u64>) {
        if self.may_suffer(node, Ill::Cut) {
            for other in from {
                match way {
                    Way::Out => self.sim.partition_oneway(NAMES[node], &**other),
                    Way::In => self.sim.partition_oneway(&**other, NAMES[node]),
                    Way::Both => self.sim.partition(NAMES[node], &**other),
                }
            }
            let until = self.sim.elapsed() + self.milliseconds(milliseconds);
            self.ill.insert(node, (Ill::Cut, until));
            self.cuts += 1;
        }
    }

    fn slow_down(&mut self, node: usize, towards: &[String]) {
        if self.may_suffer(node, Ill::Cut) {
            let latency = self.milliseconds(if self.world.lonely { 90 } else { 40 }..145);
            for other in towards {
                self.sim.set_link_latency(NAMES[node], &**other, latency);
            }
            let until = self.sim.elapsed() + self.milliseconds(100..2500);
            self.ill.insert(node, (Ill::Cut, until));
            self.slow += 1;
        }
    }

    fn is_ill(&self, name: &str) -> bool {
        self.ill.keys().any(|node| NAMES[*node] == name)
    }

    /// Ends what has lasted long enough.
    fn recover(&mut self) {
        self.world.note_ends(self.sim.elapsed());
        let is_halved = |ring: &Arc<Cluster>| {
            let mut names = ring.names().into_iter();
            ring.nodes().len() == 2 && names.any(|name| self.is_ill(name))
        };
        if self.world.rings().iter().any(is_halved) {
            self.world.halved.set(Some(self.sim.elapsed()));
        }
        let now = self.sim.elapsed();
        self.stop_leavers();
        for (node, (ill, until)) in self.ill.clone() {
            let is_over = now >= until || !self.world.is_asked(NAMES[node]);
            if let (Ill::Down, true, Some(disks)) = (ill, is_over, &self.world.disks) {
                disks[node].mend(); // where it has broken, its node is stopped
            }
            match ill {
                Ill::Down if !self.world.is_asked(NAMES[node]) => drop(self.ill.remove(&node)), // it has left
                Ill::Down if now >= until => {
                    if self.world.stores.borrow().contains_key(&node) {
                        self.stop(node);
                    }
                    self.sim.bounce(NAMES[node]);
                    self.ill.insert(node, (Ill::Joining, until));
                }
                // With disks it may have been cut as well.
                Ill::Joining if self.is_ready(node) && self.world.disks.is_some() => {
                    self.ill.insert(node, (Ill::Recovering, now + 2 * WINDOW));
                }
                Ill::Joining if self.is_ready(node) => drop(self.ill.remove(&node)),
                Ill::Cut if now >= until => {
                    self.mend(node);
                    self.ill.insert(node, (Ill::Recovering, now + 2 * WINDOW));
                }
                Ill::Recovering if now >= until => drop(self.ill.remove(&node)),
                _ => {}
            }
        }
    }

    /// A node's links work again.
    fn mend(&mut self, node: usize) {
        for other in self.everybody_else(node) {
            let (other, quick) = (&*other, Duration::from_millis(1));
            self.sim.repair(NAMES[node], other);
            self.sim.set_link_latency(NAMES[node], other, quick);
            self.sim
                .set_link_max_message_latency(NAMES[node], other, self.usual);
        }
    }

    fn everybody_else(&self, node: usize) -> Vec<String> {
        let others = NAMES.iter().filter(|name| **name != NAMES[node]);
        let others = others.filter(|name| self.world.resizes || self.world.is_asked(name));
        let drivers = (0..DRIVERS).filter(|_| self.world.resizes).map(driver_name);
        let others = others.map(ToString::to_string).chain(drivers);
        others.chain((0..self.clients).map(client_name)).collect()
    }

    fn copies_are_equal(&self) -> bool {
        let mut seen = BTreeMap::new();
        let stores = self.world.stores.borrow();
        let in_ring = |store: &&Arc<Store>| self.world.is_asked(store.name());
        stores.values().filter(in_ring).all(|store| {
            let digests = store.status().digests;
            digests
                .into_iter()
                .all(|(part, digest)| *seen.entry(part).or_insert_with(|| digest.clone()) == digest)
        })
    }
}

/// Which step each node knows.
fn asked_steps(stores: &BTreeMap<usize, Arc<Store>>) -> Vec<(&str, u64)> {
    let steps = stores
        .values()
        .map(|store| (store.name(), store.rings.known().state.step));
    steps.collect()
}

/// The number of the node at this place of a ring.
fn number_of(ring: &Cluster, place: usize) -> usize {
    let name = ring.name(place);
    NAMES.iter().position(|known| *known == name).unwrap()
}

fn driver_name(number: usize) -> String {
    format!("driver{number}")
}

fn client_name(number: usize) -> String {
    format!("client{number}")
}

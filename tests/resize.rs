//! The ring changes while it runs: it grows and shrinks under load, whoever is killed; bad input
//! changes nothing; every command goes on, with the old file and with the new one.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
use std::ops::Range;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use common::history::{End, History, Operation};
use common::wire::{NIL, array};
use common::{Cluster, FIVE, Node, Said, block_on};
use futures::future::join_all;
use kv54::client::Client;
use kv54::cluster::{State, Told};
use kv54::entry::Packed;
use kv54::error::{Error, Kind};
use kv54::rpc::codec::{decode, encode};
use kv54::rpc::{Peer, tcp};
use kv54::status::Status;
use msgpack_rpc::Value;
use serde_json::{Value as Json, json};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

/// Long enough for anything that will happen at all.
const PATIENCE: Duration = Duration::from_secs(30);

const SEVEN: [&str; 7] = ["alice", "bob", "carol", "dave", "erin", "frank", "grace"];

#[test]
fn what_cannot_be_done_is_one_line_and_changes_nothing() {
    let cluster = three_and_others("window = \"500ms\"");
    cluster.ring_file("four.toml", &SEVEN[..4], &[]);
    let before = state_of(&cluster);
    let refused = |file: &str, parts: &[&str]| {
        let said = resize(&cluster, file).exits(2).says(parts);
        assert!(!said.err.contains("bad-request"), "{said:?}");
        assert_eq!(state_of(&cluster), before, "{file}");
    };

    // A file that is wrong in itself.
    cluster.ring_file("both.toml", &SEVEN[..3], &["bob"]);
    refused(
        "both.toml",
        &["both.toml:", "leaving.bob", "not in [nodes]"],
    );
    cluster.ring_file("none.toml", &[], &["alice", "bob", "carol"]);
    refused("none.toml", &["none.toml:", "at least one node"]);

    // A file that does not fit what runs.
    let nothing = "nothing is changed";
    cluster.ring_file("alone.toml", &["frank", "grace"], &[]);
    refused(
        "alone.toml",
        &["no node of a running ring answers", "frank", nothing],
    );
    cluster.ring_file("two.toml", &["alice", "bob"], &[]);
    refused(
        "two.toml",
        &["carol", "neither in [nodes] nor in [leaving]", nothing],
    );
    refused(
        "four.toml",
        &["dave: ", &cluster.address("dave"), "start it", nothing],
    );
    let (dave, carol) = (cluster.address("dave"), cluster.address("carol"));
    let four = std::fs::read_to_string(cluster.dir.join("four.toml")).unwrap();
    let swapped = four.replace(&format!("carol = {carol:?}\n"), "");
    cluster.file("swapped.toml", &swapped.replace(&dave, &carol));
    refused(
        "swapped.toml",
        &["dave: carol answers in the place of dave", nothing],
    );
    cluster.file("window.toml", &four.replace("500ms", "2s"));
    refused(
        "window.toml",
        &["window of 2000 ms", "500 ms", "the same", nothing],
    );

    // A newcomer of an older version.
    let older = TcpListener::bind(&dave).unwrap();
    thread::spawn(move || answer_as_an_older_version(&older));
    refused("four.toml", &["dave: ", &dave, "version", nothing]);
}

#[test]
fn a_newcomer_that_remembers_another_ring_is_refused_and_can_be_started_anew() {
    let mut cluster = three_and_others("window = \"500ms\"");
    cluster.ring_file("frank_and_grace.toml", &["frank", "grace"], &[]);
    cluster.ring_file("frank.toml", &["frank"], &["grace"]);
    cluster.ring_file("four.toml", &["alice", "bob", "carol", "frank"], &[]);
    for name in ["frank", "grace"] {
        cluster.start_with(name, "frank_and_grace.toml");
    }
    for name in ["frank", "grace"] {
        cluster.node(name).wait_for("ready with");
    }
    kv54(&cluster, "cluster.toml", &["set", "tea", "green"]).exits(0);
    resize(&cluster, "frank.toml").exits(0); // that ring has gone further than the other one
    let before = state_of(&cluster);
    let parts = ["two rings", "frank", "restart", "nothing is changed"];
    for _ in 0..2 {
        resize(&cluster, "four.toml").exits(2).says(&parts);
        assert_eq!(state_of(&cluster), before);
    }
    let get = |file| kv54(&cluster, file, &["get", "tea"]);
    assert_eq!(get("cluster.toml").exits(0).text(), "green\n");
    get("four.toml"); // whatever it answers, the rings stay what they are
    assert_eq!(state_of(&cluster), before);

    cluster.kill("frank");
    newcomers(&mut cluster, &["frank"], "four.toml");
    resize(&cluster, "four.toml").exits(0);
    for file in ["cluster.toml", "four.toml"] {
        assert_eq!(
            kv54(&cluster, file, &["get", "tea"]).exits(0).text(),
            "green\n"
        );
    }
}

#[test]
fn of_two_changes_the_second_is_refused_in_a_line_that_names_the_first() {
    let mut cluster = three_and_others("window = \"500ms\"");
    cluster.ring_file("four.toml", &SEVEN[..4], &[]);
    cluster.ring_file("two.toml", &SEVEN[..2], &["carol"]);
    newcomers(&mut cluster, &["dave"], "four.toml");
    let mut first = begin_and_hold(&cluster, "four.toml", "dave");
    let (said, why) = (
        resize(&cluster, "two.toml"),
        "alice bob carol to alice bob carol dave",
    );
    said.exits(2)
        .says(&["changing already", why, "nothing is changed"]);
    cluster.signal("dave", "CONT");
    assert_eq!(first.wait(), 0, "{:?}", first.log());
    assert_eq!(ring_now(&cluster, "cluster.toml"), SEVEN[..4]);
}

#[test]
fn of_two_changes_at_the_same_moment_one_is_made() {
    let mut cluster = three_and_others("window = \"500ms\"");
    cluster.ring_file("four.toml", &SEVEN[..4], &[]);
    cluster.ring_file("two.toml", &SEVEN[..2], &["carol"]);
    newcomers(&mut cluster, &["dave"], "four.toml");
    cluster.kill("bob");
    cluster.start("bob"); // both wait until it has caught up
    let mut both = ["four.toml", "two.toml"].map(|file| drive(&cluster, file));
    let codes = both.each_mut().map(Node::wait);
    let logs = both.each_ref().map(Node::log);
    let (won, lost) = if codes[0] == 0 { (0, 1) } else { (1, 0) };
    assert_eq!((codes[won], codes[lost]), (0, 2), "{logs:?}");
    let names = [&SEVEN[..4], &SEVEN[..2]][won];
    let change = format!("alice bob carol to {}", names.join(" "));
    assert!(logs[lost].last().unwrap().contains(&change), "{logs:?}");
    assert_eq!(ring_now(&cluster, "cluster.toml"), names);
}

#[test]
fn who_waits_for_a_node_that_is_gone_hears_that_another_change_was_made() {
    let mut cluster = three_and_others("window = \"5s\"");
    cluster.ring_file("four.toml", &SEVEN[..4], &[]);
    cluster.ring_file("two.toml", &SEVEN[..2], &["carol"]);
    newcomers(&mut cluster, &["dave"], "four.toml");
    cluster.kill("bob");
    cluster.start("bob"); // both wait until it has caught up, and the first one for dave then
    let mut first = drive(&cluster, "four.toml");
    first.wait_for("waiting for bob");
    cluster.kill("dave");
    resize(&cluster, "two.toml").exits(0);
    first.wait_for("the ring has changed meanwhile");
    first.wait_for("nothing is changed");
    assert_eq!(first.wait(), 2, "{:?}", first.log());
    assert_eq!(ring_now(&cluster, "cluster.toml"), SEVEN[..2]);
}

#[test]
fn from_one_node_to_seven_and_back_every_key_stays() {
    let mut cluster = Cluster::with_limits(&SEVEN, "window = \"500ms\"");
    let file = |names: usize| format!("{names}.toml");
    for (n, before) in [(1, 1), (2, 1), (3, 2), (5, 3), (7, 5)] {
        let (nodes, file) = (&SEVEN[..n], file(n));
        cluster.ring_file(&file, nodes, &[]);
        newcomers(&mut cluster, &SEVEN[before..n], &file);
        if n == 1 {
            cluster.ring_file("cluster.toml", nodes, &[]);
            cluster.start("alice");
            cluster.wait_until_ready();
            put(&cluster, 0..100);
            continue;
        }
        if n == 2 {
            let parts = ["alice has not read", "kill -HUP", "nothing is changed"];
            resize(&cluster, &file).exits(2).says(&parts);
            cluster.ring_file("cluster.toml", nodes, &[]);
            cluster.signal("alice", "HUP");
            cluster.node("alice").wait_for("kv54 resize changes");
        }
        becomes(&cluster, &file, nodes, before);
    }
    for (n, before) in [(5, 7), (3, 5), (1, 3)] {
        let (nodes, file) = (&SEVEN[..n], format!("to{n}.toml"));
        cluster.ring_file(&file, nodes, &SEVEN[n..before]);
        becomes(&cluster, &file, nodes, before);
        for name in &SEVEN[n..before] {
            cluster
                .node(name)
                .wait_for("left: not in the ring any more");
            cluster.stop(name);
        }
    }
}

#[test]
fn another_node_takes_the_place_of_one_that_leaves() {
    let mut cluster = three_and_others("window = \"500ms\"");
    put(&cluster, 0..100);
    let nodes = ["alice", "carol", "dave"];
    cluster.ring_file("swap.toml", &nodes, &["bob"]);
    newcomers(&mut cluster, &["dave"], "swap.toml");
    becomes(&cluster, "swap.toml", &nodes, 3);
    cluster.stop("bob");
    has_all(&cluster, "swap.toml", 0..100);
    has_all(&cluster, "cluster.toml", 0..100);
}

#[test]
fn an_export_that_spans_a_change_has_every_key_once() {
    let mut cluster = three_and_others("window = \"500ms\"");
    let value = "green ".repeat(10);
    let lines = (0..12_000).map(|n| format!("{{\"key\":\"{n}\",\"value\":\"{value}\"}}\n"));
    let lines: Vec<String> = lines.collect();
    cluster
        .kv54_with(["import"], lines.concat().as_bytes())
        .exits(0);
    cluster.ring_file("four.toml", &SEVEN[..4], &[]);
    newcomers(&mut cluster, &["dave"], "four.toml");

    let mut command = cluster.command();
    let mut export = command
        .arg("export")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut printed = BufReader::new(export.stdout.take().unwrap());
    let mut first = String::new();
    printed.read_line(&mut first).unwrap(); // of the first part, which is more than a pipe takes
    let said = resize(&cluster, "four.toml").exits(0);
    let plan = "3 → 4 nodes: dave comes; 75 % of the keys move; about 12 thousand keys, ";
    assert!(said.text().starts_with(plan), "{said:?}");
    let rest = printed.lines().map(|line| line.unwrap() + "\n");
    let all: Vec<String> = [first].into_iter().chain(rest).collect();
    assert!(export.wait().unwrap().success());
    assert_eq!(all.len(), lines.len(), "each key once");
    let [all, lines] = [all, lines].map(|lines| lines.into_iter().collect::<BTreeSet<_>>());
    let missing = lines.difference(&all).count();
    assert_eq!((missing, all.len()), (0, lines.len()));
}

#[test]
fn a_change_that_nobody_drives_is_shown_and_every_command_goes_on_in_it() {
    let mut cluster = three_and_others("window = \"500ms\"");
    put(&cluster, 0..100);
    cluster.ring_file("four.toml", &SEVEN[..4], &[]);
    newcomers(&mut cluster, &["dave"], "four.toml");
    kv54(&cluster, "four.toml", &["status"]).exits(0);
    every_command_works(&cluster, "before");
    let dry = kv54(&cluster, "four.toml", &["resize", "--dry-run", "--json"])
        .exits(0)
        .json();
    let (from, to) = (&SEVEN[..3], &SEVEN[..4]);
    let expected = json!({
        "from": from, "to": to, "moved_percent": 75, "keys": 100, "bytes": dry["bytes"], "done": false,
    });
    assert_eq!(dry, expected);

    drop(begin_and_hold(&cluster, "four.toml", "dave"));
    let change = "change 1: the ring changes from alice bob carol to alice bob carol dave, ";
    let waits = " % handed over; it waits for dave; kv54 resize ends it\n";
    for file in ["cluster.toml", "four.toml"] {
        let said = kv54(&cluster, file, &["status"]).exits(3);
        assert!(
            said.text().contains(change) && said.text().contains(waits),
            "{said:?}"
        );
        let json = kv54(&cluster, file, &["status", "--json"]).json();
        assert!(
            json["change"].as_str().unwrap().starts_with(change),
            "{json}"
        );
    }
    every_command_works(&cluster, "during");
    cluster.signal("dave", "CONT");
    until("all are ready", || {
        kv54(&cluster, "cluster.toml", &["status"]).code == 0
    });
    let begun = kv54(&cluster, "four.toml", &["resize", "--dry-run"]).exits(0);
    assert!(
        begun
            .text()
            .starts_with("3 → 4 nodes: it has begun already; dave comes; "),
        "{begun:?}"
    );

    let done = kv54(&cluster, "four.toml", &["resize", "--json"])
        .exits(0)
        .json();
    assert_eq!((&done["done"], &done["to"]), (&json!(true), &json!(to)));
    let said = kv54(&cluster, "cluster.toml", &["status"]).exits(0);
    assert!(!said.text().contains("change 1"), "{said:?}");
    every_command_works(&cluster, "after");

    // A file of former days still knows enough, also to ask the node that it does not name.
    let via = |name| {
        kv54(
            &cluster,
            "cluster.toml",
            &["get", "many00007", "--via", name],
        )
    };
    assert_eq!(via("dave").exits(0).text(), "7\n");
    via("erin")
        .exits(2)
        .says(&["cluster.toml", "no node \"erin\""]);
}

/// Each command, with the old file and with the new one.
fn every_command_works(cluster: &Cluster, value: &str) {
    thread::scope(|scope| {
        for (file, key) in [("cluster.toml", "tea"), ("four.toml", "milk")] {
            scope.spawn(move || commands_work(cluster, file, key, value));
        }
    });
    has_all(cluster, "four.toml", 0..100);
    let keys = kv54(cluster, "cluster.toml", &["keys"]).exits(0);
    assert_eq!(keys.text().lines().count(), 100);
}

fn commands_work(cluster: &Cluster, file: &str, key: &str, value: &str) {
    let run = |args: &[&str]| kv54(cluster, file, args);
    for via in [&[][..], &["--via", "alice"]] {
        run(&[&["set", key, value], via].concat()).exits(0);
        let got = run(&[&["get", key], via].concat()).exits(0);
        assert_eq!(got.text(), format!("{value}\n"));
        run(&[&["delete", key], via].concat()).exits(0);
        run(&[&["get", key], via].concat()).exits(1);
    }
    assert!(
        run(&["where", "many00007"])
            .exits(0)
            .text()
            .contains("owner")
    );
    let line = "{\"key\":\"many00007\",\"value\":7}\n";
    let import = ["import", "--config", file];
    cluster.kv54_with(import, line.as_bytes()).exits(0);
}

#[test]
fn a_node_that_missed_the_end_of_a_change_hears_of_it_though_nobody_asks() {
    let (cluster, patience) = (Cluster::running(&FIVE[..3]), Duration::from_secs(5));
    let ring = cluster.ring();
    let begun = State::of(ring.clone()).changing_to(ring.clone());
    block_on(async {
        let step = async |name: &str, state: &State| {
            let node = ring.node(name).unwrap();
            let told = Told::of(state, true).packed();
            let answer = Peer::new(node, patience, tcp())
                .call("ring", &[&told])
                .await
                .1;
            Told::read(&answer.unwrap()).unwrap().step
        };
        for name in &FIVE[..3] {
            assert_eq!(step(name, &begun).await, 1);
        }
        for name in &FIVE[..2] {
            assert_eq!(step(name, &begun.changed()).await, 2);
        }
        let start = Instant::now();
        while step("carol", &State::of(ring.clone())).await < 2 {
            assert!(start.elapsed() < PATIENCE, "carol never hears of it");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
}

#[test]
fn a_full_node_does_not_hold_a_change_up_and_a_value_of_both_rings_lies_there_once() {
    let mut cluster = three_and_others("memory = \"1MiB\"\nwindow = \"2s\"");
    let (client, value) = (cluster.client(), Packed::of("x".repeat(1_000)));
    let size = |key: &String| key.len() + value.len() + OVERHEAD;
    let mut keys: Vec<String> = Vec::new();
    let full = block_on(async {
        loop {
            let key = format!("key{:05}", keys.len());
            match client.set(key.as_bytes(), &value).await {
                Ok(()) => keys.push(key),
                Err(error) => return error,
            }
        }
    });
    assert_eq!(full.kind, Kind::Full, "{full}");
    let all: usize = keys.iter().map(size).sum();
    cluster.ring_file("four.toml", &SEVEN[..4], &[]);
    newcomers(&mut cluster, &["dave"], "four.toml");

    // In the middle of the change alice keeps three of four keys a second time.
    let mut driver = drive(&cluster, "four.toml");
    let alice = || block_on(status(&client, "alice"));
    until("all have been told", || alice().handed_over > 0);
    cluster.signal("dave", "STOP"); // within a window, which each change lasts
    driver.wait_for("waiting for dave");
    let four = cluster.ring_of("four.toml");
    let keeps = |name: &str, key: &&String| {
        let mut places = four.replicas(four.owner(key.as_bytes()));
        places.any(|place| four.name(place) == name)
    };
    let twice: Vec<&String> = keys.iter().filter(|key| keeps("alice", key)).collect();
    until("alice has all of them", || {
        alice().handed_over == twice.len()
    });
    let heads: usize = twice.iter().map(|key| key.len() + OVERHEAD).sum();
    assert_eq!(alice().bytes, all + heads);
    let refused = kv54(&cluster, "four.toml", &["set", "more", &"x".repeat(1_000)]);
    assert!(refused.exits(3).err.contains("full:"));
    cluster.signal("dave", "CONT");
    assert_eq!(driver.wait(), 0, "{:?}", driver.log());

    // After it each node has room again.
    let newer = cluster.client_with("four.toml");
    for name in &SEVEN[..4] {
        let kept = keys
            .iter()
            .filter(|key| keeps(name, key))
            .map(size)
            .sum::<usize>();
        until(&format!("{name} has what it keeps"), || {
            block_on(status(&newer, name)).bytes == kept
        });
    }
    until("there is room", || {
        kv54(&cluster, "cluster.toml", &["set", "more", "tea"]).code == 0
    });
    for key in &keys {
        assert_eq!(
            block_on(client.get(key.as_bytes())).unwrap(),
            value,
            "{key}"
        );
    }
}

async fn status(client: &Client, name: &str) -> Status {
    Status::read(&client.replicas.ask_node(name, "status").await.unwrap()).unwrap()
}

#[test]
fn five_become_seven_and_then_three_under_load_whoever_is_killed() {
    let mut story = UnderLoad::begin();
    let (five, seven) = (FIVE.join(" "), SEVEN.join(" "));
    newcomers(&mut story.cluster, &SEVEN[5..], "seven.toml");
    for name in &SEVEN[5..] {
        story.guest(name);
    }
    // The driver is killed as soon as one node has been told, and with it another node.
    let told = format!("the ring changes from {five} to {seven}");
    let driver = drive(&story.cluster, "seven.toml");
    story.cluster.node("alice").wait_for(&told);
    drop(driver);
    story.kill_and_restart("dave", "seven.toml");
    // A node is killed during the hand-over, and the driver goes on.
    let mut driver = drive(&story.cluster, "seven.toml");
    story.wait_for_hand_over();
    story.kill_and_restart("bob", "seven.toml");
    // Another one while the change ends.
    story
        .cluster
        .node("alice")
        .wait_for(&format!("the ring is {seven}"));
    story.kill_and_restart("grace", "seven.toml");
    assert_eq!(driver.wait(), 0, "{:?}", driver.log());
    story.goes_on();

    // On the way back one that leaves is killed while nodes are told, and the driver waits for it.
    let mut driver = drive(&story.cluster, "five.toml");
    let told = format!("the ring changes from {seven} to {five}");
    story.cluster.node("alice").wait_for(&told);
    story.kill_and_restart("frank", "five.toml");
    assert_eq!(driver.wait(), 0, "{:?}", driver.log());
    story.goes_on();

    // The driver and a node are killed during the hand-over, and another node at the end.
    let driver = drive(&story.cluster, "three.toml");
    story.wait_for_hand_over();
    drop(driver);
    story.kill_and_restart("carol", "three.toml");
    let mut driver = drive(&story.cluster, "three.toml");
    let carol = story.cluster.node("carol");
    carol.wait_for("the ring is alice bob carol");
    story.kill_and_restart("alice", "three.toml");
    assert_eq!(driver.wait(), 0, "{:?}", driver.log());
    story.goes_on();
    story.ends("three.toml", &SEVEN[..3]);
}

/// Five nodes, the files of three rings, and clients of all kinds that read and write.
struct UnderLoad {
    cluster: Cluster,
    runtime: Runtime,
    traffic: Arc<Traffic>,
    clients: Vec<JoinHandle<()>>,
}

/// What the clients ask, what they are told, and what may not be.
#[derive(Default)]
struct Traffic {
    history: History,
    values: AtomicU64,
    victim: Mutex<Option<String>>,
    served: Mutex<BTreeMap<String, usize>>, // by each node, and by those that clients ask themselves
    failed: Mutex<Vec<String>>,
    done: AtomicBool,
}

/// How many keys lie there beside those of the clients.
const MANY: usize = 3_000;
/// How many keys the clients share.
const KEYS: usize = 100;

impl UnderLoad {
    fn begin() -> UnderLoad {
        let mut cluster = Cluster::of(&SEVEN);
        cluster.ring_file("cluster.toml", &FIVE, &[]);
        cluster.ring_file("seven.toml", &SEVEN, &[]);
        cluster.ring_file("five.toml", &FIVE, &SEVEN[5..]);
        cluster.ring_file("three.toml", &SEVEN[..3], &SEVEN[3..]);
        for name in FIVE {
            cluster.start(name);
        }
        cluster.wait_until_ready();
        put(&cluster, 0..MANY);
        let runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = { runtime }.worker_threads(1).enable_all().build().unwrap();
        let (traffic, clients) = (Arc::default(), Vec::new());
        let mut story = UnderLoad {
            cluster,
            runtime,
            traffic,
            clients,
        };
        for file in ["cluster.toml", "seven.toml", "three.toml"] {
            let (traffic, client) = (story.traffic.clone(), story.cluster.client_with(file));
            let asks = traffic.ask_a_majority(file, client);
            story.clients.push(story.runtime.spawn(asks));
        }
        for name in FIVE {
            story.guest(name);
        }
        story
    }

    /// A client that knows this node alone.
    fn guest(&mut self, name: &str) {
        let ring = self.cluster.ring_of("seven.toml");
        let node = ring.node(name).unwrap();
        let peer = Peer::new(node, PATIENCE, tcp());
        let asks = self.traffic.clone().be_a_guest(name.to_owned(), peer);
        self.clients.push(self.runtime.spawn(asks));
    }

    fn status_of(&self, name: &str) -> Option<Status> {
        let client = self.cluster.client_with("seven.toml");
        let answer = client.replicas.ask_node(name, "status");
        let answer = self.runtime.block_on(answer).ok()?;
        Some(Status::read(&answer).unwrap())
    }

    /// `kill -9` and a new start with this file, until the node is what it was and has its guests again.
    fn kill_and_restart(&mut self, name: &str, file: &str) {
        self.traffic.victim.lock().unwrap().replace(name.to_owned());
        self.cluster.kill(name);
        self.cluster.start_with(name, file);
        until(&format!("{name} has caught up"), || {
            let status = self.status_of(name);
            status.is_some_and(|status| status.state == "ready" || status.state == "left")
        });
        self.serves(name);
        self.traffic.victim.lock().unwrap().take();
    }

    /// Waits until a node has answered some more of its guests.
    fn serves(&self, name: &str) {
        let count = || self.traffic.served.lock().unwrap().get(name).copied();
        let before = count().unwrap_or(0);
        until(&format!("{name} serves"), || count() >= Some(before + 3));
    }

    /// Waits until some key has been handed over, and the change goes on.
    fn wait_for_hand_over(&self) {
        until("keys are handed over", || {
            let status = self.status_of("alice");
            status.is_some_and(|status| status.handed_over > 0)
        });
    }

    /// All clients, also those that know only a node that has left, are served.
    fn goes_on(&self) {
        for name in SEVEN
            .iter()
            .chain(&["cluster.toml", "seven.toml", "three.toml"])
        {
            self.serves(name);
        }
    }

    /// Nothing was lost, nothing failed, nothing is kept that need not be.
    fn ends(self, file: &str, ring: &[&str]) {
        self.traffic.done.store(true, Relaxed);
        for ended in self.runtime.block_on(join_all(self.clients)) {
            ended.unwrap();
        }
        let client = self.cluster.client_with(file);
        let read = self.traffic.read_all(&client);
        let own = self.runtime.block_on(read);
        let (tally, failed) = (
            self.traffic.history.tally(),
            self.traffic.failed.lock().unwrap(),
        );
        println!("{tally:?}");
        assert_eq!(*failed, [""; 0]);
        let checked = self.traffic.history.check();
        checked.unwrap_or_else(|why| panic!("{why}"));
        has_all_among(&self.cluster, file, 0..MANY);

        let status = || kv54(&self.cluster, file, &["status", "--json"]);
        let of_ring = || in_ring(status().json(), ring);
        common::wait_until_equal(of_ring);
        for file in [file, "cluster.toml", "seven.toml"] {
            kv54(&self.cluster, file, &["status"]).exits(0);
        }
        for node in status().exits(0).json()["nodes"].as_array().unwrap() {
            let (name, bytes) = (node["name"].as_str().unwrap(), &node["bytes"]);
            let (state, expected) = match ring.contains(&name) {
                true => ("ready", own + many_bytes() + deleted_bytes(node)),
                false => ("left", 0),
            };
            assert_eq!(
                (&node["state"], bytes),
                (&json!(state), &json!(expected)),
                "{node}"
            );
        }
    }
}

/// What an entry takes beside its key and value.
const OVERHEAD: usize = 100;

/// What the keys take that lie beside those of the clients, at a node that has all of them.
fn many_bytes() -> usize {
    let value = |n: usize| Packed::of(n as u64).len();
    (0..MANY)
        .map(|n| "many00000".len() + value(n) + OVERHEAD)
        .sum()
}

/// What the tombstones of the clients' keys take.
fn deleted_bytes(node: &Json) -> usize {
    let tombstones = usize::try_from(node["tombstones"].as_u64().unwrap()).unwrap();
    tombstones * ("key000".len() + OVERHEAD)
}

/// The same status with the nodes of the ring alone.
fn in_ring(mut status: Json, ring: &[&str]) -> Json {
    let nodes = status["nodes"].as_array_mut().unwrap();
    nodes.retain(|node| ring.contains(&node["name"].as_str().unwrap()));
    status
}

/// An export has all of these keys, and perhaps others.
fn has_all_among(cluster: &Cluster, file: &str, keys: Range<usize>) {
    let said = kv54(cluster, file, &["export"]).exits(0);
    let lines: BTreeSet<&str> = said.text().lines().collect();
    assert_eq!(lines.len(), said.text().lines().count(), "each key once");
    for line in lines_of(keys) {
        assert!(lines.contains(&*line), "{line} is missing");
    }
}

impl Traffic {
    /// Reads and writes as an own client: nothing may fail, ever.
    async fn ask_a_majority(self: Arc<Self>, file: &str, client: Client) {
        let file = file.to_owned();
        while !self.done.load(Relaxed) {
            let (key, operation) = self.choose();
            let began = self.history.begin(&key, operation);
            let answer = match operation {
                Operation::Get => client.get(key.as_bytes()).await,
                Operation::Set(Some(value)) => {
                    let set = client.set(key.as_bytes(), &Packed::of(value)).await;
                    set.map(|()| Packed::default())
                }
                Operation::Set(None) => {
                    let deleted = client.delete(key.as_bytes()).await;
                    deleted.map(|()| Packed::default())
                }
                _ => unreachable!("nobody swaps here"),
            };
            let answer = answer.and_then(|value| value.value());
            self.note(&file, began, operation, answer, false);
            pause().await;
        }
    }

    /// The same through one node: only while that is killed an operation may fail.
    async fn be_a_guest(self: Arc<Self>, name: String, peer: Peer) {
        let is_victim = || self.victim.lock().unwrap().as_ref() == Some(&name);
        while !self.done.load(Relaxed) {
            let ((key, operation), may_fail) = (self.choose(), is_victim());
            let (encoded, began) = (encode(&(*key).into()), self.history.begin(&key, operation));
            let answer = match operation {
                Operation::Get => peer.ask("get", &[&encoded]).await,
                Operation::Set(Some(value)) => {
                    peer.ask("set", &[&encoded, &encode(&value.into())]).await
                }
                Operation::Set(None) => peer.ask("delete", &[&encoded]).await,
                _ => unreachable!("nobody swaps here"),
            };
            let answer = answer.and_then(|answer| decode(&answer));
            self.note(&name, began, operation, answer, may_fail || is_victim());
            pause().await;
        }
    }

    fn note(
        &self,
        who: &str,
        began: usize,
        operation: Operation,
        answer: Result<Value, Error>,
        may_fail: bool,
    ) {
        let end = match (operation, &answer) {
            (Operation::Get, Ok(value)) => End::Got(value.as_u64()),
            (_, Ok(_)) => End::Done,
            (Operation::Set(_), Err(error)) if error.kind == Kind::UnknownOutcome => End::Unknown,
            (_, Err(_)) => End::Refused,
        };
        self.history.end(began, end);
        match answer {
            Ok(_) => {
                let mut served = self.served.lock().unwrap();
                *served.entry(who.to_owned()).or_default() += 1;
            }
            Err(error) if !may_fail => {
                let line = format!("{who}: {operation:?}: {error}");
                println!("{line}");
                self.failed.lock().unwrap().push(line);
            }
            Err(_) => {}
        }
    }

    fn choose(&self) -> (String, Operation) {
        let key = format!("key{:03}", fastrand::usize(..KEYS));
        let operation = match fastrand::u8(..20) {
            0..10 => Operation::Get,
            10 => Operation::Set(None),
            _ => Operation::Set(Some(self.values.fetch_add(1, Relaxed))),
        };
        (key, operation)
    }

    /// Reads every key that the clients share; what they and their values take.
    async fn read_all(&self, client: &Client) -> usize {
        let mut bytes = 0;
        for key in (0..KEYS).map(|n| format!("key{n:03}")) {
            let began = self.history.begin(&key, Operation::Get);
            let value = client.get(key.as_bytes()).await.unwrap();
            let content = value.value().unwrap().as_u64();
            self.history.end(began, End::Got(content));
            if !value.is_nil() {
                bytes += key.len() + value.len() + OVERHEAD;
            }
        }
        bytes
    }
}

/// Between two operations of a client: some hundred a second of all together are plenty.
async fn pause() {
    tokio::time::sleep(Duration::from_millis(fastrand::u64(5..30))).await;
}

/// Waits until it is so.
#[track_caller]
fn until(what: &str, is_so: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE, "it never came to this: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// A change that goes well: the plan, the end, the second time, the keys and the memory.
fn becomes(cluster: &Cluster, file: &str, nodes: &[&str], before: usize) {
    let plan = format!("{before} → {} nodes: ", nodes.len());
    let state = state_of(cluster);
    let dry = kv54(cluster, file, &["resize", "--dry-run"]).exits(0);
    assert!(
        dry.text().starts_with(&plan) && dry.err.is_empty(),
        "{dry:?}"
    );
    assert!(dry.text().contains("there is no cancel"), "{dry:?}");
    assert_eq!(state_of(cluster), state);
    let said = resize(cluster, file).exits(0);
    let done = format!("{}done: the ring is {}\n", dry.text(), nodes.join(" "));
    assert_eq!(said.text(), done);
    let nothing = format!("the ring is {}: nothing is to be done\n", nodes.join(" "));
    assert_eq!(resize(cluster, file).exits(0).text(), nothing);
    assert_eq!(ring_now(cluster, file), nodes);
    has_all(cluster, file, 0..100);
    kv54(cluster, file, &["status"]).exits(0);
}

/// Lines of an export: keys, each with its number as its value.
fn lines_of(keys: Range<usize>) -> Vec<String> {
    let line = |n| format!("{{\"key\":\"many{n:05}\",\"value\":{n}}}");
    keys.map(line).collect()
}

/// Imports these keys.
fn put(cluster: &Cluster, keys: Range<usize>) {
    let lines = lines_of(keys).join("\n");
    cluster.kv54_with(["import"], lines.as_bytes()).exits(0);
}

/// An export has exactly these keys.
fn has_all(cluster: &Cluster, file: &str, keys: Range<usize>) {
    let said = kv54(cluster, file, &["export"]).exits(0);
    let mut lines: Vec<&str> = said.text().lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, lines_of(keys));
}

/// Three nodes that run, and names for four others.
fn three_and_others(limits: &str) -> Cluster {
    let mut cluster = Cluster::with_limits(&SEVEN, limits);
    cluster.ring_file("cluster.toml", &SEVEN[..3], &[]);
    for name in &SEVEN[..3] {
        cluster.start(name);
    }
    cluster.wait_until_ready();
    cluster
}

/// Starts nodes that are not in the ring, and waits until they say so.
fn newcomers(cluster: &mut Cluster, names: &[&str], file: &str) {
    for name in names {
        cluster.start_with(name, file);
    }
    for name in names {
        let node = cluster.node(name);
        node.wait_for("waiting: not yet in the ring; kv54 resize takes it in");
    }
}

fn kv54(cluster: &Cluster, file: &str, args: &[&str]) -> Said {
    cluster.kv54(args.iter().chain(&["--config", file]))
}

/// A node that does not run for half a second has given no answer in time, and nothing was begun.
fn resize(cluster: &Cluster, file: &str) -> Said {
    let resize = || kv54(cluster, file, &["resize"]);
    let mut said = (0..20).map(|_| resize());
    let in_time = said.find(|said| said.code == 0 || !said.err.contains("no answer in time"));
    in_time.unwrap_or_else(resize)
}

/// A driver in the background.
fn drive(cluster: &Cluster, file: &str) -> Node {
    let mut command = cluster.command();
    command
        .args(["resize", "--config", file])
        .stdout(Stdio::null());
    Node::spawn(&mut command)
}

/// A change that has begun, and waits for a node that is stopped.
fn begin_and_hold(cluster: &Cluster, file: &str, name: &str) -> Node {
    let driver = drive(cluster, file);
    cluster.node("alice").wait_for("the ring changes from");
    cluster.signal(name, "STOP");
    driver.wait_for(&format!("waiting for {name}"));
    driver
}

/// Which rings each node that runs knows, and what it holds.
fn state_of(cluster: &Cluster) -> Vec<[Json; 4]> {
    let all = kv54(cluster, "cluster.toml", &["status", "--json"]).json();
    let nodes = all["nodes"].as_array().unwrap().iter();
    let fields = ["name", "ring", "epoch", "digests"];
    nodes
        .map(|node| fields.map(|field| node[field].clone()))
        .collect()
}

/// The names of the ring as a client finds it that has this file.
fn ring_now(cluster: &Cluster, file: &str) -> Vec<String> {
    let replicas = cluster.client_with(file).replicas;
    block_on(replicas.exchange_all());
    assert!(replicas.state().next.is_none());
    replicas
        .cluster()
        .names()
        .into_iter()
        .map(str::to_owned)
        .collect()
}

/// Answers as a node that knows no method `ring`.
fn answer_as_an_older_version(listener: &TcpListener) {
    for stream in listener.incoming() {
        let mut stream = BufReader::new(stream.unwrap());
        while let Ok(request) = rmpv::decode::read_value(&mut stream) {
            let answer = array([
                1.into(),
                request[1].clone(),
                "no-such-method: \"ring\"".into(),
                NIL,
            ]);
            let _ = stream.get_mut().write_all(&encode(&answer)); // the asker may be gone
        }
    }
}

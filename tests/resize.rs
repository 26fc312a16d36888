//! The ring changes while it runs: it grows and shrinks under load, whoever is killed; bad input
//! changes nothing; every command goes on, with the old file and with the new one.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::io::{BufReader, Write as _};
use std::net::TcpListener;
use std::ops::Range;
use std::process::Stdio;

use common::wire::{NIL, array};
use common::{Cluster, Node, Said, block_on, differences};
use kv54::rpc::codec::encode;
use serde_json::Value as Json;

const SEVEN: [&str; 7] = ["alice", "bob", "carol", "dave", "erin", "frank", "grace"];

#[test]
fn what_cannot_be_done_is_one_line_and_changes_nothing() {
    let cluster = three_and_others("");
    cluster.ring_file("four.toml", &SEVEN[..4], &[]);
    let before = state_of(&cluster);
    let refused = |file: &str, parts: &[&str]| {
        let said = resize(&cluster, file).exits(2).says(parts);
        assert!(!said.err.contains("bad-request"), "{said:?}");
        assert_eq!(state_of(&cluster), before, "{file}");
    };

    // A file that is wrong in itself.
    cluster.file("both.toml", &both(&cluster));
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
    cluster.file(
        "window.toml",
        &four.replace("[limits]", "[limits]\nwindow = \"2s\""),
    );
    refused(
        "window.toml",
        &["window of 2000 ms", "1000 ms", "the same", nothing],
    );

    // A newcomer of an older version.
    let older = TcpListener::bind(&dave).unwrap();
    std::thread::spawn(move || answer_as_an_older_version(&older));
    refused("four.toml", &["dave: ", &dave, "version", nothing]);
}

#[test]
fn a_newcomer_that_remembers_another_ring_is_refused_and_can_be_started_anew() {
    let mut cluster = three_and_others("");
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
    cluster.start_with("frank", "four.toml");
    cluster
        .node("frank")
        .wait_for("waiting: not yet in the ring");
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
    let mut cluster = three_and_others("");
    cluster.ring_file("four.toml", &SEVEN[..4], &[]);
    cluster.ring_file("two.toml", &SEVEN[..2], &["carol"]);
    cluster.start_with("dave", "four.toml");
    cluster
        .node("dave")
        .wait_for("waiting: not yet in the ring");
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
    let mut cluster = three_and_others("");
    cluster.ring_file("four.toml", &SEVEN[..4], &[]);
    cluster.ring_file("two.toml", &SEVEN[..2], &["carol"]);
    cluster.start_with("dave", "four.toml");
    cluster
        .node("dave")
        .wait_for("waiting: not yet in the ring");
    cluster.kill("bob");
    cluster.start("bob"); // both wait until it has caught up
    let mut both = ["four.toml", "two.toml"].map(|file| drive(&cluster, file));
    let codes = both.each_mut().map(Node::wait);
    let logs = both.each_ref().map(Node::log);
    let (won, lost) = if codes[0] == 0 { (0, 1) } else { (1, 0) };
    assert_eq!((codes[won], codes[lost]), (0, 2), "{logs:?}");
    let names = [&SEVEN[..4], &SEVEN[..2]][won];
    let named = format!("alice bob carol to {}", names.join(" "));
    assert!(logs[lost].last().unwrap().contains(&named), "{logs:?}");
    assert_eq!(ring_now(&cluster, "cluster.toml"), names);
}

#[test]
fn from_one_node_to_seven_and_back_every_key_stays() {
    let mut cluster = Cluster::with_limits(&SEVEN, "window = \"500ms\"");
    let file = |names: usize| format!("{names}.toml");
    for (n, before) in [(1, 1), (2, 1), (3, 2), (5, 3), (7, 5)] {
        let (nodes, file) = (&SEVEN[..n], file(n));
        cluster.ring_file(&file, nodes, &[]);
        for name in &SEVEN[before..n] {
            cluster.start_with(name, &file);
            cluster.node(name).wait_for("waiting: not yet in the ring");
        }
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
    let mut cluster = three_and_others("");
    put(&cluster, 0..100);
    let nodes = ["alice", "carol", "dave"];
    cluster.ring_file("swap.toml", &nodes, &["bob"]);
    cluster.start_with("dave", "swap.toml");
    cluster
        .node("dave")
        .wait_for("waiting: not yet in the ring");
    becomes(&cluster, "swap.toml", &nodes, 3);
    cluster.stop("bob");
    has_all(&cluster, "swap.toml", 0..100);
    has_all(&cluster, "cluster.toml", 0..100);
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

/// Imports these keys, each with itself as its value.
fn put(cluster: &Cluster, keys: Range<usize>) {
    let lines = keys.map(|n| format!("{{\"key\":\"many{n:05}\",\"value\":{n}}}\n"));
    let lines: String = lines.collect();
    cluster.kv54_with(["import"], lines.as_bytes()).exits(0);
}

/// An export has exactly these keys.
fn has_all(cluster: &Cluster, file: &str, keys: Range<usize>) {
    let said = kv54(cluster, file, &["export"]).exits(0);
    let mut lines: Vec<&str> = said.text().lines().collect();
    lines.sort_unstable();
    let expected = keys.map(|n| format!("{{\"key\":\"many{n:05}\",\"value\":{n}}}"));
    assert_eq!(lines, expected.collect::<Vec<_>>());
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

fn kv54(cluster: &Cluster, file: &str, args: &[&str]) -> Said {
    cluster.kv54(args.iter().chain(&["--config", file]))
}

fn resize(cluster: &Cluster, file: &str) -> Said {
    kv54(cluster, file, &["resize"])
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

/// A file with a name in both tables.
fn both(cluster: &Cluster) -> String {
    let text = std::fs::read_to_string(cluster.dir.join("cluster.toml")).unwrap();
    text.replace(
        "[leaving]",
        &format!("[leaving]\nbob = {:?}", cluster.address("bob")),
    )
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

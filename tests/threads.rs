//! Stories of nodes that answer in two threads: each is still one node.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use common::history::{Content, End, History, Operation};
use common::wire::{NIL, PATIENCE, Wire, request};
use common::{Cluster, FIVE, Node};
use fastrand::Rng;
use msgpack_rpc::Value;

#[test]
fn what_two_threads_answer_one_register_could_have_answered() {
    let cluster = running(&["alice"], "threads = 2");
    let (history, values) = (History::default(), AtomicU64::new(1));
    let before = work(cluster.node("alice"));
    thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| be_a_guest(&cluster, &history, &values));
        }
    });
    history.check().unwrap_or_else(|why| panic!("{why}"));
    let tally = history.tally();
    assert!(tally.done > 15_000 && tally.swapped > 500, "{tally:?}");
    let after = work(cluster.node("alice"));
    let worked = after.iter().zip(&before).filter(|(now, then)| now > then);
    assert_eq!(worked.count(), 2, "{before:?} {after:?}");
}

#[test]
fn two_connections_that_are_busy_keep_two_threads_at_work() {
    let cluster = running(&["alice"], "threads = 2");
    let mut wires = [(); 2].map(|()| Wire::to(&cluster, "alice"));
    let (node, done, start) = (
        cluster.node("alice"),
        AtomicBool::new(false),
        Instant::now(),
    );
    thread::scope(|scope| {
        for wire in &mut wires {
            scope.spawn(|| {
                while !done.load(Relaxed) {
                    wire.does("get", ["tea".into()]);
                }
            });
        }
        let before = work(node);
        let both = |now: &[u64]| now.iter().zip(&before).all(|(now, then)| now - then >= 5);
        while !both(&work(node)) && start.elapsed() < PATIENCE {
            thread::sleep(Duration::from_millis(20));
        }
        done.store(true, Relaxed);
        let after = work(node);
        assert!(both(&after), "{before:?} {after:?}");
    });
}

#[test]
fn swaps_of_one_key_are_all_done_once_whichever_threads_they_come_to() {
    let names = ["alice", "bob", "carol"];
    let cluster = running(&names, "threads = 2");
    let sums = thread::scope(|scope| {
        let guests: Vec<_> = (0..12)
            .map(|guest| {
                let mut wire = Wire::to(&cluster, names[guest % 3]);
                let mut incr = move || match wire.asks("incr", ["cups".into()]) {
                    Ok(sum) => sum.as_u64(),
                    // A node that does not run for a second: it may be done.
                    Err(why) => why.starts_with("unknown-outcome:").then_some(0),
                };
                scope.spawn(move || (0..50).map(|_| incr().unwrap()).collect::<Vec<_>>())
            })
            .collect();
        let sums = guests.into_iter().flat_map(|guest| guest.join().unwrap());
        sums.filter(|sum| *sum > 0).collect::<Vec<_>>()
    });
    let each: BTreeSet<_> = sums.iter().collect();
    assert_eq!(each.len(), sums.len(), "two heard the same sum");
    let all = Wire::to(&cluster, "bob").does("get", ["cups".into()]);
    let all = all.as_u64().unwrap();
    assert!((u64::try_from(sums.len()).unwrap()..=600).contains(&all));
    assert!(each.iter().all(|sum| (1..=all).contains(*sum)));
    assert!(sums.len() > 500, "hardly one is done once and known");
}

#[test]
fn a_node_has_its_limit_of_connections_and_not_each_thread() {
    let mut cluster = running(&["alice"], "threads = 2\nconnections = 4");
    let mut wires: Vec<_> = (0..4).map(|_| Wire::to(&cluster, "alice")).collect();
    for wire in &mut wires {
        wire.does("set", ["tea".into(), "green".into()]);
    }
    counts(&mut wires[0], 4);
    assert!(guest(&cluster).is_none());
    cluster.node("alice").wait_for("at most 4 may be open");
    // One goes, from either thread, and another one comes.
    for _ in 0..3 {
        wires.remove(0);
        wires.push(lets_in(&cluster));
    }
    cluster.edit("connections = 4", "connections = 5");
    cluster.reload("connections are 5");
    wires.push(lets_in(&cluster));
    counts(&mut wires[0], 5);
    assert!(guest(&cluster).is_none());
    cluster.edit("threads = 2", "threads = 3");
    cluster.reload("threads are taken at the next start");

    cluster.stop("alice");
    wires.iter_mut().for_each(Wire::is_closed);
}

#[test]
fn every_thread_of_another_node_gets_in_where_guests_do_not() {
    let mut cluster = running(&["alice", "bob"], "threads = 2\nconnections = 8");
    cluster.stop("bob");
    let mut guests = vec![lets_in(&cluster)];
    counts(&mut guests[0], 1); // his connections have gone
    guests.extend((1..8).map(|_| lets_in(&cluster)));
    // He joins, and asks for the guests of each of his threads: neither can do without her.
    cluster.start("bob");
    cluster.node("bob").wait_for("ready with");
    let mut wires = [(); 4].map(|()| Wire::to(&cluster, "bob"));
    for wire in &mut wires {
        wire.does("set", ["tea".into(), "green".into()]);
    }
    counts(&mut guests[0], 8 + 3);
}

#[test]
fn threads_that_nobody_asked_for_give_way_to_connections() {
    let mut cluster = Cluster::with_limits(&FIVE, "# threads: as many as there are cores");
    cluster.start_under("-n 100", "alice");
    let says = "a node takes 46 connections, not 1024"; // as with one thread
    cluster.node("alice").wait_for(says);
}

/// These nodes, each with these limits, running and ready.
fn running(names: &[&str], limits: &str) -> Cluster {
    let mut cluster = Cluster::with_limits(names, limits);
    cluster.start_all();
    cluster
}

/// A connection to alice, if she lets a guest in.
fn guest(cluster: &Cluster) -> Option<Wire> {
    let mut wire = Wire::to(cluster, "alice");
    wire.send(&request(1, "get", [])); // of no key: whoever is let in is told so
    let (_, said) = wire.answer()?;
    said.unwrap_err().contains("bad-request").then_some(wire)
}

/// The same, as soon as she takes one more.
fn lets_in(cluster: &Cluster) -> Wire {
    let start = Instant::now();
    loop {
        if let Some(wire) = guest(cluster) {
            return wire;
        }
        assert!(start.elapsed() < PATIENCE, "no connection is taken");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Waits until a node says that it has so many connections: the thread of one that ends counts it a moment later.
fn counts(wire: &mut Wire, connections: u64) {
    let start = Instant::now();
    while wire.status("connections") != connections {
        assert!(start.elapsed() < PATIENCE, "{}", wire.status("connections"));
        thread::sleep(Duration::from_millis(20));
    }
}

/// Reads, writes and swaps three keys, three thousand times.
fn be_a_guest(cluster: &Cluster, history: &History, values: &AtomicU64) {
    let (mut wire, mut rng, mut seen) = (Wire::to(cluster, "alice"), Rng::new(), [None; 3]);
    let packed = |content: Content| content.map_or(NIL, Value::from);
    for _ in 0..3_000 {
        let at = rng.usize(..3);
        let (key, new) = (format!("key{at}"), Some(values.fetch_add(1, Relaxed)));
        let expected = seen[at];
        let (operation, method, rest) = match rng.u8(..20) {
            0..10 => (Operation::Get, "get", vec![]),
            10 => (Operation::Set(None), "delete", vec![]),
            11..15 => (Operation::Set(new), "set", vec![packed(new)]),
            _ => {
                let swap = Operation::Cas { expected, new };
                (swap, "cas", vec![packed(expected), packed(new)])
            }
        };
        let params = [vec![key.as_str().into()], rest].concat();
        let began = history.begin(&key, operation);
        let answer = wire.asks(method, params);
        let end = match (operation, answer) {
            (Operation::Get, Ok(value)) => End::Got(value.as_u64()),
            (Operation::Cas { .. }, Ok(answer)) if answer[0] == false.into() => {
                End::Got(answer[1].as_u64())
            }
            (_, Ok(_)) => End::Done,
            (_, Err(why)) if why.starts_with("unknown-outcome:") => End::Unknown,
            (_, Err(_)) => End::Refused,
        };
        history.end(began, end);
        match end {
            End::Got(content) => seen[at] = content,
            End::Done if operation != Operation::Set(None) => seen[at] = new,
            _ => {}
        }
    }
}

/// How long each thread of a node has been at work, in ticks of the system's clock.
fn work(node: &Node) -> Vec<u64> {
    let tasks = fs::read_dir(format!("/proc/{}/task", node.pid())).unwrap();
    let of_task = |path: std::path::PathBuf| {
        let stat = fs::read_to_string(path.join("stat")).ok()?;
        let (name, fields) = stat.split_once(") ")?;
        let fields: Vec<&str> = fields.split(' ').collect();
        let [user, system] = [11, 12].map(|at| fields[at].parse::<u64>().unwrap());
        name.ends_with("(alice").then_some(user + system)
    };
    let paths = tasks.map(|task| task.unwrap().path());
    let mut paths: Vec<_> = paths.collect();
    paths.sort();
    paths.into_iter().filter_map(of_task).collect()
}

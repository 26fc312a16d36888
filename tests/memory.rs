//! Stories of nodes that have no memory left: what is refused, what is kept all the same, and that
//! every answered write can still be read.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use common::gateway::Gateway;
use common::wire::{MIB, Wire, bin, request};
use common::{Cluster, FIVE};
use kv54::cluster::{State, Told};
use kv54::entry::{Entry, Stamp};
use kv54::error::Kind;
use kv54::rpc::codec::{NIL, encode_bytes};
use kv54::status::Status;
use msgpack_rpc::Value;

const THREE: [&str; 3] = ["alice", "bob", "carol"];
const LITTLE: &str = "memory = \"1MiB\"";

#[test]
fn a_full_ring_answers_every_get_and_its_nodes_restart() {
    let mut cluster = Cluster::with_limits(&THREE, LITTLE);
    cluster.start_all();
    let (written, refused) = write_until_full(&cluster, &THREE, 6_000, 1);
    assert!((150..200).contains(&written.len()), "{}", written.len());
    assert!(!refused.is_empty());
    assert_holds(&cluster, &written);
    let mut wire = Wire::to(&cluster, "alice");
    for key in &refused {
        assert_eq!(wire.does("get", [key.as_str().into()]), Value::Nil, "{key}");
    }

    let told = cluster.kv54(["status", "--json"]).exits(0).json();
    let table = cluster.kv54(["status"]).exits(0);
    for node in told["nodes"].as_array().unwrap() {
        assert_eq!(
            (&node["full"], &node["memory"]),
            (&true.into(), &MIB.into())
        );
        let remark = format!("full: {} of 1048576 bytes", node["bytes"]);
        assert!(table.text().contains(&remark), "{table:?}");
    }

    // What all have answered for comes back to a node that lost it, also at the limit.
    for name in THREE {
        cluster.restart(name);
        cluster.wait_until_ready();
        assert_holds(&cluster, &written);
    }
    // A larger limit, one node after the other, loses nothing and lets the ring take more.
    let file = std::fs::read_to_string(cluster.dir.join("cluster.toml")).unwrap();
    cluster.file("cluster.toml", &file.replace("1MiB", "2MiB"));
    for name in THREE {
        cluster.restart(name);
        cluster.wait_until_ready();
    }
    assert_holds(&cluster, &written);
    let mut wire = Wire::to(&cluster, "alice");
    wire.does("set", ["one more".into(), bin(&[0; 6_000])]);
}

#[test]
fn a_replica_that_is_full_and_missed_a_write_takes_it_from_a_get() {
    let mut cluster = Cluster::with_limits(&THREE, LITTLE);
    cluster.start_all();
    cluster.wait_until_ready();
    // Told to bob alone, as by a coordinator that died: a majority with him must be made equal.
    let ring = cluster.ring();
    let mut bob = Wire::to(&cluster, "bob");
    let half = bin(&vec![1; 600_000]);
    let told = |key: &str| {
        let value = common::wire::entry(7, 7, half.clone());
        [ring.fingerprint("bob").into(), Value::from(key), value]
    };
    bob.does("store", told("tea"));
    bob.does("store", told("cup")); // 1.2 MB
    for (key, via) in [
        ("tea", "bob"),
        ("cup", "bob"),
        ("tea", "alice"),
        ("cup", "alice"),
    ] {
        let mut wire = Wire::to(&cluster, via);
        assert_eq!(wire.does("get", [key.into()]), half, "{key} via {via}");
    }
    bob.refuses(
        "set",
        ["pot".into(), 1.into()],
        &["full:", "at most 1048576"],
    );
    // What does not grow, and what makes room, is always taken.
    bob.does("set", ["tea".into(), bin(&vec![2; 600_000])]);
    bob.does("delete", ["cup".into()]);
    bob.does("set", ["pot".into(), 1.into()]);
}

#[test]
fn sets_that_come_together_do_not_all_pass_where_each_alone_would() {
    let mut cluster = Cluster::with_limits(&THREE, LITTLE);
    cluster.start_all();
    let start = Barrier::new(8);
    let set = |n: u32| {
        let mut wire = Wire::to(&cluster, THREE[n as usize % 3]);
        let set = request(n, "set", [format!("key{n}").into(), bin(&vec![7; 600_000])]);
        start.wait();
        wire.send(&set);
        wire.answer().unwrap().1
    };
    let answers: Vec<_> = thread::scope(|scope| {
        let sets = (0..8).map(|n| {
            let set = &set;
            scope.spawn(move || set(n))
        });
        let sets: Vec<_> = sets.collect();
        sets.into_iter().map(|set| set.join().unwrap()).collect()
    });
    let refused = answers.into_iter().filter_map(Result::err);
    assert!(
        refused
            .inspect(|why| assert!(why.starts_with("full: "), "{why}"))
            .count()
            >= 7
    );
    assert!((0..20).any(|_| bounded(&cluster) == cluster.names.len()));
}

#[test]
fn a_small_node_beside_large_ones_is_never_more_than_a_quarter_above_its_limit() {
    let mut cluster = Cluster::with_limits(&FIVE, "memory = \"64MiB\"");
    let file = std::fs::read_to_string(cluster.dir.join("cluster.toml")).unwrap();
    cluster.file("small.toml", &file.replace("64MiB", "1MiB"));
    let at_carol = cluster.address("carol");
    cluster.start_behind("carol", "small.toml", &at_carol);
    for name in FIVE.iter().filter(|name| **name != "carol") {
        cluster.start(name);
    }
    cluster.wait_until_ready();
    let (written, refused) = write_until_full(&cluster, &["alice", "erin"], 700, 32);
    let without = |keys: &BTreeSet<String>| {
        let away = |key: &&String| !cluster.replicas(key).contains(&"carol".to_owned());
        keys.iter().filter(away).count()
    };
    assert_eq!(without(&refused), 0, "carol alone is full");
    assert!(without(&written) > 0);
    assert_holds(&cluster, &written);
    let carol = Wire::to(&cluster, "carol").status("bytes");
    assert!(carol >= MIB as u64 * 9 / 10, "{carol}");

    // Clients that ask only once, and not carol: alice and bob hear from her that she is full.
    let once = |n: usize| {
        let mut keys = (0..).map(|m| format!("once{n}-{m}"));
        let key = keys.find(|key| cluster.replicas(key) == ["alice", "bob", "carol"]);
        cluster.kv54(["set", &key.unwrap(), &"x".repeat(800)])
    };
    let mut refused = 0; // in a row
    for n in 0..300 {
        let said = once(n);
        refused = if said.code == 0 { 0 } else { refused + 1 };
        if refused == 10 {
            said.says(&["set failed", "full:", "carol keeps"]);
            break;
        }
    }
    assert_eq!(refused, 10, "they have heard nothing");
    cluster.kill("carol");
    cluster.start_behind("carol", "small.toml", &at_carol);
    cluster.wait_until_ready();
    assert_holds(&cluster, &written);
}

#[test]
fn a_set_that_was_allowed_lets_others_wait_until_it_writes_or_is_taken_back() {
    let cluster = Cluster::with_limits(&THREE, LITTLE);
    let store = cluster.ready_store(2);
    let carol = store.at(0);
    let brings = |bytes: usize| Some(Stamp::of_a_set(&vec![0; bytes]));
    let kind = |key: &[u8], bytes| carol.load(key, brings(bytes)).unwrap_err().kind;
    carol.load(b"tea", brings(600_000)).unwrap();
    carol.load(b"tea", brings(600_000)).unwrap(); // the same one, tried again
    assert_eq!(kind(b"pot", 600_000), Kind::Busy);
    carol.load(b"tea", brings(0)).unwrap();
    carol.load(b"pot", brings(600_000)).unwrap();
    let pot = encode_bytes(&vec![1; 600_000]);
    carol.store(b"pot", Stamp::default().newer(&*pot)).unwrap();
    assert_eq!(kind(b"tea", 600_000), Kind::Full);
    carol.load(b"tea", brings(300_000)).unwrap();
}

#[test]
fn what_a_neighbour_has_left_counts_while_it_is_news() {
    let cluster = Cluster::with_limits(&THREE, LITTLE);
    let runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = { runtime }
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async {
        let store = cluster.ready_store(2);
        let carol = store.at(0);
        let alice = Status {
            bytes: 900_000,
            memory: 1 << 20,
            ..Status::default()
        };
        carol.note_status(0, &alice);
        let brings = |bytes: usize| Some(Stamp::of_a_set(&vec![0; bytes]));
        carol.load(b"tea", brings(100_000)).unwrap();
        let refused = carol.load(b"pot", brings(200_000)).unwrap_err();
        assert_eq!(refused.kind, Kind::Full, "{refused}");
        assert!(refused.why.starts_with("alice keeps 900000 "), "{refused}");
        // A node that says nothing any more is down, and does not keep the others from writing.
        tokio::time::advance(Duration::from_secs(4)).await;
        carol.load(b"pot", brings(200_000)).unwrap();
    });
}

#[test]
fn a_stamp_that_two_rings_have_with_two_values_is_counted_as_two() {
    let cluster = Cluster::with_limits(&THREE, LITTLE);
    let store = cluster.ready_store(2);
    let state = State::of(cluster.ring());
    let changing = state.changing_to(cluster.ring());
    store.hear(&Told::of(&changing, true)).unwrap();
    let (stamp, value) = (Stamp::default().newer(()).stamp, encode_bytes(&[1; 1000]));
    let bytes = || store.status().bytes;
    store
        .at(0)
        .store(
            b"tea",
            Entry {
                stamp,
                value: &*value,
            },
        )
        .unwrap();
    let one = bytes();
    store
        .at(1)
        .store(b"tea", Entry { stamp, value: NIL })
        .unwrap(); // nobody but a liar does that
    let overhead = bytes() - one;
    assert!(overhead < 1000, "{overhead}");
    let newer = stamp.newer(&*value);
    store.at(1).store(b"tea", newer).unwrap();
    assert_eq!(bytes(), 2 * one);
    store.at(0).store(b"tea", newer).unwrap(); // now they share it
    assert_eq!(bytes(), one + overhead);
    store.hear(&Told::of(&changing.changed(), true)).unwrap();
    let status = store.status();
    assert_eq!((status.bytes, status.keys, status.tombstones), (one, 1, 0));
}

/// Has writers at these nodes set keys of so many bytes, `depth` at a time, until each was refused
/// often; meanwhile no node may keep more than a quarter above its limit. The keys that were
/// written, and those that were refused.
fn write_until_full(
    cluster: &Cluster,
    via: &[&str],
    bytes: usize,
    depth: u32,
) -> (BTreeSet<String>, BTreeSet<String>) {
    // One writer in three sets keys of carol for which alice asks herself and bob.
    let ring = cluster.ring();
    let is_unasked = |key: &String| ring.replicas(ring.owner(key.as_bytes())).eq([0, 1, 2]);
    let lost_sight = |writer: usize, n: u32| {
        let mut keys = (0..).map(|m| format!("key{writer}-{n}-{m}"));
        keys.find(is_unasked).unwrap()
    };
    let write = |writer: usize| {
        let mut wire = Wire::to(cluster, via[writer % via.len()]);
        let (mut written, mut refused) = (BTreeSet::new(), BTreeSet::new());
        for first in (0_u32..).step_by(depth as usize) {
            if refused.len() > 50 {
                return (written, refused);
            }
            let key = |n: u32| match writer % 3 {
                0 => lost_sight(writer, n),
                _ => format!("key{writer}-{n}"),
            };
            let set = |n| request(n, "set", [key(n).into(), bin(&vec![0; bytes])]);
            wire.send(&(first..first + depth).map(set).collect::<Vec<_>>().concat());
            for (n, answer) in wire.answers(depth as usize) {
                match answer {
                    Ok(_) => written.insert(key(n)),
                    Err(error) if error.starts_with("full: ") => refused.insert(key(n)),
                    Err(error) => panic!("{}: {error}", key(n)),
                };
            }
        }
        unreachable!()
    };
    let (mut written, mut refused) = (BTreeSet::new(), BTreeSet::new());
    thread::scope(|scope| {
        let writers: Vec<_> = (0..6).map(|n| scope.spawn(move || write(n))).collect();
        while writers.iter().any(|writer| !writer.is_finished()) {
            bounded(cluster);
        }
        for writer in writers {
            let (done, not) = writer.join().unwrap();
            written.extend(done);
            refused.extend(not);
        }
    });
    cluster.wait_until_equal();
    assert!((0..20).any(|_| bounded(cluster) == cluster.names.len()));
    (written, refused)
}

/// No node that answers in time holds more than it may; how many those are.
fn bounded(cluster: &Cluster) -> usize {
    let json = cluster.kv54(["status", "--json"]).json();
    let nodes = json["nodes"].as_array().unwrap().iter();
    let bounded = nodes.filter(|node| node["error"].is_null()).map(|node| {
        let [bytes, limit] = ["bytes", "memory"].map(|field| node[field].as_u64().unwrap());
        assert!(bytes <= limit + limit / 4, "{node}");
    });
    bounded.count()
}

/// Every node answers for every key.
fn assert_holds(cluster: &Cluster, keys: &BTreeSet<String>) {
    let mut values = BTreeMap::new();
    for name in &cluster.names {
        let mut wire = Wire::to(cluster, name);
        for key in keys {
            let value = wire.does("get", [key.as_str().into()]);
            assert_eq!(
                values.entry(key).or_insert_with(|| value.clone()),
                &value,
                "{key}"
            );
            assert!(!value.is_nil(), "{name} says that {key} is absent");
        }
    }
}

/// A delete frees memory: no way to ask for it needs some.
#[test]
fn a_full_ring_takes_a_delete_also_where_it_is_a_swap() {
    let mut cluster = Cluster::with_limits(&THREE, LITTLE);
    cluster.start_all();
    let (written, _) = write_until_full(&cluster, &THREE, 6_000, 1);
    let (mut wire, value) = (Wire::to(&cluster, "alice"), || bin(&[0; 6_000]));
    let mut counters = (0..).map(|n| format!("counter{n}"));
    let mut fill_up = || {
        let mut wire = Wire::to(&cluster, "bob");
        let refused = |key: String| wire.asks("incr", [key.into()]).err();
        let error = counters.by_ref().find_map(refused).unwrap();
        assert!(error.starts_with("full: "), "{error}");
    };
    fill_up();
    // What was swapped takes a little more than before, until there is no room for that either.
    let mut keys = written.iter().map(String::as_str);
    let mut is_refused = |key: &&str| {
        let same = wire.asks("cas", [(*key).into(), value(), value()]);
        same.is_err_and(|error| error.starts_with("full: "))
    };
    let by_cas = keys.find(&mut is_refused).unwrap();
    let mut deletes = Wire::to(&cluster, "bob");
    let done = deletes.does("cas", [by_cas.into(), value(), Value::Nil]);
    assert_eq!(done[0], true.into());
    assert_eq!(deletes.does("get", [by_cas.into()]), Value::Nil);
    // It is full again, if it is not yet.
    let _ = deletes.asks("set", [by_cas.into(), bin(&[0; 5_500])]);
    fill_up();
    let by_gateway = keys.find(&mut is_refused).unwrap();
    let gateway = Gateway::of(&cluster, &[]);
    gateway.client().plays(&[
        ("delete nothing\r\n", "NOT_FOUND\r\n"),
        (&format!("delete {by_gateway}\r\n"), "DELETED\r\n"),
        (&format!("delete {by_gateway}\r\n"), "NOT_FOUND\r\n"),
    ]);
    assert_eq!(wire.does("get", [by_gateway.into()]), Value::Nil);
}

//! Stories of nodes that come back, or come late: what they say meanwhile, and what they know then.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use common::{Cluster, FIVE, block_on};
use futures::stream::{self, StreamExt as _};
use kv54::client::Client;
use kv54::entry::Packed;
use kv54::error::Error;
use kv54::replicas::Replicas;
use kv54::rpc::codec::{decode, encode, encode_bytes};
use kv54::rpc::{Peer, tcp};
use msgpack_rpc::Value;

#[test]
fn a_restarted_node_says_that_it_is_joining_serves_its_guests_and_catches_up() {
    // Two windows pass before it reads anybody: time to look at a node that is joining.
    let mut cluster = Cluster::with_limits(&FIVE, "window = \"3s\"");
    cluster.start_all();
    let mut written = write(&cluster, 60);
    for key in written.keys().step_by(4).cloned().collect::<Vec<_>>() {
        cluster.kv54(["delete", &key]).exits(0);
        written.insert(key, Value::Nil);
    }
    cluster.wait_until_equal();
    let before = counts(&cluster);
    cluster.kill("carol");
    cluster.start("carol");

    let key = cluster.key_on(&["bob", "carol", "dave"]);
    poll("carol has heard how the ring is", || {
        let refused = load(&cluster, "carol", &key).unwrap_err().to_string();
        refused == "joining: waiting for bob, dave"
    });
    cluster
        .kv54(["set", &key, "new", "--via", "carol"])
        .exits(0);
    let got = cluster.kv54(["get", &key, "--via", "carol"]).exits(0);
    assert_eq!(got.text(), "new\n");
    written.insert(key.clone(), "new".into());
    let entry = ask(&cluster, "bob", "load", &[(*key).into()]).unwrap();
    let stored = ask(&cluster, "carol", "store", &[(*key).into(), entry]);
    assert_eq!(stored.unwrap(), Value::Nil);
    let told = cluster.kv54(["where", &key, "--json"]).exits(0).json();
    assert_eq!(
        (&told["replicas"][1]["name"], &told["replicas"][1]["state"]),
        (&"carol".into(), &"joining".into()),
    );
    let told = cluster.kv54(["where", &key]).exits(0);
    let row = told.text().lines().find(|row| row.starts_with("carol "));
    assert!(row.unwrap().contains("  joining  "), "{told:?}");
    assert!(row.unwrap().contains("waiting for bob"), "{told:?}");
    let carol = status(&cluster, "carol");
    assert_eq!(
        (&carol["state"], &carol["progress"]),
        (&"joining".into(), &0.into())
    );
    let others = ["alice", "bob", "dave", "erin"];
    assert_eq!(carol["waiting_for"], serde_json::json!(others));
    cluster.kv54(["status"]).exits(3);

    cluster.wait_until_ready();
    assert_eq!(cluster.differences(), [""; 0]);
    assert_eq!(counts(&cluster), before);
    assert_holds(&cluster, "carol", &written);
    cluster.kv54(["status"]).exits(0);
    let carol = status(&cluster, "carol");
    assert_eq!(
        (&carol["waiting_for"], &carol["progress"]),
        (&serde_json::json!([]), &100.into())
    );
}

#[test]
fn a_node_that_has_said_that_it_is_joining_is_asked_last_for_a_while() {
    let mut cluster = Cluster::with_limits(&FIVE, "window = \"5s\"");
    cluster.start_all();
    let key = cluster.key_on(&["bob", "carol", "dave"]);
    cluster.kill("carol");
    cluster.start("carol");
    // Bob asks himself first, and then who comes next: carol, until she has refused.
    let get = || {
        block_on(async {
            let patience = Duration::from_secs(30);
            let bob = Peer::new(cluster.ring().node("bob").unwrap(), patience, tcp());
            let key = encode_bytes(key.as_bytes());
            bob.ask("get", &[&key]).await.unwrap();
        });
    };
    let loads = || {
        let carol = status(&cluster, "carol");
        carol["answered"]["load"].as_u64().unwrap()
    };
    poll("bob has asked carol", || {
        get();
        loads() > 0
    });
    // Once in a second, and where dave was slow. Who has joined is asked by each of them again.
    let asks_her_little = |_| {
        let before = loads();
        (0..20).for_each(|_| get());
        loads() - before < 15
    };
    assert!((0..10).any(asks_her_little), "she is asked by each get");
}

#[test]
fn a_node_waits_for_the_neighbour_that_is_down_and_is_ready_for_what_needs_no_neighbour() {
    // Time to lose bob between the two: alice has heard from him, and not read him yet.
    let mut cluster = Cluster::with_limits(&FIVE, "window = \"3s\"");
    cluster.start_all();
    let written = write(&cluster, 60);
    cluster.wait_until_equal();
    cluster.kill("alice");
    cluster.start("alice");
    let lonely = cluster.key_on(&["alice", "bob", "carol"]);
    poll("alice has heard from all", || {
        let refused = load(&cluster, "alice", &lonely).unwrap_err().to_string();
        refused == "joining: waiting for bob, carol"
    });
    cluster.kill("bob");
    poll("alice has read all but bob", || {
        status(&cluster, "alice")["waiting_for"] == serde_json::json!(["bob"])
    });
    let alice = status(&cluster, "alice");
    assert_eq!(
        (&alice["state"], &alice["progress"]),
        (&"joining".into(), &66.into()),
        "four readings of six are done: {alice}"
    );
    let line = cluster.node("alice").wait_for("joining, 66 %");
    assert_eq!(
        line,
        "alice: joining, 66 %, waiting for bob (connection refused)"
    );
    for (key, value) in &written {
        match load(&cluster, "alice", key) {
            _ if !cluster.replicas(key).contains(&"alice".to_owned()) => {}
            Ok(loaded) => assert_eq!(loaded[2], *value, "{key}"),
            Err(error) => {
                let with_bob = cluster.replicas(key).contains(&"bob".to_owned());
                assert!(with_bob, "{key} does not need bob: {error}");
                assert_eq!(error.to_string(), "joining: waiting for bob");
            }
        }
    }
    let get = cluster
        .kv54(["get", &lonely, "--timeout", "500ms"])
        .exits(3);
    get.says(&["unavailable:", "of 3 replicas answered, 2 needed", "bob: "]);
    let sound = cluster.key_on(&["dave", "erin", "alice"]);
    load(&cluster, "alice", &sound).unwrap();

    // Anew, with bob down from the start. He might know that the ring has changed.
    cluster.kill("alice");
    cluster.start("alice");
    poll("alice has heard from all but bob", || {
        status(&cluster, "alice")["waiting_for"] == serde_json::json!(["bob"])
    });
    let entry = ask(&cluster, "carol", "load", &[(*lonely).into()]).unwrap();
    for refused in [
        load(&cluster, "alice", &sound),
        ask(&cluster, "alice", "store", &[(*lonely).into(), entry]),
    ] {
        let refused = refused.unwrap_err().to_string();
        assert_eq!(refused, "joining: waiting to hear from bob");
    }
    let line = cluster
        .node("alice")
        .wait_for("joining, 0 %, waiting for bob");
    assert_eq!(
        line,
        "alice: joining, 0 %, waiting for bob (connection refused)"
    );
    // Her guests are served by the others.
    let key = cluster.key_on(&["carol", "dave", "erin"]);
    cluster
        .kv54(["set", &key, "green", "--via", "alice"])
        .exits(0);
    let got = cluster.kv54(["get", &key, "--via", "alice"]).exits(0);
    assert_eq!(got.text(), "green\n");

    cluster.start("bob");
    cluster.node("bob").wait_for("ready with");
    cluster.node("alice").wait_for("ready with");
    // The third replica of each key had everything, but no node can know that.
    let said = cluster.kv54(["status", "--wait"]).exits(1);
    let doubt = "erin's keys: alice and bob were without their memory at the same time";
    assert!(said.text().contains(doubt), "{said:?}");
    cluster.kv54(["status", "--acknowledge"]).exits(0);
    assert_eq!(cluster.differences(), [""; 0]);
    for node in ["alice", "bob"] {
        assert_holds(&cluster, node, &written);
    }
}

#[test]
fn nodes_that_start_in_any_order_and_far_apart_become_ready_together() {
    let mut cluster = Cluster::of(&FIVE);
    let reports = |cluster: &Cluster, name, waits_for: &str| {
        poll(&format!("{name} is {waits_for}"), || {
            let mut lines = cluster.node(name).log().into_iter();
            lines.any(|line| line.contains("joining, ") && line.ends_with(waits_for))
        });
    };
    for name in ["carol", "erin", "alice"] {
        cluster.start(name);
    }
    for name in ["carol", "erin", "alice"] {
        let both = "waiting for bob (connection refused), dave (connection refused)";
        reports(&cluster, name, both);
    }
    cluster
        .kv54(["set", "tea", "early", "--timeout", "500ms"])
        .exits(3);
    cluster.start("dave");
    reports(&cluster, "dave", "waiting for bob (connection refused)");
    cluster.kv54(["status"]).exits(3);
    cluster.start("bob");
    for name in FIVE {
        cluster.node(name).wait_for("ready with 0 keys");
    }
    cluster.kv54(["status"]).exits(0);
    cluster.kv54(["set", "tea", "green"]).exits(0);
    assert_eq!(cluster.kv54(["get", "tea"]).exits(0).text(), "green\n");
}

#[test]
fn a_set_that_comes_before_anybody_is_ready_waits_and_succeeds() {
    let cluster = Cluster::of(&FIVE);
    let all = cluster.spawn(["serve", "--all"]);
    for name in FIVE {
        all.wait_for(&format!("{name}: listening on"));
    }
    cluster
        .kv54(["set", "tea", "green", "--timeout", "30s"])
        .exits(0);
    assert_eq!(cluster.kv54(["get", "tea"]).exits(0).text(), "green\n");
    for name in FIVE {
        all.wait_for(&format!("{name}: ready with"));
    }
    let got = cluster.kv54(["get", "tea", "--via", "carol"]).exits(0);
    assert_eq!(got.text(), "green\n");
}

#[test]
fn a_dead_host_is_replaced_by_another_at_another_address() {
    let mut cluster = Cluster::five();
    let mut written = write(&cluster, 60);
    cluster.kill("erin");
    for (n, key) in written.keys().cloned().enumerate().collect::<Vec<_>>() {
        let value = match n % 3 {
            0 => Value::from("after"),
            1 => Value::Nil,
            _ => continue,
        };
        block_on(cluster.client().set(key.as_bytes(), &encode(&value))).unwrap();
        written.insert(key, value);
    }
    let file = std::fs::read_to_string(cluster.dir.join("cluster.toml")).unwrap();
    let (old, new) = (cluster.address("erin"), cluster.spare_port(0));
    let file = file.replace(&old, &format!("127.0.0.1:{new}"));
    cluster.file("cluster.toml", &file);
    cluster.start("erin"); // the others still run from the old file
    cluster.wait_until_ready();
    let erin = status(&cluster, "erin");
    assert_eq!(erin["address"], format!("127.0.0.1:{new}"));
    assert_holds(&cluster, "erin", &written);
    for via in ["", "erin", "alice"] {
        assert_reads(&cluster, via, &written);
    }

    for name in ["alice", "bob", "carol", "dave"] {
        cluster.stop(name);
        cluster.start(name);
        cluster.wait_until_ready();
    }
    cluster.wait_until_equal();
    for via in ["", "erin", "alice"] {
        assert_reads(&cluster, via, &written);
    }
    for node in FIVE {
        assert_holds(&cluster, node, &written);
    }
}

#[test]
fn a_replica_that_was_cut_off_is_made_equal_again_within_ten_seconds_though_sets_go_on() {
    let cluster = Cluster::five();
    let mut written = write(&cluster, 60);
    cluster.wait_until_equal();
    let before = status(&cluster, "dave")["digests"].clone();
    cluster.signal("dave", "STOP");
    // This writer cannot reach dave at all, so nothing waits in his socket for him to wake up.
    let file = std::fs::read_to_string(cluster.dir.join("cluster.toml")).unwrap();
    let nobody = format!("127.0.0.1:{}", cluster.spare_port(0));
    cluster.file("cut.toml", &file.replace(&cluster.address("dave"), &nobody));
    block_on(async {
        let file = kv54::cluster::Cluster::read(&cluster.dir.join("cut.toml"));
        let replicas = Replicas::new(file.unwrap().into(), Duration::from_secs(5), &tcp());
        let client = Client { replicas };
        for (n, key) in written.keys().cloned().enumerate().collect::<Vec<_>>() {
            let key_of_nobody_yet = format!("{key} too");
            let [key, value] = match n % 3 {
                0 => [Value::from(key), "after".into()],
                1 => [key.into(), Value::Nil],
                _ => [key_of_nobody_yet.into(), "after".into()],
            };
            let key = key.as_str().unwrap();
            client.set(key.as_bytes(), &encode(&value)).await.unwrap();
            written.insert(key.to_owned(), value);
        }
        client.replicas.settle().await;
    });
    // What dave has in memory is unlike what the others have now, in each part that he holds.
    for (part, holder) in [("bob", "bob"), ("carol", "carol"), ("dave", "erin")] {
        let now = &status(&cluster, holder)["digests"][part];
        assert_ne!(before[part], *now, "part {part} has changed at {holder}");
    }
    cluster.signal("dave", "CONT");
    let (is_over, start) = (AtomicBool::new(false), Instant::now());
    let waited = thread::scope(|scope| {
        scope.spawn(|| {
            block_on(async {
                let client = cluster.client();
                let is_on = || !is_over.load(Relaxed) && start.elapsed().as_secs() < 30;
                for n in (0..).take_while(|_| is_on()) {
                    let keys = (0..40).map(|key| format!("busy {key}")); // of all parts
                    let sets =
                        keys.map(async |key| client.set(key.as_bytes(), &Packed::of(n)).await);
                    futures::future::try_join_all(sets).await.unwrap();
                    tokio::time::sleep(Duration::from_millis(300)).await;
                }
            });
        });
        let waited = cluster.wait_until_equal();
        is_over.store(true, Relaxed);
        waited
    });
    println!("equal again after {waited:.1?}");
    assert_holds(&cluster, "dave", &written);
}

#[test]
fn large_and_deep_values_come_back_to_a_restarted_node() {
    let mut cluster = Cluster::five();
    let mut written = BTreeMap::new();
    for n in 0..40_u8 {
        let megabyte: Vec<u8> = (0..=255).cycle().skip(n.into()).take(1 << 20).collect();
        written.insert(format!("large{n}"), Value::Binary(megabyte));
    }
    for n in 0..3_000 {
        written.insert(format!("small{n}"), n.into());
    }
    let deep = Value::Array(vec![Value::Nil; 50_000]);
    let key = cluster.key_on(&["bob", "carol", "dave"]);
    written.insert(key, deep);
    write_all(&cluster, &written);
    cluster.wait_until_equal();
    let before = counts(&cluster);
    cluster.restart("carol");
    assert_eq!(cluster.differences(), [""; 0]);
    assert_eq!(counts(&cluster), before);
    assert_holds(&cluster, "carol", &written);
}

#[test]
fn a_ring_of_one_is_ready_after_two_windows() {
    // It was perhaps one of several before it restarted, and was told of writes.
    let mut cluster = Cluster::with_limits(&["solo"], "window = \"2s\"");
    cluster.start("solo");
    poll("solo says what it waits for", || {
        let solo = status(&cluster, "solo");
        solo["state"] == "joining" && solo["remarks"]["solo"] == "two windows pass first"
    });
    let refused = load(&cluster, "solo", "tea").unwrap_err();
    assert_eq!(refused.to_string(), "joining: waiting for solo");
    cluster
        .kv54(["set", "tea", "green", "--timeout", "30s"])
        .exits(0);
    assert!(status(&cluster, "solo")["uptime_s"].as_u64().unwrap() >= 4);
    assert_eq!(cluster.kv54(["get", "tea"]).exits(0).text(), "green\n");
    cluster.node("solo").wait_for("ready with");
    cluster.kill("solo"); // nobody else has it
    cluster.start("solo");
    cluster.kv54(["get", "tea", "--timeout", "30s"]).exits(1);
}

#[test]
fn a_ring_of_two_loses_nothing_to_a_restart_and_refuses_while_one_is_down() {
    let mut cluster = Cluster::running(&["left", "right"]);
    let written = write(&cluster, 20);
    let key = written.keys().next().unwrap();
    for name in ["left", "right"] {
        cluster.kill(name);
        let get = cluster.kv54(["get", key, "--timeout", "500ms"]).exits(3);
        let refused = ["unavailable:", "of 2 replicas answered, 2 needed", name];
        get.says(&refused);
        let set = cluster.kv54(["set", key, "lost", "--timeout", "500ms"]);
        set.exits(3).says(&["set failed"]).says(&refused);
        cluster.start(name);
        cluster.wait_until_ready();
        assert_eq!(cluster.differences(), [""; 0]);
        assert_reads(&cluster, "", &written);
        assert_holds(&cluster, name, &written);
    }
}

/// Writes `key0`, `key1`, …: what was written.
fn write(cluster: &Cluster, keys: usize) -> BTreeMap<String, Value> {
    let pair = |n| (format!("key{n}"), format!("value {n}").into());
    let written = (0..keys).map(pair).collect();
    write_all(cluster, &written);
    written
}

fn write_all(cluster: &Cluster, pairs: &BTreeMap<String, Value>) {
    block_on(async {
        let client = cluster.client();
        let writes = pairs
            .iter()
            .map(async |(key, value)| client.set(key.as_bytes(), &encode(value)).await);
        let mut writes = stream::iter(writes).buffer_unordered(16);
        while let Some(written) = writes.next().await {
            written.unwrap();
        }
        client.replicas.settle().await;
    });
}

/// Asserts that a client, or this node for its guests, reads all of it.
#[track_caller]
fn assert_reads(cluster: &Cluster, via: &str, written: &BTreeMap<String, Value>) {
    for (key, value) in written {
        let got = match via {
            "" => cluster.kv54(["get", key]),
            via => cluster.kv54(["get", key, "--via", via]),
        };
        match value.as_str() {
            Some(text) => assert_eq!(got.exits(0).text(), format!("{text}\n"), "{key}"),
            None => drop(got.exits(1)),
        }
    }
}

/// Asserts that a node's own memory has the newest value of every key that is to be there.
#[track_caller]
fn assert_holds(cluster: &Cluster, node: &str, written: &BTreeMap<String, Value>) {
    let mut held = 0;
    for (key, value) in written {
        if cluster.replicas(key).contains(&node.to_owned()) {
            let loaded = load(cluster, node, key).unwrap();
            assert!(loaded[2] == *value, "{key} at {node}");
            held += 1;
        }
    }
    assert!(held > 0, "{node} holds some of the keys");
}

/// What one node itself has under a key.
fn load(cluster: &Cluster, node: &str, key: &str) -> Result<Value, Error> {
    ask(cluster, node, "load", &[key.into()])
}

/// Asks one node as another node would.
fn ask(cluster: &Cluster, node: &str, method: &str, params: &[Value]) -> Result<Value, Error> {
    let place = cluster.ring().place(node).unwrap();
    block_on(async {
        let client = cluster.client();
        let params: Vec<Vec<u8>> = params.iter().map(encode).collect();
        let params: Vec<&[u8]> = params.iter().map(Vec::as_slice).collect();
        decode(&client.replicas.ask(place, method, &params).await?)
    })
}

/// A node's line of `kv54 status --json`.
fn status(cluster: &Cluster, node: &str) -> serde_json::Value {
    let status = cluster.kv54(["status", "--json"]).json();
    let mut nodes = status["nodes"].as_array().unwrap().iter();
    nodes.find(|line| line["name"] == node).unwrap().clone()
}

/// How many keys and tombstones each node has.
fn counts(cluster: &Cluster) -> Vec<String> {
    let status = cluster.kv54(["status", "--json"]).json();
    let nodes = status["nodes"].as_array().unwrap().iter();
    let count = |node: &serde_json::Value| {
        format!(
            "{}: {} keys, {} tombstones",
            node["name"], node["keys"], node["tombstones"]
        )
    };
    nodes.map(count).collect()
}

#[track_caller]
fn poll(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(30), "never: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

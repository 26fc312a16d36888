//! What is deleted is forgotten, by rounds that the nodes begin themselves: memory comes back, and no value does.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use std::collections::BTreeMap;

use common::wire::{NIL, Wire, bin, entry};
use common::{Cluster, block_on};
use kv54::beyond::forget;
use kv54::cluster::Told;
use kv54::entry::{Entry, Packed, Stamp};
use kv54::rpc::codec::encode;
use kv54::status::Status;
use kv54::store::Prepare;
use msgpack_rpc::Value;

const THREE: [&str; 3] = ["alice", "bob", "carol"];
const LITTLE: &str = "memory = \"1MiB\"";
/// What so little a memory forgets at once, in bytes: what is left is less, or was carried on by a round.
const WORTH_IT: u64 = 64 << 10;
const PATIENCE: Duration = Duration::from_secs(60);

/// `KV54_SESSIONS=1000000` is many times what the memory of the nodes could hold as tombstones.
#[test]
fn sessions_come_and_go_for_ever_and_a_node_is_killed_among_them() {
    let sessions = std::env::var("KV54_SESSIONS").map_or(20_000, |text| text.parse().unwrap());
    let mut cluster = Cluster::with_limits(&THREE, LITTLE);
    cluster.start_all();
    cluster.wait_until_ready();
    // What lives stays, and nine tenths of the memory are for what lives: here it takes a half.
    let lives: Vec<String> = (0..400).map(|n| format!("lives:{n}")).collect();
    let mut wire = Wire::to(&cluster, "alice");
    for key in &lives {
        wire.does("set", [key.as_str().into(), bin(&[5; 1_200])]);
    }
    let done = AtomicUsize::new(0);
    let guests = ["alice", "bob", "alice", "bob"].map(|via| Wire::to(&cluster, via));
    thread::scope(|scope| {
        for (number, mut wire) in guests.into_iter().enumerate() {
            let done = &done;
            scope.spawn(move || {
                for session in 0..sessions / 4 {
                    let key = format!("session:{number}:{session}");
                    insist(&mut wire, "set", &[key.as_str().into(), "a guest".into()]);
                    insist(&mut wire, "delete", &[key.as_str().into()]);
                    done.fetch_add(1, Relaxed);
                }
            });
        }
        while done.load(Relaxed) < sessions / 2 {
            thread::sleep(Duration::from_millis(20));
        }
        cluster.restart("carol"); // no round ends without her
    });
    cluster.wait_until_ready();
    for key in &lives {
        assert_eq!(
            wire.does("get", [key.as_str().into()]),
            bin(&[5; 1_200]),
            "{key}"
        );
    }
    assert_eq!(wire.does("get", ["session:0:7".into()]), NIL);
    let left = |node: &serde_json::Value| {
        let (garbage, carried) = (node["garbage"].as_u64()?, node["carried"].as_u64()?);
        Some(garbage.saturating_sub(carried))
    };
    until(|| {
        let all = nodes(&cluster).iter().map(left).sum::<Option<u64>>();
        all.is_some_and(|bytes| bytes < 3 * WORTH_IT)
    });
    cluster.wait_until_equal();
    let said = cluster.kv54(["status"]).exits(0);
    assert!(said.text().contains(", forgotten "), "{}", said.text());
}

#[test]
fn what_was_deleted_while_a_node_was_cut_off_does_not_come_back() {
    let cluster = Cluster::running(&THREE);
    let keys: Vec<String> = (0..100).map(|n| format!("cup:{n}")).collect();
    let (ring, mut wires) = (cluster.ring(), THREE.map(|name| Wire::to(&cluster, name)));
    for key in &keys {
        wires[0].does("set", [key.as_str().into(), "full".into()]);
    }
    cluster.wait_until_equal();
    // Deletes that reach alice and bob, and not carol.
    for key in &keys {
        for (name, wire) in THREE.iter().zip(&mut wires).take(2) {
            let ring = ring.fingerprint(name);
            let gone = entry(1 << 20, 54, NIL);
            wire.does("store", [ring.into(), key.as_str().into(), gone]);
        }
    }
    assert_eq!(wires[2].status("keys"), 100);
    cluster.kv54(["resize", "--again"]).exits(0);
    cluster.wait_until_equal();
    for (name, wire) in THREE.iter().zip(&mut wires) {
        assert_eq!(wire.status("keys") + wire.status("tombstones"), 0, "{name}");
        for key in &keys {
            assert_eq!(
                wire.does("get", [key.as_str().into()]),
                NIL,
                "{key} via {name}"
            );
        }
    }
}

#[test]
fn a_round_waits_for_a_node_that_is_down_and_a_resize_for_the_round() {
    let mut cluster = Cluster::of(&["alice", "bob", "carol", "dave"]);
    cluster.ring_file("three.toml", &THREE, &[]);
    for name in THREE {
        cluster.start_with(name, "three.toml");
    }
    until(|| cluster.kv54(["status", "--config", "three.toml"]).code == 0);
    cluster.start("dave");
    // Somebody has begun a round and has gone, when carol dies: the nodes themselves go on with it.
    block_on(async {
        let client = cluster.client_with("three.toml");
        client.set(b"tea", &Packed::of("green")).await.unwrap();
        let begun = client
            .replicas
            .state()
            .changing_to(cluster.ring_of("three.toml"));
        client.replicas.hear(&Told::of(&begun, true)).unwrap();
        cluster.kill("carol");
        client.replicas.exchange_all().await;
    });
    let said = cluster.kv54(["status"]).exits(3);
    let waits = "the ring alice bob carol forgets what was deleted";
    assert!(said.text().contains(waits), "{}", said.text());
    assert!(
        said.text().contains("it waits for carol; ends by itself"),
        "{}",
        said.text()
    );

    let mut resize = cluster.spawn(["resize"]);
    resize.wait_for("waiting for the ring: it forgets what was deleted");
    cluster.start_with("carol", "three.toml");
    assert_eq!(resize.wait(), 0, "{:?}", resize.log());
    for via in ["alice", "dave"] {
        assert_eq!(
            Wire::to(&cluster, via).does("get", ["tea".into()]),
            "green".into()
        );
    }
}

#[test]
fn guests_that_hold_all_connections_do_not_hold_forgetting_up() {
    let mut cluster = Cluster::with_limits(&["alice"], &format!("{LITTLE}\nconnections = 1"));
    cluster.start_all();
    cluster.wait_until_ready();
    let mut only = Wire::to(&cluster, "alice");
    for n in 0..2_000 {
        let key = format!("session:{n}");
        only.does("set", [key.as_str().into(), "a guest".into()]);
        only.does("delete", [key.as_str().into()]);
    }
    // A round may have come in between: then so little may be left that no other one is worth it.
    let start = Instant::now();
    while only.status("garbage") >= WORTH_IT + only.status("carried") {
        assert!(start.elapsed() < PATIENCE, "nothing is forgotten");
        thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_client_outlives_the_memory_of_all_nodes() {
    let mut cluster = Cluster::running(&THREE);
    cluster.kv54(["resize", "--again"]).exits(0);
    let client = cluster.client();
    block_on(client.set(b"tea", &Packed::of("green"))).unwrap();
    for name in THREE {
        cluster.kill(name);
    }
    for name in THREE {
        cluster.start(name);
    }
    cluster.wait_until_ready();
    block_on(async {
        assert!(client.get(b"tea").await.unwrap().is_nil());
        client.set(b"tea", &Packed::of("black")).await.unwrap();
    });
}

#[test]
fn a_round_goes_on_at_the_addresses_of_a_newer_file() {
    let mut cluster = Cluster::running(&THREE);
    block_on(async {
        let client = cluster.client();
        client.set(b"tea", &Packed::of("green")).await.unwrap();
        let begun = client.replicas.state().changing_to(cluster.ring());
        client.replicas.hear(&Told::of(&begun, true)).unwrap();
        cluster.kill("carol");
        client.replicas.exchange_all().await;
    });
    let (old, port) = (cluster.address("carol"), cluster.spare_port(0));
    let new = format!("127.0.0.1:{port}");
    cluster.edit(&old, &new);
    cluster.reload(&format!("carol is at {new}"));
    cluster.start("carol");
    cluster.wait_until_ready();
    until(|| {
        nodes(&cluster)
            .iter()
            .all(|node| field(node, "forgot_s") < 60)
    });
    cluster.kv54(["get", "tea"]).exits(0);
}

#[test]
fn a_round_is_worth_it_for_a_tenth_of_what_is_kept_or_of_a_memory_that_is_nearly_full() {
    let node = |bytes, garbage, carried, forgot_s| Status {
        memory: 1_000_000,
        bytes,
        garbage,
        carried,
        forgot_s,
        ..Status::default()
    };
    let quiet = node(700_000, 0, 0, None);
    for (is_worth_it, nodes) in [
        (false, vec![quiet.clone(), quiet.clone()]),
        (false, vec![node(700_000, 69_000, 0, None); 3]),
        (true, vec![node(700_000, 71_000, 0, None); 3]),
        (false, vec![node(300_000, 63_000, 0, None); 3]), // too little
        (true, vec![node(300_000, 66_000, 0, None); 3]),
        (false, vec![node(700_000, 300_000, 0, Some(4)); 3]), // it rests
        (true, vec![node(700_000, 300_000, 0, Some(5)); 3]),
        // One that is nearly full does not rest, and counts alone.
        (
            true,
            vec![
                node(760_000, 101_000, 0, Some(0)),
                quiet.clone(),
                quiet.clone(),
                quiet.clone(),
            ],
        ),
        (
            false,
            vec![
                node(760_000, 99_000, 0, Some(0)),
                quiet.clone(),
                quiet.clone(),
                quiet,
            ],
        ),
        // What was read during the last round waits longer for the next one.
        (false, vec![node(990_000, 800_000, 750_000, Some(299)); 3]),
        (true, vec![node(990_000, 800_000, 750_000, Some(300)); 3]),
    ] {
        let told = forget::is_worth_it(&nodes, 64 << 10);
        assert_eq!(told, is_worth_it, "{nodes:?}");
    }
}

#[test]
fn what_can_be_forgotten_is_counted_to_the_byte() {
    let cluster = Cluster::of(&["alone"]);
    let (store, mut expected) = (cluster.ready_store(0), BTreeMap::new());
    let replica = store.at(0);
    for step in 1..4_000_u64 {
        let key = format!("{:03}", fastrand::u16(..300));
        let (is_nil, swapped) = expected.get(&key).copied().unwrap_or((true, false));
        let stamp = Stamp::new(step, 1, 0);
        let (is_nil, swapped) = match fastrand::u8(..4) {
            0 => {
                let _ = replica
                    .promise(key.as_bytes(), Prepare::of(step << 16))
                    .unwrap();
                (is_nil, true)
            }
            1 => {
                let value = Entry {
                    stamp: stamp.swapped(step << 16),
                    value: &encode(&1.into())[..],
                };
                (replica.store(key.as_bytes(), value).unwrap(), (false, true)).1
            }
            2 => {
                replica
                    .store(
                        key.as_bytes(),
                        Entry {
                            stamp,
                            value: &[0xc0],
                        },
                    )
                    .unwrap();
                (true, swapped)
            }
            _ => {
                replica
                    .store(key.as_bytes(), Entry { stamp, value: &[7] })
                    .unwrap();
                (false, swapped)
            }
        };
        expected.insert(key, (is_nil, swapped));
        let sizes = expected.values().filter(|(is_nil, _)| *is_nil);
        let bytes: usize = sizes
            .map(|(_, swapped)| 103 + usize::from(*swapped) * 80)
            .sum();
        assert_eq!((store.status().garbage, store.status().carried), (bytes, 0));
    }
}

/// Asks until it is done: a ring that is full of what was deleted refuses for as long as a round takes.
fn insist(wire: &mut Wire, method: &str, params: &[Value]) {
    let begun = Instant::now();
    while let Err(why) = wire.asks(method, params.to_vec()) {
        assert!(why.starts_with("full: "), "{why}");
        assert!(begun.elapsed() < PATIENCE, "{why}");
        thread::sleep(Duration::from_millis(20));
    }
}

fn until(holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(100));
    }
}

fn nodes(cluster: &Cluster) -> Vec<serde_json::Value> {
    let json = cluster.kv54(["status", "--json"]).json();
    json["nodes"].as_array().unwrap().clone()
}

fn field(node: &serde_json::Value, field: &str) -> u64 {
    node[field].as_u64().unwrap_or(u64::MAX)
}

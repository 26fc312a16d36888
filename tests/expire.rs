//! Values that end by themselves, as people, guests and clients of their own meet them.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant, UNIX_EPOCH};

use common::wire::{NIL, Wire, array};
use common::{Cluster, Node, Said, block_on};
use futures::future::{join, join_all};
use kv54::client::Client;
use kv54::entry::Packed;
use kv54::rpc::codec::encode;
use msgpack_rpc::Value;
use tokio::time::sleep;

const THREE: [&str; 3] = ["alice", "bob", "carol"];

/// Longer than the sweeper of any replica takes, at rest.
const SWEPT: Duration = Duration::from_secs(10);

#[test]
fn a_value_that_ends_is_gone_through_every_node_at_once() {
    let cluster = Cluster::running(&THREE);
    cluster
        .kv54(["set", "tea", "green", "--ttl", "2s"])
        .exits(0);
    assert!((1..=2_000).contains(&ttl_ms(&cluster, "tea")));
    let mut guests = THREE.map(|node| Wire::to(&cluster, node));
    let mut gone = 0;
    while gone < 9 {
        for guest in &mut guests {
            match guest.does("get", ["tea".into()]) == NIL {
                true => gone += 1,
                false => assert_eq!(gone, 0, "it was gone, and is back"),
            }
        }
    }
    prints(cluster.kv54(["get", "tea"]), 1, "");

    // A set without a time to live has none, and a counter keeps the one that it has.
    cluster
        .kv54(["set", "tea", "green", "--ttl", "300ms"])
        .exits(0);
    cluster.kv54(["set", "tea", "black"]).exits(0);
    cluster
        .kv54(["set", "cups", "5", "--value-json", "--ttl", "1h"])
        .exits(0);
    prints(cluster.kv54(["incr", "cups"]), 0, "6\n");
    assert!(ttl_ms(&cluster, "cups") > 3_000_000);
    thread::sleep(Duration::from_millis(400)); // the time is what is tested
    prints(cluster.kv54(["get", "tea"]), 0, "black\n");
}

#[test]
fn expire_changes_the_end_and_not_the_value() {
    let cluster = Cluster::running(&THREE);
    prints(cluster.kv54(["expire", "tea", "10m"]), 1, "").says(&["key \"tea\" is absent"]);
    cluster.kv54(["set", "tea", "green"]).exits(0);
    prints(cluster.kv54(["expire", "tea", "10m"]), 0, "ok\n");
    prints(cluster.kv54(["get", "tea"]), 0, "green\n");
    assert!(ttl_ms(&cluster, "tea") > 500_000);
    let held = cluster.kv54(["where", "tea"]).exits(0);
    assert!(held.text().contains(" (9m "), "{}", held.text());
    prints(cluster.kv54(["expire", "tea", "--never"]), 0, "ok\n");
    let json = cluster.kv54(["get", "tea", "--json"]).exits(0).json();
    assert_eq!(json["ttl_ms"], serde_json::Value::Null, "{json}");
    cluster.kv54(["expire", "tea", "1ms"]).exits(0);
    thread::sleep(Duration::from_millis(10)); // the time is what is tested
    prints(cluster.kv54(["get", "tea"]), 1, "");
}

#[test]
fn guests_set_and_compare_with_a_time_to_live() {
    let cluster = Cluster::running(&THREE);
    let mut guest = Wire::to(&cluster, "alice");
    let [tea, green, black] = ["tea", "green", "black"].map(Value::from);
    assert_eq!(
        guest.does("set", [tea.clone(), green.clone(), 60_000.into()]),
        NIL
    );
    assert_eq!(guest.does("get", [tea.clone()]), green);
    let renewed = guest.does("cas", [tea.clone(), green.clone(), green, 1.into()]);
    assert_eq!(renewed, array([true.into(), NIL]));
    while guest.does("get", [tea.clone()]) != NIL {}
    let created = guest.does("cas", [tea.clone(), NIL, black.clone(), 60_000.into()]);
    assert_eq!(created, array([true.into(), NIL]));
    let via = ["set", "cups", "5", "--ttl", "1h", "--via", "bob"];
    prints(cluster.kv54(via), 0, "ok\n");
    prints(
        cluster.kv54(["cas", "cups", "5", "6", "--ttl", "2h", "--via", "bob"]),
        0,
        "ok\n",
    );
    let left = ttl_ms(&cluster, "cups");
    assert!((3_600_001..=7_200_000).contains(&left), "{left} ms");
}

#[test]
fn a_time_to_live_that_is_none_writes_nothing() {
    let cluster = Cluster::running(&THREE);
    let mut guest = Wire::to(&cluster, "alice");
    let [tea, white, black] = ["tea", "white", "black"].map(Value::from);
    guest.does("set", [tea.clone(), black.clone()]);
    let century = 36_525 * 86_400_000_u64;
    let odd = [
        0.into(),
        (-1).into(),
        "1s".into(),
        1.5.into(),
        NIL,
        true.into(),
        (century + 1).into(),
        u64::MAX.into(),
    ];
    for odd in odd {
        let why = ["bad-request: a time to live is from 1 ms to 100 years"];
        guest.refuses("set", [tea.clone(), white.clone(), odd.clone()], &why);
        guest.refuses(
            "cas",
            [tea.clone(), black.clone(), white.clone(), odd],
            &why,
        );
    }
    for odd in [
        "0s",
        "-5s",
        "5",
        "soon",
        "101years",
        "",
        "99999999999999999999y",
    ] {
        cluster.kv54(["set", "tea", "white", "--ttl", odd]).exits(2);
        cluster
            .kv54(["cas", "tea", "black", "white", "--ttl", odd])
            .exits(2);
        cluster.kv54(["expire", "tea", odd]).exits(2);
        for key in ["nightly", "tea"] {
            let lock = ["lock", key, "--ttl", odd, "--", "true"];
            cluster.kv54(lock).exits(2); // the second one is taken
        }
    }
    let deletes = ["cas", "tea", "black", "--delete", "--ttl", "5s"];
    cluster.kv54(deletes).exits(2);
    cluster.kv54(["expire", "tea"]).exits(2);
    cluster.kv54(["expire", "tea", "5m", "--never"]).exits(2);
    let ends = |ends: &str| format!("{{\"key\":\"tea\",\"value\":\"white\",\"ends\":{ends}}}\n");
    for odd in ["\"soon\"", "5", "\"\"", "\"2009-11-26\""] {
        cluster.kv54_with(["import"], ends(odd).as_bytes()).exits(2);
    }
    prints(cluster.kv54(["get", "tea"]), 0, "black\n");
    prints(cluster.kv54(["get", "nightly"]), 1, "");
    let json = cluster.kv54(["get", "tea", "--json"]).exits(0).json();
    assert_eq!(json["ttl_ms"], serde_json::Value::Null, "{json}");
}

/// Guests of one node that wait for their turns are done together. A counter that ends between two turns
/// begins anew, and each of them hears what it has counted.
#[test]
fn counting_goes_on_when_the_counter_ends() {
    const ROUNDS: u64 = 10;
    const MANY: u64 = 1 << 40; // no guest counts so far
    let cluster = Cluster::running(&THREE);
    let is_over = AtomicBool::new(false);
    let anew = thread::scope(|scope| {
        let count = || {
            let (mut guest, mut anew) = (Wire::to(&cluster, "alice"), 0);
            while !is_over.load(Relaxed) {
                anew += u64::from(guest.does("incr", ["cups".into()]) == 1.into());
            }
            anew
        };
        let counting: Vec<_> = (0..8).map(|_| scope.spawn(count)).collect();
        let mut host = Wire::to(&cluster, "bob");
        for _ in 0..ROUNDS {
            host.does("set", ["cups".into(), MANY.into(), 50.into()]);
            let cups = || host.does("get", ["cups".into()]).as_u64();
            let mut cups = std::iter::repeat_with(cups);
            cups.find(|cups| cups.is_some_and(|cups| cups < MANY)); // somebody has counted anew
        }
        is_over.store(true, Relaxed);
        counting
            .into_iter()
            .map(|guest| guest.join().unwrap())
            .sum::<u64>()
    });
    // Once more at the beginning, if nothing was set before.
    assert!((ROUNDS..=ROUNDS + 1).contains(&anew), "{anew}");
}

/// The form in which nodes keep a value that ends. A client that sends it by chance means something else.
#[test]
fn a_value_that_looks_as_if_it_ended_is_refused() {
    let cluster = Cluster::running(&THREE);
    let mut guest = Wire::to(&cluster, "alice");
    let tea = Value::from("tea");
    let ext = |value: &[u8]| Value::Ext(-54, [&1_u64.to_be_bytes(), value].concat());
    let ends = ext(&encode(&"green".into()));
    let refused = ["bad-request: a value cannot be an ext of type -54"];
    guest.refuses("set", [tea.clone(), ends.clone()], &refused);
    guest.refuses("set", [tea.clone(), ends.clone(), 1000.into()], &refused);
    guest.refuses("cas", [tea.clone(), NIL, ends.clone()], &refused);
    guest.refuses(
        "cas",
        [tea.clone(), NIL, ends.clone(), 1000.into()],
        &refused,
    );
    guest.refuses("cas", [tea.clone(), ends.clone(), NIL], &refused);
    let line = "{\"key\":\"tea\",\"value_msgpack\":\"2MoAAAAAAAAAAQAAAAAAAAAA\"}\n";
    cluster
        .kv54_with(["import"], line.as_bytes())
        .exits(2)
        .says(&["ext of type -54"]);
    // What is no such value is none: another type, nothing behind it, or within another value.
    let short = Value::Ext(-54, vec![1, 2, 3]);
    for kept in [short, Value::Ext(54, vec![0; 16]), array([ends.clone()])] {
        guest.does("set", [tea.clone(), kept.clone()]);
        assert_eq!(guest.does("get", [tea.clone()]), kept);
    }
    // A replica takes it from another node alone if what ends is one value.
    let ring = Value::from(cluster.ring().fingerprint("alice"));
    let whole = encode(&"green".into());
    let odd = [
        &[][..],
        &[0xc0],
        &[0xa5, b'g'],
        &[whole.clone(), whole].concat(),
        &encode(&ends),
    ];
    for odd in odd {
        let entry = array([u64::from(u32::MAX).into(), 1.into(), ext(odd)]);
        let stored = guest.asks("store", [ring.clone(), tea.clone(), entry]);
        assert!(
            stored.clone().unwrap_err().starts_with("bad-request: "),
            "{stored:?} {odd:?}"
        );
    }
    assert_eq!(guest.does("get", [tea]), array([ends]));
}

/// One client's clock is two hours ahead. It ends a value for all, or finds it renewed.
#[test]
fn a_renewal_that_came_first_stays() {
    let cluster = Cluster::running(&THREE);
    let client = cluster.client();
    let ahead = ahead_by(hours(2), &cluster);
    let mut renewals = 0;
    block_on(async {
        for round in 0..300_u64 {
            let key = format!("session:{}", round % 7);
            let key = key.as_bytes();
            let value = client.lasting(&Packed::of(round), hours(1)).unwrap();
            client.set(key, &value).await.unwrap();
            let renewal = async {
                sleep(Duration::from_micros(100 * (round % 20))).await;
                client.expire(key, Some(hours(9))).await
            };
            let (seen, renewed) = join(ahead.get(key), renewal).await;
            let (renewed, seen) = (renewed.unwrap(), seen.unwrap());
            let is_there = match renewed {
                true => Packed::of(round),
                false => Packed::default(),
            };
            for reader in [&client, &ahead, &client] {
                assert_eq!(
                    reader.get(key).await.unwrap(),
                    is_there,
                    "renewed {renewed}, seen {seen:?}"
                );
            }
            assert!(
                renewed || seen.is_nil(),
                "{seen:?} was neither renewed nor gone"
            );
            renewals += u32::from(renewed);
        }
    });
    assert!((1..300).contains(&renewals), "{renewals} of 300 came first");
}

/// All find it over at the same moment, and none gets in the way of the others for long.
#[test]
fn a_crowd_reads_a_value_when_it_ends() {
    let cluster = Cluster::running(&THREE);
    let (client, crowd) = (
        cluster.client(),
        [1, 2, 3, 4].map(|by| ahead_by(hours(by), &cluster)),
    );
    block_on(async {
        for round in 0..10 {
            let value = client
                .lasting(&Packed::of(round), Duration::from_secs(1800))
                .unwrap();
            client.set(b"news", &value).await.unwrap();
            let begun = Instant::now();
            let gets = (0..50).flat_map(|_| crowd.iter().map(|reader| reader.get(b"news")));
            for seen in join_all(gets).await {
                assert!(seen.unwrap().is_nil());
            }
            println!("200 gets: {:?}", begun.elapsed());
        }
    });
}

#[test]
fn what_nobody_reads_is_swept() {
    const KEYS: usize = 100_000;
    let cluster = Cluster::running(&THREE);
    let client = cluster.client();
    let value = Packed::of("x".repeat(400));
    let keys: Vec<String> = (0..KEYS).map(|n| format!("session:{n}")).collect();
    block_on(async {
        for keys in keys.chunks(500) {
            let value = client.lasting(&value, Duration::from_secs(2)).unwrap();
            let set = async |key: &String| client.set(key.as_bytes(), &value).await.unwrap();
            join_all(keys.iter().map(set)).await;
        }
    });
    let (set, mut status) = (Instant::now(), nodes(&cluster));
    let field = |node: &serde_json::Value, field: &str| node[field].as_u64().unwrap();
    while status.iter().any(|node| field(node, "keys") > 0) {
        assert!(set.elapsed() < 6 * SWEPT, "{status:?}");
        status = nodes(&cluster);
    }
    println!("swept {:?} after the last set", set.elapsed());
    // And what is left of them is forgotten.
    while status.iter().any(|node| field(node, "bytes") > 100_000) {
        assert!(set.elapsed() < 12 * SWEPT, "{status:?}");
        status = nodes(&cluster);
    }
    println!("forgotten {:?} after the last set", set.elapsed());
}

#[test]
fn an_export_keeps_when_values_end() {
    let cluster = Cluster::running(&THREE);
    cluster
        .kv54(["set", "tea", "green", "--ttl", "1h"])
        .exits(0);
    let dump = cluster.kv54(["export"]).exits(0);
    assert!(dump.text().contains("\"ends\":\"20"), "{}", dump.text());
    cluster.kv54(["delete", "tea"]).exits(0);
    cluster
        .kv54_with(["import"], dump.text().as_bytes())
        .exits(0);
    assert!((3_500_000..=3_600_000).contains(&ttl_ms(&cluster, "tea")));
    let resp = cluster.kv54(["export", "--resp"]).exits(0);
    assert!(resp.text().starts_with("*5\r\n"), "{}", resp.text());
}

#[test]
fn a_lock_ends_by_itself_if_its_holder_is_killed() {
    let cluster = Cluster::running(&THREE);
    let holds = |then: &str| {
        let (mut command, shell) = (cluster.command(), format!("echo held >&2; {then}"));
        command.args(["lock", "nightly", "--ttl", "3s", "--", "sh", "-c", &shell]);
        let holder = Node::spawn(&mut command);
        holder.wait_for("held");
        holder
    };
    let mut holder = holds("sleep 20");
    thread::sleep(Duration::from_millis(4_500)); // the time is what is tested: it is renewed
    cluster.kv54(["get", "nightly"]).exits(0);
    holder.signal("KILL");
    holder.wait();
    prints(
        cluster.kv54(["lock", "nightly", "--timeout", "10s", "--", "echo", "mine"]),
        0,
        "mine\n",
    );

    // Who loses it ends the command.
    let mut loser = holds("exec sleep 60");
    cluster.kv54(["set", "nightly", "somebody else"]).exits(0);
    assert_eq!(loser.wait(), 128 + 15, "{:?}", loser.log());
    loser.wait_for("the lock is lost: somebody else has written it");
}

fn hours(hours: u64) -> Duration {
    Duration::from_secs(hours * 3600)
}

/// A client with another clock.
fn ahead_by(by: Duration, cluster: &Cluster) -> Client {
    let (client, since) = (cluster.client(), UNIX_EPOCH.elapsed().unwrap() + by);
    let begun = Instant::now();
    client.replicas.go_by(Arc::new(move || {
        u64::try_from((since + begun.elapsed()).as_millis()).unwrap()
    }));
    client
}

/// How long the value of a key lasts still.
fn ttl_ms(cluster: &Cluster, key: &str) -> u64 {
    let json = cluster.kv54(["get", key, "--json"]).exits(0).json();
    json["ttl_ms"].as_u64().unwrap_or_else(|| panic!("{json}"))
}

/// What each node says of itself. One that does not run for a second is asked again.
fn nodes(cluster: &Cluster) -> Vec<serde_json::Value> {
    let status = || cluster.kv54(["status", "--json"]);
    let said = (0..20).map(|_| status()).find(|said| said.code == 0);
    let json = said.unwrap_or_else(status).exits(0).json();
    json["nodes"].as_array().unwrap().clone()
}

fn prints(said: Said, code: i32, text: &str) -> Said {
    let said = said.exits(code);
    assert_eq!(said.text(), text);
    said
}

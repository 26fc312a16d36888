//! Stories of memories that were lost at once: whoever can know says so, until a person has read it.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::collections::BTreeSet;
use std::thread::sleep;
use std::time::Duration;

use common::{Cluster, FIVE, block_on};
use kv54::entry::Packed;

const THREE: [&str; 3] = ["alice", "bob", "carol"];
const KEYS: usize = 60;

#[test]
fn three_nodes_that_are_restarted_without_waiting_say_what_they_have_lost() {
    let cluster = restarted(&THREE, Duration::from_millis(100));
    assert_eq!(doubted(&cluster), BTreeSet::from(THREE.map(String::from)));
    let said = cluster.kv54(["export"]).exits(3);
    said.says(&[
        "the export is not complete: 0 keys printed, but ",
        "'s keys: ",
    ]);
    // Also after a round: what is lost is not what was deleted.
    cluster.kv54(["resize", "--again"]).exits(0);
    assert_eq!(doubted(&cluster), BTreeSet::from(THREE.map(String::from)));
    let said = cluster.kv54(["status", "--acknowledge"]).exits(0);
    assert!(!said.text().contains("acknowledge"), "{said:?}");
    assert_eq!(doubted(&cluster), BTreeSet::new());
    cluster.kv54(["export"]).exits(0).says(&["0 keys exported"]);
}

#[test]
fn five_nodes_that_are_restarted_one_second_apart_doubt_every_key_that_is_lost() {
    let cluster = restarted(&FIVE, Duration::from_secs(1));
    let (doubted, ring) = (doubted(&cluster), cluster.ring());
    for key in keys() {
        let got = cluster.kv54(["get", &key]);
        let owner = ring.name(ring.owner(key.as_bytes()));
        assert!(
            got.code == 0 || doubted.contains(owner),
            "{key} of {owner}: {doubted:?}"
        );
    }
    cluster.kv54(["export"]).exits(3);
}

#[test]
fn the_node_that_kept_its_memory_says_that_both_others_have_lost_theirs() {
    let mut cluster = written(&THREE, "");
    for name in ["alice", "bob"] {
        cluster.kill(name);
    }
    for name in ["alice", "bob"] {
        cluster.start(name);
    }
    let why = "alice's keys: alice and bob were without their memory at the same time";
    cluster.node("carol").wait_for(why);
    let status = cluster.kv54(["status", "--wait", "--json"]).exits(1).json();
    let carol = status["nodes"][2]["doubts"].as_array().unwrap();
    assert_eq!(carol.len(), 3, "{status}");
    assert!(carol[0].as_str().unwrap().starts_with(why), "{status}");
    let logged = cluster.node("carol").log();
    let warnings = logged.iter().filter(|line| line.contains(why));
    assert_eq!(warnings.count(), 1, "{logged:?}");
    cluster.kv54(["status", "--acknowledge"]).exits(0);
    let all = format!("{KEYS} keys exported"); // carol had them all
    cluster.kv54(["export"]).exits(0).says(&[&all]);
}

#[test]
fn a_first_start_and_restarts_that_wait_are_no_alarm() {
    let mut cluster = Cluster::with_limits(&FIVE, "window = \"300ms\"");
    for name in FIVE {
        cluster.start(name);
        sleep(Duration::from_millis(200)); // some are ready while others have just started
    }
    for name in FIVE {
        let line = cluster.node(name).wait_for("ready with 0 keys after");
        assert!(
            line.ends_with(": no neighbour had any, as at a first start"),
            "{line}"
        );
    }
    write(&cluster);
    for name in FIVE {
        cluster.kill(name);
        cluster.start(name);
        cluster.wait_until_ready();
    }
    assert_eq!(doubted(&cluster), BTreeSet::new());
    cluster.kv54(["status"]).exits(0);
    let all = format!("{KEYS} keys exported");
    cluster.kv54(["export"]).exits(0).says(&[&all]);
}

#[test]
fn a_ring_of_two_survives_the_restart_of_one_and_says_when_both_have_forgotten() {
    let mut cluster = written(&["left", "right"], "window = \"300ms\"");
    cluster.restart("left");
    assert_eq!(doubted(&cluster), BTreeSet::new());
    cluster.kill("left");
    cluster.start("left");
    sleep(Duration::from_millis(100));
    cluster.restart("right");
    cluster.kv54(["status", "--wait"]).exits(1);
    assert_eq!(doubted(&cluster).len(), 2);
}

/// A ring whose nodes were all restarted, so long one after the other, and are ready again.
fn restarted(names: &[&str], apart: Duration) -> Cluster {
    let mut cluster = written(names, "");
    for name in names {
        cluster.kill(name);
        cluster.start(name);
        sleep(apart);
    }
    let said = cluster.kv54(["status", "--wait"]).exits(1);
    assert!(
        said.text()
            .contains("were without their memory at the same time"),
        "{said:?}"
    );
    assert!(
        said.text().ends_with("then kv54 status --acknowledge\n"),
        "{said:?}"
    );
    let mut logged = names.iter().flat_map(|name| cluster.node(name).log());
    assert!(logged.any(|line| line.contains("'s keys: ")));
    cluster
}

/// A ring with keys, all copies equal.
fn written(names: &[&str], limits: &str) -> Cluster {
    let mut cluster = Cluster::with_limits(names, limits);
    cluster.start_all();
    write(&cluster);
    cluster
}

fn write(cluster: &Cluster) {
    block_on(async {
        let client = cluster.client();
        for key in keys() {
            client
                .set(key.as_bytes(), &Packed::of("green"))
                .await
                .unwrap();
        }
        client.replicas.settle().await;
    });
    cluster.wait_until_equal();
}

fn keys() -> impl Iterator<Item = String> {
    (0..KEYS).map(|n| format!("key{n}"))
}

/// The owners of the keys that some node cannot vouch for.
fn doubted(cluster: &Cluster) -> BTreeSet<String> {
    let status = cluster.kv54(["status", "--json"]).json();
    let nodes = status["nodes"].as_array().unwrap().iter();
    let doubts = nodes.flat_map(|node| node["doubts"].as_array().unwrap());
    let owner =
        |doubt: &serde_json::Value| doubt.as_str().unwrap().split('\'').next().map(String::from);
    doubts.map(|doubt| owner(doubt).unwrap()).collect()
}

//! `kv54 bench` counts what it should and notices what goes wrong. How fast anything is, no test says.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use common::Cluster;

const THREE: [&str; 3] = ["alice", "bob", "carol"];

#[test]
fn a_run_tells_how_many_operations_were_done_and_how_long_they_took() {
    let cluster = Cluster::running(&THREE);
    for (ops, more) in [
        ("get", &[][..]),
        ("set", &["--depth", "7"]),
        ("mix", &["--own"]),
        ("mix", &["--value-size", "1"]),
        ("mix", &["--value-size", "1048576", "--connections", "3"]),
    ] {
        let command = ["bench", ops, "--keys", "20", "--seconds", "1", "--json"];
        let told = cluster.kv54(command.iter().chain(more)).exits(0).json();
        assert!(told["operations"].as_u64().unwrap() > 0, "{told}");
        assert_eq!(told["errors"], serde_json::json!({}), "{told}");
        let latency = ["p50", "p90", "p99", "p99.9", "max"].map(|name| &told["latency_us"][name]);
        let latency = latency.map(|time| time.as_f64().unwrap());
        assert!(latency[0] > 0.0 && latency.is_sorted(), "{told}");
    }
    let status = cluster.kv54(["status", "--json"]).exits(0).json();
    assert_eq!(status["nodes"][0]["keys"], 20);
    let told = cluster
        .kv54(["bench", "get", "--keys", "20", "--seconds", "1"])
        .exits(0);
    for part in ["operations per second", "50 connections", "p99.9"] {
        assert!(told.text().contains(part), "{told:?}");
    }
    assert!(!told.err.contains("filling"), "no bar without a terminal");
}

#[test]
fn a_value_that_is_not_its_keys_own_is_an_error() {
    let cluster = &Cluster::running(&["alice"]);
    for more in [&[][..], &["--own"]] {
        let overwritten = std::thread::scope(|scope| {
            let run = ["bench", "get", "--keys", "1", "--seconds", "1"];
            let bench = scope.spawn(move || cluster.kv54(run.iter().chain(more)));
            while !bench.is_finished() {
                let set = ["set", "bench:0000000000", "nonsense"];
                cluster.kv54(set).exits(0);
            }
            bench.join().unwrap()
        });
        overwritten
            .exits(3)
            .says(&["operations went wrong", "wrong-value"]);
    }
}

#[test]
fn errors_are_named_by_their_first_word() {
    let mut cluster = Cluster::with_limits(&["alice"], "memory = \"1MiB\"");
    let run = ["bench", "set", "--seconds", "1"];
    let refused = cluster.kv54(run).exits(3);
    refused.says(&[&cluster.address("alice"), "connection refused"]);
    cluster.start_all();
    let full = cluster.kv54(run).exits(3);
    full.says(&["while the keys were filled", " full"]);
}

#[test]
fn a_node_that_dies_leaves_errors_behind() {
    let mut cluster = Cluster::running(&["alice"]);
    for own in [false, true] {
        let died = std::thread::scope(|scope| {
            let mut run = vec!["bench", "get", "--keys", "1", "--seconds", "2"];
            run.extend(own.then_some("--own"));
            let bench = scope.spawn({
                let mut command = cluster.command();
                command.args(run);
                move || command.output().unwrap()
            });
            let filled = ["get", "bench:0000000000"];
            while !bench.is_finished() && cluster.kv54(filled).code != 0 {}
            cluster.kill("alice");
            bench.join().unwrap()
        });
        assert_eq!(died.status.code(), Some(3), "{died:?}");
        let said = String::from_utf8(died.stderr).unwrap();
        assert!(said.contains(" un"), "{said}"); // unavailable, or unknown-outcome
        cluster.start_all();
    }
}

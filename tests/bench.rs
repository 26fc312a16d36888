//! `kv54 bench` counts what it should and notices what goes wrong. How fast anything is, no test says.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use common::Cluster;
use kv54::bench::{Answer, Guest, Response, Wire};
use kv54::entry::Packed;
use kv54::error::{Error, Kind};
use kv54::rpc::codec::write_response;
use msgpack_rpc::Value;

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
        let word = if own { "un" } else { "disconnected" };
        let said = String::from_utf8(died.stderr).unwrap();
        assert!(said.contains(word), "{said}");
        cluster.start_all();
    }
}

#[test]
fn an_answer_is_cut_off_the_stream_wherever_it_was_cut() {
    let text = |size| Ok(Value::from("x".repeat(size)));
    let answers = [
        Ok(Value::Nil),
        text(0),
        text(31),
        text(32),
        text(300),
        text(70_000),
        Ok(Value::from(vec![0xff; 40])),
        Ok(Value::from(7)),
        Err(Error::new(Kind::Full, "no room")),
    ];
    for answer in answers {
        let mut bytes = Vec::new();
        let packed = answer.clone().map(|value| Packed::of(value).into());
        write_response(&mut bytes, 0xc0c0_0001, &packed);
        let len = bytes.len();
        bytes.extend([0x94, 0x01]);
        let cut = (0..len.min(400)).chain([len - 1]);
        for cut in cut.filter(|cut| *cut < len) {
            let early = Guest.response(&bytes[..cut], &mut Vec::new()).unwrap();
            assert!(early.is_none(), "{cut} of {len}: {early:?}");
        }
        let found = Guest.response(&bytes, &mut Vec::new()).unwrap();
        let Some(Response {
            len: taken,
            answer: Some((0xc0c0_0001, found)),
        }) = found
        else {
            panic!("{found:?}");
        };
        assert_eq!(taken, len);
        match (&answer, found) {
            // A bench writes no integers: none is the value that it wants.
            (Ok(Value::Nil), Answer::Nil) | (Ok(Value::Integer(_)), Answer::Value([])) => {}
            (Ok(value), Answer::Value(found)) => assert_eq!(value.as_slice(), Some(found)),
            (Err(error), Answer::Error(found)) => assert_eq!(error.to_string(), found),
            other => panic!("{other:?}"),
        }
    }
    assert!(Guest.response(b"\x01garbage", &mut Vec::new()).is_err());
}

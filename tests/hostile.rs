//! No bytes can hurt it: what strangers send to a node, and what lying nodes answer to a client.
//!
//! Each attack runs against real processes, and each must leave them as it found them: alive,
//! without a panic, within a stated memory, and quick to answer everybody else. The shapes of single
//! messages are tested byte by byte in `codec.rs` and `wire.rs`; here they come by the thousand.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::too_many_lines
)]

mod common;

use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Barrier, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use common::gateway::Gateway;
use common::wire::{MIB, NIL, Outcome, PATIENCE, Wire, array, bin, entry, request, says, stamp};
use common::{Cluster, Hiccups};
use kv54::cluster::{State, Told};
use kv54::rpc::codec::{decode, encode};
use msgpack_rpc::Value;

const RING: [&str; 4] = ["alice", "bob", "carol", "dave"];
/// What an attack on a node may cost.
#[derive(Clone, Copy)]
struct Bounds {
    mib: u64,        // of memory, at any moment
    quick: Duration, // what 99 of 100 answers to a healthy client may take, beside what the machine took
    limits: &'static str,
    alone: bool, // whether no other attack runs meanwhile
}

/// Nothing is to be kept for the attacker.
const SMALL: Bounds = Bounds {
    mib: 48,
    quick: Duration::from_millis(50),
    limits: "",
    alone: true,
};
/// Legal messages of many values: a debug build walks over each for half a millisecond or one, a few of them
/// pass before an answer, and beside other builds the node gets a fifth of a processor.
const WALKS: Bounds = Bounds {
    quick: Duration::from_millis(400),
    ..BUFFERS
};
/// Half a gigabyte and more at once: who comes meanwhile waits in one line with it, here or at another node.
const HEAVY: Bounds = Bounds {
    quick: Duration::from_millis(1500),
    ..BUFFERS
};
/// 256 MiB of buffers may be filled; growing, they may for a moment take twice that.
const BUFFERS: Bounds = Bounds { mib: 600, ..SMALL };

#[test]
fn bytes_that_are_no_requests() {
    let long = |header: &[u8]| [header, &[0xff; 4]].concat();
    let (id, get) = (Value::from(7), Value::from("get"));
    let call = |items: Vec<Value>| encode(&Value::Array(items));
    // What is sent, and what the error says that comes back; "" where there is nobody to answer.
    #[rustfmt::skip]
    let table = [
        ("a bin of 4 GiB", asking("get", &long(b"\xc6")), "too-large: "),
        ("a str of 4 GiB", asking("get", &long(b"\xdb")), "too-large: "),
        ("an array of 4 Gi", asking("get", &long(b"\xdd")), "too-large: "),
        ("a map of 4 Gi", asking("get", &long(b"\xdf")), "too-large: "),
        ("an ext of 4 GiB", asking("get", &long(b"\xc9")), "too-large: "),
        ("a method of 4 GiB", long(b"\x94\x00\x07\xdb"), "too-large: "),
        ("4 Gi parameters", long(b"\x94\x00\x07\xa3get\xdd"), "too-large: "),
        ("4 Gi items", long(b"\xdd"), ""),
        ("17 levels", asking("get", &[0x91; 17]), "too-large: "),
        ("the byte 0xc1", asking("get", b"\xc1"), "bad-request: "),
        ("garbage", b"\xc1\xfe\xed\xfa\xce".to_vec(), ""),
        ("HTTP", b"GET / HTTP/1.1\r\nHost: alice\r\n\r\n".to_vec(), ""),
        ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(), ""),
        ("a response", call(vec![1.into(), id.clone(), NIL, "green".into()]), ""),
        ("a short response", call(vec![1.into(), id.clone(), NIL]), ""),
        ("a long response", call(vec![1.into(), id.clone(), NIL, NIL, NIL]), ""),
        ("a response to -1", call(vec![1.into(), (-1).into(), NIL, NIL]), ""),
        ("a short notification", call(vec![2.into(), get.clone()]), ""),
        ("a notification of no method", call(vec![2.into(), NIL, array([])]), ""),
        ("a msgid above u32", call(vec![0.into(), (1_u64 << 32).into(), get.clone(), array([])]), ""),
        ("a msgid below 0", call(vec![0.into(), (-1).into(), get.clone(), array([])]), ""),
        ("a message of another kind", call(vec![3.into(), id.clone(), get.clone(), array([])]), ""),
        ("no items", call(vec![]), ""),
        ("a 3-element request", call(vec![0.into(), id.clone(), get.clone()]), "bad-request: "),
        ("a 5-element request", call(vec![0.into(), id.clone(), get.clone(), array([]), NIL]), "bad-request: "),
        ("params as map", call(vec![0.into(), id.clone(), get.clone(), Value::Map(vec![])]), "bad-request: "),
        ("a method that is no text", call(vec![0.into(), id.clone(), bin(b"\xff"), array([])]), "bad-request: "),
        ("a method as bin", call(vec![0.into(), id.clone(), bin(b"get"), array([5.into()])]), "bad-request: "),
        ("a method that there is not", call(vec![0.into(), id.clone(), "steep".into(), array([])]), "no-such-method: "),
        ("a long key", request(7, "get", [bin(&[0; 1025])]), "too-large: "),
        ("a large value", request(7, "set", ["tea".into(), bin(&vec![0; MIB + 1])]), "too-large: "),
    ];
    attack(SMALL, |cluster| {
        for_seconds(3, || {
            for (what, bytes, said) in &table {
                let mut wire = Wire::to(cluster, "alice");
                wire.send(bytes);
                wire.finish_asking();
                if !said.is_empty() {
                    let (id, answer) = wire.answer().unwrap();
                    assert_eq!(id, 7, "{what}");
                    says(answer, &[said]);
                }
                assert_eq!(wire.answer(), None, "{what}");
            }
        });
    });
}

#[test]
fn nesting_without_end() {
    attack(SMALL, |cluster| {
        let stream = stranger(cluster);
        sends(&stream, &vec![0x91; MIB], 256);
        assert!(heard(&stream).is_empty());
    });
}

#[test]
fn a_message_of_millions_of_nils() {
    attack(SMALL, |cluster| {
        let millions = asking(
            "get",
            &[&b"\xdd\x00\x98\x96\x80"[..], &vec![0xc0; 10_000_000]].concat(),
        );
        for_seconds(2, || {
            let stream = stranger(cluster);
            sends(&stream, &millions, 1);
            heard(&stream); // the error is lost where the rest was still on its way
        });
    });
}

#[test]
fn legal_messages_of_many_nils() {
    attack(WALKS, |cluster| {
        let many = request(7, "get", [Value::Array(vec![NIL; 65_000])]);
        at_once(2, || {
            let stream = stranger(cluster);
            for_seconds(3, || {
                sends(&stream, &many, 10);
                hears(&stream, 10);
            });
        });
    });
}

#[test]
fn what_would_be_long_to_quote() {
    attack(SMALL, |cluster| {
        let ext = Value::Ext(1, vec![0xff; 4 * MIB - 100]);
        let requests = [
            request(7, "get", [Value::Array(vec![5e-324.into(); 65_000])]), // 326 digits each
            request(7, "get", [ext.clone()]),
            request(7, "load", [ext, "tea".into()]),
            request(
                7,
                "incr",
                ["tea".into(), Value::Array(vec![5e-324.into(); 65_000])],
            ),
            request(7, &"\u{1}".repeat(4 * MIB - 100), []),
        ];
        for_seconds(3, || {
            for asked in &requests {
                let mut wire = Wire::to(cluster, "alice");
                wire.send(asked);
                let (_, answer) = wire.answer().unwrap();
                assert!(answer.unwrap_err().len() < 1000);
            }
        });
    });
}

#[test]
fn thousands_of_unfinished_messages() {
    attack(BUFFERS, |cluster| {
        let whole = request(7, "set", ["tea".into(), bin(&vec![0; MIB])]);
        // 500 MiB are offered, and the node keeps no more than its buffers take.
        let unfinished = || {
            let stream = stranger(cluster);
            sends(&stream, &whole[..MIB / 2], 1);
            stream
        };
        let streams: Vec<TcpStream> = (0..1000).map(|_| unfinished()).collect();
        cluster.node("alice").wait_for("the most of all buffers");
        drop(streams);
    });
}

#[test]
fn messages_that_drip() {
    let shared = Bounds {
        alone: false,
        ..SMALL
    };
    attack(shared, |cluster| {
        at_once(50, || {
            let (start, hiccups) = (Instant::now(), Hiccups::watch());
            let mut wire = Wire::to(cluster, "alice");
            let set = request(7, "set", ["tea".into(), "green, in its own time".into()]);
            let heard = drips(&mut wire, &set, 1, Duration::from_secs(1));
            let took = start.elapsed();
            says(heard, &["unavailable: ", "too slowly"]);
            wire.is_closed();
            assert!(took >= Duration::from_secs(9), "closed after {took:?}");
            let most = Duration::from_secs(13) + hiccups.sum();
            assert!(took < most, "closed after {took:?}");
        });
        assert_eq!(
            Wire::to(cluster, "alice").does("get", ["tea".into()]),
            NIL,
            "a set that was cut off has written nothing"
        );
    });
}

/// A slow link is no attack: a message may take longer than 10 s as long as it goes on.
#[test]
fn a_value_from_a_slow_link() {
    let shared = Bounds {
        alone: false,
        ..SMALL
    };
    attack(shared, |cluster| {
        let value = bin(&vec![7; 50 << 10]);
        let set = request(7, "set", ["tea".into(), value.clone()]);
        let mut wire = Wire::to(cluster, "alice");
        let (start, pause) = (Instant::now(), Duration::from_millis(100));
        assert_eq!(drips(&mut wire, &set, 400, pause), Ok(NIL));
        assert!(start.elapsed() > Duration::from_secs(12));
        assert_eq!(wire.does("get", ["tea".into()]), value);
    });
}

/// Sends a request so many bytes at a time, with a pause between them, until it is answered.
fn drips(wire: &mut Wire, request: &[u8], at_once: usize, pause: Duration) -> Outcome {
    wire.stream.get_ref().set_read_timeout(Some(pause)).unwrap();
    for piece in request.chunks(at_once) {
        wire.send(piece);
        if wire.stream.fill_buf().is_ok() {
            break;
        }
    }
    let patience = Some(PATIENCE);
    wire.stream.get_ref().set_read_timeout(patience).unwrap();
    wire.answer().unwrap().1
}

#[test]
fn connections_that_are_half_closed() {
    attack(SMALL, |cluster| {
        let key = Value::from(cluster.key_on(&["bob", "carol", "dave"]));
        Wire::to(cluster, "alice").does("set", [key.clone(), bin(&[7; 10_000])]);
        for_seconds(2, || {
            let mut wire = Wire::to(cluster, "alice");
            let gets = (0..500).map(|n| request(n, "get", [key.clone()]));
            wire.send(&gets.collect::<Vec<_>>().concat());
            wire.finish_asking();
            assert!(
                wire.answers(500)
                    .values()
                    .all(|answer| *answer == Ok(bin(&[7; 10_000])))
            );
            wire.is_closed();
        });
    });
}

#[test]
fn a_million_small_answers_that_nobody_reads() {
    attack(BUFFERS, |cluster| {
        for (method, params) in [
            ("get", vec!["tea".into()]),
            ("status", vec![]),
            ("steep", vec![]),
        ] {
            never_reads(cluster, &request(7, method, params));
        }
    });
}

#[test]
fn a_million_large_answers_that_nobody_reads() {
    for replicas in [["alice", "bob", "carol"], ["bob", "carol", "dave"]] {
        attack(BUFFERS, |cluster| {
            let key = Value::from(cluster.key_on(&replicas));
            Wire::to(cluster, "alice").does("set", [key.clone(), bin(&vec![7; MIB])]);
            never_reads(cluster, &request(7, "get", [key]));
        });
    }
}

#[test]
fn answers_read_as_fast_as_they_come() {
    attack(BUFFERS, |cluster| {
        let key = Value::from(cluster.key_on(&["alice", "bob", "carol"]));
        let mut wire = Wire::to(cluster, "alice");
        let ring = Value::from(wire.status("ring"));
        for value in [bin(&vec![7; MIB]), Value::Array(vec![NIL; 60_000])] {
            wire.does("set", [key.clone(), value]);
            let load = request(7, "load", [ring.clone(), key.clone()]);
            for asked in [
                load,
                request(7, "get", [key.clone()]),
                request(7, "status", []),
            ] {
                let stream = stranger(cluster);
                thread::scope(|scope| {
                    scope.spawn(|| std::io::copy(&mut &stream, &mut std::io::sink()));
                    for_seconds(1, || drop((&stream).write(&asked.repeat(100))));
                    stream.shutdown(Shutdown::Both).unwrap();
                });
            }
        }
    });
}

/// After small answers the node expects small ones, and takes a thousand requests at once.
#[test]
fn large_answers_after_small_ones_that_nobody_reads() {
    attack(
        Bounds {
            mib: 200,
            ..BUFFERS
        },
        |cluster| {
            let big = cluster.key_on(&["alice", "bob", "carol"]);
            let mut wire = Wire::to(cluster, "alice");
            wire.does("set", [Value::from(big.as_str()), bin(&vec![7; MIB])]);
            let small = request(7, "get", ["no such key".into()]);
            let large = request(7, "get", [big.into()]);
            let strangers: Vec<_> = (0..10).map(|_| stranger(cluster)).collect();
            for stream in &strangers {
                sends(stream, &small, 200);
                hears(stream, 200);
                sends(stream, &large, 1000);
            }
            thread::sleep(Duration::from_secs(2));
        },
    );
}

/// Each that waits is woken every 10 ms while its answer is late: tens of thousands keep a debug build busy.
#[test]
fn requests_in_flight_on_every_connection() {
    attack(HEAVY, |cluster| {
        let key = cluster.key_on(&["bob", "carol", "dave"]);
        let asked = request(7, "get", [key.into()]);
        // Two of three do not answer for a moment, and what waits for them waits.
        cluster.signal("bob", "STOP");
        cluster.signal("dave", "STOP");
        let strangers: Vec<_> = (0..600).map(|_| stranger(cluster)).collect();
        for stream in &strangers {
            sends(stream, &asked, 1024);
        }
        thread::sleep(Duration::from_secs(3));
        drop(strangers);
        cluster.signal("bob", "CONT");
        cluster.signal("dave", "CONT");
    });
}

#[test]
fn requests_in_flight_behind_large_ones() {
    attack(Bounds { mib: 400, ..HEAVY }, |cluster| {
        let key = Value::from(cluster.key_on(&["bob", "carol", "dave"]));
        let large = request(7, "status", [bin(&vec![0; 4 * MIB - 100])]);
        let small = request(7, "set", [key, bin(&vec![0; 100 << 10])]);
        cluster.signal("bob", "STOP");
        cluster.signal("dave", "STOP");
        // The small ones wait, and must not keep what the large ones came in.
        let (both, all) = ([large, small].concat(), Barrier::new(20));
        at_once(20, || {
            let stream = stranger(cluster);
            stream.set_write_timeout(None).unwrap();
            sends(&stream, &both, 7);
            hears(&stream, 7);
            all.wait();
        });
        cluster.signal("bob", "CONT");
        cluster.signal("dave", "CONT");
    });
}

#[test]
fn more_connections_than_there_may_be() {
    let few = "connections = 64";
    attack(
        Bounds {
            limits: few,
            ..SMALL
        },
        |cluster| {
            let mut strangers = Vec::new();
            for_seconds(2, || {
                let stream = stranger(cluster);
                if strangers.len() < 100 {
                    strangers.push(stream);
                }
            });
            cluster.node("alice").wait_for("at most 64 may be open");
        },
    );
}

#[test]
fn counters_near_their_end() {
    attack(SMALL, |cluster| {
        let mut wire = Wire::to(cluster, "alice");
        let ring = Value::from(wire.status("ring"));
        let key = Value::from(cluster.key_on(&["alice", "dave", "carol"]));
        for_seconds(1, || {
            for counter in [u64::MAX, u64::MAX - 1, 1 << 63, 1 << 37] {
                let params = [ring.clone(), key.clone(), entry(counter, u64::MAX, "green")];
                wire.refuses("store", params, &["bad-request: "]);
                wire.does(
                    "load",
                    [ring.clone(), key.clone(), stamp(counter, u64::MAX)],
                );
            }
            for cursor in [u64::MAX, 1 << 63, 1 << 32] {
                let _ = wire.asks("scan", [ring.clone(), 0.into(), cursor.into()]);
                let _ = wire.asks("scan", [ring.clone(), cursor.into(), 0.into()]);
            }
            wire.does("set", [key.clone(), "black".into()]);
        });
        let last = entry((1 << 37) - 1, u64::MAX, "green");
        wire.does("store", [ring, key.clone(), last]);
        wire.refuses("set", [key.clone(), "black".into()], &["bad-request: "]);
        assert_eq!(wire.does("get", [key]), "green".into());
    });
}

#[test]
fn more_writes_than_fit_into_memory() {
    let little = "memory = \"16MiB\"";
    attack(
        Bounds {
            limits: little,
            ..SMALL
        },
        |cluster| {
            let mut wire = Wire::to(cluster, "alice");
            let mut stored = Vec::new();
            let set = |n: u32| request(n, "set", [n.to_string().into(), 1.into()]);
            let mut refused = 0;
            for first in (0_u32..).step_by(1000) {
                if refused >= 10_000 {
                    break;
                }
                wire.send(&(first..first + 1000).map(set).collect::<Vec<_>>().concat());
                for (n, answer) in wire.answers(1000) {
                    match answer {
                        Ok(_) => stored.push(n),
                        Err(error) => {
                            assert!(error.starts_with("full: "), "{error}");
                            refused += 1;
                        }
                    }
                }
            }
            // Nothing is evicted, and what does not grow is taken; `wire.rs` sees a delete make room.
            for n in stored.iter().step_by(100) {
                let key = Value::from(n.to_string());
                assert_eq!(wire.does("get", [key.clone()]), 1.into());
                wire.does("set", [key, 2.into()]);
            }
        },
    );
}

#[test]
fn more_promises_than_fit_into_memory() {
    let little = Bounds {
        limits: "memory = \"16MiB\"",
        ..SMALL
    };
    attack(little, |cluster| {
        let ring = cluster.ring();
        let alice = ring.place("alice").unwrap();
        let ours = |n: &u32| {
            let owner = ring.owner(n.to_string().as_bytes());
            ring.replicas(owner).any(|place| place == alice)
        };
        // While a node is away, no round forgets what was promised.
        cluster.signal("dave", "STOP");
        let mut wire = Wire::to(cluster, "alice");
        let fingerprint = Value::from(wire.status("ring"));
        let promise = |n: u32, ballot: u64| {
            let params = [fingerprint.clone(), n.to_string().into(), ballot.into()];
            request(n, "promise", params)
        };
        let (mut keys, mut refused) = ((0..).filter(ours), 0);
        for _ in 0..200 {
            let asked = keys.by_ref().take(1000).map(|n| promise(n, 1));
            wire.send(&asked.collect::<Vec<_>>().concat());
            for error in wire.answers(1000).into_values().filter_map(Result::err) {
                assert!(error.starts_with("full: "), "{error}");
                refused += 1;
            }
        }
        assert!(refused > 50_000, "{refused} of 200,000 are refused");
        let kept = wire.status("bytes");
        assert!(kept < (16 << 20) + 100, "{kept} bytes");
        // The same promises go on rising, and take no more.
        for ballot in 2..10 {
            let asked = (0..).filter(ours).take(1000).map(|n| promise(n, ballot));
            wire.send(&asked.collect::<Vec<_>>().concat());
            assert!(wire.answers(1000).values().all(Result::is_ok));
        }
        assert_eq!(wire.status("bytes"), kept);
        let strange = Value::from(cluster.key_on(&["bob", "carol", "dave"]));
        wire.refuses(
            "promise",
            [fingerprint, strange, 1.into()],
            &["wrong-ring: ", "alice"],
        );
        cluster.signal("dave", "CONT");
    });
}

#[test]
fn swaps_as_long_as_a_message_may_be() {
    attack(WALKS, |cluster| {
        let key = Value::from(cluster.key_on(&["bob", "carol", "dave"]));
        let cas = |bytes| request(7, "cas", [key.clone(), bin(&vec![0; bytes]), NIL]);
        let most = 4 * MIB - (cas(MIB).len() - MIB);
        for_seconds(2, || {
            let mut wire = Wire::to(cluster, "alice");
            wire.send(&cas(most));
            says(wire.answer().unwrap().1, &["too-large: "]);
            assert_eq!(wire.does("incr", [key.clone(), 0.into()]), 0.into());
        });
    });
}

#[test]
fn a_swap_whose_guest_reads_no_answers() {
    let cluster = Cluster::running(&RING);
    let mut other = Wire::to(&cluster, "alice");
    let (jug, ring) = (cluster.key_on(&RING[..3]), cluster.ring());
    let is_beside = |key: &String| ring.owner(key.as_bytes()) == ring.owner(jug.as_bytes());
    let cups = (0..10_000).map(|n| format!("cups{n}")).filter(is_beside);
    other.does("set", [jug.as_str().into(), bin(&vec![7; MIB])]);
    // On another thread it begins too late to hold this one up: each that stays brings the next one to the other.
    let mut stay = vec![];
    let was_held_up = cups.take(20).any(|cups| {
        stay.push(stranger(&cluster));
        let mut idle = Wire::to(&cluster, "alice");
        idle.does("get", ["tea".into()]); // it is being served
        let gets = (0..25).flat_map(|id| request(id, "get", [jug.as_str().into()]));
        let incr = request(25, "incr", [cups.as_str().into()]);
        // What is promised comes behind the gets, which nobody reads: the swap has begun, and does not go on.
        idle.send(&gets.chain(incr).collect::<Vec<u8>>());
        let begun = Instant::now();
        assert_eq!(other.does("incr", [cups.as_str().into()]), 1.into());
        let was_held_up = begun.elapsed() > Duration::from_secs(4);
        let outcome = idle.answers(26).remove(&25).unwrap();
        let sum = other.does("get", [cups.as_str().into()]).as_u64().unwrap();
        match outcome {
            Ok(_) => assert_eq!(sum, 2),
            Err(why) if why.starts_with("unknown") => assert!(sum <= 2, "{sum}"),
            Err(why) => assert_eq!(sum, 1, "{why}"),
        }
        was_held_up
    });
    assert!(was_held_up, "it was never held up");
}

#[test]
fn many_large_sets_at_once() {
    attack(HEAVY, |cluster| {
        let set = |n: u32| request(n, "set", [format!("key{n}").into(), bin(&vec![7; MIB])]);
        let sets: Vec<u8> = (0..16).flat_map(set).collect();
        // A gigabyte at once: a set that does not fit is refused, or its connection closed.
        at_once(64, || {
            let stream = stranger(cluster);
            sends(&stream, &sets, 1);
            let _ = stream.shutdown(Shutdown::Write);
            heard(&stream);
        });
    });
}

/// Attacks on alice, one node of four. A healthy client of hers is answered all the while.
#[track_caller]
fn attack(bounds: Bounds, story: impl FnOnce(&mut Cluster)) {
    static ALONE: Mutex<()> = Mutex::new(());
    let mut cluster = Cluster::with_limits(&RING, bounds.limits);
    cluster.start_all();
    let alone = bounds
        .alone
        .then(|| ALONE.lock().unwrap_or_else(PoisonError::into_inner));
    let healthy = Healthy::client(&cluster);
    story(&mut cluster);
    let (latencies, hiccup) = healthy.leaves();
    drop(alone);

    let p99 = latencies[latencies.len() * 99 / 100];
    let nodes: Vec<_> = cluster.running_nodes().collect();
    let peaks: Vec<u64> = nodes.iter().map(|(_, node)| peak(node.pid())).collect();
    eprintln!(
        "{}: {} healthy answers, p99 {p99:.1?}, the slowest {:.1?}, hiccup {hiccup:.1?}; MiB at most {peaks:?}",
        thread::current().name().unwrap_or_default(),
        latencies.len(),
        latencies[latencies.len() - 1],
    );
    for (name, node) in nodes {
        let log = node.log().join("\n");
        assert!(!log.contains("panicked"), "{name}: {log}");
        Wire::to(&cluster, name).does("status", []);
    }
    // An answer passes through three processes, and each may be kept from running unseen by us.
    assert!(
        p99 < bounds.quick + hiccup,
        "a healthy client waited {p99:?}, the machine {hiccup:?}"
    );
    assert!(
        peaks.iter().all(|peak| *peak < bounds.mib),
        "{peaks:?} MiB, {} allowed",
        bounds.mib
    );
}

/// The most memory that a process of kv54 has had, in MiB.
fn peak(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    if !status.starts_with("Name:\tkv54") {
        return 0; // gone already, or still this very test on its way to become one
    }
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.unwrap_or(0) >> 10
}

/// A client that sets and gets at alice, and notes how long each answer took, without the
/// machine's hiccups meanwhile, and the longest of those.
struct Healthy(Arc<AtomicBool>, JoinHandle<(Vec<Duration>, Duration)>);

impl Healthy {
    fn client(cluster: &Cluster) -> Healthy {
        let mut wire = Wire::to(cluster, "alice");
        let ours = |key: &String| cluster.replicas(key) == ["alice", "bob", "carol"];
        let key = (0..1000).map(|n| format!("healthy{n}")).find(ours);
        let key = Value::from(key.unwrap());
        let done = Arc::new(AtomicBool::new(false));
        let leave = done.clone();
        let live = move || {
            let hiccups = Hiccups::watch();
            let mut latencies = Vec::new();
            for n in 1_u64 << 40.. {
                // one width, so that a full node takes each of them
                let (before, start) = (hiccups.sum(), Instant::now());
                wire.does("set", [key.clone(), n.into()]);
                let set = start.elapsed();
                assert_eq!(wire.does("get", [key.clone()]), n.into());
                let get = start.elapsed().saturating_sub(set);
                let hiccup = hiccups.sum().saturating_sub(before);
                latencies.extend([set, get].map(|took| took.saturating_sub(hiccup)));
                if leave.load(Relaxed) {
                    break;
                }
            }
            latencies.sort();
            (latencies, hiccups.longest())
        };
        Healthy(done, thread::spawn(live))
    }

    fn leaves(self) -> (Vec<Duration>, Duration) {
        self.0.store(true, Relaxed);
        self.1.join().unwrap()
    }
}

/// A stranger's connection to alice.
fn stranger(cluster: &Cluster) -> TcpStream {
    let stream = TcpStream::connect(cluster.address("alice")).unwrap();
    stream
        .set_write_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    stream
}

/// Sends the same bytes so many times, or until the node takes no more for half a second; how
/// often they went out.
fn sends(mut stream: &TcpStream, bytes: &[u8], times: usize) -> usize {
    let at_once = (1 << 20) / bytes.len().min(1 << 20);
    let (batch, mut sent) = (bytes.repeat(at_once), 0);
    while sent < times {
        let count = at_once.min(times - sent);
        if stream.write_all(&batch[..count * bytes.len()]).is_err() {
            break;
        }
        sent += count;
    }
    sent
}

/// Asks a million times on each of four connections and reads no answer.
fn never_reads(cluster: &Cluster, asked: &[u8]) {
    let strangers: Vec<_> = (0..4).map(|_| stranger(cluster)).collect();
    for stream in &strangers {
        sends(stream, asked, 1_000_000);
    }
    thread::sleep(Duration::from_secs(1));
}

/// Does something again and again for so many seconds.
fn for_seconds(seconds: u64, mut act: impl FnMut()) {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(seconds) {
        act();
    }
}

/// Everything that comes until the node ends the connection, which it must.
fn heard(mut stream: &TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Err(error) if error.kind() != ErrorKind::ConnectionReset => panic!("not closed: {error}"),
        _ => bytes,
    }
}

/// A request whose one parameter is these bytes.
fn asking(method: &str, param: &[u8]) -> Vec<u8> {
    let mut bytes = request(7, method, [NIL]);
    bytes.pop();
    [&bytes, param].concat()
}

/// Does something in so many threads at once.
fn at_once(times: usize, act: impl Fn() + Sync) {
    thread::scope(|scope| {
        for _ in 0..times {
            scope.spawn(&act);
        }
    });
}

/// Reads so many answers.
fn hears(stream: &TcpStream, answers: usize) {
    let mut stream = BufReader::new(stream);
    for _ in 0..answers {
        rmpv::decode::read_value(&mut stream).unwrap();
    }
}

/// What all three nodes of a ring answer.
#[test]
fn lies_of_every_kind() {
    let value = |value: Value| answers(move |id| response(id, NIL, value.clone()));
    let error = |error: Value| answers(move |id| response(id, error.clone(), NIL));
    let bytes = |bytes: Vec<u8>| answers(move |_| bytes.clone());
    let items = |count| Value::Array(vec![NIL; count]);
    let right = || response(77.into(), NIL, entry(1, 1, "green"));
    let large = || response(77.into(), NIL, bin(&vec![7; MIB]));
    #[rustfmt::skip]
    let table: Vec<(&str, Lie)> = vec![
        ("a number", value(5.into())),
        ("a text", value("green".into())),
        ("a map", value(Value::Map(vec![(NIL, NIL)]))),
        ("nothing in it", value(array([]))),
        ("an array as counter", value(array([array([1.into()]), 2.into(), 3.into()]))),
        ("stamps that are none", value(array([(-1).into(), 1.5.into(), 3.into()]))),
        ("a stamp alone", value(stamp(1, 1))),
        ("the last stamp alone", value(stamp(u64::MAX, u64::MAX))),
        ("the last stamp", value(entry(u64::MAX, u64::MAX, "green"))),
        ("the last stamp of a write", value(entry((1 << 63) - 1, u64::MAX, "green"))),
        ("the zero stamp", value(entry(0, 0, "green"))),
        ("60,000 items", value(items(60_000))),
        ("a value of 65,000 items", value(entry(1, 1, items(65_000)))),
        ("a value of 3 MiB", value(entry(1, 1, "x".repeat(3 * MIB)))),
        ("a value of controls", value(entry(1, 1, bin(&vec![7; MIB])))),
        ("an error that is no text", error(items(60_000))),
        ("an error of many lines", error("full: a\nb\r\n\x1b[31mc".into())),
        ("an error of 4 MiB", error("x".repeat(4 * MIB - 100).into())),
        ("silence", bytes(vec![])),
        ("another msgid", bytes(right())),
        ("a msgid that is text", bytes(response("7".into(), NIL, NIL))),
        ("a msgid above u32", bytes(response((1_u64 << 40).into(), NIL, NIL))),
        ("a short response", answers(|id| encode(&array([1.into(), id, NIL])))),
        ("a long response", answers(|id| encode(&array([1.into(), id, NIL, NIL, NIL])))),
        ("a request", bytes(request(1, "get", ["tea".into()]))),
        ("a notification", bytes(encode(&array([2.into(), "get".into(), array([])])))),
        ("garbage", bytes(vec![0xc1; 100])),
        ("HTTP", bytes(b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec())),
        ("4 GiB", bytes(b"\x94\x01\x00\xc0\xc6\xff\xff\xff\xff".to_vec())),
        ("an answer twice", answers(|id| response(id, NIL, entry(1, 1, 1)).repeat(2))),
        ("nesting without end", endless(vec![0x91])),
        ("answers without end", endless(right())),
        ("large answers without end", endless(large())),
        ("an end at once", Arc::new(drop)),
        ("half an answer", bytes(right()[..5].to_vec())),
        ("an end in the middle", Arc::new(|mut stream| {
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(&[0x94, 0x01]);
        })),
    ];
    for rows in table.chunks(6) {
        thread::scope(|scope| {
            for (what, lie) in rows {
                scope.spawn(move || is_not_hurt_by(what, lie));
            }
        });
    }
}

/// Every command ends in time and as it should, and a gateway goes on.
fn is_not_hurt_by(what: &str, lie: &Lie) {
    let three = ["alice", "bob", "carol"];
    let cluster = Cluster::of(&three);
    let _liars = Liars::at(&cluster, &three, lie);
    // Where the machine had no time for them, they are run again: who is late by itself is late each time.
    let (mut took, enough) = (Vec::new(), Duration::from_secs(3));
    while took.last().is_none_or(|took| *took >= enough) {
        assert!(took.len() < 3, "{what}: {took:?}");
        took.push(all_commands_take(what, &cluster));
    }
    is_no_harm_to_a_gateway(what, &cluster);
}

/// How long commands take that are run at once, but for the machine's hiccups. Each says what is wrong in one line,
/// takes little memory, and does not panic.
fn all_commands_take(what: &str, cluster: &Cluster) -> Duration {
    let commands = [
        "get tea",
        "set tea green",
        "delete tea",
        "where tea",
        "status",
        "get tea --via alice",
        "set tea green --via alice",
    ];
    thread::scope(|scope| {
        let (start, hiccups) = (Instant::now(), Hiccups::watch());
        let commands = commands.map(|line| {
            let mut command = cluster.command();
            command.args(line.split(' ')).args(["--timeout", "2s"]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
            let child = command.spawn().unwrap();
            (
                line,
                child.id(),
                scope.spawn(|| child.wait_with_output().unwrap()),
            )
        });
        let mut most = 0;
        while commands.iter().any(|(.., running)| !running.is_finished()) {
            most = commands
                .iter()
                .fold(most, |most, (_, pid, _)| most.max(peak(*pid)));
            thread::sleep(Duration::from_millis(1));
        }
        let took = start.elapsed();
        for (line, _, running) in commands {
            let said = running.join().unwrap();
            let error = String::from_utf8_lossy(&said.stderr);
            let shown: String = error.chars().take(300).collect();
            assert!(
                matches!(said.status.code(), Some(0..=3)),
                "{what}: {line}: {shown}"
            );
            assert!(error.lines().count() <= 1, "{what}: {line}: {shown}");
            assert!(
                error.len() < 100_000 && !error.contains("panicked"),
                "{what}: {line}: {shown}"
            );
        }
        assert!(most < 96, "{what}: {most} MiB");
        took.saturating_sub(hiccups.sum())
    })
}

/// What it says of them is one line, without a word for a terminal.
fn is_no_harm_to_a_gateway(what: &str, cluster: &Cluster) {
    let gateway = Gateway::of(cluster, &["--timeout", "1s"]);
    let mut client = gateway.client();
    for asked in ["get tea\r\n", "incr tea 1\r\n"] {
        let said = client.asks(asked);
        let error = said.strip_prefix("SERVER_ERROR ").unwrap_or_default();
        let error = error.trim_end_matches("\r\n");
        let shown: String = error.chars().take(300).collect();
        assert!(!error.contains(char::is_control), "{what}: {shown}");
        assert!(error.len() < 100_000, "{what}: {shown}");
    }
    assert!(gateway.peak() < 96 << 10, "{what}: {} KiB", gateway.peak());
    let log = gateway.node.log().join("\n");
    assert!(!log.contains("panicked"), "{what}: {log}");
}

#[test]
fn a_neighbour_that_lies() {
    let lies: [Lie; 4] = [
        answers(|_| vec![]),
        answers(|id| response(id, NIL, entry(1, 1, 1))),
        endless(response(77.into(), NIL, NIL)),
        endless(vec![0x91]),
    ];
    attack(SMALL, |cluster| {
        cluster.kill("carol");
        for lie in &lies {
            let _liars = Liars::at(cluster, &["carol"], lie);
            thread::sleep(Duration::from_secs(2));
        }
    });
}

#[test]
fn a_neighbour_that_lies_to_a_joining_node() {
    let mut cluster = Cluster::of(&["alice", "bob"]);
    let page = |id| response(id, NIL, array([1.into(), (1_u64 << 62).into(), array([])]));
    let entries = Value::Map(vec![("alice".into(), u64::MAX.into())]);
    let status = Value::Map(vec![("entries".into(), entries)]);
    // How the ring is it tells in truth: the page and the status are what is not to be believed.
    let ring = State::of(cluster.ring());
    let told = Told {
        name: "bob".to_owned(),
        ..Told::of(&ring, false)
    };
    let told = decode(&told.packed()).unwrap();
    let _liars = Liars::at(
        &cluster,
        &["bob"],
        &answers_to(move |id, method| match method {
            "ring" => response(id, NIL, told.clone()),
            "status" => response(id, NIL, status.clone()),
            _ => page(id),
        }),
    );
    cluster.start("alice");
    cluster.node("alice").wait_for("cannot join from bob");
    Wire::to(&cluster, "alice").does("status", []);
    let log = cluster.node("alice").log().join("\n");
    assert!(!log.contains("panicked"), "{log}");
}

#[test]
fn a_neighbour_that_lies_about_the_ring() {
    let mut cluster = Cluster::of(&["alice", "bob"]);
    let ring = State::of(cluster.ring());
    let truth = Told {
        name: "bob".to_owned(),
        ..Told::of(&ring, true)
    };
    let (far, odd) = (u64::MAX, truth.clone());
    let lies = [
        Told {
            step: far,
            ..truth.clone()
        },
        Told {
            step: 1,
            ..truth.clone()
        }, // into a ring of no nodes
        Told {
            window: far,
            ..truth.clone()
        },
        Told {
            ring: truth.ring.into_iter().rev().collect(),
            ..odd.clone()
        },
        Told {
            name: "carol".to_owned(),
            ..odd
        },
    ];
    let lies = lies.map(|lie| decode(&lie.packed()).unwrap());
    let next = AtomicUsize::new(0);
    let _liars = Liars::at(
        &cluster,
        &["bob"],
        &answers(move |id| {
            let lie = next.fetch_add(1, Relaxed) % lies.len();
            response(id, NIL, lies[lie].clone())
        }),
    );
    cluster.start("alice");
    for why in [
        "bad-request: a ring has at most 134217726 steps, not 18446744073709551615",
        "bad-request: a ring is names in order, each with host:port",
        "wrong-ring: a window of 18446744073709551615 ms, and not of 1000 ms",
        "wrong-ring: carol answers in the place of bob",
    ] {
        let warning = format!("warning: cannot hear from bob how the ring is: {why}");
        cluster.node("alice").wait_for(&warning);
    }
    let status = Wire::to(&cluster, "alice").does("status", []);
    assert_eq!(status["state"], "joining".into());
    let log = cluster.node("alice").log().join("\n");
    assert!(!log.contains("panicked"), "{log}");
}

#[test]
fn a_neighbour_whose_words_are_meant_for_a_terminal() {
    let mut cluster = Cluster::of(&["alice", "bob"]);
    let forged = "ready\nn09 ready\r\u{1b}]0;x\u{7}\u{9b}2J\u{202e}\nkv54: all is well";
    let status = |text: Value, ring: u32| {
        let some = array([text.clone()]);
        let map = Value::Map(vec![(text.clone(), text.clone())]);
        let fields = [
            ("name", text.clone()),
            ("version", text.clone()),
            ("state", text),
            ("waiting_for", some),
            ("digests", map),
            ("ring", ring.into()),
        ];
        let status = Value::Map(fields.map(|(name, value)| (name.into(), value)).into());
        answers(move |id| response(id, NIL, status.clone()))
    };
    let ring = cluster.ring().fingerprint("bob");
    for lie in [
        status(forged.into(), ring),
        status(bin(forged.as_bytes()), ring),
        status(forged.into(), 0),
        answers(move |id| response(id, forged.into(), NIL)),
        answers(move |id| response(id, format!("full: {forged}").into(), NIL)),
    ] {
        let _liars = Liars::at(&cluster, &["bob"], &lie);
        for command in [
            "status",
            "status --json",
            "where tea",
            "get tea",
            "set tea green",
            "get tea --via bob",
            "set tea green --via bob",
        ] {
            let command = format!("{command} --timeout 100ms");
            let said = cluster.kv54(command.split(' '));
            let all = format!("{}{}", said.text(), said.err);
            let moved = all.contains(|c: char| c != '\n' && (c.is_control() || c == '\u{202e}'));
            assert!(!moved, "{command}: {said:?}");
            let forged = |line: &str| line.starts_with("n09") || line.starts_with("kv54: all");
            assert!(!all.lines().any(forged), "{command}: {said:?}");
        }
        if cluster.running_nodes().count() == 0 {
            cluster.start("alice");
        }
        let bob = cluster
            .kv54(["status"])
            .text()
            .lines()
            .nth(2)
            .map(String::from);
        assert!(bob.unwrap().starts_with("bob"));
    }
    let log = cluster.node("alice").log();
    assert!(
        log.iter().all(|line| line.starts_with("alice: ")),
        "{log:?}"
    );
}

/// What a node that lies does with a connection.
type Lie = Arc<dyn Fn(TcpStream) + Send + Sync>;

/// Nodes that are none: whoever dials their address gets what this lie says.
struct Liars(Arc<AtomicBool>, Vec<JoinHandle<()>>);

impl Liars {
    fn at(cluster: &Cluster, names: &[&str], lie: &Lie) -> Liars {
        let done = Arc::new(AtomicBool::new(false));
        let liar = |name| {
            // A process that is just being started by another test may hold what was bound before.
            let deadline = Instant::now() + Duration::from_secs(10);
            let listener = loop {
                match TcpListener::bind(cluster.address(name)) {
                    Err(error) if error.kind() == ErrorKind::AddrInUse => {
                        assert!(Instant::now() < deadline, "{error}");
                        thread::sleep(Duration::from_millis(1));
                    }
                    bound => break bound.unwrap(),
                }
            };
            listener.set_nonblocking(true).unwrap();
            let (done, lie) = (done.clone(), lie.clone());
            thread::spawn(move || {
                while !done.load(Relaxed) {
                    match listener.accept() {
                        Ok((stream, _)) => {
                            let lie = lie.clone();
                            stream.set_nonblocking(false).unwrap();
                            thread::spawn(move || lie(stream));
                        }
                        Err(_) => thread::sleep(Duration::from_millis(2)),
                    }
                }
            })
        };
        let liars = names.iter().copied().map(liar).collect();
        Liars(done, liars)
    }
}

impl Drop for Liars {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
        for liar in self.1.drain(..) {
            let _ = liar.join(); // its address is free for the next
        }
    }
}

/// Answers every question in this way.
fn answers(answer: impl Fn(Value) -> Vec<u8> + Send + Sync + 'static) -> Lie {
    answers_to(move |id, _| answer(id))
}

/// Answers in this way, to the id and the method of each question.
fn answers_to(answer: impl Fn(Value, &str) -> Vec<u8> + Send + Sync + 'static) -> Lie {
    Arc::new(move |stream| {
        let mut questions = BufReader::new(&stream);
        while let Ok(question) = rmpv::decode::read_value(&mut questions) {
            let method = question[2].as_str().unwrap_or_default();
            let answer = answer(question[1].clone(), method);
            if (&stream).write_all(&answer).is_err() {
                break;
            }
        }
    })
}

/// Sends this without end, once something was asked.
fn endless(bytes: Vec<u8>) -> Lie {
    Arc::new(move |stream| {
        let patience = Some(Duration::from_millis(500));
        stream.set_write_timeout(patience).unwrap();
        let _ = (&stream).read(&mut [0; 1024]);
        sends(&stream, &bytes, usize::MAX);
    })
}

fn response(id: Value, error: Value, result: Value) -> Vec<u8> {
    encode(&array([1.into(), id, error, result]))
}

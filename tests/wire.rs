//! What a node answers to whoever speaks plain MessagePack-RPC to it, byte for byte.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::future::{Future, poll_fn};
use std::io::Read as _;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Poll, Waker};
use std::thread;
use std::time::{Duration, Instant};

use common::Cluster;
use common::wire::{MIB, NIL, PATIENCE, Wire, array, bin, entry, request, says, stamp};
use futures::stream;
use kv54::cluster::Limits;
use kv54::entry::Packed;
use kv54::error::Error;
use kv54::rpc::codec::{encode, write_response};
use kv54::rpc::{Answer, Service, connected, serve};
use msgpack_rpc::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

#[test]
fn a_key_is_its_bytes_however_they_are_sent() {
    let cluster = Cluster::running(&["alice"]);
    let mut wire = Wire::to(&cluster, "alice");
    wire.does("set", ["tea".into(), "green".into()]);
    assert_eq!(wire.does("get", ["tea".into()]), "green".into());
    assert_eq!(wire.does("get", [bin(b"tea")]), "green".into());

    // Ruby and Python of old send bytes as a str that is not UTF-8.
    let old_raw = b"\x94\x00\x2a\xa3get\x91\xa2\xff\xfe";
    wire.does("set", [bin(b"\xff\xfe"), "black".into()]);
    wire.send(old_raw);
    assert_eq!(wire.answer(), Some((42, Ok("black".into()))));
    wire.send(b"\x94\x00\x2b\xa6delete\x91\xa2\xff\xfe");
    assert_eq!(wire.answer(), Some((43, Ok(NIL))));
    assert_eq!(wire.does("get", [bin(b"\xff\xfe")]), NIL);
}

#[test]
fn any_value_comes_back_as_it_went_in() {
    let cluster = Cluster::running(&["alice"]);
    let mut wire = Wire::to(&cluster, "alice");
    let nested = Value::Map(vec![
        ("leaves".into(), array([1.into(), NIL, array([])])),
        (array([2.into()]), Value::Map(vec![(NIL, false.into())])),
        (3.into(), bin(b"\x00\xff")),
        (3.into(), "a key that comes twice".into()),
    ]);
    let values = [
        "".into(),
        "grün".into(),
        "x".repeat(70_000).into(),
        bin(b""),
        bin(b"\xc1\xff"),
        0.into(),
        (-1).into(),
        (-33).into(),
        300.into(),
        u64::MAX.into(),
        i64::MIN.into(),
        true.into(),
        false.into(),
        1.5_f32.into(),
        f32::INFINITY.into(),
        1.5_f64.into(),
        0.1_f64.into(),
        (-0.0_f64).into(),
        f64::NAN.into(),
        array([]),
        Value::Map(Vec::new()),
        nested.clone(),
        array([nested, NIL]),
        Value::Ext(5, vec![1, 2, 3]),
        Value::Ext(-1, vec![0; 8]),
        Value::Ext(0, Vec::new()),
    ];
    for value in values {
        assert_eq!(wire.does("set", ["tea".into(), value.clone()]), NIL);
        // As bytes: NaN is not equal to itself, -0.0 is equal to 0.0.
        let back = wire.does("get", ["tea".into()]);
        assert_eq!(encode(&back), encode(&value), "{value} became {back}");
    }
}

/// A node never looks into a value: it keeps the MessagePack that came.
#[test]
fn a_value_comes_back_byte_for_byte() {
    let cluster = Cluster::running(&["alice"]);
    let mut wire = Wire::to(&cluster, "alice");
    let values: [&[u8]; 6] = [
        b"\xa2\xff\xfe",             // an old raw that is not UTF-8
        b"\xcf\0\0\0\0\0\0\0\x07",   // 7, wider than it need be
        b"\xdd\0\0\0\x01\xd9\x02ab", // an array and a str with long headers
        b"\xca\x7f\xc0\0\x01",       // a NaN with a payload
        b"\x82\xa1k\x01\xa1k\x02",   // a key twice
        b"\xc7\x03\xff\x01\x02\x03", // an extension of three bytes
    ];
    for value in values {
        wire.send(&[b"\x94\x00\x07\xa3set\x92\xa3tea", value].concat());
        assert_eq!(wire.answer(), Some((7, Ok(NIL))));
        wire.send(b"\x94\x00\x08\xa3get\x91\xa3tea");
        let mut answer = vec![0; 8 + value.len()];
        wire.stream.read_exact(&mut answer).unwrap();
        let expected = [b"\x94\x01\xce\0\0\0\x08\xc0", value].concat();
        assert_eq!(answer, expected, "{value:x?}");
    }
}

/// A decoder of 2009 knows no str with a length of one byte: at the top of an answer such a str
/// gets two.
#[test]
fn a_str_of_32_to_255_bytes_is_answered_with_a_length_of_two_bytes() {
    let cluster = Cluster::running(&["alice"]);
    let mut wire = Wire::to(&cluster, "alice");
    for length in [31_u8, 32, 255] {
        let text = "x".repeat(length.into());
        wire.does("set", ["tea".into(), text.as_str().into()]);
        wire.send(b"\x94\x00\x08\xa3get\x91\xa3tea");
        let header: &[u8] = match length {
            ..32 => &[0xa0 | length],
            _ => &[0xda, 0, length],
        };
        let expected = [b"\x94\x01\xce\0\0\0\x08\xc0", header, text.as_bytes()].concat();
        let mut answer = vec![0; expected.len()];
        wire.stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer, expected, "{length} bytes");
    }
}

#[test]
fn nil_is_an_absent_key() {
    let cluster = Cluster::running(&["alice"]);
    let mut wire = Wire::to(&cluster, "alice");
    assert_eq!(wire.does("get", ["tea".into()]), NIL);
    assert_eq!(wire.does("delete", ["tea".into()]), NIL);
    wire.does("set", ["tea".into(), "green".into()]);
    assert_eq!(wire.status("keys"), 1);
    wire.does("set", ["tea".into(), NIL]);
    assert_eq!(wire.does("get", ["tea".into()]), NIL);
    assert_eq!((wire.status("keys"), wire.status("tombstones")), (0, 1));
    wire.does("set", ["tea".into(), "black".into()]);
    assert_eq!(wire.does("delete", ["tea".into()]), NIL);
    assert_eq!(wire.does("get", ["tea".into()]), NIL);
    assert_eq!((wire.status("keys"), wire.status("tombstones")), (0, 1));
}

#[test]
fn a_hundred_requests_in_one_write_get_a_hundred_answers() {
    let cluster = Cluster::running(&["alice"]);
    let mut wire = Wire::to(&cluster, "alice");
    let sets = (0..100).map(|n| request(n, "set", [format!("key{n}").into(), n.into()]));
    wire.send(&sets.collect::<Vec<_>>().concat());
    let all_nil = (0..100).map(|n| (n, Ok(NIL))).collect();
    assert_eq!(wire.answers(100), all_nil);
    // Ids that are neither small nor in order.
    let id = |n: u32| n.wrapping_mul(0x9e37_79b9);
    let gets = (0..100).map(|n| request(id(n), "get", [format!("key{n}").into()]));
    wire.send(&gets.collect::<Vec<_>>().concat());
    let all_found = (0..100).map(|n| (id(n), Ok(n.into()))).collect();
    assert_eq!(wire.answers(100), all_found);
    wire.falls_silent();
}

#[test]
fn a_request_may_come_byte_by_byte() {
    let cluster = Cluster::running(&["alice"]);
    let mut wire = Wire::to(&cluster, "alice");
    for byte in request(7, "set", ["tea".into(), "green".into()]) {
        wire.send(&[byte]);
    }
    assert_eq!(wire.answer(), Some((7, Ok(NIL))));
}

#[test]
fn who_has_finished_asking_still_gets_the_answers() {
    let cluster = Cluster::running(&["alice"]);
    let mut wire = Wire::to(&cluster, "alice");
    let sets = (0..50).map(|n| request(n, "set", [n.to_string().into(), bin(&[7; 10_000])]));
    let gets = (0..50).map(|n| request(n + 50, "get", [n.to_string().into()]));
    wire.send(&sets.chain(gets).collect::<Vec<_>>().concat());
    wire.finish_asking();
    let answers = wire.answers(100);
    assert_eq!(answers[&0], Ok(NIL));
    assert_eq!(answers[&99], Ok(bin(&[7; 10_000])));
    wire.is_closed();
}

#[test]
fn who_leaves_in_the_middle_of_a_message_gets_what_was_asked_before() {
    let cluster = Cluster::running(&["alice"]);
    let mut wire = Wire::to(&cluster, "alice");
    let whole = request(7, "set", ["tea".into(), "green".into()]);
    wire.send(&[&whole, &whole[..10]].concat());
    wire.finish_asking();
    assert_eq!(wire.answer(), Some((7, Ok(NIL))));
    wire.is_closed();
}

#[test]
fn a_bad_shape_is_answered_and_the_connection_goes_on() {
    let cluster = Cluster::running(&["alice"]);
    let mut wire = Wire::to(&cluster, "alice");
    let (id, get) = (Value::from(7), Value::from("get"));
    let shapes = [
        array([0.into(), id.clone()]),
        array([0.into(), id.clone(), get.clone()]),
        array([0.into(), id.clone(), get.clone(), array([]), NIL]),
        array([0.into(), id.clone(), 5.into(), array([])]),
        array([0.into(), id.clone(), bin(b"\xff"), array([])]),
        array([0.into(), id.clone(), get.clone(), "tea".into()]),
        array([0.into(), id, get, Value::Map(Vec::new())]),
    ];
    for shape in &shapes {
        wire.send(&encode(shape));
        let (id, answer) = wire.answer().unwrap();
        assert_eq!(id, 7, "{shape}");
        says(answer, &["bad-request: "]);
        wire.does("set", ["tea".into(), "green".into()]);
    }
}

#[test]
fn garbage_closes_the_connection_and_the_node_goes_on() {
    let cluster = Cluster::running(&["alice"]);
    let nobody_asked = [
        b"GET / HTTP/1.1\r\nHost: alice\r\n\r\n".to_vec(),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc".to_vec(),
        b"\xc1".to_vec(),
        vec![0x94; 100],
        encode(&array([])),
        encode(&array([3.into(), 7.into(), "get".into(), array([])])),
        encode(&array([0.into(), (-1).into(), "get".into(), array([])])),
        encode(&array([2.into(), 5.into(), array([])])),
    ];
    for garbage in nobody_asked {
        let mut wire = Wire::to(&cluster, "alice");
        // What was asked before the garbage is answered, what comes after it is not.
        let before = request(1, "set", ["tea".into(), "green".into()]);
        let after = request(2, "delete", ["tea".into()]);
        wire.send(&[before, garbage, after].concat());
        assert_eq!(wire.answer(), Some((1, Ok(NIL))));
        wire.is_closed();
    }
    let mut wire = Wire::to(&cluster, "alice");
    assert_eq!(wire.does("get", ["tea".into()]), "green".into());
}

#[test]
fn an_answer_to_nothing_closes_the_connection() {
    let cluster = Cluster::running(&["alice"]);
    let mut wire = Wire::to(&cluster, "alice");
    wire.send(&encode(&array([1.into(), 7.into(), NIL, "green".into()])));
    wire.is_closed();
}

#[test]
fn a_node_tells_its_status_by_name() {
    let cluster = Cluster::running(&["alice"]);
    let mut wire = Wire::to(&cluster, "alice");
    let Value::Map(status) = wire.does("status", []) else {
        panic!("not a map: {}", wire.does("status", []));
    };
    let names: Vec<&str> = status
        .iter()
        .filter_map(|(name, _)| name.as_str())
        .collect();
    for name in [
        "name",
        "version",
        "state",
        "waiting_for",
        "ring",
        "keys",
        "tombstones",
        "bytes",
        "digests",
        "uptime_s",
    ] {
        assert!(names.contains(&name), "{name} is missing: {names:?}");
    }
    // The page about the wire has a row for each of them.
    let page = std::fs::read_to_string("docs/wire.md").unwrap();
    let rows = page
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split(" |").next());
    let rows: Vec<&str> = rows.flat_map(|cell| cell.split(['`', ',', ' '])).collect();
    for name in names {
        assert!(rows.contains(&name), "docs/wire.md lacks {name}");
    }
    let status = Value::Map(status);
    assert_eq!(status["name"], "alice".into());
    assert_eq!(status["version"], env!("CARGO_PKG_VERSION").into());
    let ring = cluster.ring().fingerprint("alice");
    assert_eq!(status["ring"], ring.into());
    assert!(status["digests"]["alice"].is_str(), "{status}");
}

#[test]
fn an_unknown_method_is_named() {
    let cluster = Cluster::running(&["alice"]);
    let mut wire = Wire::to(&cluster, "alice");
    wire.refuses("steep", ["tea".into()], &["no-such-method: ", "steep"]);
    wire.refuses("GET", ["tea".into()], &["no-such-method: ", "GET"]);
    wire.refuses("", [], &["no-such-method: "]);
}

#[test]
fn wrong_parameters_are_bad_requests() {
    let cluster = Cluster::running(&["alice"]);
    let mut wire = Wire::to(&cluster, "alice");
    let (key, ring) = (Value::from("tea"), Value::from(wire.status("ring")));
    let wrong = [
        ("get", vec![]),
        ("get", vec![key.clone(), key.clone()]),
        ("set", vec![key.clone()]),
        ("set", vec![key.clone(), 1.into(), 2.into(), NIL]),
        ("delete", vec![]),
        ("delete", vec![key.clone(), NIL]),
        ("status", vec![key.clone()]),
        ("load", vec![]),
        ("load", vec![ring.clone()]),
        ("load", vec![ring.clone(), key.clone(), stamp(1, 1), NIL]),
        ("store", vec![ring.clone(), key.clone()]),
        (
            "store",
            vec![ring.clone(), key.clone(), entry(1, 1, 1), NIL],
        ),
        ("cas", vec![key.clone(), NIL]),
        ("cas", vec![key.clone(), NIL, 1.into(), true.into(), NIL]),
        ("incr", vec![]),
        ("incr", vec![key.clone(), 1.into(), true.into(), NIL]),
        ("promise", vec![ring.clone(), key.clone()]),
        ("promise", vec![ring.clone(), key.clone(), 1.into(), NIL]),
    ];
    for (method, params) in wrong {
        wire.refuses(method, params, &["bad-request: ", method]);
    }
    for key in [NIL, 5.into(), array([key.clone()]), true.into()] {
        wire.refuses("get", [key.clone()], &["bad-request: ", "key"]);
        wire.refuses("set", [key.clone(), 1.into()], &["bad-request: ", "key"]);
        wire.refuses("delete", [key.clone()], &["bad-request: ", "key"]);
        wire.refuses(
            "load",
            [ring.clone(), key.clone()],
            &["bad-request: ", "key"],
        );
        wire.refuses("incr", [key.clone()], &["bad-request: ", "key"]);
        wire.refuses(
            "cas",
            [key.clone(), NIL, 1.into()],
            &["bad-request: ", "key"],
        );
        wire.refuses(
            "promise",
            [ring.clone(), key, 1.into()],
            &["bad-request: ", "key"],
        );
    }
    for stamp in [
        NIL,
        5.into(),
        array([1.into()]),
        array([(-1).into(), 1.into()]),
    ] {
        let params = [ring.clone(), key.clone(), stamp];
        wire.refuses("load", params.clone(), &["bad-request: ", "stamp"]);
        wire.refuses("store", params, &["bad-request: ", "stamp"]);
    }
    let params = [ring.clone(), key.clone(), stamp(1, 1)];
    wire.refuses("store", params, &["bad-request: ", "entry"]);
    for number in [
        NIL,
        "1".into(),
        (-1).into(),
        1.5.into(),
        (2_f64.powi(64)).into(),
    ] {
        let swapped = array([1.into(), 1.into(), 1.into(), number.clone()]);
        wire.refuses(
            "store",
            [ring.clone(), key.clone(), swapped],
            &["bad-request: "],
        );
        let params = [ring.clone(), key.clone(), number.clone()];
        wire.refuses("promise", params, &["bad-request: ", "ballot"]);
        if number != (-1).into() {
            wire.refuses("incr", [key.clone(), number], &["bad-request: ", "integer"]);
        }
    }
    for odd in [
        array([0.into(), 1.into(), 1.into(), 0.into()]),
        array([1.into(), 1.into(), 1.into(), 1.into(), 1.into()]),
    ] {
        wire.refuses(
            "store",
            [ring.clone(), key.clone(), odd],
            &["bad-request: "],
        );
    }
    assert_eq!((wire.status("keys"), wire.status("tombstones")), (0, 0));
}

#[test]
fn a_promise_for_no_ballot_is_a_bad_request() {
    let cluster = Cluster::running(&["alice"]);
    let mut wire = Wire::to(&cluster, "alice");
    let (ring, key) = (Value::from(wire.status("ring")), Value::from("tea"));
    for odd in [
        0.into(),
        array([]),
        array([0.into()]),
        array([1.into(), 1.into()]),
        array([0.into(), 1.into(), 1.into(), 1.into()]),
        array([1.into(), "1".into(), 1.into(), 1.into()]),
    ] {
        let params = [ring.clone(), key.clone(), odd];
        wire.refuses("promise", params, &["bad-request: ", "ballot"]);
    }
    assert_eq!(wire.status("bytes"), 0);
}

#[test]
fn a_key_of_1024_bytes_is_taken_and_one_of_1025_is_not() {
    let cluster = Cluster::running(&["alice"]);
    let mut wire = Wire::to(&cluster, "alice");
    let ring = Value::from(wire.status("ring"));
    for longest in [Value::from("k".repeat(1024)), bin(&[0xff; 1024])] {
        wire.does("set", [longest.clone(), "green".into()]);
        assert_eq!(wire.does("get", [longest]), "green".into());
    }
    for longer in [Value::from("k".repeat(1025)), bin(&[0xff; 1025])] {
        let said = ["too-large: ", "1025", "1024"];
        wire.refuses("set", [longer.clone(), "green".into()], &said);
        wire.refuses("get", [longer.clone()], &said);
        wire.refuses("delete", [longer.clone()], &said);
        wire.refuses("load", [ring.clone(), longer.clone()], &said);
        wire.refuses("store", [ring.clone(), longer, entry(1, 1, 1)], &said);
    }
    wire.does("set", ["".into(), "the empty key is one".into()]);
    assert_eq!(wire.status("keys"), 3);
}

#[test]
fn a_value_of_1_mib_is_taken_and_one_byte_more_is_not() {
    let cluster = Cluster::running(&["alice"]);
    let mut wire = Wire::to(&cluster, "alice");
    let text = |length: usize| Value::from("x".repeat(length));
    let bytes = |length: usize| bin(&vec![0xff; length]);
    for largest in [text(MIB), bytes(MIB)] {
        wire.does("set", ["tea".into(), largest.clone()]);
        assert!(
            wire.does("get", ["tea".into()]) == largest,
            "it came back changed"
        );
    }
    wire.does("set", ["tea".into(), "green".into()]);
    for larger in [text(MIB + 1), bytes(MIB + 1), array([bytes(MIB)])] {
        let said = ["too-large: ", "tea"];
        wire.refuses("set", ["tea".into(), larger.clone()], &said);
        let ring = wire.status("ring").into();
        let entry = array([(1_u64 << 40).into(), 1.into(), larger]);
        wire.refuses("store", [ring, "tea".into(), entry], &["too-large: "]);
    }
    assert_eq!(wire.does("get", ["tea".into()]), "green".into());
}

#[test]
fn a_value_too_deep_or_of_too_many_parts_is_refused() {
    let cluster = Cluster::running(&["alice"]);
    let mut wire = Wire::to(&cluster, "alice");
    let nested = |levels: usize| (0..levels).fold(NIL, |inner, _| array([inner]));
    let row = |parts: usize| Value::Array(vec![NIL; parts]);
    for taken in [nested(10), row(60_000)] {
        wire.does("set", ["tea".into(), taken.clone()]);
        assert!(
            wire.does("get", ["tea".into()]) == taken,
            "it came back changed"
        );
    }
    for refused in [nested(11), row(60_001)] {
        wire.refuses("set", ["tea".into(), refused], &["too-large: "]);
    }
}

#[test]
fn a_message_over_4_mib_is_told_so_before_the_connection_ends() {
    let cluster = Cluster::running(&["alice"]);
    let large = request(7, "set", ["tea".into(), bin(&vec![0; 4 * MIB])]);
    // The whole of it, and no more of it than the header that says so.
    for sent in [&large[..], &large[..30]] {
        let mut wire = Wire::to(&cluster, "alice");
        wire.send(sent);
        let (id, answer) = wire.answer().unwrap();
        assert_eq!(id, 7);
        says(answer, &["too-large: ", "4194304"]);
        wire.is_closed();
    }
}

#[test]
fn a_notification_is_carried_out_and_not_answered() {
    let cluster = Cluster::running(&["alice"]);
    let mut wire = Wire::to(&cluster, "alice");
    let notification = |method: &str, params: Vec<Value>| {
        encode(&array([2.into(), method.into(), Value::Array(params)]))
    };
    wire.send(&notification("set", vec!["tea".into(), "green".into()]));
    wire.send(&notification("steep", vec![]));
    wire.send(&notification("get", vec![]));
    wire.send(&notification("get", vec!["tea".into()]));
    // Nobody says when it has been carried out: ask until it has.
    let deadline = Instant::now() + PATIENCE;
    while wire.does("get", ["tea".into()]) != "green".into() {
        assert!(Instant::now() < deadline, "it was never carried out");
    }
    wire.falls_silent();
}

#[test]
fn a_replica_keeps_the_newest_entry() {
    let cluster = Cluster::running(&["alice"]);
    let mut wire = Wire::to(&cluster, "alice");
    let ring = Value::from(wire.status("ring"));
    let load = [ring.clone(), "tea".into()];
    let store = |entry: Value| [ring.clone(), "tea".into(), entry];
    assert_eq!(wire.does("load", load.clone()), entry(0, 0, NIL));
    assert_eq!(wire.does("store", store(entry(5, 50, "green"))), NIL);
    assert_eq!(wire.does("load", load.clone()), entry(5, 50, "green"));
    // An older counter, an older writer, the same once more: answered alike, and nothing changes.
    for old in [
        entry(4, u64::MAX, "black"),
        entry(5, 49, "black"),
        entry(5, 50, "black"),
    ] {
        assert_eq!(wire.does("store", store(old)), NIL);
        assert_eq!(wire.does("load", load.clone()), entry(5, 50, "green"));
    }
    for new in [
        entry(5, 51, "white"),
        entry(6, 0, "oolong"),
        entry(7, 0, NIL),
    ] {
        assert_eq!(wire.does("store", store(new.clone())), NIL);
        assert_eq!(wire.does("load", load.clone()), new);
    }
    assert_eq!(wire.does("get", ["tea".into()]), NIL);
    // The next write goes above what a replica has seen.
    wire.does("set", ["tea".into(), "red".into()]);
    let newest = wire.does("load", load);
    assert_eq!((&newest[0], &newest[2]), (&8.into(), &"red".into()));
}

#[test]
fn who_knows_the_stamp_is_spared_the_value() {
    let cluster = Cluster::running(&["alice"]);
    let mut wire = Wire::to(&cluster, "alice");
    let ring = Value::from(wire.status("ring"));
    let load = |known: Value| [ring.clone(), "tea".into(), known];
    assert_eq!(wire.does("load", load(stamp(0, 0))), stamp(0, 0));
    wire.does("store", [ring.clone(), "tea".into(), entry(5, 50, "green")]);
    for as_new in [stamp(5, 50), stamp(5, 51), stamp(6, 0), stamp(u64::MAX, 0)] {
        assert_eq!(wire.does("load", load(as_new)), stamp(5, 50));
    }
    for older in [stamp(0, 0), stamp(4, 51), stamp(5, 49)] {
        assert_eq!(wire.does("load", load(older)), entry(5, 50, "green"));
    }
}

#[test]
fn a_counter_of_an_epoch_that_has_not_begun_is_refused() {
    let cluster = Cluster::running(&["alice"]);
    let mut wire = Wire::to(&cluster, "alice");
    let ring = Value::from(wire.status("ring"));
    for counter in [0, 1 << 37, 1 << 63, u64::MAX] {
        let params = [ring.clone(), "tea".into(), entry(counter, 1, "green")];
        wire.refuses(
            "store",
            params,
            &["bad-request: ", "from 1 to 137438953471", "--again"],
        );
    }
    assert_eq!(
        wire.does("load", [ring.clone(), "tea".into()]),
        entry(0, 0, NIL)
    );
    let last = entry((1 << 37) - 1, u64::MAX, "green");
    wire.does("store", [ring.clone(), "tea".into(), last.clone()]);
    assert_eq!(wire.does("load", [ring, "tea".into()]), last);
    assert_eq!(wire.does("status", [])["worn"], Value::from(true));
    wire.refuses(
        "set",
        ["tea".into(), "black".into()],
        &["bad-request: ", "--again"],
    );
}

#[test]
fn another_ring_is_refused_with_both_fingerprints() {
    let cluster = Cluster::running(&["alice"]);
    let mut wire = Wire::to(&cluster, "alice");
    let ours = wire.status("ring");
    let said = ["wrong-ring: ", "alice", &ours.to_string(), "54321"];
    let wrong = Value::from(54_321);
    wire.refuses("load", [wrong.clone(), "tea".into()], &said);
    let params = [wrong, "tea".into(), entry(1, 1, "green")];
    wire.refuses("store", params, &said);
    for no_ring in [NIL, "54".into(), (-1).into()] {
        let params = [no_ring, "tea".into(), entry(1, 1, "green")];
        wire.refuses("store", params, &["wrong-ring: "]);
    }
    assert_eq!(wire.does("get", ["tea".into()]), NIL);
    assert_eq!((wire.status("keys"), wire.status("bytes")), (0, 0));
}

#[test]
fn a_node_of_five_refuses_the_ring_of_another_and_keys_that_are_not_its_own() {
    let cluster = Cluster::five();
    let key = (0..).map(|n| format!("key{n}"));
    let key = key.filter(|key| !cluster.replicas(key).contains(&"alice".to_owned()));
    let strange = Value::from(key.into_iter().next().unwrap());
    let mut alice = Wire::to(&cluster, "alice");
    let mut bob = Wire::to(&cluster, "bob");
    let ring = Value::from(alice.status("ring"));
    let said = ["wrong-ring: ", "alice"];
    alice.refuses("load", [ring.clone(), strange.clone()], &said);
    let params = [ring, strange.clone(), entry(1, 1, "green")];
    alice.refuses("store", params, &said);

    // The ring says who is meant: what was meant for bob must not be counted as his word.
    let (ours, his) = (alice.status("ring"), bob.status("ring"));
    assert_ne!(ours, his);
    let said = [
        "wrong-ring: ",
        &ours.to_string(),
        &his.to_string(),
        "alice bob carol dave erin",
    ];
    let mine = Value::from(cluster.key_on(&["alice", "bob", "carol"]));
    alice.refuses("load", [his.into(), mine.clone()], &said);
    alice.refuses("store", [his.into(), mine, entry(1, 1, "green")], &said);
    assert_eq!((alice.status("keys"), alice.status("bytes")), (0, 0));
}

#[test]
fn a_full_node_refuses_more_and_forgets_nothing() {
    let mut cluster = Cluster::with_limits(&["alice"], "memory = \"1MiB\"");
    cluster.start("alice");
    let mut wire = Wire::to(&cluster, "alice");
    // To the last byte: what is left for the one large value is measured, not assumed.
    wire.does("set", ["tea".into(), "green".into()]);
    wire.does("set", ["big".into(), bin(&vec![1; 100_000])]);
    let left = MIB - usize::try_from(wire.status("bytes")).unwrap();
    let brimful = bin(&vec![1; 100_000 + left]);
    wire.does("set", ["big".into(), brimful.clone()]);
    assert_eq!(wire.status("bytes"), MIB as u64);

    let said = ["full: ", "alice", "1048576"];
    wire.refuses("set", ["cup".into(), 1.into()], &said);
    wire.refuses("set", ["tea".into(), "green!".into()], &said);
    wire.refuses("set", ["big".into(), bin(&vec![1; 100_001 + left])], &said);
    assert_eq!(wire.does("get", ["cup".into()]), NIL);
    assert_eq!(wire.does("get", ["tea".into()]), "green".into());
    assert!(
        wire.does("get", ["big".into()]) == brimful,
        "it has changed"
    );
    wire.does("set", ["tea".into(), "black".into()]);
    wire.does("set", ["big".into(), brimful]);
    assert_eq!(wire.does("get", ["tea".into()]), "black".into());

    wire.does("delete", ["big".into()]);
    wire.does("set", ["cup".into(), bin(&vec![1; 100_000])]);
    assert_eq!((wire.status("keys"), wire.status("tombstones")), (2, 1));
}

#[test]
fn one_connection_too_many_is_closed_until_another_one_ends() {
    let mut cluster = Cluster::with_limits(&["alice"], "connections = 4");
    cluster.start("alice");
    let mut wires: Vec<Wire> = (0..4).map(|_| Wire::to(&cluster, "alice")).collect();
    for wire in &mut wires {
        wire.does("set", ["tea".into(), "green".into()]);
    }
    Wire::to(&cluster, "alice").is_closed();
    for wire in &mut wires {
        assert_eq!(wire.does("get", ["tea".into()]), "green".into());
    }
    wires.pop();
    // The node may need a moment to see that it is gone.
    let deadline = Instant::now() + PATIENCE;
    while Wire::to(&cluster, "alice").greets().is_none() {
        assert!(Instant::now() < deadline, "it stays closed");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_client_that_reads_nothing_until_it_has_asked_everything_gets_it_all() {
    let cluster = Cluster::running(&["alice"]);
    let mut wire = Wire::to(&cluster, "alice");
    let value = bin(&vec![7; 64 << 10]);
    wire.does("set", ["tea".into(), value.clone()]);
    let gets = (0..300).map(|n| request(n, "get", ["tea".into()]));
    wire.send(&gets.collect::<Vec<_>>().concat());
    // 19 MiB are more than the socket takes: the node stops, and goes on as they are read.
    let answers = wire.answers(300);
    let right = answers
        .values()
        .filter(|answer| **answer == Ok(value.clone()));
    assert_eq!(right.count(), 300);
    wire.falls_silent();
}

#[test]
fn more_requests_than_a_node_has_in_flight_are_all_answered() {
    let cluster = Cluster::running(&["alice", "bob", "carol"]);
    let mut wire = Wire::to(&cluster, "alice");
    wire.does("set", ["tea".into(), "green".into()]);
    // Each of them waits for another node: 1,024 at once, the others in the socket.
    let gets = (0..2_000).map(|n| request(n, "get", ["tea".into()]));
    wire.send(&gets.collect::<Vec<_>>().concat());
    wire.finish_asking();
    let all_found = (0..2_000).map(|n| (n, Ok("green".into()))).collect();
    assert_eq!(wire.answers(2_000), all_found);
    wire.is_closed();
}

#[test]
fn what_a_slow_reader_has_read_is_no_longer_held_for_it() {
    let held = |answers: usize| answers * (64 << 10);
    // A network that takes 16 KiB at a time, and a node with room for 128 answers at once.
    let (near, far) = tokio::io::duplex(16 << 10);
    let limits = Limits {
        connections: 1,
        buffers: held(128),
        ..Limits::default()
    };
    let far = Ok(connected(Box::new(far)));
    let incoming = stream::iter([far]);
    let (mut from, mut to) = tokio::io::split(near);
    let talk = async {
        let gets = (0..300).map(|n| request(n, "get", ["tea".into()]));
        to.write_all(&gets.collect::<Vec<_>>().concat())
            .await
            .unwrap();
        to.shutdown().await.unwrap();
        let mut answers = Vec::new();
        from.read_to_end(&mut answers).await.unwrap();
        answers.len()
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let read = runtime.unwrap().block_on(async {
        tokio::select! {
            () = serve(incoming, &Large(64 << 10), || limits, CancellationToken::new()) => panic!("it serves until it is told to stop"),
            read = timeout(PATIENCE, talk) => read.unwrap(),
        }
    });
    assert!(read > held(300), "closed after {read} bytes");
}

#[test]
fn who_has_read_its_answers_does_not_count_as_if_it_had_not() {
    let (count, large) = (20, Large(1 << 20));
    let limits = Limits {
        connections: count,
        buffers: count * (80 << 10) + (4 << 20), // what is kept for the next ones, and what one is sent
        ..Limits::default()
    };
    let (mut guests, far): (Vec<_>, Vec<_>) =
        (0..count).map(|_| tokio::io::duplex(4 << 10)).unzip();
    let incoming = far.into_iter().map(|far| Ok(connected(Box::new(far))));
    let mut answer = Vec::new();
    write_response(
        &mut answer,
        1,
        &Ok(Packed::of(bin(&vec![7; large.0])).into()),
    );
    let talk = async {
        for n in 0..2 * count {
            let guest = &mut guests[n % count];
            guest
                .write_all(&request(1, "get", ["tea".into()]))
                .await
                .unwrap();
            guest.read_exact(&mut vec![0; answer.len()]).await.unwrap();
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.unwrap().block_on(async {
        tokio::select! {
            () = serve(stream::iter(incoming), &large, || limits, CancellationToken::new()) => panic!("it serves on"),
            done = timeout(PATIENCE, talk) => done.unwrap(),
        }
    });
}

#[test]
fn a_request_that_comes_with_a_large_answer_is_not_forgotten() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.unwrap().block_on(async {
        // A network that takes a megabyte at once, and a node that is still busy with it.
        let (mut guest, far) = tokio::io::duplex(4 << 20);
        let far = Ok(connected(Box::new(far)));
        let (held, limits) = (Held::default(), Limits { connections: 1, ..Limits::default() });
        let talk = async {
            guest.write_all(&request(1, "large", [])).await.unwrap();
            held.asked.notified().await;
            held.release.notify_one();
            guest.write_all(&request(2, "small", [])).await.unwrap();
            let mut expected = Vec::new();
            write_response(&mut expected, 1, &Ok(Packed::of(bin(&vec![7; 1 << 20])).into()));
            write_response(&mut expected, 2, &Ok(().into()));
            let mut answers = vec![0; expected.len()];
            guest.read_exact(&mut answers).await.unwrap();
            assert!(answers == expected);
        };
        tokio::select! {
            () = serve(stream::iter([far]), &held, || limits, CancellationToken::new()) => panic!("it serves on"),
            answered = timeout(PATIENCE, talk) => answered.unwrap(),
        }
    });
}

/// A message of many values costs its walks, not only its bytes.
#[test]
fn many_values_use_up_the_turns_of_their_connection() {
    let (asked, limits) = (
        Order::default(),
        Limits {
            connections: 2,
            ..Limits::default()
        },
    );
    let (mut heavy, far) = tokio::io::duplex(1 << 20);
    let (mut light, other) = tokio::io::duplex(1 << 20);
    let incoming = [far, other].map(|far| Ok(connected(Box::new(far))));
    let talk = async {
        let nils = request(1, "heavy", [Value::Array(vec![NIL; 65_000])]);
        heavy.write_all(&nils.repeat(15)).await.unwrap();
        light
            .write_all(&request(1, "light", []).repeat(20_000))
            .await
            .unwrap();
        light.read_exact(&mut vec![0; 20_000 * 9]).await.unwrap();
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.unwrap().block_on(async {
        tokio::select! {
            () = serve(stream::iter(incoming), &asked, || limits, CancellationToken::new()) => panic!("it serves on"),
            answered = timeout(PATIENCE, talk) => answered.unwrap(),
        }
    });
    let heavy = asked
        .0
        .lock()
        .unwrap()
        .iter()
        .filter(|method| *method == "heavy")
        .count();
    assert!(
        (1..8).contains(&heavy),
        "{heavy} of 15 while 20,000 others were answered"
    );
}

#[test]
fn who_wakes_itself_again_and_again_holds_nobody_up() {
    let (mut spins, far) = tokio::io::duplex(1 << 10);
    let (mut stops, other) = tokio::io::duplex(1 << 10);
    served(Spinning::default(), [far, other], async move {
        spins.write_all(&request(1, "spin", [])).await.unwrap();
        stops.write_all(&request(1, "stop", [])).await.unwrap();
        for guest in [&mut stops, &mut spins] {
            guest.read_exact(&mut [0; 5]).await.unwrap();
        }
    });
}

#[test]
fn who_was_answered_long_ago_and_is_woken_still_changes_nothing() {
    answers_when_woken(|wakers| wakers.iter().rev().take(300).cloned().collect());
}

#[test]
fn who_is_woken_once_while_it_is_polled_is_answered() {
    answers_when_woken(std::mem::take);
}

/// Another thread wakes some of those who wait or waited, again and again.
fn answers_when_woken(some: fn(&mut Vec<Waker>) -> Vec<Waker>) {
    let (mut guest, far) = tokio::io::duplex(1 << 20);
    let bells = Arc::new(Bells::default());
    let rung = bells.clone();
    thread::spawn(move || {
        while Arc::strong_count(&rung) > 1 {
            rung.answered.store(rung.asked.load(SeqCst), SeqCst);
            let wakers = some(&mut rung.wakers.lock().unwrap());
            wakers.into_iter().for_each(Waker::wake);
            thread::yield_now();
        }
    });
    served(Waits(bells), [far], async move {
        for count in [1, 20, 100].repeat(20) {
            let asked = request(1, "wait", []).repeat(count);
            guest.write_all(&asked).await.unwrap();
            guest.read_exact(&mut vec![0; 5 * count]).await.unwrap();
        }
    });
}

/// Serves these connections until this is done.
fn served<const N: usize>(
    service: impl Service + Send + 'static,
    far: [DuplexStream; N],
    talk: impl Future<Output = ()> + Send + 'static,
) {
    let (done, is_done) = mpsc::channel();
    thread::spawn(move || {
        let incoming = far.map(|far| Ok(connected(Box::new(far))));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build();
        runtime.unwrap().block_on(async {
            tokio::select! {
                () = serve(stream::iter(incoming), &service, Limits::default, CancellationToken::new()) => panic!("it serves on"),
                () = talk => done.send(()).unwrap(),
            }
        });
    });
    is_done.recv_timeout(PATIENCE).unwrap();
}

/// Is busy with `spin` until it is told to stop.
#[derive(Default)]
struct Spinning(AtomicBool);

impl Service for Spinning {
    async fn answer(&self, method: &str, _: &[&[u8]]) -> Result<Answer, Error> {
        self.0.fetch_or(method == "stop", SeqCst);
        poll_fn(|context| {
            if self.0.load(SeqCst) {
                return Poll::Ready(Ok(().into()));
            }
            context.waker().wake_by_ref();
            Poll::Pending
        })
        .await
    }
}

/// Answers when somebody else says so.
struct Waits(Arc<Bells>);

#[derive(Default)]
struct Bells {
    asked: AtomicUsize,
    answered: AtomicUsize,
    wakers: Mutex<Vec<Waker>>, // of all who ever waited
}

impl Service for Waits {
    async fn answer(&self, _: &str, _: &[&[u8]]) -> Result<Answer, Error> {
        let Waits(bells) = self;
        let number = bells.asked.fetch_add(1, SeqCst);
        poll_fn(|context| {
            let mut wakers = bells.wakers.lock().unwrap();
            if bells.answered.load(SeqCst) > number {
                return Poll::Ready(Ok(().into()));
            }
            wakers.push(context.waker().clone());
            drop(wakers);
            thread::yield_now(); // a waker may come now
            Poll::Pending
        })
        .await
    }
}

/// Notes in which order it is asked.
#[derive(Default)]
struct Order(Mutex<Vec<String>>);

impl Service for Order {
    async fn answer(&self, method: &str, _: &[&[u8]]) -> Result<Answer, Error> {
        self.0.lock().unwrap().push(method.to_owned());
        Ok(().into())
    }
}

/// Answers `large` with a megabyte, once it is told to.
#[derive(Default)]
struct Held {
    asked: Notify,
    release: Notify,
}

impl Service for Held {
    async fn answer(&self, method: &str, _: &[&[u8]]) -> Result<Answer, Error> {
        if method == "large" {
            self.asked.notify_one();
            self.release.notified().await;
            return Ok(Packed::of(bin(&vec![7; 1 << 20])).into());
        }
        Ok(().into())
    }
}

/// Answers everything with so many bytes.
struct Large(usize);

impl Service for Large {
    async fn answer(&self, _: &str, _: &[&[u8]]) -> Result<Answer, Error> {
        Ok(Packed::of(bin(&vec![7; self.0])).into())
    }
}

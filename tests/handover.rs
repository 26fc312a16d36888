//! Everything out of a ring and into another one: backups, another number of nodes, the way to Redis.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::process::{Command, Stdio};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use common::{Cluster, Node, block_on};
use kv54::entry::{Entry, Stamp};
use kv54::rpc::codec::encode;
use msgpack_rpc::Value;
use serde_json::json;

const SEVEN: [&str; 7] = ["ann", "ben", "cleo", "dan", "eve", "fay", "gus"];

#[test]
fn every_kind_of_value_comes_back_as_the_line_that_it_was() {
    let old = Cluster::running(&["alice", "bob", "carol"]);
    set(&old, &every_kind_of_value());
    let dump = old.kv54(["export"]).exits(0);
    assert_eq!(
        dump.err,
        format!("kv54: {} keys exported\n", every_kind_of_value().len())
    );
    let new = Cluster::five();
    let import = new.kv54_with(["import"], &dump.out).exits(0);
    let lines = every_kind_of_value().len();
    assert_eq!(
        (import.text(), &*import.err),
        (&*format!("{lines} lines written\n"), "")
    );
    assert_eq!(sorted(&new), sorted(&old));
    // And what a client reads there has not changed in a byte.
    let client = new.client();
    for (key, value) in every_kind_of_value() {
        let back = block_on(client.get(&key)).unwrap();
        assert_eq!(*back, *encode(&value), "{value} became {back:?}");
    }
}

/// A node keeps the MessagePack that came, and so does a dump: widths and headers too.
#[test]
fn a_dump_gives_every_value_back_byte_for_byte() {
    let old = Cluster::running(&["alice", "bob", "carol"]);
    let values: [&[u8]; 5] = [
        b"\xcd\x00\x07",          // 7, wider than it need be
        b"\xa2\xff\xfe",          // a str that is not UTF-8
        b"\xc6\x00\x00\x00\x01a", // a bin and an array with long headers
        b"\xdc\x00\x01\x01",
        b"\xa5green",
    ];
    let client = old.client();
    for (n, value) in values.iter().enumerate() {
        block_on(client.set(format!("key{n}").as_bytes(), value)).unwrap();
    }
    let dump = old.kv54(["export"]).exits(0);
    let new = Cluster::five();
    new.kv54_with(["import"], &dump.out).exits(0);
    let client = new.client();
    for (n, value) in values.iter().enumerate() {
        let back = block_on(client.get(format!("key{n}").as_bytes())).unwrap();
        assert_eq!(&*back, *value, "{value:x?}");
    }
}

#[test]
fn a_line_is_json_where_that_says_all_and_message_pack_where_not() {
    let cluster = Cluster::running(&["alice"]);
    let map = |pairs: &[(Value, Value)]| Value::Map(pairs.to_vec());
    for (value, line) in [
        ("grün\n".into(), json!({ "value": "grün\n" })),
        (5.into(), json!({ "value": 5 })),
        (u64::MAX.into(), json!({ "value": u64::MAX })),
        (true.into(), json!({ "value": true })),
        (0.1_f64.into(), json!({ "value": 0.1 })),
        (5.0_f64.into(), json!({ "value": 5.0 })),
        (
            map(&[("b".into(), Value::Nil), ("a".into(), array([1.into()]))]),
            json!({ "value": { "b": null, "a": [1] } }),
        ),
        (0.5_f32.into(), packed(b"\xca\x3f\x00\x00\x00")),
        (
            f64::INFINITY.into(),
            packed(b"\xcb\x7f\xf0\x00\x00\x00\x00\x00\x00"),
        ),
        (bin(b"green"), packed(b"\xc4\x05green")),
        (array([bin(b"green")]), packed(b"\x91\xc4\x05green")),
        (map(&[(1.into(), 2.into())]), packed(b"\x81\x01\x02")),
        (
            map(&[("a".into(), 1.into()), ("a".into(), 2.into())]),
            packed(b"\x82\xa1a\x01\xa1a\x02"),
        ),
        (Value::Ext(5, vec![7]), packed(b"\xd4\x05\x07")),
    ] {
        set(&cluster, &[(b"tea".to_vec(), value)]);
        let mut expected = line;
        expected["key"] = "tea".into();
        assert_eq!(cluster.kv54(["export"]).exits(0).json(), expected);
    }
    block_on(cluster.client().delete(b"tea")).unwrap();
    set(&cluster, &[(b"\xff\xfe".to_vec(), "green".into())]);
    assert_eq!(
        cluster.kv54(["export"]).exits(0).text(),
        "{\"key_base64\":\"//4=\",\"value\":\"green\"}\n"
    );
}

#[test]
fn an_export_sees_what_any_two_of_three_hold_whoever_is_down() {
    let mut cluster = Cluster::five();
    let numbered = |n: usize| (format!("key{n}").into_bytes(), n.into());
    set(&cluster, &(0..500).map(numbered).collect::<Vec<_>>());
    let first: Vec<_> = (500..520).map(numbered).collect();
    for round in 0..3 {
        // An answered write that one replica has missed, each in its turn.
        tell_two_of_three(&cluster, &first, round);
        assert_eq!(sorted(&cluster).len(), 520, "without replica {round}");
        for (key, _) in &first {
            block_on(cluster.client().delete(key)).unwrap();
        }
        assert_eq!(sorted(&cluster).len(), 500, "deleted keys are left out");
    }
    let all = sorted(&cluster);
    for name in ["alice", "carol"] {
        cluster.kill(name);
        assert_eq!(sorted(&cluster), all, "without {name}");
        cluster.start(name);
        cluster.wait_until_ready();
    }
    // One with another file answers to nobody here, like one that is down.
    cluster.kill("alice");
    let file = std::fs::read_to_string(cluster.dir.join("cluster.toml")).unwrap();
    cluster.file(
        "other.toml",
        &file.replace("[limits]", "[limits]\nwindow = \"2s\""),
    );
    let address = cluster.address("alice");
    cluster.start_behind("alice", "other.toml", &address);
    assert_eq!(sorted(&cluster), all, "alice has another file");
}

#[test]
fn a_joining_node_is_not_one_of_the_two_that_are_listed() {
    let mut cluster = Cluster::running(&["alice", "bob", "carol"]);
    let keys: Vec<_> = (0..50)
        .map(|n| (format!("key{n}").into_bytes(), Value::from(n)))
        .collect();
    // Carol has it and bob; alice has missed it, and carol forgets it.
    let ring = cluster.ring();
    for (key, value) in &keys {
        let replicas = cluster.client().replicas;
        let entry = encoded(Stamp::default().newer(value.clone()));
        for name in ["bob", "carol"] {
            let told: [&[u8]; 2] = [&encode(&key.as_slice().into()), &entry];
            block_on(replicas.ask(ring.place(name).unwrap(), "store", &told)).unwrap();
        }
    }
    cluster.kill("carol");
    cluster.start("carol");
    assert_eq!(sorted(&cluster).len(), 50);
}

#[test]
fn an_export_without_a_majority_says_that_it_is_not_complete() {
    let mut cluster = Cluster::five();
    cluster.kill("bob");
    cluster.kill("carol");
    let (bob, carol) = (cluster.address("bob"), cluster.address("carol"));
    let export = ["export", "--timeout", "3s"];
    cluster.kv54(export).exits(3).says(&[
        "not complete",
        "1 of the 3 replicas of alice's keys",
        "2 needed",
        &format!("bob: {bob}: connection refused"),
        &carol,
    ]);
    cluster.start("bob");
    cluster.start("carol");
    cluster.wait_until_ready();
    let tea = cluster.key_on(&["alice", "bob", "carol"]);
    cluster.kv54(["set", &tea, "green"]).exits(0);
    // One node of the running ring is enough to find the others.
    cluster.file("one.toml", &one_node("alice", &cluster.address("alice")));
    let all = cluster.kv54(["export", "--config", "one.toml"]).exits(0);
    assert!(all.text().contains(&tea), "{all:?}");
    cluster.kill("bob");
    cluster.kill("carol");
    // The last attempt may have a few milliseconds, too little for a machine that does other things.
    let mut said = (0..5).map(|_| cluster.kv54(export).exits(3));
    let said = said.find(|said| said.err.contains("1 of 3")).unwrap();
    said.says(&[
        "not complete",
        &tea,
        "1 of 3 replicas answered",
        &bob,
        &carol,
    ]);
    let slow = one_node("alice", &cluster.address("alice")) + "[limits]\nwindow = \"2s\"";
    cluster.file("other.toml", &slow);
    let other = cluster.kv54(["export", "--config", "other.toml"]);
    other.exits(2).says(&["not complete: wrong-ring:", "alice"]);
}

#[test]
fn an_export_whose_reader_has_gone_is_not_a_backup() {
    let cluster = Cluster::running(&["alice"]);
    let long = |n: usize| (format!("key{n}").into_bytes(), "x".repeat(9_000).into());
    set(&cluster, &(0..100).map(long).collect::<Vec<_>>());
    let kv54 = format!(
        "{} export | head -c 10; exit ${{PIPESTATUS[0]}}",
        env!("CARGO_BIN_EXE_kv54")
    );
    let output = Command::new("bash")
        .current_dir(&cluster.dir)
        .args(["-c", &kv54])
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(
        said.contains("not complete") && said.lines().count() == 1,
        "{said}"
    );
}

#[test]
fn an_import_may_be_run_again_or_go_on_in_the_middle() {
    let cluster = Cluster::running(&["alice", "bob", "carol"]);
    let lines: String = (1..=1000)
        .map(|n| line(&format!("key{n}"), &n.into()))
        .collect();
    for _ in 0..2 {
        let import = cluster.kv54_with(["import", "--json"], lines.as_bytes());
        assert_eq!(import.exits(0).json(), json!({ "lines": 1000 }));
        assert_eq!(sorted(&cluster).len(), 1000);
    }
    let rest = cluster.kv54_with(["import", "--from", "998"], lines.as_bytes());
    assert_eq!(rest.exits(0).text(), "3 lines written\n");
    // As other programs write it: escapes, CRLF, empty lines, no end of the last line.
    let foreign = b"\r\n{ \"value\": \"gr\\u00fcn\" , \"key\": \"t\\u0065a\" }\r\n\n{\"key\":\"milk\",\"value\":\"white\"}";
    cluster.kv54_with(["import"], foreign).exits(0);
    assert_eq!(cluster.kv54(["get", "tea"]).exits(0).text(), "grün\n");
    assert_eq!(cluster.kv54(["get", "milk"]).exits(0).text(), "white\n");
}

#[test]
fn of_two_lines_with_one_key_the_later_wins() {
    let cluster = Cluster::running(&["alice", "bob", "carol"]);
    let lines: String = (0..2000)
        .map(|n| line(&format!("key{}", n % 7), &n.into()))
        .collect();
    cluster.kv54_with(["import"], lines.as_bytes()).exits(0);
    for n in 1993..2000 {
        let get = cluster.kv54(["get", &format!("key{}", n % 7)]).exits(0);
        assert_eq!(get.text(), format!("{n}\n"));
    }
}

#[test]
fn a_bad_line_is_named_and_none_before_it_is_lost() {
    let cluster = Cluster::running(&["alice", "bob", "carol"]);
    let (nil, two) = (BASE64.encode(b"\xc0"), BASE64.encode(b"\x01\x02"));
    let deep = BASE64.encode(vec![0x91; 100]);
    let short = BASE64.encode(b"\xdd\xff\xff\xff\xff");
    let long = "k".repeat(1025);
    let too_long = format!("{{\"key\":\"tea\",\"value\":\"{}\"}}", "x".repeat(7 << 20));
    let large = format!(
        "{{\"key\":\"tea\",\"value\":\"{}\"}}",
        "x".repeat((1 << 20) + 1)
    );
    for (bad, parts) in [
        ("green", &["expected value"][..]),
        ("{\"key\":\"tea\",\"value\":\"gre", &["EOF"]),
        ("[1]", &[]),
        ("{\"key\":\"tea\"}", &["value or value_msgpack"]),
        (
            "{\"key\":\"tea\",\"value\":null}",
            &["value or value_msgpack", "null"],
        ),
        ("{\"value\":\"green\"}", &["key or key_base64"]),
        (
            "{\"key\":\"a\",\"key_base64\":\"YQ==\",\"value\":1}",
            &["key or key_base64"],
        ),
        (
            "{\"key\":\"a\",\"key\":\"b\",\"value\":1}",
            &["duplicate field"],
        ),
        ("{\"key\":\"tea\",\"value\":1,\"ttl\":5}", &["ttl"]),
        ("{\"key\":5,\"value\":1}", &["string"]),
        ("{\"key_base64\":\"?\",\"value\":1}", &["key_base64"]),
        (
            &format!("{{\"key\":\"tea\",\"value_msgpack\":\"{nil}\"}}"),
            &["value_msgpack", "nil"],
        ),
        (
            &format!("{{\"key\":\"tea\",\"value_msgpack\":\"{two}\"}}"),
            &["more than one"],
        ),
        (
            &format!("{{\"key\":\"tea\",\"value_msgpack\":\"{deep}\"}}"),
            &["nesting"],
        ),
        (
            &format!("{{\"key\":\"tea\",\"value_msgpack\":\"{short}\"}}"),
            &["value_msgpack"],
        ),
        (
            &format!("{{\"key\":\"{long}\",\"value\":1}}"),
            &["too-large", "1025"],
        ),
        (&large, &["too-large", "1048577"]),
        (&too_long, &["too-large: at most 6298624 bytes"]),
    ] {
        for name in ["before", "after"] {
            cluster.kv54(["delete", name]).exits(0);
        }
        let before = line("before", &"white".into());
        let after = line("after", &"black".into());
        let lines = format!("{before}\n{bad}\n{after}");
        let said = cluster.kv54_with(["import"], lines.as_bytes()).exits(2);
        assert_eq!(said.text(), "");
        let said = said.says(&["line 3: ", "every line before it is written, none after it"]);
        said.says(parts);
        assert_eq!(cluster.kv54(["get", "before"]).exits(0).text(), "white\n");
        cluster.kv54(["get", "after"]).exits(1);
    }
}

#[test]
fn a_full_ring_names_the_first_line_that_it_did_not_take() {
    let cluster = {
        let mut cluster = Cluster::with_limits(&["alice", "bob", "carol"], "memory = \"1MiB\"");
        cluster.start_all();
        cluster
    };
    let long = "x".repeat(150_000);
    let lines: Vec<String> = (1..=9)
        .map(|n| line(&format!("key{n}"), &long.as_str().into()))
        .collect();
    let said = cluster.kv54_with(["import"], lines.concat().as_bytes());
    let said = said
        .exits(3)
        .says(&["line 7: full:", "\"key7\"", "--from 7"]);
    assert_eq!(said.text(), "");
    assert_eq!(sorted(&cluster).len(), 6);
    for n in 1..=6 {
        cluster.kv54(["delete", &format!("key{n}")]).exits(0);
    }
    let go_on = ["import", "--from", "7"];
    cluster.kv54_with(go_on, lines.concat().as_bytes()).exits(0);
    assert_eq!(sorted(&cluster).len(), 3);
    // What came before under the same key is written like any other line.
    let filler = vec![b'x'; 450_000];
    cluster.kv54_with(["set", "filler"], &filler).exits(0);
    let large = "x".repeat(200_000);
    let twice = [line("tea", &"green".into()), line("tea", &large.into())].concat();
    let said = cluster.kv54_with(["import"], twice.as_bytes()).exits(3);
    said.says(&["line 2: full:"]);
    assert_eq!(cluster.kv54(["get", "tea"]).exits(0).text(), "green\n");
}

#[test]
fn an_import_without_a_majority_names_the_first_line_not_written() {
    let mut cluster = Cluster::five();
    cluster.kill("bob");
    cluster.kill("carol");
    let sound = cluster.key_on(&["dave", "erin", "alice"]);
    let cut = cluster.key_on(&["alice", "bob", "carol"]);
    let mut others = (0..).map(|n| format!("other{n}"));
    let other = others.find(|key| cluster.replicas(key) == cluster.replicas(&cut));
    let lines = [&sound, &cut, &other.unwrap(), &sound].map(|key| line(key, &"green".into()));
    let args = ["import", "--timeout", "3s"];
    let said = cluster.kv54_with(args, lines.concat().as_bytes()).exits(3);
    said.says(&["line 2: ", &cut, "2 needed", "--from 2"]);
    assert_eq!(cluster.kv54(["get", &sound]).exits(0).text(), "green\n");
}

#[test]
fn an_import_shows_on_a_terminal_how_far_it_is() {
    let cluster = Cluster::running(&["alice", "bob", "carol"]);
    let lines: String = (0..20_000)
        .map(|n| line(&format!("key{n}"), &n.into()))
        .collect();
    cluster.file("dump.jsonl", &lines);
    let kv54 = format!(
        "TERM=xterm {} import < dump.jsonl",
        env!("CARGO_BIN_EXE_kv54")
    );
    let mut script = Command::new("script");
    script
        .current_dir(&cluster.dir)
        .args(["-qec", &kv54, "/dev/null"]);
    let Ok(output) = script.output() else {
        return; // a machine without `script`
    };
    let shown = String::from_utf8_lossy(&output.stdout);
    for part in [" %  line ", "/s  ", " left", "20000 lines written"] {
        assert!(shown.contains(part), "{part:?} is missing: {shown}");
    }
    let piped = cluster.kv54_with(["import"], lines.as_bytes()).exits(0);
    assert_eq!(piped.err, "", "no bar where no terminal is");
}

#[test]
#[ignore = "takes a minute"]
fn a_hundred_thousand_keys_move_from_five_nodes_to_seven() {
    let (old, new) = (Cluster::five(), Cluster::running(&SEVEN));
    let lines: String = (0..100_000)
        .map(|n| line(&format!("key{n}"), &format!("value{n}").into()))
        .collect();
    old.kv54_with(["import"], lines.as_bytes()).exits(0);
    let move_over = format!(
        "set -o pipefail; {kv54} export | {kv54} import --config {}/cluster.toml",
        new.dir.display(),
        kv54 = env!("CARGO_BIN_EXE_kv54"),
    );
    let output = Command::new("bash")
        .current_dir(&old.dir)
        .args(["-c", &move_over])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(output.stdout, b"100000 lines written\n");
    let expected: BTreeSet<String> = lines.lines().map(String::from).collect();
    assert!(sorted(&new) == expected && sorted(&old) == expected);
}

#[test]
#[ignore = "needs redis-server and redis-cli"]
fn redis_takes_every_key_over() {
    let cluster = Cluster::running(&["alice", "bob", "carol"]);
    set(&cluster, &every_kind_of_value());
    let numbered = |n: usize| (format!("key{n}").into_bytes(), format!("value{n}").into());
    set(&cluster, &(0..2000).map(numbered).collect::<Vec<_>>());
    let port = cluster.spare_port(0).to_string();
    let mut redis = Command::new("redis-server");
    redis.current_dir(&cluster.dir).args([
        "--port",
        &port,
        "--save",
        "",
        "--logfile",
        "/dev/stderr",
    ]);
    let redis = Node::spawn(&mut redis);
    redis.wait_for("Ready to accept connections");
    let redis_cli = |args: &[&[u8]], input: &[u8]| {
        let mut cli = Command::new("redis-cli");
        cli.args(["-p", &port])
            .args(args.iter().map(|arg| OsStr::from_bytes(arg)));
        let mut child = cli
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        child.wait_with_output().unwrap().stdout
    };
    let commands = cluster.kv54(["export", "--resp"]).exits(0).out;
    let told = String::from_utf8(redis_cli(&[b"--pipe"], &commands)).unwrap();
    let keys = 2000 + every_kind_of_value().len();
    assert!(
        told.contains(&format!("errors: 0, replies: {keys}")),
        "{told}"
    );
    assert_eq!(redis_cli(&[b"dbsize"], b""), format!("{keys}\n").as_bytes());
    for (key, value) in every_kind_of_value().into_iter().chain([numbered(54)]) {
        let held = redis_cli(&[b"get", &key], b"");
        let ours = cluster
            .kv54([OsStr::new("get"), OsStr::from_bytes(&key)])
            .exits(0)
            .out;
        assert_eq!(
            held.escape_ascii().to_string(),
            ours.escape_ascii().to_string(),
            "{value}"
        );
    }
}

/// What `tests/wire.rs` sends over the wire, and keys that are hard to write down.
fn every_kind_of_value() -> Vec<(Vec<u8>, Value)> {
    let nested = Value::Map(vec![
        ("leaves".into(), array([1.into(), Value::Nil, array([])])),
        (
            array([2.into()]),
            Value::Map(vec![(Value::Nil, false.into())]),
        ),
        (3.into(), bin(b"\x00\xff")),
        (3.into(), "a key that comes twice".into()),
    ]);
    let plain = Value::Map(vec![
        ("b".into(), array([0.1_f64.into(), Value::Nil, true.into()])),
        ("a".into(), Value::Map(vec![("".into(), (-1).into())])),
    ]);
    let values = vec![
        "".into(),
        "grün".into(),
        "null".into(),
        "\0\u{1}\u{7f}\u{2028}\"\\\n\r\t".into(),
        "x".repeat(70_000).into(),
        "\u{1}".repeat(1 << 20).into(),
        bin(b""),
        bin(b"\xc1\xff"),
        bin(b"green"),
        bin(&[0xff; 1 << 20]),
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
        1e300_f64.into(),
        5e-324_f64.into(),
        (0.1_f64 + 0.2).into(),
        2.0_f64.powi(60).into(),
        (-0.0_f64).into(),
        f64::NAN.into(),
        array([]),
        Value::Map(Vec::new()),
        nested.clone(),
        plain.clone(),
        array([nested, plain, Value::Nil]),
        Value::Ext(5, vec![1, 2, 3]),
        Value::Ext(-1, vec![0; 8]),
        Value::Ext(0, Vec::new()),
    ];
    let numbered = values.into_iter().enumerate();
    let numbered = numbered.map(|(n, value)| (format!("value {n}").into_bytes(), value));
    let keys = [&b"\xff\xfe\r\n"[..], "grün\t\"".as_bytes(), &[b'k'; 1024]];
    let odd = keys.map(|key| (key.to_vec(), "green".into()));
    numbered.chain(odd).collect()
}

fn set(cluster: &Cluster, entries: &[(Vec<u8>, Value)]) {
    let client = cluster.client();
    block_on(async {
        for (key, value) in entries {
            client.set(key, &encode(value)).await.unwrap();
        }
        client.replicas.settle().await;
    });
}

/// Has two replicas of each key keep a value, as after a write that was answered.
fn tell_two_of_three(cluster: &Cluster, entries: &[(Vec<u8>, Value)], without: usize) {
    let (client, ring) = (cluster.client(), cluster.ring());
    block_on(async {
        for (key, value) in entries {
            let known = client
                .replicas
                .of(key)
                .unwrap()
                .load_stamp(b"\xc0")
                .await
                .unwrap();
            let entry = encoded(known.newer(value.clone()));
            let told: [&[u8]; 2] = [&encode(&key.as_slice().into()), &entry];
            for (n, place) in ring.replicas(ring.owner(key)).enumerate() {
                if n != without {
                    client.replicas.ask(place, "store", &told).await.unwrap();
                }
            }
        }
    });
}

/// An entry as it travels.
fn encoded(entry: Entry<Value>) -> Vec<u8> {
    let Stamp {
        counter, writer, ..
    } = entry.stamp;
    let items = vec![counter.into(), writer.into(), entry.value];
    encode(&Value::Array(items))
}

/// The lines of an export, in an order that two rings share; none comes twice.
#[track_caller]
fn sorted(cluster: &Cluster) -> BTreeSet<String> {
    let export = cluster.kv54(["export"]).exits(0);
    let lines: BTreeSet<String> = export.text().lines().map(String::from).collect();
    assert_eq!(lines.len(), export.text().lines().count());
    lines
}

fn line(key: &str, value: &serde_json::Value) -> String {
    format!("{}\n", json!({ "key": key, "value": value }))
}

fn packed(bytes: &[u8]) -> serde_json::Value {
    json!({ "value_msgpack": BASE64.encode(bytes) })
}

fn one_node(name: &str, address: &str) -> String {
    format!("[nodes]\n{name} = {address:?}\n")
}

fn array<const N: usize>(items: [Value; N]) -> Value {
    Value::Array(items.into())
}

fn bin(bytes: &[u8]) -> Value {
    Value::Binary(bytes.to_vec())
}

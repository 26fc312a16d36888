//! `kv54 memcached`, as memcached's clients meet it: bytes in, bytes out, on real rings.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use msgpack_rpc::Value;

use common::gateway::{Client, Gateway, PATIENCE};
use common::wire::Wire;
use common::{Cluster, FIVE};

const THREE: [&str; 3] = ["alice", "bob", "carol"];
const MIB: usize = 1 << 20;

#[test]
fn classic_commands_are_answered_as_memcached_does() {
    let (_cluster, gateway) = running(&[]);
    let mut client = gateway.client();
    client.plays(&[
        ("get tea\r\n", "END\r\n"),
        ("set tea 0 0 5\r\ngreen\r\n", "STORED\r\n"),
        ("get tea\r\n", "VALUE tea 0 5\r\ngreen\r\nEND\r\n"),
        ("get\n", "ERROR\r\n"),
        (
            "get milk tea  honey tea\n",
            "VALUE tea 0 5\r\ngreen\r\nVALUE tea 0 5\r\ngreen\r\nEND\r\n",
        ),
        ("add tea 1 0 5\r\nblack\r\n", "NOT_STORED\r\n"),
        ("add milk 4294967295 0 0\r\n\r\n", "STORED\r\n"),
        (
            "get tea milk\r\n",
            "VALUE tea 0 5\r\ngreen\r\nVALUE milk 4294967295 0\r\n\r\nEND\r\n",
        ),
        ("replace honey 0 0 1\r\nx\r\n", "NOT_STORED\r\n"),
        ("append honey 0 0 1\r\nx\r\n", "NOT_STORED\r\n"),
        ("prepend honey 0 0 1\r\nx\r\n", "NOT_STORED\r\n"),
        ("replace milk 7 0 2\r\n\r\n\r\n", "STORED\r\n"),
        ("append milk 0 0 1\r\nb\r\n", "STORED\r\n"),
        ("prepend milk 0 0 1\r\na\r\n", "STORED\r\n"),
        ("get milk\r\n", "VALUE milk 7 4\r\na\r\nb\r\nEND\r\n"),
        ("delete milk\r\n", "DELETED\r\n"),
        ("delete milk\r\n", "NOT_FOUND\r\n"),
        ("incr cups 1\r\n", "NOT_FOUND\r\n"),
        ("set cups 3 0 2\r\n10\r\n", "STORED\r\n"),
        ("incr cups 5\r\n", "15\r\n"),
        ("decr cups 6\r\n", "9\r\n"),
        ("get cups\r\n", "VALUE cups 3 1\r\n9\r\nEND\r\n"),
        ("incr cups 18446744073709551615\r\n", "8\r\n"), // it wraps
        ("decr cups 100\r\n", "0\r\n"),
        (
            "incr tea 1\r\n",
            "CLIENT_ERROR cannot increment or decrement non-numeric value\r\n",
        ),
        ("touch tea 0\r\n", "TOUCHED\r\n"),
        ("touch honey 0\r\n", "NOT_FOUND\r\n"),
        ("gat 0 tea honey\r\n", "VALUE tea 0 5\r\ngreen\r\nEND\r\n"),
        ("verbosity 1\r\n", "OK\r\n"),
        ("stats reset\r\n", "RESET\r\n"),
    ]);
    client.sends("version\r\n");
    assert!(client.line().starts_with("VERSION 1.6."));
    client.sends("stats\r\n");
    let stats: Vec<String> =
        std::iter::from_fn(|| Some(client.line()).filter(|line| line != "END")).collect();
    assert!(
        stats.iter().all(|line| line.starts_with("STAT ")),
        "{stats:?}"
    );
    assert!(
        stats.iter().any(|line| line.starts_with("STAT pid ")),
        "{stats:?}"
    );
    let said = client.asks("gats 100 tea honey\r\n"); // it writes when tea ends, and says the cas of that
    let unique = client.unique("tea");
    assert_eq!(said, format!("VALUE tea 0 5 {unique}\r\ngreen\r\nEND\r\n"));
    client.sends("quit\r\nversion\r\n");
    assert_eq!(client.rest(), b"");
}

#[test]
fn a_cas_unique_is_of_one_write() {
    let (cluster, gateway) = running(&[]);
    let mut client = gateway.client();
    client.plays(&[
        ("cas tea 0 0 5 1\r\ngreen\r\n", "NOT_FOUND\r\n"),
        ("set tea 5 0 5\r\ngreen\r\n", "STORED\r\n"),
    ]);
    let first = client.unique("tea");
    assert_eq!(client.unique("tea"), first, "a read changes nothing");
    client.plays(&[(&format!("cas tea 5 0 5 {first}\r\nblack\r\n"), "STORED\r\n")]);
    client.plays(&[(&format!("cas tea 5 0 5 {first}\r\nwhite\r\n"), "EXISTS\r\n")]);
    // The same bytes again are another write, whoever writes them.
    let second = client.unique("tea");
    cluster.kv54(["set", "tea", "white"]).exits(0);
    cluster.kv54(["set", "tea", "black"]).exits(0);
    client.plays(&[(
        &format!("cas tea 5 0 5 {second}\r\nwhite\r\n"),
        "EXISTS\r\n",
    )]);
    // Another gateway knows the same number.
    let other = Gateway::of(&cluster, &[]);
    let third = other.client().unique("tea");
    client.plays(&[(&format!("cas tea 0 0 5 {third}\r\nwhite\r\n"), "STORED\r\n")]);
    // So do meta commands, which answer with it.
    client.sends("ms tea 3 c\r\noff\r\n");
    let answer = client.line();
    let unique = answer.strip_prefix("HD c").unwrap().to_owned();
    client.plays(&[
        (&format!("mg tea v C{unique}\r\n"), "HD\r\n"),
        ("mg tea v C1\r\n", "VA 3\r\noff\r\n"),
        ("ms tea 1 C1\r\nx\r\n", "EX\r\n"),
        ("md tea C1\r\n", "EX\r\n"),
        (&format!("ms tea 2 MA C{unique} s\r\n!!\r\n"), "HD s5\r\n"),
        (&format!("md tea C{unique}\r\n"), "EX\r\n"),
        ("ms milk 1 C1\r\nx\r\n", "NF\r\n"),
        // What adds to an item takes 0 for none.
        ("set cups 0 0 2\r\n10\r\n", "STORED\r\n"),
        ("ma cups C0 v\r\n", "VA 2\r\n11\r\n"),
        ("ms cups 1 MA C0\r\n0\r\n", "HD\r\n"),
        ("ms cups 1 C0\r\nx\r\n", "EX\r\n"),
        ("get cups\r\n", "VALUE cups 0 3\r\n110\r\nEND\r\n"),
    ]);
}

/// A get that marks a stale item writes, and one behind it on the same connection sees that.
#[test]
fn a_get_behind_one_that_marks_the_item_comes_after_it() {
    let (_cluster, gateway) = running(&[]);
    let mut client = gateway.client();
    client.plays(&[("ms rare 1\r\nx\r\n", "HD\r\n")]);
    for _ in 0..20 {
        client.plays(&[("md rare I\r\n", "HD\r\n")]);
        let said = client.asks("mg rare c\r\ngets rare\r\n");
        let unique = said
            .strip_prefix("HD c")
            .and_then(|said| said.split(' ').next());
        let line = format!("VALUE rare 0 1 {}\r\n", unique.unwrap());
        assert!(said.contains(&line), "{said}");
    }
}

#[test]
fn meta_commands_are_answered_as_memcached_does() {
    let (_cluster, gateway) = running(&[]);
    gateway.client().plays(&[
        ("mn\r\n", "MN\r\n"),
        ("mg tea\r\n", "EN\r\n"),
        ("mg tea v O123 k\r\n", "EN O123 ktea\r\n"),
        ("mg tea v q\r\nmn\r\n", "MN\r\n"),
        ("ms tea 5 F7 O1 k s\r\ngreen\r\n", "HD O1 ktea s5\r\n"),
        ("mg tea\r\n", "HD\r\n"),
        ("mg tea v\r\n", "VA 5\r\ngreen\r\n"),
        (
            "mg tea k q v f s t O9 Lpath\r\n",
            "VA 5 ktea f7 s5 t-1 O9\r\ngreen\r\n",
        ),
        (
            "ms tea 5 q\r\nblack\r\nms tea 1 q ME O2\r\nx\r\nmn\r\n",
            "NS O2\r\nMN\r\n",
        ),
        ("ms honey 1 MR\r\nx\r\n", "NS\r\n"),
        ("ms honey 1 MA\r\nx\r\n", "NS\r\n"),
        ("ms honey 1 MA N30\r\nb\r\n", "HD\r\n"),
        ("ms honey 1 MP s\r\na\r\n", "HD s2\r\n"),
        ("mg honey v\r\n", "VA 2\r\nab\r\n"),
        // Keys as base64 are the keys that they stand for.
        ("mg dGVh b v k\r\n", "VA 5 kdGVh b\r\nblack\r\n"),
        ("ms /wA= 1 b\r\nx\r\n", "HD\r\n"),
        ("mg dGVhDQpIRA== bx k\r\n", "EN kdGVhDQpIRA== b\r\n"),
        ("mg /wA= v b k O1\r\n", "VA 1 k/wA= b O1\r\nx\r\n"),
        ("md /wA= b q\r\nmd /wA= q b\r\nmn\r\n", "NF\r\nMN\r\n"),
        ("ma cups\r\n", "NF\r\n"),
        ("ma cups N0 J13 v t\r\n", "VA 2 t-1\r\n13\r\n"),
        ("ma cups v\r\n", "VA 2\r\n14\r\n"),
        ("ma cups MD D20 v\r\n", "VA 1\r\n0\r\n"),
        ("ma cups M+ D7 T60 v k\r\n", "VA 1 kcups\r\n7\r\n"),
        ("ma cups C1 O5\r\n", "EX O5\r\n"),
        (
            "ma tea q\r\n",
            "CLIENT_ERROR cannot increment or decrement non-numeric value\r\n",
        ),
        ("me nothing\r\n", "EN\r\n"),
        // One client makes a missing item anew, or one that ends soon, or is stale.
        ("mg rare v N30\r\n", "VA 0 W\r\n\r\n"),
        ("mg rare v N30\r\n", "VA 0 Z\r\n\r\n"),
        ("ms rare 1 T100\r\nx\r\n", "HD\r\n"),
        ("mg rare v R50\r\n", "VA 1\r\nx\r\n"),
        ("mg rare v R200\r\n", "VA 1 W\r\nx\r\n"),
        ("mg rare v R200\r\n", "VA 1 Z\r\nx\r\n"),
        ("md rare I T30\r\n", "HD\r\n"),
        ("mg rare v\r\n", "VA 1 X W\r\nx\r\n"),
        ("mg rare v\r\n", "VA 1 Z X\r\nx\r\n"),
        ("get rare\r\n", "VALUE rare 0 1\r\nx\r\nEND\r\n"),
        ("ms rare 1\r\ny\r\n", "HD\r\n"),
        ("mg rare v\r\n", "VA 1\r\ny\r\n"),
        ("md rare I T40\r\n", "HD\r\n"),
    ]);
    for (key, ttl) in [("honey", 30), ("cups", 60), ("rare", 40)] {
        assert!(
            (1..=ttl).contains(&left(&mut gateway.client(), key)),
            "{key}"
        );
    }
}

/// Whatever is wrong, the next request is found where it begins.
#[test]
fn wrong_lines_are_refused_and_the_stream_stays_in_step() {
    let (cluster, gateway) = running(&[]);
    let (format, long) = ("CLIENT_ERROR bad command line format\r\n", "k".repeat(251));
    let unasked = format!("get tea {long}\r\n");
    let stored = format!("set {long} 0 0 2\r\nab\r\n");
    let opaque = format!("mg tea O{}\r\n", "1".repeat(32));
    let cases = [
        ("\r\n", "ERROR\r\n"),
        ("steep tea\r\n", "ERROR\r\n"),
        ("GET tea\r\n", "ERROR\r\n"),
        ("gets\r\n", "ERROR\r\n"),
        ("gat 0\r\n", "ERROR\r\n"),
        (
            "gat soon tea\r\n",
            "CLIENT_ERROR invalid exptime argument\r\n",
        ),
        (&unasked, format),
        (&stored, format),
        ("get t\u{1}a\r\n", format),
        ("set tea\r\n", "ERROR\r\n"),
        ("set tea x 0 2\r\nab\r\n", format),
        ("set tea -1 0 2\r\nab\r\n", format),
        ("set tea 0 soon 2\r\nab\r\n", format),
        ("set tea 0 0 two\r\n", format),
        ("set tea 0 0 -1\r\n", format),
        ("set tea 0 0 2 1 1\r\nab\r\n", "ERROR\r\n"),
        ("set tea x 0 2 noreply\r\nab\r\n", ""),
        ("cas tea 0 0 2\r\nab\r\n", "ERROR\r\n"),
        ("cas tea 0 0 2 x\r\nab\r\n", format),
        (
            "set tea 0 0 2\r\nabcd\r\n",
            "CLIENT_ERROR bad data chunk\r\nERROR\r\n",
        ),
        (
            "ms tea 2 q\r\nabcd\r\n",
            "CLIENT_ERROR bad data chunk\r\nERROR\r\n",
        ),
        ("mg tea noreply\r\n", "CLIENT_ERROR invalid flag\r\n"),
        ("incr tea\r\n", "ERROR\r\n"),
        (
            "incr tea -1\r\n",
            "CLIENT_ERROR invalid numeric delta argument\r\n",
        ),
        (
            "decr tea 18446744073709551616\r\n",
            "CLIENT_ERROR invalid numeric delta argument\r\n",
        ),
        ("touch tea\r\n", "ERROR\r\n"),
        (
            "touch tea soon\r\n",
            "CLIENT_ERROR invalid exptime argument\r\n",
        ),
        ("delete\r\n", "ERROR\r\n"),
        (
            "delete tea 5\r\n",
            "CLIENT_ERROR bad command line format.  Usage: delete <key> [noreply]\r\n",
        ),
        ("verbosity much\r\n", format),
        ("ms tea\r\n", format),
        ("ms tea two\r\n", format),
        (
            "ms tea 2 MX\r\nab\r\n",
            "CLIENT_ERROR invalid mode for ms M token\r\n",
        ),
        ("ms tea 2 Fx q\r\nab\r\n", format),
        ("mg tea v v\r\n", "CLIENT_ERROR duplicate flag\r\n"),
        ("mg tea !\r\n", "CLIENT_ERROR invalid flag\r\n"),
        (
            "mg tea T\r\n",
            "CLIENT_ERROR bad token in command line format\r\n",
        ),
        ("mg tea b!\r\n", "CLIENT_ERROR error decoding key\r\n"),
        (&opaque, "CLIENT_ERROR opaque token too long\r\n"),
        (
            "ma tea MX\r\n",
            "CLIENT_ERROR invalid mode for ma M token\r\n",
        ),
        (
            "ms tea 2 E5\r\nab\r\n",
            "CLIENT_ERROR E, and I with ms, are not taken: here a cas unique has no order\r\n",
        ),
    ];
    let mut client = gateway.client();
    for (request, answer) in cases {
        client.plays(&[(request, answer), ("mn\r\n", "MN\r\n")]);
    }
    cluster.kv54(["get", "tea"]).exits(1);
    let mut stranger = gateway.client();
    stranger.sends(&"x".repeat(3000));
    assert_eq!(stranger.rest(), b"CLIENT_ERROR line too long\r\n");
    let mut stranger = gateway.client();
    stranger.sends(&format!("getx {}", "a ".repeat(2000))); // only a get may be as long as that
    assert_eq!(stranger.rest(), b"CLIENT_ERROR line too long\r\n");
}

#[test]
fn values_up_to_a_mebibyte_are_taken_and_larger_ones_swallowed() {
    let (cluster, gateway) = running(&[]);
    let mut client = gateway.client();
    let too_large = "SERVER_ERROR object too large for cache\r\n";
    let (full, over) = ("x".repeat(MIB), "x".repeat(MIB + 1));
    let (set, value) = (
        format!("set tea 0 0 {MIB}\r\n{full}\r\n"),
        format!("VALUE tea 0 {MIB}\r\n{full}\r\nEND\r\n"),
    );
    client.plays(&[(&set, "STORED\r\n"), ("get tea\r\n", &value)]);
    let flagged = format!("set tea 1 0 {MIB}\r\n{full}\r\n"); // no room for the flags
    let longer = format!("set tea 0 0 {}\r\n{over}\r\n", MIB + 1);
    let quiet = format!("set tea 0 0 {} noreply\r\n{over}\r\n", MIB + 1);
    let meta = format!("ms tea {} q\r\n{over}\r\n", MIB + 1);
    client.plays(&[
        (&longer, too_large),
        (&quiet, ""),
        (&meta, too_large),
        (&flagged, too_large),
        ("append tea 0 0 1\r\n!\r\n", too_large),
        ("get tea\r\n", &value),
    ]);
    // A mark would make it too large: it is read without.
    let ends = format!("ms tea {MIB} T100\r\n{full}\r\n");
    let hit = format!("VA {MIB}\r\n{full}\r\n");
    client.plays(&[(&ends, "HD\r\n"), ("mg tea v R200\r\n", &hit)]);
    // However it is cut on its way.
    for piece in set
        .as_bytes()
        .chunks(300_001)
        .chain(b"get tea\r\n".chunks(1))
    {
        client.stream.get_mut().write_all(piece).unwrap();
    }
    client.hears("STORED\r\n");
    client.hears(&value);
    assert_eq!(
        cluster.kv54(["get", "tea", "--raw"]).exits(0).out.len(),
        MIB
    );
}

/// Nobody waits for an answer before the next request.
#[test]
fn answers_come_in_the_order_of_their_requests() {
    let (cluster, gateway) = running(&[]);
    let mut client = gateway.client();
    // A key of which two replicas are silent for a moment is slower than the version.
    cluster.signal("bob", "STOP");
    cluster.signal("carol", "STOP");
    client.sends("set tea 0 0 5\r\ngreen\r\nversion\r\nget tea\r\nincr tea 1\r\nmn\r\n");
    client
        .stream
        .get_ref()
        .set_read_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    assert!(
        client.stream.fill_buf().is_err(),
        "nothing is answered before the set is"
    );
    client
        .stream
        .get_ref()
        .set_read_timeout(Some(PATIENCE))
        .unwrap();
    cluster.signal("bob", "CONT");
    cluster.signal("carol", "CONT");
    client.hears("STORED\r\n");
    assert!(client.line().starts_with("VERSION "));
    client.hears("VALUE tea 0 5\r\ngreen\r\nEND\r\nCLIENT_ERROR cannot increment or decrement non-numeric value\r\nMN\r\n");

    // Each key is written and read many times in one go.
    let (mut asked, mut answers) = (String::new(), String::new());
    for n in 0..2000 {
        let key = n % 7;
        let _ = write!(
            asked,
            "set k{key} 0 0 4 noreply\r\n{n:04}\r\nget k{key} k{key}\r\nms m{key} 4 q\r\n{n:04}\r\nmg m{key} v\r\n"
        );
        let _ = write!(
            answers,
            "VALUE k{key} 0 4\r\n{n:04}\r\nVALUE k{key} 0 4\r\n{n:04}\r\nEND\r\nVA 4\r\n{n:04}\r\n"
        );
    }
    let writer = client.stream.get_ref().try_clone().unwrap();
    thread::scope(|scope| {
        scope.spawn(move || (&writer).write_all(asked.as_bytes()).unwrap());
        client.hears(&answers);
    });
    client.sends("incr k0 1\r\nquit\r\nincr k0 1\r\n");
    client.hears("1996\r\n");
    assert_eq!(client.rest(), b"");
}

#[test]
fn others_read_what_memcached_clients_write_and_the_other_way_round() {
    let (cluster, gateway) = running(&[]);
    let mut client = gateway.client();
    client.plays(&[("set tea 0 0 5\r\ngreen\r\n", "STORED\r\n")]);
    assert_eq!(cluster.kv54(["get", "tea"]).exits(0).text(), "green\n");
    client.plays(&[("set photo 0 0 2\r\n", "")]);
    client.stream.get_mut().write_all(b"\xff\n\r\n").unwrap();
    client.hears("STORED\r\n");
    assert_eq!(
        cluster.kv54(["get", "photo", "--raw"]).exits(0).out,
        b"\xff\n"
    );
    client.plays(&[("set tea 0 100 5\r\nblack\r\n", "STORED\r\n")]);
    let json = cluster.kv54(["get", "tea", "--json"]).exits(0).json();
    assert_eq!(json["value"], "black");
    assert!(
        (90_000..=100_000).contains(&json["ttl_ms"].as_u64().unwrap()),
        "{json}"
    );

    cluster.kv54(["set", "milk", "white"]).exits(0);
    client.plays(&[("get milk\r\n", "VALUE milk 0 5\r\nwhite\r\nEND\r\n")]);
    cluster
        .kv54(["set", "milk", "white", "--ttl", "50s"])
        .exits(0);
    assert!((1..=50).contains(&left(&mut client, "milk")));
    // A number stays a number, which both can count.
    cluster.kv54(["incr", "cups", "5"]).exits(0);
    client.plays(&[
        ("get cups\r\n", "VALUE cups 0 1\r\n5\r\nEND\r\n"),
        ("incr cups 37\r\n", "42\r\n"),
    ]);
    assert_eq!(cluster.kv54(["incr", "cups"]).exits(0).text(), "43\n");
    // What has no text of its own is JSON, and a touch leaves it as it is.
    cluster
        .kv54(["set", "menu", r#"{"tea":[1,true]}"#, "--value-json"])
        .exits(0);
    client.plays(&[
        ("touch menu 100\r\n", "TOUCHED\r\n"),
        ("mg menu v\r\n", "VA 18\r\n{\"tea\": [1, true]}\r\n"),
    ]);
    let json = cluster.kv54(["get", "menu", "--json"]).exits(0).json();
    assert_eq!(json["value"]["tea"][0], 1);
    // Bytes stay bytes, whatever they say.
    let (mut guest, green) = (Wire::to(&cluster, "alice"), Value::from(&b"green"[..]));
    guest.does("set", ["tea".into(), green.clone()]);
    client.plays(&[
        ("touch tea 100\r\n", "TOUCHED\r\n"),
        ("gat 200 tea\r\n", "VALUE tea 0 5\r\ngreen\r\nEND\r\n"),
    ]);
    assert_eq!(guest.does("get", ["tea".into()]), green);
}

#[test]
fn items_end_when_they_should() {
    let (cluster, gateway) = running(&[]);
    let mut client = gateway.client();
    let hit = "VALUE tea 7 5\r\ngreen\r\nEND\r\n";
    let seconds = |now: Duration| now.as_secs();
    let now = seconds(std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap());
    for (what, says) in [
        ("set tea 7 -1 5\r\ngreen\r\n".to_owned(), "STORED\r\n"),
        (
            format!("set tea 7 {} 5\r\ngreen\r\n", now - 10),
            "STORED\r\n",
        ),
        ("touch tea -1\r\n".to_owned(), "TOUCHED\r\n"),
        ("gat -1 tea\r\n".to_owned(), hit),
        ("mg tea T-1 v\r\n".to_owned(), "VA 5\r\ngreen\r\n"),
        ("append tea 0 -1 0\r\n\r\n".to_owned(), "STORED\r\n"),
    ] {
        client.plays(&[("set tea 7 0 5\r\ngreen\r\n", "STORED\r\n"), (&what, says)]);
        let left = if what.starts_with("append") {
            hit
        } else {
            "END\r\n"
        };
        client.plays(&[("get tea\r\n", left)]);
    }
    let far = format!("set tea 7 {} 5\r\ngreen\r\n", now + 40 * 86_400);
    client.plays(&[(&far, "STORED\r\n"), ("get tea\r\n", hit)]);
    client.plays(&[("set tea 7 2592000 5\r\ngreen\r\n", "STORED\r\n")]);
    assert!((2_591_000..=2_592_000).contains(&left(&mut client, "tea")));
    client.plays(&[
        ("touch tea 0\r\n", "TOUCHED\r\n"),
        ("mg tea t f\r\n", "HD t-1 f7\r\n"),
    ]);
    // A count lives no longer for being counted.
    client.plays(&[
        ("set cups 0 100 1\r\n1\r\n", "STORED\r\n"),
        ("incr cups 1\r\n", "2\r\n"),
    ]);
    assert!((1..=100).contains(&left(&mut client, "cups")));
    client.plays(&[("set tea 7 1 5\r\ngreen\r\n", "STORED\r\n")]);
    let start = Instant::now();
    while client.asks("get tea\r\n") != "END\r\n" {
        assert!(start.elapsed() < PATIENCE);
    }
    cluster.kv54(["get", "tea"]).exits(1);
}

#[test]
fn a_full_ring_refuses_a_set_and_answers_what_else_is_asked() {
    let mut cluster = Cluster::with_limits(&THREE, "memory = \"1MiB\"");
    cluster.start_all();
    cluster.wait_until_ready();
    let gateway = Gateway::of(&cluster, &[]);
    let mut client = gateway.client();
    let value = "x".repeat(100_000);
    let set = |n: u32| format!("set key{n} 0 0 100000\r\n{value}\r\n");
    let mut said = (0..20).map(|n| client.asks(&set(n)));
    let refused = said.find(|said| said != "STORED\r\n").unwrap();
    assert!(refused.starts_with("SERVER_ERROR full: "), "{refused}");
    assert!(
        client
            .asks("get key0\r\n")
            .starts_with("VALUE key0 0 100000\r\n")
    );
    assert_eq!(
        client.asks(&set(0)),
        "STORED\r\n",
        "it is no larger than before"
    );
    assert_eq!(client.asks("delete key0\r\n"), "DELETED\r\n");
    assert_eq!(client.asks(&set(20)), "STORED\r\n", "there is room again");
}

/// Four programs count through two gateways; two nodes die, one after the other.
#[test]
fn each_count_counts_once_while_nodes_are_killed() {
    let mut cluster = Cluster::five();
    let gateways = [Gateway::of(&cluster, &[]), Gateway::of(&cluster, &[])];
    gateways[0]
        .client()
        .plays(&[("set cups 5 0 1\r\n0\r\n", "STORED\r\n")]);
    let victims = cluster.replicas("cups");
    let is_over = &AtomicBool::new(false);
    let (sure, unknown) = thread::scope(|scope| {
        let writers = (0..4).map(|n| {
            let mut client = gateways[n % 2].client();
            scope.spawn(move || {
                let (mut sure, mut unknown) = (0, 0);
                while !is_over.load(Relaxed) {
                    let said = client.asks("incr cups 1\r\n");
                    match said.trim_end().parse::<u64>() {
                        Ok(_) => sure += 1,
                        Err(_) if said.starts_with("SERVER_ERROR unknown-outcome: ") => {
                            unknown += 1;
                        }
                        Err(_) => assert!(said.starts_with("SERVER_ERROR unavailable: "), "{said}"),
                    }
                }
                (sure, unknown)
            })
        });
        let writers: Vec<_> = writers.collect();
        for victim in &victims[..2] {
            cluster.restart(victim);
        }
        is_over.store(true, Relaxed);
        let counts = writers.into_iter().map(|writer| writer.join().unwrap());
        counts.fold((0, 0), |(sure, unknown), (more, unsure)| {
            (sure + more, unknown + unsure)
        })
    });
    let said = gateways[0].client().asks("mg cups v\r\n");
    let cups: u64 = said.lines().nth(1).unwrap().parse().unwrap();
    assert!(
        (sure..=sure + unknown).contains(&cups),
        "{cups} of {sure} and {unknown}"
    );
    assert!(sure > unknown, "{sure} are answered, {unknown} unknown");
}

/// A list grows by cas, as programs do it that know no other way, and at both of its ends. Two of its nodes die, one
/// after the other.
#[test]
fn each_cas_counts_once_or_not_at_all_while_nodes_are_killed() {
    let mut cluster = Cluster::running(&THREE);
    let gateways = [Gateway::of(&cluster, &[]), Gateway::of(&cluster, &[])];
    gateways[0]
        .client()
        .plays(&[("set list 0 0 0\r\n\r\n", "STORED\r\n")]);
    let victims = cluster.replicas("list");
    let is_over = &AtomicBool::new(false);
    let told = thread::scope(|scope| {
        let _over = Over(is_over);
        let programs = ["a", "b", "c", "d"].map(|name| {
            let mut client = gateways[usize::from(name > "b")].client();
            scope.spawn(move || appended(&mut client, name, is_over))
        });
        for victim in &victims[..2] {
            cluster.restart(victim);
        }
        is_over.store(true, Relaxed);
        programs.map(|program| program.join().unwrap()).concat()
    });
    let list = gateways[1].client().asks("get list\r\n");
    let (mut there, mut answers) = (BTreeMap::<&str, usize>::new(), BTreeMap::new());
    for entry in list.lines().nth(1).unwrap().split(' ') {
        *there.entry(entry).or_default() += 1;
    }
    for (entry, said) in &told {
        let times = there.get(&**entry).copied().unwrap_or_default();
        let (answer, is_right) = match &**said {
            "STORED\r\n" => ("stored", times == 1),
            said if said.starts_with("SERVER_ERROR unknown-outcome: ") => ("unknown", times <= 1),
            said if said.starts_with("SERVER_ERROR unavailable: ") => ("unavailable", times == 0),
            said => (said, said == "EXISTS\r\n" && times == 0),
        };
        assert!(is_right, "{entry} is there {times} times: {said}");
        *answers.entry(answer).or_insert(0) += 1;
    }
    println!("{answers:?}");
    assert!(answers.contains_key("stored") && answers.contains_key("EXISTS\r\n"));
}

/// What a program tries to append to a list, each entry once, and what is said to it.
fn appended(client: &mut Client, name: &str, is_over: &AtomicBool) -> Vec<(String, String)> {
    let mut told = Vec::new();
    while !is_over.load(Relaxed) {
        let said = client.asks("gets list\r\n");
        if said.starts_with("SERVER_ERROR unavailable: ") {
            continue;
        }
        assert!(said.starts_with("VALUE list 0 "), "{said}");
        let mut lines = said.split("\r\n");
        let unique = lines.next().unwrap().rsplit(' ').next().unwrap();
        let entry = format!("{name}{}", told.len());
        let (how, new, unique) = match name {
            "c" => ("append", format!(" {entry}"), String::new()),
            "d" => ("prepend", format!("{entry} "), String::new()),
            _ => {
                let new = format!("{} {entry}", lines.next().unwrap());
                ("cas", new, format!(" {unique}"))
            }
        };
        let asked = format!("{how} list 0 0 {}{unique}\r\n{new}\r\n", new.len());
        told.push((entry, client.asks(&asked)));
    }
    told
}

/// Ends what runs beside a story, also where the story fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// Three nodes become five, and two of the first three leave, under a gateway whose file names those three.
#[test]
fn a_gateway_goes_on_while_the_ring_grows_and_shrinks() {
    let mut cluster = Cluster::with_limits(&FIVE, "window = \"500ms\"");
    cluster.ring_file("cluster.toml", &FIVE[..3], &[]);
    cluster.ring_file("five.toml", &FIVE, &[]);
    cluster.ring_file("last.toml", &FIVE[2..], &FIVE[..2]);
    for name in &FIVE[..3] {
        cluster.start(name);
    }
    cluster.wait_until_ready();
    let gateway = Gateway::of(&cluster, &[]);
    let mut lasting = String::new();
    for n in 0..100 {
        let _ = write!(lasting, "set k{n} 0 0 2\r\n{n:02}\r\n");
    }
    let stored = "STORED\r\n".repeat(100);
    gateway.client().plays(&[
        (&lasting, &stored),
        ("set all 0 0 1\r\n0\r\n", "STORED\r\n"),
    ]);
    let (is_over, rounds) = (&AtomicBool::new(false), &[const { AtomicUsize::new(0) }; 4]);
    thread::scope(|scope| {
        let _over = Over(is_over);
        for (program, rounds) in rounds.iter().enumerate() {
            let mut client = gateway.client();
            scope.spawn(move || {
                while !is_over.load(Relaxed) {
                    counts_and_reads(&mut client, program, rounds);
                }
            });
        }
        let more = || {
            let before = rounds.each_ref().map(|rounds| rounds.load(Relaxed));
            let is_more = |(rounds, before): (&AtomicUsize, _)| rounds.load(Relaxed) > before + 20;
            until(|| rounds.iter().zip(before).all(is_more));
        };
        more();
        for name in &FIVE[3..] {
            cluster.start_with(name, "five.toml");
        }
        for name in &FIVE[3..] {
            cluster.node(name).wait_for("waiting: not yet in the ring");
        }
        for file in ["five.toml", "last.toml"] {
            cluster.kv54(["resize", "--config", file]).exits(0);
            more();
        }
        for name in &FIVE[..2] {
            cluster.node(name).wait_for("left: not in the ring");
            cluster.stop(name);
        }
        more();
    });
    let all: usize = rounds.iter().map(|rounds| rounds.load(Relaxed)).sum();
    let (said, known) = (
        gateway.client().asks("get all\r\n"),
        cluster.kv54(["get", "all", "--config", "last.toml"]),
    );
    assert_eq!(said.lines().nth(1), Some(&*all.to_string()));
    assert_eq!(known.exits(0).text(), format!("{all}\n"));
}

/// One more for a counter of its own and for one of all, and what it has set and what nobody sets is there.
fn counts_and_reads(client: &mut Client, program: usize, rounds: &AtomicUsize) {
    let n = rounds.load(Relaxed);
    if n == 0 {
        client.plays(&[(&format!("set c{program} 0 0 1\r\n0\r\n"), "STORED\r\n")]);
    }
    let (next, lasting) = (n + 1, n % 100);
    let length = next.to_string().len();
    client.plays(&[
        (&format!("incr c{program} 1\r\n"), &format!("{next}\r\n")),
        (
            &format!("get k{lasting} c{program}\r\n"),
            &format!("VALUE k{lasting} 0 2\r\n{lasting:02}\r\nVALUE c{program} 0 {length}\r\n{next}\r\nEND\r\n"),
        ),
        (&format!("set s{program} 7 0 {length}\r\n{next}\r\n"), "STORED\r\n"),
        (
            &format!("get s{program}\r\n"),
            &format!("VALUE s{program} 7 {length}\r\n{next}\r\nEND\r\n"),
        ),
    ]);
    let all = client.asks("incr all 1\r\n");
    assert!(all.trim_end().parse::<usize>().is_ok(), "{all}");
    rounds.store(next, Relaxed);
}

#[test]
fn without_a_majority_nothing_is_a_miss() {
    let mut cluster = Cluster::five();
    let gateway = Gateway::of(&cluster, &["--timeout", "500ms"]);
    let (dead, alive) = (
        cluster.key_on(&["alice", "bob", "carol"]),
        cluster.key_on(&["carol", "dave", "erin"]),
    );
    let mut client = gateway.client();
    for key in [&dead, &alive] {
        client.plays(&[(&format!("set {key} 0 0 1\r\n5\r\n"), "STORED\r\n")]);
    }
    cluster.kill("alice");
    client.plays(&[(
        &format!("get {dead}\r\n"),
        &format!("VALUE {dead} 0 1\r\n5\r\nEND\r\n"),
    )]);
    cluster.signal("bob", "STOP");
    let ends = |client: &mut Client, asked: String| {
        client.sends(&asked);
        let line = client.line();
        assert!(
            line.starts_with("SERVER_ERROR unavailable: "),
            "{asked:?} → {line:?}"
        );
        client.plays(&[("mn\r\n", "MN\r\n")]);
    };
    for asked in [
        "get KEY",
        "gets KEY OTHER KEY",
        "gat 5 KEY",
        "delete KEY",
        "incr KEY 1",
        "touch KEY 5",
        "mg KEY v q",
        "md KEY q",
        "ma KEY q",
    ] {
        ends(
            &mut client,
            asked.replace("KEY", &dead).replace("OTHER", &alive) + "\r\n",
        );
    }
    for asked in [
        "set KEY 0 0 1",
        "add KEY 0 0 1",
        "append KEY 0 0 1",
        "cas KEY 0 0 1 1",
        "ms KEY 1 q",
    ] {
        ends(&mut client, asked.replace("KEY", &dead) + "\r\nx\r\n");
    }
    client.plays(&[(
        &format!("set {dead} 0 0 1 noreply\r\nx\r\nget {alive}\r\n"),
        &format!("VALUE {alive} 0 1\r\n5\r\nEND\r\n"),
    )]);
    // Requests that wait for others have no more time than these: all that are under way end together.
    let behind = format!("set {dead} 0 0 1 noreply\r\nx\r\n").repeat(100);
    client.plays(&[(
        &format!("{behind}get {alive}\r\n"),
        &format!("VALUE {alive} 0 1\r\n5\r\nEND\r\n"),
    )]);
    // What was read before the error is sent; nothing after it.
    client.plays(&[(
        &format!("get {alive} {dead} {alive}\r\n"),
        &format!("VALUE {alive} 0 1\r\n5\r\n"),
    )]);
    ends(&mut client, String::new());
    cluster.signal("bob", "CONT");
    let start = Instant::now();
    while client
        .asks(&format!("get {dead}\r\n"))
        .starts_with("SERVER_ERROR ")
    {
        assert!(start.elapsed() < PATIENCE);
    }
    client.plays(&[(
        &format!("get {alive}\r\n"),
        &format!("VALUE {alive} 0 1\r\n5\r\nEND\r\n"),
    )]);
}

#[test]
fn flush_all_is_refused_unless_it_is_allowed() {
    let (cluster, gateway) = running(&[]);
    let refused = gateway.client().asks("flush_all\r\n");
    assert!(
        refused.starts_with("SERVER_ERROR flush_all is refused: "),
        "{refused}"
    );
    assert!(refused.contains("--allow-flush"), "{refused}");
    let flushing = Gateway::of(&cluster, &["--allow-flush"]);
    let (mut client, mut asked, mut answers) = (flushing.client(), String::new(), String::new());
    for n in 0..500 {
        let _ = write!(asked, "set k{n} 0 0 1 noreply\r\nx\r\n");
    }
    asked += "flush_all noreply\r\nset tea 0 0 1\r\nx\r\n";
    answers += "STORED\r\n";
    client.plays(&[
        (&asked, &answers),
        ("get k1 k400 k499 tea\r\n", "VALUE tea 0 1\r\nx\r\nEND\r\n"),
    ]);
    assert_eq!(cluster.kv54(["keys"]).exits(0).text(), "tea\n");
    client.plays(&[("flush_all 0\r\n", "OK\r\n"), ("get tea\r\n", "END\r\n")]);
    assert!(
        client
            .asks("flush_all 10\r\n")
            .contains("a delay is not taken")
    );
    cluster.kv54(["set", "tea", "green"]).exits(0);
    client.plays(&[
        (
            "flush_all x\r\n",
            "CLIENT_ERROR invalid exptime argument\r\n",
        ),
        ("get tea\r\n", "VALUE tea 0 5\r\ngreen\r\nEND\r\n"),
    ]);
}

/// What stands before a `flush_all` is deleted by it, and what stands behind it is not.
#[test]
fn a_connection_sees_its_own_order_around_a_flush() {
    let (_cluster, gateway) = running(&["--allow-flush"]);
    let (mut asked, mut answers) = (String::new(), String::new());
    for n in 10..30 {
        let _ = write!(
            asked,
            "set a 0 0 1\r\nx\r\nflush_all\r\nget a\r\nset b 0 0 2\r\n{n}\r\nget b\r\nincr b 1\r\nget b a\r\n"
        );
        let next = n + 1;
        let _ = write!(
            answers,
            "STORED\r\nOK\r\nEND\r\nSTORED\r\nVALUE b 0 2\r\n{n}\r\nEND\r\n{next}\r\nVALUE b 0 2\r\n{next}\r\nEND\r\n"
        );
    }
    gateway.client().plays(&[(&asked, &answers)]);
}

/// A get may name a thousand large values: they come one after the other.
#[test]
fn a_get_of_many_large_values_is_bounded() {
    let (_cluster, gateway) = running(&[]);
    let mut client = gateway.client();
    let full = "x".repeat(MIB);
    for n in 0..10 {
        client.plays(&[(&format!("set k{n} 0 0 {MIB}\r\n{full}\r\n"), "STORED\r\n")]);
    }
    let keys: Vec<String> = (0..500).map(|n| format!("k{}", n % 10)).collect();
    client.sends(&format!("get {}\r\n", keys.join(" ")));
    thread::sleep(Duration::from_secs(1)); // nobody reads: what is held meanwhile counts
    for key in keys {
        client.hears(&format!("VALUE {key} 0 {MIB}\r\n{full}\r\n"));
    }
    client.hears("END\r\n");
    let peak = gateway.peak();
    assert!(peak < 200 << 10, "{peak} KiB at most");
}

#[test]
fn it_ends_in_order() {
    let (mut cluster, mut gateway) = running(&[]);
    let said = cluster
        .kv54(["memcached", "--listen", &gateway.address])
        .exits(2);
    said.says(&[&gateway.address, "in use"]);
    let mut client = gateway.client();
    cluster.signal("bob", "STOP");
    cluster.signal("carol", "STOP");
    client.sends("set tea 0 0 5\r\ngreen\r\nmn\r\n");
    // It reads the file again at SIGHUP, and goes on.
    gateway.node.signal("HUP");
    let mut other = gateway.client();
    other.plays(&[("mn\r\n", "MN\r\n")]);
    gateway.node.signal("TERM");
    assert_eq!(other.rest(), b"");
    cluster.signal("bob", "CONT");
    cluster.signal("carol", "CONT");
    assert_eq!(client.rest(), b"STORED\r\nMN\r\n");
    assert_eq!(gateway.node.wait(), 0);
    cluster.restart("alice");
    assert_eq!(cluster.kv54(["get", "tea"]).exits(0).text(), "green\n");
}

#[test]
fn a_hangup_makes_a_gateway_take_fewer_connections_or_more() {
    let (cluster, gateway) = running(&[]);
    let limit = |old: &str, new: &str| {
        cluster.edit(&format!("[limits]\n{old}"), &format!("[limits]\n{new}"));
        gateway.node.signal("HUP");
    };
    let tea = [("get tea\r\n", "VALUE tea 0 5\r\ngreen\r\nEND\r\n")];
    let mut clients: Vec<Client> = (0..3).map(|_| let_in(&gateway).unwrap()).collect();
    clients[0].plays(&[("set tea 0 0 5\r\ngreen\r\n", "STORED\r\n")]);
    limit("", "connections = 2\n");
    until(|| let_in(&gateway).is_none());
    // Those that are there stay. Another one comes in when there are fewer than two.
    for client in &mut clients {
        client.plays(&tea);
    }
    clients.pop();
    for _ in 0..20 {
        assert!(let_in(&gateway).is_none(), "two are there");
    }
    clients.pop();
    until(|| let_in(&gateway).is_some());
    // A file that is wrong changes nothing.
    limit("connections = 2\n", "connections = 0\n");
    gateway.node.wait_for("from 1 to 1000000");
    until(|| let_in(&gateway).is_some());
    // Nor does one of another ring: its windows would be too long for this one.
    limit("connections = 0\n", "connections = 1\nwindow = \"2s\"\n");
    gateway.node.wait_for(
        "window 2s) than the running one (alice bob carol, window 1s); nothing is changed",
    );
    until(|| let_in(&gateway).is_some());
    limit("connections = 1\nwindow = \"2s\"\n", "connections = 3\n");
    until(|| {
        let two = [(); 2].map(|()| let_in(&gateway));
        two.iter().all(Option::is_some)
    });
    clients[0].plays(&tea);
}

/// A connection, if the gateway answers on it.
fn let_in(gateway: &Gateway) -> Option<Client> {
    let (mut client, mut line) = (gateway.client(), String::new());
    client.stream.get_mut().write_all(b"mn\r\n").ok()?;
    client.stream.read_line(&mut line).ok()?;
    (line == "MN\r\n").then_some(client)
}

const LARGE: &str = "large answers that nobody reads";

/// What `tests/hostile.rs` does to a node, as far as it has a meaning here.
#[test]
fn strangers_hurt_nobody() {
    let (_cluster, gateway) = running(&[]);
    let full = format!("set big 0 0 {MIB}\r\n{}\r\n", "x".repeat(MIB));
    gateway.client().plays(&[
        (&full, "STORED\r\n"),
        ("set tea 0 0 5\r\ngreen\r\n", "STORED\r\n"),
    ]);
    let is_over = AtomicBool::new(false);
    let attacks: [(&str, &[u8], usize, usize); 8] = [
        ("a line without end", b"x", 64 * MIB, 4),
        ("a get without end", b"get tea ", 64 * MIB, 4),
        (
            "keys without end",
            b"get tea tea tea tea tea tea tea tea\r\n",
            16 * MIB,
            4,
        ),
        (
            "data without end",
            b"set tea 0 0 2000000000\r\n\xff\n",
            64 * MIB,
            4,
        ),
        ("empty lines", b"\n", 4 * MIB, 4),
        ("garbage", b"\xff\x00\xc1 \x80\n\xff", 4 * MIB, 4),
        (
            "counts that nobody reads",
            b"incr tea 1\r\nmg tea v\r\n",
            4 * MIB,
            20,
        ),
        (LARGE, b"get big big big big\r\n", MIB, 10),
    ];
    thread::scope(|scope| {
        let healthy = scope.spawn(|| {
            let (mut client, mut answers) = (gateway.client(), 0);
            while !is_over.load(Relaxed) {
                client.plays(&[("get tea\r\n", "VALUE tea 0 5\r\ngreen\r\nEND\r\n")]);
                answers += 1;
            }
            answers
        });
        for (what, bytes, length, times) in attacks {
            let strangers: Vec<TcpStream> = (0..times)
                .map(|_| stranger(&gateway, bytes, length))
                .collect();
            let peak = gateway.peak() >> 10;
            eprintln!("{what}: {peak} MiB at most");
            assert!(peak < 100 || what == LARGE, "{what}: {peak} MiB");
            drop(strangers);
        }
        is_over.store(true, Relaxed);
        assert!(healthy.join().unwrap() > 0);
    });
    // Before an answer tells how large they are, 31 gets of a connection are under way, with two copies each.
    let peak = gateway.peak() >> 10;
    assert!(peak < 10 * 31 * 2 + 100, "{peak} MiB");
    assert!(!gateway.node.log().join("\n").contains("panicked"));
    let tea = "VALUE tea 0 5\r\ngreen\r\nEND\r\n";
    gateway.client().plays(&[("get tea\r\n", tea)]);
}

/// As `printf … | nc` does it.
#[test]
fn who_says_no_more_is_still_answered() {
    let (_cluster, gateway) = running(&[]);
    for _ in 0..100 {
        let mut client = gateway.client();
        client.sends("set tea 0 0 5\r\ngreen\r\nget tea\r\nset tea 0 0 5\r\nbl");
        client.stream.get_ref().shutdown(Shutdown::Write).unwrap();
        let said = String::from_utf8(client.rest()).unwrap();
        assert_eq!(said, "STORED\r\nVALUE tea 0 5\r\ngreen\r\nEND\r\n");
    }
}

#[test]
fn a_web_page_is_not_listened_to() {
    let (_cluster, gateway) = running(&[]);
    let (mut page, mut client) = (gateway.client(), gateway.client());
    page.sends("POST / HTTP/1.1\r\nHost: tea\r\n\r\nset tea 0 0 1\r\nx\r\n");
    assert_eq!(page.rest(), b"");
    client.plays(&[("get tea\r\n", "END\r\n")]);
}

/// Its answers are behind others that nobody reads, so that it does not go on.
#[test]
fn a_count_whose_client_reads_nothing_holds_nobody_up() {
    let (_cluster, gateway) = running(&[]);
    let (mut idle, mut other) = (gateway.client(), gateway.client());
    let jug = format!("set jug 0 0 {MIB}\r\n{}\r\n", "x".repeat(MIB));
    let stored = "STORED\r\n";
    other.plays(&[(&jug, stored), ("set cups 0 0 1\r\n5\r\n", stored)]);
    idle.sends(&format!("{}incr cups 0\r\n", "get jug\r\n".repeat(25)));
    for _ in 0..3 {
        other.plays(&[("incr cups 0\r\n", "5\r\n")]);
    }
}

/// Its nodes are silent: what came behind the first request is answered, and waits.
#[test]
fn quiet_lines_behind_a_frozen_replica_fill_no_memory() {
    let cluster = Cluster::running(&THREE);
    let gateway = Gateway::of(&cluster, &["--timeout", "1h"]);
    let mut client = gateway.client();
    client.plays(&[("set tea 0 0 5\r\ngreen\r\n", "STORED\r\n")]);
    cluster.signal("bob", "STOP");
    cluster.signal("carol", "STOP");
    client.sends("incr tea 1\r\n");
    let (writer, quiet) = (
        client.stream.get_mut(),
        "steep tea noreply\r\nset tea x 0 0 noreply\r\n\r\n".repeat(1000),
    );
    writer
        .set_write_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    let taken = (0..2000).take_while(|_| writer.write_all(quiet.as_bytes()).is_ok());
    let taken = taken.count();
    let peak = gateway.peak() >> 10;
    assert!(taken < 2000, "all lines are taken, {peak} MiB");
    assert!(peak < 80, "{peak} MiB");
    cluster.signal("bob", "CONT");
    cluster.signal("carol", "CONT");
    assert!(client.line().starts_with("CLIENT_ERROR cannot increment"));
}

#[test]
fn unfinished_values_fill_no_more_than_the_buffers() {
    let (_cluster, gateway) = running(&[]);
    let begun = format!("set tea 0 0 {MIB}\r\n{}", "x".repeat(MIB / 2));
    let strangers = (0..800).map(|_| stranger(&gateway, begun.as_bytes(), begun.len()));
    let strangers: Vec<TcpStream> = strangers.collect();
    gateway.node.wait_for("the most of all buffers");
    drop(strangers);
    gateway.client().plays(&[("get tea\r\n", "END\r\n")]);
    let peak = gateway.peak() >> 10;
    assert!(peak < 600, "{peak} MiB"); // 256 MiB of buffers, and growing they take twice that for a moment
}

/// Who holds a connection by a few bytes is heard for a while.
#[test]
fn a_value_that_drips_is_cut_off_and_written_nowhere() {
    let (_cluster, gateway) = running(&[]);
    let mut client = gateway.client();
    client.sends("set tea 0 0 100\r\n");
    let mut writer = client.stream.get_ref().try_clone().unwrap();
    let dripping = thread::spawn(move || {
        while writer.write_all(b"x").is_ok() {
            thread::sleep(Duration::from_millis(500));
        }
    });
    let line = client.line();
    assert!(line.contains("unavailable: it came too slowly"), "{line}");
    client.rest();
    dripping.join().unwrap();
    gateway.client().plays(&[("get tea\r\n", "END\r\n")]);
}

/// Waits until it is so.
#[track_caller]
fn until(is_so: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(10));
    }
}

/// How many seconds an item still has.
fn left(client: &mut Client, key: &str) -> u64 {
    client.sends(&format!("mg {key} t\r\n"));
    let line = client.line();
    let seconds = line
        .strip_prefix("HD t")
        .unwrap_or_else(|| panic!("{line}"));
    seconds.split(' ').next().unwrap().parse().unwrap()
}

/// A connection that has sent so many bytes, or as many as the gateway takes from it.
fn stranger(gateway: &Gateway, bytes: &[u8], length: usize) -> TcpStream {
    let mut stream = TcpStream::connect(&gateway.address).unwrap();
    let most = Some(Duration::from_millis(300));
    stream.set_write_timeout(most).unwrap();
    let batch = bytes.repeat((64 << 10) / bytes.len() + 1);
    for _ in 0..length.div_ceil(batch.len()) {
        if stream.write_all(&batch).is_err() {
            break;
        }
    }
    stream
}

fn running(args: &[&str]) -> (Cluster, Gateway) {
    let cluster = Cluster::running(&THREE);
    let gateway = Gateway::of(&cluster, args);
    (cluster, gateway)
}

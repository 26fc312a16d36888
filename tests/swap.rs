//! Compare and set, counting and locks, as people, guests and clients of their own meet them.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::fs;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use common::wire::{NIL, Wire, array, bin, entry};
use common::{Cluster, Node, Said, block_on};
use fastrand::Rng;
use kv54::beyond::swap::Swapped;
use kv54::client::Client;
use kv54::entry::{Entry, Packed, Stamp, next_ballot};
use kv54::error::{Error, Kind};
use kv54::rpc::codec::{encode, encode_bytes};
use kv54::rpc::{Peer, tcp};
use kv54::store::journal::Journal;
use kv54::store::{Prepare, Promise, Store};
use msgpack_rpc::Value;
use tokio::time::advance;

const THREE: [&str; 3] = ["alice", "bob", "carol"];

#[test]
fn four_shells_that_each_add_one_five_times_leave_twenty() {
    let cluster = Cluster::running(&THREE);
    let shells = (0..4).map(|_| in_bash(&cluster, "for n in 1 2 3 4 5; do $kv54 incr cups; done"));
    let shells: Vec<_> = shells.collect();
    for mut shell in shells {
        assert_eq!(shell.wait(), 0, "{:?}", shell.log());
    }
    prints(cluster.kv54(["get", "cups"]), 0, "20\n");
    prints(cluster.kv54(["incr", "cups", "-3"]), 0, "17\n");
    prints(
        cluster.kv54(["incr", "cups", "2", "--via", "bob"]),
        0,
        "19\n",
    );
    let json = cluster.kv54(["incr", "cups", "0", "--json"]);
    prints(json, 0, "{\"key\":\"cups\",\"value\":19}\n");

    // A text is no number, and the line says what makes one.
    cluster.kv54(["set", "cups", "5"]).exits(0);
    let refused = cluster.kv54(["incr", "cups"]).exits(2);
    refused.says(&[
        "incr failed: bad-request: key \"cups\": \"5\" is no integer; kv54 set KEY 5 --value-json",
    ]);
    let refused = cluster.kv54(["incr", "cups", "--via", "bob"]).exits(2);
    refused.says(&["\"5\" is no integer; kv54 set KEY 5 --value-json"]);
    prints(cluster.kv54(["get", "cups"]), 0, "5\n");
    cluster.kv54(["set", "cups", "5", "--value-json"]).exits(0);
    prints(cluster.kv54(["incr", "cups"]), 0, "6\n");
    prints(
        cluster.kv54(["cas", "cups", "6", "7", "--value-json"]),
        0,
        "ok\n",
    );
    let text = cluster.kv54(["cas", "cups", "7", "8"]);
    prints(text, 1, "7\n").says(&["is JSON, no text; with --value-json"]);
}

#[test]
fn cas_creates_replaces_refuses_and_deletes() {
    let cluster = Cluster::running(&THREE);
    for via in [&[][..], &["--via", "bob"]] {
        let cas = |args: &str| {
            cluster.kv54([&["cas"], &args.split(' ').collect::<Vec<_>>()[..], via].concat())
        };
        prints(cas("tea green black"), 1, "").says(&["kv54: key \"tea\" is absent"]);
        prints(cas("tea --absent green"), 0, "ok\n");
        prints(cas("tea --absent green"), 1, "green\n");
        prints(cas("tea black white"), 1, "green\n");
        prints(cas("tea green black"), 0, "ok\n");
        prints(
            cas("tea green --json white"),
            1,
            "{\"key\":\"tea\",\"value\":\"black\"}\n",
        );
        prints(cas("tea black --json white"), 0, "{\"key\":\"tea\"}\n");
        prints(cas("tea black --delete"), 1, "white\n");
        prints(cas("tea white --delete"), 0, "ok\n");
        prints(
            cas("tea --json white black"),
            1,
            "{\"key\":\"tea\",\"value\":null}\n",
        );
    }
    for wrong in [
        "tea",
        "tea green",
        "tea --absent",
        "tea --absent green black",
        "tea --absent --delete",
        "tea - -",
    ] {
        let said = cluster.kv54([&["cas"], &wrong.split(' ').collect::<Vec<_>>()[..]].concat());
        said.exits(2)
            .says(&["OLD or --absent, and NEW or --delete"]);
    }
    let photo = cluster
        .kv54_with(["cas", "photo", "--absent", "-"], b"\xff\n")
        .exits(0);
    assert_eq!(photo.text(), "ok\n");
    assert_eq!(
        cluster.kv54(["get", "photo", "--raw"]).exits(0).out,
        b"\xff\n"
    );
}

#[test]
fn guests_compare_and_count_through_every_node() {
    let cluster = Cluster::running(&THREE);
    let done = || array([true.into(), NIL]);
    let not = |current: Value| array([false.into(), current]);
    for node in THREE {
        let mut wire = Wire::to(&cluster, node);
        let mut cas = |old: Value, new: Value| wire.does("cas", ["tea".into(), old, new]);
        assert_eq!(cas("green".into(), NIL), not(NIL));
        assert_eq!(cas(NIL, NIL), done());
        assert_eq!(cas(NIL, "green".into()), done());
        assert_eq!(cas(NIL, "black".into()), not("green".into()));
        // Str, bin and raw with the same bytes are equal.
        assert_eq!(cas(bin(b"green"), bin(b"\xff\xfe")), done());
        wire.send(b"\x94\x00\x2a\xa3cas\x93\xa3tea\xa2\xff\xfe\xa5black");
        assert_eq!(wire.answer(), Some((42, Ok(done()))));
        // Other values are equal where they are the same MessagePack.
        let mut cas = |old: Value, new: Value| wire.does("cas", [bin(b"tea"), old, new]);
        let nested = || array([1.into(), NIL, Value::Map(vec![("a".into(), bin(b"\xff"))])]);
        assert_eq!(cas("black".into(), nested()), done());
        assert_eq!(cas(array([1.into(), NIL]), 1.into()), not(nested()));
        assert_eq!(cas(nested(), 1.into()), done());
        assert_eq!(cas(1.0.into(), "1".into()), not(1.into()));
        assert_eq!(cas(1.into(), NIL), done());
        assert_eq!(wire.does("get", ["tea".into()]), NIL);

        let incr = |by: Option<i64>| -> Vec<Value> {
            Some("n".into())
                .into_iter()
                .chain(by.map(Value::from))
                .collect()
        };
        assert_eq!(wire.does("incr", incr(None)), 1.into());
        assert_eq!(wire.does("incr", incr(Some(-3))), (-2).into());
        assert_eq!(
            wire.does("incr", incr(Some(i64::MAX))),
            (i64::MAX - 2).into()
        );
        let more = wire.does("incr", incr(Some(i64::MAX)));
        assert_eq!(more, (u64::MAX - 3).into());
        assert_eq!(wire.does("cas", ["n".into(), more, NIL]), done());
    }
}

#[test]
fn what_makes_no_sense_is_refused_and_changes_nothing() {
    let cluster = Cluster::running(&THREE);
    let values: [(Value, &str); 7] = [
        ("5".into(), "\"5\" is no integer"),
        (bin(b"\x05"), "is no integer"),
        (1.5.into(), "1.5 is no integer"),
        (true.into(), "true is no integer"),
        (array([1.into()]), "is no integer"),
        (u64::MAX.into(), "beyond 64 bits"),
        ((u64::MAX - 1).into(), "beyond 64 bits"),
    ];
    for node in THREE {
        let mut wire = Wire::to(&cluster, node);
        for (value, why) in values.clone() {
            wire.does("set", ["tea".into(), value.clone()]);
            wire.refuses(
                "incr",
                ["tea".into(), 2.into()],
                &["bad-request: ", "\"tea\"", why],
            );
            assert_eq!(wire.does("get", ["tea".into()]), value);
        }
        wire.does("set", ["tea".into(), i64::MIN.into()]);
        let refused = ["tea".into(), (-1).into()];
        wire.refuses("incr", refused, &["bad-request: ", "beyond 64 bits"]);
        for by in ["1".into(), 1.0.into(), NIL, array([])] {
            wire.refuses(
                "incr",
                ["tea".into(), by],
                &["bad-request: ", "is no integer"],
            );
        }
        for (method, most) in [("cas", 4), ("incr", 3)] {
            for params in (0..7).filter(|n| !(1..=most).contains(n) || method == "cas" && *n < 3) {
                let params = vec!["tea".into(); params];
                wire.refuses(method, params, &["bad-request: ", method, " takes ["]);
            }
        }
        for key in [1.into(), NIL] {
            wire.refuses("cas", [key, NIL, NIL], &["bad-request: a key is"]);
        }
        let long = "x".repeat((1 << 20) + 1);
        wire.refuses(
            "cas",
            ["tea".into(), i64::MIN.into(), long.into()],
            &["too-large: "],
        );
        let long = "x".repeat(1025);
        wire.refuses("incr", [long.into()], &["too-large: "]);
        assert_eq!(wire.does("get", ["tea".into()]), i64::MIN.into());
        wire.does("delete", ["tea".into()]);
    }
}

/// Each adds one to a number in a file: read, a moment, write.
#[test]
fn locks_do_not_overlap() {
    let cluster = Cluster::running(&THREE);
    cluster.file("cups", "0");
    let add =
        "mkdir inside && n=$(cat cups) && sleep 0.02 && echo $((n + 1)) > cups && rmdir inside";
    let twice =
        format!("for n in 1 2; do $kv54 lock jobs --timeout 30s -- sh -c '{add}' || exit; done");
    let shells: Vec<_> = (0..10).map(|_| in_bash(&cluster, &twice)).collect();
    for mut shell in shells {
        assert_eq!(shell.wait(), 0, "{:?}", shell.log());
    }
    let cups = fs::read_to_string(cluster.dir.join("cups")).unwrap();
    assert_eq!(cups.trim(), "20");
    cluster.kv54(["get", "jobs"]).exits(1);
}

#[test]
fn a_lock_ends_with_its_command() {
    let cluster = Cluster::running(&THREE);
    let lock = |args: &[&str]| cluster.kv54([&["lock", "jobs"], args].concat());
    let is_free = || cluster.kv54(["get", "jobs"]).exits(1);

    let kv54 = env!("CARGO_BIN_EXE_kv54");
    let same = format!("[ $({kv54} get jobs) = $KV54_LOCK ] && echo held; cat; exit 7");
    let said = cluster.kv54_with(["lock", "jobs", "--", "sh", "-c", &same], b"input");
    assert_eq!(said.exits(7).text(), "held\ninput");
    is_free();
    lock(&["--", "no such command"])
        .exits(127)
        .says(&["no such command: "]);
    lock(&["--", "./cluster.toml"])
        .exits(126)
        .says(&["./cluster.toml: "]);
    lock(&["--", "sh", "-c", "kill -9 $$"]).exits(137);
    is_free();

    // A signal to kv54 reaches the command, which may end as it likes.
    make_fifo(&cluster);
    for signal in ["INT", "TERM", "HUP"] {
        let traps = format!("trap 'exit 3' {signal}; echo runs >&2; read forever < fifo");
        let mut locked = spawn_lock(&cluster, "--default-signal", &traps);
        locked.wait_for("runs");
        locked.signal(signal);
        assert_eq!(locked.wait(), 3, "{signal}: {:?}", locked.log());
        is_free();
    }
    // As under nohup, a signal that was ignored before stays so.
    let traps = "trap 'exit 4' HUP; trap 'exit 3' TERM; echo runs >&2; read forever < fifo";
    let mut locked = spawn_lock(&cluster, "--ignore-signal=HUP", traps);
    locked.wait_for("runs");
    locked.signal("HUP");
    locked.signal("TERM");
    assert_eq!(locked.wait(), 3, "{:?}", locked.log());
    is_free();
    // Who has started it may ignore the ends of its children; their codes are not lost.
    let mut locked = spawn_lock(&cluster, "--ignore-signal=CHLD", "exit 7");
    assert_eq!(locked.wait(), 7, "{:?}", locked.log());
    is_free();
}

/// A lock waits for nodes that do not answer, and is free in the end.
#[test]
fn a_lock_outlasts_an_outage() {
    let mut cluster = Cluster::running(&THREE);
    make_fifo(&cluster);
    let script = "echo runs >&2; read line < fifo";
    let mut locked = spawn_lock(&cluster, "--default-signal", script);
    locked.wait_for("runs");
    cluster.kill("bob");
    cluster.kill("carol");
    fs::write(cluster.dir.join("fifo"), "\n").unwrap();
    locked.wait_for("cannot unlock yet: ");
    let mut waiting = cluster.spawn("lock jobs -- echo now".split(' '));
    waiting.wait_for("cannot lock yet: ");
    cluster.start("bob");
    cluster.start("carol");
    assert_eq!(locked.wait(), 0, "{:?}", locked.log());
    assert_eq!(waiting.wait(), 0, "{:?}", waiting.log());
}

/// A signal ends the waiting also while nodes that are frozen are asked who holds the key.
#[test]
fn who_waits_for_a_lock_need_not_wait_for_an_answer() {
    let cluster = Cluster::running(&THREE);
    for name in ["bob", "carol"] {
        cluster.signal(name, "STOP");
    }
    let mut waiting = spawn_lock(&cluster, "--default-signal", "echo now");
    let status = format!("/proc/{}/status", waiting.pid());
    let catches_int = |status: String| {
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        caught.is_some_and(|mask| u64::from_str_radix(mask.trim(), 16).unwrap() & 2 != 0)
    };
    let begun = Instant::now();
    while !catches_int(fs::read_to_string(&status).unwrap()) {
        assert!(
            begun.elapsed() < Duration::from_secs(30),
            "{:?}",
            waiting.log()
        );
        thread::yield_now();
    }
    waiting.signal("INT");
    assert_eq!(waiting.wait(), 130, "{:?}", waiting.log());
    waiting.wait_for("a signal ended the waiting, its holder was being asked for");
}

/// What others see of a lock, and what is left of it after kill -9.
#[test]
fn a_lock_names_its_holder_and_can_be_freed() {
    let cluster = Cluster::running(&THREE);
    make_fifo(&cluster);
    let mut first = spawn_lock(
        &cluster,
        "USER=CORP\\ann smith",
        "echo \"runs as $KV54_LOCK\" >&2; read forever < fifo",
    );
    let holder = first.wait_for("runs as ");
    let holder = holder.trim_start_matches("runs as ").to_owned();
    prints(cluster.kv54(["get", "jobs"]), 0, &format!("{holder}\n"));
    assert!(holder.contains(&format!(":{}:", first.pid())), "{holder}");
    assert!(
        holder
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "@:._-".contains(c)),
        "{holder}"
    );

    let late = cluster.kv54("lock jobs --timeout 0s -- echo no".split(' '));
    prints(late, 3, "").says(&["lock failed: ", &holder, "still holds \"jobs\""]);
    let late = cluster.kv54("lock jobs --timeout 100ms -- echo no".split(' '));
    prints(late, 3, "");
    let mut second = cluster.spawn("lock jobs --timeout 30s -- true".split(' '));
    assert_eq!(
        second.wait_for("waiting: "),
        format!("kv54: waiting: \"{holder}\" holds \"jobs\"")
    );
    second.signal("TERM");
    assert_eq!(second.wait(), 143);

    let mut third = cluster.spawn("lock jobs --timeout 30s -- true".split(' '));
    third.wait_for("waiting: ");
    first.signal("KILL");
    first.wait();
    fs::write(cluster.dir.join("fifo"), "\n").unwrap(); // its command is still there, and ends
    prints(cluster.kv54(["get", "jobs"]), 0, &format!("{holder}\n"));
    prints(
        cluster.kv54(["cas", "jobs", &holder, "--delete"]),
        0,
        "ok\n",
    );
    assert_eq!(third.wait(), 0, "{:?}", third.log());
    assert_eq!(third.log().len(), 1, "{:?}", third.log());

    // It cannot be taken from somebody unnoticed.
    let kv54 = env!("CARGO_BIN_EXE_kv54");
    for (thief, code) in [
        ("set jobs mine", 3),
        ("delete jobs", 3),
        ("set jobs mine > /dev/null; exit 9", 9),
    ] {
        let lost = cluster.kv54(["lock", "jobs", "--", "sh", "-c", &format!("{kv54} {thief}")]);
        lost.exits(code)
            .says(&["the lock was lost while the command ran: \"jobs\" "]);
        cluster.kv54(["delete", "jobs"]).exits(0);
    }
}

/// A frozen node takes connections and answers nothing. Nobody waits for it, also where it is the owner.
#[test]
fn an_owner_that_is_frozen_keeps_nobody_from_counting() {
    let cluster = Cluster::running(&THREE);
    let mut keys = (0..).map(|n| format!("key{n}"));
    let is_of_bob = |key: &String| cluster.replicas(key)[0] == "bob";
    let key = keys.find(is_of_bob).unwrap();
    prints(cluster.kv54(["incr", &key]), 0, "1\n");
    cluster.signal("bob", "STOP");
    thread::sleep(Duration::from_secs(1)); // who was heard within a window is asked, and may have done it
    for (sum, via) in [
        ("2\n", None),
        ("3\n", Some("alice")),
        ("4\n", Some("carol")),
    ] {
        let via = via.map(|name| ["--via", name]);
        let words = ["incr", &key].into_iter().chain(via.into_iter().flatten());
        prints(cluster.kv54(words), 0, sum);
    }
    cluster.signal("bob", "CONT");
    prints(cluster.kv54(["incr", &key, "--via", "bob"]), 0, "5\n");
}

/// Swaps that take each other's promises away would all fail: for a moment a replica promises nothing to
/// another coordinator, unless the first one has been refused elsewhere and lets go.
#[tokio::test(start_paused = true)]
async fn a_replica_holds_off_others_for_a_moment() {
    let cluster = Cluster::of(&THREE);
    let (store, moment) = (cluster.ready_store(0), cluster.ring().limits.window / 64);
    let is_given = |ballot: u64| {
        let promise = store.at(0).promise(b"tea", Prepare::of(ballot)).unwrap();
        matches!(promise, Promise::Given(_))
    };
    let mine = |ballot: u64| next_ballot(ballot << 16, 1);
    let yours = |ballot: u64| next_ballot(ballot << 16, 2);
    assert!(is_given(mine(1)) && !is_given(yours(2)) && is_given(mine(3)));
    store.at(0).let_go(b"tea", mine(1)); // not what is held
    assert!(!is_given(yours(4)));
    store.at(0).let_go(b"tea", mine(3));
    assert!(is_given(yours(4)) && !is_given(mine(5)));
    advance(moment).await;
    assert!(is_given(mine(5)));
}

/// What others have while this one joins is kept later where its disk does not keep up.
#[test]
fn what_a_joining_node_cannot_keep_yet_is_not_forgotten() {
    let cluster = Cluster::of(&THREE);
    let (ring, journal) = (cluster.ring(), Arc::new(Journal::default()));
    let store = Store::new(ring.clone(), 0);
    store.heard_all();
    store.write_down(journal.clone());
    let numbered = |n: u32| format!("tea{n}").into_bytes();
    let keys: Vec<_> = (0..)
        .map(numbered)
        .filter(|key| ring.owner(key) == 0)
        .take(3)
        .collect();
    let value = Packed::of("green");
    for key in &keys {
        let (stamp, value) = (Stamp::new(1, 1, 1 << 16), &*value);
        store
            .at(0)
            .take_over(key, Entry { stamp, value }, 1 << 16)
            .unwrap();
    }
    journal.append(None, &[&vec![0; 17 << 20]]); // so much is not on disk yet
    let error = store.at(0).unsettled(0, None).unwrap_err();
    assert!(error.why.contains("does not keep up"), "{error}");
    let unkept = store.at(0).settle(
        &keys[0],
        Entry {
            stamp: Stamp::new(1, 1, 1 << 16),
            value: &*value,
        },
    );
    assert!(unkept.is_err());
    while let Some(batch) = journal.take() {
        journal.note_settled(&batch, Duration::ZERO, 0);
    }
    assert!(store.at(0).unsettled(0, None).unwrap().0.is_empty());
    for key in &keys {
        let (kept, promised) = store.at(0).value_and_promise(key).unwrap();
        assert_eq!((kept, promised), (value.clone(), 1 << 16));
    }
}

/// A replica does not send a swap what that knows already, and sends what is newer.
#[test]
fn a_promise_leaves_out_what_is_known() {
    let cluster = Cluster::running(&["alice"]);
    let mut wire = Wire::to(&cluster, "alice");
    let ring = Value::from(wire.status("ring"));
    wire.does("set", ["tea".into(), "green".into()]);
    let known = wire.does("load", [ring.clone(), "tea".into()]);
    let mut promise = |ballot: u64| {
        let asked = [ballot.into(), known[0].clone(), known[1].clone(), 0.into()];
        let asked = Value::Array(asked.into());
        wire.does("promise", [ring.clone(), "tea".into(), asked])
    };
    assert_eq!(promise(1 << 16), Value::Nil);
    Wire::to(&cluster, "alice").does("set", ["tea".into(), "black".into()]);
    assert_eq!(promise(2 << 16)[2], "black".into());
    assert_eq!(promise(1 << 16), (2_u64 << 16).into());

    // What is asked is read as it was written. For a get, nothing is known.
    let known = Some(Stamp::new(3, 4, 5));
    for (is_read, known) in [(false, None), (true, None), (false, known), (true, known)] {
        let mut asked = Prepare::of(54);
        (asked.is_read, asked.known) = (is_read, known);
        let read = Prepare::read(&asked.encoded()).unwrap();
        let known = known.filter(|_| !is_read);
        assert_eq!(
            (read.ballot, read.is_read, read.known),
            (54, is_read, known)
        );
    }
}

/// A replica that has lost its memory knows again what it promised: the other two have told it.
#[test]
fn a_node_that_restarts_keeps_its_promises() {
    let mut cluster = Cluster::running(&THREE);
    cluster.kv54(["set", "tea", "green"]).exits(0);
    let promise = |cluster: &Cluster, node: &str, ballot: u64| {
        let mut wire = Wire::to(cluster, node);
        let ring = wire.status("ring");
        wire.does("promise", [ring.into(), "tea".into(), ballot.into()])
    };
    let granted = promise(&cluster, "alice", 1000);
    assert_eq!(granted[2], "green".into());
    assert_eq!(promise(&cluster, "bob", 1000), granted);
    cluster.restart("bob");
    assert_eq!(promise(&cluster, "bob", 1000), 1000.into());
    cluster.restart("alice");
    assert_eq!(promise(&cluster, "alice", 999), 1000.into());
    let mut wire = Wire::to(&cluster, "alice");
    let mut old = entry(
        granted[0].as_u64().unwrap(),
        granted[1].as_u64().unwrap(),
        "black",
    );
    let Value::Array(items) = &mut old else {
        panic!("{old}")
    };
    items.push(999.into());
    let ring = wire.status("ring").into();
    wire.refuses("store", [ring, "tea".into(), old], &["busy: "]);
    prints(cluster.kv54(["cas", "tea", "green", "black"]), 0, "ok\n");
}

#[test]
fn sixteen_guests_of_one_key_count_exactly_and_nearly_always_know_it() {
    sixteen_guests_count(&Cluster::running(&THREE));
}

#[test]
fn so_they_do_where_a_window_is_longer_than_an_operation() {
    let mut cluster = Cluster::with_limits(&THREE, "window = \"6s\"");
    cluster.start_all();
    sixteen_guests_count(&cluster);
}

/// All that is on its way to a node that does not run for a window is unknown at once. Which node is run when is
/// the machine's matter: nodes that lose answers do it each time.
fn sixteen_guests_count(cluster: &Cluster) {
    let tallies = (0..3).map(|time| sixteen_guests_count_once(cluster, &format!("cups{time}")));
    let nearly_always = |[unknown, failed]: [u64; 2]| unknown < 4 && failed < 40; // of 4,000
    assert!(tallies.into_iter().any(nearly_always));
}

/// How many of their 4,000 swaps are unknown, and how many failed.
fn sixteen_guests_count_once(cluster: &Cluster, key: &str) -> [u64; 2] {
    const EACH: u64 = 250;
    let tally = Tally::default();
    thread::scope(|scope| {
        for guest in 0..16 {
            let tally = &tally;
            scope.spawn(move || {
                let mut wire = Wire::to(cluster, THREE[guest % 3]);
                for _ in 0..EACH {
                    let answer = wire.asks("incr", [key.into()]);
                    tally.note(answer.map(drop).map_err(|error| Error::parse(&error)));
                }
            });
        }
    });
    tally.is_sum(cluster, key);
    println!("{tally:?}");
    [&tally.unknown, &tally.failed].map(|count| count.load(Relaxed))
}

/// Eight writers count in five keys, each in another way from call to call, while nodes are killed.
#[test]
fn sums_are_exact_while_nodes_are_killed() {
    let seconds = std::env::var("KV54_SWAP_SECONDS");
    let seconds = Duration::from_secs(seconds.map_or(20, |seconds| seconds.parse().unwrap()));
    let mut cluster = Cluster::running(&THREE);
    let tallies: Arc<[Tally; 5]> = Arc::default();
    let is_over = Arc::new(AtomicBool::new(false));
    let writers = (0..8).map(|_| {
        let writer = Writer::of(&cluster);
        let (tallies, is_over) = (tallies.clone(), is_over.clone());
        thread::spawn(move || block_on(writer.count(&tallies, &is_over)))
    });
    let writers: Vec<_> = writers.collect();
    let (start, mut kills) = (Instant::now(), 0);
    while start.elapsed() < seconds {
        cluster.restart(THREE[kills % 3]);
        cluster.wait_until_ready();
        kills += 1;
    }
    is_over.store(true, Relaxed);
    for writer in writers {
        writer.join().unwrap();
    }
    println!("{kills} kills, {tallies:?}");
    for (key, tally) in tallies.iter().enumerate() {
        tally.is_sum(&cluster, &format!("cups{key}"));
        assert!(
            tally.done.load(Relaxed) > 20 * seconds.as_secs(),
            "few were done: {tallies:?}"
        );
    }
    assert!(kills >= 2, "{kills} kills");
}

/// How many calls ended in which way.
#[derive(Debug, Default)]
struct Tally {
    done: AtomicU64,
    unknown: AtomicU64,
    failed: AtomicU64,
}

impl Tally {
    fn note(&self, outcome: Result<(), Error>) {
        let count = match outcome {
            Ok(()) => &self.done,
            Err(error) if error.kind == Kind::UnknownOutcome => &self.unknown,
            Err(error) if !error.kind.is_refusal() => &self.failed,
            Err(error) => panic!("{error}"),
        };
        count.fetch_add(1, Relaxed);
    }

    /// All that was done is there, once; what is unknown may be; what failed is not.
    #[track_caller]
    fn is_sum(&self, cluster: &Cluster, key: &str) {
        let sum: u64 = cluster
            .kv54(["get", key])
            .exits(0)
            .text()
            .trim()
            .parse()
            .unwrap();
        let done = self.done.load(Relaxed);
        let most = done + self.unknown.load(Relaxed);
        assert!((done..=most).contains(&sum), "{key} is {sum}: {self:?}");
    }
}

/// One that counts: it coordinates itself, or asks the owner, or is a guest of some node.
struct Writer {
    client: Client,
    nodes: Vec<Peer>,
}

impl Writer {
    fn of(cluster: &Cluster) -> Writer {
        let ring = cluster.ring();
        let nodes = ring.nodes().iter();
        let nodes = nodes.map(|node| Peer::new(node, Duration::from_secs(6), tcp()));
        Writer {
            client: cluster.client(),
            nodes: nodes.collect(),
        }
    }

    async fn count(self, tallies: &[Tally; 5], is_over: &AtomicBool) {
        let mut rng = Rng::new();
        while !is_over.load(Relaxed) {
            let at = rng.usize(..tallies.len());
            let key = format!("cups{at}");
            tallies[at].note(self.add_one(key.as_bytes(), &mut rng).await);
            // The processor is for the nodes too.
            tokio::time::sleep(Duration::from_millis(rng.u64(..5))).await;
        }
    }

    async fn add_one(&self, key: &[u8], rng: &mut Rng) -> Result<(), Error> {
        match rng.u8(..3) {
            0 => self.client.incr(key, 1).await.map(drop),
            1 => {
                let node = &self.nodes[rng.usize(..self.nodes.len())];
                node.ask("incr", &[&encode_bytes(key)]).await.map(drop)
            }
            _ => {
                let one_more = |old: &Packed| {
                    let old = old.value().unwrap().as_u64().unwrap_or(0);
                    Some(Packed::from(&*encode(&(old + 1).into())))
                };
                let swapped = self.client.swap(key, one_more).await?;
                assert!(matches!(swapped, Swapped::Done(_)), "{swapped:?}");
                Ok(())
            }
        }
    }
}

/// A script in the background, in which `$kv54` is the command.
fn in_bash(cluster: &Cluster, script: &str) -> Node {
    let mut bash = Command::new("bash");
    bash.current_dir(&cluster.dir).args(["-c", script]);
    bash.env("kv54", env!("CARGO_BIN_EXE_kv54"))
        .env_remove("KV54_CONFIG");
    Node::spawn(bash.stdout(Stdio::null()))
}

/// A command of a shell that holds the key `jobs`. It may `read forever < fifo`. kv54 is started with
/// signals as this option of `env` says.
fn spawn_lock(cluster: &Cluster, signals: &str, script: &str) -> Node {
    let mut env = Command::new("env");
    env.args([signals, env!("CARGO_BIN_EXE_kv54"), "lock", "jobs", "--"]);
    env.args(["bash", "-c", script]).current_dir(&cluster.dir);
    Node::spawn(env.env_remove("KV54_CONFIG"))
}

fn make_fifo(cluster: &Cluster) {
    let made = Command::new("mkfifo")
        .arg(cluster.dir.join("fifo"))
        .status();
    assert!(made.unwrap().success());
}

/// Asserts the exit code and standard output.
#[track_caller]
fn prints(said: Said, code: i32, text: &str) -> Said {
    let said = said.exits(code);
    assert_eq!(said.text(), text, "{said:?}");
    said
}

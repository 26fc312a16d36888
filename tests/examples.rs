//! The examples do what the README shows.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _, read_to_string};
use std::net::{Shutdown, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Sender, channel};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use common::{Cluster, Node, Ports, block_on, examples};
use kv54::cluster;
use kv54::error::Kind;
use kv54::rpc::codec::{decode, encode};
use kv54::rpc::{Peer, tcp};
use msgpack_rpc::Value;

/// Long enough for an example that is built.
const PATIENCE: Duration = Duration::from_secs(60);

/// What `cargo example tour` prints, but for times and the refusal.
const TOUR: &str = r#"start alice, bob, carol, dave and erin
    ready after #s: nobody has missed anything (src/join.rs)
set tea green
    ok: two of three have it (src/client.rs)
where is tea?
    crc32("tea") % 5 = 4: erin, alice, bob (src/cluster.rs)
get tea through carol, who has no copy
    "green": a node is a client of the others (src/server.rs)
kill erin: its memory is gone
    get tea: "green", from the other two (src/replicas.rs)
    set tea black: ok, two of three are enough (src/client.rs)
start erin again
    joining: waiting for alice, bob, carol, dave (src/join.rs)
    ready after #s: it has read what it missed (src/join.rs)
    get tea through erin: "black" (src/store.rs)
cut erin and alice off: they keep their memory, but nobody reaches them
    bob alone cannot know that the others know nothing newer (src/client.rs)
let them back
    get tea: "black", as soon as two of three are there (src/client.rs)
take frank into the ring
    every get was answered meanwhile, by two rings (src/beyond/rings.rs)
    crc32("tea") % 6 = 0: alice, bob, carol (src/cluster.rs)
    get tea through frank: "black" (src/server.rs)
"#;

#[test]
fn the_tour_ends_well() {
    let mut tour = example("tour", &[]);
    let stdout = tour.0.stdout.take().unwrap();
    let (send, told) = channel();
    spawn(move || send.send(read_to_string(stdout)));
    let out = told.recv_timeout(PATIENCE).unwrap().unwrap();
    let is_refusal = |line: &String| line.contains("unavailable");
    let (refusals, told): (Vec<String>, Vec<String>) =
        out.lines().map(masked).partition(is_refusal);
    assert_eq!(told.join("\n"), TOUR.trim_end());
    // In which order they failed, and how quick bob was, is nothing to rely on.
    assert_eq!(refusals.len(), 1, "{out}");
    for part in [
        "get tea: unavailable: key \"tea\": ",
        "of 3 replicas answered, 2 needed (",
        "erin: # connection refused",
        "alice: # connection refused",
    ] {
        assert!(refusals[0].contains(part), "{part:?} is missing: {out}");
    }
    assert_eq!(tour.0.wait().unwrap().code(), Some(0));
}

#[test]
fn one_node_keeps_what_it_is_told() {
    let ports = Ports::block();
    let address = format!("127.0.0.1:{}", ports.port(1));
    let node = example("one_node", &[&address]);
    let story = async {
        let node = cluster::Node {
            name: "one".into(),
            address,
        };
        let peer = Peer::new(&node, Duration::from_secs(5), tcp());
        let [tea, green, black] = ["tea", "green", "black"].map(|text| encode(&text.into()));
        let ask = async |method, params: &[&[u8]]| {
            let answer = peer.call(method, params).await.1;
            answer.and_then(|answer| decode(&answer))
        };
        while is_unreachable(ask("get", &[&tea]).await) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(ask("get", &[&tea]).await, Ok(Value::Nil));
        assert_eq!(ask("set", &[&tea, &green]).await, Ok(Value::Nil));
        assert_eq!(ask("get", &[&tea]).await, Ok("green".into()));
        assert_eq!(ask("set", &[&tea, &black]).await, Ok(Value::Nil));
        assert_eq!(ask("get", &[&tea]).await, Ok("black".into()));
        let no_key = ask("get", &[&encode(&54.into())]).await.unwrap_err();
        assert_eq!(no_key.kind, Kind::BadRequest);
        let no_method = ask("delete", &[&tea]).await.unwrap_err();
        assert_eq!(no_method.kind, Kind::NoSuchMethod);
    };
    block_on(async { tokio::time::timeout(PATIENCE, story).await.unwrap() });
    drop(node);
}

#[test]
fn the_essay_loses_a_set_that_it_has_answered() {
    let ring = Cluster::of(&["alice", "bob", "carol"]);
    let (everybody, copies) = (ring.dir.clone(), cut_off(&ring, "alice", &["alice"]));
    let green = Some("\"green\"".to_owned());
    let _copies = ["bob", "carol"].map(|name| Running::essay(&everybody, &["serve", name]));
    let alice = Running::essay(&everybody, &["serve", "alice"]);
    until(|| {
        essay(&everybody, &["set", "tea", "green"]); // once more, if the copies were not there yet
        essay(&copies, &["get", "tea"]) == green
    });
    drop(alice);
    // Its owner is dead: nobody can set tea, though two nodes have it.
    assert_eq!(essay(&everybody, &["set", "tea", "black"]), None);
    assert_eq!(essay(&everybody, &["get", "tea"]), green);
    // The owner is back, and does not reach the copies: two clients read different values.
    let alone = cut_off(&ring, "copies", &["bob", "carol"]);
    let alice = Running::essay(&alone, &["serve", "alice"]);
    until(|| essay(&everybody, &["set", "tea", "black"]).is_some());
    let black = Some("\"black\"".to_owned());
    assert_eq!(essay(&everybody, &["get", "tea"]), black);
    assert_eq!(essay(&copies, &["get", "tea"]), green);
    // It dies before it has told them: what it has answered is gone.
    drop(alice);
    assert_eq!(essay(&everybody, &["get", "tea"]), green);
}

/// What comes from a pusher that is alive, in its own order.
struct Source {
    name: &'static str,
    pusher: Child,
    stop: Arc<AtomicBool>,
    told: JoinHandle<usize>,
}

impl Source {
    /// Tells a pusher lines until it shall stop: `a 0`, `a 1` and so on, as fast as a busy program.
    fn of(ring: &Cluster, host: &str, name: &'static str) -> Source {
        let mut push = example_in(&ring.dir, "logs", &["push"]);
        let mut pusher = push
            .env("HOST", host)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let (mut stdin, stop) = (
            pusher.stdin.take().unwrap(),
            Arc::new(AtomicBool::new(false)),
        );
        let stopping = stop.clone();
        let told = spawn(move || {
            let lines = (0..).take_while(|_| !stopping.load(Relaxed));
            let told = lines.map(|n| {
                writeln!(stdin, "{name} {n}").unwrap();
                sleep(Duration::from_millis(1));
            });
            told.count()
        });
        Source {
            name,
            pusher,
            stop,
            told,
        }
    }

    /// All lines that it was told, once its pusher has sent them.
    fn end(mut self) -> Vec<String> {
        self.stop.store(true, Relaxed);
        let told = self.told.join().unwrap();
        assert_eq!(self.pusher.wait().unwrap().code(), Some(0));
        (0..told).map(|n| format!("{} {n}", self.name)).collect()
    }
}

#[test]
fn logs_keep_the_order_of_each_host_while_a_node_is_killed() {
    let mut ring = Cluster::five();
    let sources = [("web1", "a"), ("web1", "b"), ("web2", "c")];
    let sources = sources.map(|(host, name)| Source::of(&ring, host, name));
    let batches = |ring: &Cluster| {
        ring.kv54(["get", "logs"])
            .text()
            .trim()
            .parse()
            .unwrap_or(0)
    };
    let more = |ring: &Cluster| {
        let before: u32 = batches(ring);
        until(|| batches(ring) > before + 100);
    };
    more(&ring);
    let owner = ring.replicas("logs").remove(0);
    ring.kill(&owner);
    more(&ring);
    ring.start(&owner);
    more(&ring);
    let told = sources.map(Source::end);
    ring.wait_until_ready();
    ring.kill(&ring.replicas("logs").remove(1));
    // Two pushers of one host: the lines of both, each in its order, once.
    let [web1, web2, all] = [&["show", "web1"][..], &["show", "web2"], &["show"]]
        .map(|words| said(&ring.dir, "logs", words).unwrap());
    let of = |shown: &str, from: &str| -> Vec<String> {
        let lines = shown.lines().filter(|line| line.starts_with(from));
        lines.map(str::to_owned).collect()
    };
    assert_eq!(of(&web1, "a "), told[0]);
    assert_eq!(of(&web1, "b "), told[1]);
    assert_eq!(web2.lines().collect::<Vec<_>>(), told[2]);
    assert_eq!(
        of(&all, "web2: c "),
        told[2]
            .iter()
            .map(|line| format!("web2: {line}"))
            .collect::<Vec<_>>()
    );
    assert_eq!(
        all.lines().count(),
        told.iter().map(Vec::len).sum::<usize>()
    );
}

#[test]
fn a_pusher_that_died_hides_nothing_and_old_lines_expire() {
    let ring = Cluster::running(&["alice", "bob", "carol"]);
    push(&ring, "7d", b"one\n");
    ring.kv54(["incr", "logs", "3"]).exits(0); // numbers that it drew, and what it had to say is lost
    push(&ring, "1h", b"two\nno line break and \xff");
    push(&ring, "300ms", b"soon over\n");
    let show = || {
        example_in(&ring.dir, "logs", &["show", "web1"])
            .output()
            .unwrap()
    };
    let lasting = b"one\ntwo\nno line break and \xff\n";
    until(|| show().stdout == lasting);
    let long = "x".repeat(200_000) + "\n";
    push(&ring, "1h", long.as_bytes());
    let shown = show().stdout.split_off(lasting.len());
    let shown: Vec<u8> = shown.into_iter().filter(|byte| *byte == b'x').collect();
    assert_eq!(shown.len(), 200_000, "in several lines, but all of it");
}

/// As in `logs show | less`: what is on its way to a get when the reader stops would be too late when it goes on.
#[test]
fn who_reads_logs_may_stop_for_a_while() {
    let ring = Cluster::running(&["alice", "bob", "carol"]);
    let lines = "steep for two minutes, and not for three\n".repeat(60_000);
    push(&ring, "1h", lines.as_bytes());
    let mut show = example_in(&ring.dir, "logs", &["show", "web1"])
        .spawn()
        .unwrap();
    sleep(Duration::from_secs(7)); // more than an operation may take
    let shown = read_to_string(show.stdout.take().unwrap()).unwrap();
    assert_eq!(show.wait().unwrap().code(), Some(0));
    assert!(shown == lines, "{} of {} bytes", shown.len(), lines.len());
}

/// As `logs show | head -1` has.
#[test]
fn a_reader_may_have_seen_enough() {
    let ring = Cluster::running(&["alice", "bob", "carol"]);
    push(&ring, "1h", &b"steep for two minutes\n".repeat(10_000));
    ring.kv54(["set", "deploy:hosts", "web1 1 ok"]).exits(0);
    for (program, words) in [("logs", &["show"][..]), ("deploy", &["status"])] {
        let mut program = example_in(&ring.dir, program, words);
        let mut shows = program.stderr(Stdio::piped()).spawn().unwrap();
        drop(shows.stdout.take());
        let ended = shows.wait_with_output().unwrap();
        assert_eq!((ended.status.code(), &*ended.stderr), (Some(0), &b""[..]));
    }
}

#[test]
fn the_numbers_of_batches_go_round() {
    let ring = Cluster::running(&["alice", "bob", "carol"]);
    push(&ring, "1h", b"one\n");
    push(&ring, "1h", b"two\n");
    ring.kv54(["set", "logs", "--value-json", "1000000"])
        .exits(0);
    // The next pusher dies: one is under the key of its number, and not the newest.
    ring.kv54(["incr", "logs"]).exits(0);
    let show = || said(&ring.dir, "logs", &["show", "web1"]).unwrap();
    assert_eq!(show(), "two");
    push(&ring, "1h", b"three\n");
    assert_eq!(show(), "three");
}

#[test]
fn a_pusher_waits_for_a_majority() {
    let ring = Cluster::running(&["alice", "bob", "carol"]);
    for name in ["alice", "bob"] {
        ring.signal(name, "STOP");
    }
    ring.file("line.txt", "patience\n");
    let mut push = example_in(&ring.dir, "logs", &["push"]);
    push.env("HOST", "web1");
    let mut pusher = Node::spawn_with(&mut push, File::open(ring.dir.join("line.txt")).unwrap());
    pusher.wait_for("waiting: ");
    for name in ["alice", "bob"] {
        ring.signal(name, "CONT");
    }
    assert_eq!(pusher.wait(), 0, "{:?}", pusher.log());
    assert_eq!(
        said(&ring.dir, "logs", &["show"]).unwrap(),
        "web1: patience"
    );
}

/// Pushes these lines of web1, which last so long.
fn push(ring: &Cluster, ttl: &str, lines: &[u8]) {
    let mut push = example_in(&ring.dir, "logs", &["push", ttl]);
    let mut pusher = push
        .env("HOST", "web1")
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    pusher.stdin.take().unwrap().write_all(lines).unwrap();
    assert_eq!(pusher.wait().unwrap().code(), Some(0));
}

#[test]
fn hosts_get_each_version_whole_and_run_their_command_once() {
    let mut ring = Cluster::five();
    let versions: [Vec<u8>; 3] = [1, 2, 3].map(|n| {
        (0..=250)
            .cycle()
            .map(|at: u8| n ^ at)
            .take(3_000_000)
            .collect()
    });
    let put = |ring: &Cluster, n: usize| {
        std::fs::write(ring.dir.join("app"), &versions[n - 1]).unwrap();
        assert_eq!(
            said(&ring.dir, "deploy", &["put", "app"]),
            Some(format!("version {n}"))
        );
    };
    let current = ring.dir.join("web1/current");
    let states = |ring: &Cluster| said(&ring.dir, "deploy", &["status"]).unwrap();
    let told = |ring: &Cluster, line: &str| until(|| states(ring).lines().any(|told| told == line));
    let [web1, _web2] = [
        agent(&ring, "web1", "echo >> runs.txt"),
        agent(&ring, "web2", "exit 3"),
    ];
    put(&ring, 1);
    told(&ring, "web1 1 ok");
    // From now on the file is there at every moment, and is one of the versions.
    let (done, whole, path) = (
        Arc::new(AtomicBool::new(false)),
        versions.clone(),
        current.clone(),
    );
    let is_done = done.clone();
    let watch = spawn(move || {
        let looks = (0..).take_while(|_: &u32| !is_done.load(Relaxed));
        let are_whole = looks.map(|_| whole.contains(&fs::read(&path).unwrap()));
        are_whole.collect::<Vec<bool>>()
    });
    ring.kill(&ring.replicas("deploy").remove(0));
    put(&ring, 2);
    told(&ring, "web1 2 ok");
    drop(web1);
    let _web1 = agent(&ring, "web1", "echo >> runs.txt");
    put(&ring, 3);
    told(&ring, "web1 3 ok");
    done.store(true, Relaxed);
    let looks = watch.join().unwrap();
    assert!(!looks.is_empty() && !looks.contains(&false));
    told(&ring, "web2 3 failed: exit status: 3");
    assert_eq!(states(&ring).lines().count(), 2);
    assert_eq!(fs::read(&current).unwrap(), versions[2]);
    let runs = fs::read_to_string(ring.dir.join("runs.txt")).unwrap();
    assert_eq!(
        runs.lines().count(),
        3,
        "once for each version, and not after a restart"
    );
}

#[test]
fn an_agent_takes_no_part_of_a_version() {
    let ring = Cluster::running(&["alice", "bob", "carol"]);
    ring.file("app", "whole\n");
    assert_eq!(
        said(&ring.dir, "deploy", &["put", "app"]).unwrap(),
        "version 1"
    );
    let web1 = agent(&ring, "web1", "echo >> runs.txt");
    let is_told = |line| until(|| said(&ring.dir, "deploy", &["status"]).as_deref() == Some(line));
    is_told("web1 1 ok");
    ring.kv54(["set", "deploy", "--value-json", "[8, 54, 54]"])
        .exits(0);
    web1.wait_for("unavailable: pieces of key \"deploy\" are missing");
    assert_eq!(
        fs::read_to_string(ring.dir.join("web1/current")).unwrap(),
        "whole\n"
    );
    ring.kv54(["set", "deploy", "--value-json", r#"["../../x", "$(true)"]"#])
        .exits(0);
    web1.wait_for("deploy: there is none");
    ring.kv54(["set", "deploy", "--value-json", "[8, 54, 54]"])
        .exits(0);
    ring.file("app", "whole again\n");
    assert_eq!(
        said(&ring.dir, "deploy", &["put", "app"]).unwrap(),
        "version 9"
    );
    is_told("web1 9 ok");
    let runs = fs::read_to_string(ring.dir.join("runs.txt")).unwrap();
    assert_eq!(runs.lines().count(), 2);
}

#[test]
fn a_command_may_move_the_file_away_and_numbers_may_begin_anew() {
    let ring = Cluster::running(&["alice", "bob", "carol"]);
    let script = "echo >> runs.txt; mv web1/current web1/app";
    let _web1 = agent(&ring, "web1", script);
    let put = |text: &str, version: &str, line: &str| {
        ring.file("app", text);
        let told = said(&ring.dir, "deploy", &["put", "app"]);
        assert_eq!(told.as_deref(), Some(version));
        until(|| fs::read_to_string(ring.dir.join("web1/app")).is_ok_and(|app| app == text));
        until(|| said(&ring.dir, "deploy", &["status"]).as_deref() == Some(line));
    };
    put("one\n", "version 1", "web1 1 ok");
    ring.kv54(["delete", "deploy"]).exits(0);
    put("another one\n", "version 1", "web1 1 ok");
    put("two\n", "version 2", "web1 2 ok");
    sleep(Duration::from_secs(3)); // it looks once a second
    let runs = fs::read_to_string(ring.dir.join("runs.txt")).unwrap();
    assert_eq!(runs.lines().count(), 3, "once for each version");
}

#[test]
fn a_put_that_is_refused_leaves_nothing_behind() {
    let mut ring = Cluster::with_limits(&["alice"], "memory = \"1MiB\"");
    ring.start_all();
    fs::write(ring.dir.join("app"), vec![54; 3 << 20]).unwrap();
    assert_eq!(said(&ring.dir, "deploy", &["put", "app"]), None);
    let keys = ring.kv54(["keys", "--prefix", "deploy"]);
    assert_eq!(keys.exits(0).text(), "");
}

/// An agent of this host, which runs this in a shell.
fn agent(ring: &Cluster, host: &str, script: &str) -> Node {
    let _ = fs::create_dir(ring.dir.join(host));
    let mut agent = example_in(&ring.dir, "deploy", &["agent", host, "sh", "-c", script]);
    Node::spawn(agent.env("HOST", host))
}

/// So many tasks are put by each of so many producers.
const TASKS: usize = 1_000;
const PRODUCERS: usize = 4;

#[test]
fn each_task_is_given_once_while_nodes_are_killed() {
    let mut ring = Cluster::five();
    let queues = [Queue::of(&ring), Queue::of(&ring)];
    let producers = (0..PRODUCERS).map(|producer| {
        let mut client = queues[producer % 2].client();
        spawn(move || (0..TASKS).for_each(|n| client.puts("tasks", &format!("{producer} {n}"))))
    });
    let producers: Vec<JoinHandle<()>> = producers.collect();
    let (send, given) = channel();
    for worker in 0..PRODUCERS {
        let (mut client, send) = (queues[worker % 2].client(), send.clone());
        spawn(move || while send.send((worker, client.gets("tasks"))).is_ok() {});
    }
    let mut tasks: Vec<(usize, String)> = Vec::new();
    let mut more = |share: usize| {
        let all = TASKS * PRODUCERS;
        while tasks.len() < all * share / 4 {
            tasks.push(given.recv_timeout(PATIENCE).unwrap());
        }
        tasks.clone()
    };
    more(1);
    let ends = ["tasks:put", "tasks:got"].map(|end| ring.replicas(end).remove(0));
    ring.kill(&ends[0]);
    more(2);
    ring.start(&ends[0]);
    ring.wait_until_ready();
    ring.kill(&ends[1]);
    more(3);
    let tasks = more(4);
    for producer in producers {
        producer.join().unwrap();
    }
    // All of them, once; and to each worker, those of each producer in its order.
    for producer in 0..PRODUCERS {
        let of = |task: &str| {
            task.split_once(' ')
                .map(|(of, n)| (of == producer.to_string(), n.parse().unwrap()))
        };
        let numbers = |worker: Option<usize>| -> Vec<usize> {
            let given = tasks
                .iter()
                .filter(|(to, _)| worker.is_none_or(|worker| worker == *to));
            let numbers = given.filter_map(|(_, task)| of(task));
            numbers
                .filter(|(is_its, _)| *is_its)
                .map(|(_, n)| n)
                .collect()
        };
        let mut all = numbers(None);
        all.sort_unstable();
        assert_eq!(all, (0..TASKS).collect::<Vec<_>>());
        assert!((0..PRODUCERS).all(|worker| numbers(Some(worker)).is_sorted()));
    }
    // There is no other one.
    queues[0].client().puts("tasks", "the last");
    assert_eq!(given.recv_timeout(PATIENCE).unwrap().1, "the last");
}

#[test]
fn a_worker_that_leaves_while_it_waits_gets_no_task() {
    let ring = Cluster::running(&["alice", "bob", "carol"]);
    let queue = Queue::of(&ring);
    let mut producer = queue.client();
    for half_closed in [false, true] {
        let mut worker = queue.client();
        worker.sends("mn\r\nget tasks\r\n");
        assert_eq!(worker.line(), "MN"); // both were read at once
        if half_closed {
            worker.0.get_ref().shutdown(Shutdown::Write).unwrap();
            let told = worker.line();
            assert!(told.starts_with("SERVER_ERROR unavailable: "), "{told}");
        }
        drop(worker);
        producer.puts("tasks", "steep");
        assert_eq!(queue.client().gets("tasks"), "steep");
    }
    // Nor does one behind which others wait.
    let [first, mut second] = [queue.client(), queue.client()].map(|mut worker| {
        worker.sends("mn\r\nget tasks\r\n");
        assert_eq!(worker.line(), "MN");
        worker
    });
    drop(first);
    producer.puts("tasks", "pour");
    assert_eq!(second.line(), "VALUE tasks 0 4");
}

/// But in the moment in which the server looks for a task for it, which it does about every 50 ms.
#[test]
fn a_worker_that_has_left_seldom_changes_the_order() {
    let ring = Cluster::running(&["alice", "bob", "carol"]);
    let queue = Queue::of(&ring);
    let mut producer = queue.client();
    let changed = (0..20).filter(|_| {
        let [mut first, mut second] = [queue.client(), queue.client()].map(|mut worker| {
            worker.sends("mn\r\nget tasks\r\n");
            assert_eq!(worker.line(), "MN");
            worker
        });
        sleep(Duration::from_millis(20));
        first.0.get_ref().shutdown(Shutdown::Write).unwrap();
        let told = first.line();
        assert!(told.starts_with("SERVER_ERROR unavailable: "), "{told}");
        producer.puts("tasks", "steep");
        producer.puts("tasks", "pour");
        let [_, one, _] = [(); 3].map(|()| second.line());
        let tasks = [one, second.gets("tasks")];
        let [is_same, is_changed] =
            [["steep", "pour"], ["pour", "steep"]].map(|as_put| tasks == as_put);
        assert!(is_same || is_changed, "{tasks:?}");
        is_changed
    });
    let changed = changed.count();
    assert!(changed < 10, "{changed} of 20");
}

/// It has asked for more than its connection takes while it works.
#[test]
fn a_worker_that_does_not_read_its_tasks_stops_no_other_one() {
    let ring = Cluster::running(&["alice", "bob", "carol"]);
    let queue = Queue::of(&ring);
    let (mut producer, mut idle) = (queue.client(), queue.client());
    let large = "x".repeat((1 << 20) - 100);
    for _ in 0..16 {
        producer.puts("tasks", &large);
    }
    idle.sends(&format!("mn\r\n{}", "get tasks\r\n".repeat(16)));
    assert_eq!(idle.line(), "MN");
    producer.puts("tasks", "steep");
    assert_eq!(queue.client().gets("tasks"), "steep");
}

#[test]
fn a_task_that_was_taken_for_a_worker_that_has_left_is_put_in_again() {
    let ring = Cluster::running(&["alice", "bob", "carol"]);
    let queue = Queue::of(&ring);
    queue.client().puts("tasks", "steep");
    for name in ["alice", "bob"] {
        ring.signal(name, "STOP");
    }
    let mut worker = queue.client();
    worker.sends("mn\r\nget tasks\r\n");
    assert_eq!(worker.line(), "MN");
    drop(worker); // and its task is still being taken
    for name in ["alice", "bob"] {
        ring.signal(name, "CONT");
    }
    until(|| ring.kv54(["get", "tasks:1"]).code == 0);
    assert_eq!(queue.client().gets("tasks"), "steep");
}

#[test]
fn tasks_outlive_the_servers_of_their_queue() {
    let ring = Cluster::running(&["alice", "bob", "carol"]);
    let (first, second) = (Queue::of(&ring), Queue::of(&ring));
    let large = "x".repeat(1_000_000);
    first.client().puts("tasks", "steep");
    first.client().puts("tasks", &large);
    first.client().puts("orders", "two cups");
    drop(first);
    let mut worker = second.client();
    assert_eq!(worker.gets("tasks"), "steep");
    drop(second);
    let third = Queue::of(&ring);
    let mut worker = third.client();
    assert_eq!(worker.gets("tasks"), large);
    assert_eq!(worker.gets("orders"), "two cups");
    // One waits at a server, and the task comes through another one.
    worker.sends("get tasks\r\n");
    Queue::of(&ring).client().puts("tasks", "pour");
    assert_eq!(worker.line(), "VALUE tasks 0 4");
}

/// What was said to a producer that put a task; nothing if its server had gone.
type Put = (String, Option<String>);

#[test]
fn a_queue_server_that_is_killed_takes_along_one_task_of_each_worker_at_most() {
    let ring = Cluster::running(&["alice", "bob", "carol"]);
    let [killed, other] = [(); 2].map(|()| Queue::of(&ring));
    let producers = [(0, &killed), (1, &killed), (2, &other)].map(|(name, queue)| {
        let clients = [queue.client(), other.client()];
        let is_cut = name < 2;
        spawn(move || produce(clients, name, is_cut))
    });
    let (send, given) = channel();
    let workers = [&killed, &killed, &other, &other].map(|queue| {
        let (clients, send) = ([queue.client(), other.client()], send.clone());
        spawn(move || work(clients, &send))
    });
    let mut tasks = Vec::new();
    while tasks.len() < 300 {
        tasks.push(given.recv_timeout(PATIENCE).unwrap());
    }
    drop(killed);
    let put: Vec<Put> = producers
        .into_iter()
        .flat_map(|producer| producer.join().unwrap())
        .collect();
    for _ in &workers {
        other.client().puts("tasks", "the end"); // behind all others
    }
    drop(send);
    tasks.extend(given);
    let given: Vec<Vec<String>> = workers.map(|worker| worker.join().unwrap()).into();
    assert_eq!(given.concat().len(), tasks.len());
    // None twice; of those that were put, none is lost but in the hand of a worker of the dead server.
    let times = |task: &String| tasks.iter().filter(|given| *given == task).count();
    let (mut lost, mut unknown) = (0, 0);
    for (task, said) in &put {
        match (said.as_deref(), times(task)) {
            (Some("STORED"), 1) => {}
            (Some("STORED"), 0) => lost += 1,
            (None, 0 | 1) => unknown += 1,
            (said, times) => panic!("{task}: {said:?}, and given {times} times"),
        }
    }
    println!("{} tasks, {lost} lost, {unknown} unknown", put.len());
    assert!(lost <= 2 && unknown <= 2, "{lost} lost, {unknown} unknown");
    assert!(
        tasks
            .iter()
            .all(|task| put.iter().any(|(put, _)| put == task))
    );
    for (worker, producer) in (0..4).flat_map(|worker| (0..3).map(move |of| (worker, of))) {
        let of = |task: &String| task.strip_prefix(&format!("{producer} "))?.parse().ok();
        let numbers: Vec<u32> = given[worker].iter().filter_map(of).collect();
        assert!(numbers.is_sorted(), "{numbers:?}");
    }
}

/// Puts tasks until its server has gone, if that will be, and then some more at the other one.
fn produce([mut first, mut other]: [Worker; 2], name: usize, is_cut: bool) -> Vec<Put> {
    let mut put = Vec::new();
    let mut puts = |client: &mut Worker| {
        let task = format!("{name} {}", put.len());
        let said = client.told(&format!("set tasks 0 0 {}\r\n{task}\r\n", task.len()));
        put.push((task, said.clone()));
        said.is_some()
    };
    while is_cut && puts(&mut first) {}
    for _ in 0..200 {
        assert!(puts(&mut other));
    }
    put
}

/// Takes tasks until there are no more, at the other server when its first one has gone.
fn work(clients: [Worker; 2], given: &Sender<String>) -> Vec<String> {
    let mut tasks = Vec::new();
    for mut client in clients {
        while let Some(head) = client.told("get tasks\r\n") {
            assert!(head.starts_with("VALUE tasks 0 "), "{head}");
            let Some(task) = client.told("") else { break };
            if task == "the end" {
                return tasks;
            }
            given.send(task.clone()).unwrap();
            tasks.push(task);
            assert!(client.told("").is_none_or(|end| end == "END"));
        }
    }
    panic!("there is no server any more");
}

#[test]
fn a_queue_keeps_flags_and_refuses_what_a_queue_cannot() {
    let ring = Cluster::running(&["alice", "bob", "carol"]);
    let queue = Queue::of(&ring);
    let mut client = queue.client();
    let refused = "CLIENT_ERROR a queue knows plain set and get";
    for (request, answer) in [
        ("set tasks 54 0 2\r\n\r\n\r\n", "STORED"),
        ("set tasks 0 60 1\r\nx\r\n", refused),
        ("add tasks 0 0 1\r\nx\r\n", refused),
        ("cas tasks 0 0 1 1\r\nx\r\n", refused),
        ("gat 60 tasks\r\n", refused),
        ("gat 0 tasks\r\n", refused),
        ("gets tasks\r\n", refused),
        ("mg tasks v c\r\n", refused),
        ("mg tasks v N0\r\n", refused),
        ("ms tasks 1 c\r\ny\r\n", refused),
        ("get tasks tea\r\n", refused), // what was taken for one would be lost with the other
        ("incr tasks 1\r\n", refused),
        ("delete tasks\r\n", refused),
        ("flush_all\r\n", refused),
        ("mg tasks\r\n", refused), // it would be taken, and not told
        ("ms tasks 1\r\ny\r\n", "HD"),
        ("set tasks 0 0 1 noreply\r\nz\r\nmn\r\n", "MN"),
        ("get tasks\r\n", "VALUE tasks 54 2"),
    ] {
        client.sends(request);
        assert_eq!(client.line(), answer, "{request}");
    }
    let rest = [(); 2].map(|()| client.line());
    assert_eq!(rest, ["", ""], "two line ends, as they were put");
    assert_eq!(client.line(), "END");
    assert_eq!(
        ["tasks", "tasks"].map(|queue| client.gets(queue)),
        ["y", "z"]
    );
}

#[test]
fn the_slots_of_a_queue_go_round() {
    let ring = Cluster::running(&["alice", "bob", "carol"]);
    let queue = Queue::of(&ring);
    let mut client = queue.client();
    let begin_at = |end: &str, number: &str| {
        ring.kv54(["set", &format!("tasks:{end}"), "--value-json", number])
            .exits(0);
    };
    client.puts("tasks", "an old one");
    assert_eq!(client.gets("tasks"), "an old one");
    client.puts("tasks", "a waiting one"); // in slot 1
    begin_at("put", "99999");
    begin_at("got", "99999");
    client.puts("tasks", "one");
    client.puts("tasks", "two"); // over the old one
    client.sends("set tasks 0 0 5\r\nthree\r\n");
    let full = client.line();
    assert!(
        full.starts_with("SERVER_ERROR full: queue \"tasks\" has 100000 tasks"),
        "{full}"
    );
    assert_eq!(client.gets("tasks"), "one");
    assert_eq!(client.gets("tasks"), "two");
    begin_at("got", "1");
    assert_eq!(client.gets("tasks"), "a waiting one");
    client.puts("tasks", "three");
    begin_at("got", "100001");
    assert_eq!(client.gets("tasks"), "three");
}

/// A queue server.
struct Queue {
    address: String,
    _ports: Ports,
    _running: Running,
}

impl Queue {
    fn of(ring: &Cluster) -> Queue {
        let ports = Ports::block();
        let address = format!("127.0.0.1:{}", ports.port(1));
        let running = Running(example_in(&ring.dir, "queue", &[&address]).spawn().unwrap());
        Queue {
            address,
            _ports: ports,
            _running: running,
        }
    }

    fn client(&self) -> Worker {
        until(|| TcpStream::connect(&self.address).is_ok());
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Worker(BufReader::new(stream))
    }
}

/// Any client of memcached.
struct Worker(BufReader<TcpStream>);

impl Worker {
    fn sends(&mut self, request: &str) {
        self.0.get_mut().write_all(request.as_bytes()).unwrap();
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// The next line, after this was sent; none if the server has gone.
    fn told(&mut self, request: &str) -> Option<String> {
        let mut line = String::new();
        self.0.get_mut().write_all(request.as_bytes()).ok()?;
        self.0.read_line(&mut line).ok()?;
        line.strip_suffix("\r\n").map(str::to_owned)
    }

    #[track_caller]
    fn puts(&mut self, queue: &str, task: &str) {
        self.sends(&format!("set {queue} 0 0 {}\r\n{task}\r\n", task.len()));
        assert_eq!(self.line(), "STORED");
    }

    /// The next task, as soon as there is one.
    #[track_caller]
    fn gets(&mut self, queue: &str) -> String {
        self.sends(&format!("get {queue}\r\n"));
        let head = self.line();
        assert!(head.starts_with(&format!("VALUE {queue} ")), "{head}");
        let task = self.line();
        assert_eq!(self.line(), "END");
        task
    }
}

/// What an example prints in this folder; `None` if it fails.
fn said(folder: &Path, name: &str, words: &[&str]) -> Option<String> {
    let said = example_in(folder, name, words).output().unwrap();
    let text = || String::from_utf8(said.stdout).unwrap().trim().to_owned();
    said.status.success().then(text)
}

/// A folder for those who are cut off from these nodes: in their file, nobody is there.
fn cut_off(ring: &Cluster, folder: &str, names: &[&str]) -> PathBuf {
    let folder = ring.dir.join(folder);
    let mut file = fs::read_to_string(ring.dir.join("cluster.toml")).unwrap();
    for (name, port) in names.iter().zip(1..) {
        file = file.replace(&ring.address(name), &format!("127.0.0.1:{port}"));
    }
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("cluster.toml"), file).unwrap();
    folder
}

/// What the essay's client says, in a folder with a `cluster.toml`; `None` if it fails.
fn essay(folder: &Path, words: &[&str]) -> Option<String> {
    said(folder, "essay", words)
}

fn is_unreachable(answer: Result<Value, kv54::error::Error>) -> bool {
    answer.is_err_and(|error| error.kind == Kind::Unavailable)
}

/// Waits for as long as an example may take.
fn until(is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < PATIENCE);
        sleep(Duration::from_millis(20));
    }
}

fn example(name: &str, args: &[&str]) -> Running {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    Running(example_in(here, name, args).spawn().unwrap())
}

/// An example that runs in this folder.
fn example_in(folder: &Path, name: &str, args: &[&str]) -> Command {
    let mut run = Command::new(examples().join(name));
    run.args(args).current_dir(folder).env_remove("KV54_CONFIG");
    run.stdout(Stdio::piped());
    run
}

struct Running(Child);

impl Running {
    fn essay(folder: &Path, words: &[&str]) -> Running {
        Running(example_in(folder, "essay", words).spawn().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The line with `#` for times and addresses: numbers with a point in them.
fn masked(line: &str) -> String {
    let number = |c: char| c.is_ascii_digit() || ".:".contains(c);
    let (mut masked, mut rest) = (String::new(), line);
    while let Some(start) = rest.find(number) {
        let length = rest[start..]
            .find(|c| !number(c))
            .unwrap_or(rest.len() - start);
        let found = &rest[start..start + length];
        let varies = found.contains('.') && found.contains(|c: char| c.is_ascii_digit());
        masked += &rest[..start];
        masked += if varies { "#" } else { found };
        rest = &rest[start + length..];
    }
    masked + rest
}

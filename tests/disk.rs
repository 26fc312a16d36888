//! Stories of nodes with `[disk]`: all of them lose their power at once, a log is damaged or another's, a folder is
//! full, shared or not there. What was answered is still there, or a node says clearly what is wrong.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;

use common::{Cluster, Node, block_on};
use kv54::entry::Packed;
use msgpack_rpc::Value;

const THREE: [&str; 3] = ["alice", "bob", "carol"];
const DISK: &str = "[disk]\npath = \"data\"";

#[test]
fn all_nodes_are_killed_at_once_again_and_again_and_no_answered_write_is_missing() {
    let mut cluster = on_disk(&THREE);
    cluster.start_all();
    let writes = Writes::default();
    let kills = std::env::var("KV54_KILLS").map_or(3, |kills| kills.parse().unwrap());
    for _ in 0..kills {
        let before = writes.answered.load(SeqCst);
        thread::scope(|scope| {
            let tasks = WRITERS.map(|name| scope.spawn(|| writes.go_on(&cluster, name)));
            wait_until(|| writes.answered.load(SeqCst) > before + 200);
            kill_all(&cluster);
            writes.ends.store(true, SeqCst);
            for task in tasks {
                writes.note(task.join().unwrap());
            }
        });
        writes.ends.store(false, SeqCst);
        restart_all(&mut cluster);
        writes.are_in(&cluster);
    }
}

#[test]
fn a_node_with_a_whole_log_waits_for_nobody() {
    let mut cluster = on_disk(&THREE);
    cluster.start_all();
    cluster.kv54(["set", "tea", "green"]).exits(0);
    cluster.kv54(["set", "coffee", "black"]).exits(0);
    cluster.kv54(["delete", "coffee"]).exits(0);
    kill_all(&cluster);
    for name in THREE {
        cluster.kill(name);
    }
    cluster.start("alice");
    cluster.node("alice").wait_for("ready with");
    cluster.kv54(["get", "tea"]).exits(3); // one of three is no majority
    cluster.start("bob");
    cluster.node("bob").wait_for("ready with");
    assert_eq!(cluster.kv54(["get", "tea"]).exits(0).text(), "green\n");
    cluster.kv54(["get", "coffee"]).exits(1);
}

#[test]
fn a_ring_of_one_remembers() {
    let mut cluster = on_disk(&["alice"]);
    cluster.start_all();
    cluster.kv54(["set", "tea", "green"]).exits(0);
    cluster.restart("alice");
    assert_eq!(cluster.kv54(["get", "tea"]).exits(0).text(), "green\n");
    cluster.stop("alice");
    cluster.start("alice");
    assert_eq!(cluster.kv54(["get", "tea"]).exits(0).text(), "green\n");
}

#[test]
fn a_damaged_log_is_kept_and_its_node_joins() {
    let mut cluster = on_disk(&THREE);
    cluster.start_all();
    cluster.kv54(["set", "tea", "green"]).exits(0);
    cluster.stop("alice");
    let path = segment(&cluster, "alice");
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.windows(5).position(|five| five == b"green").unwrap();
    bytes[at] ^= 1;
    fs::write(&path, &bytes).unwrap();
    cluster.start("alice");
    let alice = cluster.node("alice");
    alice.wait_for("warning: its log is damaged: 1.base: byte");
    alice.wait_for("alice.suspect, and this node joins");
    alice.wait_for("ready with 1 key");
    assert_eq!(
        fs::read(cluster.dir.join("data/alice.suspect/1.base")).unwrap(),
        bytes
    );

    // A log that is gone is joined as well, and the other one stays where it is.
    cluster.stop("alice");
    fs::remove_dir_all(cluster.dir.join("data/alice")).unwrap();
    cluster.start("alice");
    cluster.node("alice").wait_for("ready with 1 key");
}

#[test]
fn a_node_does_not_touch_what_is_not_its_own() {
    let mut cluster = on_disk(&["alice", "bob", "carol", "dave"]);
    cluster.ring_file("cluster.toml", &THREE, &[]);
    for name in THREE {
        cluster.start(name);
    }
    cluster.wait_until_ready();
    let said = |mut node: Node, part: &str| {
        assert_eq!(node.wait(), 2);
        node.wait_for(part);
    };
    let data = cluster.dir.join("data");
    let away = cluster.spare_port(7);
    let listen = format!("127.0.0.1:{away}");
    let second = cluster.spawn(["serve", "alice", "--listen", &listen]);
    said(second, "data/alice: another process has this folder");

    for name in THREE {
        cluster.stop(name);
    }
    fs::rename(data.join("alice"), data.join("away")).unwrap();
    fs::rename(data.join("bob"), data.join("alice")).unwrap();
    said(
        cluster.spawn(["serve", "alice"]),
        "data/alice: this is the log of bob",
    );

    fs::remove_dir_all(data.join("alice")).unwrap();
    fs::rename(data.join("away"), data.join("alice")).unwrap();
    cluster.ring_file("other.toml", &["alice", "dave"], &[]);
    let other = cluster.spawn(["serve", "alice", "--config", "other.toml"]);
    said(other, "bob is neither in [nodes] nor in [leaving]");
    cluster.start("alice");
    cluster.node("alice").wait_for("ready with");
}

#[test]
fn a_folder_that_cannot_be_written_is_named() {
    let cluster = on_disk(&["alice"]);
    cluster.file("data", "this is a file");
    let mut alice = cluster.spawn(["serve", "alice"]);
    assert_eq!(alice.wait(), 2);
    alice.wait_for("data/alice: ");
}

#[test]
fn a_log_that_does_not_fit_into_memory_is_not_read_in_part() {
    let mut cluster = on_disk(&["alice"]);
    cluster.start_all();
    let (client, value) = (cluster.client(), Packed::of("x".repeat(700_000)));
    block_on(client.set(b"tea", &value)).unwrap();
    block_on(client.set(b"coffee", &value)).unwrap();
    cluster.stop("alice");
    let file = fs::read_to_string(cluster.dir.join("cluster.toml")).unwrap();
    cluster.file(
        "cluster.toml",
        &file.replace("[limits]", "[limits]\nmemory = \"1MiB\""),
    );
    let mut alice = cluster.spawn(["serve", "alice"]);
    assert_eq!(alice.wait(), 2);
    alice.wait_for("bytes, and memory in [limits] is 1048576");
}

#[test]
fn what_is_old_is_left_behind_also_when_all_are_killed_meanwhile() {
    let mut cluster = on_disk(&THREE);
    cluster.start_all();
    cluster.kv54(["set", "tea", "green"]).exits(0);
    for round in 0..4 {
        let last = write_until_it_is_based(&cluster);
        restart_all(&mut cluster);
        let value = block_on(cluster.client().get(b"coffee")).unwrap();
        let n = value.value().unwrap().as_array().unwrap()[0]
            .as_u64()
            .unwrap();
        assert!(
            (last..=last + 1).contains(&n),
            "round {round}: {n} after {last}"
        );
        assert_eq!(cluster.kv54(["get", "tea"]).exits(0).text(), "green\n");
        let files = |name| fs::read_dir(folder(&cluster, name)).unwrap().count();
        wait_until(|| THREE.iter().all(|name| files(name) < 7));
    }
}

#[test]
fn a_ring_changes_and_remembers_it() {
    let mut cluster = on_disk(&["alice", "bob", "carol", "dave"]);
    cluster.ring_file("three.toml", &THREE, &[]);
    cluster.ring_file("four.toml", &["alice", "bob", "carol", "dave"], &[]);
    for name in THREE {
        cluster.start_with(name, "three.toml");
    }
    for name in THREE {
        cluster.node(name).wait_for("ready with");
    }
    cluster.start_with("dave", "four.toml");
    cluster
        .kv54(["set", "tea", "green", "--config", "three.toml"])
        .exits(0);
    cluster.kv54(["resize", "--config", "four.toml"]).exits(0);
    cluster
        .kv54(["set", "coffee", "black", "--config", "four.toml"])
        .exits(0);
    kill_all(&cluster);
    for name in ["alice", "bob", "carol", "dave"] {
        cluster.kill(name);
        cluster.start_with(name, "four.toml");
        cluster.node(name).wait_for("ready with"); // before the next one is there
    }
    for (key, value) in [("tea", "green\n"), ("coffee", "black\n")] {
        let got = cluster.kv54(["get", key, "--config", "four.toml"]).exits(0);
        assert_eq!(got.text(), value);
    }
    let told = cluster
        .kv54(["status", "--json", "--config", "four.toml"])
        .exits(0)
        .json();
    assert_eq!(told["nodes"][0]["epoch"], 1);
}

#[test]
#[ignore = "needs root and a file system of its own"]
fn a_disk_that_is_full_to_the_brim_is_waited_for() {
    let cluster = on_disk(&["alice"]);
    let data = cluster.dir.join("data");
    fs::create_dir_all(&data).unwrap();
    let script = format!("mount -t tmpfs -o size=16m none {data:?} && exec \"$0\" serve alice");
    let mut alice = Command::new("unshare");
    alice
        .args(["-m", "sh", "-c", &script])
        .arg(cluster.command().get_program());
    let alice = Node::spawn(alice.current_dir(&cluster.dir));
    alice.wait_for("ready with");
    let set = |n: u64| {
        let value = Value::Array(vec![n.into(), "x".repeat(100_000).into()]);
        block_on(cluster.client().set(b"tea", &Packed::of(value)))
    };
    set(0).unwrap();
    // Its folder, as its own process sees it.
    let seen = PathBuf::from(format!("/proc/{}/root", alice.pid()));
    let filler = seen.join(data.strip_prefix("/").unwrap()).join("filler");
    let mut file = fs::File::create(&filler).unwrap();
    while std::io::Write::write(&mut file, &[1; 4096]).is_ok_and(|written| written > 0) {}
    let refused = (1..).find_map(|n| Some((n, set(n).err()?))).unwrap();
    let (n, error) = refused;
    assert!(
        error.to_string().contains("the disk of alice is full"),
        "{error}"
    );
    let last = |n| {
        let value = block_on(cluster.client().get(b"tea"))
            .unwrap()
            .value()
            .unwrap();
        assert_eq!(value.as_array().unwrap()[0].as_u64(), Some(n));
    };
    last(n - 1);
    let table = cluster.kv54(["status"]).exits(0);
    assert!(table.text().contains(", which is full"), "{table:?}");
    drop(file); // else its space stays taken
    fs::remove_file(&filler).unwrap();
    wait_until(|| set(n).is_ok());
    last(n);
}

/// Writes one key again and again, until alice has written all anew, and kills all nodes; the last write that was answered.
fn write_until_it_is_based(cluster: &Cluster) -> u64 {
    let (ends, based) = (AtomicBool::new(false), newest_base(cluster));
    let write = async || {
        let (client, mut last) = (cluster.client(), 0);
        for n in 0_u64.. {
            let value = Value::Array(vec![n.into(), "x".repeat(300_000).into()]);
            match client.set(b"coffee", &Packed::of(value)).await {
                Ok(()) => last = n,
                Err(_) if ends.load(SeqCst) => break,
                Err(error) => panic!("{error}"),
            }
        }
        last
    };
    thread::scope(|scope| {
        let writer = scope.spawn(|| block_on(write()));
        wait_until(|| newest_base(cluster) > based);
        ends.store(true, SeqCst);
        kill_all(cluster);
        writer.join().unwrap()
    })
}

/// Nodes with a disk; none is running yet.
fn on_disk(names: &[&str]) -> Cluster {
    Cluster::with_limits(names, DISK)
}

/// What a power cut does to all processes at once.
fn kill_all(cluster: &Cluster) {
    let pids = cluster
        .running_nodes()
        .map(|(_, node)| node.pid().to_string());
    let status = Command::new("kill").arg("-KILL").args(pids).status();
    assert!(status.unwrap().success());
}

fn restart_all(cluster: &mut Cluster) {
    for name in THREE {
        cluster.kill(name);
    }
    for name in THREE {
        cluster.start(name);
    }
    for name in THREE {
        cluster.node(name).wait_for("ready with");
    }
}

fn folder(cluster: &Cluster, name: &str) -> PathBuf {
    cluster.dir.join("data").join(name)
}

/// The only segment that has records yet.
fn segment(cluster: &Cluster, name: &str) -> PathBuf {
    folder(cluster, name).join("1.base")
}

/// The newest base of alice, by its number.
fn newest_base(cluster: &Cluster) -> u64 {
    let names = fs::read_dir(folder(cluster, "alice")).unwrap();
    let names = names.map(|entry| PathBuf::from(entry.unwrap().file_name()));
    let bases = names.filter(|name| name.extension().is_some_and(|kind| kind == "base"));
    let number = |name: PathBuf| {
        Path::file_stem(&name)
            .unwrap()
            .to_str()
            .unwrap()
            .parse()
            .unwrap()
    };
    bases.map(number).max().unwrap_or(0)
}

fn wait_until(happens: impl Fn() -> bool) {
    let begun = std::time::Instant::now();
    while !happens() {
        assert!(begun.elapsed().as_secs() < 60, "it does not happen");
        thread::yield_now();
        thread::sleep(std::time::Duration::from_millis(1));
    }
}

const WRITERS: [&str; 4] = ["ada", "ben", "cyd", "count"];

/// What writers know of their writes.
#[derive(Default)]
struct Writes {
    answered: AtomicU64,
    ends: AtomicBool,
    known: std::sync::Mutex<BTreeMap<String, [u64; 2]>>, // the last that was answered, and begun
}

impl Writes {
    /// Writes numbers, each larger than the one before, until it is the end.
    fn go_on(&self, cluster: &Cluster, name: &str) -> (String, [u64; 2]) {
        let known = self.known.lock().unwrap().get(name).copied();
        let [mut answered, mut begun] = known.unwrap_or_default();
        let client = Arc::new(cluster.client());
        block_on(async {
            while !self.ends.load(SeqCst) {
                begun += 1;
                let done = match name {
                    "count" => client.incr(name.as_bytes(), 1).await.map(drop),
                    _ => client.set(name.as_bytes(), &Packed::of(begun)).await,
                };
                if done.is_ok() {
                    answered = if name == "count" { answered + 1 } else { begun };
                    self.answered.fetch_add(1, SeqCst);
                }
            }
        });
        (name.to_owned(), [answered, begun])
    }

    fn note(&self, (name, known): (String, [u64; 2])) {
        self.known.lock().unwrap().insert(name, known);
    }

    fn are_in(&self, cluster: &Cluster) {
        for (name, [answered, begun]) in &*self.known.lock().unwrap() {
            let found = block_on(cluster.client().get(name.as_bytes())).unwrap();
            let found = found.value().unwrap().as_u64().unwrap_or(0);
            assert!(
                (answered..=begun).contains(&&found),
                "{name}: {found}, not {answered} to {begun}"
            );
        }
    }
}

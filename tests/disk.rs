//! Stories of nodes with `[disk]`: all of them lose their power at once, a log is damaged or another's, a folder is
//! full, shared or not there. What was answered is still there, or a node says clearly what is wrong.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

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

/// All nodes in one process, of a file in another folder, which is where a relative path begins.
#[test]
fn nodes_of_one_process_have_a_folder_each() {
    let cluster = on_disk(&THREE);
    let elsewhere = cluster.dir.join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let serve_all = || {
        let mut serve = cluster.command();
        serve.current_dir(&elsewhere).arg("serve").arg("--all");
        Node::spawn(serve.args(["--config", "../cluster.toml"]))
    };
    let all = serve_all();
    cluster.wait_until_ready();
    cluster.kv54(["set", "tea", "green"]).exits(0);
    drop(all); // kill -9
    assert!(THREE.iter().all(|name| folder(&cluster, name).is_dir()));
    let _all = serve_all();
    cluster.wait_until_ready();
    assert_eq!(cluster.kv54(["get", "tea"]).exits(0).text(), "green\n");
    let status = cluster.kv54(["status"]).exits(0);
    assert_eq!(
        status.text().matches("commits took ").count(),
        3,
        "{status:?}"
    );
    let status = cluster.kv54(["status", "--json"]).exits(0).json();
    for node in status["nodes"].as_array().unwrap() {
        assert!(node["disk"].as_u64() >= Some(4 << 20), "{node}");
        assert!(node["commit_us"].is_u64(), "{node}");
    }
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
    let alice = cluster.node("alice");
    alice.wait_for("warning: there is no log yet: it begins one, and this node joins");
    alice.wait_for("ready with 1 key");
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
    for key in [b"coffee", b"barley", b"potato", b"pepper"] {
        block_on(client.set(key, &value)).unwrap();
    }
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
    for round in 0..6 {
        let last = match round % 2 {
            0 => write_until(&cluster, is_based(&cluster)),
            _ => write_until(&cluster, || is_being_based(&cluster)),
        };
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
fn what_was_deleted_takes_no_room() {
    let mut cluster = on_disk(&["alice"]);
    cluster.start_all();
    let (client, value) = (cluster.client(), Packed::of("x".repeat(64 << 10)));
    block_on(async {
        for n in 0..400_u32 {
            client.set(&n.to_be_bytes(), &value).await.unwrap();
        }
    });
    let files = || names(&cluster).len();
    assert!(files() > 7, "{:?}", names(&cluster));
    block_on(async {
        for n in 0..400_u32 {
            client.delete(&n.to_be_bytes()).await.unwrap();
        }
    });
    wait_until(|| files() < 5);
    cluster.restart("alice");
    assert!(block_on(cluster.client().get(&[0; 4])).unwrap().is_nil());
}

#[test]
fn a_limit_on_the_size_of_files_is_a_full_disk() {
    let mut cluster = on_disk(&["alice"]);
    let mut small = Command::new("sh");
    let script = "ulimit -f 1000; exec \"$0\" serve alice";
    small
        .args(["-c", script])
        .arg(cluster.command().get_program());
    let mut small = Node::spawn(small.current_dir(&cluster.dir));
    assert_eq!(small.wait(), 2, "no signal ends it");
    small.wait_for("data/alice: ");

    cluster.start_all();
    cluster.kv54(["set", "tea", "green"]).exits(0);
    let node = cluster.node("alice");
    let limit = |bytes| {
        let pid = i32::try_from(node.pid()).unwrap();
        let limits = Some((bytes, rlimit::INFINITY));
        rlimit::prlimit(pid, rlimit::Resource::FSIZE, limits, None).unwrap();
    };
    // What is under way waits, and what is new is refused.
    limit(0);
    let unknown = cluster.kv54(["set", "coffee", "black", "--timeout", "1s"]);
    assert!(unknown.err.contains("an unknown outcome"), "{unknown:?}");
    let refused = cluster.kv54(["set", "tea", "black"]);
    refused
        .exits(3)
        .says(&["full", "the disk of alice is full"]);
    let resize = cluster.kv54(["resize", "--again"]);
    resize
        .exits(2)
        .says(&["the disk of alice is full; nothing is changed"]);
    assert_eq!(cluster.kv54(["get", "tea"]).exits(0).text(), "green\n");
    limit(rlimit::INFINITY);
    node.wait_for("the disk has room again");
    assert_eq!(cluster.kv54(["get", "coffee"]).exits(0).text(), "black\n");

    // Room for what there is, and not for another file: nothing is left unknown.
    limit((4 << 20) - 512);
    let set = |n: u64| {
        let value = Value::Array(vec![n.into(), "x".repeat(300_000).into()]);
        block_on(cluster.client().set(b"sugar", &Packed::of(value)))
    };
    let (n, error) = (1..).find_map(|n| Some((n, set(n).err()?))).unwrap();
    assert!(
        error.to_string().contains("the disk of alice is full"),
        "{error}"
    );
    cluster.restart("alice");
    for (key, value) in [("tea", "green\n"), ("coffee", "black\n")] {
        assert_eq!(cluster.kv54(["get", key]).exits(0).text(), value);
    }
    let sugar = block_on(cluster.client().get(b"sugar")).unwrap();
    let sugar = sugar.value().unwrap();
    assert_eq!(sugar.as_array().unwrap()[0].as_u64(), Some(n - 1));
}

#[test]
fn a_ring_takes_a_disk_up_and_gives_it_up_one_node_after_the_other() {
    let mut cluster = Cluster::running(&THREE);
    cluster.kv54(["set", "tea", "green"]).exits(0);
    let table = format!("{DISK}\n[limits]");
    cluster.edit("[limits]", &table);
    one_after_the_other(&mut cluster);
    cluster.kv54(["set", "coffee", "black"]).exits(0);
    kill_all(&cluster);
    restart_all(&mut cluster);
    assert_eq!(cluster.kv54(["get", "tea"]).exits(0).text(), "green\n");

    // Given up: what is left in the folders grows old, and must not come back.
    cluster.edit(&table, "[limits]");
    one_after_the_other(&mut cluster);
    assert_eq!(cluster.kv54(["get", "coffee"]).exits(0).text(), "black\n");
    cluster.kv54(["set", "tea", "white"]).exits(0);
    fs::remove_dir_all(cluster.dir.join("data")).unwrap();
    cluster.edit("[limits]", &table);
    one_after_the_other(&mut cluster);
    kill_all(&cluster);
    restart_all(&mut cluster);
    assert_eq!(cluster.kv54(["get", "tea"]).exits(0).text(), "white\n");
}

#[test]
fn a_copy_of_the_folders_of_stopped_nodes_is_a_backup() {
    let mut cluster = on_disk(&THREE);
    cluster.start_all();
    cluster.kv54(["set", "tea", "green"]).exits(0);
    for name in THREE {
        cluster.stop(name);
    }
    let (data, copy) = (cluster.dir.join("data"), cluster.dir.join("copy"));
    for name in THREE {
        fs::create_dir_all(copy.join(name)).unwrap();
        for file in fs::read_dir(data.join(name)).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), copy.join(name).join(file.file_name())).unwrap();
        }
    }
    for name in THREE {
        cluster.start(name);
    }
    cluster.wait_until_ready();
    cluster.kv54(["set", "tea", "black"]).exits(0);
    kill_all(&cluster);

    let file = fs::read_to_string(cluster.dir.join("cluster.toml")).unwrap();
    cluster.file("copy.toml", &file.replace("\"data\"", "\"copy\""));
    for name in THREE {
        cluster.kill(name);
        cluster.start_with(name, "copy.toml");
        cluster.node(name).wait_for("ready with"); // before the next one is there
    }
    assert_eq!(cluster.kv54(["get", "tea"]).exits(0).text(), "green\n");
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
fn a_disk_that_is_only_read_is_named() {
    let cluster = on_disk(&["alice"]);
    let mut alice = on_its_own(&cluster, "-o ro");
    assert_eq!(alice.wait(), 2);
    alice.wait_for("data/alice: Read-only file system");
}

#[test]
#[ignore = "needs root and a file system of its own"]
fn a_disk_that_is_full_to_the_brim_is_waited_for() {
    let cluster = on_disk(&["alice"]);
    let alice = on_its_own(&cluster, "-o size=16m");
    alice.wait_for("ready with");
    let data = cluster.dir.join("data");
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

/// Alice, with a file system of her own, in memory, for her folder.
fn on_its_own(cluster: &Cluster, options: &str) -> Node {
    let data = cluster.dir.join("data");
    fs::create_dir_all(&data).unwrap();
    let script = format!(
        "mount -t tmpfs {options} none '{}' && exec \"$0\" serve alice",
        data.display()
    );
    let mut alice = Command::new("unshare");
    alice
        .args(["-m", "sh", "-c", &script])
        .arg(cluster.command().get_program());
    Node::spawn(alice.current_dir(&cluster.dir))
}

/// Writes one key again and again, until this has happened, and kills all nodes; the last write that was answered.
fn write_until(cluster: &Cluster, happens: impl Fn() -> bool) -> u64 {
    let ends = AtomicBool::new(false);
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
        wait_until(happens);
        ends.store(true, SeqCst);
        kill_all(cluster);
        writer.join().unwrap()
    })
}

/// Whether alice has written all anew since now.
fn is_based(cluster: &Cluster) -> impl Fn() -> bool {
    let based = newest_base(cluster);
    move || newest_base(cluster) > based
}

/// Whether alice is writing all anew. She is stopped then, so that she does not end it before she is killed.
fn is_being_based(cluster: &Cluster) -> bool {
    let is_begun = || {
        names(cluster)
            .iter()
            .any(|name| name.ends_with(".base.new"))
    };
    if !is_begun() {
        return false;
    }
    cluster.signal("alice", "STOP");
    let is_begun = is_begun();
    if !is_begun {
        cluster.signal("alice", "CONT");
    }
    is_begun
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

/// Stops and starts each node, and waits until it is ready before the next one.
fn one_after_the_other(cluster: &mut Cluster) {
    for name in THREE {
        cluster.stop(name);
        cluster.start(name);
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
    let names = names(cluster);
    let bases = names.iter().filter_map(|name| name.strip_suffix(".base"));
    bases
        .map(|number| number.parse().unwrap())
        .max()
        .unwrap_or(0)
}

/// The files of alice.
fn names(cluster: &Cluster) -> Vec<String> {
    let entries = fs::read_dir(folder(cluster, "alice")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name());
    names.map(|name| name.into_string().unwrap()).collect()
}

fn wait_until(happens: impl Fn() -> bool) {
    let begun = std::time::Instant::now();
    while !happens() {
        assert!(begun.elapsed().as_secs() < 60, "it does not happen");
        thread::yield_now();
        thread::sleep(Duration::from_millis(1));
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
        // It waits for nodes that were killed, as long as an operation may.
        let client = Arc::new(cluster.client_within("cluster.toml", Duration::from_millis(500)));
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

//! A real cluster for a test: processes of their own, on ports of their own.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

use kv54::client::Client;
use kv54::cluster;
use kv54::replicas::Replicas;
use kv54::rpc::tcp;
use kv54::store::Store;

pub const FIVE: [&str; 5] = ["alice", "bob", "carol", "dave", "erin"];

pub mod gateway;
pub mod history;
pub mod wire;

/// Long enough for anything that will happen at all.
const PATIENCE: Duration = Duration::from_secs(30);

/// A directory with a `cluster.toml`, and the nodes that run from it.
pub struct Cluster {
    pub dir: PathBuf,
    pub names: Vec<String>,
    limits: String,
    ports: Ports,
    nodes: Vec<(String, Node)>,
}

/// A block of free ports below those that the system hands out. Its first one stays
/// bound for as long as the block is used, so no other test takes the same.
pub struct Ports {
    base: u16,
    _guard: TcpListener,
}

/// One running process and what it has logged.
pub struct Node {
    child: Child,
    log: Arc<Log>,
}

#[derive(Default)]
struct Log {
    lines: Mutex<Vec<String>>,
    grown: Condvar,
}

/// How long this machine has kept a thread from running that asked for a millisecond of sleep,
/// all such times together, and the longest of them.
pub struct Hiccups(Arc<Mutex<Late>>, Arc<AtomicBool>);

#[derive(Clone, Copy, Default)]
struct Late {
    sum: Duration,
    longest: Duration,
    sleeps: u64,
}

/// What a command printed, and its exit code.
#[derive(Debug)]
pub struct Said {
    pub code: i32,
    pub out: Vec<u8>,
    pub err: String,
}

impl Ports {
    pub fn block() -> Ports {
        let start = u16::try_from(std::process::id() % 1000).unwrap();
        for block in (0..1000).map(|n| (start + n * 7) % 1000) {
            let base = 12_000 + block * 20;
            let Ok(guard) = TcpListener::bind(("127.0.0.1", base)) else {
                continue;
            };
            if (1..20).all(|n| TcpListener::bind(("127.0.0.1", base + n)).is_ok()) {
                return Ports {
                    base,
                    _guard: guard,
                };
            }
        }
        panic!("no block of 20 free ports");
    }

    /// The `n`th port of the block, from 1 to 19.
    pub fn port(&self, n: usize) -> u16 {
        assert!((1..20).contains(&n));
        self.base + u16::try_from(n).unwrap()
    }
}

impl Cluster {
    /// A file that names these nodes; none is running yet.
    pub fn of(names: &[&str]) -> Cluster {
        Cluster::with_limits(names, "")
    }

    /// The same with lines for `[limits]`.
    pub fn with_limits(names: &[&str], limits: &str) -> Cluster {
        let ports = Ports::block();
        let dir =
            PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("cluster-{}", ports.base));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let cluster = Cluster {
            dir,
            names,
            limits: limits.to_owned(),
            ports,
            nodes: Vec::new(),
        };
        let names: Vec<&str> = cluster.names.iter().map(String::as_str).collect();
        cluster.ring_file("cluster.toml", &names, &[]);
        cluster
    }

    /// Writes a file of a ring of these nodes, and of those that leave it.
    pub fn ring_file(&self, file: &str, nodes: &[&str], leaving: &[&str]) {
        let lines = |names: &[&str]| {
            let lines = names.iter();
            let lines = lines.map(|name| format!("{name} = {:?}\n", self.address(name)));
            lines.collect::<String>()
        };
        let (nodes, leaving) = (lines(nodes), lines(leaving));
        // Stories are the same on any machine, unless they are told in several threads.
        let threads = std::env::var("KV54_TEST_THREADS").unwrap_or_else(|_| "1".to_owned());
        let limits = match self.limits.contains("threads") {
            true => self.limits.clone(),
            false => format!("threads = {threads}\n{}", self.limits), // a table may follow them
        };
        let leaving = match &*leaving {
            "" => String::new(),
            leaving => format!("[leaving]\n{leaving}\n"),
        };
        self.file(
            file,
            &format!("[nodes]\n{nodes}\n{leaving}[limits]\n{limits}\n"),
        );
    }

    /// Five nodes, running.
    pub fn five() -> Cluster {
        Cluster::running(&FIVE)
    }

    /// These nodes, running and ready.
    pub fn running(names: &[&str]) -> Cluster {
        let mut cluster = Cluster::of(names);
        cluster.start_all();
        cluster
    }

    /// Starts every node and waits until all are ready.
    pub fn start_all(&mut self) {
        for name in self.names.clone() {
            self.start(&name);
        }
        for name in &self.names {
            self.node(name).wait_for("ready with");
        }
    }

    /// Starts a node and waits until it listens.
    pub fn start(&mut self, name: &str) {
        let node = self.spawn(["serve", name]);
        node.wait_for("listening on");
        self.nodes.push((name.to_owned(), node));
    }

    /// Starts a node that reads this file, and waits until it listens.
    pub fn start_with(&mut self, name: &str, file: &str) {
        let node = self.spawn(["serve", name, "--config", file]);
        node.wait_for("listening on");
        self.nodes.push((name.to_owned(), node));
    }

    /// `kill -9`, a new start, and all that is to be caught up.
    pub fn restart(&mut self, name: &str) {
        self.kill(name);
        self.start(name);
        self.node(name).wait_for("ready with");
    }

    /// Starts a node that reads this file and listens here, which is not where others dial it.
    pub fn start_behind(&mut self, name: &str, file: &str, listen: &str) {
        let node = self.spawn(["serve", name, "--config", file, "--listen", listen]);
        node.wait_for("listening on");
        self.nodes.push((name.to_owned(), node));
    }

    /// Starts a node in a shell that has set this limit of its own, as `ulimit` takes it.
    pub fn start_under(&mut self, ulimit: &str, name: &str) {
        let kv54 = self.command();
        let mut shell = Command::new("sh");
        let script = format!("ulimit {ulimit}; exec \"$0\" serve {name}");
        shell.args(["-c", &script]).arg(kv54.get_program());
        shell.current_dir(&self.dir).env_remove("KV54_LOG");
        let node = Node::spawn(&mut shell);
        node.wait_for("listening on");
        self.nodes.push((name.to_owned(), node));
    }

    /// Every node that runs reads its file again, and has said this of it.
    pub fn reload(&self, says: &str) {
        for (_, node) in &self.nodes {
            node.signal("HUP");
        }
        for (_, node) in &self.nodes {
            node.wait_for(says);
        }
    }

    /// Changes something in `cluster.toml`.
    pub fn edit(&self, old: &str, new: &str) {
        let text = std::fs::read_to_string(self.dir.join("cluster.toml")).unwrap();
        assert!(text.contains(old), "no {old:?} in {text}");
        self.file("cluster.toml", &text.replace(old, new));
    }

    /// SIGTERM, and the end of the process.
    pub fn stop(&mut self, name: &str) {
        self.signal(name, "TERM");
        let place = self.nodes.iter().position(|(node, _)| node == name);
        let (_, mut node) = self.nodes.remove(place.unwrap());
        assert_eq!(node.wait(), 0, "{name}: {:?}", node.log());
    }

    /// Waits until every node says that it is ready.
    #[track_caller]
    pub fn wait_until_ready(&self) {
        self.kv54(["status", "--wait", "--timeout", "60s"]).exits(0);
    }

    /// The parts of which not all replicas show the same digest.
    pub fn differences(&self) -> Vec<String> {
        differences(&self.kv54(["status", "--json"]).json())
    }

    /// Waits until all replicas of each part show the same digest.
    #[track_caller]
    pub fn wait_until_equal(&self) -> Duration {
        wait_until_equal(|| self.kv54(["status", "--json"]).json())
    }

    /// Runs a command of kv54 in the background.
    pub fn spawn<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Node {
        Node::spawn(self.command().args(args))
    }

    /// A command of kv54 in this cluster's directory, without this process's own settings.
    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kv54"));
        command
            .current_dir(&self.dir)
            .env_remove("KV54_CONFIG")
            .env_remove("KV54_LOG");
        command
    }

    /// Runs a command of kv54 to its end.
    pub fn kv54<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Said {
        self.kv54_with(args, b"")
    }

    /// The same with this standard input.
    pub fn kv54_with<A: AsRef<OsStr>>(
        &self,
        args: impl IntoIterator<Item = A>,
        input: &[u8],
    ) -> Said {
        let mut command = self.command();
        command
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let output = std::thread::scope(|scope| {
            scope.spawn(move || {
                let _ = stdin.write_all(input); // a command that does not read it may be gone
            });
            child.wait_with_output().unwrap()
        });
        let err = String::from_utf8(output.stderr).unwrap();
        Said {
            code: output.status.code().unwrap_or(-1),
            out: output.stdout,
            err,
        }
    }

    /// `kill -9`: the node's memory is gone.
    pub fn kill(&mut self, name: &str) {
        let place = self
            .nodes
            .iter()
            .position(|(node, _)| node == name)
            .unwrap();
        drop(self.nodes.remove(place));
    }

    /// Sends a signal (`STOP`, `CONT`, `TERM`) to a node's process.
    pub fn signal(&self, name: &str, signal: &str) {
        self.node(name).signal(signal);
    }

    pub fn node(&self, name: &str) -> &Node {
        &self.nodes.iter().find(|(node, _)| node == name).unwrap().1
    }

    /// All nodes that are running, by name.
    pub fn running_nodes(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.nodes.iter().map(|(name, node)| (name.as_str(), node))
    }

    /// Where a node listens.
    pub fn address(&self, name: &str) -> String {
        let place = self.names.iter().position(|node| node == name).unwrap();
        format!("127.0.0.1:{}", self.ports.port(place + 1))
    }

    /// A port of this test's own that no node uses.
    pub fn spare_port(&self, n: usize) -> u16 {
        self.ports.port(19 - n)
    }

    /// Writes a file beside `cluster.toml`.
    pub fn file(&self, name: &str, text: &str) {
        std::fs::write(self.dir.join(name), text).unwrap();
    }

    pub fn ring(&self) -> Arc<cluster::Cluster> {
        self.ring_of("cluster.toml")
    }

    pub fn ring_of(&self, file: &str) -> Arc<cluster::Cluster> {
        Arc::new(cluster::Cluster::read(&self.dir.join(file)).unwrap())
    }

    /// The memory of the node at this place, who is ready, without a process.
    pub fn ready_store(&self, place: usize) -> Store {
        let store = Store::new(self.ring(), place);
        store.heard_all();
        for (place, parts) in store.at(0).shared() {
            for part in parts {
                store.at(0).mark_read(part, place);
            }
        }
        store
    }

    /// A client of this process.
    pub fn client(&self) -> Client {
        self.client_with("cluster.toml")
    }

    /// The same with this file.
    pub fn client_with(&self, file: &str) -> Client {
        self.client_within(file, Duration::from_secs(5))
    }

    /// The same whose operations have so much time.
    pub fn client_within(&self, file: &str, timeout: Duration) -> Client {
        Client {
            replicas: Replicas::new(self.ring_of(file), timeout, &tcp()),
        }
    }

    /// The names of a key's replicas, the owner first.
    pub fn replicas(&self, key: &str) -> Vec<String> {
        let ring = self.ring();
        let places = ring.replicas(ring.owner(key.as_bytes()));
        places
            .map(|place| ring.nodes()[place].name.clone())
            .collect()
    }

    /// The first of `name0`, `name1`, … whose replicas are these, in any order.
    pub fn key_on(&self, nodes: &[&str]) -> String {
        let on = |key: &String| {
            self.replicas(key)
                .iter()
                .all(|node| nodes.contains(&node.as_str()))
        };
        (0..10_000).map(|n| format!("key{n}")).find(on).unwrap()
    }
}

impl Hiccups {
    pub fn watch() -> Hiccups {
        let watch = Hiccups(Arc::default(), Arc::default());
        let (seen, done) = (watch.0.clone(), watch.1.clone());
        std::thread::spawn(move || {
            let (asked, usual) = (Duration::from_millis(1), Duration::from_millis(2));
            while !done.load(Relaxed) {
                let start = Instant::now();
                std::thread::sleep(asked);
                let late = start.elapsed().saturating_sub(asked);
                let mut seen = seen.lock().unwrap();
                seen.sleeps += 1;
                if late > usual {
                    seen.sum += late;
                    seen.longest = late.max(seen.longest);
                }
            }
        });
        watch
    }

    pub fn sum(&self) -> Duration {
        self.until_now().sum
    }

    pub fn longest(&self) -> Duration {
        self.until_now().longest
    }

    /// Where the machine has stood still, others may run before the thread that notices.
    fn until_now(&self) -> Late {
        let look = || *self.0.lock().unwrap();
        let begun = look();
        loop {
            match look() {
                late if late.sleeps > begun.sleeps => return late,
                _ => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}

impl Drop for Hiccups {
    fn drop(&mut self) {
        self.1.store(true, Relaxed);
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for (name, node) in &self.nodes {
                // Also where a wait for a line has failed, which poisons the lock.
                let lines = node
                    .log
                    .lines
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                eprintln!("-- the log of {name}:\n{}", lines.join("\n"));
            }
        }
        self.nodes.clear();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

impl Node {
    pub fn spawn(command: &mut Command) -> Node {
        Node::spawn_with(command, Stdio::null())
    }

    /// The same with this standard input.
    pub fn spawn_with(command: &mut Command, input: impl Into<Stdio>) -> Node {
        let mut child = command.stdin(input).stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let log = Arc::new(Log::default());
        let growing = log.clone();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                growing.lines.lock().unwrap().push(line);
                growing.grown.notify_all();
            }
        });
        Node { child, log }
    }

    /// Waits for a log line with this text in it, and gives it back.
    pub fn wait_for(&self, text: &str) -> String {
        let lines = self.log.lines.lock().unwrap();
        let missing = |lines: &mut Vec<String>| !lines.iter().any(|line| line.contains(text));
        let (lines, late) = self
            .log
            .grown
            .wait_timeout_while(lines, PATIENCE, missing)
            .unwrap();
        assert!(
            !late.timed_out(),
            "no {text:?} in the log:\n{}",
            lines.join("\n")
        );
        lines
            .iter()
            .find(|line| line.contains(text))
            .unwrap()
            .clone()
    }

    pub fn log(&self) -> Vec<String> {
        self.log.lines.lock().unwrap().clone()
    }

    pub fn signal(&self, signal: &str) {
        kill(signal, self.child.id());
    }

    /// Waits for the process to end; its exit code.
    pub fn wait(&mut self) -> i32 {
        self.child.wait().unwrap().code().unwrap_or(-1)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Said {
    /// Standard output as text.
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.out).unwrap()
    }

    /// Asserts the exit code; the message shows everything.
    #[track_caller]
    pub fn exits(self, code: i32) -> Said {
        assert_eq!(self.code, code, "{self:?}");
        self
    }

    /// Asserts that standard error is one line with all of these in it.
    #[track_caller]
    pub fn says(self, parts: &[&str]) -> Said {
        assert_eq!(self.err.trim_end().lines().count(), 1, "one line: {self:?}");
        for part in parts {
            assert!(self.err.contains(part), "{part:?} is missing: {self:?}");
        }
        self
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.out).unwrap()
    }
}

/// Sends a signal to a process. After `STOP` it returns when the process stands still: one that runs on another
/// core may answer once more until the signal reaches it.
pub fn kill(signal: &str, pid: u32) {
    let kill = format!("kill -{signal} {pid}");
    let done = Command::new("sh").args(["-c", &kill]).status();
    assert!(done.unwrap().success(), "{kill}");
    let runs = || {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task"));
        threads.into_iter().flatten().any(|thread| {
            let state = std::fs::read_to_string(thread.unwrap().path().join("stat"));
            state.is_ok_and(|state| !state.contains(") T "))
        })
    };
    let start = Instant::now();
    while signal == "STOP" && runs() {
        assert!(start.elapsed() < PATIENCE, "{pid} does not stop");
    }
}

/// The folder of the examples, which are built first where they must be.
pub fn examples() -> PathBuf {
    static BUILT: Once = Once::new();
    let profile = Path::new(env!("CARGO_BIN_EXE_kv54")).parent().unwrap();
    BUILT.call_once(|| {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--examples", "--quiet", "--locked"]);
        cargo.args(profile.ends_with("release").then_some("--release"));
        cargo.arg("--target-dir").arg(profile.parent().unwrap());
        cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
        assert!(cargo.status().unwrap().success());
    });
    profile.join("examples")
}

/// The parts of which not all replicas show the same digest, and what each of them shows.
pub fn differences(status: &serde_json::Value) -> Vec<String> {
    let nodes = status["nodes"].as_array().unwrap();
    let mut parts = Vec::new();
    for owner in nodes.iter().map(|node| node["name"].as_str().unwrap()) {
        let shown: Vec<String> = (nodes.iter())
            .filter(|node| node["state"] == "down" || node["digests"][owner].is_string())
            .map(|node| format!("{} {}", node["name"], node["digests"][owner]))
            .collect();
        let digests = shown.iter().map(|line| line.split_once(' ').unwrap().1);
        let different: std::collections::BTreeSet<_> = digests.collect();
        if different.len() != 1 || shown.len() != nodes.len().min(3) {
            parts.push(format!("part {owner}: {}", shown.join(", ")));
        }
    }
    parts
}

/// Waits until this status shows the same digest at all replicas of each part, which takes
/// 10 s at most and what the machine itself took; how long it was.
#[track_caller]
pub fn wait_until_equal(status: impl Fn() -> serde_json::Value) -> Duration {
    let (start, hiccups) = (Instant::now(), Hiccups::watch());
    loop {
        let (waited, differences) = (start.elapsed(), differences(&status()));
        if differences.is_empty() {
            return waited;
        }
        let allowed = Duration::from_secs(10) + hiccups.sum();
        assert!(waited < allowed, "after {waited:?}: {differences:#?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Runs a story that asks nodes from this process.
pub fn block_on<T>(story: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(story)
}

//! The examples do what the README shows.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::fs;
use std::io::read_to_string;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Once;
use std::sync::mpsc::channel;
use std::thread::{sleep, spawn};
use std::time::{Duration, Instant};

use common::{Cluster, Ports, block_on};
use kv54::cluster::Node;
use kv54::error::Kind;
use kv54::rpc::codec::{decode, encode};
use kv54::rpc::{Peer, tcp};
use msgpack_rpc::Value;

static BUILT: Once = Once::new();
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
        let node = Node {
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
    let said = example_in(folder, "essay", words).output().unwrap();
    let text = || String::from_utf8(said.stdout).unwrap().trim().to_owned();
    said.status.success().then(text)
}

#[test]
fn the_first_step_is_twenty_lines_and_the_essay_54() {
    let steps = [
        (include_str!("../examples/one_node.rs"), 20),
        (include_str!("../examples/essay.rs"), 54),
    ];
    for (source, most) in steps {
        let code = |line: &&str| !line.trim().is_empty() && !line.trim().starts_with("//");
        assert!(source.lines().filter(code).count() <= most);
    }
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

/// An example, built where it must be, that runs in this folder. On Unix, cargo then becomes the example.
fn example_in(folder: &Path, name: &str, args: &[&str]) -> Command {
    let cargo = |command| {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args([command, "--quiet", "--locked"]);
        cargo.args([
            "--manifest-path",
            concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"),
        ]);
        cargo
    };
    BUILT.call_once(|| assert!(cargo("build").arg("--examples").status().unwrap().success()));
    let mut run = cargo("run");
    run.args(["--example", name, "--"]).args(args);
    run.current_dir(folder).stdout(Stdio::piped());
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

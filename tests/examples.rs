//! The examples do what the README shows.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::io::read_to_string;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::thread::spawn;
use std::time::Duration;

use common::{Ports, block_on};
use kv54::cluster::Node;
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
fn the_first_step_is_twenty_lines() {
    let source = include_str!("../examples/one_node.rs");
    let code = |line: &&str| !line.trim().is_empty() && !line.trim().starts_with("//");
    assert!(source.lines().filter(code).count() <= 20);
}

fn is_unreachable(answer: Result<Value, kv54::error::Error>) -> bool {
    answer.is_err_and(|error| error.kind == Kind::Unavailable)
}

/// An example, built where it must be. On Unix, cargo then becomes the example.
fn example(name: &str, args: &[&str]) -> Running {
    let cargo = |command| {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args([command, "--quiet", "--locked"]);
        cargo
    };
    let built = cargo("build").arg("--examples").status().unwrap();
    assert!(built.success());
    let mut run = cargo("run");
    run.args(["--example", name, "--"]).args(args);
    Running(run.stdout(Stdio::piped()).spawn().unwrap())
}

struct Running(Child);

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

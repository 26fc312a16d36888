//! The examples do what the README shows.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{Ports, block_on};
use kv54::error::Kind;
use kv54::rpc::codec::encode;
use kv54::rpc::{Peer, tcp};
use msgpack_rpc::Value;

/// Long enough for an example that is built.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn one_node_keeps_what_it_is_told() {
    let ports = Ports::block();
    let address = format!("127.0.0.1:{}", ports.port(1));
    let node = example("one_node", &[&address]);
    let story = async {
        let peer = Peer::new(&address, Duration::from_secs(5), tcp());
        let [tea, green, black] = ["tea", "green", "black"].map(|text| encode(&text.into()));
        while is_unreachable(peer.call("get", &[&tea]).await.1) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let ask = async |method, params: &[&[u8]]| peer.call(method, params).await.1;
        assert_eq!(ask("get", &[&tea]).await, Ok(Value::Nil));
        assert_eq!(ask("set", &[&tea, &green]).await, Ok(Value::Nil));
        assert_eq!(ask("get", &[&tea]).await, Ok("green".into()));
        assert_eq!(ask("set", &[&tea, &black]).await, Ok(Value::Nil));
        assert_eq!(ask("get", &[&tea]).await, Ok("black".into()));
        let kind = async |method, params: &[&[u8]]| ask(method, params).await.unwrap_err().kind;
        assert_eq!(kind("get", &[]).await, Kind::BadRequest);
        assert_eq!(kind("brew", &[&tea]).await, Kind::NoSuchMethod);
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
        cargo.args([command, "--quiet", "--locked", "--example", name]);
        cargo
    };
    assert!(cargo("build").status().unwrap().success());
    let mut run = cargo("run");
    run.arg("--").args(args).stdout(Stdio::piped());
    Running(run.spawn().unwrap())
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

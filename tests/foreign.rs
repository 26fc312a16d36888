//! Clients that others wrote. Ruby's speaks here in its own bytes; those that `tests/foreign/run`
//! installs speak for themselves.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::{Cluster, Node, Ports, examples};

/// A node that says nothing for so long has forgotten somebody.
const PATIENCE: Duration = Duration::from_secs(20);

/// What `MessagePack::RPC::Client` of the gem msgpack-rpc sends with a msgpack of 2009: method
/// names (symbols, too) and strings as raw, message ids from 0 in as few bytes as they take.
#[test]
fn ruby_of_2009_sets_and_gets() {
    let cluster = Cluster::five();
    let mut ruby = Ruby::to(&cluster, "alice");

    // call(:set, "key1", "val1"), call(:get, "key1")
    ruby.sends(b"\x94\x00\x00\xa3set\x92\xa4key1\xa4val1");
    ruby.hears(b"\x94\x01\xce\x00\x00\x00\x00\xc0\xc0");
    ruby.sends(b"\x94\x00\x01\xa3get\x91\xa4key1");
    ruby.hears(b"\x94\x01\xce\x00\x00\x00\x01\xc0\xa4val1");

    // 300 bytes that are no text go in as raw16 and come back as the same raw16.
    let bytes = [0xff; 300];
    ruby.sends(
        &[
            b"\x94\x00\x02\xa3set\x92\xa4\xff\xfe\xfd\xfc\xda\x01\x2c",
            &bytes[..],
        ]
        .concat(),
    );
    ruby.hears(b"\x94\x01\xce\x00\x00\x00\x02\xc0\xc0");
    ruby.sends(b"\x94\x00\x03\xa3get\x91\xa4\xff\xfe\xfd\xfc");
    ruby.hears(&[b"\x94\x01\xce\x00\x00\x00\x03\xc0\xda\x01\x2c", &bytes[..]].concat());

    // A raw32, and text: it comes back as it went in.
    let text = vec![b'x'; 70_000];
    ruby.sends(
        &[
            b"\x94\x00\x04\xa3set\x92\xa4key1\xdb\x00\x01\x11\x70",
            &text[..],
        ]
        .concat(),
    );
    ruby.hears(b"\x94\x01\xce\x00\x00\x00\x04\xc0\xc0");
    ruby.sends(b"\x94\x00\x05\xa3get\x91\xa4key1");
    ruby.hears(
        &[
            b"\x94\x01\xce\x00\x00\x00\x05\xc0\xdb\x00\x01\x11\x70",
            &text[..],
        ]
        .concat(),
    );

    // 100 bytes of text come back as raw16: a str with a length of one byte would be nothing it knows.
    let text = [b'x'; 100];
    ruby.sends(&[b"\x94\x00\x08\xa3set\x92\xa4key1\xda\x00\x64", &text[..]].concat());
    ruby.hears(b"\x94\x01\xce\x00\x00\x00\x08\xc0\xc0");
    ruby.sends(b"\x94\x00\x09\xa3get\x91\xa4key1");
    ruby.hears(&[b"\x94\x01\xce\x00\x00\x00\x09\xc0\xda\x00\x64", &text[..]].concat());

    // A missing key is nil; an error without a result is raised as a RuntimeError with this text.
    ruby.sends(b"\x94\x00\x06\xa3get\x91\xa4key2");
    ruby.hears(b"\x94\x01\xce\x00\x00\x00\x06\xc0\xc0");
    ruby.sends(b"\x94\x00\x07\xa5steep\x91\xa4key1");
    ruby.hears(b"\x94\x01\xce\x00\x00\x00\x07\xb7no-such-method: \"steep\"\xc0");
    ruby.sends(b"\x94\x00\x0a\xa3get\x90");
    ruby.hears(b"\x94\x01\xce\x00\x00\x00\x0a\xda\x00\x2ebad-request: get takes [key], not 0 parameters\xc0");

    // The id after 127 takes two bytes, the one after 255 three.
    ruby.sends(b"\x94\x00\xcc\x80\xa3get\x91\xa4key2");
    ruby.hears(b"\x94\x01\xce\x00\x00\x00\x80\xc0\xc0");
    ruby.sends(b"\x94\x00\xcd\x01\x00\xa3get\x91\xa4key2");
    ruby.hears(b"\x94\x01\xce\x00\x00\x01\x00\xc0\xc0");
}

#[test]
#[ignore = "tests/foreign/run installs the clients and runs this"]
fn every_client_sets_gets_and_outlives_a_node() {
    let clients = ["msgpack_rpc_python", "aio_msgpack_rpc", "pynvim", "neovim"];
    let mut cluster = Cluster::five();
    for name in clients {
        let pid = cluster.node("alice").pid().to_string();
        let (alice, bob) = (port(&cluster, "alice"), port(&cluster, "bob"));
        run(name, &["story", &alice, &bob, &pid, name]);
        cluster.restart("alice");
        cluster.wait_until_ready();
    }
    for name in clients {
        let carol = port(&cluster, "carol");
        run(name, &[&["finds", &carol], &clients[..]].concat());
        println!("{name} says what it should, and finds what the others have left");
    }
}

/// `status --metrics`, read by the parser of Prometheus's own client for Python.
#[test]
#[ignore = "tests/foreign/run installs the clients and runs this"]
fn prometheus_reads_what_the_nodes_have_counted() {
    let mut cluster = Cluster::five();
    for _ in 0..3 {
        cluster
            .kv54(["set", "tea", "green", "--via", "alice"])
            .exits(0);
    }
    cluster.kill("erin");
    let page = cluster.kv54(["status", "--metrics"]).exits(0);
    std::fs::write(cluster.dir.join("kv54.prom"), page.out).unwrap();
    let page = cluster.dir.join("kv54.prom").display().to_string();
    run("prometheus", &[&page, "alice", "3", "erin"]);
}

/// The ten lines of `docs/wire.md` that go on to the next node where one is silent or gone.
#[test]
#[ignore = "tests/foreign/run installs the clients and runs this"]
fn the_client_of_the_docs_goes_on_to_the_next_node() {
    let cluster = Cluster::five();
    let wire = std::fs::read_to_string("docs/wire.md").unwrap();
    let blocks = wire.split("```python\n").skip(1);
    let blocks = blocks.map(|block| block.split("```").next().unwrap());
    let mut client = blocks.last().unwrap().replace("timeout=6", "timeout=1");
    for (at, name) in (5401..).zip(["alice", "bob", "carol"]) {
        client = client.replace(&at.to_string(), &port(&cluster, name));
    }
    assert_eq!(client.lines().filter(|line| !line.is_empty()).count(), 14);
    let says = |story: &str| {
        let script = cluster.dir.join("client.py");
        std::fs::write(&script, format!("{client}\n{story}\n")).unwrap();
        let python = Path::new(env!("CARGO_TARGET_TMPDIR")).join("../foreign/pynvim/bin/python");
        let output = Command::new(python).arg(script).output().unwrap();
        String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
    };
    let story = "ask('set', 'tea', 'green'); print(ask('get', 'tea'))";
    assert_eq!(says(story), "green\n");
    cluster.signal("alice", "STOP");
    assert_eq!(says(story), "green\n", "alice is silent");
    let refused = says("ask('steep', 'tea')");
    assert!(refused.contains("no-such-method: "), "{refused}");
    for name in ["alice", "bob", "carol"] {
        cluster.signal(name, "KILL");
    }
    let nobody = says(story);
    assert!(nobody.contains("no node answers"), "{nobody}");
}

/// memcached's clients, through the gateway, each with a node that it kills.
#[test]
#[ignore = "tests/foreign/run installs the clients and runs this"]
fn every_client_of_memcached_outlives_a_node() {
    let mut cluster = Cluster::five();
    let gateway = cluster.spawn(["memcached", "--listen", "127.0.0.1:0", "--allow-flush"]);
    let address = gateway.wait_for("listening on ");
    let port = address.rsplit_once(':').unwrap().1;
    let capable = Command::new("timeout")
        .args(["60", "memccapable", "-a", "-h", "127.0.0.1", "-p", port])
        .output();
    let capable = capable.unwrap();
    let said = String::from_utf8_lossy(&capable.stdout);
    assert!(capable.status.success(), "memccapable: {said}");
    assert_eq!(said.matches("[pass]").count(), 27, "{said}");
    for name in ["pymemcache", "pylibmc", "emcache", "meta_memcache"] {
        let pid = cluster.node("alice").pid().to_string();
        run("memcached", &[name, port, &pid]);
        cluster.restart("alice");
        println!("{name} says what it should, and hears what it should");
    }
}

/// 10,000 tasks through `examples/queue`, by pymemcache in eight processes, one of the nodes killed.
#[test]
#[ignore = "tests/foreign/run installs the clients and runs this"]
fn producers_and_workers_with_a_client_of_memcached_outlive_a_node() {
    let (cluster, ports) = (Cluster::five(), Ports::block());
    let port = ports.port(1).to_string();
    let mut queue = Command::new(examples().join("queue"));
    queue
        .arg(format!("127.0.0.1:{port}"))
        .current_dir(&cluster.dir);
    let _queue = Node::spawn(queue.env_remove("KV54_CONFIG"));
    let begun = Instant::now();
    while TcpStream::connect(("127.0.0.1", ports.port(1))).is_err() {
        assert!(begun.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(20));
    }
    let pid = cluster.node("alice").pid().to_string();
    run("memcached", &["queue", &port, &pid]);
    println!("pymemcache puts and takes each task once");
}

/// Runs a client's script to its end.
fn run(name: &str, args: &[&str]) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut command = Command::new("timeout");
    command.args(["--foreground", "120"]);
    if name == "neovim" {
        let script = root.join("tests/foreign/via_neovim.vim");
        command
            .args(["nvim", "--headless", "--clean", "-n", "-S"])
            .arg(script);
    } else {
        let python =
            Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("../foreign/{name}/bin/python"));
        let script = root.join(format!("tests/foreign/via_{name}.py"));
        command.arg(python).arg("-B").arg(script);
    }
    let output = command.args(args).output().unwrap();
    let said = [&output.stdout[..], &output.stderr[..]].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(
        output.status.success(),
        "{name} {args:?}: {}\n{said}",
        output.status
    );
}

fn port(cluster: &Cluster, node: &str) -> String {
    let address = cluster.address(node);
    address.rsplit_once(':').unwrap().1.to_owned()
}

/// A connection on which every byte is as Ruby has it.
struct Ruby(TcpStream);

impl Ruby {
    fn to(cluster: &Cluster, node: &str) -> Ruby {
        let stream = TcpStream::connect(cluster.address(node)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Ruby(stream)
    }

    fn sends(&mut self, frame: &[u8]) {
        self.0.write_all(frame).unwrap();
    }

    #[track_caller]
    fn hears(&mut self, frame: &[u8]) {
        let mut heard = vec![0; frame.len()];
        self.0.read_exact(&mut heard).unwrap();
        assert!(
            heard == frame,
            "{:x?} came, not {:x?}",
            start(&heard),
            start(frame)
        );
    }
}

fn start(frame: &[u8]) -> &[u8] {
    &frame[..frame.len().min(40)]
}

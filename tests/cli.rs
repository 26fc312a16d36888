//! What a person types, and what comes back: output, errors, exit codes, signals.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::ffi::OsStr;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::ffi::OsStrExt as _;
use std::time::{Duration, Instant};

use common::{Cluster, FIVE, Node};
use kv54::rpc::codec::{encode, write_request};
use msgpack_rpc::Value;
use rmpv::decode::read_value;
use serde_json::json;

#[test]
fn set_get_delete_and_where_answer_in_plain_words() {
    let cluster = Cluster::five();
    let set = cluster.kv54(["set", "tea", "green"]).exits(0);
    assert_eq!((set.text(), &*set.err), ("ok\n", ""));
    let get = cluster.kv54(["get", "tea"]).exits(0);
    assert_eq!((get.text(), &*get.err), ("green\n", ""));
    assert_eq!(cluster.kv54(["get", "tea", "--raw"]).exits(0).out, b"green");
    cluster.kv54(["set", "tea", "-5"]).exits(0);
    assert_eq!(cluster.kv54(["get", "tea"]).exits(0).text(), "-5\n");
    let told = cluster.kv54(["where", "tea"]).exits(0);
    let lines: Vec<&str> = told.text().lines().collect();
    assert_eq!(lines[0], r#"crc32("tea") = 2391201714, 2391201714 % 5 = 4"#);
    for (line, (node, role)) in
        lines[2..]
            .iter()
            .zip([("erin", "owner"), ("alice", "copy"), ("bob", "copy")])
    {
        assert!(
            line.starts_with(node) && line.contains(role) && line.contains("  2-"),
            "{told:?}"
        );
    }
    cluster.kv54(["del", "tea"]).exits(0);
    cluster.kv54(["delete", "tea"]).exits(0);
    let told = cluster.kv54(["where", "tea"]).exits(0);
    assert_eq!(told.text().matches(" (deleted)").count(), 3, "{told:?}");
    let get = cluster.kv54(["get", "tea"]).exits(1);
    assert_eq!(get.text(), "");
    get.says(&["\"tea\" is absent"]);
    cluster.kv54(["set", "-5", "below"]).exits(0);
    assert_eq!(cluster.kv54(["get", "-5"]).exits(0).text(), "below\n");
    let told = cluster.kv54(["where", "never"]).exits(0);
    assert_eq!(told.text().matches("nothing").count(), 3);
}

#[test]
fn without_a_value_standard_input_is_the_value_byte_for_byte() {
    let cluster = Cluster::running(&["alice"]);
    for args in [&["set", "tea"][..], &["set", "tea", "-"]] {
        for value in [&b"green\n"[..], b"", b"\xff\x00\x1b[31m\r\n"] {
            cluster.kv54_with(args, value).exits(0);
            assert_eq!(cluster.kv54(["get", "tea", "--raw"]).exits(0).out, value);
        }
    }
    // Keys and arguments are bytes as well.
    let key = OsStr::from_bytes(b"\xfe\xff");
    cluster
        .kv54([OsStr::new("set"), key, OsStr::from_bytes(b"\x80")])
        .exits(0);
    let get = cluster
        .kv54([OsStr::new("get"), key, OsStr::new("--json")])
        .exits(0);
    assert_eq!(
        get.json(),
        json!({ "key_base64": "/v8=", "value_base64": "gA==" })
    );
    let told = cluster.kv54([OsStr::new("where"), key]).exits(0);
    assert!(
        told.text().starts_with(r#"crc32("\xfe\xff") = "#),
        "{told:?}"
    );
    let absent = cluster.kv54([OsStr::new("get"), OsStr::from_bytes(b"\xfe")]);
    absent.exits(1).says(&[r#"key "\xfe" is absent"#]);
}

#[test]
fn several_keys_are_several_lines() {
    let cluster = Cluster::five();
    cluster.kv54(["set", "tea", "green"]).exits(0);
    cluster.kv54(["set", "milk", "white"]).exits(0);
    for via in [&[][..], &["--via", "dave"]] {
        let get = |keys: &[&str]| cluster.kv54([&["get"], keys, via].concat());
        let both = get(&["tea", "milk", "tea"]).exits(0);
        let lines = "tea\tgreen\nmilk\twhite\ntea\tgreen\n";
        assert_eq!((both.text(), &*both.err), (lines, ""));
        let one = get(&["tea", "honey"]).exits(1);
        assert_eq!(one.text(), "tea\tgreen\n");
        one.says(&["key \"honey\" is absent"]);
        let none = get(&["rum", "honey", "salt"]).exits(1);
        assert_eq!(none.text(), "");
        none.says(&["keys \"rum\", \"honey\" and \"salt\" are absent"]);
        let list = get(&["milk", "honey", "--json"]).exits(1);
        let expected =
            json!([{ "key": "milk", "value": "white" }, { "key": "honey", "value": null }]);
        assert_eq!((list.json(), &*list.err), (expected, ""));
    }
    let keys: Vec<String> = (0..200).map(|n| format!("key{n}")).collect();
    for key in &keys {
        cluster.kv54(["set", key, key]).exits(0);
    }
    let all = cluster.kv54([&["get".to_owned()], &keys[..]].concat());
    let lines: Vec<String> = keys.iter().map(|key| format!("{key}\t{key}\n")).collect();
    assert_eq!(all.exits(0).text(), lines.concat());
    let raw = cluster.kv54(["get", "tea", "milk", "--raw"]).exits(2);
    raw.says(&["--raw prints the value of one key"]);
}

#[test]
fn who_does_not_answer_is_named_and_so_is_who_does() {
    let mut cluster = Cluster::five();
    let tea = cluster.key_on(&["alice", "bob", "carol"]);
    cluster.kill("bob");
    cluster.kill("carol");
    let refused = |name: &str| format!("{name}: {}: connection refused", cluster.address(name));
    let (bob, carol) = (refused("bob"), refused("carol"));
    let states = "; alice, dave and erin are ready, bob and carol are down\n";
    let parts = [&*tea, "1 of 3", "2 needed", &bob, &carol, states];
    for args in [
        &["get", &tea][..],
        &["get", &tea, "--json"],
        &["get", "tea", &tea],
        &["set", &tea, "green"],
        &["delete", &tea],
    ] {
        let args = [args, &["--timeout", "300ms"]].concat();
        // The last attempt may have a few milliseconds, too little for a machine that does other things.
        let mut said = (0..5).map(|_| cluster.kv54(&args).exits(3));
        let said = said.find(|said| said.err.contains("1 of 3")).unwrap();
        assert_eq!(said.text(), "", "an error is text, also with --json");
        said.says(&parts);
    }
    let via = cluster.kv54(["get", "tea", "--via", "bob"]).exits(3);
    via.says(&[&bob, states]);
    let told = cluster.kv54(["where", &tea]).exits(0);
    let bob = told.text().lines().find(|line| line.starts_with("bob"));
    assert!(
        bob.unwrap().ends_with("down     connection refused"),
        "{told:?}"
    );
    let told = cluster.kv54(["where", &tea, "--json"]).exits(0).json();
    let replicas = told["replicas"].as_array().unwrap();
    let error = |name: &str| &replicas.iter().find(|node| node["name"] == name).unwrap()["error"];
    assert_eq!(
        (error("alice"), error("bob")),
        (&json!(null), &json!("connection refused"))
    );
    for name in ["alice", "dave", "erin"] {
        cluster.kill(name);
    }
    let said = cluster.kv54(["get", &tea, "--timeout", "300ms"]).exits(3);
    said.says(&["0 of 3", "; all 5 nodes are down\n"]);
}

#[test]
fn every_command_shows_an_example_of_itself() {
    let cluster = Cluster::of(&["alice"]);
    let help = cluster.kv54(["--help"]).exits(0);
    let commands = help.text().split("Commands:").nth(1).unwrap();
    let commands = commands.split("Options:").next().unwrap().lines();
    let commands: Vec<&str> = commands
        .filter_map(|line| line.strip_prefix("  ")?.split(' ').next())
        .filter(|name| !name.is_empty() && *name != "help")
        .collect();
    assert!(commands.len() >= 9, "{commands:?}");
    for command in commands {
        for args in [[command, "--help"], ["help", command]] {
            let help = cluster.kv54(args).exits(0);
            let examples = help.text().split("Examples:").nth(1).unwrap_or_default();
            assert!(examples.contains(&format!("kv54 {command}")), "{help:?}");
        }
    }
    let help = cluster.kv54(["set", "--help"]).exits(0);
    assert!(help.text().contains("newline at its end"), "{help:?}");
    assert!(help.text().contains("goes on trying for 5s"), "{help:?}");
}

#[test]
fn a_shell_learns_every_command() {
    let cluster = Cluster::of(&["alice"]);
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = cluster.kv54(["completions", shell]).exits(0);
        for word in ["export", "import", "--config", "--via"] {
            let word = if shell == "fish" {
                word.trim_start_matches('-')
            } else {
                word
            };
            assert!(script.text().contains(word), "{shell}: {word}");
        }
    }
    let source = format!(
        "source <({} completions bash); COMP_WORDS=(kv54 exp); COMP_CWORD=1; _kv54 kv54 exp kv54; echo ${{COMPREPLY[*]}}",
        env!("CARGO_BIN_EXE_kv54"),
    );
    let mut bash = std::process::Command::new("bash");
    let completed = bash.args(["-c", &source]).output().unwrap();
    assert_eq!(
        String::from_utf8(completed.stdout).unwrap(),
        "expire export\n"
    );
    cluster
        .kv54(["completions", "dos"])
        .exits(2)
        .says(&["possible values: bash"]);
}

#[test]
fn a_file_that_is_missing_is_named_with_what_to_do() {
    let cluster = Cluster::of(&["alice"]);
    for args in [
        &["get", "tea"][..],
        &["serve", "alice"],
        &["status"],
        &["import"],
    ] {
        let args = [args, &["--config", "none.toml"]].concat();
        cluster.kv54(args).exits(2).says(&[
            "none.toml: there is no such file",
            "--config",
            "KV54_CONFIG",
            "printf '[nodes]\\nalice = \"127.0.0.1:5401\"\\n' > none.toml",
        ]);
    }
    // What it says to type works.
    let said = cluster.kv54(["status", "--config", "none.toml"]);
    let printf = said.err.split(" and ").nth(1).unwrap();
    let printf = printf.split(" makes").next().unwrap();
    let mut bash = std::process::Command::new("bash");
    bash.current_dir(&cluster.dir).args(["-c", printf]);
    assert!(bash.status().unwrap().success());
    let told = cluster.kv54(["where", "tea", "--config", "none.toml", "--json"]);
    assert_eq!(told.json()["replicas"][0]["address"], "127.0.0.1:5401");
    // A directory is there, and is no file.
    let said = cluster.kv54(["status", "--config", "."]).exits(2);
    said.says(&["directory"]);
}

#[test]
fn json_is_one_object_with_the_promised_fields() {
    let mut cluster = Cluster::five();
    let set = cluster.kv54(["set", "tea", "green", "--json"]).exits(0);
    assert_eq!(set.json(), json!({ "key": "tea" }));
    let get = cluster.kv54(["get", "tea", "--json"]).exits(0);
    assert_eq!(get.text(), "{\"key\":\"tea\",\"value\":\"green\"}\n");
    let absent = cluster.kv54(["get", "milk", "--json"]).exits(1);
    assert_eq!(absent.json(), json!({ "key": "milk", "value": null }));
    cluster.kill("alice");
    let told = cluster.kv54(["where", "tea", "--json"]).exits(0).json();
    assert_eq!(told["key"], "tea");
    assert_eq!(
        (&told["hash"], &told["nodes"]),
        (&json!(2_391_201_714_u32), &json!(5))
    );
    let [erin, alice, _] = &told["replicas"].as_array().unwrap()[..] else {
        panic!("{told}")
    };
    assert_eq!(
        (&erin["name"], &erin["state"]),
        (&json!("erin"), &json!("ready"))
    );
    assert_eq!(erin["address"], cluster.address("erin"));
    let (counter, writer) = erin["stamp"].as_str().unwrap().split_once('-').unwrap();
    assert_eq!((counter, writer.parse::<u64>().is_ok()), ("1", true));
    assert_eq!(
        (&alice["state"], &alice["stamp"]),
        (&json!("down"), &json!(null))
    );
    let status = cluster.kv54(["status", "--json"]).exits(3).json();
    let nodes = status["nodes"].as_array().unwrap();
    assert_eq!(
        nodes.iter().map(|node| &node["name"]).collect::<Vec<_>>(),
        FIVE
    );
    assert_eq!(
        (&nodes[0]["state"], &nodes[0]["keys"]),
        (&json!("down"), &json!(null))
    );
    assert_eq!(
        (
            &nodes[4]["state"],
            &nodes[4]["keys"],
            &nodes[4]["tombstones"]
        ),
        (&json!("ready"), &json!(1), &json!(0))
    );
    assert!(nodes[4]["bytes"].as_u64().unwrap() > 8, "{status}");
}

#[test]
fn deleted_keys_are_tombstones_and_no_keys() {
    let cluster = Cluster::running(&["alice"]);
    cluster.kv54(["delete", "never"]).exits(0);
    cluster.kv54(["set", "tea", "green"]).exits(0);
    cluster.kv54(["set", "milk", "white"]).exits(0);
    cluster.kv54(["delete", "tea"]).exits(0);
    let node = &cluster.kv54(["status", "--json"]).exits(0).json()["nodes"][0];
    assert_eq!((&node["keys"], &node["tombstones"]), (&json!(1), &json!(1)));
}

#[test]
fn colour_is_for_terminals_that_want_it() {
    let cluster = Cluster::running(&["alice"]);
    let piped = cluster.kv54(["status"]).exits(0);
    assert!(!piped.out.contains(&0x1b), "{piped:?}");
    // `script` gives the command a terminal.
    let on_a_terminal = |variables: &str| {
        let kv54 = format!(
            "{variables} TERM=xterm {} status",
            env!("CARGO_BIN_EXE_kv54")
        );
        let mut script = std::process::Command::new("script");
        script
            .current_dir(&cluster.dir)
            .env_remove("NO_COLOR")
            .args(["-qec", &kv54, "/dev/null"]);
        script.output().map(|output| output.stdout)
    };
    let Ok(coloured) = on_a_terminal("") else {
        return;
    }; // a machine without `script`
    assert!(
        coloured.windows(5).any(|bytes| bytes == b"\x1b[32m"),
        "{}",
        coloured.escape_ascii()
    );
    let plain = on_a_terminal("NO_COLOR=1").unwrap();
    assert!(
        !plain.windows(5).any(|bytes| bytes == b"\x1b[32m"),
        "{}",
        plain.escape_ascii()
    );
}

#[test]
fn wrong_usage_is_told_and_exits_with_2() {
    let cluster = Cluster::running(&["alice"]);
    for args in [
        &["sett", "tea", "green"][..],
        &["get"],
        &["get", "tea", "--raw", "--json"],
        &["set", "tea", "green", "black"],
        &["get", "tea", "--timeout", "soon"],
        &["get", "tea", "--timeout", "18446744073709551615s"],
        &["serve", "alice", "--all"],
    ] {
        let said = cluster.kv54(args).exits(2).says(&["kv54: "]);
        assert!(
            said.out.is_empty() && said.err.contains("Usage: kv54")
                || said.err.contains("invalid value"),
            "{said:?}"
        );
        assert!(!said.err.contains("error: "), "{said:?}");
    }
    cluster
        .kv54(["serve", "zoe"])
        .exits(2)
        .says(&["cluster.toml: there is no node \"zoe\", only alice\n"]);
    let five = Cluster::of(&FIVE);
    let names = "there is no node \"zoe\", only alice, bob, carol, dave and erin\n";
    for args in [&["serve", "zoe"][..], &["get", "tea", "--via", "zoe"]] {
        five.kv54(args).exits(2).says(&["cluster.toml: ", names]);
    }
    let near = cluster.kv54(["exprt"]).exits(2).says(&[]).err;
    assert!(
        near.contains("similar") && near.contains("'export'"),
        "{near}"
    );
    let long = "k".repeat(1025);
    cluster
        .kv54(["get", &long])
        .exits(2)
        .says(&["too-large:", "1025", "1024"]);
    cluster
        .kv54(["set", &long, "v", "--via", "alice"])
        .exits(2)
        .says(&["too-large:", "1025"]);
}

#[test]
fn a_port_in_use_names_the_node_and_the_address() {
    let cluster = Cluster::of(&["alice", "bob"]);
    let address = cluster.address("bob");
    let _taken = TcpListener::bind(&address).unwrap();
    let said = cluster.kv54(["serve", "bob"]).exits(2);
    said.says(&["bob: ", &address, "in use"]);
    let all = cluster.kv54(["serve", "--all"]).exits(2);
    assert!(
        all.err
            .lines()
            .last()
            .unwrap()
            .contains(&format!("bob: {address}")),
        "{all:?}"
    );
}

#[test]
fn one_process_serves_every_node_and_each_line_says_whose_it_is() {
    let cluster = Cluster::of(&FIVE);
    let mut all = cluster.spawn(["serve", "--all"]);
    for name in FIVE {
        let line = all.wait_for(&format!("listening on {}", cluster.address(name)));
        assert!(line.starts_with(&format!("{name}: ")), "{line}");
    }
    cluster.kv54(["set", "tea", "green"]).exits(0);
    assert_eq!(
        cluster
            .kv54(["get", "tea", "--via", "dave"])
            .exits(0)
            .text(),
        "green\n"
    );
    stops_well(&mut all, "INT");
}

#[test]
fn a_signal_stops_a_node_once_it_has_answered() {
    let cluster = Cluster::running(&["alice", "bob", "carol"]);
    for signal in ["TERM", "INT"] {
        let mut extra =
            Node::spawn(
                cluster
                    .command()
                    .args(["serve", "alice", "--listen", &spare(&cluster)]),
            );
        extra.wait_for("listening on");
        stops_well(&mut extra, signal);
    }
    // Bob waits for his two silent neighbours, and is told to stop meanwhile.
    cluster.kv54(["set", "tea", "green"]).exits(0);
    cluster.signal("alice", "STOP");
    cluster.signal("carol", "STOP");
    let mut guest = TcpStream::connect(cluster.address("bob")).unwrap();
    let mut requests = Vec::new();
    write_request(&mut requests, 1, "get", 1, &[&encode(&"tea".into())]);
    write_request(&mut requests, 2, "status", 0, &[]);
    guest.write_all(&requests).unwrap();
    let status = read_value(&mut guest).unwrap();
    assert_eq!(status[1], 2.into(), "the get is in flight: {status}");
    cluster.signal("bob", "TERM");
    cluster.signal("alice", "CONT");
    assert_eq!(
        read_value(&mut guest).unwrap(),
        Value::Array(vec![1.into(), 1.into(), Value::Nil, "green".into()])
    );
    assert_eq!(guest.read(&mut [0]).unwrap(), 0, "then he hangs up");
    cluster.node("bob").wait_for("stopped");
}

#[test]
fn a_name_that_is_loopback_here_is_refused_where_others_are_not() {
    let cluster = Cluster::of(&["alice"]);
    let port = cluster.spare_port(0);
    cluster.file(
        "hosts.toml",
        &format!("[nodes]\nalice = \"localhost:{port}\"\nbob = \"192.0.2.1:{port}\"\n"),
    );
    let said = cluster
        .kv54(["serve", "alice", "--config", "hosts.toml"])
        .exits(2);
    said.says(&["alice: ", "localhost", "loopback", "bob", "--listen"]);
    let listen = format!("127.0.0.1:{port}");
    let mut node = cluster.spawn([
        "serve",
        "alice",
        "--config",
        "hosts.toml",
        "--listen",
        &listen,
    ]);
    node.wait_for(&format!("listening on {listen}"));
    stops_well(&mut node, "TERM");
}

#[test]
fn without_a_name_a_node_is_named_after_its_host() {
    let host = hostname::get().unwrap().into_string().unwrap();
    let short = host.split('.').next().unwrap();
    let cluster = Cluster::of(&[short]);
    let mut node = cluster.spawn(["serve"]);
    assert!(
        node.wait_for("listening on")
            .starts_with(&format!("{short}: "))
    );
    stops_well(&mut node, "TERM");
    let other = Cluster::of(&["surely-another-name"]);
    other
        .kv54(["serve"])
        .exits(2)
        .says(&["cluster.toml", short, "surely-another-name"]);
}

#[test]
fn status_waits_for_nodes_that_are_yet_to_come() {
    let mut cluster = Cluster::of(&["alice", "bob"]);
    cluster.start("alice");
    let start = Instant::now();
    cluster
        .kv54(["status", "--wait", "--timeout", "300ms"])
        .exits(3);
    assert!(start.elapsed() >= Duration::from_millis(300));
    let waiting = cluster
        .command()
        .args(["status", "--wait"])
        .stdout(std::process::Stdio::null())
        .spawn();
    cluster.start("bob");
    assert!(waiting.unwrap().wait().unwrap().success());
}

#[test]
fn a_reader_that_has_seen_enough_may_close_the_pipe() {
    let cluster = Cluster::running(&["alice"]);
    cluster
        .kv54_with(["set", "big"], &vec![b'x'; 1 << 20])
        .exits(0);
    let kv54 = format!(
        "{} get big | head -c 10; exit ${{PIPESTATUS[0]}}",
        env!("CARGO_BIN_EXE_kv54")
    );
    let output = std::process::Command::new("bash")
        .current_dir(&cluster.dir)
        .args(["-c", &kv54])
        .output();
    let output = output.unwrap();
    assert_eq!(
        (output.status.code(), output.stdout),
        (Some(0), b"xxxxxxxxxx".to_vec())
    );
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
}

fn stops_well(node: &mut Node, signal: &str) {
    let start = Instant::now();
    node.signal(signal);
    assert_eq!(node.wait(), 0, "{:?}", node.log());
    assert!(
        start.elapsed() < Duration::from_secs(3),
        "it took {:?}",
        start.elapsed()
    );
}

fn spare(cluster: &Cluster) -> String {
    format!("127.0.0.1:{}", cluster.spare_port(1))
}

//! What is wrong with a `cluster.toml` is said in one line that names file, line and field.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::time::Duration;

use common::{Cluster, Node, Said};
use kv54::cluster;

#[test]
fn an_unknown_field_is_named() {
    let cluster = Cluster::of(&["alice"]);
    refuses(&cluster, &format!("{ALICE}[ring]\n"), 3, &["ring"]);
    refuses(&cluster, &format!("windwo = 1\n{ALICE}"), 1, &["windwo"]);
    let limits = "[limits]\nwindow = \"1s\"\nkeys = 5\n";
    refuses(&cluster, &format!("{ALICE}{limits}"), 5, &["keys"]);
}

#[test]
fn a_ring_without_nodes_is_refused() {
    let cluster = Cluster::of(&["alice"]);
    refuses(&cluster, "", 1, &["nodes"]);
    refuses(&cluster, "[limits]\nwindow = \"1s\"\n", 1, &["nodes"]);
    refuses(&cluster, "[nodes]\n", 1, &["nodes", "at least one"]);
    refuses(&cluster, "# no one\n\n[nodes]\n\n[limits]\n", 3, &["nodes"]);
}

#[test]
fn a_name_that_stands_twice_is_named() {
    let cluster = Cluster::of(&["alice"]);
    for twice in ["alice", "\"alice\""] {
        let file = format!("{ALICE}{twice} = \"127.0.0.1:5402\"\n");
        refuses(&cluster, &file, 3, &["alice"]);
    }
}

#[test]
fn an_address_that_stands_twice_is_named() {
    let cluster = Cluster::of(&["alice"]);
    let both = ["nodes.bob", "127.0.0.1:5401", "alice"];
    let twin = "bob = \"127.0.0.1:5401\"\n";
    refuses(&cluster, &format!("{ALICE}{twin}"), 3, &both);
    // In sorted order bob comes second, also where he is first in the file.
    let reversed = format!("[nodes]\n{twin}alice = \"127.0.0.1:5401\"\n");
    refuses(&cluster, &reversed, 2, &both);
    // Host names do not tell capitals from small letters.
    let hosts = "[nodes]\nalice = \"Host-1:5401\"\nbob = \"host-1:5401\"\n";
    refuses(&cluster, hosts, 3, &["nodes.bob", "host-1:5401", "alice"]);
}

#[test]
fn a_bad_address_is_quoted() {
    let cluster = Cluster::of(&["alice"]);
    for address in [
        "",
        "127.0.0.1",
        "host-1",
        "127.0.0.1:",
        "127.0.0.1:0",
        "127.0.0.1:70000",
        "127.0.0.1:-1",
        "127.0.0.1:http",
        "127.0.0.1: 5401",
        "::1:5401",
        "fe80::1:5401",
        "[::1]",
        "[::1:5401",
        "[127.0.0.1]:5401",
        "[host-1]:5401",
        "300.1.1.1:5401",
        "1.2.3:5401",
        "54:5401",
        ":5401",
        "host 1:5401",
        " host-1:5401",
        "tcp://host-1:5401",
        "host-1/:5401",
    ] {
        let file = format!("[nodes]\n\nalice = \"{address}\"\n");
        refuses(
            &cluster,
            &file,
            3,
            &["nodes.alice", &format!("{address:?}")],
        );
    }
}

#[test]
fn an_address_that_nobody_can_dial_points_to_the_option_that_listens_there() {
    let cluster = Cluster::of(&["alice"]);
    for host in ["0.0.0.0", "[::]", "[0:0::0]", "[::ffff:0.0.0.0]"] {
        let file = format!("[nodes]\nalice = \"{host}:5401\"\n");
        refuses(&cluster, &file, 2, &["nodes.alice", host, "--listen"]);
    }
}

#[test]
fn a_value_without_its_quotes_is_shown_with_them() {
    let cluster = Cluster::of(&["alice"]);
    for (broken, whole) in [
        ("bob = 127.0.0.1:5402", r#"bob = "127.0.0.1:5402""#),
        ("bob = 127.0.0.1:5402 # home", r#"bob = "127.0.0.1:5402""#),
        ("bob=host-1:5402", r#"bob = "host-1:5402""#),
        ("bob = [::1]:5402", r#"bob = "[::1]:5402""#),
        ("bob = localhost", r#"bob = "localhost""#),
    ] {
        let file = format!("{ALICE}{broken}\n");
        let said = refuses(&cluster, &file, 3, &["bob: quotes are missing: ", whole]);
        assert!(!said.err.contains("float"), "{said:?}");
    }
    let limit = |line: &str| format!("{ALICE}[limits]\n{line}\n");
    let window = ["window: quotes are missing: window = \"500ms\""];
    refuses(&cluster, &limit("window = 500ms"), 4, &window);
    // Where more is wrong, or something else, quotes are not what is missing.
    for (broken, why) in [
        ("bob = 5402", "string"),
        ("bob = \"127.0.0.1:5402", "bob"),
        ("bob = ", "bob"),
        ("bob = { a = 1:2 }", "bob"),
        ("alice = \"127.0.0.1:5402\"", "alice"),
    ] {
        let said = refuses(&cluster, &format!("{ALICE}{broken}\n"), 3, &[why]);
        assert!(!said.err.contains("quotes are missing"), "{said:?}");
    }
}

#[test]
fn a_port_is_digits_alone() {
    let cluster = Cluster::of(&["alice"]);
    for port in ["+5401", "-5401", "0x1519", "5401.0", "５４０１"] {
        let file = format!("[nodes]\nalice = \"127.0.0.1:{port}\"\n");
        refuses(&cluster, &file, 2, &["nodes.alice", port]);
    }
}

#[test]
fn a_bad_name_is_quoted() {
    let cluster = Cluster::of(&["alice"]);
    let long = "a".repeat(65);
    for name in ["al ice", "", &long, "al/ice", "älice", "al:ice", "alice,"] {
        let file = format!("{ALICE}\"{name}\" = \"127.0.0.1:5402\"\n");
        refuses(&cluster, &file, 3, &["nodes.", name, "64"]);
    }
}

#[test]
fn a_line_break_in_a_name_does_not_break_the_line_of_the_error() {
    let cluster = Cluster::of(&["alice"]);
    let file = format!("{ALICE}\"al\\nice\" = \"127.0.0.1:5402\"\n");
    refuses(&cluster, &file, 3, &["nodes.", "64"]);
    let file = format!("{ALICE}\"al\\u001b[31mice\" = \"127.0.0.1:5402\"\n");
    let said = refuses(&cluster, &file, 3, &["nodes.", "64"]);
    assert!(
        !said.err.contains('\u{1b}'),
        "a terminal obeys it: {said:?}"
    );
}

#[test]
fn a_terminal_obeys_nothing_that_stands_in_a_broken_file() {
    let cluster = Cluster::of(&["alice"]);
    for broken in [
        "[no\0de",
        "\u{1b}[31m = 5",
        "\"\\u001b[31m\" = { bob = 5 }",
        "[\"\\r\"]",
        "b\rob",
    ] {
        let said = refuses(&cluster, &format!("{ALICE}{broken}\n"), 3, &[]);
        let line = said.err.trim_end_matches('\n');
        assert!(!line.contains(char::is_control), "{line:?}");
    }
}

#[test]
fn a_bad_limit_is_named() {
    let cluster = Cluster::of(&["alice"]);
    for (limit, parts) in [
        ("window = \"1\"", &["limits.window"][..]),
        ("window = \"\"", &["limits.window"]),
        ("window = \"soon\"", &["limits.window"]),
        ("window = \"0s\"", &["limits.window", "50ms", "60s"]),
        ("window = \"49ms\"", &["limits.window", "50ms", "60s"]),
        ("window = \"61s\"", &["limits.window", "50ms", "60s"]),
        ("window = \"2m\"", &["limits.window", "50ms", "60s"]),
        ("memory = \"lots\"", &["limits.memory", "1GiB"]),
        ("memory = \"\"", &["limits.memory", "1GiB"]),
        ("memory = \"-1GiB\"", &["limits.memory", "1GiB"]),
        ("memory = \"1KiB\"", &["limits.memory", "1MiB"]),
        ("memory = \"1048575B\"", &["limits.memory", "1MiB"]),
        ("connections = 0", &["limits.connections", "1000000"]),
        ("connections = 1000001", &["limits.connections", "1000000"]),
        ("threads = 0", &["limits.threads", "1024"]),
        ("threads = 1025", &["limits.threads", "1024"]),
    ] {
        let file = format!("{ALICE}\n[limits]\n{limit}\n");
        refuses(&cluster, &file, 5, parts);
    }
}

#[test]
fn a_field_of_the_wrong_type_is_named() {
    let cluster = Cluster::of(&["alice"]);
    for (limit, field) in [
        ("window = 5", "window"),
        ("memory = 1073741824", "memory"),
        ("connections = \"many\"", "connections"),
        ("connections = -1", "connections"),
        ("connections = 1.5", "connections"),
        ("threads = \"all\"", "limits.threads"),
        ("threads = -1", "limits.threads"),
    ] {
        let file = format!("{ALICE}\n[limits]\n{limit}\n");
        refuses(&cluster, &file, 5, &[field]);
    }
    refuses(&cluster, &format!("{ALICE}bob = 5402\n"), 3, &["bob"]);
    let nested = "bob.host = \"127.0.0.1:5402\"\n";
    refuses(&cluster, &format!("{ALICE}{nested}"), 3, &["bob"]);
    refuses(&cluster, "nodes = 5\n", 1, &["nodes"]);
    refuses(&cluster, &format!("limits = 5\n{ALICE}"), 1, &["limits"]);
}

#[test]
fn what_is_no_toml_is_refused_where_it_breaks() {
    let cluster = Cluster::of(&["alice"]);
    for broken in [
        "bob = 127.0.0.1:5402",
        "bob = \"127.0.0.1:5402",
        "bob: \"127.0.0.1:5402\"",
        "bob",
        "[limits",
        "= 5",
        "<<<<<<< HEAD",
    ] {
        refuses(&cluster, &format!("{ALICE}{broken}\n"), 3, &[]);
    }
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let cluster = Cluster::of(&["alice"]);
    let said = cluster.kv54(["status", "--config", "nowhere.toml"]);
    let said = said.exits(2).says(&["nowhere.toml", "no such file"]);
    assert!(said.out.is_empty());
    let said = cluster.kv54(["status", "--config", "."]);
    said.exits(2).says(&["kv54: .: "]);
}

#[test]
fn a_file_that_is_not_utf8_is_refused() {
    let cluster = Cluster::of(&["alice"]);
    std::fs::write(cluster.dir.join("bad.toml"), b"[nodes]\n# gr\xfcn\n").unwrap();
    let said = cluster.kv54(["status", "--config", "bad.toml"]);
    said.exits(2).says(&["bad.toml", "UTF-8"]);
}

#[test]
#[cfg(not(feature = "tls"))]
fn a_build_without_tls_refuses_a_file_that_wants_it() {
    let cluster = Cluster::of(&["alice"]);
    let files = "ca = \"ca.pem\"\ncert = \"host.pem\"\nkey = \"host.key\"\n";
    let why = "this kv54 was built without TLS; build it with --features tls";
    refuses(&cluster, &format!("{ALICE}\n[tls]\n{files}"), 4, &[why]);
    cluster.file("cluster.toml", &format!("{ALICE}[tls]\n{files}"));
    cluster.kv54(["serve", "alice"]).exits(2).says(&[why]);
}

#[test]
fn a_node_that_the_network_can_reach_warns_of_it() {
    let cluster = Cluster::of(&["alice"]);
    let open = "is open to everybody who can reach it; [tls] in cluster.toml closes it";
    let everywhere = format!("0.0.0.0:{}", cluster.spare_port(0));
    let node = cluster.spawn(["serve", "alice", "--listen", &everywhere]);
    let line = node.wait_for("warning: ");
    assert!(line.contains(&format!("{everywhere} {open}")), "{line}");
    let node = cluster.spawn(["serve", "alice"]);
    node.wait_for("ready with");
    assert!(!node.log().iter().any(|line| line.contains(open)));
}

#[test]
fn every_command_refuses_a_bad_file() {
    let cluster = Cluster::of(&["alice"]);
    cluster.file("cluster.toml", "[nodes]\nalice = \"127.0.0.1\"\n");
    for command in [
        &["serve", "alice"][..],
        &["serve", "--all"],
        &["set", "tea", "green"],
        &["get", "tea"],
        &["delete", "tea"],
        &["where", "tea"],
        &["status"],
        &["status", "--json"],
        &["status", "--wait"],
    ] {
        let said = cluster.kv54(command).exits(2);
        said.says(&["cluster.toml:2: nodes.alice: "]);
    }
}

#[test]
fn the_file_is_cluster_toml_unless_the_environment_or_the_command_names_another() {
    let cluster = Cluster::of(&["alice"]);
    for name in ["cluster.toml", "environment.toml", "command.toml"] {
        cluster.file(name, "[nodes]\n");
    }
    let named = |variable: Option<&str>, option: Option<&str>| {
        let mut command = cluster.command();
        command.arg("status");
        command.envs(variable.map(|file| ("KV54_CONFIG", file)));
        command.args(option.map(|file| format!("--config={file}")));
        let output = command.output().unwrap();
        let said = Said {
            code: output.status.code().unwrap(),
            out: output.stdout,
            err: String::from_utf8(output.stderr).unwrap(),
        };
        said.exits(2)
    };
    let (variable, option) = (Some("environment.toml"), Some("command.toml"));
    named(None, None).says(&["kv54: cluster.toml:1: "]);
    named(variable, None).says(&["kv54: environment.toml:1: "]);
    named(None, option).says(&["kv54: command.toml:1: "]);
    named(variable, option).says(&["kv54: command.toml:1: "]);
    // Set and empty is as good as not set.
    named(Some(""), None).says(&["kv54: cluster.toml:1: "]);
}

#[test]
fn an_empty_level_of_the_log_is_the_usual_one() {
    let cluster = Cluster::of(&["alice"]);
    let serve = |level| {
        Node::spawn(
            cluster
                .command()
                .args(["serve", "alice"])
                .env("KV54_LOG", level),
        )
    };
    serve("").wait_for("alice: listening on");
    let mut command = cluster.command();
    let said = command
        .args(["serve", "alice"])
        .env("KV54_LOG", "loud")
        .output()
        .unwrap();
    assert_eq!(said.status.code(), Some(2));
}

#[test]
fn an_address_is_ipv4_or_bracketed_ipv6_or_a_host_name() {
    for host in [
        "127.0.0.1",
        "[::1]",
        "[2001:db8::5401]",
        "[::ffff:127.0.0.1]",
        "localhost",
        "host-1",
        "kv_1.example.com",
        "alice.kv.svc.cluster.local",
        "1.host",
    ] {
        for port in [1, 5401, 65_535] {
            let address = format!("{host}:{port}");
            let ring = parsed(&format!("[nodes]\nalice = \"{address}\"\n"));
            assert_eq!(ring.nodes()[0].address, address);
        }
    }
}

#[test]
fn a_host_name_may_be_as_long_as_dns_takes_it() {
    // Parts of up to 63 letters, 253 in all: clouds and clusters give out names over 64.
    let part = "a".repeat(63);
    let cluster = "kv54-0.kv54-headless.a-team-s-namespace.svc.cluster-1.example.com";
    let longest = format!("{part}.{part}.{part}.{}", "b".repeat(61));
    assert_eq!(longest.len(), 253);
    for host in [cluster, &longest] {
        let address = format!("{host}:5401");
        let ring = parsed(&format!("[nodes]\nalice = \"{address}\"\n"));
        assert_eq!(ring.nodes()[0].address, address);
    }
}

#[test]
fn a_name_is_up_to_64_letters_digits_dots_dashes_and_underscores() {
    let long = "a".repeat(64);
    for name in ["a", "A", "7", "host-1.example_2", &long] {
        let ring = parsed(&format!("[nodes]\n\"{name}\" = \"127.0.0.1:5401\"\n"));
        assert_eq!(ring.nodes()[0].name, name);
        assert_eq!(ring.place(name), Some(0));
    }
}

#[test]
fn the_order_in_the_file_is_not_the_order_of_the_ring() {
    let lines = [
        "alice = \"127.0.0.1:5401\"",
        "bob = \"127.0.0.1:5402\"",
        "carol = \"127.0.0.1:5403\"",
        "dave = \"127.0.0.1:5404\"",
    ];
    let file = |order: [usize; 4]| {
        let lines: Vec<&str> = order.iter().map(|place| lines[*place]).collect();
        parsed(&format!("[nodes]\n{}\n", lines.join("\n")))
    };
    let sorted = file([0, 1, 2, 3]);
    for order in [[3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]] {
        let ring = file(order);
        let names: Vec<&str> = ring.nodes().iter().map(|node| &*node.name).collect();
        assert_eq!(names, ["alice", "bob", "carol", "dave"]);
        for name in names {
            assert_eq!(ring.fingerprint(name), sorted.fingerprint(name));
        }
    }
}

#[test]
fn the_fingerprint_is_of_names_and_window_and_of_who_is_meant() {
    let ring = parsed(&format!("{ALICE}bob = \"127.0.0.1:5402\"\n"));
    let print = ring.fingerprint("alice");
    // Addresses may differ from network to network, and memory from host to host.
    let elsewhere = "[nodes]\nalice = \"host-1:1\"\nbob = \"host-2:2\"\n";
    assert_eq!(parsed(elsewhere).fingerprint("alice"), print);
    let larger = "[limits]\nmemory = \"2GiB\"\nconnections = 5\nwindow = \"1000ms\"\n";
    let same = parsed(&format!("{elsewhere}{larger}"));
    assert_eq!(same.fingerprint("alice"), print);

    assert_ne!(ring.fingerprint("bob"), print);
    let patient = parsed(&format!("{elsewhere}[limits]\nwindow = \"2s\"\n"));
    assert_ne!(patient.fingerprint("alice"), print);
    let three = parsed(&format!("{elsewhere}carol = \"host-3:3\"\n"));
    assert_ne!(three.fingerprint("alice"), print);
}

#[test]
fn the_limits_have_defaults() {
    let none = parsed(ALICE);
    let empty = parsed(&format!("{ALICE}[limits]\n"));
    for ring in [none, empty] {
        assert_eq!(ring.limits.window, Duration::from_secs(1));
        assert_eq!(ring.limits.memory, 1 << 30);
        assert_eq!(ring.limits.connections, 1024);
    }
}

#[test]
fn the_limits_are_read_as_people_write_them() {
    let limits = |lines: &str| parsed(&format!("{ALICE}[limits]\n{lines}\n"));
    for (written, millis) in [("50ms", 50), ("1500ms", 1500), ("2s", 2000), ("1m", 60_000)] {
        let ring = limits(&format!("window = \"{written}\""));
        assert_eq!(ring.limits.window, Duration::from_millis(millis));
    }
    for (written, bytes) in [
        ("1MiB", 1 << 20),
        ("512 MiB", 512 << 20),
        ("1.5GiB", 3 << 29),
        ("2GB", 2_000_000_000),
        ("1048576", 1 << 20),
    ] {
        let ring = limits(&format!("memory = \"{written}\""));
        assert_eq!(ring.limits.memory, bytes, "{written}");
    }
    for count in [1, 1_000_000] {
        assert_eq!(
            limits(&format!("connections = {count}")).limits.connections,
            count
        );
    }
}

/// The first two lines of a file in which the third one is wrong.
const ALICE: &str = "[nodes]\nalice = \"127.0.0.1:5401\"\n";

fn parsed(text: &str) -> cluster::Cluster {
    cluster::Cluster::parse("cluster.toml".as_ref(), text).unwrap()
}

/// The binary refuses this file: one line that names the file, this line of it, and these parts.
#[track_caller]
fn refuses(cluster: &Cluster, file: &str, line: usize, parts: &[&str]) -> Said {
    cluster.file("bad.toml", file);
    let said = cluster.kv54(["status", "--config", "bad.toml"]).exits(2);
    assert!(said.out.is_empty(), "{said:?}");
    let said = said.says(&[&format!("kv54: bad.toml:{line}: ")]);
    said.says(parts)
}

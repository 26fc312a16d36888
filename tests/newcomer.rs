//! What somebody who is new to kv54 tries first: typed values, the names of all keys, several keys
//! at once, how many there are, completion, help, and what the docs offer to copy.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;

use clap::CommandFactory as _;
use common::{Cluster, FIVE};
use kv54::commands::Cli;
use serde_json::json;

#[test]
fn a_json_value_keeps_its_type() {
    let cluster = Cluster::running(&["alice"]);
    for (text, value) in [
        ("false", json!(false)),
        ("5", json!(5)),
        ("-5", json!(-5)),
        ("1.5", json!(1.5)),
        (r#""false""#, json!("false")),
        (
            " [1, null, {\"a\": true}]\n",
            json!([1, null, { "a": true }]),
        ),
        ("{}", json!({})),
    ] {
        for via in [&[][..], &["--via", "alice"]] {
            let set = [&["set", "tea", text, "--value-json"], via].concat();
            cluster.kv54(set).exits(0);
            let get = cluster.kv54(["get", "tea", "--json"]).exits(0);
            assert_eq!(get.json(), json!({ "key": "tea", "value": value }));
        }
    }
    // The same from standard input; and without the option it is text, as ever.
    let stdin = ["set", "tea", "--value-json"];
    cluster.kv54_with(stdin, b"false\n").exits(0);
    let get = || cluster.kv54(["get", "tea", "--json"]).exits(0).json()["value"].clone();
    assert_eq!(get(), json!(false));
    cluster.kv54(["set", "tea", "false", "--json"]).exits(0);
    assert_eq!(get(), json!("false"));
}

#[test]
fn what_is_no_json_is_refused_in_one_line_and_writes_nothing() {
    let cluster = Cluster::running(&["alice"]);
    let long = format!("[{}1]", "1, ".repeat(400_000));
    let deep = "[".repeat(11) + &"]".repeat(11);
    for (text, parts) in [
        ("green", &["no JSON", r#"'"green"'"#][..]),
        ("", &["no JSON"]),
        ("[1, 2", &["no JSON", "column 5"]),
        ("1 2", &["no JSON"]),
        ("null", &["absent", "kv54 delete"]),
        (&long, &["too-large:", "1048576"]),
        (&deep, &["too-large:"]),
    ] {
        let set = cluster.kv54_with(["set", "tea", "--value-json"], text.as_bytes());
        set.exits(2).says(parts);
    }
    cluster.kv54(["get", "tea"]).exits(1);
}

/// Text stays plain, for scripts; a person at a terminal is told what is no text.
#[test]
fn a_terminal_is_told_what_is_no_text() {
    let cluster = Cluster::running(&["alice"]);
    cluster
        .kv54(["set", "typed", "--value-json", "false"])
        .exits(0);
    cluster.kv54(["set", "text", "false"]).exits(0);
    let piped = cluster.kv54(["get", "typed", "text"]).exits(0);
    assert_eq!(
        (piped.text(), &*piped.err),
        ("typed\tfalse\ntext\tfalse\n", "")
    );
    let get = format!("{} get typed text", env!("CARGO_BIN_EXE_kv54"));
    let mut script = Command::new("script");
    let script = script
        .current_dir(&cluster.dir)
        .args(["-qec", &get, "/dev/null"]);
    let Ok(shown) = script.output() else {
        return; // a machine without `script`
    };
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.contains("\"typed\" is JSON, no text"), "{shown}");
    assert!(!shown.contains("\"text\" is"), "{shown}");
}

#[test]
fn a_key_that_is_typed_is_not_empty() {
    let cluster = Cluster::running(&["alice"]);
    for args in [
        &["set", "", "green"][..],
        &["get", ""],
        &["get", "tea", ""],
        &["delete", ""],
        &["delete", "tea", ""],
        &["where", ""],
    ] {
        let said = cluster.kv54(args).exits(2);
        said.says(&["the key is empty", "variable of the shell"]);
    }
    // On the wire it is a key like any other, and a dump has it.
    let line = b"{\"key\":\"\",\"value\":\"green\"}\n";
    cluster.kv54_with(["import"], line).exits(0);
    assert_eq!(cluster.kv54(["export"]).exits(0).out, line);
    assert_eq!(cluster.kv54(["keys"]).exits(0).text(), "\n");
}

#[test]
fn keys_are_listed_once_and_by_how_they_begin() {
    let mut cluster = Cluster::five();
    assert_eq!(cluster.kv54(["keys"]).exits(0).text(), "");
    let lines = |from: usize, of: &str| -> String {
        let line = |n| {
            format!(
                "{{\"key\":\"{of}:{n}\",\"value\":\"{}\"}}\n",
                "x".repeat(2_000)
            )
        };
        (from..from + 100).map(line).collect()
    };
    let all = lines(0, "user") + &lines(100, "user") + &lines(0, "shop");
    cluster.kv54_with(["import"], all.as_bytes()).exits(0);
    cluster.kv54(["delete", "user:7", "shop:8"]).exits(0);
    let names = |of: &str, most: usize, but: usize| -> BTreeSet<String> {
        let numbers = (0..most).filter(|n| *n != but);
        numbers.map(|n| format!("{of}:{n}")).collect()
    };
    let (users, shops) = (names("user", 200, 7), names("shop", 100, 8));
    for down in ["", "bob"] {
        if !down.is_empty() {
            cluster.kill(down);
        }
        let listed = |args: &[&str]| {
            let said = cluster.kv54([&["keys"], args].concat()).exits(0);
            assert_eq!(said.err, "");
            let lines: Vec<String> = said.text().lines().map(String::from).collect();
            let set: BTreeSet<String> = lines.iter().cloned().collect();
            assert_eq!(lines.len(), set.len(), "each key once");
            set
        };
        assert_eq!(listed(&[]), users.union(&shops).cloned().collect());
        assert_eq!(listed(&["--prefix", "user:"]), users);
        assert_eq!(listed(&["--prefix", "zoo"]), BTreeSet::new());
        let json = listed(&["--prefix", "shop:9", "--json"]);
        assert!(json.contains("{\"key\":\"shop:99\"}"), "{json:?}");
        assert_eq!(json.len(), 11);
    }
    cluster.kill("carol");
    let keys = cluster.kv54(["keys", "--timeout", "300ms"]).exits(3);
    keys.says(&["the list is not complete: unavailable: "]);
}

#[test]
fn a_reader_of_keys_may_stop_after_the_first() {
    let cluster = Cluster::running(&["alice"]);
    let line = |n: usize| format!("{{\"key\":\"{n}{}\",\"value\":1}}\n", "x".repeat(900));
    let lines: String = (0..300).map(line).collect(); // far more than a pipe holds
    cluster.kv54_with(["import"], lines.as_bytes()).exits(0);
    let keys = env!("CARGO_BIN_EXE_kv54").to_owned() + " keys";
    let mut bash = Command::new("bash");
    let bash = bash.current_dir(&cluster.dir).args([
        "-c",
        &format!("{keys} | head -c 9; exit ${{PIPESTATUS[0]}}"),
    ]);
    let said = bash.output().unwrap();
    let err = String::from_utf8(said.stderr).unwrap();
    assert_eq!(
        (said.status.code(), said.stdout.len(), &*err),
        (Some(0), 9, "")
    );
}

#[test]
fn a_key_is_one_line_whatever_is_in_it() {
    let cluster = Cluster::running(&["alice"]);
    let key = "a\tb\nc\u{1b}[31mü";
    cluster.kv54(["set", key, "1"]).exits(0);
    let keys = cluster.kv54(["keys"]).exits(0);
    let line = keys.text().strip_suffix('\n').unwrap();
    assert!(
        line.starts_with("a\\tb\\nc\\") && line.ends_with("[31mü"),
        "{line}"
    );
    assert!(!line.contains(char::is_control), "{line:?}");
    let keys = cluster.kv54(["keys", "--json"]).exits(0);
    assert_eq!(keys.json(), json!({ "key": key }));
}

#[test]
fn several_keys_are_deleted_at_once() {
    let mut cluster = Cluster::five();
    for via in [&[][..], &["--via", "dave"]] {
        cluster.kv54(["set", "tea", "green"]).exits(0);
        cluster.kv54(["set", "milk", "white"]).exits(0);
        let both = ["delete", "tea", "never", "milk"];
        let delete = cluster.kv54([&both, via].concat()).exits(0);
        assert_eq!((delete.text(), &*delete.err), ("ok\n", ""));
        cluster.kv54(["get", "tea"]).exits(1);
        cluster.kv54(["get", "milk"]).exits(1);
    }
    let delete = cluster.kv54(["del", "tea", "milk", "--json"]).exits(0);
    assert_eq!(delete.json(), json!([{ "key": "tea" }, { "key": "milk" }]));
    let delete = cluster.kv54(["del", "tea", "--json"]).exits(0);
    assert_eq!(delete.json(), json!({ "key": "tea" }));
    let long = "k".repeat(1025);
    let delete = cluster.kv54(["delete", "tea", &long]).exits(2);
    delete.says(&["delete failed: too-large:", "; 1 of 2 keys are deleted\n"]);
    // Two of its three nodes are down; the other key has two that are up.
    let (lost, kept) = (
        cluster.key_on(&["alice", "bob", "carol"]),
        cluster.key_on(&["dave", "erin", "alice"]),
    );
    cluster.kill("bob");
    cluster.kill("carol");
    let delete = ["delete", &lost, &kept, "--timeout", "3s"];
    let said = cluster.kv54(delete).exits(3);
    said.says(&[
        "delete failed: unavailable:",
        &lost,
        "are down; 1 of 2 keys are deleted\n",
    ]);
}

#[test]
fn status_counts_each_key_once() {
    let mut cluster = Cluster::five();
    for n in 0..40 {
        cluster.kv54(["set", &format!("key{n}"), "green"]).exits(0);
    }
    cluster.kv54(["delete", "key1", "key2", "key3"]).exits(0);
    cluster.wait_until_equal();
    let counts = "keys without their copies: 37, tombstones: 3\n";
    let status = cluster.kv54(["status"]).exits(0);
    assert!(status.text().ends_with(counts), "{status:?}");
    // Another replica knows as much as one that is down.
    cluster.kill("erin");
    let status = cluster.kv54(["status"]).exits(3);
    assert!(status.text().ends_with(counts), "{status:?}");
    let json = cluster.kv54(["status", "--json"]).exits(3).json();
    assert_eq!(
        (&json["keys"], &json["tombstones"]),
        (&json!(37), &json!(3))
    );
    // Of erin's part nobody is left.
    cluster.kill("alice");
    cluster.kill("bob");
    let status = cluster.kv54(["status"]).exits(3);
    let unknown = "keys without their copies: ?, tombstones: ?\n";
    assert!(status.text().ends_with(unknown), "{status:?}");
    let json = cluster.kv54(["status", "--json"]).exits(3).json();
    assert_eq!(json["keys"], json!(null));
}

#[test]
fn a_shell_completes_the_names_of_nodes() {
    let cluster = Cluster::of(&FIVE);
    let names = cluster.kv54(["completions", "--nodes"]).exits(0);
    assert_eq!(names.text(), "alice\nbob\ncarol\ndave\nerin\n");
    let program = PathBuf::from(env!("CARGO_BIN_EXE_kv54"));
    let path = std::env::var("PATH").unwrap();
    let path = format!("{}:{path}", program.parent().unwrap().display());
    let completed = |shell: &str, script: &str| {
        let mut command = Command::new(shell);
        let command = command.current_dir(&cluster.dir).env("PATH", &path);
        let output = command.args(["-c", script]).output().ok()?; // not every machine has it
        let said = String::from_utf8(output.stdout).unwrap();
        Some(
            said.split_whitespace()
                .map(String::from)
                .collect::<Vec<_>>(),
        )
    };
    for (words, expected) in [
        ("get tea --via ''", &FIVE[..]),
        ("get tea --via c", &["carol"]),
        ("serve d", &["dave"]),
        ("serve --al", &["--all"]),
    ] {
        let bash = format!(
            "source <(kv54 completions bash); set -- {words}; COMP_WORDS=(kv54 \"$@\"); COMP_CWORD=$#
            f=$(complete -p kv54 | grep -o '_kv54[a-z_]*'); $f kv54 \"${{!#}}\" \"${{COMP_WORDS[$#-1]}}\"
            echo ${{COMPREPLY[*]}}"
        );
        assert_eq!(completed("bash", &bash).unwrap(), expected, "bash: {words}");
        let words = words.replace('\'', "");
        let fish = format!("kv54 completions fish | source; complete -C 'kv54 {words}' | cut -f1");
        if let Some(names) = completed("fish", &fish) {
            assert_eq!(names, expected, "fish: {words}");
        }
    }
    let zsh = cluster.kv54(["completions", "zsh"]).exits(0);
    let asks = zsh
        .text()
        .matches(":($(kv54 completions --nodes 2> /dev/null))'")
        .count();
    assert_eq!(
        asks, 6,
        "serve, and --via of set, get, delete, cas and incr"
    );
    assert!(!zsh.text().contains("_hosts"));
}

#[test]
fn every_argument_has_a_line_of_help() {
    let mut command = Cli::command();
    command.build();
    let commands = command.get_subcommands().chain([&command]);
    for command in commands.filter(|command| command.get_name() != "help") {
        for argument in command.get_arguments() {
            let help = argument.get_help().map(ToString::to_string);
            let (command, name) = (command.get_name(), argument.get_id());
            assert!(
                help.is_some_and(|help| !help.is_empty()),
                "{command}: {name}"
            );
        }
    }
}

#[test]
fn the_log_is_an_option_of_serve_alone() {
    let cluster = Cluster::of(&["alice"]);
    cluster
        .spawn(["serve", "alice", "--log", "debug"])
        .wait_for("listening on");
    let said = cluster.kv54(["get", "tea", "--log", "debug"]).exits(2);
    said.says(&["--log"]);
}

/// The line that the docs show, as cron has it run.
#[test]
fn the_backup_of_the_docs_leaves_no_half_of_a_dump() {
    let mut cluster = Cluster::running(&["alice"]);
    cluster.kv54(["set", "tea", "green"]).exits(0);
    let hosts = std::fs::read_to_string("docs/hosts.md").unwrap();
    let block = hosts.split("```cron\n").nth(1).unwrap();
    let command = block.lines().next().unwrap().splitn(6, ' ').nth(5).unwrap();
    let dir = cluster.dir.clone();
    let command = command
        .replace("\\%", "%") // cron reads a bare one as a line break
        .replace("/var/backups", dir.to_str().unwrap())
        .replace("/etc/kv54/", "")
        .replace("/usr/local/bin/kv54", env!("CARGO_BIN_EXE_kv54"));
    let run = || Command::new("sh").args(["-c", &command]).output().unwrap();
    let dumps = || -> Vec<PathBuf> {
        let files = dir.read_dir().unwrap().map(|file| file.unwrap().path());
        let is_dump = |path: &PathBuf| path.extension().is_some_and(|end| end == "jsonl");
        files.filter(is_dump).collect()
    };
    let done = run();
    assert!(done.status.success(), "{command}: {done:?}");
    let [dump] = &dumps()[..] else {
        panic!("{:?}", dumps())
    };
    let text = std::fs::read_to_string(dump).unwrap();
    assert_eq!(text, "{\"key\":\"tea\",\"value\":\"green\"}\n");
    std::fs::remove_file(dump).unwrap();
    cluster.kill("alice");
    assert!(!run().status.success());
    assert_eq!(dumps(), Vec::<PathBuf>::new());
}

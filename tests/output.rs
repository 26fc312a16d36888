//! What a terminal, a pipe or a closed end gives to a command, and gets from it.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::process::{Command, Stdio};

use common::{Cluster, Said};
use serde_json::json;

/// It renames a terminal, moves back, writes red by one character (C1), turns the direction of
/// writing, and has a byte that is not UTF-8.
const NASTY: &[u8] = b"a\\\tb\n\x1b]0;x\x07\rc\xc2\x9b31m\xe2\x80\xaed\xff";
/// The same on a terminal.
const SHOWN: &str = "a\\\tb\n\\u{1b}]0;x\\u{7}\\rc\\u{9b}31m\\u{202e}d\\xff\n";
/// The same in a line.
const IN_A_LINE: &str = r"a\\\tb\n\u{1b}]0;x\u{7}\rc\u{9b}31m\u{202e}d\xff";

#[test]
fn a_terminal_does_not_obey_a_value_and_a_pipe_has_its_bytes() {
    let cluster = Cluster::running(&["alice"]);
    cluster.kv54_with(["set", "tea"], NASTY).exits(0);
    assert_eq!(
        cluster.kv54(["get", "tea"]).exits(0).out,
        [NASTY, b"\n"].concat()
    );
    assert_eq!(cluster.kv54(["get", "tea", "--raw"]).exits(0).out, NASTY);
    let Some(shown) = on_a_terminal(&cluster, "get tea") else {
        return; // a machine without `script`
    };
    assert_eq!(String::from_utf8(shown).unwrap(), SHOWN);
    let raw = on_a_terminal(&cluster, "get tea --raw").unwrap();
    assert_eq!(raw, NASTY, "{}", raw.escape_ascii());
    // An export shows what it would write, and what is text in it as JSON that can be read back.
    let text = std::str::from_utf8(&NASTY[..NASTY.len() - 1]).unwrap();
    cluster.kv54(["set", "tea", text]).exits(0);
    for command in ["get tea --json", "export", "export --resp", "status --json"] {
        let shown = on_a_terminal(&cluster, command).unwrap();
        let shown = String::from_utf8(shown).unwrap();
        assert_eq!(shown.find(obeyed), None, "{command}: {shown:?}");
        if command == "get tea --json" {
            let read: serde_json::Value = serde_json::from_str(&shown).unwrap();
            assert_eq!(read, json!({ "key": "tea", "value": text }));
        }
    }
}

#[test]
fn a_line_of_several_keys_is_one_line_whatever_is_in_it() {
    let cluster = Cluster::running(&["alice"]);
    let key = "te\ta\nmilk\twhite\\";
    cluster.kv54_with(["set", key], NASTY).exits(0);
    cluster.kv54(["set", "milk", "white"]).exits(0);
    let lines = format!("te\\ta\\nmilk\\twhite\\\\\t{IN_A_LINE}\nmilk\twhite\n");
    let piped = cluster.kv54(["get", key, "milk"]).exits(0);
    assert_eq!(piped.text(), lines);
    if let Some(shown) = on_a_terminal(&cluster, "get $'te\\ta\\nmilk\\twhite\\\\' milk") {
        assert_eq!(String::from_utf8(shown).unwrap(), lines);
    }
}

#[test]
fn an_error_is_one_plain_line_whatever_it_quotes() {
    let cluster = Cluster::running(&["alice"]);
    let forged = "x\u{1b}[31m\r\nkv54: all is well\u{9b}m\u{202e}";
    let line = json!({ forged: 1 }).to_string();
    let directory = cluster.dir.join(forged);
    std::fs::create_dir(&directory).unwrap();
    let broken = format!("{forged}/cluster.toml");
    cluster.file(&broken, "[nodes]\nalice = \"alice\"\n");
    for (args, input) in [
        (&["import"][..], &*line),
        (&["serve", forged], ""),
        (&["serve", "alice", "--listen", forged], ""),
        (&["get", "tea", "--via", forged], ""),
        (&["get", forged], ""),
        (&["status", "--config", forged], ""),
        (&["status", "--config", &format!("no {forged}")], ""),
        (&["status", "--config", &broken], ""),
    ] {
        let said = cluster.kv54_with(args, input.as_bytes());
        assert!(is_plain(&said), "{args:?}: {said:?}");
        said.says(&[]);
    }
    let status = |variable: &str| {
        let mut status = cluster.command();
        status.args(["status", "--help"]).env(variable, forged);
        String::from_utf8(status.output().unwrap().stdout).unwrap()
    };
    for variable in ["KV54_CONFIG", "KV54_LOG"] {
        assert!(!status(variable).contains("all is well"), "{variable}");
    }
}

/// Whether a terminal would obey this character; where lines and fields end is another question.
fn obeyed(c: char) -> bool {
    !"\n\t".contains(c) && c.is_control() || "\u{2028}\u{202e}\u{2066}".contains(c)
}

/// Whether nothing in an error is obeyed or looks like another one.
fn is_plain(said: &Said) -> bool {
    let forged = said.err.lines().any(|line| line.starts_with("kv54: all"));
    said.code != 0 && !forged && !said.err.contains(obeyed)
}

/// Standard output of a command on a terminal, with the line breaks that were sent to it.
fn on_a_terminal(cluster: &Cluster, command: &str) -> Option<Vec<u8>> {
    let kv54 = format!("stty -opost; {} {command}", env!("CARGO_BIN_EXE_kv54"));
    let mut script = Command::new("script");
    script.current_dir(&cluster.dir).env("SHELL", "/bin/bash");
    script
        .args(["-qec", &kv54, "/dev/null"])
        .stdin(Stdio::null());
    script.output().ok().map(|output| output.stdout)
}

//! What a terminal, a pipe or a closed end gives to a command, and gets from it.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use common::{Cluster, Said};
use serde_json::json;
use socket2::SockRef;

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
    for usage in [
        &[forged][..],
        &["get", "tea", &format!("--{forged}")],
        &["get", "tea", "--timeout", forged],
        &["bench", forged],
    ] {
        // To a pipe, escape sequences are left out anyway.
        let usage: Vec<String> = usage.iter().map(|word| format!("'{word}'")).collect();
        if let Some(shown) = on_a_terminal(&cluster, &usage.join(" ")) {
            let shown = String::from_utf8(shown).unwrap();
            let forged = shown.lines().any(|line| line.starts_with("kv54: all"));
            let obeyed =
                shown.contains("x\u{1b}[31m") || shown.contains(['\r', '\u{9b}', '\u{202e}']);
            assert!(
                !forged && !obeyed && shown.contains("all is well"),
                "{shown:?}"
            );
        }
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

#[test]
fn a_closed_output_is_an_error_before_anything_is_done() {
    let cluster = Cluster::running(&["alice"]);
    cluster.kv54(["set", "tea", "green"]).exits(0);
    for command in [
        "set tea black",
        "delete tea",
        "cas tea green black",
        "incr cups",
        "get tea",
        "where tea",
        "status",
        "export",
        "import <<< '{\"key\": \"tea\", \"value\": \"black\"}'",
        "bench set",
        "completions bash",
    ] {
        let said = in_bash(&cluster, &format!("$kv54 {command} >&-")).exits(2);
        said.says(&["standard output is closed"]);
        assert_eq!(cluster.kv54(["get", "tea"]).exits(0).text(), "green\n");
    }
    // Python and Node.js hand down a /dev/null like the one that the runtime opens.
    in_bash(&cluster, "$kv54 set tea black 1<>/dev/null").exits(0);
    assert_eq!(cluster.kv54(["get", "tea"]).exits(0).text(), "black\n");
    // A node prints nothing.
    let other = Cluster::of(&["bob"]);
    let serve = format!("exec {} serve bob >&- <&-", env!("CARGO_BIN_EXE_kv54"));
    let mut bash = Command::new("bash");
    bash.current_dir(&other.dir).args(["-c", &serve]);
    common::Node::spawn(&mut bash).wait_for("ready");
}

#[test]
fn a_closed_input_is_no_empty_one() {
    let cluster = Cluster::running(&["alice"]);
    for command in ["set tea", "set tea -", "import"] {
        let said = in_bash(&cluster, &format!("$kv54 {command} <&-")).exits(2);
        said.says(&["standard input is closed"]);
        cluster.kv54(["get", "tea"]).exits(1);
        for empty in ["</dev/null", "<>/dev/null"] {
            in_bash(&cluster, &format!("$kv54 {command} {empty}")).exits(0);
        }
        cluster.kv54(["delete", "tea"]).exits(0);
    }
    in_bash(&cluster, "$kv54 set tea green <&-").exits(0);
    in_bash(&cluster, "$kv54 get tea <&-").exits(0);
}

#[test]
fn a_pipe_that_does_not_block_is_waited_for() {
    let cluster = Cluster::running(&["alice"]);
    let value: Vec<u8> = b"0123456789".repeat(100_000);
    for command in [&["set", "tea"][..], &["import"]] {
        let (output, mut input) = pipe(&cluster.dir);
        SockRef::from(&output).set_nonblocking(true).unwrap();
        let mut child = cluster
            .command()
            .args(command)
            .stdin(output)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        thread::sleep(Duration::from_millis(300)); // it finds nothing there
        let bytes = match command {
            ["import"] => b"{\"key\": \"milk\", \"value\": \"white\"}\n".repeat(1000),
            _ => value.clone(),
        };
        let written = input.write_all(&bytes);
        drop(input);
        assert!(child.wait().unwrap().success(), "{command:?}");
        written.unwrap();
    }
    assert_eq!(cluster.kv54(["get", "milk"]).exits(0).text(), "white\n");
    for command in [&["get", "tea", "--raw"][..], &["export", "--resp"]] {
        let (mut output, input) = pipe(&cluster.dir);
        SockRef::from(&input).set_nonblocking(true).unwrap();
        let mut child = cluster
            .command()
            .args(command)
            .stdout(input)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        thread::sleep(Duration::from_millis(300)); // it finds the pipe full
        let mut bytes = Vec::new();
        output.read_to_end(&mut bytes).unwrap();
        assert!(child.wait().unwrap().success(), "{command:?}");
        let whole = bytes.windows(value.len()).any(|part| part == value);
        assert!(whole, "{command:?}: {} bytes", bytes.len());
    }
}

#[test]
fn a_value_on_standard_input_that_is_too_large_is_not_measured() {
    let cluster = Cluster::running(&["alice"]);
    let said = cluster
        .kv54_with(["set", "tea"], &vec![b'x'; 2 << 20])
        .exits(2);
    said.says(&["too-large: ", "over 1048576 bytes"]);
    cluster
        .kv54_with(["set", "tea"], &vec![b'x'; 1 << 20])
        .exits(0);
}

#[test]
fn an_import_passes_over_lines_of_any_length() {
    let cluster = Cluster::running(&["alice"]);
    // More than the command may have of memory stands in the first line.
    let lines = r#"head -c 400000000 /dev/zero; echo; echo '{"key": "tea", "value": "green"}'"#;
    let import = format!("({lines}) | (ulimit -v 300000; $kv54 import --from 2)");
    let said = in_bash(&cluster, &import).exits(0);
    assert_eq!(said.text(), "1 line written\n");
    assert_eq!(cluster.kv54(["get", "tea"]).exits(0).text(), "green\n");
    // It is not passed over where it is to be written.
    let said = cluster.kv54_with(["import"], &vec![b'x'; 7 << 20]).exits(2);
    said.says(&["line 1: too-large"]);
}

#[test]
fn an_array_is_no_line_of_a_dump() {
    let cluster = Cluster::running(&["alice"]);
    for line in [
        r#"["tea", null, "green"]"#,
        r#" ["tea", null, "green", null]"#,
    ] {
        let said = cluster.kv54_with(["import"], line.as_bytes()).exits(2);
        said.says(&["line 1: ", "an object, not an array"]);
    }
    cluster.kv54(["get", "tea"]).exits(1);
    let line = b" \t{\"key\": \"tea\", \"value\": \"green\"} \r\n";
    cluster.kv54_with(["import"], line).exits(0);
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

/// Runs a line of bash, in which `$kv54` is the command.
fn in_bash(cluster: &Cluster, line: &str) -> Said {
    let mut bash = Command::new("bash");
    bash.current_dir(&cluster.dir)
        .env("kv54", env!("CARGO_BIN_EXE_kv54"));
    let output = bash.args(["-c", line]).output().unwrap();
    Said {
        code: output.status.code().unwrap_or(-1),
        out: output.stdout,
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

/// The end of a pipe that is read, and the one that is written.
fn pipe(dir: &Path) -> (File, File) {
    let path = dir.join("pipe");
    let _ = std::fs::remove_file(&path);
    assert!(
        Command::new("mkfifo")
            .arg(&path)
            .status()
            .unwrap()
            .success()
    );
    // Neither end waits for the other while both are held open.
    let both = OpenOptions::new().read(true).write(true).open(&path);
    let (output, input) = (
        File::open(&path),
        OpenOptions::new().write(true).open(&path),
    );
    drop(both);
    (output.unwrap(), input.unwrap())
}

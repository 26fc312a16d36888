//! The README, followed to the letter: each of its `console` blocks in order, in one shell, and
//! what it prints there. Remarks for this test stand in the README as comments that nobody sees.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Cluster, FIVE};

const README: &str = include_str!("../README.md");
/// A command that takes longer than this has hung.
const PATIENCE: &str = "120";
/// Other kv54s may run on this machine: the shell sees but those that it has started.
const ALONE: &[u8] = b"exec 2>&1
pkill() { command pkill -s 0 \"$@\"; }
pgrep() { command pgrep -s 0 \"$@\"; }
";
/// What the shell prints behind the output of each command.
const END: &str = "-- end of the command --";

#[test]
fn the_readme_does_what_it_says() {
    let cluster = Cluster::of(&FIVE);
    let mut shell = Shell::new(&cluster);
    let mut server: Option<common::Node> = None;
    for block in blocks("console") {
        match block.remark {
            Some("another terminal") => {
                let (_, said) = &block.commands()[0];
                let node = cluster.spawn(["serve", "--all"]);
                for line in said.iter().filter(|line| **line != "...") {
                    let line = line.split(" after ").next().unwrap();
                    node.wait_for(&shell.here(line));
                }
                server = Some(node);
            }
            Some("not here") => {}
            remark => {
                if remark == Some("Ctrl-C in the other terminal") {
                    let mut node = server.take().unwrap();
                    node.signal("INT");
                    assert_eq!(node.wait(), 0);
                }
                for (command, expected) in block.commands() {
                    shell.prints(&command, &expected, block.line);
                }
            }
        }
    }
}

#[test]
fn the_54_lines_are_the_ones_in_the_source() {
    let shown: Vec<Block> = blocks("rust").collect();
    for (name, source) in [
        ("src/server.rs", include_str!("../src/server.rs")),
        ("src/client.rs", include_str!("../src/client.rs")),
    ] {
        let found = shown.iter().any(|block| code(&block.text) == code(source));
        assert!(found, "the code of {name} is not in the README as it is");
    }
}

#[test]
fn the_first_step_is_the_one_in_the_example() {
    let unindented = |text: &str| -> Vec<String> {
        let lines = code(text).into_iter();
        lines.map(|line| line.trim_start().to_owned()).collect()
    };
    let shown = unindented(&blocks("rust").next().unwrap().text);
    let source = unindented(include_str!("../examples/one_node.rs"));
    let found = source.windows(shown.len()).any(|lines| lines == shown);
    assert!(found, "{shown:#?} is not in examples/one_node.rs as it is");
}

#[test]
fn the_readme_is_short_enough_to_be_read() {
    let lines = README.lines().count();
    assert!(lines <= 350, "{lines} lines");
    let first = README.lines().position(|line| line == "green").unwrap();
    assert!(first < 30, "the first result is in line {}", first + 1);
}

/// The lines of code, without blank ones and comments.
fn code(text: &str) -> Vec<String> {
    let lines = text.lines().map(str::trim_end);
    let code = lines.filter(|line| !line.is_empty() && !line.trim_start().starts_with("//"));
    code.map(str::to_owned).collect()
}

/// A fenced block, and the comment `<!-- … -->` in the line before it.
struct Block {
    remark: Option<&'static str>,
    line: usize,
    text: String,
}

fn blocks(language: &str) -> impl Iterator<Item = Block> {
    let lines: Vec<&'static str> = README.lines().collect();
    let fence = format!("```{language}");
    let starts: Vec<usize> = (0..lines.len()).filter(|n| lines[*n] == fence).collect();
    starts.into_iter().map(move |start| {
        let remark = lines[start - 1].strip_prefix("<!-- ");
        let text = lines[start + 1..].iter().take_while(|line| **line != "```");
        Block {
            remark: remark.and_then(|remark| remark.strip_suffix(" -->")),
            line: start + 1,
            text: text.fold(String::new(), |text, line| text + line + "\n"),
        }
    })
}

impl Block {
    /// Each command, and the lines that it prints.
    fn commands(&self) -> Vec<(String, Vec<&str>)> {
        let mut commands: Vec<(String, Vec<&str>)> = Vec::new();
        for line in self.text.lines() {
            if let Some(command) = line.strip_prefix("$ ") {
                commands.push((command.to_owned(), Vec::new()));
                continue;
            }
            let (command, output) = commands.last_mut().unwrap();
            match line.strip_prefix("> ") {
                Some(more) if output.is_empty() => write!(command, "\n{more}").unwrap(),
                _ => output.push(line),
            }
        }
        commands
    }
}

/// One shell in a directory with the README's `cluster.toml`, but for its ports.
struct Shell {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    addresses: Vec<(String, String)>,
}

impl Shell {
    fn new(cluster: &Cluster) -> Shell {
        let theirs = FIVE.iter().zip(5401..);
        let addresses =
            theirs.map(|(name, port)| (format!("127.0.0.1:{port}"), cluster.address(name)));
        // The binary of this build stands where the README's reader has built it.
        let release = cluster.dir.join("target/release");
        std::fs::create_dir_all(&release).unwrap();
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_kv54"), release.join("kv54")).unwrap();
        let mut child = Command::new("setsid")
            .args(["timeout", PATIENCE, "bash", "--norc"])
            .current_dir(&cluster.dir)
            .env_remove("KV54_CONFIG")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        input.write_all(ALONE).unwrap();
        Shell {
            input,
            output: BufReader::new(child.stdout.take().unwrap()),
            child,
            addresses: addresses.collect(),
        }
    }

    /// The README's text with this test's addresses.
    fn here(&self, text: &str) -> String {
        let replaced = |text: String, (from, to): &(String, String)| text.replace(from, to);
        self.addresses.iter().fold(text.to_owned(), replaced)
    }

    /// Runs a command and compares; a line `...` stands for any number of lines.
    fn prints(&mut self, command: &str, expected: &[&str], line: usize) {
        let start = Instant::now();
        writeln!(self.input, "{}\necho '{END}'", self.here(command)).unwrap();
        let mut said = Vec::new();
        loop {
            let mut line = String::new();
            let read = self.output.read_line(&mut line).unwrap();
            assert!(read > 0, "the shell is gone after {command:?}: {said:#?}");
            match line.trim_end() {
                END => break,
                line if line.contains(": line ") && line.contains("kv54 serve") => {} // bash on its jobs
                line => said.push(line.to_owned()),
            }
        }
        let shown: Vec<String> = expected.iter().map(|line| self.here(line)).collect();
        assert!(
            alike(&said, &shown),
            "the block at line {line} of the README: {command}\n printed {said:#?}\n expected {shown:#?}"
        );
        assert!(start.elapsed() < Duration::from_secs(100));
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        // The shell began a session of its own: all that it started is in it.
        let session = self.child.id();
        let _ = Command::new("pkill")
            .args(["-KILL", "-s", &session.to_string()])
            .status();
        let _ = self.child.wait();
    }
}

fn alike(said: &[String], expected: &[String]) -> bool {
    match (said, expected) {
        (said, [dots, rest @ ..]) if dots == "..." => {
            (0..=said.len()).any(|skipped| alike(&said[skipped..], rest))
        }
        ([], []) => true,
        ([line, said @ ..], [shown, expected @ ..]) => {
            masked(line) == masked(shown) && alike(said, expected)
        }
        _ => false,
    }
}

/// A line without what differs from run to run: who wrote, for how long, how wide a column is.
fn masked(line: &str) -> Vec<String> {
    let word = |word: &str| match word.split_once('-') {
        Some((counter, writer)) if writer.len() > 12 && writer.parse::<u64>().is_ok() => {
            format!("{counter}-writer")
        }
        _ => word.to_owned(),
    };
    line.split_whitespace().map(word).collect()
}

//! The README and the pages of `docs/`, followed to the letter: the `console` blocks of each page
//! in order, in one shell, and what they print there. Remarks for this test stand in the pages as
//! comments that a reader does not see:
//!
//! | remark in the line before a block | what this test does |
//! | --- | --- |
//! | `another terminal` | starts `kv54 serve --all` beside the shell |
//! | `Ctrl-C in the other terminal` | stops that one first |
//! | `a loop in the other terminal` | runs the block beside the shell; it must not have ended at the end of the page |
//! | `five nodes are running` | first starts five nodes, as the README does |
//! | `figures differ` | compares words with a digit in them as if they were equal |
//! | `not here` | leaves the block out |
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs::{read_dir, read_to_string};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Cluster, FIVE, examples};

/// A command that takes longer than this has hung.
const PATIENCE: &str = "120";
/// Other kv54s may run on this machine: the shell sees but those that it has started.
const ALONE: &[u8] = b"exec 2>&1
pkill() { command pkill -s 0 \"$@\"; }
pgrep() { command pgrep -s 0 \"$@\"; }
";
/// What a page expects whose reader has the README's five nodes.
const FIVE_NODES: [&str; 3] = [
    "PATH=$PWD/target/release:$PATH",
    "for name in alice bob carol dave erin; do kv54 serve $name 2>> $name.log & done",
    "kv54 status --wait > /dev/null",
];
/// What the shell prints behind the output of each command.
const END: &str = "-- end of the command --";
/// How many lines of plain code a first reader reads in a minute, at most.
const LINES_A_MINUTE: usize = 32;

#[test]
fn the_readme_does_what_it_says() {
    follow(&page("README.md"));
}

#[test]
fn the_docs_do_what_they_say() {
    let docs = docs();
    assert!(!docs.is_empty());
    docs.iter().for_each(follow);
}

/// Runs all blocks of a page.
fn follow(page: &Page) {
    let cluster = Cluster::of(&FIVE);
    let mut shell = Shell::new(&cluster);
    let (mut server, mut looping): (Option<common::Node>, Option<Block<'_>>) = (None, None);
    for block in page.blocks("console") {
        if block.says("not here") {
            continue;
        }
        if block.says("another terminal") {
            let (_, said) = &block.commands()[0];
            let node = cluster.spawn(["serve", "--all"]);
            for line in said.iter().filter(|line| **line != "...") {
                let line = line.split(" after ").next().unwrap();
                node.wait_for(&shell.here(line));
            }
            server = Some(node);
            continue;
        }
        if block.says("Ctrl-C in the other terminal") {
            let mut node = server.take().unwrap();
            node.signal("INT");
            assert_eq!(node.wait(), 0);
        }
        if block.says("a loop in the other terminal") {
            let (commands, _): (Vec<String>, Vec<_>) = block.commands().into_iter().unzip();
            let beside = format!("({}) &> loop.txt & loop=$!", commands.join("; "));
            shell.prints(&beside, &[], &block);
            looping = Some(block);
            continue;
        }
        if block.says("five nodes are running") {
            for command in FIVE_NODES {
                shell.prints(command, &[], &block);
            }
        }
        for (command, expected) in block.commands() {
            shell.prints(&command, &expected, &block);
        }
    }
    if let Some(block) = looping {
        shell.prints("kill -0 $loop || cat loop.txt", &[], &block);
    }
}

#[test]
fn the_54_lines_are_the_ones_in_the_source() {
    let readme = page("README.md");
    let shown = readme.blocks("rust");
    for name in ["src/server.rs", "src/client.rs"] {
        let source = code(&page(name).text);
        let found = shown.iter().any(|block| code(&block.text) == source);
        assert!(found, "the code of {name} is not in the README as it is");
    }
}

#[test]
fn the_first_step_is_the_one_in_the_example() {
    let unindented = |text: &str| -> Vec<String> {
        let lines = code(text).into_iter();
        lines.map(|line| line.trim_start().to_owned()).collect()
    };
    let how = page("docs/how.md");
    let shown = unindented(&how.blocks("rust")[0].text);
    let source = unindented(&page("examples/one_node.rs").text);
    let found = source.windows(shown.len()).any(|lines| lines == shown);
    assert!(found, "{shown:#?} is not in examples/one_node.rs as it is");
}

#[test]
fn the_readme_is_short_enough_to_be_read() {
    let readme = page("README.md").text;
    let lines = readme.lines().count();
    assert!(lines <= 250, "{lines} lines");
    for (line, number) in readme.lines().zip(1..) {
        let width = line.chars().count();
        assert!(width <= 120, "line {number} has {width} characters");
    }
    let first = readme.lines().position(|line| line == "green").unwrap();
    assert!(first < 30, "the first result is in line {}", first + 1);
}

#[test]
fn reading_takes_as_long_as_the_readme_says() {
    let readme = page("README.md");
    let (_, table) = readme.text.split_once("\n## Reading it\n").unwrap();
    let (table, _) = table.split_once("\n## ").unwrap();
    let rows = table.lines().filter_map(|line| {
        let mut cells = line.split('|').skip(1).map(str::trim);
        let (files, minutes) = (cells.next()?, cells.next()?.parse::<usize>().ok()?);
        Some((paths_in(files), minutes))
    });
    let rows: Vec<(Vec<&str>, usize)> = rows.collect();
    for (paths, minutes) in &rows {
        let lines: usize = paths.iter().map(|path| lines_of_rust(&at(path))).sum();
        let most = minutes * LINES_A_MINUTE;
        assert!(
            lines <= most,
            "{paths:?}: {lines} lines in {minutes} minutes"
        );
    }
    let told: HashSet<&str> = rows.iter().flat_map(|(paths, _)| paths.clone()).collect();
    for entry in read_dir(at("src")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let path = format!("src/{name}");
        assert!(
            told.contains(&*path) || path == "src/lib.rs",
            "{path} is missing in \"Reading it\""
        );
    }
}

#[test]
fn the_figures_of_the_docs_are_those_of_the_benchmarks() {
    let (measuring, benchmarks) = (page("docs/measuring.md"), page("BENCHMARKS.md"));
    let (_, table) = measuring.text.split_once("<!-- numbers -->\n").unwrap();
    let (table, _) = table.split_once("<!-- /numbers -->").unwrap();
    for row in table.lines().skip(2) {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let figures = format!("| {} | {} |", cells[1], cells[3..7].join(" | "));
        let found = benchmarks.text.contains(&figures);
        assert!(found, "BENCHMARKS.md has no line {figures}");
    }
}

#[test]
fn every_link_leads_somewhere() {
    let mut pages = docs();
    for name in [
        "README.md",
        "deploy/README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "BENCHMARKS.md",
    ] {
        pages.push(page(name));
    }
    for page in &pages {
        for link in page.links() {
            let (path, heading) = link.split_once('#').unwrap_or((link, ""));
            let here = at(&page.path);
            let target = match path {
                "" => here,
                path => here.parent().unwrap().join(path),
            };
            assert!(target.exists(), "{}: {link} does not exist", page.path);
            if !heading.is_empty() {
                let headings = headings(&read_to_string(target).unwrap());
                let found = headings.iter().any(|known| known == heading);
                assert!(found, "{}: {link}: only {headings:?}", page.path);
            }
        }
    }
}

#[test]
fn the_readme_and_the_docs_know_each_other() {
    let readme = page("README.md");
    for doc in docs() {
        let name = &doc.path;
        assert!(readme.links().contains(&&**name), "README.md: no {name}");
        let back = doc.links().contains(&"../README.md");
        assert!(back, "{name}: no link to the README");
    }
}

/// The file at this path from the root of the repository.
fn at(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A text of the repository.
struct Page {
    path: String,
    text: String,
}

fn page(path: &str) -> Page {
    Page {
        path: path.to_owned(),
        text: read_to_string(at(path)).unwrap(),
    }
}

fn docs() -> Vec<Page> {
    let entries = read_dir(at("docs")).unwrap().map(Result::unwrap);
    let pages = entries.filter(|entry| has_extension(&entry.path(), "md"));
    let mut names: Vec<String> = pages
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    names.sort();
    let page = |name| page(&format!("docs/{name}"));
    names.into_iter().map(page).collect()
}

fn has_extension(path: &Path, wanted: &str) -> bool {
    path.extension().is_some_and(|found| found == wanted)
}

/// The lines of code, without blank ones and comments.
fn code(text: &str) -> Vec<String> {
    let lines = text.lines().map(str::trim_end);
    let code = lines.filter(|line| !line.is_empty() && !line.trim_start().starts_with("//"));
    code.map(str::to_owned).collect()
}

/// All lines of a Rust file, or of all of them in a directory.
fn lines_of_rust(path: &Path) -> usize {
    if path.is_dir() {
        let entries = read_dir(path).unwrap();
        return entries
            .map(|entry| lines_of_rust(&entry.unwrap().path()))
            .sum();
    }
    match has_extension(path, "rs") {
        true => read_to_string(path).unwrap().lines().count(),
        false => 0,
    }
}

/// The paths between backticks, without a slash at the end.
fn paths_in(cell: &str) -> Vec<&str> {
    let quoted = cell.split('`').skip(1).step_by(2);
    quoted.map(|path| path.trim_end_matches('/')).collect()
}

/// The lines of a page outside of its fenced blocks.
fn prose(text: &str) -> impl Iterator<Item = &str> {
    let mut fenced = false;
    text.lines().filter(move |line| {
        let fence = line.starts_with("```");
        fenced ^= fence;
        !fenced && !fence
    })
}

/// The headings of a page as a link names them: in lower case, with dashes for spaces, without signs.
fn headings(text: &str) -> Vec<String> {
    let headings = prose(text).filter(|line| line.starts_with('#'));
    let anchor = |heading: &str| {
        let lower = heading.trim_start_matches('#').trim().to_lowercase();
        let known = lower.chars().filter_map(|c| match c {
            ' ' => Some('-'),
            c if c.is_alphanumeric() || "-_".contains(c) => Some(c),
            _ => None,
        });
        known.collect()
    };
    headings.map(anchor).collect()
}

impl Page {
    /// The targets of all links that stay in the repository.
    fn links(&self) -> Vec<&str> {
        let targets = prose(&self.text).flat_map(|line| {
            let starts = line.split("](").skip(1);
            starts.filter_map(|start| start.split_once(')').map(|(target, _)| target))
        });
        targets.filter(|target| !target.contains("://")).collect()
    }

    fn blocks(&self, language: &str) -> Vec<Block<'_>> {
        let lines: Vec<&str> = self.text.lines().collect();
        let fence = format!("```{language}");
        let starts = (0..lines.len()).filter(|n| lines[*n] == fence);
        let block = |start: usize| {
            let before = lines[..start].last().unwrap_or(&"");
            let remark = before.strip_prefix("<!-- ");
            let text = lines[start + 1..].iter().take_while(|line| **line != "```");
            Block {
                page: &self.path,
                remark: remark.and_then(|remark| remark.strip_suffix(" -->")),
                line: start + 1,
                text: text.fold(String::new(), |text, line| text + line + "\n"),
            }
        };
        starts.map(block).collect()
    }
}

/// A fenced block, and the comment `<!-- …, … -->` in the line before it.
struct Block<'a> {
    page: &'a str,
    remark: Option<&'a str>,
    line: usize,
    text: String,
}

impl Block<'_> {
    /// Whether the remark before the block says this.
    fn says(&self, what: &str) -> bool {
        let remarks = self
            .remark
            .into_iter()
            .flat_map(|remark| remark.split(", "));
        remarks.into_iter().any(|remark| remark == what)
    }

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
        let ours = FIVE.iter().map(|name| cluster.address(name));
        let more = (0..2).map(|n| format!("127.0.0.1:{}", cluster.spare_port(n))); // frank and grace
        let theirs = (5401..).map(|port| format!("127.0.0.1:{port}"));
        let addresses = theirs.zip(ours.chain(more));
        // The binaries of this build stand where the README's reader has built them.
        let release = cluster.dir.join("target/release");
        std::fs::create_dir_all(&release).unwrap();
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_kv54"), release.join("kv54")).unwrap();
        std::os::unix::fs::symlink(examples(), release.join("examples")).unwrap();
        let mut child = Command::new("setsid")
            .args(["timeout", PATIENCE, "bash", "--norc"])
            .current_dir(&cluster.dir)
            .env_remove("KV54_CONFIG")
            .env_remove("CARGO_TARGET_DIR")
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

    /// A page's text with this test's addresses.
    fn here(&self, text: &str) -> String {
        let replaced = |text: String, (from, to): &(String, String)| text.replace(from, to);
        self.addresses.iter().fold(text.to_owned(), replaced)
    }

    /// Runs a command and compares; a line `...` stands for any number of lines.
    fn prints(&mut self, command: &str, expected: &[&str], block: &Block) {
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
        let figures = block.says("figures differ");
        let masked = |lines: &[String]| -> Vec<Vec<String>> {
            let masked = |line: &String| masked(line, figures);
            lines.iter().map(masked).collect()
        };
        assert!(
            alike(&masked(&said), &masked(&shown)),
            "the block at line {} of {}: {command}\n printed {said:#?}\n expected {shown:#?}",
            block.line,
            block.page
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

fn alike(said: &[Vec<String>], expected: &[Vec<String>]) -> bool {
    match (said, expected) {
        (said, [dots, rest @ ..]) if *dots == ["..."] => {
            (0..=said.len()).any(|skipped| alike(&said[skipped..], rest))
        }
        ([], []) => true,
        ([line, said @ ..], [shown, expected @ ..]) => line == shown && alike(said, expected),
        _ => false,
    }
}

/// The words of a line without what differs from run to run: a stamp's writer, how wide a column is,
/// and if `figures` differ, every word with a digit.
fn masked(line: &str, figures: bool) -> Vec<String> {
    let word = |word: &str| match word.split_once('-') {
        _ if figures && word.contains(|c: char| c.is_ascii_digit()) => "#".to_owned(),
        Some((counter, writer)) if writer.len() > 12 && writer.parse::<u64>().is_ok() => {
            format!("{counter}-writer")
        }
        _ => word.to_owned(),
    };
    line.split_whitespace().map(word).collect()
}

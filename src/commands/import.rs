//! `import`: sets what the lines of an export say, batch by batch and in their order.

use std::fs::{File, Metadata};
use std::io::{self, BufRead, IsTerminal as _, Read as _, Seek as _, Write as _};
use std::os::fd::AsFd as _;
use std::process::ExitCode;
use std::thread;

use clap::Args;
use futures::future::join_all;
use indexmap::IndexMap;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tokio::sync::mpsc::{Receiver, Sender, channel};

use super::{Failure, Options, Outcome, line, print};
use crate::client::Client;
use crate::entry::Packed;
use crate::error::Error;

/// Lines that are set at once, and their bytes, unless it is a single line: little enough for
/// a slow network to carry them to three nodes within one window.
const LINES: usize = 256;
const BYTES: usize = 256 << 10;

/// Set every key to its value, from the lines of an export on standard input.
///
/// Other keys stay as they are, and importing the same lines again is harmless. The first line
/// that cannot be written ends it: it is named, and every line before it is written.
#[derive(Args)]
#[command(after_help = "Examples:
  kv54 import < dump.jsonl
  kv54 import --from 5121 < dump.jsonl")]
pub(super) struct Import {
    /// Leave out the lines before this one, which an import that stopped has named
    #[arg(long, value_name = "LINE", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    from: u64,
}

/// Lines that are set at once. No two have the same key: of those, the later one must win.
#[derive(Default)]
struct Batch {
    sets: IndexMap<Vec<u8>, (u64, Packed)>, // with the number of the line
    bytes: usize,
    read: u64, // bytes of the input up to its end, left out ones too
    last: u64, // the number of its last line
}

impl Import {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        let client = options.client()?;
        if io::stdin().is_terminal() {
            let hint = "the lines are what you type now, until Ctrl-D";
            let _ = writeln!(io::stderr(), "kv54: {hint}");
        }
        // A thread of its own: reading may wait, and answers are not to wait for that.
        let (batches, coming) = channel(2);
        thread::spawn(move || read(io::stdin().lock(), self.from, &batches));
        let imported = set_all(&client, coming).await;
        client.replicas.settle().await;
        let done = imported?;
        let s = if done == 1 { "" } else { "s" };
        print(match options.json {
            true => format!("{}\n", json!({ "lines": done })),
            false => format!("{done} line{s} written\n"),
        })?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Sets batch after batch; how many lines that were.
async fn set_all(
    client: &Client,
    mut coming: Receiver<Result<Batch, Failure>>,
) -> Result<usize, Failure> {
    let (bar, mut done) = (progress(), 0);
    while let Some(batch) = coming.recv().await {
        let Batch {
            sets, read, last, ..
        } = batch?;
        let lines = sets.len();
        set(client, sets).await?;
        done += lines;
        bar.set_position(read);
        bar.set_message(format!("line {last}, {}/s", per_second(done, &bar)));
    }
    bar.finish_and_clear();
    Ok(done)
}

/// Sets all of these, or says which line is the first that could not be.
async fn set(client: &Client, sets: IndexMap<Vec<u8>, (u64, Packed)>) -> Result<(), Failure> {
    let set = async |(key, (number, value)): (Vec<u8>, (u64, Packed))| {
        let outcome = client.set(&key, &value).await;
        outcome.map_err(|error| (number, error))
    };
    let written = join_all(sets.into_iter().map(set)).await;
    let first = written.into_iter().collect::<Result<Vec<()>, _>>();
    first.map(drop).map_err(|(number, error): (u64, Error)| {
        let Failure { code, why } = error.into();
        let why = format!(
            "line {number}: {why}; every line before it is written: go on with --from {number}"
        );
        Failure { code, why }
    })
}

/// Reads lines to the end or to the first bad one, and hands them on in batches.
fn read(mut input: impl BufRead, from: u64, batches: &Sender<Result<Batch, Failure>>) {
    let (mut batch, mut line) = (Batch::default(), Vec::new());
    let mut number = 0;
    let bad = loop {
        number += 1;
        match next_line(&mut input, &mut line) {
            Ok(true) => batch.read += line.len() as u64,
            Ok(false) => break None,
            Err(why) => break Some(why),
        }
        if number < from || line.trim_ascii().is_empty() {
            continue;
        }
        let (key, value) = match line::read(&line) {
            Ok(pair) => pair,
            Err(why) => break Some(why),
        };
        let full = batch.sets.len() >= LINES || batch.bytes + line.len() > BYTES;
        if full && !batch.sets.is_empty() || batch.sets.contains_key(&key) {
            let next = Batch {
                read: batch.read,
                ..Batch::default()
            };
            let sent = batches.blocking_send(Ok(std::mem::replace(&mut batch, next)));
            if sent.is_err() {
                return; // an earlier line could not be set
            }
        }
        batch.bytes += line.len();
        batch.last = number;
        batch.sets.insert(key, (number, value));
    };
    let sent = batches.blocking_send(Ok(batch));
    if let (Ok(()), Some(why)) = (sent, bad) {
        let why = format!("line {number}: {why}; every line before it is written, none after it");
        let _ = batches.blocking_send(Err(Failure::usage(why)));
    }
}

/// Reads a line; `false` at the end of the input.
fn next_line(input: &mut impl BufRead, line: &mut Vec<u8>) -> Result<bool, String> {
    line.clear();
    let most = line::MAX_LINE;
    match input.take(most as u64 + 1).read_until(b'\n', line) {
        Ok(length) if length > most => Err(format!("too-large: at most {most} bytes are taken")),
        Ok(length) => Ok(length > 0),
        Err(error) => Err(format!("standard input: {error}")),
    }
}

/// How far it is, on a terminal: of the whole where standard input is a file.
fn progress() -> ProgressBar {
    let file = io::stdin().as_fd().try_clone_to_owned().map(File::from);
    let left = file.ok().and_then(|mut file| {
        let size = file.metadata().ok().filter(Metadata::is_file)?.len();
        Some(size.saturating_sub(file.stream_position().ok()?))
    });
    let (bar, template) = match left {
        Some(left) => (
            ProgressBar::new(left),
            "{wide_bar} {percent} %  {msg}  {eta} left",
        ),
        None => (ProgressBar::no_length(), "{bytes} in {elapsed}  {msg}"),
    };
    let style = ProgressStyle::with_template(template);
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Lines a second, on the average.
fn per_second(lines: usize, bar: &ProgressBar) -> u128 {
    lines as u128 * 1000 / bar.elapsed().as_millis().max(1)
}

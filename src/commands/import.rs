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
use tokio::sync::mpsc::{Sender, channel};

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

/// A line that cannot be set.
struct Bad {
    number: u64,
    why: String,
}

impl Import {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        let client = options.client()?;
        if io::stdin().is_terminal() {
            let hint = "the lines are what you type now, until Ctrl-D";
            let _ = writeln!(io::stderr(), "kv54: {hint}");
        }
        let bar = progress();
        // A thread of its own: reading may wait, and answers are not to wait for that.
        let (batches, mut coming) = channel(2);
        let from = self.from;
        thread::spawn(move || read(io::stdin().lock(), from, &batches));
        let mut done = 0;
        let mut stopped = None;
        while let Some(batch) = coming.recv().await {
            stopped = match batch {
                Ok(Batch {
                    sets, read, last, ..
                }) => {
                    let lines = sets.len();
                    let failure = set(&client, sets).await;
                    if failure.is_none() {
                        done += lines;
                        let rate = per_second(done, &bar);
                        bar.set_position(read);
                        bar.set_message(format!("line {last}, {rate}/s"));
                    }
                    failure
                }
                Err(Bad { number, why }) => Some(Failure::usage(format!(
                    "line {number}: {why}; every line before it is written, none after it"
                ))),
            };
            if stopped.is_some() {
                break;
            }
        }
        bar.finish_and_clear();
        client.replicas.settle().await;
        if let Some(failure) = stopped {
            return Err(failure);
        }
        let s = if done == 1 { "" } else { "s" };
        print(match options.json {
            true => format!("{}\n", json!({ "lines": done })),
            false => format!("{done} line{s} written\n"),
        })?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Sets all of these, and says which line is the first that could not be.
async fn set(client: &Client, sets: IndexMap<Vec<u8>, (u64, Packed)>) -> Option<Failure> {
    let set = async |(key, (number, value)): (Vec<u8>, (u64, Packed))| {
        let outcome = client.set(&key, &value).await;
        outcome.err().map(|error: Error| (number, error))
    };
    let failed = join_all(sets.into_iter().map(set)).await;
    failed.into_iter().flatten().next().map(|(number, error)| {
        let Failure { code, why } = error.into();
        let why = format!(
            "line {number}: {why}; every line before it is written: go on with --from {number}"
        );
        Failure { code, why }
    })
}

/// Reads lines to the end or to the first that is none, and hands them on in batches.
fn read(mut input: impl BufRead, from: u64, batches: &Sender<Result<Batch, Bad>>) {
    let (mut batch, mut line) = (Batch::default(), Vec::new());
    let mut number = 0;
    let bad = loop {
        line.clear();
        number += 1;
        let most = line::MAX_LINE as u64 + 1;
        match input.by_ref().take(most).read_until(b'\n', &mut line) {
            Ok(0) => break None,
            Ok(length) if length > line::MAX_LINE => {
                let why = format!("too-large: at most {} bytes are taken", line::MAX_LINE);
                break Some(Bad { number, why });
            }
            Ok(length) => batch.read += length as u64,
            Err(error) => {
                let why = format!("standard input: {error}");
                break Some(Bad { number, why });
            }
        }
        if number < from || line.trim_ascii().is_empty() {
            continue;
        }
        let (key, value) = match line::read(&line) {
            Ok(pair) => pair,
            Err(why) => break Some(Bad { number, why }),
        };
        let full = batch.sets.len() >= LINES || batch.bytes + line.len() > BYTES;
        if full && !batch.sets.is_empty() || batch.sets.contains_key(&key) {
            let next = Batch {
                read: batch.read,
                ..Batch::default()
            };
            if batches
                .blocking_send(Ok(std::mem::replace(&mut batch, next)))
                .is_err()
            {
                return; // an earlier line could not be set
            }
        }
        batch.bytes += line.len();
        batch.last = number;
        batch.sets.insert(key, (number, value));
    };
    let last = batches.blocking_send(Ok(batch));
    if let (Ok(()), Some(bad)) = (last, bad) {
        let _ = batches.blocking_send(Err(bad));
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

//! `import`: sets what the lines of an export say, batch by batch and in their order.

use std::fs::{File, Metadata};
use std::io::{self, BufRead, Read as _, Seek as _};
use std::mem;
use std::os::fd::AsFd as _;
use std::thread;

use clap::Args;
use futures::future::join_all;
use serde_json::json;
use tokio::sync::mpsc::{Receiver, Sender, channel};

use super::{Failure, Options, Outcome, bar, line, standard_input, text};
use crate::client::Client;
use crate::entry::Packed;

/// How many lines are set at once, and how many bytes; a single line may have more. A slow network
/// can carry that to three nodes within one window.
const LINES: usize = 256;
const BYTES: usize = 256 << 10;

/// Set every key to its value, from the lines of an export on standard input.
///
/// Other keys stay as they are, and importing the same lines again is harmless. The import ends at
/// the first line that it cannot write, and names it: every line before it is written.
#[derive(Args)]
#[command(after_help = "Examples:
  kv54 import < dump.jsonl
  kv54 import --from 5121 < dump.jsonl")]
pub(super) struct Import {
    /// Begin at this line: the one that an import named when it ended
    #[arg(long, value_name = "LINE", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    from: u64,
}

/// Lines that are set at once, or why there are no more.
type Batch = Result<Vec<Line>, Failure>;

/// A line of the input.
struct Line {
    at: Position,
    key: Vec<u8>,
    value: Packed,
}

/// Where in the input a line is.
#[derive(Clone, Copy, Default)]
struct Position {
    number: u64,
    end: u64, // bytes of the input up to its end
}

impl Import {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        let client = options.client()?;
        let input = standard_input("the lines are", options)?;
        // A thread of its own reads: a read may wait, and the answers must not wait for that.
        let (batches, coming) = channel(2);
        thread::spawn(move || read(input, self.from, &batches));
        let imported = set_all(&client, coming).await;
        client.replicas.settle().await;
        let lines = imported?;
        let written = text::count(lines, "line") + " written\n";
        options.print(&json!({ "lines": lines }), written)
    }
}

/// Sets batch after batch, and returns how many lines that were.
async fn set_all(client: &Client, mut coming: Receiver<Batch>) -> Result<usize, Failure> {
    let bar = match left() {
        Some(bytes) => bar("{wide_bar} {percent} %  {msg}  {eta} left", Some(bytes)),
        None => bar("{bytes} in {elapsed}  {msg}", None),
    };
    let mut done = 0;
    while let Some(batch) = coming.recv().await {
        let batch = batch?;
        set(client, &batch).await?;
        done += batch.len();
        let a_second = done as u128 * 1000 / bar.elapsed().as_millis().max(1);
        if let Some(last) = batch.last() {
            bar.set_position(last.at.end);
            bar.set_message(format!("line {}, {a_second}/s", last.at.number));
        }
    }
    Ok(done)
}

/// Sets all of these, or names the first line that could not be set.
async fn set(client: &Client, batch: &[Line]) -> Result<(), Failure> {
    let sets = batch.iter().map(|line| client.set(&line.key, &line.value));
    for (line, written) in batch.iter().zip(join_all(sets).await) {
        let number = line.at.number;
        written.map_err(|error| {
            let hint = format!("every line before it is written: go on with --from {number}");
            Failure::from(error).of(format!("line {number}")).with(hint)
        })?;
    }
    Ok(())
}

/// Reads lines to the end or to the first bad one, and hands them on in batches. It ends early
/// where batches are not taken any more: a line could not be set.
fn read(mut input: impl BufRead, from: u64, batches: &Sender<Batch>) -> Option<()> {
    let (mut at, mut batch) = (Position::default(), Vec::new());
    loop {
        match next(&mut input, from, &mut at) {
            Ok(Some(line)) if fits(&line, &batch) => batch.push(line),
            Ok(Some(line)) => {
                let full = mem::replace(&mut batch, vec![line]);
                batches.blocking_send(Ok(full)).ok()?;
            }
            end => {
                batches.blocking_send(Ok(batch)).ok()?;
                let bad = end.err()?.of(format!("line {}", at.number));
                let hint = "every line before it is written, none after it";
                return batches.blocking_send(Err(bad.with(hint))).ok();
            }
        }
    }
}

/// Whether a line may be set at once with these. Of two lines with the same key the later must
/// win, so they are not.
fn fits(line: &Line, batch: &[Line]) -> bool {
    let size = |line: &Line| line.key.len() + line.value.len();
    let bytes: usize = batch.iter().map(size).sum();
    let is_new = batch.iter().all(|other| other.key != line.key);
    batch.is_empty() || is_new && batch.len() < LINES && bytes + size(line) <= BYTES
}

/// The next line from number `from` on that is not empty; `None` at the end of the input.
fn next(input: &mut impl BufRead, from: u64, at: &mut Position) -> Result<Option<Line>, Failure> {
    let most = line::MAX_LINE;
    loop {
        let mut text = Vec::new();
        at.number += 1;
        let read = match at.number < from {
            true => input.skip_until(b'\n'), // however long it is
            false => input.take(most as u64 + 1).read_until(b'\n', &mut text),
        };
        let read = read.map_err(|error| Failure::from(error).of("standard input"))?;
        at.end += read as u64;
        if read == 0 {
            return Ok(None);
        }
        if text.len() > most {
            let why = format!("too-large: at most {most} bytes are taken");
            return Err(Failure::usage(why));
        }
        if !text.trim_ascii().is_empty() {
            let (at, (key, value)) = (*at, line::read(&text)?);
            return Ok(Some(Line { at, key, value }));
        }
    }
}

/// How many bytes standard input has left, if it is a file.
fn left() -> Option<u64> {
    let mut file = File::from(io::stdin().as_fd().try_clone_to_owned().ok()?);
    let size = file.metadata().ok().filter(Metadata::is_file)?.len();
    Some(size.saturating_sub(file.stream_position().ok()?))
}

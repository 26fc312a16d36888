//! `export`: every key with the value that a majority knows, one line each.

use std::collections::HashSet;
use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use futures::future::join_all;
use futures::stream::{self, StreamExt as _};
use tokio::task::{spawn, spawn_blocking};
use tokio::time::{Instant, sleep};

use super::{Failure, Options, Outcome, line, remark, shown, text, write};
use crate::client::Client;
use crate::cluster::{Cluster, State};
use crate::entry::Packed;
use crate::error::{Error, Kind};
use crate::join::{Scan, entries};
use crate::replicas::said;

/// How many pages of keys are read at once: enough to keep the nodes busy, and so few that a slow
/// network can carry their values within one window.
const PAGES: usize = 4;
/// How long to wait before replicas that could not be listed are asked again.
const RETRY: Duration = Duration::from_millis(100);

/// Print every key and its value, one line each.
///
/// A line is `{"key": …, "value": …}`. A key that is not UTF-8 is `key_base64`, and a value
/// that JSON would not read back as exactly itself is `value_msgpack`, its MessagePack as base64.
/// Each key is read as `get` reads it, at a moment of its own. The names of one owner's keys are
/// kept in memory at a time, no values. If the export is not complete, the exit code is not 0.
#[derive(Args)]
#[command(after_help = "Examples:
  kv54 export > dump.jsonl
  kv54 export --config old.toml | kv54 import --config new.toml
  kv54 export --resp | redis-cli --pipe")]
pub(super) struct Export {
    /// Print `SET key value` commands for `redis-cli --pipe` instead; a value that is no
    /// string goes as the JSON that `kv54 get` prints
    #[arg(long)]
    resp: bool,
}

/// A key that was listed: it is remembered, and waits for its value.
type Key = Arc<[u8]>;

/// The line of a key and its value.
pub(super) type Line = fn(&[u8], &Packed) -> Result<Vec<u8>, Error>;

/// How lines are written.
type Write = fn(&[u8]) -> io::Result<()>;

/// What is printed of the keys, and how.
struct Exporter {
    client: Arc<Client>,
    prefix: Vec<u8>, // how the keys begin that are wanted
    line: Line,
    write: Write,
    former: Vec<Listed>, // of rings that were the running one when this began
}

/// What has been printed of one ring: all keys of its first parts, and these of the next one.
struct Listed {
    ring: Arc<Cluster>,
    parts: usize,
    known: HashSet<Key>,
}

impl Listed {
    fn has(&self, key: &[u8]) -> bool {
        self.ring.owner(key) < self.parts || self.known.contains(key)
    }
}

impl Export {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        let line = if self.resp { line::resp } else { line::json };
        // Unlike a single answer, an export is not done if its reader has gone.
        let printed = print_all(options, Vec::new(), line, write).await;
        let printed = printed.map_err(|failure| failure.of("the export is not complete"))?;
        remark(text::count(printed, "key") + " exported");
        Ok(ExitCode::SUCCESS)
    }
}

/// Prints the line of every key that begins with `prefix`; how many there were.
pub(super) async fn print_all(
    options: &Options,
    prefix: Vec<u8>,
    line: Line,
    write: Write,
) -> Result<usize, Failure> {
    let client = Arc::new(options.client()?);
    let replicas = &client.replicas;
    let mut exporter = Exporter {
        client: client.clone(),
        prefix,
        line,
        write,
        former: Vec::new(),
    };
    replicas.exchange_all().await; // the file may be behind
    let (mut state, mut part, mut printed) = (replicas.state(), 0, 0);
    while part < state.ring.nodes().len() {
        let mut known = HashSet::new();
        let of_part = exporter.export(&state, part, &mut known, options.timeout());
        printed += of_part.await?;
        if is_same_ring(&replicas.state(), &state) {
            part += 1;
            continue;
        }
        // The ring has changed into another one, which has parts of its own.
        let (ring, parts) = (state.ring.clone(), part);
        exporter.former.push(Listed { ring, parts, known });
        (state, part) = (replicas.state(), 0);
    }
    let places = 0..state.ring.nodes().len();
    let said = join_all(places.map(|place| replicas.status(place))).await;
    let mut doubts = said.into_iter().flatten().flat_map(|status| status.doubts);
    let Some(doubt) = doubts.next() else {
        return Ok(printed);
    };
    let keys = text::count(printed, "key");
    let why = format!("{keys} printed, but {doubt}; kv54 status shows all");
    Err(Failure { code: 3, why })
}

/// The error of a part of which too few replicas could be listed.
fn too_few(
    ring: &Cluster,
    part: usize,
    listed: usize,
    needed: usize,
    kind: Kind,
    errors: &[(usize, Error)],
) -> Error {
    let (name, copies, said) = (ring.name(part), ring.copies(), said(ring, errors));
    let why = format!(
        "{listed} of the {copies} replicas of {name}'s keys could be listed, {needed} needed ({said})"
    );
    Error::new(kind, why)
}

/// Whether keys have the same places in both: the ring itself, alone or while it changes into another.
fn is_same_ring(one: &State, other: &State) -> bool {
    one.born(0) == other.born(0) && one.ring.names() == other.ring.names()
}

impl Exporter {
    /// Lists so many replicas of a part that every write that was answered is on one of them, and
    /// prints what each of them adds. Returns how many keys that were. It ends early once there is
    /// another ring.
    async fn export(
        &self,
        state: &State,
        part: usize,
        known: &mut HashSet<Key>,
        patience: Duration,
    ) -> Result<usize, Failure> {
        let (cluster, replicas) = (&state.ring, &self.client.replicas);
        let (copies, needed) = (cluster.copies(), cluster.copies() - cluster.majority() + 1);
        let mut to_list: Vec<usize> = cluster.replicas(part).collect();
        let (mut listed, mut printed, mut deadline) = (0, 0, Instant::now() + patience);
        loop {
            let mut errors = Vec::new();
            for place in to_list {
                let mut pages = Vec::new();
                let list = self.list(part, place, known, &mut pages).await;
                printed += self.print(pages).await?;
                let list = self.explained(list, cluster.name(place)).await;
                if !is_same_ring(&replicas.state(), state) {
                    return Ok(printed); // what was listed may be a part of the new ring
                }
                match list {
                    Ok(()) => (listed, deadline) = (listed + 1, Instant::now() + patience),
                    Err(error) => errors.push((place, error)),
                }
                if listed == needed {
                    return Ok(printed);
                }
            }
            // With so many refusals, waiting cannot help.
            let kinds = errors.iter().map(|(_, error)| error.kind);
            let refusal = kinds.filter(|kind| kind.is_refusal()).nth(copies - needed);
            if refusal.is_some() || Instant::now() + RETRY >= deadline {
                let kind = refusal.unwrap_or(Kind::Unavailable);
                return Err(too_few(cluster, part, listed, needed, kind, &errors).into());
            }
            to_list = errors.into_iter().map(|(place, _)| place).collect();
            sleep(RETRY).await;
        }
    }

    /// Adds page by page the keys that one replica lists and that were not known before.
    async fn list(
        &self,
        part: usize,
        place: usize,
        known: &mut HashSet<Key>,
        pages: &mut Vec<Vec<Key>>,
    ) -> Result<(), Error> {
        let mut scan = Scan::of_a_ready_node(&self.client.replicas, place, part).await?;
        while let Some(page) = scan.page().await? {
            let keys = entries(&page)?.into_iter().map(|(key, ..)| key);
            let wanted = keys.filter(|key| key.starts_with(&self.prefix));
            let left = wanted.filter(|key| !self.former.iter().any(|listed| listed.has(key)));
            let new = left.map(Key::from).filter(|key| known.insert(key.clone()));
            pages.push(new.collect());
        }
        Ok(())
    }

    /// Where a node refuses since it knows another state of the ring, who is behind moves on, and it
    /// can be listed again.
    async fn explained(&self, list: Result<(), Error>, name: &str) -> Result<(), Error> {
        match list {
            Err(error) if error.kind == Kind::WrongRing => {
                let told = self.client.replicas.exchange_all().await.into_iter();
                let mut told = told.filter(|(node, _)| node.name == name);
                told.find_map(|(_, told)| told.err()).map_or(
                    Err(Error::new(Kind::Unavailable, "the ring is changing")),
                    Err,
                )
            }
            list => list,
        }
    }

    /// Reads and prints what was listed. Returns how many keys there were.
    async fn print(&self, pages: Vec<Vec<Key>>) -> Result<usize, Failure> {
        // The values are read in tasks of their own: they go on while the output waits.
        let (line, write) = (self.line, self.write);
        let read = |keys| spawn(read(self.client.clone(), keys, line));
        let mut tasks = stream::iter(pages).map(read).buffered(PAGES);
        let mut printed = 0;
        while let Some(lines) = tasks.next().await {
            let lines = lines.map_err(Failure::usage)??;
            printed += lines.len();
            let written = spawn_blocking(move || write(&shown(lines.concat()))).await;
            written.map_err(Failure::usage)??;
        }
        Ok(printed)
    }
}

/// The lines of these keys, without those that are absent.
async fn read(client: Arc<Client>, keys: Vec<Key>, line: Line) -> Result<Vec<Vec<u8>>, Error> {
    let values = join_all(keys.iter().map(|key| client.get_to_keep(key))).await;
    let mut lines = Vec::new();
    for (key, value) in keys.iter().zip(values) {
        let value = value.map_err(Error::of_read)?;
        if !value.is_nil() {
            lines.push(line(key, &value)?);
        }
    }
    Ok(lines)
}

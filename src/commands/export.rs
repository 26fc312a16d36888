//! `export`: every key with the value that a majority knows, one line each.

use std::collections::HashSet;
use std::io::{self, Write as _};
use std::pin::pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use futures::future::join_all;
use futures::stream::{self, StreamExt as _};
use msgpack_rpc::Value;
use tokio::task::{spawn, spawn_blocking};
use tokio::time::{Instant, sleep};

use super::{Failure, Options, Outcome, line};
use crate::client::Client;
use crate::entry::Stamp;
use crate::error::{Error, Kind};
use crate::join::Scan;
use crate::rpc::codec::encode_bytes;

/// Pages whose keys are read at once: enough to keep nodes busy, little enough for a slow
/// network to carry their values within one window.
const PAGES: usize = 4;
/// Before the replicas are asked again that could not be listed.
const RETRY: Duration = Duration::from_millis(100);

/// Print every key and its value, one line each.
///
/// A line is `{"key": …, "value": …}`. A key that is not UTF-8 is `key_base64`, and a value
/// that JSON would not read back as exactly itself is `value_msgpack`, its MessagePack as base64.
/// Each key is read as `get` reads it, at a moment of its own. The keys of one owner are
/// remembered while they are listed, no values.
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

/// One part on its way out.
struct Part {
    client: Arc<Client>,
    number: usize,
    print: fn(&[u8], &Value) -> Vec<u8>,
    done: HashSet<Vec<u8>>, // its keys that were seen: of one part at a time, and no values
    printed: usize,
}

/// What stopped a listing: a node, which another may stand in for, or something for good.
enum Stop {
    Node(Error),
    All(Failure),
}

impl Export {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        let client = Arc::new(options.client()?);
        let mut printed = 0;
        for number in 0..client.replicas.cluster.nodes().len() {
            let mut part = Part {
                client: client.clone(),
                number,
                print: if self.resp { line::resp } else { line::json },
                done: HashSet::new(),
                printed: 0,
            };
            part.export(options.timeout()).await?;
            printed += part.printed;
        }
        let s = if printed == 1 { "" } else { "s" };
        let _ = writeln!(io::stderr(), "kv54: {printed} key{s} exported");
        Ok(ExitCode::SUCCESS)
    }
}

impl Part {
    /// Lists so many replicas that every write that was answered is on one of them.
    async fn export(&mut self, patience: Duration) -> Result<(), Failure> {
        let cluster = self.client.replicas.cluster.clone();
        let (copies, needed) = (cluster.copies(), cluster.copies() - cluster.majority() + 1);
        let mut to_list: Vec<usize> = cluster.replicas(self.number).collect();
        let mut deadline = Instant::now() + patience;
        loop {
            let mut errors = Vec::new();
            for place in to_list.clone() {
                match self.list(place).await {
                    Ok(()) => {
                        to_list.retain(|other| *other != place);
                        deadline = Instant::now() + patience;
                    }
                    Err(Stop::Node(error)) => errors.push((place, error)),
                    Err(Stop::All(failure)) => return Err(failure),
                }
                if copies - to_list.len() >= needed {
                    return Ok(());
                }
            }
            let refused = errors.iter().filter(|(_, error)| error.kind.is_refusal());
            let hopeless = refused.clone().count() > copies - needed;
            if hopeless || Instant::now() + RETRY >= deadline {
                let kind = refused.map(|(_, error)| error.kind).find(|_| hopeless);
                let why = format!(
                    "{} of the {copies} replicas of {}'s keys could be listed, {needed} needed ({})",
                    copies - to_list.len(),
                    cluster.name(self.number),
                    self.client.replicas.said(&errors),
                );
                return Err(incomplete(Error::new(
                    kind.unwrap_or(Kind::Unavailable),
                    why,
                )));
            }
            sleep(RETRY).await;
        }
    }

    /// Prints every key that one replica lists and that was not printed before.
    async fn list(&mut self, place: usize) -> Result<(), Stop> {
        let client = self.client.clone();
        let mut scan = Scan::new(&client.replicas, place, self.number);
        // A joining node's list may lack answered writes. Such a node refuses `load`, so it is
        // asked one. The pages before and after it have one start id: it has not restarted since.
        scan.page().await.map_err(Stop::Node)?;
        let key = encode_bytes(self.some_key().as_bytes());
        let question: [&[u8]; 2] = [&key, &Stamp::MAX.encode()];
        let asked = client.replicas.ask(place, "load", &question).await;
        asked.map_err(Stop::Node)?;
        scan.cursor = Some(0);
        let pages = stream::try_unfold(scan, async |mut scan| {
            let page = scan.page().await?;
            Ok(page.map(|page| (page, scan)))
        });
        let (done, print) = (&mut self.done, self.print);
        // Tasks of their own read the values: they must go on while nobody takes the output.
        let reading = pages.map(|page| {
            let reading = page.and_then(|page| {
                let keys = page.entries()?.into_iter().map(|(key, _)| key.to_vec());
                let new = keys.filter(|key| done.insert(key.clone())).collect();
                Ok(spawn(read(client.clone(), new, print)))
            });
            async { Ok(reading?.await) }
        });
        let mut lines = pin!(reading.buffered(PAGES));
        while let Some(page) = lines.next().await {
            let read = page.map_err(Stop::Node)?.map_err(Failure::usage);
            let lines = read.and_then(|read| read.map_err(incomplete));
            let lines = lines.map_err(Stop::All)?;
            self.printed += lines.len();
            let written = spawn_blocking(move || write(&lines.concat()));
            written
                .await
                .map_err(|error| Stop::All(Failure::usage(error)))??;
        }
        Ok(())
    }

    /// A key of this part, whether anybody wrote it or not.
    fn some_key(&self) -> String {
        let cluster = &self.client.replicas.cluster;
        let mut keys = (0..).map(|number: u64| number.to_string());
        keys.find(|key| cluster.owner(key.as_bytes()) == self.number)
            .unwrap_or_default()
    }
}

/// The lines of these keys, without those that are absent.
async fn read(
    client: Arc<Client>,
    keys: Vec<Vec<u8>>,
    print: fn(&[u8], &Value) -> Vec<u8>,
) -> Result<Vec<Vec<u8>>, Error> {
    let values = join_all(keys.iter().map(|key| client.get(key))).await;
    let mut lines = Vec::new();
    for (key, value) in keys.iter().zip(values) {
        let value = value.map_err(Error::of_read)?.value()?;
        if !value.is_nil() {
            lines.push(print(key, &value));
        }
    }
    Ok(lines)
}

/// Unlike a single answer, an export whose reader has gone is not done.
fn write(lines: &[u8]) -> Result<(), Stop> {
    let mut out = io::stdout();
    let written = out.write_all(lines).and_then(|()| out.flush());
    written.map_err(|error| {
        let why = format!("the export is not complete: standard output: {error}");
        Stop::All(Failure::usage(why))
    })
}

fn incomplete(error: Error) -> Failure {
    let Failure { code, why } = error.into();
    let why = format!("the export is not complete: {why}");
    Failure { code, why }
}

//! `serve`: runs a node, or every node of the file, each in a thread of its own.

use std::io::{self, Write as _};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use clap::Args;
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::{Failure, Options, Outcome, block_on};
use crate::cluster::Cluster;
use crate::node;

/// Files that a node needs beside its connections: to its peers, and its own.
const OTHER_FILES: u64 = 64;

/// Run a node, or all of them.
#[derive(Args)]
#[command(after_help = "Examples:
  kv54 serve --all
  kv54 serve alice
  kv54 serve alice --listen 0.0.0.0:5401")]
pub(super) struct Serve {
    /// The node's name in the file [default: this machine's host name]
    #[arg(conflicts_with = "all")]
    name: Option<String>,
    /// Run every node of the file in this one process
    #[arg(long)]
    all: bool,
    /// Listen here, not on the address in the file, which the others dial
    #[arg(long, value_name = "ADDRESS", conflicts_with = "all")]
    listen: Option<String>,
}

impl Serve {
    pub(super) fn run(self, options: &Options) -> Outcome {
        let _ = log::set_logger(&Log).map(|()| log::set_max_level(options.log));
        let cluster = options.cluster()?;
        let places = if self.all {
            (0..cluster.nodes().len()).collect()
        } else {
            vec![self.place(&cluster, options)?]
        };
        let files = places.len() as u64 * (cluster.limits.connections as u64 + OTHER_FILES);
        match rlimit::increase_nofile_limit(files) {
            Ok(limit) if limit >= files => {}
            other => log::warn!("{files} open files are wanted, the limit is {other:?}"),
        }
        block_on(self.run_all(&cluster, &places))
    }

    /// A thread for each node, until a signal says stop.
    async fn run_all(&self, cluster: &Arc<Cluster>, places: &[usize]) -> Outcome {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let stop = CancellationToken::new();
        let mut ends = FuturesUnordered::new();
        for &place in places {
            let name = cluster.name(place).to_owned();
            let (cluster, listen, stop) = (cluster.clone(), self.listen.clone(), stop.clone());
            let (end, ended) = oneshot::channel();
            let life = async move {
                node::run(cluster, place, listen, stop).await?;
                Ok(ExitCode::SUCCESS)
            };
            let run = move || end.send(block_on(life));
            thread::Builder::new().name(name).spawn(run)?;
            ends.push(ended);
        }
        let mut outcome = Ok(ExitCode::SUCCESS);
        loop {
            tokio::select! {
                _ = terminate.recv() => stop.cancel(),
                _ = interrupt.recv() => stop.cancel(),
                ended = ends.next() => match ended {
                    None => return outcome,
                    Some(end) => {
                        let end = end.unwrap_or_else(|_| Err(Failure::usage("a node has panicked")));
                        outcome = outcome.and(end);
                        stop.cancel(); // one node of --all without the others is not what was asked for
                    }
                },
            }
        }
    }

    /// The place of the node that is named, or that this machine is named after.
    fn place(&self, cluster: &Cluster, options: &Options) -> Result<usize, Failure> {
        if let Some(name) = &self.name {
            let place = cluster.place(name);
            return place.ok_or_else(|| options.no_node(cluster, name));
        }
        let host = hostname::get().map_err(|e| Failure::usage(format!("no host name: {e}")))?;
        let host = host.to_string_lossy();
        let short = host.split('.').next().unwrap_or(&host);
        let place = cluster.place(&host).or_else(|| cluster.place(short));
        place.ok_or_else(|| {
            let Failure { code, why } = options.no_node(cluster, short);
            let why = format!("{why}; it is this machine's name, and kv54 serve NAME runs another");
            Failure { code, why }
        })
    }
}

/// Log lines on standard error, each with its node's name, which is its thread's.
struct Log;

impl log::Log for Log {
    fn enabled(&self, _: &log::Metadata) -> bool {
        true
    }

    fn log(&self, record: &log::Record) {
        let thread = thread::current();
        let name = thread
            .name()
            .filter(|name| *name != "main")
            .unwrap_or("kv54");
        let level = match record.level() {
            log::Level::Info => "",
            log::Level::Error => "error: ",
            log::Level::Warn => "warning: ",
            log::Level::Debug | log::Level::Trace => "debug: ",
        };
        // One write for one line, and a log that nobody reads is no reason to stop.
        let _ = io::stderr().write_all(format!("{name}: {level}{}\n", record.args()).as_bytes());
    }

    fn flush(&self) {}
}

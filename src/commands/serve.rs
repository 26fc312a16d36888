//! `serve`: runs a node, or every node of the file, each in a thread of its own.

use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use clap::Args;
use futures::StreamExt as _;
use futures::future::join_all;
use futures::stream::FuturesUnordered;
use tokio::net::{TcpListener, lookup_host};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::{Failure, Options, Outcome, block_on};
use crate::client::Client;
use crate::cluster::Cluster;
use crate::join::join;
use crate::replicas::Replicas;
use crate::rpc::{self, Limits, tls};
use crate::server::Node;
use crate::store::Store;

/// How long an operation is tried again for a guest of the node.
pub(super) const TIMEOUT: Duration = Duration::from_secs(5);
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
        let mut terminate = signal(SignalKind::terminate()).map_err(Failure::usage)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(Failure::usage)?;
        let stop = CancellationToken::new();
        let mut ends = FuturesUnordered::new();
        for &place in places {
            let name = cluster.name(place).to_owned();
            let (cluster, listen, stop) = (cluster.clone(), self.listen.clone(), stop.clone());
            let (end, ended) = oneshot::channel();
            let run = move || end.send(block_on(node(cluster, place, listen, stop)));
            thread::Builder::new()
                .name(name)
                .spawn(run)
                .map_err(Failure::usage)?;
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

/// Runs one node in this thread until `stop`.
async fn node(
    cluster: Arc<Cluster>,
    place: usize,
    listen: Option<String>,
    stop: CancellationToken,
) -> Outcome {
    let (dial, guard) = (
        tls::dial(&cluster)?,
        tls::guard(&cluster, cluster.name(place))?,
    );
    let listener = bind(&cluster, place, listen).await?;
    let address = listener.local_addr().map_err(Failure::usage)?;
    log::info!("listening on {address}");
    if cluster.tls.is_none() && !address.ip().is_loopback() {
        log::warn!(
            "{address} is open to everybody who can reach it; [tls] in cluster.toml closes it"
        );
    }
    let limits = Limits {
        connections: cluster.limits.connections,
        ..Limits::default()
    };
    let store = Arc::new(Store::new(cluster, place));
    let replicas = Replicas::at_home(&store, TIMEOUT, &dial);
    let node = Arc::new(Node {
        store,
        client: Client { replicas },
    });
    let joiner = node.clone();
    let joining = tokio::spawn(async move { join(&joiner.store, &joiner.client.replicas).await });
    // A task of its own takes turns with the peers'; a runtime's main future comes after a wait.
    let serving = tokio::spawn(async move {
        // The listener stays bound while anything is answered here, so that no successor is.
        let incoming = rpc::incoming(&listener, guard);
        rpc::serve(incoming, &*node, limits, stop).await;
    });
    serving.await.map_err(Failure::usage)?;
    joining.abort();
    log::info!("stopped");
    Ok(ExitCode::SUCCESS)
}

async fn bind(
    cluster: &Cluster,
    place: usize,
    listen: Option<String>,
) -> Result<TcpListener, Failure> {
    let Some(node) = cluster.nodes().get(place) else {
        return Err(Failure::usage("no such node"));
    };
    let address = listen.as_ref().unwrap_or(&node.address);
    let failed = |error: io::Error| Failure::usage(format!("{}: {address}: {error}", node.name));
    let found: Vec<SocketAddr> = lookup_host(address).await.map_err(failed)?.collect();
    if listen.is_none() && found.iter().all(|address| address.ip().is_loopback()) {
        if let Some(other) = off_loopback(cluster).await {
            return Err(Failure::usage(format!(
                "{}: {address} is loopback on this machine, where {other} cannot reach it; \
                 --listen 0.0.0.0:PORT listens on the network",
                node.name,
            )));
        }
    }
    TcpListener::bind(&*found).await.map_err(failed)
}

/// The first node of the file that is not on this machine's loopback.
async fn off_loopback(cluster: &Cluster) -> Option<&str> {
    let nodes = cluster.nodes();
    let found = join_all(nodes.iter().map(|node| lookup_host(&node.address))).await;
    nodes.iter().zip(found).find_map(|(node, found)| {
        let off = found.ok()?.any(|address| !address.ip().is_loopback());
        off.then_some(&*node.name)
    })
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

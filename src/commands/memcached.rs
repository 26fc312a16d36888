//! `memcached`: a gateway, which memcached's clients take for memcached.

use std::io;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::serve::{check_window, fit, log_at, until_stopped};
use super::{Failure, Options, Outcome, unless_empty};
use crate::beyond::memcached::{Gateway, Memcached as Protocol};
use crate::cluster::{Cluster, Limits};
use crate::rpc::{connected, incoming, serve_protocol};

/// Run a gateway for memcached's clients: the keys of the ring in memcached's text protocol.
///
/// It belongs beside the application, on the same host: its protocol is not encrypted, and open to every process that reaches it. It
/// reads cluster.toml again after SIGHUP. docs/memcached.md has what differs from memcached.
#[derive(Args)]
#[command(after_help = "Examples:
  kv54 memcached
  kv54 memcached --listen 127.0.0.1:11212 --allow-flush")]
pub(super) struct Memcached {
    /// Where it listens
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:11211")]
    listen: String,
    /// flush_all deletes every key of the ring; without this it is refused
    #[arg(long)]
    allow_flush: bool,
    /// What it logs: off, error, warn, info or debug
    #[arg(long, value_name = "LEVEL", hide_env_values = true)]
    #[arg(env = unless_empty("KV54_LOG"), default_value = "info")]
    log: log::LevelFilter,
}

impl Memcached {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        log_at(self.log);
        let (file, limits) = read(options)?;
        let client = Arc::new(options.client_of(file)?);
        let limits = watch::Sender::new(limits);
        let newer = || {
            let (file, new) = read(options)?;
            check_window(options, &client.replicas.cluster(), &file)?;
            Ok((file, new))
        };
        let stopped = until_stopped(|| match newer() {
            Ok((file, new)) => {
                client.replicas.move_to(&file);
                limits.send_replace(new);
            }
            Err(Failure { why, .. }) => log::error!("{why}; nothing is changed"),
        })?;
        let bound = self.bind().await?;
        let gateway = Protocol::of(Gateway::of(client.clone(), self.allow_flush));
        let (stop, listener) = (CancellationToken::new(), &*Box::leak(Box::new(bound)));
        let (token, limits) = (stop.clone(), limits.subscribe());
        // Spawned for the same reason as a node's life.
        let serving = tokio::spawn(async move {
            let incoming = incoming(listener, |stream, _| connected(stream));
            serve_protocol(incoming, &gateway, || *limits.borrow(), token).await;
        });
        stopped.await;
        stop.cancel();
        serving.await.map_err(Failure::usage)?;
        client.replicas.settle().await;
        log::info!("stopped");
        Ok(ExitCode::SUCCESS)
    }

    async fn bind(&self) -> io::Result<TcpListener> {
        let bound = TcpListener::bind(&self.listen).await;
        let bound = bound.map_err(|error| io::Error::other(format!("{}: {error}", self.listen)))?;
        let address = bound.local_addr()?;
        log::info!("listening on {address}");
        if !address.ip().is_loopback() {
            log::warn!("{address} is open to everybody who can reach it");
        }
        Ok(bound)
    }
}

/// The file, and the limits that a gateway keeps.
fn read(options: &Options) -> Result<(Arc<Cluster>, Limits), Failure> {
    let file = options.cluster()?;
    let mut limits = file.limits;
    limits.threads = Some(1);
    fit(&mut limits, 1)?;
    limits.nodes = 0; // nodes do not connect
    Ok((file, limits))
}

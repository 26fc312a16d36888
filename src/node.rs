//! A node's life: it is put together, binds its address, joins and serves until it is stopped.
//! Other programs start nodes in the same way on networks of their own (`examples/tour.rs`).

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use futures::stream::Stream;
use tokio::net::{TcpListener, lookup_host};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::client::Client;
use crate::cluster::{self, Cluster};
use crate::join::join;
use crate::replicas::Replicas;
use crate::rpc::{self, Connecting, Dial, tls};
use crate::server::Node;
use crate::store::Store;

/// How long a node tries an operation again for its guests.
pub const TIMEOUT: Duration = Duration::from_secs(5);

impl Node {
    /// A node with this memory. Give it an empty one only after its address is bound: the time
    /// that it waits before it joins begins with the store.
    pub fn new(store: Arc<Store>, timeout: Duration, dial: &Dial) -> Arc<Self> {
        let replicas = Replicas::at_home(&store, timeout, dial);
        let client = Client { replicas };
        Arc::new(Node { store, client })
    }

    /// Joins the ring, and answers on these connections until `stop`.
    pub async fn live<L>(self: &Arc<Self>, incoming: L, stop: CancellationToken)
    where
        L: Stream<Item = io::Result<Connecting>> + Unpin,
    {
        let (node, mut joining) = (self.clone(), JoinSet::new()); // dropping the set aborts its tasks
        joining.spawn(async move { join(&node.store, &node.client.replicas).await });
        let limits = &self.store.cluster.limits;
        rpc::serve(incoming, &**self, limits, stop).await;
    }
}

/// Runs the node at this place of the ring until `stop`. Its address stays bound until the process ends. It listens on `listen` instead of the
/// address in the file where that is given.
pub async fn run(
    cluster: Arc<Cluster>,
    place: usize,
    listen: Option<String>,
    stop: CancellationToken,
) -> io::Result<()> {
    let dial = tls::dial(&cluster)?;
    let guard = tls::guard(&cluster, cluster.name(place))?;
    // Bound until the process ends: no successor starts while this node still answers.
    let listener: &TcpListener = Box::leak(Box::new(bind(&cluster, place, listen).await?));
    let address = listener.local_addr()?;
    log::info!("listening on {address}");
    if cluster.tls.is_none() && !address.ip().is_loopback() {
        log::warn!(
            "{address} is open to everybody who can reach it; [tls] in cluster.toml closes it"
        );
    }
    let node = Node::new(Arc::new(Store::new(cluster, place)), TIMEOUT, &dial);
    let incoming = rpc::incoming(listener, guard);
    // Spawned: the runtime polls a task in turn with those of the peers, but its main future only
    // after a look at the network.
    tokio::spawn(async move { node.live(incoming, stop).await }).await?;
    log::info!("stopped");
    Ok(())
}

async fn bind(cluster: &Cluster, place: usize, listen: Option<String>) -> io::Result<TcpListener> {
    let Some(cluster::Node { name, address }) = cluster.nodes().get(place) else {
        return Err(io::Error::other("no such node"));
    };
    let on = listen.as_ref().unwrap_or(address);
    let failed = |error: io::Error| io::Error::other(format!("{name}: {on}: {error}"));
    let found: Vec<SocketAddr> = lookup_host(on).await.map_err(failed)?.collect();
    if listen.is_none() && found.iter().all(|address| address.ip().is_loopback()) {
        if let Some(other) = off_loopback(cluster).await {
            return Err(io::Error::other(format!(
                "{name}: {on} is loopback on this machine, where {other} cannot reach it; \
                 --listen 0.0.0.0:PORT listens on the network",
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

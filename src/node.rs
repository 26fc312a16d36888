//! A node's life: it is put together, binds its address, joins and serves until it is stopped.
//! Other programs start nodes in the same way on networks of their own (`examples/tour.rs`).

use std::future::{Future, ready};
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use futures::TryFutureExt as _;
use futures::channel::mpsc;
use futures::future::{try_join, try_join_all};
use futures::stream::{FuturesUnordered, Stream, StreamExt as _};
use tokio::net::{TcpListener, lookup_host};
use tokio::runtime::Builder;
use tokio::sync::{Barrier, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::client::Client;
use crate::cluster::{self, Cluster};
use crate::join::join;
use crate::replicas::Replicas;
use crate::rpc::{self, Admitted, Dial, tls};
use crate::server::Node;
use crate::store::Store;

/// How long a node tries an operation again for its guests.
pub const TIMEOUT: Duration = Duration::from_secs(5);

impl Node {
    /// A node with this memory. Give it an empty one only after its address is bound: the time
    /// that it waits before it joins begins with the store.
    pub fn new(store: Arc<Store>, timeout: Duration, dial: &Dial) -> Arc<Self> {
        let replicas = Replicas::at_home(&store, timeout, dial);
        let client = Arc::new(Client { replicas });
        Arc::new(Node { store, client })
    }

    /// Joins the ring, and answers on these connections until `stop`.
    pub async fn live<L>(self: &Arc<Self>, connections: L, stop: CancellationToken)
    where
        L: Stream<Item = Admitted> + Unpin,
    {
        let (node, mut joining) = (self.clone(), JoinSet::new()); // dropping the set aborts its tasks
        joining.spawn(async move { join(&node.store, &node.client.replicas).await });
        let node = self.clone();
        joining.spawn(async move { node.sweep().await });
        let node = self.clone();
        joining.spawn(async move { node.forget().await });
        self.serve(connections, stop).await;
    }

    async fn serve<L>(&self, connections: L, stop: CancellationToken)
    where
        L: Stream<Item = Admitted> + Unpin,
    {
        let meter = self.store.meter();
        rpc::serve_counted(connections, &self.gated(), &meter, stop).await;
    }

    /// Lives in this thread, and answers in all threads of the limits, each with a runtime and with connections to
    /// the other nodes of its own.
    async fn live_in_threads(
        self: Arc<Self>,
        listener: &'static TcpListener,
        guard: tls::Guard,
        stop: CancellationToken,
    ) -> io::Result<()> {
        let count = self.store.limits().threads.unwrap_or(1);
        let (mut others, mut ends, all) = (Vec::new(), Vec::new(), Arc::new(Barrier::new(count)));
        let (stop, ended) = (stop.child_token(), CancellationToken::new());
        let _ends_all = [&stop, &ended].map(|token| token.clone().drop_guard());
        for _ in 1..count {
            let (to, connections) = mpsc::unbounded();
            let replicas = self.client.replicas.beside();
            let (store, client) = (self.store.clone(), Arc::new(Client { replicas }));
            let (node, all) = (Node { store, client }, all.clone());
            let stop = stop.child_token(); // each connection looks at it often, behind a lock
            let ended = ended.clone();
            let serving = async move {
                node.serve(connections, stop).await;
                ended.run_until_cancelled(all.wait()).await; // it may still do swaps for guests of other threads
            };
            let name = self.store.name().to_owned();
            ends.push(in_thread(name, async { Ok(tokio::spawn(serving).await?) })?);
            others.push(to);
        }
        let store = self.store.clone();
        let incoming = match count {
            1 => rpc::incoming(listener, move |stream, from| guard(stream, from)),
            _ => rpc::incoming_for_threads(listener, guard),
        };
        let connections = rpc::hand_out(rpc::admit(incoming, move || store.limits()), others);
        // Spawned: the runtime polls a task in turn with those of the peers, but its main future
        // only after a look at the network.
        let first = tokio::spawn(async move {
            self.live(connections, stop.child_token()).await;
            all.wait().await;
        });
        try_join(first.map_err(io::Error::from), try_join_all(ends)).await?;
        Ok(())
    }

    /// Takes from each newer file what can change while it runs.
    async fn follow(&self, mut file: watch::Receiver<Arc<Cluster>>) {
        let started = file.borrow().clone();
        let (mut known, name) = (started.changeable(), self.store.name());
        while file.changed().await.is_ok() {
            let newer = file.borrow_and_update().clone();
            self.store.limit(newer.limits);
            self.client.replicas.move_to(&newer);
            let mut changes = newer.changeable();
            let at_home = format!("{name} is at ");
            changes.retain(|line| !known.contains(line) && !line.starts_with(&at_home));
            match changes[..] {
                [] => log::info!("cluster.toml is read again: nothing has changed"),
                _ => log::info!("cluster.toml is read again: {}", changes.join(", ")),
            }
            known = newer.changeable();
            let of_a_start = |file: &Cluster| {
                (
                    file.node(name).cloned(),
                    file.tls.clone(),
                    file.disk.clone(),
                )
            };
            if of_a_start(&started) != of_a_start(&newer) {
                log::warn!("its own address, [tls] and [disk] are taken at its next start");
            }
        }
    }
}

/// Runs this in a thread of its own, with a runtime of its own, and says how it ended. The log shows the name.
pub fn in_thread(
    name: String,
    life: impl Future<Output = io::Result<()>> + Send + 'static,
) -> io::Result<impl Future<Output = io::Result<()>> + Send> {
    let (end, ended) = oneshot::channel();
    let run = move || end.send(block_on(life));
    thread::Builder::new().name(name).spawn(run)?;
    let panicked = |_| Err(io::Error::other("a node has panicked"));
    Ok(ended.unwrap_or_else(panicked))
}

/// Runs this in a runtime that has this thread alone: what belongs together is faster without others.
pub fn block_on<T, E: From<io::Error>>(work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(work);
    runtime.shutdown_background(); // does not wait for a name that is still being looked up
    outcome
}

/// Runs the node at this place of the ring until `stop`. It goes by the newest `file`. It listens on
/// `listen` instead of its address there where that is given.
pub async fn run(
    mut file: watch::Receiver<Arc<Cluster>>,
    place: usize,
    listen: Option<String>,
    stop: CancellationToken,
) -> io::Result<()> {
    let cluster = file.borrow_and_update().clone();
    let dial = tls::dial(&cluster)?;
    let guard = tls::guard(&cluster, cluster.name(place))?;
    let bound = stop.run_until_cancelled(bind(&cluster, place, listen.as_deref()));
    let Some(bound) = bound.await else {
        return Ok(()); // a name was still being looked up
    };
    // Bound until the process ends: no successor starts while this node still answers.
    let listener: &TcpListener = Box::leak(Box::new(bound?));
    let address = listener.local_addr()?;
    let hidden = listen.is_none() && address.ip().is_loopback();
    let (store, disk) = Store::open(cluster.clone(), place)?;
    let node = Node::new(Arc::new(store), TIMEOUT, &dial);
    let writing = node.clone();
    let life = async {
        log::info!("listening on {address}");
        warn_if_open(&cluster, address);
        let following = node.clone();
        tokio::spawn(async move { following.follow(file).await });
        node.live_in_threads(listener, guard, stop).await?;
        log::info!("stopped");
        Ok(())
    };
    tokio::select! {
        biased; // addresses that are no names are looked at before anybody is answered
        Some(error) = out_of_reach(&cluster, place), if hidden => Err(error),
        error = writing.write_down(disk) => Err(error),
        ended = life => ended,
    }
}

async fn bind(cluster: &Cluster, place: usize, listen: Option<&str>) -> io::Result<TcpListener> {
    let Some(cluster::Node { name, address }) = cluster.node(cluster.name(place)) else {
        return Err(io::Error::other("no such node"));
    };
    let on = listen.unwrap_or(address);
    let bound = TcpListener::bind(on).await;
    bound.map_err(|error| io::Error::other(format!("{name}: {on}: {error}")))
}

fn warn_if_open(cluster: &Cluster, address: SocketAddr) {
    if cluster.tls.is_none() && !address.ip().is_loopback() {
        log::warn!(
            "{address} is open to everybody who can reach it; [tls] in cluster.toml closes it"
        );
    }
}

/// What is wrong with listening on loopback, once a node is found that is not there.
async fn out_of_reach(cluster: &Cluster, place: usize) -> Option<io::Error> {
    let own = cluster.node(cluster.name(place))?;
    let lookups = cluster.nodes().iter().map(|node| async move {
        let mut found = lookup_host(&node.address).await.ok()?;
        let off = found.any(|address| !address.ip().is_loopback());
        off.then_some(&node.name)
    });
    let looked_up = lookups.collect::<FuturesUnordered<_>>();
    let other = pin!(looked_up.filter_map(ready)).next().await?;
    Some(io::Error::other(format!(
        "{}: {} is loopback on this machine, where {other} cannot reach it; \
         --listen 0.0.0.0:PORT listens on the network",
        own.name, own.address,
    )))
}

//! Mutual TLS: both sides of a connection show a certificate that the ring's `ca` has signed,
//! and a node's is for its name, wherever it listens. Compiled in with the feature `tls`;
//! without it, a file with a `[tls]` table is refused.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use super::{Connecting, Connection, Dial, connected, tcp};
use crate::cluster::Cluster;

#[cfg(feature = "tls")]
mod mutual;

/// Lets an accepted connection in, or turns it away, before it is served.
pub type Guard = Arc<dyn Fn(Box<dyn Connection>, SocketAddr) -> Connecting + Send + Sync>;

/// How the nodes of this ring are reached.
pub fn dial(cluster: &Cluster) -> io::Result<Dial> {
    match &cluster.tls {
        #[cfg(feature = "tls")]
        Some(files) => mutual::dial(files),
        _ => Ok(tcp()),
    }
}

/// How the node of this name takes connections.
pub fn guard(cluster: &Cluster, name: &str) -> io::Result<Guard> {
    match (&cluster.tls, name) {
        // without the feature, the name is not needed
        #[cfg(feature = "tls")]
        (Some(files), name) => mutual::guard(files, name),
        _ => Ok(Arc::new(|stream, _| connected(stream))),
    }
}

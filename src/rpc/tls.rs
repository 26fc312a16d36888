//! Mutual TLS: both sides of a connection show a certificate that the ring's `ca` has signed,
//! and a node's is for its name, wherever it listens. Compiled in with the feature `tls`;
//! without it, a file with a `[tls]` table is refused.

use std::net::SocketAddr;

use super::{Connection, Dial, tcp};
use crate::cluster::{Cluster, Invalid};

#[cfg(feature = "tls")]
mod mutual;

/// What becomes of an accepted connection before it is served.
pub type Guard = Box<dyn Fn(Box<dyn Connection>, SocketAddr) -> Box<dyn Connection> + Send>;

/// How the nodes of this ring are reached.
pub fn dial(cluster: &Cluster) -> Result<Dial, Invalid> {
    match &cluster.tls {
        Some(files) => mutual::dial(files),
        None => Ok(tcp()),
    }
}

/// How the node of this name takes connections.
pub fn guard(cluster: &Cluster, name: &str) -> Result<Guard, Invalid> {
    match &cluster.tls {
        Some(files) => mutual::guard(files, name),
        None => Ok(Box::new(|stream, _| stream)),
    }
}

/// A `[tls]` table is refused, not ignored.
#[cfg(not(feature = "tls"))]
mod mutual {
    use super::{Dial, Guard, Invalid};
    use crate::cluster::{Files, NOT_BUILT};

    pub(super) fn dial(_: &Files) -> Result<Dial, Invalid> {
        Err(Invalid(NOT_BUILT.to_owned()))
    }

    pub(super) fn guard(_: &Files, _: &str) -> Result<Guard, Invalid> {
        Err(Invalid(NOT_BUILT.to_owned()))
    }
}

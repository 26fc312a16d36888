//! Mutual TLS: both sides of a connection show a certificate that the ring's `ca` has signed,
//! and a node's is for its name, wherever it listens. Compiled in with the feature `tls`;
//! without it, a file with a `[tls]` table is refused.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::Deserialize;

use crate::cluster::{Cluster, Invalid, Node};
use crate::rpc::{Connection, Dial, tcp};

#[cfg(feature = "tls")]
mod mutual;

/// The `[tls]` table: the same paths on every host, where each has files of its own.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Files {
    /// The certificates of those who sign for this ring.
    pub ca: PathBuf,
    /// This host's certificate, and those between it and the `ca`.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

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

/// Whether these nodes can have certificates; if not, why.
pub(crate) fn check(nodes: &[Node]) -> Result<(), String> {
    mutual::check(nodes)
}

/// A `[tls]` table is refused, not ignored.
#[cfg(not(feature = "tls"))]
mod mutual {
    use super::{Dial, Files, Guard, Invalid, Node};

    const NOT_BUILT: &str = "this kv54 was built without TLS; build it with --features tls";

    pub(super) fn dial(_: &Files) -> Result<Dial, Invalid> {
        Err(Invalid(NOT_BUILT.to_owned()))
    }

    pub(super) fn guard(_: &Files, _: &str) -> Result<Guard, Invalid> {
        Err(Invalid(NOT_BUILT.to_owned()))
    }

    pub(super) fn check(_: &[Node]) -> Result<(), String> {
        Err(NOT_BUILT.to_owned())
    }
}

//! The ring: the names of the nodes in sorted order. `crc32(key) % N` says which node owns a
//! key, and the next two nodes have copies. `cluster.toml`, the same file on every host, lists
//! the nodes; [`Cluster::read`] reads it.

use std::path::PathBuf;

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};

mod file;
mod state;

pub use file::{Files, Limits};
pub use state::{Rings, State, Told};

/// The longest key, in bytes.
pub const MAX_KEY: usize = 1 << 10;
/// The longest value: bytes of a string, or of any other value as MessagePack.
pub const MAX_VALUE: usize = 1 << 20;
/// Copies of each key, where there are so many nodes.
pub const COPIES: usize = 3;

/// The ring and its limits.
#[derive(Clone, Debug)]
pub struct Cluster {
    nodes: Vec<Node>,
    leaving: Vec<Node>,
    /// How long and how much at most.
    pub limits: Limits,
    /// Where the certificates are, if connections are encrypted.
    pub tls: Option<Files>,
    /// Where each node has a folder of its own, if it keeps a log on disk.
    pub disk: Option<PathBuf>,
}

/// One node of the ring.
#[derive(Clone, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
pub struct Node {
    /// Its name, the only thing that differs between two hosts.
    pub name: String,
    /// Where it listens and is asked: `host:port`.
    pub address: String,
}

/// The version of what nodes say to each other. One that would misread another one refuses it.
const WIRE: &str = "3";

impl Cluster {
    /// The place of the key's owner. The keys of one owner are a part, and go by its place.
    pub fn owner(&self, key: &[u8]) -> usize {
        crc32fast::hash(key) as usize % self.nodes.len()
    }

    /// The places of the nodes that keep a part: its owner and the next two.
    pub fn replicas(&self, part: usize) -> impl Iterator<Item = usize> + use<> {
        let nodes = self.nodes.len();
        (0..self.copies()).map(move |next| (part + next) % nodes)
    }

    /// How many nodes keep a copy of a key: three, or all of a smaller ring.
    pub fn copies(&self) -> usize {
        self.nodes.len().min(COPIES)
    }

    /// How many of them must answer: more than half.
    pub fn majority(&self) -> usize {
        self.copies() / 2 + 1
    }

    /// What the asking side and a node must agree on before the node answers as a replica: the
    /// names, the window, the limits of keys and values, and the name of the node that is meant.
    pub fn fingerprint(&self, name: &str) -> u32 {
        crc32fast::hash(self.common(name).as_bytes())
    }

    fn common(&self, name: &str) -> String {
        let names = self.nodes.iter().map(|node| node.name.as_str());
        let window = self.limits.window.as_millis().to_string();
        let [key, value] = [MAX_KEY, MAX_VALUE].map(|limit| limit.to_string());
        let lines: Vec<&str> = names
            .chain([&*window, &*key, &*value, WIRE, name])
            .collect();
        lines.join("\n")
    }

    /// The ring in words: what must be the same on every host.
    pub fn ring(&self) -> String {
        let (names, window) = (self.names().join(" "), self.limits.window);
        format!("{names}, window {window:?}")
    }

    /// What may change while a node runs, each in words: the addresses, and two of the limits.
    pub fn changeable(&self) -> Vec<String> {
        let (memory, most) = (ByteSize(self.limits.memory as u64), self.limits.connections);
        let limits = [
            format!("memory is {memory}"),
            format!("connections are {most}"),
        ];
        let nodes = self.nodes.iter();
        let nodes = nodes.map(|node| format!("{} is at {}", node.name, node.address));
        nodes.chain(limits).collect()
    }

    /// The nodes in ring order.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The nodes that are to leave the ring: they may still be asked.
    pub fn leaving(&self) -> &[Node] {
        &self.leaving
    }

    /// The node of this name, in the ring or leaving it.
    pub fn node(&self, name: &str) -> Option<&Node> {
        let mut nodes = self.nodes.iter().chain(&self.leaving);
        nodes.find(|node| node.name == name)
    }

    /// The names of the other nodes that keep a part that this node keeps.
    pub fn neighbours(&self, name: &str) -> Vec<&str> {
        let own = self.place(name);
        let parts =
            (0..self.nodes.len()).filter(|part| self.replicas(*part).any(|at| Some(at) == own));
        let mut places: Vec<usize> = parts.flat_map(|part| self.replicas(part)).collect();
        places.sort_unstable();
        places.dedup();
        let others = places.into_iter().filter(|at| Some(*at) != own);
        others.map(|at| self.name(at)).collect()
    }

    /// The place of the node of this name in the ring.
    pub fn place(&self, name: &str) -> Option<usize> {
        self.nodes.iter().position(|node| node.name == name)
    }

    /// The name of the node at this place of the ring, or behind it of those that leave.
    pub fn name(&self, place: usize) -> &str {
        let mut nodes = self.nodes.iter().chain(&self.leaving);
        nodes.nth(place).map_or("?", |node| &node.name)
    }

    /// The names of all nodes in ring order.
    pub fn names(&self) -> Vec<&str> {
        self.nodes.iter().map(|node| &*node.name).collect()
    }
}

//! `cluster.toml`: what may stand in it, and what is wrong with it, in one line.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytesize::ByteSize;
use serde::{Deserialize, Deserializer, de::Error};
use toml::Spanned;

use super::{Cluster, Node};
use crate::error::plain;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    nodes: Spanned<Table>,
    #[serde(default)]
    leaving: Table,
    #[serde(default)]
    limits: Limits,
    tls: Option<Spanned<Files>>,
    disk: Option<Disk>,
}

/// What a connection keeps of its buffers while it is idle, about, in bytes.
const IDLE: usize = 32 << 10;

/// Names and addresses.
type Table = BTreeMap<Spanned<String>, Spanned<String>>;

/// The table `[limits]`: a field that is not there has its default.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// The time in which a majority must have answered; the same on every host.
    #[serde(deserialize_with = "window")]
    pub window: Duration,
    /// What a node's keys, values and overhead may take, in bytes.
    #[serde(deserialize_with = "memory")]
    pub memory: usize,
    /// Connections that a node accepts at once.
    #[serde(deserialize_with = "connections")]
    pub connections: usize,
    /// Threads that answer. Where the file does not say it, `serve` chooses.
    #[serde(deserialize_with = "threads")]
    pub threads: Option<usize>,
    /// How many nodes connect, this one too. It is not in the file.
    #[serde(skip)]
    pub nodes: usize,
    /// Unfinished input, requests in flight and unsent answers of all connections, in bytes. At this
    /// limit the connection that holds the most of them is closed. It is not in the file; see [`Limits::buffers`].
    #[serde(skip)]
    pub buffers: usize,
}

impl Limits {
    /// What all buffers may hold: more where so many connections hold that much while they are idle.
    pub fn buffers(&self) -> usize {
        self.buffers.max(self.connections * IDLE)
    }

    /// Connections beyond `connections`, on which nodes are let in and clients are not: each of their threads has one,
    /// a node that joins or compares one more, and one that forgets another one, to itself too. They are expected
    /// to have as many threads as this node.
    pub fn reserve(&self) -> usize {
        self.nodes * (self.threads.unwrap_or(1) + 2)
    }
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            window: Duration::from_secs(1),
            memory: 1 << 30,
            connections: 1024,
            threads: None,
            nodes: 0,
            buffers: 256 << 20,
        }
    }
}

fn window<'de, D: Deserializer<'de>>(field: D) -> Result<Duration, D::Error> {
    let time = humantime::parse_duration(&String::deserialize(field)?).map_err(Error::custom)?;
    let range = Duration::from_millis(50)..=Duration::from_secs(60);
    within(range, time, "from 50ms to 60s")
}

fn memory<'de, D: Deserializer<'de>>(field: D) -> Result<usize, D::Error> {
    let no_size = |_| D::Error::custom("a size like 512MiB or 1GiB");
    let size: ByteSize = String::deserialize(field)?.parse().map_err(no_size)?;
    let bytes = usize::try_from(size.as_u64()).map_err(Error::custom)?;
    within(1 << 20..=usize::MAX, bytes, "at least 1MiB")
}

fn connections<'de, D: Deserializer<'de>>(field: D) -> Result<usize, D::Error> {
    let count = usize::deserialize(field)?;
    within(1..=1_000_000, count, "from 1 to 1000000")
}

fn threads<'de, D: Deserializer<'de>>(field: D) -> Result<Option<usize>, D::Error> {
    let count = usize::deserialize(field)?;
    within(1..=1024, count, "from 1 to 1024").map(Some)
}

fn within<T: PartialOrd, E: Error>(range: RangeInclusive<T>, it: T, why: &str) -> Result<T, E> {
    match range.contains(&it) {
        true => Ok(it),
        false => Err(E::custom(why)),
    }
}

/// The table `[tls]`: the same paths on every host, where each has files of its own.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
#[non_exhaustive] // a build that cannot encrypt has none: reading the file refuses them
pub struct Files {
    /// The certificates of those who sign for this ring.
    pub ca: PathBuf,
    /// This host's certificate, and those between it and the `ca`.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// The table `[disk]`: the same path on every host.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Disk {
    path: PathBuf,
}

/// What is wrong with the text: where in it, and `field: why`.
type Wrong = (usize, String);

impl Cluster {
    /// Reads the file. An error is one line that names file, line and field.
    pub fn read(path: &Path) -> io::Result<Self> {
        match std::fs::read_to_string(path) {
            Ok(text) => Cluster::parse(path, &text),
            Err(error) => Err(io::Error::other(format!("{}: {error}", path.display()))),
        }
    }

    /// Reads the file's text. The files of `[tls]` lie beside `path`, which errors name, too.
    pub fn parse(path: &Path, text: &str) -> io::Result<Self> {
        let file = toml::from_str(text).map_err(|error| misread(text, error));
        let ring = file.and_then(|file| ring(file, path));
        ring.map_err(|(at, what)| {
            let line = lines_before(text, at) + 1;
            io::Error::other(plain(format!("{}:{line}: {what}", path.display())))
        })
    }
}

/// What toml found. Printed without the text, its error ends with the field whose value does not
/// fit; where the text is no TOML at all, the line may still begin with a field.
fn misread(text: &str, mut error: toml::de::Error) -> Wrong {
    let at = error.span().map_or(0, |span| span.start);
    let line = text.lines().nth(lines_before(text, at)).unwrap_or_default();
    error.set_input(None);
    let printed = error.to_string();
    let field = match printed.trim_end_matches(['`', '\n']).rsplit_once("\nin `") {
        Some((_, field)) => field,
        None => line.split_once('=').map_or("", |(field, _)| field.trim()),
    };
    if let Some(quoted) = quoted(line) {
        return (at, format!("{field}: quotes are missing: {quoted}"));
    }
    let what = format!("{field}: {}", error.message());
    (at, what.trim_start_matches(": ").to_owned())
}

/// The line with its value in quotes, if it lacks nothing else: `alice = 127.0.0.1:5401`.
fn quoted(line: &str) -> Option<String> {
    let (field, value) = line.split('#').next()?.split_once('=')?;
    let quoted = format!("{} = \"{}\"", field.trim(), value.trim());
    let begins = |c: char| c.is_alphanumeric() || c == '[';
    let is_toml = |line: &str| line.parse::<toml::Table>().is_ok();
    let lacks_quotes = value.trim().starts_with(begins) && !is_toml(line) && is_toml(&quoted);
    lacks_quotes.then_some(quoted)
}

fn lines_before(text: &str, at: usize) -> usize {
    text.get(..at).unwrap_or(text).matches('\n').count()
}

/// Checks what concerns more than one field. The files of `[tls]`, and the folder of `[disk]`, lie beside this one.
fn ring(file: File, path: &Path) -> Result<Cluster, Wrong> {
    let start = file.nodes.span().start;
    let nodes = sorted("nodes", file.nodes.into_inner(), &[])?;
    if nodes.is_empty() {
        return Err((start, "nodes: a ring has at least one node".to_owned()));
    }
    let leaving = sorted("leaving", file.leaving, &nodes)?;
    if let Some(table) = &file.tls {
        let certified = nodes.iter().try_for_each(|node| certifiable(&node.name));
        certified.map_err(|why| (table.span().start, format!("tls: {why}")))?;
    }
    let (mut limits, mut tls) = (file.limits, file.tls.map(Spanned::into_inner));
    limits.nodes = nodes.len() + leaving.len();
    if let Some(Files { ca, cert, key }) = &mut tls {
        for file in [ca, cert, key] {
            *file = path.with_file_name(&*file);
        }
    }
    let disk = file.disk.map(|disk| path.with_file_name(disk.path));
    Ok(Cluster {
        nodes,
        leaving,
        limits,
        tls,
        disk,
    })
}

impl Cluster {
    /// The same limits and files for a ring of other nodes, which must be in ring order.
    pub(super) fn with(&self, nodes: &[Node]) -> Result<Self, String> {
        let sorted = nodes.is_sorted_by(|one, next| one.name < next.name);
        let odd = nodes
            .iter()
            .find(|node| !is_name(&node.name) || check_address(&node.address).is_err());
        if let (true, false, None) = (sorted, nodes.is_empty(), odd) {
            let (nodes, leaving, tls) = (nodes.to_vec(), Vec::new(), self.tls.clone());
            let (limits, disk) = (self.limits, self.disk.clone());
            return Ok(Cluster {
                nodes,
                leaving,
                limits,
                tls,
                disk,
            });
        }
        Err("a ring is names in order, each with host:port".to_owned())
    }
}

/// The nodes of a table in ring order, which is the order of its map. None of them is one of `others`.
fn sorted(field: &str, table: Table, others: &[Node]) -> Result<Vec<Node>, Wrong> {
    let mut nodes: Vec<Node> = Vec::new();
    for (name, address) in table {
        let (name_at, at) = (name.span().start, address.span().start);
        let (name, address) = (name.into_inner(), address.into_inner().to_lowercase());
        if !is_name(&name) {
            let why = "a name is letters, digits, '.', '-' and '_', 64 at most";
            return Err((name_at, format!("{field}.{name:?}: {why}")));
        }
        if others.iter().any(|other| other.name == name) {
            let why = "a node that leaves is not in [nodes]";
            return Err((name_at, format!("{field}.{name}: {why}")));
        }
        check_address(&address).map_err(|why| (at, format!("{field}.{name}: {address:?}{why}")))?;
        let mut known = others.iter().chain(&nodes);
        if let Some(Node { name: twin, .. }) = known.find(|twin| twin.address == address) {
            let why = format!("{address} is the address of {twin} too");
            return Err((at, format!("{field}.{name}: {why}")));
        }
        nodes.push(Node { name, address });
    }
    Ok(nodes)
}

/// Whether a certificate can be for this name: it carries names as DNS has them.
#[cfg(feature = "tls")]
fn certifiable(name: &str) -> Result<(), String> {
    let checked = rustls::pki_types::DnsName::try_from(name).map(drop);
    checked.map_err(|_| format!("no certificate can be for {name:?}, which DNS would not take"))
}

#[cfg(not(feature = "tls"))]
fn certifiable(_: &str) -> Result<(), &'static str> {
    Err("this kv54 was built without TLS; build it with --features tls")
}

fn is_name(name: &str) -> bool {
    let known = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
    (1..=64).contains(&name.len()) && name.chars().all(known)
}

/// Whether this can be a `host:port` at all; only dialling shows whether it is one.
fn check_address(address: &str) -> Result<(), &'static str> {
    let (host, port) = address.rsplit_once(':').ok_or(" has no :port")?;
    let number = port.parse::<u16>().unwrap_or(0);
    if number == 0 || number.to_string() != port {
        return Err(": a port is a number from 1 to 65535");
    }
    // Digits and dots alone look like IPv4, so they must be.
    let digits = host.chars().all(|c| c.is_ascii_digit() || c == '.');
    let is_name = !digits && host.len() <= 253 && host.split('.').all(is_name);
    match address.parse::<SocketAddr>() {
        Ok(socket) if socket.ip().to_canonical().is_unspecified() => {
            Err(": nodes dial this address, and 0.0.0.0 and [::] are for kv54 serve --listen alone")
        }
        Err(_) if !is_name => {
            Err(": a host is an IPv4 address, an IPv6 address in brackets, or a name")
        }
        _ => Ok(()),
    }
}

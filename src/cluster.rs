//! `cluster.toml`: the same file on every host. Its names in sorted order are the
//! ring, and `crc32(key) % N` says where on the ring a key lives.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytesize::ByteSize;
use serde::Deserialize;
use toml::Spanned;

/// The longest key, in bytes.
pub const MAX_KEY: usize = 1 << 10;
/// The longest value: bytes of a string, or of any other value as MessagePack.
pub const MAX_VALUE: usize = 1 << 20;
/// Copies of each key, where there are so many nodes.
pub const COPIES: usize = 3;

/// The ring and its limits.
///
/// ```
/// let text = "[nodes]\nbob = 'bob:5401'\nalice = 'alice:5401'";
/// let cluster = kv54::cluster::Cluster::parse("cluster.toml".as_ref(), text)?;
/// assert_eq!(cluster.names(), ["alice", "bob"]);
/// assert_eq!(cluster.name(cluster.owner(b"tea")), "alice"); // 2391201714 % 2 = 0
/// # Ok::<(), kv54::cluster::Invalid>(())
/// ```
#[derive(Clone, Debug)]
pub struct Cluster {
    nodes: Vec<Node>,
    /// The time in which a majority must have answered; the same on every host.
    pub window: Duration,
    /// What a node's keys, values and overhead may take, in bytes.
    pub memory: usize,
    /// Connections that a node accepts at once.
    pub connections: usize,
    /// Where the certificates are, if connections are encrypted.
    pub tls: Option<Files>,
}

/// One node of the ring.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its name, the only thing that differs between two hosts.
    pub name: String,
    /// Where it listens and is asked: `host:port`.
    pub address: String,
}

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

/// What is wrong with the file: one line that names file, line and field.
#[derive(Debug)]
pub struct Invalid(pub(crate) String);

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Invalid {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    nodes: BTreeMap<Spanned<String>, Spanned<String>>,
    #[serde(default)]
    limits: Limits,
    tls: Option<Spanned<Files>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Limits {
    window: Option<Spanned<String>>,
    memory: Option<Spanned<String>>,
    connections: Option<Spanned<usize>>,
}

impl Cluster {
    /// Reads the file.
    pub fn read(path: &Path) -> Result<Self, Invalid> {
        match std::fs::read_to_string(path) {
            Ok(text) => Cluster::parse(path, &text),
            Err(error) => Err(Invalid(format!("{}: {error}", path.display()))),
        }
    }

    /// Reads the file's text; `path` is for the error.
    pub fn parse(path: &Path, text: &str) -> Result<Self, Invalid> {
        let at = |span: Range<usize>, field: &str, why: &dyn fmt::Display| {
            let line = text.get(..span.start).unwrap_or(text).matches('\n').count() + 1;
            let field = if field.is_empty() {
                String::new()
            } else {
                format!("{field}: ")
            };
            let said = format!("{}:{line}: {field}{why}", path.display());
            Invalid(said.replace(char::is_control, "\u{fffd}")) // a terminal would obey them
        };
        let file: File = toml::from_str(text).map_err(|error| {
            let span = error.span().unwrap_or(0..0);
            let line = text
                .get(..span.start)
                .map_or(0, |before| before.matches('\n').count());
            let line = text.lines().nth(line).unwrap_or_default();
            let field = line.split_once('=').map_or("", |(field, _)| field.trim());
            at(span, field, &error.message().replace('\n', "; "))
        })?;
        let mut nodes: Vec<Node> = Vec::new();
        for (name, address) in &file.nodes {
            let field = match is_name(name.get_ref()) {
                true => format!("nodes.{}", name.get_ref()),
                false => format!("nodes.{:?}", name.get_ref()),
            };
            let node = Node {
                name: name.get_ref().clone(),
                address: address.get_ref().to_lowercase(),
            };
            if !is_name(&node.name) {
                return Err(at(
                    name.span(),
                    &field,
                    &"a name is letters, digits, '.', '-' and '_', 64 at most",
                ));
            }
            check_address(&node.address).map_err(|why| at(address.span(), &field, &why))?;
            if let Some(twin) = nodes.iter().find(|twin| twin.address == node.address) {
                let why = format!("{} is the address of {} too", node.address, twin.name);
                return Err(at(address.span(), &field, &why));
            }
            nodes.push(node);
        }
        if nodes.is_empty() {
            let start = text.find("[nodes]").unwrap_or(0);
            return Err(at(start..start, "nodes", &"a ring has at least one node"));
        }
        if let Some(table) = &file.tls {
            certifiable(&nodes).map_err(|why| at(table.span(), "tls", &why))?;
        }
        let Limits {
            window,
            memory,
            connections,
        } = file.limits;
        let window = limit(
            window,
            Duration::from_secs(1),
            |text| match humantime::parse_duration(text) {
                Ok(time)
                    if (Duration::from_millis(50)..=Duration::from_secs(60)).contains(&time) =>
                {
                    Ok(time)
                }
                Ok(_) => Err("from 50ms to 60s".to_owned()),
                Err(error) => Err(error.to_string()),
            },
        );
        let memory = limit(memory, 1 << 30, |text| match text.parse::<ByteSize>() {
            Ok(size) if size >= ByteSize::mib(1) => {
                usize::try_from(size.as_u64()).map_err(|e| e.to_string())
            }
            Ok(_) => Err("at least 1MiB".to_owned()),
            Err(_) => Err("a size like 512MiB or 1GiB".to_owned()),
        });
        let connections = limit(connections, 1024, |count| match count {
            1..=1_000_000 => Ok(*count),
            _ => Err("from 1 to 1000000".to_owned()),
        });
        let beside = |file: PathBuf| path.parent().unwrap_or(path).join(file);
        let tls = file.tls.map(Spanned::into_inner).map(|files| Files {
            ca: beside(files.ca),
            cert: beside(files.cert),
            key: beside(files.key),
        });
        Ok(Cluster {
            nodes,
            tls,
            window: window.map_err(|(span, why)| at(span, "limits.window", &why))?,
            memory: memory.map_err(|(span, why)| at(span, "limits.memory", &why))?,
            connections: connections.map_err(|(span, why)| at(span, "limits.connections", &why))?,
        })
    }

    /// The nodes in ring order.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The place of the node of this name in the ring.
    pub fn place(&self, name: &str) -> Option<usize> {
        self.nodes.iter().position(|node| node.name == name)
    }

    /// The name of the node at this place of the ring.
    pub fn name(&self, place: usize) -> &str {
        self.nodes.get(place).map_or("?", |node| &node.name)
    }

    /// The names of all nodes in ring order.
    pub fn names(&self) -> Vec<&str> {
        self.nodes.iter().map(|node| &*node.name).collect()
    }

    /// How many nodes keep a copy of a key: three, or all of a smaller ring.
    pub fn copies(&self) -> usize {
        self.nodes.len().min(COPIES)
    }

    /// How many of them must answer: more than half.
    pub fn majority(&self) -> usize {
        self.copies() / 2 + 1
    }

    /// The place of the key's owner. The keys of one owner are a part, and go by its place.
    pub fn owner(&self, key: &[u8]) -> usize {
        crc32fast::hash(key) as usize % self.nodes.len()
    }

    /// The places of the nodes that keep a part: its owner and the next two.
    pub fn replicas(&self, part: usize) -> impl Iterator<Item = usize> + use<> {
        let nodes = self.nodes.len();
        (0..self.copies()).map(move |next| (part + next) % nodes)
    }

    /// What asker and node must agree on before a replica answers: the names, the
    /// window, the limits, and who is meant.
    pub fn fingerprint(&self, name: &str) -> u32 {
        let names = self.nodes.iter().map(|node| node.name.as_str());
        let window = self.window.as_millis().to_string();
        let [key, value] = [MAX_KEY, MAX_VALUE].map(|limit| limit.to_string());
        let lines: Vec<&str> = names.chain([&*window, &*key, &*value, name]).collect();
        crc32fast::hash(lines.join("\n").as_bytes())
    }
}

fn limit<T, L>(
    given: Option<Spanned<L>>,
    default: T,
    read: impl Fn(&L) -> Result<T, String>,
) -> Result<T, (Range<usize>, String)> {
    match given {
        None => Ok(default),
        Some(given) => read(given.get_ref()).map_err(|why| (given.span(), why)),
    }
}

/// Why a build without the feature `tls` refuses a `[tls]` table.
#[cfg(not(feature = "tls"))]
pub(crate) const NOT_BUILT: &str = "this kv54 was built without TLS; build it with --features tls";

#[cfg(not(feature = "tls"))]
fn certifiable(_: &[Node]) -> Result<(), String> {
    Err(NOT_BUILT.to_owned())
}

/// Whether a certificate can be for each of these nodes: it carries a name as DNS has them.
#[cfg(feature = "tls")]
fn certifiable(nodes: &[Node]) -> Result<(), String> {
    let dns = |node: &Node| rustls::pki_types::DnsName::try_from(&*node.name).is_ok();
    match nodes.iter().find(|node| !dns(node)) {
        Some(Node { name, .. }) => Err(format!(
            "no certificate can be for {name:?}, which DNS would not take"
        )),
        None => Ok(()),
    }
}

fn is_name(name: &str) -> bool {
    let known = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
    (1..=64).contains(&name.len()) && name.chars().all(known)
}

/// Whether this can be a `host:port` at all; only dialling shows whether it is one.
fn check_address(address: &str) -> Result<(), String> {
    let (host, port) = address
        .rsplit_once(':')
        .ok_or_else(|| format!("{address:?} has no :port"))?;
    if !port
        .parse::<u16>()
        .is_ok_and(|number| number > 0 && number.to_string() == port)
    {
        return Err(format!("{address:?}: a port is a number from 1 to 65535"));
    }
    let bracketed = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    let sound = match bracketed {
        Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok(),
        // Digits and dots alone look like IPv4, so they must be.
        None if host.chars().all(|c| c.is_ascii_digit() || c == '.') => {
            host.parse::<std::net::Ipv4Addr>().is_ok()
        }
        None => host.len() <= 253 && host.split('.').all(is_name),
    };
    match sound {
        true => Ok(()),
        false => Err(format!(
            "{address:?}: a host is an IPv4 address, an IPv6 address in brackets, or a name"
        )),
    }
}

//! `status`: how the nodes are.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use futures::future::join_all;
use serde::Serialize;
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::{Failure, Options, Outcome, print, print_coloured, text};
use crate::cluster::{Cluster, Node};
use crate::error::Kind;
use crate::rpc::Peer;
use crate::store::Status;
use crate::tls;

/// Show how the nodes are.
#[derive(Args)]
#[command(after_help = "Examples:
  kv54 status
  kv54 status --wait --timeout 60s")]
pub(super) struct Show {
    /// Wait until every node is ready, for --timeout if it is given
    #[arg(long)]
    wait: bool,
}

/// How long nodes are asked for a hint behind an error, whose own time is over.
const MOMENT: Duration = Duration::from_millis(300);

/// One line of the answer.
#[derive(Serialize)]
struct Line {
    name: String,
    address: String,
    state: String,
    keys: Option<usize>,
    tombstones: Option<usize>,
    bytes: Option<usize>,
    #[serde(flatten)]
    rest: serde_json::Value,
    #[serde(skip)]
    remark: String,
}

impl Show {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        let cluster = options.cluster()?;
        let peers = peers(&cluster, options.timeout().min(cluster.window))?;
        let deadline = options.timeout.map(|timeout| Instant::now() + timeout);
        loop {
            let lines = ask_all(&peers, &cluster).await;
            let ready = lines.iter().all(|line| line.state == "ready");
            let late = deadline.is_some_and(|deadline| Instant::now() >= deadline);
            if !self.wait || ready || late {
                match options.json {
                    true => print(json(&lines))?,
                    false => print_coloured(&table(&lines))?,
                }
                return Ok(if ready {
                    ExitCode::SUCCESS
                } else {
                    ExitCode::from(3)
                });
            }
            sleep(Duration::from_millis(100)).await;
        }
    }
}

/// How the nodes are, in half a sentence.
pub(super) async fn summary(cluster: &Cluster) -> Result<String, Failure> {
    let lines = ask_all(&peers(cluster, MOMENT)?, cluster).await;
    let mut states: Vec<(&str, Vec<&str>)> = Vec::new();
    for line in &lines {
        match states.iter_mut().find(|(state, _)| *state == line.state) {
            Some((_, names)) => names.push(&line.name),
            None => states.push((&line.state, vec![&line.name])),
        }
    }
    if let [(state, _)] = states[..] {
        return Ok(match lines.len() {
            1 => format!("it is the only node, and {state}"),
            count => format!("all {count} nodes are {state}"),
        });
    }
    let said = states.iter().map(|(state, names)| {
        let are = if names.len() == 1 { "is" } else { "are" };
        format!("{} {are} {state}", text::and(names))
    });
    Ok(said.collect::<Vec<_>>().join(", "))
}

fn peers(cluster: &Cluster, patience: Duration) -> Result<Vec<Peer>, Failure> {
    let dial = tls::dial(cluster)?;
    let peer = |node: &Node| Peer::new(node, patience, dial.clone());
    Ok(cluster.nodes().iter().map(peer).collect())
}

async fn ask_all(peers: &[Peer], cluster: &Cluster) -> Vec<Line> {
    let nodes = peers.iter().zip(cluster.nodes());
    join_all(nodes.map(|(peer, node)| ask(peer, node, cluster))).await
}

async fn ask(peer: &Peer, node: &Node, cluster: &Cluster) -> Line {
    let (_, answer) = peer.call("status", &[]).await;
    let status = answer.and_then(Status::try_from);
    let (name, address) = (node.name.clone(), node.address.clone());
    let status = match status {
        Ok(status) => status,
        Err(error) => {
            let why = error
                .why
                .trim_start_matches(&format!("{address}: "))
                .to_owned();
            return Line {
                name,
                address,
                state: "down".to_owned(),
                keys: None,
                tombstones: None,
                bytes: None,
                rest: json!({ "error": why }),
                remark: why,
            };
        }
    };
    let (state, remark) = if status.ring != cluster.fingerprint(&node.name) {
        let remark = format!(
            "it is {} of another ring: use the same cluster.toml",
            status.name
        );
        (Kind::WrongRing.word().to_owned(), remark)
    } else if status.waiting_for.is_empty() {
        (status.state, String::new())
    } else {
        let remark = format!(
            "{} %, waiting for {}",
            status.progress,
            status.waiting_for.join(", ")
        );
        (status.state, remark)
    };
    Line {
        name,
        address,
        state,
        keys: Some(status.keys),
        tombstones: Some(status.tombstones),
        bytes: Some(status.bytes),
        rest: json!({
            "version": status.version,
            "waiting_for": status.waiting_for,
            "progress": status.progress,
            "ring": status.ring,
            "entries": status.entries,
            "digests": status.digests,
            "uptime_s": status.uptime_s,
        }),
        remark,
    }
}

fn json(lines: &[Line]) -> String {
    format!("{}\n", json!({ "nodes": lines }))
}

fn table(lines: &[Line]) -> String {
    let mut rows = vec![
        ["node", "address", "state", "keys", "bytes"]
            .map(String::from)
            .to_vec(),
    ];
    let count = |count: Option<usize>| count.map_or("-".to_owned(), |count| count.to_string());
    rows.extend(lines.iter().map(|line| {
        let Line {
            name,
            address,
            state,
            keys,
            bytes,
            remark,
            ..
        } = line;
        vec![
            name.clone(),
            address.clone(),
            text::coloured(state),
            count(*keys),
            count(*bytes),
            remark.clone(),
        ]
    }));
    text::table(&rows)
}

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
use crate::error::{Error, Kind};
use crate::rpc::{Peer, tls};
use crate::status::Status;

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
        let peers = peers(&cluster, options.timeout().min(cluster.limits.window))?;
        let deadline = options.timeout.map(|timeout| Instant::now() + timeout);
        loop {
            let lines = ask_all(&peers, &cluster).await;
            let ready = lines.iter().all(|line| line.state == "ready");
            let late = deadline.is_some_and(|deadline| Instant::now() >= deadline);
            if !self.wait || ready || late {
                match options.json {
                    true => print(format!("{}\n", json!({ "nodes": lines })))?,
                    false => print_coloured(&table(lines))?,
                }
                return Ok(ExitCode::from(if ready { 0 } else { 3 }));
            }
            sleep(Duration::from_millis(100)).await;
        }
    }
}

/// How the nodes are, in half a sentence.
pub(super) async fn summary(options: &Options) -> Result<String, Failure> {
    let cluster = options.cluster()?;
    let lines = ask_all(&peers(&cluster, MOMENT)?, &cluster).await;
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
    let lines = peers.iter().zip(cluster.nodes()).map(async |(peer, node)| {
        let (_, answer) = peer.call("status", &[]).await;
        match answer.and_then(|answer| Status::read(&answer)) {
            Ok(status) => Line::answered(node, status, cluster.fingerprint(&node.name)),
            Err(error) => Line::silent(node, &error),
        }
    });
    join_all(lines).await
}

impl Line {
    /// A node that did not answer.
    fn silent(node: &Node, error: &Error) -> Self {
        let remark = text::cause(error, node);
        Line {
            name: node.name.clone(),
            address: node.address.clone(),
            state: "down".to_owned(),
            keys: None,
            tombstones: None,
            bytes: None,
            rest: json!({ "error": remark }),
            remark,
        }
    }

    /// What a node says of itself, if it is of this ring.
    fn answered(node: &Node, status: Status, ring: u32) -> Self {
        let (state, remark) = if status.ring != ring {
            let name = &status.name;
            let remark = format!("it is {name} of another ring: use the same cluster.toml");
            (Kind::WrongRing.word().to_owned(), remark)
        } else if status.waiting_for.is_empty() {
            (status.state, String::new())
        } else {
            (status.state.clone(), status.waiting())
        };
        Line {
            name: node.name.clone(),
            address: node.address.clone(),
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
}

fn table(lines: Vec<Line>) -> String {
    let head = ["node", "address", "state", "keys", "bytes"];
    let mut rows = vec![head.map(String::from).to_vec()];
    let count = |count: Option<usize>| count.map_or("-".to_owned(), |count| count.to_string());
    rows.extend(lines.into_iter().map(|line| {
        let state = text::coloured(&line.state);
        let (keys, bytes) = (count(line.keys), count(line.bytes));
        vec![line.name, line.address, state, keys, bytes, line.remark]
    }));
    text::table(&rows)
}

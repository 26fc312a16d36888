//! `status`: how the nodes are.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use futures::future::join_all;
use serde::Serialize;
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::{Options, Outcome, print, print_coloured, text};
use crate::cluster::{Cluster, Node};
use crate::error::Kind;
use crate::rpc::{Peer, tcp};
use crate::store::Status;

/// Show how the nodes are.
#[derive(Args)]
pub(super) struct Show {
    /// Wait until every node is ready, for --timeout if it is given
    #[arg(long)]
    wait: bool,
}

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
    rest: Option<serde_json::Value>,
}

impl Show {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        let cluster = options.cluster()?;
        let patience = options.timeout().min(cluster.window);
        let peer = |node: &Node| Peer::new(&node.address, patience, tcp());
        let peers: Vec<Peer> = cluster.nodes().iter().map(peer).collect();
        let deadline = options.timeout.map(|timeout| Instant::now() + timeout);
        loop {
            let asked = peers
                .iter()
                .zip(cluster.nodes())
                .map(|(peer, node)| ask(peer, node, &cluster));
            let lines = join_all(asked).await;
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

async fn ask(peer: &Peer, node: &Node, cluster: &Cluster) -> Line {
    let (_, answer) = peer.call("status", &[]).await;
    let status = answer.and_then(Status::try_from);
    let (name, address) = (node.name.clone(), node.address.clone());
    match status {
        Ok(status) => {
            let ours = status.ring == cluster.fingerprint(&node.name);
            Line {
                name,
                address,
                state: if ours {
                    status.state.clone()
                } else {
                    Kind::WrongRing.word().to_owned()
                },
                keys: Some(status.keys),
                tombstones: Some(status.tombstones),
                bytes: Some(status.bytes),
                rest: Some(json!({
                    "version": status.version,
                    "waiting_for": status.waiting_for,
                    "progress": status.progress,
                    "ring": status.ring,
                    "entries": status.entries,
                    "digests": status.digests,
                    "uptime_s": status.uptime_s,
                })),
            }
        }
        Err(error) => Line {
            name,
            address,
            state: "down".to_owned(),
            keys: None,
            tombstones: None,
            bytes: None,
            rest: Some(json!({ "error": error.why })),
        },
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
            ..
        } = line;
        vec![
            name.clone(),
            address.clone(),
            text::coloured(state),
            count(*keys),
            count(*bytes),
        ]
    }));
    text::table(&rows)
}

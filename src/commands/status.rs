//! `status`: how the nodes are.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use futures::future::join_all;
use indexmap::{IndexMap, IndexSet};
use serde_json::{Value as Json, json};
use tokio::time::{Instant, sleep};

use super::{Failure, Options, Outcome, text};
use crate::cluster::{Cluster, Node};
use crate::error::{Error, Kind};
use crate::rpc::{Peer, tls};
use crate::status::Status;

/// Show how the nodes are.
///
/// If two nodes of a key lost their memory at the same time, writes may be gone. The nodes that
/// saw it say so below the table, until you run `kv54 status --acknowledge`.
#[derive(Args)]
#[command(after_help = "Examples:
  kv54 status
  kv54 status --wait --timeout 60s
  kv54 status --acknowledge

Exit codes:
  0  every node is ready
  1  every node is ready, but writes may be gone: the lines below the table say which
  3  some node is not ready")]
pub(super) struct Show {
    /// Wait until every node is ready, or until --timeout has passed if it is given
    #[arg(long)]
    wait: bool,
    /// Have all nodes forget the lines below the table about lost memories: you have read them
    #[arg(long)]
    acknowledge: bool,
}

/// How long the nodes may take to say how they are, where that explains an error.
const MOMENT: Duration = Duration::from_millis(300);

impl Show {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        let cluster = options.cluster()?;
        let peers = peers(&cluster, options.timeout().min(cluster.limits.window))?;
        let deadline = options.timeout.map(|timeout| Instant::now() + timeout);
        if self.acknowledge {
            join_all(peers.iter().map(|peer| peer.call("acknowledge", &[]))).await;
        }
        loop {
            let (nodes, rows): (Vec<Json>, _) = ask_all(&peers, &cluster).await;
            let ready = nodes.iter().all(|node| node["state"] == "ready");
            let late = deadline.is_some_and(|deadline| Instant::now() >= deadline);
            if !self.wait || ready || late {
                let table = text::table(["node", "address", "state", "keys", "bytes", ""], rows);
                let (keys, tombstones) = distinct(&nodes, &cluster).unzip();
                let [keys, tombstones] = [keys, tombstones].map(Json::from);
                let sum = format!("keys without their copies: {keys}, tombstones: {tombstones}\n");
                let json = json!({ "nodes": nodes, "keys": keys, "tombstones": tombstones });
                let doubts = doubts(&nodes);
                options.print(&json, table + &sum.replace("null", "?") + &doubts)?;
                return Ok(ExitCode::from(match (ready, doubts.is_empty()) {
                    (true, true) => 0,
                    (true, false) => 1,
                    (false, _) => 3,
                }));
            }
            sleep(Duration::from_millis(100)).await;
        }
    }
}

/// What the nodes cannot vouch for, each line once, and what to do about it.
fn doubts(nodes: &[Json]) -> String {
    let lists = nodes.iter().filter_map(|node| node["doubts"].as_array());
    let doubts: IndexSet<_> = lists.flatten().filter_map(Json::as_str).collect();
    let mut lines: String = doubts
        .iter()
        .flat_map(|doubt| ["doubt: ", doubt, "\n"])
        .collect();
    if !lines.is_empty() {
        lines += "import a backup if these keys matter, then kv54 status --acknowledge\n";
    }
    lines
}

/// How the nodes are, in half a sentence.
pub(super) async fn summary(options: &Options) -> Result<String, Failure> {
    let cluster = options.cluster()?;
    let (nodes, _) = ask_all(&peers(&cluster, MOMENT)?, &cluster).await;
    let mut states: IndexMap<_, Vec<_>> = IndexMap::new();
    for node in &nodes {
        let [name, state] = ["name", "state"].map(|field| node[field].as_str().unwrap_or("?"));
        states.entry(state).or_default().push(name);
    }
    let all = nodes.len();
    let said = states.iter().map(|(state, names)| match names.len() {
        1 if all == 1 => format!("it is the only node, and {state}"),
        1 => format!("{} is {state}", text::and(names)),
        some if some == all => format!("all {all} nodes are {state}"),
        _ => format!("{} are {state}", text::and(names)),
    });
    Ok(said.collect::<Vec<_>>().join(", "))
}

/// The keys and the tombstones of the ring, each counted once: at the first ready replica of its
/// part. `None` where a part has none.
fn distinct(nodes: &[Json], cluster: &Cluster) -> Option<(u64, u64)> {
    (0..nodes.len()).try_fold((0_u64, 0_u64), |(keys, tombstones), part| {
        let mut replicas = cluster.replicas(part).filter_map(|place| nodes.get(place));
        let node = replicas.find(|node| node["state"] == "ready")?;
        let count = |field| node.get(field)?.get(cluster.name(part))?.as_u64();
        let (entries, deleted) = (count("entries")?, count("deleted")?);
        let alive = entries.saturating_sub(deleted); // a stranger's word may be anything
        let tombstones = tombstones.saturating_add(deleted);
        Some((keys.saturating_add(alive), tombstones))
    })
}

fn peers(cluster: &Cluster, patience: Duration) -> Result<Vec<Peer>, Failure> {
    let dial = tls::dial(cluster)?;
    let peer = |node: &Node| Peer::new(node, patience, dial.clone());
    Ok(cluster.nodes().iter().map(peer).collect())
}

/// All nodes, each as `--json` prints it and as a row of the table.
async fn ask_all(peers: &[Peer], cluster: &Cluster) -> (Vec<Json>, Vec<[String; 6]>) {
    let lines = peers.iter().zip(cluster.nodes()).map(async |(peer, node)| {
        let answer = peer.ask("status", &[]).await;
        let status = answer.and_then(|answer| Status::read(&answer));
        line(node, cluster.fingerprint(&node.name), &status)
    });
    join_all(lines).await.into_iter().unzip()
}

fn line(node: &Node, ring: u32, status: &Result<Status, Error>) -> (Json, [String; 6]) {
    let (state, remark) = match status {
        Err(error) => (text::state(error.kind), text::cause(error, node)),
        Ok(status) if status.ring != ring => {
            let name = &status.name;
            let remark = format!("it is {name} of another ring: use the same cluster.toml");
            (Kind::WrongRing.word(), remark)
        }
        Ok(status) => (&*status.state, status.notes()),
    };
    let Node { name, address } = node.clone();
    let mut json = match status {
        Ok(status) => json!(status),
        Err(_) => json!({ "keys": null, "tombstones": null, "bytes": null, "error": remark }),
    };
    if let Some(fields) = json.as_object_mut() {
        let own = [("name", &*name), ("address", &address), ("state", state)];
        fields.extend(own.map(|(field, told)| (field.to_owned(), told.into())));
    }
    let [keys, bytes] = match status {
        Ok(status) => [status.keys, status.bytes].map(|count| count.to_string()),
        Err(_) => ["-", "-"].map(String::from),
    };
    let row = [name, address, text::coloured(state), keys, bytes, remark];
    (json, row)
}

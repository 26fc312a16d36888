//! `status`: how the nodes are.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use futures::future::join_all;
use indexmap::{IndexMap, IndexSet};
use serde_json::{Value as Json, json};
use tokio::time::{Instant, sleep};

use super::{Failure, Options, Outcome, metrics, print, text};
use crate::beyond::forget::is_worth_it;
use crate::cluster::{Cluster, Node, State};
use crate::error::{Error, Kind};
use crate::replicas::Replicas;
use crate::rpc::codec::Encoded;
use crate::rpc::tls;
use crate::status::Status;
use crate::store::FORGETS_FROM;

/// Show how the nodes are.
///
/// If two nodes of a key lost their memory at the same time, writes may be gone. The nodes that
/// saw it say so below the table, until you run `kv54 status --acknowledge`.
#[derive(Args)]
#[command(after_help = "Examples:
  kv54 status
  kv54 status --wait --timeout 60s
  kv54 status --acknowledge
  kv54 status --metrics

Exit codes:
  0  every node is ready
  1  every node is ready, but writes may be gone: the lines below the table say which
  3  some node is not ready")]
pub(super) struct Show {
    /// Wait until every node is ready, or until --timeout has passed if it is given
    #[arg(long)]
    wait: bool,
    /// Print what the nodes have counted as text for Prometheus; the exit code is 0 however they are
    #[arg(long, conflicts_with_all = ["wait", "acknowledge", "json"])]
    metrics: bool,
    /// Have all nodes forget the lines below the table about lost memories: you have read them
    #[arg(long)]
    acknowledge: bool,
}

/// How long the nodes may take to say how they are, where that explains an error.
const MOMENT: Duration = Duration::from_millis(300);
/// How often a node is asked again that seems to be of another ring.
const LOOKS: u8 = 3;
/// How long it has before that to hear how the ring is.
const PAUSE: Duration = Duration::from_millis(20);

impl Show {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        let (file, timeout) = (options.cluster()?, options.timeout());
        let nodes = Asked::new(&file, timeout.min(file.limits.window))?;
        let deadline = options.timeout.map(|timeout| Instant::now() + timeout);
        if self.metrics {
            return print(metrics::text(&nodes.hear().await.1));
        }
        if self.acknowledge {
            nodes.all("acknowledge").await;
        }
        loop {
            let said = nodes.ask().await;
            let late = deadline.is_some_and(|deadline| Instant::now() >= deadline);
            if !self.wait || said.all_ready || late {
                let (doubts, change) = (doubts(&said.nodes), change(&said));
                let columns = ["node", "address", "state", "keys", "deleted", "bytes", ""];
                let table = text::table(columns, said.rows);
                let (keys, tombstones) = distinct(&said.nodes, &said.state.ring).unzip();
                let [keys, tombstones] = [keys, tombstones].map(Json::from);
                let sum = format!("keys without their copies: {keys}, tombstones: {tombstones}");
                let sum = sum.replace("null", "?") + &forgot(&said.nodes) + "\n";
                let mut json =
                    json!({ "nodes": said.nodes, "keys": keys, "tombstones": tombstones });
                if let (Some(fields), Some(change)) = (json.as_object_mut(), &change) {
                    fields.insert("change".to_owned(), change.trim_end().into());
                }
                let change = change.unwrap_or_default();
                options.print(&json, table + &sum + &change + &doubts)?;
                return Ok(ExitCode::from(match (said.all_ready, doubts.is_empty()) {
                    (true, true) => 0,
                    (true, false) => 1,
                    (false, _) => 3,
                }));
            }
            sleep(Duration::from_millis(100)).await;
        }
    }
}

/// How far a change of the ring is, if there is one, or why there is none, and whom it waits for.
fn change(said: &Said) -> Option<String> {
    let (nodes, state) = (&said.nodes, &said.state);
    let in_ring = nodes
        .iter()
        .filter(|node| state.has(node["name"].as_str().unwrap_or("?")));
    let missing = in_ring.filter(|node| node["state"] != "ready");
    let missing: Vec<&str> = missing.filter_map(|node| node["name"].as_str()).collect();
    let Some(next) = &state.next else {
        let is_due = !missing.is_empty() && is_worth_it(&said.statuses, FORGETS_FROM);
        let missing = text::and(&missing);
        return is_due
            .then(|| format!("to forget what was deleted, the ring waits for {missing}\n"));
    };
    let sum = |field: &str| {
        nodes
            .iter()
            .filter_map(|node| node[field].as_u64())
            .sum::<u64>()
    };
    let (old, new) = (
        sum("keys") / state.ring.copies() as u64,
        sum("handed_over") / next.copies() as u64,
    );
    let percent = (100 * new).checked_div(old).unwrap_or(100).min(100);
    let waits = match missing[..] {
        [] => String::new(),
        _ => format!("; it waits for {}", text::and(&missing)),
    };
    let (told, epoch) = (state.told(), state.epoch());
    let end = match state.is_round() {
        true => "ends by itself",
        false => "kv54 resize ends it",
    };
    Some(format!(
        "change {epoch}: {told}, {percent} % handed over{waits}; {end}\n"
    ))
}

/// When the ring last forgot what was deleted, if a node knows.
fn forgot(nodes: &[Json]) -> String {
    let ended = nodes.iter().filter_map(|node| node["forgot_s"].as_u64());
    ended.min().map_or_else(String::new, |seconds| {
        let ago = humantime::format_duration(Duration::from_secs(seconds));
        format!(", forgotten {ago} ago")
    })
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
    let nodes = Asked::new(&options.cluster()?, MOMENT)?.ask().await.nodes;
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
    (0..cluster.nodes().len()).try_fold((0_u64, 0_u64), |(keys, tombstones), part| {
        let mut replicas = cluster.replicas(part).filter_map(|place| nodes.get(place));
        let node = replicas.find(|node| node["state"] == "ready")?;
        let count = |field| node.get(field)?.get(cluster.name(part))?.as_u64();
        let (entries, deleted) = (count("entries")?, count("deleted")?);
        let alive = entries.saturating_sub(deleted); // a stranger's word may be anything
        let tombstones = tombstones.saturating_add(deleted);
        Some((keys.saturating_add(alive), tombstones))
    })
}

/// The nodes of the ring, and those of the file.
pub(super) struct Asked {
    file: Arc<Cluster>,
    replicas: Replicas,
}

/// What they say, those of the ring first.
struct Said {
    state: Arc<State>,
    nodes: Vec<Json>,       // as `--json` prints each
    statuses: Vec<Status>,  // of those that answer
    rows: Vec<[String; 7]>, // of the table
    all_ready: bool,
}

/// How a node is.
pub(super) struct Heard {
    pub(super) node: Node,
    pub(super) state: String,
    /// What else there is to say, or why there is no status.
    pub(super) remark: String,
    pub(super) status: Option<Status>,
}

impl Asked {
    pub(super) fn new(file: &Arc<Cluster>, patience: Duration) -> Result<Self, Failure> {
        let (file, dial) = (file.clone(), tls::dial(file)?);
        let replicas = Replicas::new(file.clone(), patience, &dial);
        Ok(Asked { file, replicas })
    }

    /// Asks each node; its answer, under its name.
    async fn all(&self, method: &str) -> IndexMap<Node, Result<Encoded, Error>> {
        let in_file = self.file.nodes().iter().chain(self.file.leaving());
        self.replicas.exchange_all().await; // the file may be behind
        let state = self.replicas.state();
        let in_rings = state.rings().flat_map(|ring| ring.nodes());
        let nodes: IndexSet<&Node> = in_rings.chain(in_file).collect();
        let asked = nodes.into_iter().map(async |node| {
            (
                node.clone(),
                self.replicas.ask_node(&node.name, method).await,
            )
        });
        join_all(asked).await.into_iter().collect()
    }

    /// Asks each node how it is, in the state of the ring that is known then.
    pub(super) async fn hear(&self) -> (Arc<State>, Vec<Heard>) {
        let answers = self.all("status").await.into_iter();
        let heard = answers.map(|(node, answer)| self.heard(node, answer));
        let heard = join_all(heard).await;
        (self.replicas.state(), heard)
    }

    /// Reads how a node is. Who seems to be of another ring is asked again: a round may have begun or ended
    /// at this moment.
    async fn heard(&self, node: Node, mut answer: Result<Encoded, Error>) -> Heard {
        let mut looks = 0..LOOKS;
        loop {
            let ring = self.replicas.state().fingerprint(0, &node.name);
            let heard = Heard::of(node.clone(), ring, answer);
            if heard.state != Kind::WrongRing.word() || looks.next().is_none() {
                return heard;
            }
            sleep(PAUSE).await;
            let _ = self.replicas.exchange(&node.name).await; // one of the two is behind
            answer = self.replicas.ask_node(&node.name, "status").await;
        }
    }

    async fn ask(&self) -> Said {
        let (state, heard) = self.hear().await;
        let is_fine = |heard: &Heard| {
            let is_ready = matches!(&*heard.state, "ready" | "waiting" | "left");
            let name = &heard.node.name;
            is_ready || !state.has(name) && self.file.place(name).is_none()
        };
        Said {
            all_ready: heard.iter().all(is_fine),
            nodes: heard.iter().map(Heard::json).collect(),
            statuses: heard
                .iter()
                .filter_map(|heard| heard.status.clone())
                .collect(),
            rows: heard.iter().map(Heard::row).collect(),
            state,
        }
    }
}

impl Heard {
    fn of(node: Node, ring: u32, answer: Result<Encoded, Error>) -> Self {
        let status = answer.and_then(|answer| Status::read(&answer));
        let (state, remark) = match &status {
            Err(error) => (text::state(error.kind), text::cause(error, &node)),
            Ok(status) if status.ring != ring => {
                let name = &status.name;
                let remark = format!("it is {name} of another ring: use the same cluster.toml");
                (Kind::WrongRing.word(), remark)
            }
            Ok(status) => (&*status.state, status.notes()),
        };
        Heard {
            state: state.to_owned(),
            remark,
            status: status.ok(),
            node,
        }
    }

    fn json(&self) -> Json {
        let (Node { name, address }, state) = (&self.node, &self.state);
        let mut json = match &self.status {
            Some(status) => json!(status),
            None => {
                json!({ "keys": null, "tombstones": null, "bytes": null, "error": self.remark })
            }
        };
        if let Some(fields) = json.as_object_mut() {
            let own = [("name", name), ("address", address), ("state", state)];
            fields.extend(own.map(|(field, told)| (field.to_owned(), told.as_str().into())));
        }
        json
    }

    fn row(&self) -> [String; 7] {
        let Node { name, address } = self.node.clone();
        let [keys, deleted, bytes] = match &self.status {
            Some(status) => {
                [status.keys, status.tombstones, status.bytes].map(|count| count.to_string())
            }
            None => ["-"; 3].map(String::from),
        };
        let (state, remark) = (text::coloured(&self.state), self.remark.clone());
        [name, address, state, keys, deleted, bytes, remark]
    }
}

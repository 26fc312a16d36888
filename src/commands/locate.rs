//! `where`: on which nodes a key lives, and what each of them holds.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Args;
use futures::future::join_all;
use serde::Serialize;
use serde_json::{Map, Value as Json, json};

use super::{Options, Outcome, print, print_coloured, text};
use crate::client::Client;
use crate::cluster::Node;
use crate::entry::{Stamp, loaded};
use crate::error::Error;
use crate::rpc::codec::encode_bytes;

/// Show on which nodes a key lives, and what each of them holds.
#[derive(Args)]
#[command(after_help = "Examples:
  kv54 where tea
  kv54 where tea --json")]
pub(super) struct Where {
    #[arg(allow_negative_numbers = true)]
    key: OsString,
}

/// The answer.
#[derive(Serialize)]
struct Located {
    #[serde(flatten)]
    key: Map<String, Json>,
    hash: u32,
    nodes: usize,
    replicas: Vec<Replica>,
}

/// One of the key's nodes, and what it holds.
#[derive(Default, Serialize)]
struct Replica {
    name: String,
    address: String,
    state: String,
    stamp: Option<String>,
    deleted: bool,
    error: Option<String>,
}

impl Where {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        let client = options.client()?;
        let cluster = &client.replicas.cluster;
        let key = self.key.into_encoded_bytes();
        let owner = cluster.owner(&key);
        let asked = cluster
            .replicas(owner)
            .map(|place| held_at(&client, place, &key));
        let mut located = Located {
            key: Map::new(),
            hash: crc32fast::hash(&key),
            nodes: cluster.nodes().len(),
            replicas: join_all(asked).await,
        };
        let typed = text::typed(key);
        text::put(&mut located.key, "key", &typed);
        if options.json {
            print(format!("{}\n", json!(located)))?;
        } else {
            let Located { hash, nodes, .. } = located;
            let sum = format!("crc32({typed}) = {hash}, {hash} % {nodes} = {owner}");
            print_coloured(&format!("{sum}\n{}", table(&located.replicas)))?;
        }
        let heard = located.replicas.iter().any(|held| held.error.is_none());
        Ok(ExitCode::from(if heard { 0 } else { 3 }))
    }
}

/// Asks one node what it holds.
async fn held_at(client: &Client, place: usize, key: &[u8]) -> Replica {
    let asked = client
        .replicas
        .ask(place, "load", &[&encode_bytes(key)])
        .await;
    let held = asked.and_then(|answer| loaded(&answer));
    let held = held.map(|held| (held.stamp, held.value.is_none_or(|value| value.is_nil())));
    let nodes = client.replicas.cluster.nodes();
    nodes
        .get(place)
        .map_or_else(Replica::default, |node| Replica::new(node, held))
}

impl Replica {
    fn new(node: &Node, held: Result<(Stamp, bool), Error>) -> Self {
        let (name, address) = (node.name.clone(), node.address.clone());
        match held {
            Ok((stamp, nil)) => {
                let written = stamp != Stamp::default();
                Replica {
                    name,
                    address,
                    state: "ready".to_owned(),
                    stamp: written.then(|| format!("{}-{}", stamp.counter, stamp.writer)),
                    deleted: written && nil,
                    error: None,
                }
            }
            Err(error) => Replica {
                state: text::state(error.kind).to_owned(),
                error: Some(text::cause(&error, node)),
                name,
                address,
                ..Replica::default()
            },
        }
    }

    fn holds(&self) -> String {
        match &self.stamp {
            Some(stamp) if self.deleted => format!("{stamp} (deleted)"),
            Some(stamp) => stamp.clone(),
            None if self.error.is_none() => "nothing".to_owned(),
            None => text::coloured(&self.state),
        }
    }
}

fn table(replicas: &[Replica]) -> String {
    let mut rows = vec![
        ["node", "address", "role", "holds"]
            .map(String::from)
            .to_vec(),
    ];
    for held in replicas {
        let role = if rows.len() == 1 { "owner" } else { "copy" };
        let why = held.error.clone().unwrap_or_default();
        let (name, address) = (held.name.clone(), held.address.clone());
        rows.push(vec![name, address, role.to_owned(), held.holds(), why]);
    }
    text::table(&rows)
}

//! `set`, `get`, `delete` and `where`: one key at a time.

use std::ffi::OsString;
use std::io::{IsTerminal as _, Read as _, Write as _};
use std::process::ExitCode;

use clap::Args;
use futures::future::join_all;
use futures::stream::{self, StreamExt as _};
use msgpack_rpc::Value;
use serde_json::{Map, json};

use super::{Failure, Options, Outcome, print, print_coloured, status, text};
use crate::client::Client;
use crate::cluster::MAX_VALUE;
use crate::error::{Error, Kind};
use crate::rpc::{Peer, codec};
use crate::store::{self, Loaded, Stamp};
use crate::tls;

/// Several keys of one command that are asked for at once.
const AT_ONCE: usize = 16;

/// Write a value.
#[derive(Args)]
#[command(after_help = "Examples:
  kv54 set tea green
  kv54 set photo < photo.jpg
  printf %s green | kv54 set tea     (echo would add a newline, which is kept)")]
pub(super) struct Set {
    #[arg(allow_negative_numbers = true)]
    key: OsString,
    /// The value; without it, or with `-`, standard input byte for byte, a newline at its end too
    #[arg(allow_negative_numbers = true)]
    value: Option<OsString>,
    #[command(flatten)]
    via: Via,
}

/// Print a value.
#[derive(Args)]
#[command(after_help = "Examples:
  kv54 get tea
  kv54 get photo --raw > photo.jpg
  kv54 get tea milk honey --json")]
pub(super) struct Get {
    /// The key; several are answered by lines `key<TAB>value`, or by a list with --json
    #[arg(required = true, value_name = "KEY", allow_negative_numbers = true)]
    keys: Vec<OsString>,
    /// Print exactly the value's bytes, without a newline; of one key only
    #[arg(long, conflicts_with = "json")]
    raw: bool,
    #[command(flatten)]
    via: Via,
}

/// Delete a key.
#[derive(Args)]
#[command(after_help = "Examples:
  kv54 delete tea
  kv54 del tea")]
pub(super) struct Delete {
    #[arg(allow_negative_numbers = true)]
    key: OsString,
    #[command(flatten)]
    via: Via,
}

/// Show on which nodes a key lives, and what each of them holds.
#[derive(Args)]
#[command(after_help = "Examples:
  kv54 where tea
  kv54 where tea --json")]
pub(super) struct Where {
    #[arg(allow_negative_numbers = true)]
    key: OsString,
}

#[derive(Args)]
struct Via {
    /// Ask this node's own get, set or delete, as clients in other languages do; a --timeout
    /// only says how long its answer is waited for
    #[arg(long = "via", value_name = "NAME")]
    node: Option<String>,
}

/// Who is asked: a majority of a key's replicas, or the one node that was named.
enum Asked {
    Majority(Client),
    Node(String, Peer),
}

impl Set {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        let value = match self.value {
            Some(value) if value != "-" => value.into_encoded_bytes(),
            _ => {
                if std::io::stdin().is_terminal() {
                    let hint = "the value is what you type now, until Ctrl-D";
                    let _ = writeln!(std::io::stderr(), "kv54: {hint}");
                }
                let mut bytes = Vec::new();
                // One byte more than is taken shows that there is too much.
                let stdin = std::io::stdin().lock().take(MAX_VALUE as u64 + 1);
                let read = { stdin }.read_to_end(&mut bytes);
                read.map_err(|error| Failure::usage(format!("standard input: {error}")))?;
                bytes
            }
        };
        let params = vec![
            text::typed(self.key.into_encoded_bytes()),
            text::typed(value),
        ];
        self.via.write("set", &params, options).await
    }
}

impl Delete {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        let params = vec![text::typed(self.key.into_encoded_bytes())];
        self.via.write("delete", &params, options).await
    }
}

impl Get {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        let keys = self.keys.into_iter();
        let keys: Vec<Value> = keys
            .map(|key| text::typed(key.into_encoded_bytes()))
            .collect();
        let several = keys.len() > 1;
        if several && self.raw {
            return Err(Failure::usage("--raw prints the value of one key"));
        }
        let asked = self.via.asked(options)?;
        let gets = keys
            .iter()
            .map(|key| asked.ask("get", std::slice::from_ref(key)));
        let values: Vec<_> = stream::iter(gets).buffered(AT_ONCE).collect().await;
        let (mut lines, mut objects, mut absent) = (Vec::new(), Vec::new(), Vec::new());
        for (key, value) in keys.iter().zip(values) {
            let value = match value.map_err(Error::of_read) {
                Ok(value) => value,
                Err(error) => return Err(explained(error, options).await),
            };
            let mut object = Map::new();
            text::put(&mut object, "key", key);
            text::put(&mut object, "value", &value);
            objects.push(json!(object));
            if value.is_nil() {
                absent.push(key.to_string());
                continue;
            }
            if several {
                lines.extend(text::printed(key));
                lines.push(b'\t');
            }
            lines.extend(text::printed(&value));
            if !self.raw {
                lines.push(b'\n');
            }
        }
        match options.json {
            true if several => print(format!("{}\n", json!(objects)))?,
            true => objects
                .iter()
                .try_for_each(|object| print(format!("{object}\n")))?,
            false => print(lines)?,
        }
        let why = match absent.len() {
            0 => return Ok(ExitCode::SUCCESS),
            _ if options.json => return Ok(ExitCode::from(1)),
            1 => format!("key {} is absent", text::and(&absent)),
            _ => format!("keys {} are absent", text::and(&absent)),
        };
        Err(Failure { code: 1, why })
    }
}

impl Via {
    /// A write: done, failed, or nobody knows.
    async fn write(self, method: &str, params: &[Value], options: &Options) -> Outcome {
        let asked = self.asked(options)?;
        let answer = asked.ask(method, params).await;
        if let Asked::Majority(client) = &asked {
            client.replicas.settle().await;
        }
        match answer {
            Ok(_) if options.json => {
                let mut object = Map::new();
                params
                    .iter()
                    .take(1)
                    .for_each(|key| text::put(&mut object, "key", key));
                print(format!("{}\n", json!(object)))?;
                Ok(ExitCode::SUCCESS)
            }
            Ok(_) => print("ok\n").map(|()| ExitCode::SUCCESS),
            Err(error) => {
                let unknown = error.kind == Kind::UnknownOutcome;
                let Failure { code, why } = explained(error, options).await;
                let why = match why.strip_prefix("unknown-outcome: ") {
                    Some(why) if unknown => format!("{method} has an unknown outcome: {why}"),
                    _ => format!("{method} failed: {why}"),
                };
                Err(Failure { code, why })
            }
        }
    }

    /// Who is to be asked.
    fn asked(&self, options: &Options) -> Result<Asked, Failure> {
        let Some(name) = &self.node else {
            return Ok(Asked::Majority(options.client()?));
        };
        let cluster = options.cluster()?;
        let node = cluster
            .place(name)
            .and_then(|place| cluster.nodes().get(place));
        let node = node.ok_or_else(|| options.no_node(&cluster, name))?;
        // Unless told otherwise, the node is given the time to say itself why it cannot.
        let patience = options
            .timeout
            .unwrap_or(options.timeout() + cluster.window);
        let peer = Peer::new(node, patience, tls::dial(&cluster)?);
        Ok(Asked::Node(name.clone(), peer))
    }
}

impl Asked {
    async fn ask(&self, method: &str, params: &[Value]) -> Result<Value, Error> {
        let (name, peer) = match self {
            Asked::Majority(client) => return ask_majority(client, method, params).await,
            Asked::Node(name, peer) => (name, peer),
        };
        let encoded: Vec<Vec<u8>> = params.iter().map(codec::encode).collect();
        let params: Vec<&[u8]> = encoded.iter().map(Vec::as_slice).collect();
        let (_, answer) = peer.call(method, &params).await;
        answer.map_err(|error| Error::new(error.kind, format!("{name}: {}", error.why)))
    }
}

/// The failure that the error is, and where nodes did not answer, how all of them are.
async fn explained(error: Error, options: &Options) -> Failure {
    let silent = matches!(
        error.kind,
        Kind::Unavailable | Kind::Joining | Kind::UnknownOutcome
    );
    let Failure { code, mut why } = error.into();
    if let (true, Ok(cluster)) = (silent, options.cluster()) {
        if let Ok(summary) = status::summary(&cluster).await {
            why = format!("{why}; {summary}");
        }
    }
    Failure { code, why }
}

async fn ask_majority(client: &Client, method: &str, params: &[Value]) -> Result<Value, Error> {
    let params: Vec<_> = params.iter().map(Value::as_ref).collect();
    match (method, &*params) {
        ("get", [key]) => client.get(store::key(key)?).await,
        ("set", [key, value]) => client.set(store::key(key)?, value).await,
        ("delete", [key]) => client.delete(store::key(key)?).await,
        _ => Err(Error::not_a_request(method, params.len())),
    }
}

impl Where {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        let client = options.client()?;
        let cluster = client.replicas.cluster();
        let key = self.key.into_encoded_bytes();
        let (hash, nodes, owner) = (
            crc32fast::hash(&key),
            cluster.nodes().len(),
            cluster.owner(&key),
        );
        let places: Vec<usize> = cluster.replicas(owner).collect();
        let held = join_all(places.iter().map(|place| held_at(&client, *place, &key))).await;
        let mut object = Map::new();
        let typed = text::typed(key);
        text::put(&mut object, "key", &typed);
        let mut rows = vec![
            ["node", "address", "role", "holds"]
                .map(String::from)
                .to_vec(),
        ];
        let mut replicas = Vec::new();
        for (held, node) in held.iter().zip(
            places
                .iter()
                .filter_map(|place| cluster.nodes().get(*place)),
        ) {
            let role = if rows.len() == 1 { "owner" } else { "copy" };
            let state = match held {
                Ok(_) => "ready",
                Err(error) if matches!(error.kind, Kind::Unavailable | Kind::UnknownOutcome) => {
                    "down"
                }
                Err(error) => error.kind.word(),
            };
            let loaded = held
                .as_ref()
                .ok()
                .filter(|held| held.stamp != Stamp::default());
            let stamp = loaded.map(|held| format!("{}-{}", held.stamp.counter, held.stamp.writer));
            let deleted = loaded.is_some_and(|held| held.value.as_ref().is_none_or(Value::is_nil));
            let holds = match (&stamp, state) {
                (Some(stamp), _) if deleted => format!("{stamp} (deleted)"),
                (Some(stamp), _) => stamp.clone(),
                (None, "ready") => "nothing".to_owned(),
                (None, state) => text::coloured(state),
            };
            let why = held.as_ref().err().map(|error| {
                let address = format!("{}: ", node.address);
                error.why.trim_start_matches(&address).to_owned()
            });
            replicas.push(json!({
                "name": node.name, "address": node.address, "state": state, "stamp": stamp, "deleted": deleted, "error": why,
            }));
            rows.push(vec![
                node.name.clone(),
                node.address.clone(),
                role.to_owned(),
                holds,
                why.unwrap_or_default(),
            ]);
        }
        object.extend([
            ("hash".to_owned(), hash.into()),
            ("nodes".to_owned(), nodes.into()),
            ("replicas".to_owned(), replicas.into()),
        ]);
        if options.json {
            print(format!("{}\n", json!(object)))?;
        } else {
            let sum = format!("crc32({typed}) = {hash}, {hash} % {nodes} = {owner}");
            print_coloured(&format!("{sum}\n{}", text::table(&rows)))?;
        }
        let heard = held.iter().any(Result::is_ok);
        Ok(ExitCode::from(if heard { 0 } else { 3 }))
    }
}

/// What one node holds under a key.
async fn held_at(client: &Client, place: usize, key: &[u8]) -> Result<Loaded, Error> {
    client
        .replicas
        .ask(place, "load", &[key.into()])
        .await
        .and_then(Loaded::try_from)
}

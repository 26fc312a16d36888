//! `set`, `get`, `delete` and `where`: one key at a time.

use std::ffi::OsString;
use std::io::{IsTerminal as _, Read as _, Write as _};
use std::process::ExitCode;

use clap::Args;
use futures::future::join_all;
use msgpack_rpc::Value;
use serde_json::{Map, json};

use super::{Failure, Options, Outcome, print, print_coloured, text};
use crate::client::Client;
use crate::cluster::MAX_VALUE;
use crate::error::{Error, Kind};
use crate::rpc::{Peer, codec};
use crate::store::{self, Loaded, Stamp};
use crate::tls;

/// Write a value.
#[derive(Args)]
pub(super) struct Set {
    #[arg(allow_negative_numbers = true)]
    key: OsString,
    /// The value; without it, or with `-`, standard input, byte for byte
    #[arg(allow_negative_numbers = true)]
    value: Option<OsString>,
    #[command(flatten)]
    via: Via,
}

/// Print a value.
#[derive(Args)]
pub(super) struct Get {
    #[arg(allow_negative_numbers = true)]
    key: OsString,
    /// Print exactly the value's bytes, without a newline
    #[arg(long, conflicts_with = "json")]
    raw: bool,
    #[command(flatten)]
    via: Via,
}

/// Delete a key.
#[derive(Args)]
pub(super) struct Delete {
    #[arg(allow_negative_numbers = true)]
    key: OsString,
    #[command(flatten)]
    via: Via,
}

/// Show on which nodes a key lives, and what each of them holds.
#[derive(Args)]
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
        let key = text::typed(self.key.into_encoded_bytes());
        let value = self
            .via
            .ask("get", std::slice::from_ref(&key), options)
            .await?
            .map_err(Error::of_read)?;
        let mut line = text::printed(&value);
        if options.json {
            let mut object = Map::new();
            text::put(&mut object, "key", &key);
            text::put(&mut object, "value", &value);
            line = json!(object).to_string().into_bytes();
        }
        if !self.raw {
            line.push(b'\n');
        }
        if !value.is_nil() || options.json {
            print(line)?;
        }
        match value.is_nil() {
            true if options.json => Ok(ExitCode::from(1)),
            true => Err(Failure {
                code: 1,
                why: format!("key {key} is absent"),
            }),
            false => Ok(ExitCode::SUCCESS),
        }
    }
}

impl Via {
    /// A write: done, failed, or nobody knows.
    async fn write(self, method: &str, params: &[Value], options: &Options) -> Outcome {
        match self.ask(method, params, options).await? {
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
            Err(error) if error.kind == Kind::UnknownOutcome => {
                let why = format!("{method} has an unknown outcome: {}", error.why);
                Err(Failure { code: 3, why })
            }
            Err(error) => {
                let Failure { code, why } = error.into();
                Err(Failure {
                    code,
                    why: format!("{method} failed: {why}"),
                })
            }
        }
    }

    /// Asks a majority, or the one node that was named.
    async fn ask(
        &self,
        method: &str,
        params: &[Value],
        options: &Options,
    ) -> Result<Result<Value, Error>, Failure> {
        let Some(name) = &self.node else {
            let client = options.client()?;
            let answer = ask_majority(&client, method, params).await;
            if method != "get" {
                client.replicas.settle().await;
            }
            return Ok(answer);
        };
        let cluster = options.cluster()?;
        let node = cluster
            .place(name)
            .and_then(|place| cluster.nodes().get(place));
        let node = node.ok_or_else(|| {
            Failure::usage(format!(
                "{}: there is no node {name:?}",
                options.config.display()
            ))
        })?;
        // Unless told otherwise, the node is given the time to say itself why it cannot.
        let patience = options
            .timeout
            .unwrap_or(options.timeout() + cluster.window);
        let encoded: Vec<Vec<u8>> = params.iter().map(codec::encode).collect();
        let params: Vec<&[u8]> = encoded.iter().map(Vec::as_slice).collect();
        let (_, answer) = Peer::new(node, patience, tls::dial(&cluster)?)
            .call(method, &params)
            .await;
        Ok(answer.map_err(|error| Error::new(error.kind, format!("{name}: {}", error.why))))
    }
}

async fn ask_majority(client: &Client, method: &str, params: &[Value]) -> Result<Value, Error> {
    match (method, params) {
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
            rows.push(vec![
                node.name.clone(),
                node.address.clone(),
                role.to_owned(),
                holds,
            ]);
            replicas.push(json!({
                "name": node.name, "address": node.address, "state": state, "stamp": stamp, "deleted": deleted,
            }));
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

//! `set`, `get` and `delete`: keys and values.

use std::ffi::OsString;
use std::io::{IsTerminal as _, Read as _, Write as _};
use std::process::ExitCode;

use clap::Args;
use futures::stream::{self, StreamExt as _};
use msgpack_rpc::Value;
use serde_json::{Map, json};

use super::{Failure, Options, Outcome, print, status, text};
use crate::client::Client;
use crate::cluster::MAX_VALUE;
use crate::entry::Packed;
use crate::error::{Error, Kind};
use crate::rpc::codec::encode_bytes;
use crate::rpc::{Peer, tls};

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

#[derive(Args)]
struct Via {
    /// Ask this node's own get, set or delete, as clients in other languages do; a --timeout
    /// only says how long its answer is waited for
    #[arg(long = "via", value_name = "NAME")]
    node: Option<String>,
}

/// Where a command's questions go: to a majority of a key's replicas, or to the node that was named.
enum Target {
    Majority(Client),
    Node(String, Peer),
}

impl Set {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        let value = match self.value {
            Some(value) if value != "-" => value.into_encoded_bytes(),
            _ => standard_input()?,
        };
        let (key, value) = (
            self.key.into_encoded_bytes(),
            Packed::of(text::typed(value)),
        );
        let target = self.via.target(options)?;
        let written = match &target {
            Target::Majority(client) => client.set(&key, &value).await,
            Target::Node(..) => target
                .call("set", &[&encode_bytes(&key), &value])
                .await
                .map(drop),
        };
        target.report("set", key, written, options).await
    }
}

impl Delete {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        let key = self.key.into_encoded_bytes();
        let target = self.via.target(options)?;
        let written = match &target {
            Target::Majority(client) => client.delete(&key).await,
            Target::Node(..) => target
                .call("delete", &[&encode_bytes(&key)])
                .await
                .map(drop),
        };
        target.report("delete", key, written, options).await
    }
}

impl Get {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        let keys: Vec<Vec<u8>> = self
            .keys
            .into_iter()
            .map(OsString::into_encoded_bytes)
            .collect();
        let several = keys.len() > 1;
        if several && self.raw {
            return Err(Failure::usage("--raw prints the value of one key"));
        }
        let target = self.via.target(options)?;
        let gets = keys.iter().map(|key| target.get(key));
        let values: Vec<_> = stream::iter(gets).buffered(AT_ONCE).collect().await;
        let mut pairs = Vec::new();
        for (key, value) in keys.into_iter().zip(values) {
            match value.map_err(Error::of_read) {
                Ok(value) => pairs.push((text::typed(key), value)),
                Err(error) => return Err(explained(error, options).await),
            }
        }
        match options.json {
            true => print(objects(&pairs, several))?,
            false => print(lines(&pairs, several, self.raw))?,
        }
        let absent = pairs.iter().filter(|(_, value)| value.is_nil());
        let absent: Vec<String> = absent.map(|(key, _)| key.to_string()).collect();
        let why = match absent.len() {
            0 => return Ok(ExitCode::SUCCESS),
            _ if options.json => return Ok(ExitCode::from(1)),
            1 => format!("key {} is absent", text::and(&absent)),
            _ => format!("keys {} are absent", text::and(&absent)),
        };
        Err(Failure { code: 1, why })
    }
}

/// The pairs as JSON: an object, or a list of them if several were asked for.
fn objects(pairs: &[(Value, Value)], several: bool) -> String {
    let object = |(key, value): &(Value, Value)| {
        let mut object = Map::new();
        text::put(&mut object, "key", key);
        text::put(&mut object, "value", value);
        json!(object)
    };
    let mut objects: Vec<_> = pairs.iter().map(object).collect();
    match objects.pop() {
        Some(only) if !several => format!("{only}\n"),
        last => format!(
            "{}\n",
            json!(objects.into_iter().chain(last).collect::<Vec<_>>())
        ),
    }
}

/// The values of those that are there; with their keys if several were asked for.
fn lines(pairs: &[(Value, Value)], several: bool, raw: bool) -> Vec<u8> {
    let mut lines = Vec::new();
    for (key, value) in pairs.iter().filter(|(_, value)| !value.is_nil()) {
        if several {
            lines.extend(text::printed(key));
            lines.push(b'\t');
        }
        lines.extend(text::printed(value));
        if !raw {
            lines.push(b'\n');
        }
    }
    lines
}

/// All of standard input, as far as a value goes.
fn standard_input() -> Result<Vec<u8>, Failure> {
    if std::io::stdin().is_terminal() {
        let hint = "the value is what you type now, until Ctrl-D";
        let _ = writeln!(std::io::stderr(), "kv54: {hint}");
    }
    let mut bytes = Vec::new();
    // One byte more than is taken shows that there is too much.
    let mut stdin = std::io::stdin().lock().take(MAX_VALUE as u64 + 1);
    let read = stdin.read_to_end(&mut bytes);
    read.map_err(|error| Failure::usage(format!("standard input: {error}")))?;
    Ok(bytes)
}

impl Via {
    /// Where the questions go.
    fn target(&self, options: &Options) -> Result<Target, Failure> {
        let Some(name) = &self.node else {
            return Ok(Target::Majority(options.client()?));
        };
        let cluster = options.cluster()?;
        let place = cluster.place(name);
        let node = place.and_then(|place| cluster.nodes().get(place));
        let node = node.ok_or_else(|| options.no_node(&cluster, name))?;
        // Unless told otherwise, the node is given the time to say itself why it cannot.
        let longer = options.timeout() + cluster.limits.window;
        let patience = options.timeout.unwrap_or(longer);
        let peer = Peer::new(node, patience, tls::dial(&cluster)?);
        Ok(Target::Node(name.clone(), peer))
    }
}

impl Target {
    async fn get(&self, key: &[u8]) -> Result<Value, Error> {
        let value = match self {
            Target::Majority(client) => client.get(key).await?,
            Target::Node(..) => self.call("get", &[&encode_bytes(key)]).await?,
        };
        value.value()
    }

    /// Asks the node that was named.
    async fn call(&self, method: &str, params: &[&[u8]]) -> Result<Packed, Error> {
        let Target::Node(name, peer) = self else {
            return Err(Error::bad_request("no node is named"));
        };
        let (_, answer) = peer.call(method, params).await;
        let named = |error: Error| Error::new(error.kind, format!("{name}: {}", error.why));
        Ok(Packed::from(&answer.map_err(named)?[..]))
    }

    /// Says what came of a write: it is done, it failed, or its outcome is unknown.
    async fn report(
        &self,
        what: &str,
        key: Vec<u8>,
        written: Result<(), Error>,
        options: &Options,
    ) -> Outcome {
        if let Target::Majority(client) = self {
            client.replicas.settle().await;
        }
        let error = match written {
            Ok(()) if options.json => {
                let mut object = Map::new();
                text::put(&mut object, "key", &text::typed(key));
                return print(format!("{}\n", json!(object))).map(|()| ExitCode::SUCCESS);
            }
            Ok(()) => return print("ok\n").map(|()| ExitCode::SUCCESS),
            Err(error) => error,
        };
        let unknown = error.kind == Kind::UnknownOutcome;
        let Failure { code, why } = explained(error, options).await;
        let why = match why.strip_prefix("unknown-outcome: ") {
            Some(why) if unknown => format!("{what} has an unknown outcome: {why}"),
            _ => format!("{what} failed: {why}"),
        };
        Err(Failure { code, why })
    }
}

/// The failure that the error is, and where nodes did not answer, how all of them are.
async fn explained(error: Error, options: &Options) -> Failure {
    let silent = !error.kind.is_refusal();
    let Failure { code, mut why } = error.into();
    if let (true, Ok(cluster)) = (silent, options.cluster()) {
        if let Ok(summary) = status::summary(&cluster).await {
            why = format!("{why}; {summary}");
        }
    }
    Failure { code, why }
}

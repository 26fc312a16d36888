//! `set`, `get` and `delete`: keys and values.

use std::ffi::OsString;
use std::io::Read as _;
use std::process::ExitCode;

use clap::Args;
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use msgpack_rpc::Value;
use serde_json::Value as Json;

use super::target::Target;
use super::{Failure, Options, Outcome, shown, standard_input, status, text};
use crate::cluster::MAX_VALUE;
use crate::entry::Packed;
use crate::error::Error;
use crate::rpc::{Peer, tls};

/// How many keys of one `get` are asked for at once.
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
///
/// On a terminal, characters that it would obey are shown escaped, as `\u{1b}`, but for line breaks and tabs; a pipe or
/// a file has the value's own bytes. A line `key<TAB>value` is one line everywhere: in it line breaks, tabs and
/// backslashes are escaped too, as `\n`, `\t` and `\\`, and bytes that are not UTF-8 as `\xff`. --json is exact.
#[derive(Args)]
#[command(after_help = "Examples:
  kv54 get tea
  kv54 get photo --raw > photo.jpg
  kv54 get tea milk honey --json")]
pub(super) struct Get {
    /// The key; several are answered by lines `key<TAB>value`, or by a list with --json
    #[arg(required = true, value_name = "KEY", allow_negative_numbers = true)]
    keys: Vec<OsString>,
    /// Print exactly the value's bytes, without a newline, on a terminal too; of one key only
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

impl Set {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        let value = match self.value {
            Some(value) if value != "-" => value.into_encoded_bytes(),
            _ => value_from_stdin(options)?,
        };
        let value = Packed::of(text::typed(value));
        self.via.write(self.key, Some(value), options).await
    }
}

impl Delete {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        self.via.write(self.key, None, options).await
    }
}

impl Get {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        if self.raw && self.keys.len() > 1 {
            return Err(Failure::usage("--raw prints the value of one key"));
        }
        let target = self.via.target(options)?;
        let get = async |key: OsString| {
            let key = key.into_encoded_bytes();
            let value = target.get(&key).await?.value()?;
            Ok((text::typed(key), value))
        };
        let gets = stream::iter(self.keys.into_iter().map(get));
        let pairs: Vec<_> = match gets.buffered(AT_ONCE).try_collect().await {
            Ok(pairs) => pairs,
            Err(error) => return Err(explained(Error::of_read(error), options).await),
        };
        options.print(&objects(&pairs), lines(&pairs, self.raw))?;
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
fn objects(pairs: &[(Value, Value)]) -> Json {
    let object = |(key, value): &(Value, Value)| {
        Json::from_iter([text::field("key", key), text::field("value", value)])
    };
    match pairs {
        [only] => object(only),
        several => several.iter().map(object).collect(),
    }
}

/// The values of the keys that exist, each with its key if several were asked for.
fn lines(pairs: &[(Value, Value)], raw: bool) -> Vec<u8> {
    let mut lines = Vec::new();
    for (key, value) in pairs.iter().filter(|(_, value)| !value.is_nil()) {
        match pairs.len() {
            1 if raw => lines = text::printed(value),
            1 => lines = [shown(text::printed(value)), b"\n".to_vec()].concat(),
            _ => {
                let [key, value] = [key, value].map(text::in_a_line);
                lines.extend(format!("{key}\t{value}\n").bytes());
            }
        }
    }
    lines
}

/// Reads a value from standard input, byte for byte.
fn value_from_stdin(options: &Options) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    // One byte over the limit is read too: what is too large is refused, not cut.
    let mut input = standard_input("the value is", options)?.take(MAX_VALUE as u64 + 1);
    let read = input.read_to_end(&mut bytes);
    match read.map_err(|error| Failure::from(error).of("standard input"))? {
        ..=MAX_VALUE => Ok(bytes),
        _ => Err(Error::too_large(format!("standard input has over {MAX_VALUE} bytes")).into()),
    }
}

impl Via {
    /// Where the questions go.
    fn target(&self, options: &Options) -> Result<Target, Failure> {
        let Some(name) = &self.node else {
            return Ok(Target::Majority(options.client()?));
        };
        let cluster = options.cluster()?;
        let node = cluster.nodes().iter().find(|node| node.name == *name);
        let node = node.ok_or_else(|| options.no_node(&cluster, name))?;
        // Longer than the node itself tries: it can then say why it failed.
        let longer = options.timeout() + cluster.limits.window;
        let patience = options.timeout.unwrap_or(longer);
        let peer = Peer::new(node, patience, tls::dial(&cluster)?);
        Ok(Target::Node(name.clone(), peer))
    }

    /// Sets a key, or deletes it if there is no value, and says what came of it: it is done, it
    /// failed, or its outcome is unknown.
    async fn write(&self, key: OsString, value: Option<Packed>, options: &Options) -> Outcome {
        let method = if value.is_some() { "set" } else { "delete" };
        let (target, key) = (self.target(options)?, key.into_encoded_bytes());
        let written = target.write(&key, value.as_deref()).await;
        if let Target::Majority(client) = target {
            client.replicas.settle().await;
        }
        let Err(error) = written else {
            let key = text::field("key", &text::typed(key));
            return options.print(&Json::from_iter([key]), "ok\n");
        };
        let Failure { code, why } = explained(error, options).await;
        let why = match why.strip_prefix("unknown-outcome: ") {
            Some(why) => format!("{method} has an unknown outcome: {why}"),
            None => format!("{method} failed: {why}"),
        };
        Err(Failure { code, why })
    }
}

/// The failure that an error leads to. Where nodes did not answer, it says how all of them are.
async fn explained(error: Error, options: &Options) -> Failure {
    if error.kind.is_refusal() {
        return error.into();
    }
    match status::summary(options).await {
        Ok(summary) => Failure::from(error).with(summary),
        Err(_) => error.into(),
    }
}

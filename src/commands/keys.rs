//! `set`, `get` and `delete`: keys and values.

use std::ffi::OsString;
use std::io::{self, IsTerminal as _, Read as _};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueHint};
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use msgpack_rpc::Value;
use serde_json::Value as Json;

use super::target::Target;
use super::{
    Failure, Options, Outcome, line, remark, shown, standard_input, status, text, typed_key,
};
use crate::beyond::expire::end;
use crate::cluster::MAX_VALUE;
use crate::entry::Packed;
use crate::error::{Error, Kind};
use crate::replicas::now;
use crate::rpc::{Peer, tls};

/// How many keys of one `get` or `delete` are asked for at once.
const AT_ONCE: usize = 16;

/// Write a value.
#[derive(Args)]
#[command(after_help = "Examples:
  kv54 set tea green
  kv54 set photo < photo.jpg
  printf %s green | kv54 set tea     (echo would add a newline, which is kept)
  kv54 set flag:new-ui --value-json false
  kv54 set session:7 ann --ttl 30m")]
pub(super) struct Set {
    /// The key
    #[arg(allow_negative_numbers = true, value_parser = typed_key())]
    key: OsString,
    /// The value; without it, or with `-`, standard input byte for byte, a newline at its end too
    #[arg(allow_negative_numbers = true)]
    value: Option<OsString>,
    /// The value is JSON: false is a boolean, 5 a number, "tea" a text, and so on
    #[arg(long)]
    value_json: bool,
    #[command(flatten)]
    lasting: Lasting,
    #[command(flatten)]
    via: Via,
}

/// Print a value.
///
/// On a terminal, kv54 escapes control characters, as `\u{1b}`, but not line breaks and tabs. A pipe or a file gets the
/// value's own bytes. A line `key<TAB>value` stays one line everywhere: kv54 escapes line breaks, tabs and backslashes in
/// it too, as `\n`, `\t` and `\\`, and bytes that are not UTF-8 as `\xff`. --json is exact.
#[derive(Args)]
#[command(after_help = "Examples:
  kv54 get tea
  kv54 get photo --raw > photo.jpg
  kv54 get tea milk honey --json")]
pub(super) struct Get {
    /// The key. For several keys, kv54 prints lines `key<TAB>value`, or with --json a list
    #[arg(required = true, value_name = "KEY", allow_negative_numbers = true)]
    #[arg(value_parser = typed_key())]
    keys: Vec<OsString>,
    /// Print exactly the value's bytes, without a newline, on a terminal too; of one key only
    #[arg(long, conflicts_with = "json")]
    raw: bool,
    #[command(flatten)]
    via: Via,
}

/// Delete keys.
#[derive(Args)]
#[command(after_help = "Examples:
  kv54 delete tea
  kv54 del tea milk honey")]
pub(super) struct Delete {
    /// The key, or several
    #[arg(required = true, value_name = "KEY", allow_negative_numbers = true)]
    #[arg(value_parser = typed_key())]
    keys: Vec<OsString>,
    #[command(flatten)]
    via: Via,
}

#[derive(Args)]
pub(super) struct Via {
    /// Have this node coordinate, as it does for clients in other languages; a --timeout then
    /// only says how long to wait for its answer
    #[arg(long = "via", value_name = "NAME", value_hint = ValueHint::Hostname)]
    node: Option<String>,
}

#[derive(Args)]
pub(super) struct Lasting {
    /// The value ends by itself after this time, by the clock of this host: 500ms, 30m, 1day 2h; at most 100 years.
    /// Without it, the value stays
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    ttl: Option<Duration>,
}

impl Lasting {
    /// The value with this time to live.
    pub(super) fn value(&self, value: Packed) -> Result<Packed, Error> {
        let end = self.ttl.map(|ttl| end(now(), ttl)).transpose()?;
        Ok(value.until(end))
    }
}

impl Set {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        let value = value(self.value, self.value_json, options)?;
        let value = self.lasting.value(value)?;
        self.via.write(vec![self.key], Some(value), options).await
    }
}

impl Delete {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        self.via.write(self.keys, None, options).await
    }
}

impl Get {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        if self.raw && self.keys.len() > 1 {
            return Err(Failure::usage("--raw prints the value of one key"));
        }
        let target = self.via.target(options).await?;
        let get = async |key: OsString| {
            let key = key.into_encoded_bytes();
            let (value, left) = target.get(&key).await?;
            Ok(((text::typed(key), value.value()?), left))
        };
        let gets = stream::iter(self.keys.into_iter().map(get)).buffered(AT_ONCE);
        let got: Vec<_> = match gets.try_collect().await {
            Ok(got) => got,
            Err(error) => return Err(explained(Error::of_read(error), options).await),
        };
        let (pairs, left): (Vec<_>, Vec<_>) = got.into_iter().unzip();
        show(&pairs, &left, self.raw, options)
    }
}

/// Prints the values of these keys, and as JSON how long they last still. An absent one is a failure.
pub(super) fn show(
    pairs: &[(Value, Value)],
    left: &[Option<Duration>],
    raw: bool,
    options: &Options,
) -> Outcome {
    let object = |((key, value), left): (&(Value, Value), &Option<Duration>)| {
        let ms = |left: Duration| u64::try_from(left.as_millis()).ok();
        let left = left.map(|left| ("ttl_ms".to_owned(), ms(left).into()));
        let fields = [text::field("key", key), text::field("value", value)];
        fields.into_iter().chain(left).collect()
    };
    let json = one_or_list(pairs.iter().zip(left).map(object));
    options.print(&json, lines(pairs, raw))?;
    if io::stdout().is_terminal() && !options.json {
        let is_text = |value: &Value| value.is_nil() || value.as_slice().is_some();
        let typed = pairs.iter().filter(|(_, value)| !is_text(value));
        typed.for_each(|(key, _)| remark(text::quoted(key) + " is JSON, no text"));
    }
    let absent = pairs.iter().filter(|(_, value)| value.is_nil());
    let absent: Vec<String> = absent.map(|(key, _)| text::quoted(key)).collect();
    let why = match &absent[..] {
        [] => return Ok(ExitCode::SUCCESS),
        _ if options.json => return Ok(ExitCode::from(1)),
        [key] => format!("key {key} is absent"),
        keys => format!("keys {} are absent", text::and(keys)),
    };
    Err(Failure { code: 1, why })
}

/// These as JSON: an object, or a list of them if several keys were named.
fn one_or_list(objects: impl Iterator<Item = Json>) -> Json {
    match &objects.collect::<Vec<Json>>()[..] {
        [only] => only.clone(),
        several => several.into(),
    }
}

/// The values of the keys that exist, each with its key if several were asked for.
fn lines(pairs: &[(Value, Value)], raw: bool) -> Vec<u8> {
    let exist = pairs.iter().filter(|(_, value)| !value.is_nil());
    let lines = exist.map(|(key, value)| match pairs.len() {
        1 if raw => text::printed(value),
        1 => [shown(text::printed(value)), b"\n".to_vec()].concat(),
        _ => format!("{}\t{}\n", text::in_a_line(key), text::in_a_line(value)).into(),
    });
    lines.collect::<Vec<_>>().concat()
}

/// The value that was typed, or comes from standard input.
pub(super) fn value(
    typed: Option<OsString>,
    is_json: bool,
    options: &Options,
) -> Result<Packed, Failure> {
    let value = match typed {
        Some(value) if value != "-" => value.into_encoded_bytes(),
        _ => value_from_stdin(options)?,
    };
    match is_json {
        true => from_json(&value),
        false => Ok(Packed::of(text::typed(value))),
    }
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

/// The value that this JSON is.
fn from_json(text: &[u8]) -> Result<Packed, Failure> {
    if text.len() > MAX_VALUE {
        return Err(Error::too_large(format!("JSON of over {MAX_VALUE} bytes")).into());
    }
    let json: Json = serde_json::from_slice(text).map_err(|error| {
        let hint = r#"a string of JSON stands in quotes of its own, as in '"green"'"#;
        Failure::usage(error).of("the value is no JSON").with(hint)
    })?;
    line::checked(&rmp_serde::to_vec(&json).map_err(Failure::usage)?)
}

impl Via {
    /// Where the questions go.
    pub(super) async fn target(&self, options: &Options) -> Result<Target, Failure> {
        let Some(name) = &self.node else {
            return Ok(Target::Majority(options.client()?));
        };
        let (cluster, node) = options.node(name).await?;
        // Longer than the node itself tries: it can then say why it failed.
        let longer = options.timeout() + cluster.limits.window;
        let patience = options.timeout.unwrap_or(longer);
        let peer = Peer::new(&node, patience, tls::dial(&cluster)?);
        Ok(Target::Node(name.clone(), peer))
    }

    /// Sets keys, or deletes them if there is no value, and says what came of it: it is done, it
    /// failed, or its outcome is unknown.
    async fn write(self, keys: Vec<OsString>, value: Option<Packed>, options: &Options) -> Outcome {
        let method = if value.is_some() { "set" } else { "delete" };
        let target = self.target(options).await?;
        let keys: Vec<Vec<u8>> = keys.into_iter().map(OsString::into_encoded_bytes).collect();
        let writes = stream::iter(&keys).map(|key| target.write(key, value.as_deref()));
        let written: Vec<_> = writes.buffered(AT_ONCE).collect().await;
        target.settle().await;
        let (all, done) = (keys.len(), written.iter().flatten().count());
        let errors = written.into_iter().filter_map(Result::err);
        // What may have happened is said before what has not.
        let Some(error) = errors.min_by_key(|error| error.kind != Kind::UnknownOutcome) else {
            let keys = keys.iter().map(|key| text::key(key));
            return options.print(&one_or_list(keys), "ok\n");
        };
        let failure = failed(method, error, options).await;
        Err(match all {
            1 => failure,
            _ => failure.with(format!("{done} of {all} keys are deleted")),
        })
    }
}

/// The failure of a method that writes: it failed, or its outcome is unknown.
pub(super) async fn failed(method: &str, error: Error, options: &Options) -> Failure {
    let Failure { code, why } = explained(error, options).await;
    let why = match why.strip_prefix("unknown-outcome: ") {
        Some(why) => format!("{method} has an unknown outcome: {why}"),
        None => format!("{method} failed: {why}"),
    };
    Failure { code, why }
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

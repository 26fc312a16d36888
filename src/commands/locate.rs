//! `where`: on which nodes a key lives, and what each of them holds.

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use futures::future::join_all;
use serde_json::{Value as Json, json};

use super::{Options, Outcome, text, typed_key};
use crate::client::Client;
use crate::cluster::Node;
use crate::entry::{Stamp, loaded};
use crate::rpc::codec::encode_bytes;

/// Show on which nodes a key lives, and what each of them holds.
#[derive(Args)]
#[command(after_help = "Examples:
  kv54 where tea
  kv54 where tea --json")]
pub(super) struct Where {
    /// The key
    #[arg(allow_negative_numbers = true, value_parser = typed_key())]
    key: OsString,
}

impl Where {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        let client = options.client()?;
        client.replicas.exchange_all().await; // the file may be behind
        let (cluster, key) = (client.replicas.cluster(), self.key.into_encoded_bytes());
        let (owner, hash) = (cluster.owner(&key), crc32fast::hash(&key));
        let roles = cluster.replicas(owner).zip(["owner", "copy", "copy"]);
        let asked = join_all(roles.map(|(place, role)| ask(&client, place, role, &key)));
        let (replicas, rows): (Vec<Json>, Vec<_>) = asked.await.into_iter().flatten().unzip();
        let (typed, count) = (text::typed(key), cluster.nodes().len());
        let (field, value) = text::field("key", &typed);
        let located = json!({ field: value, "hash": hash, "nodes": count, "replicas": replicas });
        let key = text::quoted(&typed);
        let sum = format!("crc32({key}) = {hash}, {hash} % {count} = {owner}");
        let table = text::table(["node", "address", "role", "holds", ""], rows);
        options.print(&located, format!("{sum}\n{table}"))?;
        let heard = replicas.iter().any(|replica| replica["error"].is_null());
        Ok(ExitCode::from(if heard { 0 } else { 3 }))
    }
}

/// Asks one node what it holds: as `--json` prints it, and as a row of the table.
async fn ask(client: &Client, place: usize, role: &str, key: &[u8]) -> Option<(Json, [String; 5])> {
    let replicas = &client.replicas;
    let cluster = replicas.cluster();
    let node = cluster.nodes().get(place)?;
    let answer = replicas.ask(place, "load", &[&encode_bytes(key)]).await;
    let (mut state, mut stamp, mut deleted, mut error) = ("ready", None, false, None);
    let mut left = None;
    let holds = match answer.and_then(|answer| loaded(&answer)) {
        Ok(held) if held.stamp == Stamp::default() => "nothing".to_owned(),
        Ok(held) => {
            let value = held.value.unwrap_or_default();
            deleted = value.is_nil();
            left = value.end().map(|end| end.saturating_sub(replicas.now()));
            let ends = left.map(|left| format!(" ({} left)", lasting(left)));
            let more = ends.or(deleted.then(|| " (deleted)".to_owned()));
            let stamp = stamp.insert(written(held.stamp));
            format!("{stamp}{}", more.unwrap_or_default())
        }
        Err(why) => {
            state = text::state(why.kind);
            error = Some(text::cause(&why, node));
            text::coloured(state)
        }
    };
    let Node { name, address } = node;
    let json = json!({
        "name": name, "address": address, "state": state,
        "stamp": stamp, "deleted": deleted, "ttl_ms": left, "error": error,
    });
    let [name, address, role] = [name, address, role].map(str::to_owned);
    let row = [name, address, role, holds, error.unwrap_or_default()];
    Some((json, row))
}

/// A stamp, with the ballot of a swap behind it.
fn written(stamp: Stamp) -> String {
    let Stamp {
        counter, writer, ..
    } = stamp;
    match stamp.ballot {
        0 => format!("{counter}-{writer}"),
        ballot => format!("{counter}-{writer}-{ballot}"),
    }
}

/// So many milliseconds as people say it: whole seconds, where it is more than one.
fn lasting(ms: u64) -> humantime::FormattedDuration {
    let time = Duration::from_millis(ms);
    let whole = Duration::from_secs(time.as_secs());
    humantime::format_duration(if whole.is_zero() { time } else { whole })
}

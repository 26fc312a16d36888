//! `expire`: when a value ends, is changed without the value.

use std::ffi::OsString;
use std::time::Duration;

use clap::Args;

use super::{Failure, Options, Outcome, keys, text, typed_key};

/// Have a value end by itself after a time, or never.
///
/// The value stays as it is, in one step, also where others write it at the same time. If the key is absent, the exit
/// code is 1.
#[derive(Args)]
#[command(override_usage = "kv54 expire [OPTIONS] KEY <TIME|--never>")]
#[command(after_help = "Examples:
  kv54 expire session:7 10m
  kv54 expire session:7 --never")]
pub(super) struct Expire {
    /// The key
    #[arg(allow_negative_numbers = true, value_parser = typed_key())]
    key: OsString,
    /// After this time from now on, by the clock of this host: 500ms, 30m, 1day 2h; at most 100 years
    #[arg(value_name = "TIME", value_parser = humantime::parse_duration, required_unless_present = "never")]
    ttl: Option<Duration>,
    /// The value stays until it is deleted
    #[arg(long, conflicts_with = "ttl")]
    never: bool,
}

impl Expire {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        let (client, key) = (options.client()?, self.key.into_encoded_bytes());
        let expired = client.expire(&key, self.ttl).await;
        client.replicas.settle().await;
        match expired {
            Ok(true) => options.print(&text::key(&key), "ok\n"),
            Ok(false) => {
                let why = format!("key {} is absent", text::quoted(&text::typed(key)));
                Err(Failure { code: 1, why })
            }
            Err(error) => Err(keys::failed("expire", error, options).await),
        }
    }
}

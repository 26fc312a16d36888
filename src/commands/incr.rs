//! `incr`: counts, also where many count at once.

use std::ffi::OsString;

use clap::Args;
use serde_json::{Number, Value as Json};

use super::keys::{self, Via};
use super::{Options, Outcome, text, typed_key};
use crate::beyond::swap::Swap;

/// Add to an integer, and print the sum.
///
/// Each call adds exactly once, also where many programs count at the same time. An absent key counts as 0.
#[derive(Args)]
#[command(after_help = "Examples:
  kv54 incr visits
  kv54 incr stock -3
  kv54 set visits 0 --value-json     (a number; without --value-json it is text, which incr refuses)")]
pub(super) struct Incr {
    /// The key
    #[arg(allow_negative_numbers = true, value_parser = typed_key())]
    key: OsString,
    /// How much to add; it may be negative
    #[arg(allow_negative_numbers = true, default_value_t = 1)]
    by: i64,
    #[command(flatten)]
    via: Via,
}

impl Incr {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        let key = self.key.into_encoded_bytes();
        let target = self.via.target(options).await?;
        let by = self.by.into();
        let swap = Swap::Incr { by };
        let swapped = target.swap(&key, &swap).await;
        target.settle().await;
        let sum = match swapped.and_then(|swapped| swap.sum(&key, swapped)) {
            Ok(sum) => sum,
            Err(error) => {
                let is_of_type = error.why.ends_with("is no integer");
                let failure = keys::failed("incr", error, options).await;
                return Err(match is_of_type {
                    true => failure.with("kv54 set KEY 5 --value-json writes a number"),
                    false => failure,
                });
            }
        };
        let field = ("value".to_owned(), Json::from(Number::from_i128(sum)));
        let json = Json::from_iter([text::field("key", &text::typed(key)), field]);
        options.print(&json, format!("{sum}\n"))
    }
}

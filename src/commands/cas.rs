//! `cas`: a value is replaced, unless another one is there.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Args;

use super::keys::{self, Lasting, Via};
use super::{Failure, Options, Outcome, remark, text, typed_key};
use crate::beyond::swap::{Swap, Swapped};
use crate::entry::Packed;

/// Compare and set: write NEW where OLD is the value, in one step.
///
/// If another value is there, kv54 changes nothing, prints that value as `get` does, and exits with 1.
#[derive(Args)]
#[command(override_usage = "kv54 cas [OPTIONS] KEY <OLD|--absent> <NEW|--delete>")]
#[command(after_help = "Examples:
  kv54 cas tea green black
  kv54 cas tea --absent green        (creates it)
  kv54 cas tea black --delete
  kv54 cas cups 5 6 --value-json     (numbers, as incr writes them)

Exit codes:
  0  done
  1  another value is there, or none; nothing was changed
  2, 3  as for set; it says if the outcome is unknown")]
pub(super) struct Cas {
    /// The key
    #[arg(allow_negative_numbers = true, value_parser = typed_key())]
    key: OsString,
    /// The value that must be there; `-` is standard input
    #[arg(allow_negative_numbers = true)]
    old: Option<OsString>,
    /// The value to write; `-` is standard input
    #[arg(allow_negative_numbers = true)]
    new: Option<OsString>,
    /// Instead of OLD: the key must be absent
    #[arg(long)]
    absent: bool,
    /// Instead of NEW: delete the key
    #[arg(long, conflicts_with = "ttl")]
    delete: bool,
    /// Both values are JSON: false is a boolean, 5 a number, "tea" a text, and so on
    #[arg(long)]
    value_json: bool,
    #[command(flatten)]
    lasting: Lasting,
    #[command(flatten)]
    via: Via,
}

impl Cas {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        let (old, new) = match (self.absent, self.delete, self.old, self.new) {
            (false, false, Some(old), Some(new)) if old != "-" || new != "-" => {
                (Some(old), Some(new))
            }
            (true, false, Some(new), None) => (None, Some(new)),
            (false, true, Some(old), None) => (Some(old), None),
            _ => {
                let usage = "cas takes a key, OLD or --absent, and NEW or --delete; one of the two may be -";
                return Err(Failure::usage(usage));
            }
        };
        let value = |typed: &Option<OsString>| match typed {
            Some(typed) => keys::value(Some(typed.clone()), self.value_json, options),
            None => Ok(Packed::default()),
        };
        let (expected, new) = (value(&old)?, self.lasting.value(value(&new)?)?);
        let (key, target) = (
            self.key.into_encoded_bytes(),
            self.via.target(options).await?,
        );
        let swapped = target.swap(&key, &Swap::Cas { expected, new }).await;
        target.settle().await;
        let current = match swapped {
            Ok(Swapped::Done(_)) => return options.print(&text::key(&key), "ok\n"),
            Ok(Swapped::Not(current)) => current.value()?,
            Err(error) => return Err(keys::failed("cas", error, options).await),
        };
        let key = text::typed(key);
        keys::show(&[(key.clone(), current.clone())], &[None], false, options)?;
        let is_text = current.as_slice().is_some();
        if !is_text && old.is_some_and(|old| old.as_encoded_bytes() == text::printed(&current)) {
            let key = text::quoted(&key);
            remark(format!(
                "the value of {key} is JSON, no text; with --value-json, kv54 compares JSON"
            ));
        }
        Ok(ExitCode::from(1))
    }
}

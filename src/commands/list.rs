//! `keys`: the names of all keys, or of those that begin alike.

use std::ffi::OsString;
use std::io;
use std::process::{self, ExitCode};

use clap::Args;

use super::{Options, Outcome, export, text, write};

/// Print the name of every key, one a line, in no order.
///
/// A deleted key is left out. If not all keys could be read, the exit code is not 0, as with an
/// export. Control characters are escaped, line breaks and tabs too, and so is the backslash, as
/// `\\`. With --json, a line is `{"key": …}`, or `{"key_base64": …}` for a key that is not UTF-8,
/// and reads back as exactly the same key.
#[derive(Args)]
#[command(after_help = "Examples:
  kv54 keys | sort
  kv54 keys --prefix user: | wc -l
  kv54 keys --json | jq -r .key")]
pub(super) struct Keys {
    /// Only the keys that begin with this
    #[arg(long, value_name = "TEXT")]
    prefix: Option<OsString>,
}

impl Keys {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        let line: export::Line = match options.json {
            true => |key, _| Ok((text::json_line(&text::key(key)) + "\n").into()),
            false => |key, _| Ok((text::in_a_line(&key.into()) + "\n").into()),
        };
        let prefix = self.prefix.unwrap_or_default().into_encoded_bytes();
        let printed = export::print_all(options, prefix, line, write_while_read).await;
        printed.map_err(|failure| failure.of("the list is not complete"))?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Writes names. A reader that has read enough may close the pipe, and ends the process.
fn write_while_read(names: &[u8]) -> io::Result<()> {
    match write(names) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => process::exit(0),
        written => written,
    }
}

//! The door: reads the arguments, runs a server or a client, says in one place what went wrong.

use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::process::ExitCode;

use kv54::commands::{Cli, run};

/// Whether standard input and standard output are closed. Before `main`, the runtime opens /dev/null
/// in their place, and some programs hand down a /dev/null that looks the same: so this runs earlier.
#[ctor::ctor]
static CLOSED: [bool; 2] = [
    io::stdin().as_fd().try_clone_to_owned().is_err(),
    io::stdout().as_fd().try_clone_to_owned().is_err(),
];

fn main() -> ExitCode {
    match Cli::read().and_then(|cli| run(cli, *CLOSED)) {
        Ok(code) => code,
        Err(failure) => {
            let _ = writeln!(anstream::stderr(), "kv54: {failure}");
            ExitCode::from(failure.code)
        }
    }
}

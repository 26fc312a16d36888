//! The door: reads the arguments, runs a server or a client, says in one place what went wrong.

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser as _;
use kv54::commands::{Cli, run};

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(failure) => {
            let _ = writeln!(anstream::stderr(), "kv54: {failure}");
            ExitCode::from(failure.code)
        }
    }
}

//! The door: reads the arguments, runs a server or a client, says in one place what went wrong.

use std::io;
use std::os::fd::AsFd as _;
use std::process::ExitCode;

/// Whether standard input and standard output are closed. Before `main`, the runtime opens /dev/null
/// in their place, and some programs hand down a /dev/null that looks the same: so this runs earlier.
#[ctor::ctor]
static CLOSED: [bool; 2] = [
    io::stdin().as_fd().try_clone_to_owned().is_err(),
    io::stdout().as_fd().try_clone_to_owned().is_err(),
];

fn main() -> ExitCode {
    kv54::commands::main(*CLOSED)
}

//! What a person types: `serve` runs nodes, the others ask them.

use std::fmt::Display;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, CommandFactory as _, Parser, Subcommand};
use clap_complete::Shell;

use crate::client::Client;
use crate::cluster::Cluster;
use crate::error::{Error, Kind};
use crate::node;
use crate::replicas::Replicas;
use crate::rpc::tls;

mod bench;
mod export;
mod import;
mod keys;
mod line;
mod locate;
mod serve;
mod status;
mod text;

/// A distributed key-value store whose heart is at most 54 lines: any two of three.
#[derive(Parser)]
#[command(version, arg_required_else_help = true, after_help = MORE)]
pub struct Cli {
    #[command(flatten)]
    options: Options,
    #[command(subcommand)]
    command: Command,
}

const MORE: &str = "Examples:
  kv54 serve --all             five nodes in one terminal,
  kv54 set tea green           and in another one
  kv54 get tea
  kv54 export > dump.jsonl

Exit codes:
  0  done (status: every node is ready)
  1  the key is absent (get)
  2  wrong usage or configuration; wrong-ring, too-large, bad-request
  3  no majority, unreachable, timed out or full (status: some node is not ready)";

#[derive(Args)]
struct Options {
    /// The cluster's file, the same on every host
    #[arg(
        long,
        global = true,
        env = "KV54_CONFIG",
        default_value = "cluster.toml",
        value_name = "FILE"
    )]
    config: PathBuf,
    /// How long an operation is tried again [default: 5s; status --wait: no limit]. With --via,
    /// how long the answer is waited for: the node itself goes on trying for 5s
    #[arg(long, global = true, value_name = "TIME", value_parser = timeout)]
    timeout: Option<Duration>,
    /// What nodes log: off, error, warn, info or debug
    #[arg(
        long,
        global = true,
        env = "KV54_LOG",
        default_value = "info",
        value_name = "LEVEL"
    )]
    log: log::LevelFilter,
    /// Answer with one line of JSON; an error stays one line of text on standard error
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Run a node, or all of them
    Serve(serve::Serve),
    /// Write a value
    Set(keys::Set),
    /// Print a value
    Get(keys::Get),
    /// Delete a key
    #[command(alias = "del")]
    Delete(keys::Delete),
    /// Show on which nodes a key lives, and what each of them holds
    Where(locate::Where),
    /// Show how the nodes are
    Status(status::Show),
    Bench(bench::Bench),
    Export(export::Export),
    Import(import::Import),
    /// Print what makes a shell complete commands and options
    #[command(after_help = COMPLETIONS)]
    Completions {
        /// The shell
        shell: Shell,
    },
}

const COMPLETIONS: &str = "Examples:
  source <(kv54 completions bash)
  kv54 completions fish > ~/.config/fish/completions/kv54.fish";

/// Why a command did not do what it was told.
pub struct Failure {
    /// The process's exit code.
    pub code: u8,
    /// One line that names what it is about.
    pub why: String,
}

type Outcome = Result<ExitCode, Failure>;

/// Runs one command.
pub fn run(cli: Cli) -> Result<ExitCode, Failure> {
    let Cli { options, command } = cli;
    match command {
        Command::Serve(serve) => serve.run(&options),
        Command::Set(set) => block_on(set.run(&options)),
        Command::Get(get) => block_on(get.run(&options)),
        Command::Delete(delete) => block_on(delete.run(&options)),
        Command::Where(locate) => block_on(locate.run(&options)),
        Command::Status(show) => block_on(show.run(&options)),
        Command::Bench(bench) => block_on(bench.run(&options)),
        Command::Export(export) => block_on(export.run(&options)),
        Command::Import(import) => block_on(import.run(&options)),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "kv54", &mut script);
            print(script).map(|()| ExitCode::SUCCESS)
        }
    }
}

impl Options {
    fn cluster(&self) -> Result<Arc<Cluster>, Failure> {
        if self.config.try_exists().is_ok_and(|exists| !exists) {
            let path = self.config.display();
            return Err(Failure::usage(format!(
                "{path}: there is no such file; --config FILE or KV54_CONFIG names another one, and \
                 printf '[nodes]\\nalice = \"127.0.0.1:5401\"\\n' > {path} makes the smallest"
            )));
        }
        Ok(Arc::new(Cluster::read(&self.config)?))
    }

    /// The failure of asking for a node that the file does not name.
    fn no_node(&self, cluster: &Cluster, name: &str) -> Failure {
        let (path, names) = (self.config.display(), text::and(&cluster.names()));
        Failure::usage(format!("{path}: there is no node {name:?}, only {names}"))
    }

    fn timeout(&self) -> Duration {
        self.timeout.unwrap_or(node::TIMEOUT)
    }

    fn client(&self) -> Result<Client, Failure> {
        let cluster = self.cluster()?;
        let dial = tls::dial(&cluster)?;
        Ok(Client {
            replicas: Replicas::new(cluster, self.timeout(), &dial),
        })
    }
}

fn timeout(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(time) if time <= Duration::from_secs(24 * 60 * 60) => Ok(time),
        Ok(_) => Err("at most one day".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

impl Failure {
    fn usage(why: impl Display) -> Self {
        Failure {
            code: 2,
            why: why.to_string(),
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::usage(error)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let refused = error.kind.is_refusal() && error.kind != Kind::Full;
        Failure {
            code: if refused { 2 } else { 3 },
            why: error.to_string(),
        }
    }
}

/// One thread is enough for a client and for a node; both are faster without others.
fn block_on(command: impl Future<Output = Outcome>) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(command);
    runtime.shutdown_background(); // a name that is still being looked up is no reason to stay
    outcome
}

/// Writes a result to standard output, byte for byte.
fn print(bytes: impl AsRef<[u8]>) -> Result<(), Failure> {
    write(io::stdout(), bytes.as_ref())
}

/// The same for text with colours, which stay only on a terminal that wants them.
fn print_coloured(text: &str) -> Result<(), Failure> {
    write(anstream::stdout(), text.as_bytes())
}

fn write(mut out: impl io::Write, bytes: &[u8]) -> Result<(), Failure> {
    match out.write_all(bytes).and_then(|()| out.flush()) {
        // Whoever has read enough may close it.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::usage(format!("standard output: {error}")))
        }
        _ => Ok(()),
    }
}

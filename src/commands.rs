//! What a person types: `serve` runs nodes, the others ask them.

use std::env;
use std::ffi::OsString;
use std::fmt::Display;
use std::io::{self, BufReader, IsTerminal as _, Stdin, Write as _};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value as Json;
use socket2::SockRef;

use crate::client::Client;
use crate::cluster::{Cluster, Node};
use crate::error::{Error, Kind, escaped, is_control, plain};
use crate::node::{self, block_on};
use crate::replicas::Replicas;
use crate::rpc::tls;

mod bench;
mod cas;
mod completions;
mod expire;
mod export;
mod import;
mod incr;
mod keys;
mod line;
mod list;
mod locate;
mod lock;
mod memcached;
mod metrics;
mod resize;
mod serve;
mod status;
mod target;
mod text;
mod top;

/// A distributed key-value store whose heart is at most 54 lines: any two of three.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
#[command(after_help = "Examples:
  kv54 serve --all             five nodes in one terminal,
  kv54 set tea green           and in another one
  kv54 get tea
  kv54 export > dump.jsonl

Exit codes:
  0  done (status: every node is ready)
  1  the key is absent (get); another value is there (cas); every node is ready, but writes may be gone (status)
  2  wrong usage or configuration; wrong-ring, too-large, bad-request
  3  no majority, unreachable, timed out, full; not complete (export, keys); not all ready (status)")]
pub struct Cli {
    #[command(flatten)]
    options: Options,
    #[command(subcommand)]
    command: Command,
}

#[derive(Args)]
struct Options {
    /// The cluster's file, the same on every host
    #[arg(long, global = true, value_name = "FILE", hide_env_values = true)]
    #[arg(env = unless_empty("KV54_CONFIG"), default_value = "cluster.toml")]
    config: PathBuf,
    /// How long kv54 goes on trying an operation [default: 5s; status --wait, lock: no limit]. With
    /// --via, how long it waits for the answer: the node itself goes on trying for 5s
    #[arg(long, global = true, value_name = "TIME", value_parser = timeout)]
    timeout: Option<Duration>,
    /// Answer with one line of JSON; an error stays one line of text on standard error
    #[arg(long, global = true)]
    json: bool,
    /// Whether standard input was closed when the process began.
    #[arg(skip)]
    input_closed: bool,
}

#[derive(Subcommand)]
enum Command {
    Serve(serve::Serve),
    Set(keys::Set),
    Get(keys::Get),
    #[command(alias = "del")]
    Delete(keys::Delete),
    Cas(cas::Cas),
    Incr(incr::Incr),
    Expire(expire::Expire),
    Lock(lock::Lock),
    Memcached(memcached::Memcached),
    Where(locate::Where),
    Keys(list::Keys),
    Status(status::Show),
    Top(top::Top),
    Resize(resize::Resize),
    Bench(bench::Bench),
    Export(export::Export),
    Import(import::Import),
    Completions(completions::Completions),
}

/// Why a command failed: the process's exit code, and one line that names what it is about.
struct Failure {
    code: u8,
    why: String,
}

type Outcome = Result<ExitCode, Failure>;

/// Does what the arguments say. Standard input and standard output may have been closed when the
/// process began.
pub fn main([input_closed, output_closed]: [bool; 2]) -> ExitCode {
    let outcome = Cli::read().and_then(|mut cli| {
        let prints = !matches!(cli.command, Command::Serve(_) | Command::Memcached(_));
        if output_closed && prints {
            return Err(Failure::usage("standard output is closed"));
        }
        cli.options.input_closed = input_closed;
        block_on(cli.run())
    });
    outcome.unwrap_or_else(|failure| {
        remark(failure.why);
        ExitCode::from(failure.code)
    })
}

impl Cli {
    /// Reads the arguments. Help is printed, and ends the process; what is wrong is one line.
    fn read() -> Result<Self, Failure> {
        Cli::try_parse().map_err(|error| {
            let said = error.to_string();
            let Some(said) = said.strip_prefix("error: ") else {
                error.exit() // it is help that was asked for
            };
            let lines = said.lines().map(str::trim).filter(|line| !line.is_empty());
            let lines = lines.filter(|line| !line.starts_with("For more information"));
            Failure::usage(lines.collect::<Vec<_>>().join("; ").replace(":; ", ": "))
        })
    }

    async fn run(self) -> Outcome {
        let options = &self.options;
        match self.command {
            Command::Serve(serve) => serve.run(options).await,
            Command::Set(set) => set.run(options).await,
            Command::Get(get) => get.run(options).await,
            Command::Delete(delete) => delete.run(options).await,
            Command::Cas(cas) => cas.run(options).await,
            Command::Incr(incr) => incr.run(options).await,
            Command::Expire(expire) => expire.run(options).await,
            Command::Lock(lock) => lock.run(options).await,
            Command::Memcached(memcached) => memcached.run(options).await,
            Command::Where(locate) => locate.run(options).await,
            Command::Keys(list) => list.run(options).await,
            Command::Status(show) => show.run(options).await,
            Command::Top(top) => top.run(options).await,
            Command::Resize(resize) => resize.run(options).await,
            Command::Bench(bench) => bench.run(options).await,
            Command::Export(export) => export.run(options).await,
            Command::Import(import) => import.run(options).await,
            Command::Completions(completions) => completions.run(options),
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

    /// The file, and the node of this name: of the file, or else of the ring that runs.
    async fn node(&self, name: &str) -> Result<(Arc<Cluster>, Node), Failure> {
        let cluster = self.cluster()?;
        if let Some(node) = cluster.node(name) {
            return Ok((cluster.clone(), node.clone()));
        }
        let replicas = self.client_of(cluster.clone())?.replicas;
        replicas.exchange_all().await; // the file may be behind
        let state = replicas.state();
        let node = state.rings().find_map(|ring| ring.node(name)).cloned();
        let node = node.ok_or_else(|| self.no_node(&cluster, name))?;
        Ok((cluster, node))
    }

    /// The failure of asking for a node that is not in the file.
    fn no_node(&self, cluster: &Cluster, name: &str) -> Failure {
        let (path, names) = (self.config.display(), text::and(&cluster.names()));
        Failure::usage(format!("{path}: there is no node {name:?}, only {names}"))
    }

    fn timeout(&self) -> Duration {
        self.timeout.unwrap_or(node::TIMEOUT)
    }

    fn client(&self) -> Result<Client, Failure> {
        self.client_of(self.cluster()?)
    }

    /// Of a file that was read: a second time, a pipe would be empty.
    fn client_of(&self, cluster: Arc<Cluster>) -> Result<Client, Failure> {
        let dial = tls::dial(&cluster)?;
        let replicas = Replicas::new(cluster, self.timeout(), &dial);
        Ok(Client { replicas })
    }

    /// Prints a result: as one line of JSON if `--json` is given, else as text.
    fn print(&self, json: &Json, text: impl AsRef<[u8]>) -> Outcome {
        match self.json {
            true => print(text::json_line(json) + "\n"),
            false => print(text),
        }
    }
}

/// The name of this variable, for clap; one that is set and empty counts as not set.
fn unless_empty(name: &'static str) -> Option<&'static str> {
    let value = env::var_os(name)?;
    (!value.is_empty()).then_some(name)
}

/// Reads a key that a person typed.
fn typed_key() -> impl TypedValueParser<Value = OsString> {
    OsStringValueParser::new().try_map(|key| match key.is_empty() {
        true => Err("the key is empty; is a variable of the shell not set?"),
        false => Ok(key),
    })
}

fn timeout(text: &str) -> Result<Duration, Box<dyn std::error::Error + Send + Sync>> {
    match humantime::parse_duration(text)? {
        time if time <= Duration::from_secs(24 * 60 * 60) => Ok(time),
        _ => Err("at most one day".into()),
    }
}

impl Failure {
    fn usage(why: impl Display) -> Self {
        let (code, why) = (2, why.to_string());
        Failure { code, why }
    }

    /// The same failure, told of something: `what: why`.
    fn of(self, what: impl Display) -> Self {
        let why = format!("{what}: {}", self.why);
        Failure { why, ..self }
    }

    /// The same failure, and what else helps to understand it: `why; more`.
    fn with(self, more: impl Display) -> Self {
        let why = format!("{}; {more}", self.why);
        Failure { why, ..self }
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
        let (code, why) = (if refused { 2 } else { 3 }, error.to_string());
        Failure { code, why }
    }
}

/// Prints a result. A reader that has read enough may close the pipe.
fn print(bytes: impl AsRef<[u8]>) -> Outcome {
    match write(bytes.as_ref()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// Writes to standard output, byte for byte.
fn write(bytes: &[u8]) -> io::Result<()> {
    let mut out = io::stdout();
    block(&out)?;
    let written = out.write_all(bytes).and_then(|()| out.flush());
    written.map_err(|error| io::Error::new(error.kind(), format!("standard output: {error}")))
}

/// Takes back that a pipe is non-blocking, as shells do: the program that made it so shares it, and
/// here is nothing to do but to wait for it.
fn block(pipe: &impl AsFd) -> io::Result<()> {
    SockRef::from(pipe).set_nonblocking(false) // this flag is the same for pipes
}

/// A user's own bytes: a pipe takes them as they are, and a terminal shows them without obeying.
pub fn shown(bytes: Vec<u8>) -> Vec<u8> {
    match io::stdout().is_terminal() {
        true => escaped(&bytes, |c| is_control(c) && c != '\n' && c != '\t').into_bytes(),
        false => bytes,
    }
}

/// Says something beside the result, in one line on standard error.
fn remark(what: impl AsRef<str>) {
    let _ = writeln!(io::stderr(), "kv54: {}", plain(what.as_ref()));
}

/// A bar on standard error, if that is a terminal. It is gone once it is dropped.
fn bar(template: &str, length: Option<u64>) -> ProgressBar {
    let style = ProgressStyle::with_template(template);
    let bar = length.map_or_else(ProgressBar::no_length, ProgressBar::new);
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Opens standard input. A person at a terminal is told that the command waits there for `what`.
fn standard_input(what: &str, options: &Options) -> Result<BufReader<Stdin>, Failure> {
    if options.input_closed {
        return Err(Failure::usage("standard input is closed"));
    }
    if io::stdin().is_terminal() {
        remark(format!("{what} what you type now, until Ctrl-D"));
    }
    block(&io::stdin())?;
    Ok(BufReader::new(io::stdin()))
}

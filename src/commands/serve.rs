//! `serve`: runs a node, or every node of the file, each in threads of its own.

use std::io::{self, IsTerminal as _, Write as _};
use std::num::NonZero;
use std::pin::pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use clap::{Args, ValueHint};
use futures::stream::{FuturesUnordered, StreamExt as _};
use rlimit::Resource;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{Failure, Options, Outcome, unless_empty};
use crate::cluster::{Cluster, Limits};
use crate::error::plain;
use crate::node;

/// How many files a node needs beside its connections and 8 for each thread: those of the process, and the
/// dials of a host that is out of reach.
const OWN_FILES: usize = 16;

/// Run a node, or all of them.
#[derive(Args)]
#[command(after_help = "Examples:
  kv54 serve --all
  kv54 serve alice
  kv54 serve alice --listen 0.0.0.0:5401")]
pub(super) struct Serve {
    /// The node's name in the file [default: this machine's host name]
    #[arg(conflicts_with = "all", value_hint = ValueHint::Hostname)]
    name: Option<String>,
    /// Run every node of the file in this one process
    #[arg(long)]
    all: bool,
    /// Listen here, not on the address in the file; the other nodes still dial that one
    #[arg(long, value_name = "ADDRESS", conflicts_with = "all")]
    listen: Option<String>,
    /// What the nodes log: off, error, warn, info or debug
    #[arg(long, value_name = "LEVEL", hide_env_values = true)]
    #[arg(env = unless_empty("KV54_LOG"), default_value = "info")]
    log: log::LevelFilter,
}

impl Serve {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        log_at(self.log);
        let mut cluster = options.cluster()?;
        let places = match self.all {
            true => (0..cluster.nodes().len() + cluster.leaving().len()).collect(),
            false => vec![self.place(&cluster, options)?],
        };
        let limits = &mut Arc::make_mut(&mut cluster).limits;
        let wanted = limits.threads;
        let usual = || match self.all {
            true => 1, // the nodes share the cores
            false => thread::available_parallelism().map_or(1, NonZero::get),
        };
        let most = wanted.unwrap_or_else(usual);
        let mut threads = most;
        limits.threads = Some(threads);
        // Nobody has asked for so many.
        while wanted.is_none() && threads > 1 && Files::of(limits, places.len()).are_most_others() {
            threads /= 2;
            limits.threads = Some(threads);
        }
        if threads < most {
            log::warn!("few open files are allowed: threads are {threads}, not {most}");
        }
        fit(limits, places.len())?;
        self.run_all(options, cluster, &places).await
    }

    /// Runs each node in threads of its own, until a signal ends them or a node ends.
    async fn run_all(&self, options: &Options, cluster: Arc<Cluster>, places: &[usize]) -> Outcome {
        let file = watch::Sender::new(cluster);
        let mut stopped = pin!(until_stopped(|| reload(options, places.len(), &file))?);
        let stop = CancellationToken::new();
        let mut ends = FuturesUnordered::new();
        for &place in places {
            let name = file.borrow().name(place).to_owned();
            let (file, listen, stop) = (file.subscribe(), self.listen.clone(), stop.clone());
            ends.push(node::in_thread(name, node::run(file, place, listen, stop))?);
        }
        let mut outcome = tokio::select! {
            () = &mut stopped => Ok(()),
            Some(end) = ends.next() => end,
        };
        stop.cancel(); // where one node of --all has ended, the others end too
        while let Some(end) = ends.next().await {
            outcome = outcome.and(end);
        }
        outcome?;
        Ok(ExitCode::SUCCESS)
    }

    /// The place of the named node, or of the node that has this machine's name.
    fn place(&self, cluster: &Cluster, options: &Options) -> Result<usize, Failure> {
        if let Some(name) = &self.name {
            let place = found(cluster, name);
            return place.ok_or_else(|| options.no_node(cluster, name));
        }
        let host = hostname::get().map_err(|error| Failure::from(error).of("no host name"))?;
        let host = host.to_string_lossy();
        let short = host.split('.').next().unwrap_or(&host);
        let place = found(cluster, &host).or_else(|| found(cluster, short));
        place.ok_or_else(|| {
            let hint = "it is this machine's name, and kv54 serve NAME runs another";
            options.no_node(cluster, short).with(hint)
        })
    }
}

/// The place of a node in the ring, or behind it among those that leave.
fn found(cluster: &Cluster, name: &str) -> Option<usize> {
    let mut nodes = cluster.nodes().iter().chain(cluster.leaving());
    nodes.position(|node| node.name == name)
}

/// Waits for a signal that ends this process; a hangup is one if it says that the terminal was closed.
pub(super) fn until_stopped(hung_up: impl Fn()) -> io::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let at_terminal = io::stdin().is_terminal();
    Ok(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => return,
                _ = interrupt.recv() => return,
                _ = hangup.recv() => match at_terminal && !io::stdin().is_terminal() {
                    true => return,
                    false => hung_up(),
                },
            }
        }
    })
}

/// Reads the file again, for so many nodes. A wrong one changes nothing.
fn reload(options: &Options, nodes: usize, file: &watch::Sender<Arc<Cluster>>) {
    let mut new = match Cluster::read(&options.config) {
        Ok(new) => new,
        Err(error) => return log::error!("{error}; nothing is changed"),
    };
    if let Err(error) = check_window(options, &file.borrow(), &new) {
        return log::error!("{error}; nothing is changed");
    }
    let (path, other) = (options.config.display(), new.ring());
    if file.borrow().ring() != other {
        log::info!("{path}: another ring ({other}); kv54 resize changes the running one to it");
    }
    let running = file.borrow().limits.threads;
    if new
        .limits
        .threads
        .is_some_and(|threads| Some(threads) != running)
    {
        log::warn!("{path}: threads are taken at the next start");
    }
    new.limits.threads = running;
    match fit(&mut new.limits, nodes) {
        Ok(()) => drop(file.send_replace(Arc::new(new))),
        Err(error) => log::error!("{error}; nothing is changed"),
    }
}

/// No ring changes into one with another window.
pub(super) fn check_window(options: &Options, running: &Cluster, new: &Cluster) -> io::Result<()> {
    if running.limits.window == new.limits.window {
        return Ok(());
    }
    let path = options.config.display();
    let (running, other) = (running.ring(), new.ring());
    let why = format!("{path}: another ring ({other}) than the running one ({running})");
    Err(io::Error::other(why))
}

/// What the limit on open files leaves for each of so many nodes.
struct Files {
    allowed: usize, // for all nodes
    enough: usize,  // for all connections of all nodes
    most: usize,    // connections of a node
    wanted: usize,
    others: usize, // files of a node
}

impl Files {
    /// Raises the limit as far as it is needed and may be.
    fn of(limits: &Limits, nodes: usize) -> Files {
        // Each thread of another node connects within the reserve, and that node once more to join; they are
        // dialled as often.
        let others = OWN_FILES + 8 * limits.threads.unwrap_or(1) + 2 * limits.reserve();
        let wanted = limits.connections;
        let enough = nodes * (wanted + others);
        let allowed = rlimit::increase_nofile_limit(enough as u64);
        let allowed = allowed.or_else(|_| Resource::NOFILE.get_soft());
        let allowed = allowed.map_or(enough, |files| usize::try_from(files).unwrap_or(enough));
        Files {
            allowed,
            enough,
            most: (allowed / nodes).saturating_sub(others),
            wanted,
            others,
        }
    }

    /// Whether connections go short, and have fewer files than the rest.
    fn are_most_others(&self) -> bool {
        self.most < self.wanted.min(self.others)
    }
}

/// Lowers `connections` to what the limit on open files leaves for each of so many nodes.
pub(super) fn fit(limits: &mut Limits, nodes: usize) -> io::Result<()> {
    let Files {
        allowed,
        enough,
        most,
        wanted,
        ..
    } = Files::of(limits, nodes);
    if most == 0 {
        let nodes = if nodes == 1 {
            "a node"
        } else {
            "all these nodes"
        };
        let why =
            format!("{allowed} open files are too few for {nodes}: ulimit -n {enough} is enough");
        return Err(io::Error::other(why));
    }
    if most < wanted {
        limits.connections = most;
        log::warn!(
            "{allowed} open files are allowed: a node takes {most} connections, not {wanted}; \
             ulimit -n {enough} is enough for all"
        );
    }
    Ok(())
}

/// Logs what matters as much as this, or more.
pub(super) fn log_at(level: log::LevelFilter) {
    let _ = log::set_logger(&Log).map(|()| log::set_max_level(level));
}

/// Writes log lines to standard error. Each begins with its node's name: the name of its thread.
struct Log;

impl log::Log for Log {
    fn enabled(&self, _: &log::Metadata) -> bool {
        true
    }

    fn log(&self, record: &log::Record) {
        let thread = thread::current();
        let name = thread.name().filter(|n| *n != "main").unwrap_or("kv54");
        let level = match record.level() {
            log::Level::Info => "",
            log::Level::Error => "error: ",
            log::Level::Warn => "warning: ",
            log::Level::Debug | log::Level::Trace => "debug: ",
        };
        // Each line is one write. Where the log cannot be written, the node goes on.
        let said = plain(record.args().to_string());
        let _ = io::stderr().write_all(format!("{name}: {level}{said}\n").as_bytes());
    }

    fn flush(&self) {}
}

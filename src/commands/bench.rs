//! `bench`: how fast your own ring answers. It asks as any program would, through `Peer` or
//! `Client`; the generator in `bench/` costs less for each operation, and knows other systems.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, value_parser};
use futures::future::{join, join_all};
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use hdrhistogram::Histogram;
use serde_json::{Map, Value as Json, json};
use tokio::time::sleep;

use super::target::Target;
use super::{Failure, Options, Outcome, bar, remark};
use crate::cluster::Node;
use crate::entry::Packed;
use crate::error::Error;
use crate::rpc::codec::encode_bytes;
use crate::rpc::{Peer, tls};

/// What runs before the clock does.
const WARM_UP: Duration = Duration::from_secs(1);
/// A connection that leaves a request unanswered for so long is given up.
const PATIENCE: Duration = Duration::from_secs(10);

/// Load the nodes and measure how fast they answer.
///
/// This is a look at your own ring; every value that is read is checked. It writes the keys
/// bench:0000000000, bench:0000000001 and so on, and leaves them there.
#[derive(Args)]
#[command(after_help = "Examples:
  kv54 bench get
  kv54 bench mix --connections 8 --depth 32 --seconds 10
  kv54 bench set --own --json")]
pub(super) struct Bench {
    /// What to do with keys drawn at random: read and check, write, or half of each
    #[arg(value_parser = ["get", "set", "mix"])]
    ops: String,
    /// Connections, spread over the nodes
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = value_parser!(u16).range(1..))]
    connections: u16,
    /// Requests in flight on each connection
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = value_parser!(u16).range(1..=1024))]
    depth: u16,
    /// Bytes in a value
    #[arg(long, value_name = "BYTES", default_value_t = 100, value_parser = value_parser!(u32).range(1..=1 << 20))]
    value_size: u32,
    /// Different keys, from bench:0000000000 on
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = value_parser!(u32).range(1..))]
    keys: u32,
    /// How long to measure, after a second of warm-up
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = value_parser!(u64).range(1..=86_400))]
    seconds: u64,
    /// Coordinate here, with connections × depth operations at once; else the nodes coordinate
    #[arg(long)]
    own: bool,
}

/// What came of a run.
struct Report {
    latency: Histogram<u64>, // of the operations that went well, in nanoseconds
    errors: BTreeMap<&'static str, u64>, // the others, by the first word of each error
    elapsed: Duration,
    cpu: Option<f64>, // the share of a core that this process used
}

impl Bench {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        let targets = self.targets(options)?;
        let at_once = usize::from(self.connections) * usize::from(self.depth);
        let targets: Vec<&Target> = targets.iter().cycle().take(at_once).collect();
        self.fill(&targets).await?;
        let report = self.measure(&targets).await?;
        options.print(&self.json(&report), self.text(&report))?;
        if report.cpu.is_some_and(|share| share > 0.9) {
            remark("bench itself was busy all the time: the nodes may be faster than this");
        }
        report.check()
    }

    /// A guest on each connection, or one client of our own for all operations.
    fn targets(&self, options: &Options) -> Result<Vec<Target>, Failure> {
        if self.own {
            return Ok(vec![Target::Majority(options.client()?)]);
        }
        let cluster = options.cluster()?;
        let dial = tls::dial(&cluster)?;
        let nodes = cluster.nodes().iter().cycle();
        let guest =
            |node: &Node| Target::Node(node.name.clone(), Peer::new(node, PATIENCE, dial.clone()));
        Ok(nodes.take(self.connections.into()).map(guest).collect())
    }

    /// Writes every key once.
    async fn fill(&self, targets: &[&Target]) -> Result<(), Failure> {
        let bar = &bar("filling {wide_bar} {percent} %", Some(self.keys.into()));
        let sets = stream::iter((0..self.keys).zip(targets.iter().cycle())).map(Ok);
        let set = async |(number, target): (u32, &&Target)| {
            bar.inc(1);
            let (key, value) = self.entry(number);
            target.write(key.as_bytes(), Some(&value)).await
        };
        let filled = sets.try_for_each_concurrent(targets.len(), set).await;
        filled.map_err(|error| Failure::from(error).with("while the keys were filled"))
    }

    /// Does what is wanted to keys drawn at random; the warm-up counts only in its errors.
    async fn measure(&self, targets: &[&Target]) -> Result<Report, Failure> {
        let time = WARM_UP + Duration::from_secs(self.seconds);
        let bar = bar("measuring {wide_bar} {percent} %", Some(nanos(time)));
        let latency = Histogram::new_with_bounds(1, 100_000_000_000, 3).map_err(Failure::usage)?;
        let (latency, errors) = (RefCell::new(latency), RefCell::new(BTreeMap::new()));
        let begun = Instant::now();
        let well = |took| latency.borrow_mut().saturating_record(nanos(took));
        let wrong = |word| *errors.borrow_mut().entry(word).or_default() += 1;
        let tasks = targets.iter().map(async |target| {
            let mut asked = begun;
            while asked < begun + time {
                bar.set_position(nanos(asked - begun));
                match self.operate(target).await {
                    Ok(None) => well(asked.elapsed()),
                    Ok(Some(word)) => wrong(word),
                    Err(error) if error.kind.is_refusal() => wrong(error.kind.word()),
                    // No answer came: this connection is broken.
                    Err(error) => return wrong(error.kind.word()),
                }
                asked = Instant::now();
            }
        });
        let warm_up = async {
            sleep(WARM_UP).await;
            latency.borrow_mut().reset();
            (Instant::now(), used())
        };
        let ((start, before), _) = join(warm_up, join_all(tasks)).await;
        let elapsed = start.elapsed();
        let share = |(now, before)| (now - before) / elapsed.as_secs_f64();
        Ok(Report {
            latency: latency.into_inner(),
            errors: errors.into_inner(),
            elapsed,
            cpu: used().zip(before).map(share),
        })
    }

    /// One operation. `Some` names what is wrong with the value that was read.
    async fn operate(&self, target: &Target) -> Result<Option<&'static str>, Error> {
        let (key, value) = self.entry(fastrand::u32(..self.keys));
        if self.ops == "set" || self.ops == "mix" && fastrand::bool() {
            target.write(key.as_bytes(), Some(&value)).await?;
            return Ok(None);
        }
        let (found, _) = target.get(key.as_bytes()).await?;
        Ok(match found {
            found if found == value => None,
            found if found.is_nil() => Some("absent"),
            _ => Some("wrong-value"),
        })
    }

    /// A key, and its value: the key's name, or the end that fits, over and over.
    fn entry(&self, number: u32) -> (String, Packed) {
        let (key, size) = (format!("bench:{number:010}"), self.value_size as usize);
        let (_, end) = key.split_at(key.len().saturating_sub(size));
        let mut value = end.repeat(size.div_ceil(end.len())).into_bytes();
        value.truncate(size);
        (key, Packed::from(&*encode_bytes(&value)))
    }

    fn text(&self, report: &Report) -> String {
        let (connections, depth) = (self.connections, self.depth);
        let at_once = match self.own {
            true => format!("{connections} × {depth} at once through kv54's own client"),
            false => format!("{connections} connections, each with {depth} in flight"),
        };
        let (keys, size) = (self.keys, self.value_size);
        let (rate, done, time) = (report.rate(), report.latency.len(), report.elapsed);
        let mut lines = vec![
            format!("{rate} operations per second ({done} in {time:.1?})"),
            format!("{at_once}; {keys} keys, values of {size} bytes"),
        ];
        let percentiles = report.percentiles();
        lines.extend(percentiles.map(|(name, time)| format!("{name:<5}  {time:.1?}")));
        let percent = report.cpu.map(|share| share * 100.0);
        lines.extend(percent.map(|cpu| format!("bench itself used {cpu:.0} % of a core")));
        lines.join("\n") + "\n"
    }

    /// The same, latencies in microseconds.
    fn json(&self, report: &Report) -> Json {
        let micros = |time: Duration| json!((time.as_secs_f64() * 1e7).round() / 10.0);
        let latency = report.percentiles();
        let latency = latency.map(|(name, time)| (name.to_owned(), micros(time)));
        json!({
            "ops": self.ops, "connections": self.connections, "depth": self.depth,
            "value_size": self.value_size, "keys": self.keys,
            "seconds": report.elapsed.as_secs_f64(),
            "operations": report.latency.len(), "ops_per_s": report.rate(),
            "latency_us": latency.collect::<Map<_, _>>(), "errors": report.errors,
            "generator_cpu": report.cpu.map(|share| (share * 1000.0).round() / 1000.0),
        })
    }
}

impl Report {
    /// Fails where an operation did.
    fn check(&self) -> Outcome {
        let wrong: u64 = self.errors.values().sum();
        let of = wrong + self.latency.len();
        let errors = self.errors.iter().map(|(word, n)| format!("{n} {word}"));
        let errors = errors.collect::<Vec<_>>().join(", ");
        let why = format!("{wrong} of {of} operations went wrong: {errors}");
        match wrong {
            0 => Ok(ExitCode::SUCCESS),
            _ => Err(Failure { code: 3, why }),
        }
    }

    /// Operations per second.
    fn rate(&self) -> u128 {
        u128::from(self.latency.len()) * 1000 / self.elapsed.as_millis().max(1)
    }

    fn percentiles(&self) -> impl Iterator<Item = (&'static str, Duration)> {
        let quantiles = [0.5, 0.9, 0.99, 0.999, 1.0];
        let under = |quantile| Duration::from_nanos(self.latency.value_at_quantile(quantile));
        let names = ["p50", "p90", "p99", "p99.9", "max"].into_iter();
        names.zip(quantiles.map(under))
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// The seconds that this thread has run on a processor, where the system says it.
fn used() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    let nanos: f64 = stat.split(' ').next()?.parse().ok()?;
    Some(nanos / 1e9)
}

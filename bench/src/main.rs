//! One generator for all: loads kv54, redis, memcached or etcd and says in one JSON object
//! how fast they were. `compare` runs it.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use serde_json::json;

use load::{Bench, Load, Phase, Report, Wire, used};

mod etcd;
mod kv54;
mod load;
mod memcached;
mod redis;

/// Load a system and measure how fast it answers.
#[derive(Parser)]
struct Cli {
    /// What it speaks
    #[arg(value_enum)]
    wire: Wires,
    /// Where it listens, all of its addresses
    #[arg(long, value_delimiter = ',', required = true)]
    at: Vec<String>,
    /// Its processes, whose processor time is counted
    #[arg(long, value_delimiter = ',')]
    pids: Vec<String>,
    /// Only write every key once
    #[arg(long)]
    fill: bool,
    #[command(flatten)]
    load: Load,
}

#[derive(Clone, Copy, ValueEnum)]
enum Wires {
    Kv54,
    Kv54Cas,
    Kv54Incr,
    Redis,
    RedisWait,
    Memcached,
    Etcd,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.wire {
        Wires::Kv54 => measure(&cli, || kv54::Guest::Set).await,
        Wires::Kv54Cas => measure(&cli, || kv54::Guest::Cas).await,
        Wires::Kv54Incr => measure(&cli, || kv54::Guest::Incr).await,
        Wires::Redis => measure(&cli, redis::Redis::default).await,
        Wires::RedisWait => measure(&cli, redis::Redis::waiting).await,
        Wires::Memcached => measure(&cli, memcached::Memcached::default).await,
        Wires::Etcd => measure(&cli, etcd::Etcd::default).await,
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("load: {error}");
            ExitCode::from(3)
        }
    }
}

/// Fills, warms up and measures.
async fn measure<W: Wire>(cli: &Cli, wire: impl Fn() -> W) -> Result<ExitCode, String> {
    let Cli { load, at, .. } = cli;
    let mut bench = Bench::connect(load, at, wire).await?;
    let filled = bench.run(Phase::Fill).await;
    if cli.fill || filled.wrong() > 0 {
        return Ok(told(cli, &filled, Duration::ZERO));
    }
    bench.run(Phase::For(Duration::from_secs(1))).await;
    let before = servers(&cli.pids);
    let time = Duration::from_secs(load.seconds);
    let report = bench.run(Phase::For(time)).await;
    Ok(told(cli, &report, servers(&cli.pids) - before))
}

fn told(cli: &Cli, report: &Report, cpu: Duration) -> ExitCode {
    let mut json = report.json(&cli.load);
    if report.operations > 0 && !cli.pids.is_empty() {
        json["server_cpu_us"] = json!(cpu.as_secs_f64() * 1e6 / report.operations as f64);
    }
    println!("{json}");
    match report.wrong() {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::from(3),
    }
}

/// The processor time that all of these processes have used so far.
fn servers(pids: &[String]) -> Duration {
    pids.iter().filter_map(|pid| used(pid)).sum()
}

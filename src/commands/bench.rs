//! `bench`: how fast the nodes answer.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::{Failure, Options, Outcome, print};
use crate::bench::{Guest, Load, Own, PERCENTILES, Phase, Report};
use crate::rpc::tls;

/// What runs before the clock does.
const WARM_UP: Duration = Duration::from_secs(1);
/// The share of a core beyond which this process may be what is measured.
const BUSY: f64 = 0.9;

/// Load the nodes and measure how fast they answer.
///
/// Writes the keys bench:0000000000, bench:0000000001 and so on, and leaves them there.
#[derive(Args)]
#[command(after_help = "Examples:
  kv54 bench get
  kv54 bench mix --connections 8 --depth 32 --seconds 10
  kv54 bench set --own --json")]
pub(super) struct Bench {
    #[command(flatten)]
    load: Load,
    /// Through kv54's own client, so many operations at once, not as a guest of each node
    #[arg(long)]
    own: bool,
}

impl Bench {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        let report = if self.own {
            let mut own = Own::new(&self.load, options.client()?).map_err(unreachable)?;
            self.measure(async |phase, tick| own.run(phase, tick).await)
                .await?
        } else {
            let cluster = options.cluster()?;
            let (nodes, dial) = (cluster.nodes(), tls::dial(&cluster)?);
            let connected = crate::bench::Bench::connect(&self.load, nodes, &dial, || Guest);
            let mut guests = connected.await.map_err(unreachable)?;
            self.measure(async |phase, tick| guests.run(phase, tick).await)
                .await?
        };
        match options.json {
            true => print(format!("{}\n", report.json(&self.load)))?,
            false => print(self.text(&report))?,
        }
        if report.cpu.is_some_and(|share| share > BUSY) {
            let hint = "bench itself was busy all the time: the nodes may be faster than this";
            let _ = writeln!(std::io::stderr(), "kv54: {hint}");
        }
        done(&report, "")?;
        Ok(ExitCode::SUCCESS)
    }

    /// Fills, warms up and measures.
    async fn measure(
        &self,
        mut run: impl AsyncFnMut(Phase, &mut dyn FnMut(u64)) -> Report,
    ) -> Result<Report, Failure> {
        let time = Duration::from_secs(self.load.seconds);
        let bar = bar("filling", self.load.keys.into());
        let filled = run(Phase::Fill, &mut |done| bar.set_position(done)).await;
        bar.finish_and_clear();
        done(&filled, " while the keys were filled")?;
        let bar = self::bar("measuring", 10 * (WARM_UP + time).as_secs());
        let warm = run(Phase::For(WARM_UP), &mut |_| bar.inc(1)).await;
        let report = run(Phase::For(time), &mut |_| bar.inc(1)).await;
        bar.finish_and_clear();
        done(&warm, " while warming up")?;
        Ok(report)
    }

    fn text(&self, report: &Report) -> String {
        let Load {
            connections,
            depth,
            value_size,
            keys,
            ..
        } = &self.load;
        let mut text = format!("{:.0} operations per second", report.rate());
        let _ = writeln!(text, " ({} in {:.1?})", report.operations, report.elapsed);
        let at_once = match self.own {
            true => format!("{connections} × {depth} at once through kv54's own client"),
            false => format!("{connections} connections, each with {depth} in flight"),
        };
        let _ = writeln!(text, "{at_once}; {keys} keys, values of {value_size} bytes");
        for (name, percent) in PERCENTILES {
            let _ = writeln!(text, "{name:<5}  {:.1?}", report.percentile(percent));
        }
        if let Some(share) = report.cpu {
            let _ = writeln!(text, "bench itself used {:.0} % of a core", share * 100.0);
        }
        text
    }
}

/// Fails where an operation did.
fn done(report: &Report, when: &str) -> Result<(), Failure> {
    let errors = report
        .errors
        .iter()
        .map(|(word, count)| format!("{count} {word}"));
    match report.wrong() {
        0 => Ok(()),
        wrong => Err(Failure {
            code: 3,
            why: format!(
                "{wrong} of {} operations went wrong{when}: {}",
                wrong + report.operations,
                errors.collect::<Vec<_>>().join(", ")
            ),
        }),
    }
}

/// A bar on standard error, if that is a terminal.
fn bar(what: &'static str, length: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {percent} %");
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(length)
        .with_style(style)
        .with_message(what)
}

fn unreachable(why: String) -> Failure {
    Failure { code: 3, why }
}

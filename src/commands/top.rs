//! `top`: what the nodes do, again and again.

use std::collections::HashMap;
use std::env;
use std::future::pending;
use std::io::{self, ErrorKind, IsTerminal as _, Read as _};
use std::iter;
use std::panic;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, SystemTime};

use bytesize::ByteSize;
use clap::{Args, value_parser};
use console::{Term, truncate_str};
use serde_json::{Value as Json, json};
use tokio::task::spawn_blocking;
use tokio::time::{MissedTickBehavior, interval};

use super::lock::Signals;
use super::status::{Asked, Heard};
use super::{Options, Outcome, text, timeout, write};
use crate::methods::FOR_GUESTS;
use crate::status::Status;

/// Watch what the nodes do, once a second.
///
/// On a terminal, a table is painted again and again; q or Ctrl-C ends it. Elsewhere, and with --count or --json, it
/// prints a line for each node each time, in which the figures are those since the time before.
#[derive(Args)]
#[command(after_help = "Examples:
  kv54 top
  kv54 top --interval 10s >> top.log
  kv54 top --count 1 --json

Columns:
  memory    bytes of keys, values and overhead, of the limit
  gets/s    gets of clients that the node has answered in a second
  sets/s    the same of set, delete, cas and incr
  calls/s   what other nodes, and clients that coordinate themselves, have asked it for
  conns     open connections, that of this command too
  p50, p99  half of the clients' requests, and 99 of 100, took less in the node than this; an eighth too high at most
  busy      how much of the time it was at work, the sum of its threads")]
pub(super) struct Top {
    /// The time from one look to the next
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = pause)]
    interval: Duration,
    /// End after so many
    #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(1..))]
    count: Option<u64>,
}

const HEAD: [&str; 12] = [
    "node", "state", "keys", "memory", "gets/s", "sets/s", "calls/s", "conns", "p50", "p99",
    "busy", "",
];
/// What other nodes ask for the sake of keys.
const CALLS: [&str; 5] = ["swap", "promise", "load", "store", "scan"];
/// Another screen, without a cursor.
const ENTER: &[u8] = b"\x1b[?1049h\x1b[?25l";
/// The one that was there before.
const LEAVE: &[u8] = b"\x1b[?25h\x1b[?1049l";

impl Top {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        let file = options.cluster()?;
        let nodes = Asked::new(&file, options.timeout().min(file.limits.window))?;
        let mut signals = Signals::new()?;
        let is_dumb = env::var_os("TERM").is_some_and(|name| name == "dumb");
        let paints = io::stdout().is_terminal() && !is_dumb && !options.json;
        let screen = (paints && self.count.is_none()).then(Screen::open);
        let screen = screen.transpose()?;
        tokio::select! {
            shown = self.show(&nodes, options.json, screen.as_ref()) => shown,
            () = quit(screen.as_ref()) => Ok(ExitCode::SUCCESS),
            _ = signals.next() => Ok(ExitCode::SUCCESS),
        }
    }

    async fn show(&self, nodes: &Asked, as_json: bool, screen: Option<&Screen>) -> Outcome {
        let (mut before, mut looks) = (HashMap::new(), interval(self.interval));
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for number in 0.. {
            looks.tick().await;
            let (_, heard) = nodes.hear().await;
            let seen = heard.into_iter().map(|heard| Seen::of(heard, &mut before));
            let seen: Vec<Seen> = seen.collect();
            let shown = match screen {
                Some(_) => self.painting(&seen),
                None if number == 0 => continue, // the next one is compared with it
                None if as_json => json_lines(&seen),
                None => lines(&seen, number == 1),
            };
            // A terminal or a reader may stop taking it, and signals are still for this process.
            let written = spawn_blocking(move || write(shown.as_bytes())).await;
            match written.map_err(io::Error::from)? {
                Err(error) if error.kind() == ErrorKind::BrokenPipe => break, // it was read enough
                written => written?,
            }
            if self.count == Some(number) {
                break;
            }
        }
        Ok(ExitCode::SUCCESS)
    }

    /// The table over what was painted before, in as many rows and columns as there are.
    fn painting(&self, seen: &[Seen]) -> String {
        let (height, width) = Term::stdout().size();
        let end = format!(
            "every {}; q ends",
            humantime::format_duration(self.interval)
        );
        let lines = table(seen) + &end;
        let lines = lines.lines().take(usize::from(height).saturating_sub(1));
        // Erased before it is written: in the last column, that would erase what is there.
        let line = |line| format!("\x1b[K{}\n", truncate_str(line, width.into(), ""));
        format!("\x1b[H{}\x1b[J", lines.map(line).collect::<String>())
    }
}

fn table(seen: &[Seen]) -> String {
    text::table(HEAD, seen.iter().map(Seen::row).collect())
}

/// The rows of the table, each with the time; those of the first one below its head.
fn lines(seen: &[Seen], is_first: bool) -> String {
    let (table, now) = (table(seen), now());
    let times = ["time".to_owned()].into_iter().chain(iter::repeat(now));
    let lines = times.zip(table.lines()).skip(usize::from(!is_first));
    let lines =
        lines.flat_map(|(time, line)| [format!("{time:20}  "), line.to_owned(), "\n".to_owned()]);
    lines.collect()
}

fn json_lines(seen: &[Seen]) -> String {
    let now = now();
    let line = |seen: &Seen| text::json_line(&seen.json(&now)) + "\n";
    seen.iter().map(line).collect()
}

fn now() -> String {
    humantime::format_rfc3339_seconds(SystemTime::now()).to_string()
}

/// A node, and what it did since it was seen before.
struct Seen {
    heard: Heard,
    pace: Option<Pace>,
}

/// What a node did between two looks: so much in a second, latencies in microseconds, and the share
/// of the time in which it was busy.
struct Pace {
    gets: f64,
    sets: f64,
    calls: f64,
    p50: Option<u64>,
    p99: Option<u64>,
    busy: f64,
}

impl Seen {
    fn of(heard: Heard, before: &mut HashMap<String, Status>) -> Self {
        let now = heard.status.as_ref();
        let pace = now.and_then(|now| {
            let old = before.insert(heard.node.name.clone(), now.clone())?;
            Pace::between(&old, now)
        });
        Seen { heard, pace }
    }

    fn row(&self) -> [String; 12] {
        let (heard, pace) = (&self.heard, self.pace.as_ref());
        let status = heard.status.as_ref();
        let cell = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        let size = |bytes: usize| ByteSize(bytes as u64).display().iec();
        let memory = |s: &Status| format!("{} of {}", size(s.bytes), size(s.memory));
        let rate = |rate: f64| match rate {
            few if few < 10.0 => few.to_string(),
            many => format!("{many:.0}"),
        };
        let time = |us: u64| match Duration::from_micros(us) {
            short if us < 1000 => format!("{short:.0?}"),
            long => format!("{long:.1?}"),
        };
        [
            heard.node.name.clone(),
            text::coloured(&heard.state),
            cell(status.map(|status| status.keys.to_string())),
            cell(status.map(memory)),
            cell(pace.map(|pace| rate(pace.gets))),
            cell(pace.map(|pace| rate(pace.sets))),
            cell(pace.map(|pace| rate(pace.calls))),
            cell(status.map(|status| status.connections.to_string())),
            cell(pace.and_then(|pace| pace.p50).map(time)),
            cell(pace.and_then(|pace| pace.p99).map(time)),
            cell(pace.map(|pace| format!("{:.0} %", pace.busy * 100.0))),
            heard.remark.clone(),
        ]
    }

    fn json(&self, now: &str) -> Json {
        let (heard, pace) = (&self.heard, self.pace.as_ref());
        let (node, status) = (&heard.node, heard.status.as_ref());
        json!({
            "time": now, "name": node.name, "address": node.address, "state": heard.state,
            "keys": status.map(|status| status.keys),
            "bytes": status.map(|status| status.bytes),
            "memory": status.map(|status| status.memory),
            "gets_per_s": pace.map(|pace| pace.gets),
            "sets_per_s": pace.map(|pace| pace.sets),
            "calls_per_s": pace.map(|pace| pace.calls),
            "connections": status.map(|status| status.connections),
            "p50_us": pace.and_then(|pace| pace.p50),
            "p99_us": pace.and_then(|pace| pace.p99),
            "busy": pace.map(|pace| (pace.busy * 1000.0).round() / 1000.0),
            "remark": heard.remark,
        })
    }
}

impl Pace {
    /// `None` where the node has started anew, or does not count. What a stranger says may be anything.
    fn between(old: &Status, new: &Status) -> Option<Self> {
        let time = new
            .uptime_us
            .checked_sub(old.uptime_us)
            .filter(|time| *time > 0);
        let time = Duration::from_micros(time.filter(|_| old.start_id == new.start_id)?);
        let of_time = |us| Duration::from_micros(us).div_duration_f64(time);
        let rate = |methods: &[&str]| {
            let of = |status: &Status, method: &str| status.answered.get(method).copied();
            let grown = |method: &&str| more(of(old, method), of(new, method));
            let sum = methods.iter().map(grown).fold(0, u64::saturating_add);
            (of_time(sum) * 1e7).round() / 10.0
        };
        let [get, sets @ ..] = FOR_GUESTS;
        let waited = new.waited.iter();
        let waited =
            waited.map(|(end, now)| (*end, more(old.waited.get(end).copied(), Some(*now))));
        let waited: Vec<(u64, u64)> = waited.collect();
        Some(Pace {
            gets: rate(&[get]),
            sets: rate(&sets),
            calls: rate(&CALLS),
            p50: percentile(&waited, 50),
            p99: percentile(&waited, 99),
            busy: of_time(more(Some(old.busy_us), Some(new.busy_us))),
        })
    }
}

/// By how much a counter has grown.
fn more(old: Option<u64>, new: Option<u64>) -> u64 {
    new.unwrap_or(0).saturating_sub(old.unwrap_or(0))
}

/// The end of the bucket below which so many percent are.
fn percentile(buckets: &[(u64, u64)], percent: u64) -> Option<u64> {
    let all = buckets
        .iter()
        .map(|(_, count)| *count)
        .fold(0, u64::saturating_add);
    let mut left = all.saturating_mul(percent).div_ceil(100);
    let mut filled = buckets.iter().filter(|(_, count)| *count > 0);
    let bucket = filled.find(|(_, count)| {
        left = left.saturating_sub(*count);
        left == 0
    });
    bucket.map(|(end, _)| *end)
}

/// A terminal that is painted on. It is as it was when this is dropped: `stty` knows how.
struct Screen(Option<String>);

impl Screen {
    fn open() -> io::Result<Self> {
        let was = io::stdin().is_terminal().then(|| stty("-g")).flatten();
        let screen = Screen(was.filter(|_| stty("-icanon -echo -isig -ixon min 1").is_some()));
        let tell = panic::take_hook();
        panic::set_hook(Box::new(move |why| {
            let _ = write(LEAVE); // else what it tells would vanish with the screen
            tell(why);
        }));
        write(ENTER)?;
        Ok(screen)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = write(LEAVE);
        self.0.as_deref().map(stty);
    }
}

/// Sets how the terminal is, or asks. Without this program, keys need Enter, and are seen.
fn stty(args: &str) -> Option<String> {
    let mut stty = Command::new("stty");
    let said = stty.args(args.split(' ')).stdin(Stdio::inherit()).output();
    let said = said.ok().filter(|said| said.status.success())?;
    Some(String::from_utf8(said.stdout).ok()?.trim().to_owned())
}

/// Waits for q, or for Ctrl-C, which is a key here.
async fn quit(screen: Option<&Screen>) {
    let is_end = |key: u8| b"qQ\x03".contains(&key);
    let keys = move || io::stdin().lock().bytes().map_while(Result::ok).any(is_end);
    if screen.is_none_or(|screen| screen.0.is_none())
        || !spawn_blocking(keys).await.unwrap_or(false)
    {
        pending::<()>().await;
    }
}

fn pause(text: &str) -> Result<Duration, Box<dyn std::error::Error + Send + Sync>> {
    match timeout(text)? {
        time if time >= Duration::from_millis(100) => Ok(time),
        _ => Err("at least 100ms".into()),
    }
}

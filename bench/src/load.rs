//! A load generator: connections on one thread, each with so many requests in flight, and a
//! new one for every answer. The loop knows no protocol: a [`Wire`] does, so that systems
//! are compared by generators of equal cost. It allocates nothing per operation, writes once
//! and looks at the clock once for each batch of answers that it reads.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::{Buf as _, BytesMut};
use clap::{Args, ValueEnum, value_parser};
use hdrhistogram::Histogram;
use serde_json::{Map, Value as Json, json};
use tokio::io::AsyncWrite as _;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::io::poll_read_buf;

/// If no connection is answered for so long, the run ends.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks at whether answers still come.
const TICK: Duration = Duration::from_millis(100);
/// The longest latency that is told apart from longer ones, in nanoseconds.
const MAX_LATENCY: u64 = 100_000_000_000;
/// Room for one read, in bytes.
const READ: usize = 64 << 10;
/// What is sent of an output that never ends is dropped beyond so many bytes.
const MAX_SENT: usize = 1 << 20;
/// The part of a msgid that is a slot; the rest tells an answer from a second one.
const SLOT: u32 = 0xffff;

/// The percentiles that are told, and their names.
pub const PERCENTILES: [(&str, f64); 5] = [
    ("p50", 50.0),
    ("p90", 90.0),
    ("p99", 99.0),
    ("p99.9", 99.9),
    ("max", 100.0),
];

/// What a run does to keys drawn at random.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Ops {
    /// Read values, and check them
    Get,
    /// Write values
    Set,
    /// Half of each
    Mix,
}

/// How much of it.
#[derive(Args, Clone, Debug)]
pub struct Load {
    /// What to do
    #[arg(value_enum)]
    pub ops: Ops,
    /// Connections, spread over the nodes
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = value_parser!(u16).range(1..))]
    pub connections: u16,
    /// Requests in flight on each connection
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = value_parser!(u16).range(1..=1024))]
    pub depth: u16,
    /// Bytes in a value
    #[arg(long, value_name = "BYTES", default_value_t = 100, value_parser = value_parser!(u32).range(1..=1 << 20))]
    pub value_size: u32,
    /// Different keys, from bench:0000000000 on
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = value_parser!(u32).range(1..))]
    pub keys: u32,
    /// How long to measure, after a second of warm-up
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = value_parser!(u64).range(1..=86_400))]
    pub seconds: u64,
}

/// One stretch of a run.
#[derive(Clone, Copy, Debug)]
pub enum Phase {
    /// Writes every key once.
    Fill,
    /// Does [`Load::ops`] for so long.
    For(Duration),
}

/// What is asked about one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Its value is wanted.
    Get,
    /// Its value is written.
    Set,
}

/// A protocol, on one connection.
pub trait Wire: Send + 'static {
    /// Appends what is said before the first request.
    fn hello(&mut self, _out: &mut Vec<u8>) {}
    /// Appends one request. Its answer has to be told by this id.
    fn request(&mut self, out: &mut Vec<u8>, id: u32, op: Op, key: u32, values: &Values);
    /// What stands at the front of `input`; `None` if its end is still to come. May append
    /// to `out` what the protocol wants to hear. An error ends the connection.
    fn response<'a>(&mut self, input: &'a [u8], out: &mut Vec<u8>) -> Parsed<'a>;
}

/// What [`Wire::response`] found.
pub type Parsed<'a> = Result<Option<Response<'a>>, String>;

/// Some bytes of the input, and whose answer they are, if they are one.
#[derive(Debug)]
pub struct Response<'a> {
    /// How many bytes it takes.
    pub len: usize,
    /// The request's id and its answer.
    pub answer: Option<(u32, Answer<'a>)>,
}

/// The answer to one request.
#[derive(Debug)]
pub enum Answer<'a> {
    /// A value.
    Value(&'a [u8]),
    /// A write is done, or there is no such key.
    Nil,
    /// The first word says what it is.
    Error(String),
}

/// What each key's value is: its own name and then the same for all.
#[derive(Debug)]
pub struct Values(Vec<u8>);

/// What came of a phase.
#[derive(Clone, Debug)]
pub struct Report {
    /// Operations that were answered as they should.
    pub operations: u64,
    /// All others, by the first word of what was wrong.
    pub errors: BTreeMap<String, u64>,
    /// From request to answer, in nanoseconds.
    pub latency: Histogram<u64>,
    /// How long it took.
    pub elapsed: Duration,
    /// How much of a core this process used, where the system says it.
    pub cpu: Option<f64>,
    /// How often the slowest connection was answered, and the fastest.
    pub fair: Option<(u64, u64)>,
}

/// What has come of a phase so far. One for all connections: a histogram each would not fit a cache.
struct Tally {
    errors: BTreeMap<String, u64>,
    latency: Histogram<u64>,
}

/// Connections that can be loaded.
pub struct Bench<W> {
    load: Load,
    tally: Arc<Mutex<Tally>>,
    connections: Vec<Connection<W>>,
}

/// One connection: its requests in flight, what came in, what goes out.
struct Connection<W> {
    stream: TcpStream,
    wire: W,
    values: Arc<Values>,
    tally: Arc<Mutex<Tally>>,
    slots: Vec<Slot>,
    open: usize, // of the slots, those that wait for an answer
    input: BytesMut,
    output: Vec<u8>,
    sent: usize, // of the output, in bytes
    answered: u64,
}

/// One request in flight.
struct Slot {
    id: u32,
    asked: Option<Asked>,
}

/// What was asked about which key, and when.
type Asked = (Op, u32, Instant);

/// Where the operations come from.
#[derive(Clone)]
enum Source {
    Fill {
        next: u32,
        step: u32,
        end: u32,
    },
    Draw {
        ops: Ops,
        keys: u32,
        until: Instant,
        random: fastrand::Rng,
    },
}

/// The name of a key.
pub fn key(number: u32) -> [u8; 16] {
    let mut name = *b"bench:0000000000";
    let mut rest = number;
    for digit in name.iter_mut().rev().take(10) {
        *digit = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    name
}

impl Values {
    /// Values of so many bytes.
    pub fn new(size: u32) -> Self {
        Values((b'a'..=b'z').cycle().take(size as usize).collect())
    }

    /// Their size in bytes.
    #[allow(clippy::len_without_is_empty)] // they have one byte at least
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Appends the value of a key.
    pub fn write(&self, out: &mut Vec<u8>, number: u32) {
        let name = key(number);
        let (_, name) = name.split_at(name.len().saturating_sub(self.len()));
        out.extend_from_slice(name);
        out.extend_from_slice(self.0.get(name.len()..).unwrap_or_default());
    }

    /// Whether this is the value of that key.
    pub fn is(&self, value: &[u8], number: u32) -> bool {
        let name = key(number);
        let (_, name) = name.split_at(name.len().saturating_sub(self.len()));
        value.strip_prefix(name) == self.0.get(name.len()..)
    }
}

impl Source {
    fn new(load: &Load, phase: Phase, start: Instant, place: usize, of: usize) -> Self {
        let narrow = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        match phase {
            Phase::Fill => Source::Fill {
                next: narrow(place),
                step: narrow(of),
                end: load.keys,
            },
            Phase::For(time) => Source::Draw {
                ops: load.ops,
                keys: load.keys,
                until: start + time,
                random: fastrand::Rng::new(),
            },
        }
    }

    fn next(&mut self, now: Instant) -> Option<(Op, u32)> {
        match self {
            Source::Fill { next, step, end } => {
                let key = *next;
                *next = key.saturating_add(*step);
                (key < *end).then_some((Op::Set, key))
            }
            Source::Draw { until, .. } if now >= *until => None,
            Source::Draw {
                ops, keys, random, ..
            } => {
                let op = match ops {
                    Ops::Get => Op::Get,
                    Ops::Set => Op::Set,
                    Ops::Mix => *random.choice(&[Op::Get, Op::Set])?,
                };
                Some((op, random.u32(..*keys)))
            }
        }
    }
}

impl Tally {
    fn new() -> Result<Self, String> {
        let latency = Histogram::new_with_bounds(1, MAX_LATENCY, 3);
        Ok(Tally {
            errors: BTreeMap::new(),
            latency: latency.map_err(|error| error.to_string())?,
        })
    }

    /// Counts one answer; whether it is the right one is seen here.
    fn count(&mut self, (op, key, asked): Asked, now: Instant, answer: &Answer, values: &Values) {
        let took = u64::try_from((now - asked).as_nanos()).unwrap_or(MAX_LATENCY);
        match (op, answer) {
            (Op::Set, Answer::Nil) => self.latency.saturating_record(took),
            (Op::Get, Answer::Value(value)) if values.is(value, key) => {
                self.latency.saturating_record(took);
            }
            (Op::Get, Answer::Nil) => self.error("absent", 1),
            (_, Answer::Value(_)) => self.error("wrong-value", 1),
            (_, Answer::Error(error)) => self.error(error, 1),
        }
    }

    fn error(&mut self, error: &str, times: u64) {
        let word = error.split([':', ' ']).next().unwrap_or_default();
        match self.errors.get_mut(word) {
            Some(count) => *count += times,
            None => drop(self.errors.insert(word.to_owned(), times)),
        }
    }

    fn answered(&self) -> u64 {
        self.latency.len() + self.errors.values().sum::<u64>()
    }
}

impl<W: Wire> Bench<W> {
    /// Connects to the addresses in turn.
    pub async fn connect(load: &Load, at: &[String], wire: impl Fn() -> W) -> Result<Self, String> {
        let (values, tally) = (Arc::new(Values::new(load.value_size)), Tally::new()?);
        let tally = Arc::new(Mutex::new(tally));
        let mut connections = Vec::new();
        for address in at.iter().cycle().take(load.connections.into()) {
            let dialled = timeout(PATIENCE, dial(address)).await;
            let dialled = dialled.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
            let named = |error| format!("{address}: {error}");
            let mut wire = wire();
            let mut output = Vec::new();
            wire.hello(&mut output);
            connections.push(Connection {
                stream: dialled.map_err(named)?,
                wire,
                values: values.clone(),
                tally: tally.clone(),
                slots: (0..load.depth.into())
                    .map(|id| Slot { id, asked: None })
                    .collect(),
                open: 0,
                input: BytesMut::new(),
                output,
                sent: 0,
                answered: 0,
            });
        }
        Ok(Bench {
            load: load.clone(),
            tally,
            connections,
        })
    }

    /// Runs one phase. A connection that breaks is not made again: what it waited for counts as errors.
    pub async fn run(&mut self, phase: Phase) -> Report {
        let (start, of) = (Instant::now(), self.connections.len());
        let cpu = used("self");
        let mut tasks = JoinSet::new();
        for (place, connection) in self.connections.drain(..).enumerate() {
            let source = Source::new(&self.load, phase, start, place, of);
            tasks.spawn(connection.run(source));
        }
        self.wait_for(tasks).await;
        let elapsed = start.elapsed();
        let busy = used("self")
            .zip(cpu)
            .map(|(end, start)| end.saturating_sub(start));
        let answered = self
            .connections
            .iter()
            .map(|connection| connection.answered);
        let fair = answered.clone().min().zip(answered.max());
        let mut tally = lock(&self.tally);
        let report = Report {
            fair,
            operations: tally.latency.len(),
            errors: std::mem::take(&mut tally.errors),
            latency: tally.latency.clone(),
            elapsed,
            cpu: busy.map(|busy| busy.as_secs_f64() / elapsed.as_secs_f64()),
        };
        tally.latency.reset();
        report
    }

    /// Waits until all connections are done, or until no answer came for too long.
    async fn wait_for(&mut self, mut tasks: JoinSet<Option<Connection<W>>>) {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let (mut seen, mut changed) = (0, Instant::now());
        loop {
            tokio::select! {
                task = tasks.join_next() => match task {
                    Some(Ok(ended)) => self.connections.extend(ended),
                    Some(Err(_)) => {}
                    None => break,
                },
                _ = ticks.tick() => {
                    let answered = lock(&self.tally).answered();
                    if answered != seen {
                        (seen, changed) = (answered, Instant::now());
                    } else if changed.elapsed() > PATIENCE {
                        lock(&self.tally).error("no-answer", tasks.len() as u64);
                        tasks.shutdown().await;
                    }
                }
            }
        }
    }
}

/// Connects. Without `TCP_NODELAY`, requests wait 40 ms for company.
async fn dial(address: &str) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn lock(tally: &Mutex<Tally>) -> MutexGuard<'_, Tally> {
    tally.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The time that a process (its number, or `self`) has spent on processors so far.
pub fn used(process: &str) -> Option<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?; // the name before it may hold anything
    let fields = fields.split_whitespace().skip(11).take(2);
    let ticks: u64 = fields.map(|field| field.parse().unwrap_or(0)).sum();
    Some(Duration::from_millis(ticks * 10))
}

impl<W: Wire> Connection<W> {
    /// Runs until the source is dry and all is answered; `None` if the connection breaks.
    async fn run(mut self, mut source: Source) -> Option<Self> {
        let now = Instant::now();
        self.answered = 0;
        for slot in &mut self.slots {
            slot.asked = source.next(now).map(|(op, key)| (op, key, now));
            if let Some((op, key, _)) = slot.asked {
                self.open += 1;
                self.wire
                    .request(&mut self.output, slot.id, op, key, &self.values);
            }
        }
        match poll_fn(|context| self.poll(&mut source, context)).await {
            Ok(()) => Some(self),
            Err(error) => {
                let word = match error.kind() {
                    io::ErrorKind::InvalidData => "malformed",
                    _ => "disconnected",
                };
                lock(&self.tally).error(word, self.open.max(1) as u64);
                None
            }
        }
    }

    fn poll(&mut self, source: &mut Source, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let written = self.poll_write(context)?;
            if self.open == 0 && written.is_ready() {
                return Poll::Ready(Ok(()));
            }
            self.input.reserve(READ);
            let stream = Pin::new(&mut self.stream);
            if ready!(poll_read_buf(stream, context, &mut self.input))? == 0 {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            self.take_answers(source)?;
        }
    }

    fn take_answers(&mut self, source: &mut Source) -> io::Result<()> {
        let now = Instant::now();
        let mut tally = lock(&self.tally);
        let mut input = &*self.input;
        let unasked = || io::Error::new(io::ErrorKind::InvalidData, "an answer to nothing");
        while !input.is_empty() {
            let response = self.wire.response(input, &mut self.output);
            let malformed = |why| io::Error::new(io::ErrorKind::InvalidData, why);
            let Some(Response { len, answer }) = response.map_err(malformed)? else {
                break;
            };
            input = input.get(len..).unwrap_or_default();
            let Some((id, answer)) = answer else { continue };
            let slot = self.slots.get_mut((id & SLOT) as usize);
            let slot = slot.filter(|slot| slot.id == id).ok_or_else(unasked)?;
            let asked = slot.asked.take().ok_or_else(unasked)?;
            tally.count(asked, now, &answer, &self.values);
            slot.id = id.wrapping_add(SLOT + 1);
            self.answered += 1;
            match source.next(now) {
                None => self.open -= 1,
                Some((op, key)) => {
                    slot.asked = Some((op, key, now));
                    self.wire
                        .request(&mut self.output, slot.id, op, key, &self.values);
                }
            }
        }
        let taken = self.input.len() - input.len();
        self.input.advance(taken);
        Ok(())
    }

    fn poll_write(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(unsent @ [_, ..]) = self.output.get(self.sent..) {
            match ready!(Pin::new(&mut self.stream).poll_write(context, unsent))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                count => self.sent += count,
            }
            if self.sent >= MAX_SENT {
                self.output.drain(..self.sent);
                self.sent = 0;
            }
        }
        self.output.clear();
        self.sent = 0;
        Pin::new(&mut self.stream).poll_flush(context)
    }
}

impl Report {
    /// Operations per second.
    #[allow(clippy::cast_precision_loss)] // 2^52 of them take a while
    pub fn rate(&self) -> f64 {
        self.operations as f64 / self.elapsed.as_secs_f64()
    }

    /// The latency that so many of a hundred operations stayed under.
    pub fn percentile(&self, percent: f64) -> Duration {
        Duration::from_nanos(self.latency.value_at_quantile(percent / 100.0))
    }

    /// How many operations went wrong.
    pub fn wrong(&self) -> u64 {
        self.errors.values().sum()
    }

    /// All of it, times in microseconds.
    pub fn json(&self, load: &Load) -> Json {
        let latency = PERCENTILES.map(|(name, percent)| {
            let micros = self.percentile(percent).as_secs_f64() * 1e6;
            (name.to_owned(), json!((micros * 10.0).round() / 10.0))
        });
        let ops = load.ops.to_possible_value();
        json!({
            "ops": ops.map(|ops| ops.get_name().to_owned()),
            "connections": load.connections,
            "depth": load.depth,
            "value_size": load.value_size,
            "keys": load.keys,
            "seconds": self.elapsed.as_secs_f64(),
            "operations": self.operations,
            "ops_per_s": self.rate().round(),
            "latency_us": latency.into_iter().collect::<Map<_, _>>(),
            "errors": self.errors,
            "slowest_to_fastest": self.fair.map(|(slowest, fastest)| slowest as f64 / fastest as f64),
            "generator_cpu": self.cpu.map(|share| (share * 1000.0).round() / 1000.0),
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use tokio::io::AsyncReadExt as _;
    use tokio::net::TcpListener;

    use super::*;
    use crate::kv54::Guest;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        load: Load,
    }

    fn load(words: &str) -> Load {
        Cli::parse_from(format!("load {words}").split(' ')).load
    }

    #[test]
    fn a_value_belongs_to_one_key() {
        for size in [1, 10, 16, 100] {
            let (values, mut out) = (Values::new(size), Vec::new());
            values.write(&mut out, 4_000_000_017);
            assert_eq!(out.len(), size as usize);
            assert!(values.is(&out, 4_000_000_017));
            assert!(!values.is(&out, 4_000_000_018));
            assert!(!values.is(&out[1..], 4_000_000_017));
        }
    }

    #[test]
    fn what_is_not_the_wanted_answer_is_counted_by_its_first_word() {
        let (values, mut tally) = (Values::new(10), Tally::new().unwrap());
        let now = Instant::now();
        let mut count = |op, answer| tally.count((op, 17, now), now, &answer, &values);
        count(Op::Get, Answer::Value(b"0000000017"));
        count(Op::Set, Answer::Nil);
        count(Op::Get, Answer::Value(b"0000000018"));
        count(Op::Get, Answer::Nil);
        count(Op::Set, Answer::Error("full: alice keeps 1 byte".into()));
        count(Op::Get, Answer::Error("full".into()));
        assert_eq!((tally.latency.len(), tally.answered()), (2, 6));
        let errors = [("absent", 1), ("full", 2), ("wrong-value", 1)];
        assert_eq!(
            tally.errors,
            errors.map(|(word, n)| (word.into(), n)).into()
        );
    }

    #[tokio::test]
    async fn a_connection_that_breaks_leaves_errors_behind() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = [listener.local_addr().unwrap().to_string()];
        let load = load("set --connections 1 --depth 7 --keys 20");
        let mut bench = Bench::connect(&load, &at, || Guest::Set).await.unwrap();
        let node = async {
            let mut stream = listener.accept().await.unwrap().0;
            stream.read_u8().await.unwrap();
        };
        let (report, ()) = tokio::join!(bench.run(Phase::Fill), node);
        assert_eq!(report.operations, 0);
        assert_eq!(report.errors, [("disconnected".to_owned(), 7)].into());
    }
}

//! `lock`: a command that runs while it alone holds a key.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::future::pending;
use std::io::{self, ErrorKind, IsTerminal as _};
use std::os::unix::process::ExitStatusExt as _;
use std::pin::pin;
use std::process::{self, Command, ExitCode};
use std::time::Duration;

use clap::Args;
use futures::FutureExt as _;
use futures::stream::{FuturesUnordered, StreamExt as _};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::{Failure, Options, Outcome, keys, remark, text, typed_key};
use crate::beyond::swap::Swapped;
use crate::client::Client;
use crate::entry::Packed;
use crate::error::{Error, Kind};
use crate::node;
use crate::replicas::Replicas;
use crate::rpc::tls;

/// The first pause before a key is looked at again, and the longest.
const PAUSES: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(250)];

/// What is said while it cannot be taken, though nobody holds it.
const TRIES: &str = "cannot lock yet";

/// Run a command while holding a key: of all that lock it, one at a time.
///
/// kv54 waits until the key is absent, writes its holder there (user, host, process and a random number), runs the
/// command, and deletes the key. Its exit code is the command's. The signals HUP, INT, QUIT and TERM go to the command
/// (INT and QUIT not where a terminal is there, which sends Ctrl-C to both). The command finds the holder in KV54_LOCK.
/// While too few nodes answer, kv54 goes on trying to take the key, or to delete it; --timeout limits each of the two.
///
/// The key stays taken if kv54 itself is killed (kill -9) or its host fails, or if it gives up (and says so). `kv54 get
/// KEY` shows who holds it. When that process is gone, `kv54 cas KEY HOLDER --delete` frees it.
#[derive(Args)]
#[command(after_help = "Examples:
  kv54 lock nightly -- ./backup.sh
  kv54 lock nightly --timeout 0s -- ./backup.sh     (gives up at once where it is taken)

Exit codes:
  3         the lock was not taken, or not ours in the end where the command exits with 0
  126, 127  the command cannot be started, or is not found
  128 + n   signal n ended the command, or the waiting
  others    the command's own")]
pub(super) struct Lock {
    /// The key; nothing else may write it
    #[arg(allow_negative_numbers = true, value_parser = typed_key())]
    key: OsString,
    /// The key ends by itself after this time (10s, 5m), and kv54 renews it while the command runs: so it does
    /// not stay taken if kv54 is killed. If it cannot be renewed, the command gets a TERM, but nothing that it has
    /// started does: `sh -c 'exec …'` for a shell with one command
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    ttl: Option<Duration>,
    /// The command and its arguments, behind --
    #[arg(required = true, last = true)]
    command: Vec<OsString>,
}

/// What holds the key while the command runs, and how it is reached.
struct Held<'a> {
    client: Client,
    key: Vec<u8>,
    holder: String,
    ttl: Option<Duration>,
    options: &'a Options,
}

impl Lock {
    pub(super) async fn run(self, options: &Options) -> Outcome {
        let cluster = options.cluster()?;
        let dial = tls::dial(&cluster)?;
        let held = Held {
            // --timeout is for the waiting: what holds a key asks as long as a node does.
            client: Client {
                replicas: Replicas::new(cluster, node::TIMEOUT, &dial),
            },
            key: self.key.into_encoded_bytes(),
            holder: holder(),
            ttl: self.ttl,
            options,
        };
        held.lasting()?; // a time that is none is said at once
        let mut signals = Signals::new()?; // before the key is taken: none may end this process then
        let taken = held.take(&mut signals).await?;
        let code = run(&self.command, &held, taken, &mut signals).await;
        match (code, held.release(&mut signals).await) {
            (code, Ok(())) => Ok(ExitCode::from(code?)),
            (Ok(0), Err(failure)) => Err(failure),
            (code, Err(failure)) => {
                remark(failure.why);
                Ok(ExitCode::from(code?))
            }
        }
    }
}

impl Held<'_> {
    /// Waits until the key is absent, and takes it; since when it lasts at least.
    async fn take(&self, signals: &mut Signals) -> Result<Instant, Failure> {
        let (mut waiting, key) = (self.begin_waiting(), self.quoted_key());
        let mut may_be_ours = false;
        let taken = loop {
            let begun = Instant::now();
            let looked = self.look(waiting.deadline, signals).await;
            let looked = looked.map_err(|ended| self.hinted(ended, may_be_ours))?;
            let (what, why) = match self.try_once(looked).await {
                Ok(None) if self.ttl.is_none_or(|ttl| begun.elapsed() < ttl) => break begun,
                Ok(None) if waiting.is_over() => {
                    let why = format!("lock failed: to take {key} takes longer than it lasts");
                    return Err(Failure { code: 3, why });
                }
                Ok(None) => (TRIES, "it takes longer than it lasts".to_owned()),
                Ok(Some(current)) => {
                    may_be_ours = false;
                    let current = text::quoted(&current.value()?);
                    if waiting.is_over() {
                        let why = format!("lock failed: {current} still holds {key}");
                        return Err(Failure { code: 3, why });
                    }
                    ("waiting", format!("{current} holds {key}"))
                }
                Err(error) => {
                    may_be_ours |= error.kind == Kind::UnknownOutcome;
                    if !may_get_better(&error) || waiting.is_over() {
                        return Err(self.failed("lock", error, may_be_ours).await);
                    }
                    (TRIES, error.to_string())
                }
            };
            if let Some(kind) = waiting.pause(what, &why, signals).await {
                return Err(self.hinted(ended_by(kind, &why), may_be_ours));
            }
        };
        self.unless_ended(taken, signals).await
    }

    /// Frees the key again, if a signal came while it was taken.
    async fn unless_ended(
        &self,
        taken: Instant,
        signals: &mut Signals,
    ) -> Result<Instant, Failure> {
        let Some(kind) = signals.next().now_or_never() else {
            return Ok(taken);
        };
        self.release(signals).await?;
        Err(ended_by(kind, "the key is free again"))
    }

    fn begin_waiting(&self) -> Waiting {
        let [pause, _] = PAUSES;
        Waiting {
            deadline: self.options.timeout.map(|timeout| Instant::now() + timeout),
            pause,
            told: "",
        }
    }

    /// Who holds the key, or the end by a signal. A get is in the way of no swap, and nothing is lost where it is dropped.
    async fn look(
        &self,
        deadline: Option<Instant>,
        signals: &mut Signals,
    ) -> Result<Result<Packed, Error>, Failure> {
        let (replicas, now) = (&self.client.replicas, Instant::now());
        let longest = now + replicas.timeout;
        let shortest = longest.min(now + replicas.cluster().limits.window); // also where nobody waits
        let until = deadline.unwrap_or(longest).clamp(shortest, longest);
        let get = async {
            let newest = replicas.of_until(&self.key, until)?.get().await;
            Ok(newest.map_err(Error::of_read)?.entry.value.plain())
        };
        tokio::select! {
            current = get => Ok(current),
            kind = signals.next() => Err(ended_by(kind, "its holder was being asked for")),
        }
    }

    /// Takes the key if it was absent. The value of another holder, if it is not ours then.
    async fn try_once(&self, looked: Result<Packed, Error>) -> Result<Option<Packed>, Error> {
        let (mut current, ours) = (looked?, Packed::of(&*self.holder));
        if current.is_nil() || current == ours {
            current = match self.swap(&Packed::default(), &self.lasting()?).await? {
                Swapped::Done(current) | Swapped::Not(current) => current,
            };
        }
        Ok(Some(current).filter(|current| *current != ours))
    }

    /// The holder, with the time to live that begins now.
    fn lasting(&self) -> Result<Packed, Error> {
        let ours = Packed::of(&*self.holder);
        match self.ttl {
            Some(ttl) => self.client.lasting(&ours, ttl),
            None => Ok(ours),
        }
    }

    /// Renews the key again and again, until it is not ours any more; why.
    async fn renew(&self, taken: Instant) -> &str {
        let Some(ttl) = self.ttl else {
            return pending().await;
        };
        let (ours, mut end) = (Packed::of(&*self.holder), taken + ttl);
        loop {
            sleep_until(end.min(Instant::now() + ttl / 3)).await;
            let begun = Instant::now();
            let renewed = async { self.swap(&ours, &self.lasting()?).await };
            match timeout_at(end, renewed).await {
                Ok(Ok(Swapped::Done(current))) if current == ours => end = begun + ttl,
                Ok(Ok(Swapped::Done(current) | Swapped::Not(current))) if current.is_nil() => {
                    return "it was deleted, or has ended";
                }
                Ok(Ok(_)) => return "somebody else has written it",
                Ok(Err(error)) if begun < end => log::debug!("not renewed yet: {error}"),
                _ => return "it could not be renewed in time",
            }
        }
    }

    /// Deletes the key, if it is still ours. Who gives up leaves it taken.
    async fn release(&self, signals: &mut Signals) -> Result<(), Failure> {
        let (mut waiting, ours) = (self.begin_waiting(), Packed::of(&*self.holder));
        if let Some(ttl) = self.ttl {
            let ends = Instant::now() + ttl; // by itself
            waiting.deadline = Some(waiting.deadline.map_or(ends, |deadline| deadline.min(ends)));
        }
        let current = loop {
            match self.swap(&ours, &Packed::default()).await {
                Ok(Swapped::Done(_)) => return Ok(()),
                Ok(Swapped::Not(current)) => break current,
                Err(error) => {
                    let gives_up = !may_get_better(&error) || waiting.is_over();
                    let why = error.to_string();
                    if gives_up
                        || waiting
                            .pause("cannot unlock yet", &why, signals)
                            .await
                            .is_some()
                    {
                        return Err(self.failed("unlock", error, true).await);
                    }
                }
            }
        };
        let now = match current.is_nil() {
            true => "is absent".to_owned(),
            false => format!("has {}", text::quoted(&current.value()?)),
        };
        let key = self.quoted_key();
        let why = format!("the lock was lost while the command ran: {key} {now}, not our holder");
        Err(Failure { code: 3, why })
    }

    /// Replaces one value by another, which has a time to live of its own also if it is there already.
    /// Where the outcome is unknown it swaps again, and writes anew what it finds: after that, what was sent
    /// before cannot be made any more. `Done` with another value than this one: it was done, or it never will
    /// be, and this is there now. This process coordinates, so that no node goes on trying for it.
    async fn swap(&self, from: &Packed, to: &Packed) -> Result<Swapped, Error> {
        let mut unknown = None;
        loop {
            let mut change = |old: &Packed, _| match old.clone().plain() {
                plain if plain == *from || !plain.is_nil() && plain == to.clone().plain() => {
                    Some(to.clone())
                }
                _ => unknown.is_some().then(|| old.clone()),
            };
            let operation = self.client.replicas.of(&self.key)?;
            let swapped = operation.swap(&mut change, true).await;
            self.client.replicas.settle().await;
            match swapped {
                Err(error) if error.kind == Kind::UnknownOutcome => unknown = Some(error),
                Err(error) => return Err(unknown.unwrap_or(error)),
                Ok(ended) => return Ok(ended.into()),
            }
        }
    }

    async fn failed(&self, what: &str, error: Error, may_be_ours: bool) -> Failure {
        let failure = keys::failed(what, error, self.options).await;
        self.hinted(failure, may_be_ours)
    }

    /// Says how the key becomes free again, if it may stay taken.
    fn hinted(&self, failure: Failure, may_be_ours: bool) -> Failure {
        match may_be_ours {
            true => failure.with(format!(
                "if the key stays taken, kv54 cas {} {} --delete frees it",
                self.quoted_key(),
                self.holder
            )),
            false => failure,
        }
    }

    fn quoted_key(&self) -> String {
        text::quoted(&text::typed(self.key.clone()))
    }
}

/// Waiting for a key, or for nodes.
struct Waiting {
    deadline: Option<Instant>,
    pause: Duration,
    told: &'static str,
}

impl Waiting {
    fn is_over(&self) -> bool {
        self.deadline
            .is_some_and(|deadline| Instant::now() >= deadline)
    }

    /// Says once why, and waits for a moment, or for a signal.
    async fn pause(
        &mut self,
        what: &'static str,
        why: &str,
        signals: &mut Signals,
    ) -> Option<SignalKind> {
        if self.told != what {
            remark(format!("{what}: {why}"));
            self.told = what;
        }
        // Not in step with others that wait.
        let until = Instant::now() + self.pause.mul_f32(0.5 + fastrand::f32() / 2.0);
        let [_, longest] = PAUSES;
        self.pause = longest.min(self.pause * 2);
        let until = self.deadline.map_or(until, |deadline| until.min(deadline));
        tokio::select! {
            () = sleep_until(until) => None,
            kind = signals.next() => Some(kind),
        }
    }
}

/// Whether it may be known or done at another time.
fn may_get_better(error: &Error) -> bool {
    use Kind::{Joining, Unavailable, UnknownOutcome};
    matches!(error.kind, Unavailable | Joining | UnknownOutcome)
}

fn ended_by(kind: SignalKind, why: &str) -> Failure {
    let code = code_of(kind.as_raw_value());
    let why = format!("lock failed: a signal ended the waiting, {why}");
    Failure { code, why }
}

/// Signals that would end this process before it has put right what it has changed.
pub(super) struct Signals(Vec<(SignalKind, Signal)>);

impl Signals {
    pub(super) fn new() -> io::Result<Self> {
        let kinds = [
            SignalKind::hangup(),
            SignalKind::interrupt(),
            SignalKind::quit(),
            SignalKind::terminate(),
        ];
        let kinds = kinds.into_iter().filter(|kind| !is_ignored(*kind));
        let signals = kinds.map(|kind| Ok((kind, signal(kind)?)));
        Ok(Signals(signals.collect::<io::Result<_>>()?))
    }

    pub(super) async fn next(&mut self) -> SignalKind {
        let came = self.0.iter_mut().map(async |(kind, signal)| {
            signal.recv().await;
            *kind
        });
        let next = came.collect::<FuturesUnordered<_>>().next().await;
        match next {
            Some(kind) => kind,
            None => pending().await,
        }
    }
}

/// Whether this process was started so that it ignores a signal, as `nohup` does: its command does too.
fn is_ignored(kind: SignalKind) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    ignored.is_some_and(|mask| mask >> (kind.as_raw_value() - 1) & 1 == 1)
}

/// Runs the command to its end, and passes signals on to it; its exit code.
async fn run(
    command: &[OsString],
    held: &Held<'_>,
    taken: Instant,
    signals: &mut Signals,
) -> Result<u8, Failure> {
    let [program, args @ ..] = command else {
        return Err(Failure::usage("there is no command"));
    };
    // Who has started this process may have ignored the ends of its children: their codes would be lost.
    let _ends = signal(SignalKind::child())?;
    let mut command = Command::new(program);
    let spawned = command.args(args).env("KV54_LOCK", &held.holder).spawn();
    let mut child = spawned.map_err(|error| {
        let code = match error.kind() {
            ErrorKind::NotFound => 127,
            _ => 126,
        };
        let why = format!("{}: {error}", program.to_string_lossy());
        Failure { code, why }
    })?;
    let pid = child.id();
    let mut ended = spawn_blocking(move || child.wait());
    let mut lost = pin!(held.renew(taken).fuse());
    loop {
        tokio::select! {
            status = &mut ended => {
                let status = status.map_err(io::Error::from)??;
                let signal = status.signal().map(code_of);
                let code = status.code().and_then(|code| u8::try_from(code).ok());
                return Ok(code.or(signal).unwrap_or(u8::MAX));
            }
            kind = signals.next() => pass_on(kind, pid),
            why = &mut lost => {
                pass_on(SignalKind::terminate(), pid); // first: who reads what is said may have stalled
                remark(format!("the lock is lost: {why}; the command gets a TERM"));
            }
        }
    }
}

/// Sends a signal to the command.
fn pass_on(kind: SignalKind, pid: u32) {
    let is_typed = [SignalKind::interrupt(), SignalKind::quit()].contains(&kind);
    if is_typed && (io::stdin().is_terminal() || io::stderr().is_terminal()) {
        return; // the terminal itself has sent Ctrl-C to the command too
    }
    let kill = format!("kill -{} {pid}", kind.as_raw_value()); // std has no call for it
    let _ = Command::new("sh").args(["-c", &kill]).status();
}

/// The exit code of what a signal has ended, as shells have it.
fn code_of(signal: i32) -> u8 {
    u8::try_from(128 + signal).unwrap_or(u8::MAX)
}

/// A value that only this process writes, and that needs no quotes in a shell.
fn holder() -> String {
    let user = env::var("USER").or_else(|_| env::var("LOGNAME"));
    let user = user.unwrap_or_else(|_| "someone".to_owned());
    let host = hostname::get().unwrap_or_default();
    let (host, pid, random) = (host.to_string_lossy(), process::id(), fastrand::u64(..));
    let is_plain = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
    let [user, host] = [&*user, &*host].map(|name| name.replace(|c| !is_plain(c), "_"));
    format!("{user}@{host}:{pid}:{random:016x}")
}

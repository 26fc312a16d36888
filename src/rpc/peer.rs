//! One connection to one node, shared by all that ask it something.
//! It is made when the first question comes, made again after it broke, and replaced by a fresh
//! one where it has fallen silent and the fresh one can be made.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use futures::future::OptionFuture;
use futures::task::AtomicWaker;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::Notify;
use tokio::task::yield_now;
use tokio::time::{Instant, sleep, timeout};

use super::codec::{Codec, Encoded, MESSAGE, Response, quoted, string, write_request};
use super::{Connecting, Connection, Dial, connected, lock};
use crate::cluster::Node;
use crate::error::{Error, Kind};

/// A question unanswered for this long wakes its asker, which may then ask another replica too.
pub const HEDGE: Duration = Duration::from_millis(10);
/// How long a node that did not answer in time is asked last.
const SUSPICION: Duration = Duration::from_secs(1);
/// How long a node that had no memory for a set is asked first by the next ones.
const FULL: Duration = Duration::from_secs(1);
/// How long a node that was still joining is asked last, but for those that are late.
const JOINING: Duration = Duration::from_secs(1);
/// How long a node that could not be dialled is not dialled again.
const REDIAL: Duration = Duration::from_millis(50);
/// A connection that is silent for this long, and for twice the time that its last answer took, may
/// have lived through a cut: TCP sends again only after as long as the cut was. It is dialled afresh.
const STALE: Duration = Duration::from_millis(250);
/// How long a question of an operation may stay open, however much comes: nobody waits for it longer,
/// and what waits behind it would come late too.
const LONGEST: Duration = Duration::from_secs(5);
/// Unsent questions, in bytes, that are sent at once. With less, a write waits one round for more.
const BATCH: usize = 1 << 10;
/// Unsent questions, in bytes; more are refused.
const MAX_OUTBOX: usize = 64 << 20;
/// How a node with certificates begins its answer to a plain question.
const TLS_ALERT: [u8; 2] = [21, 3];

/// A node that can be asked. Cloning it gives another handle on the same connection, which ends with the last
/// handle, once its questions are answered.
#[derive(Clone)]
pub struct Peer(Arc<Lines>);

struct Lines {
    newest: Mutex<Arc<Line>>,
}

impl Drop for Lines {
    fn drop(&mut self) {
        lock(&self.newest).to_watch.notify_one();
    }
}

/// A connection, and the questions on it. One that was replaced is read until they are answered.
struct Line {
    node: Node,
    dial: Dial,
    patience: Duration,
    longest: Duration, // that a question may stay open
    state: Mutex<State>,
    out_of_turn: AtomicBool, // maybe, being late, full or joining: only then is the state looked at for that
    to_write: Notify,
    to_watch: Notify,
}

#[derive(Default)]
struct State {
    running: bool, // a task dials, reads and writes
    outbox: Vec<u8>,
    first: u32,                    // the msgid of the oldest question
    questions: VecDeque<Question>, // by msgid; the oldest one is open
    suspect_until: Option<Instant>,
    full_until: Option<Instant>,
    joining_until: Option<Instant>,
    heard: Option<Instant>, // when bytes last arrived, or the dial ended; not while it is dialled
    received: usize,        // bytes since somebody asked for it
    took: Option<Duration>, // to the last answer
    down: Option<(Instant, Error)>, // not dialled before then, and why
}

/// A node's turn among those that are asked: the lowest comes first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Turn {
    /// A moment ago it had no memory for a set, and may refuse the next.
    Full,
    /// Nothing is known that speaks against it.
    Usual,
    /// A moment ago it was still joining.
    Joining,
    /// A moment ago it was late or out of reach.
    Late,
}

/// When an open question was asked, and where its answer goes. It stays open until the answer has
/// come or the connection has ended, also if the asker has gone: only so is a silent peer noticed.
type Question = Option<(Instant, Arc<Slot>)>;

/// Where an asker waits for its answer.
#[derive(Default)]
struct Slot {
    answer: Mutex<Option<Arrived>>,
    asker: AtomicWaker,
}

/// When an answer had arrived, and the answer.
type Arrived = (Instant, Result<Encoded, Error>);

impl Peer {
    /// This node, as the file has it. A dial takes `patience` at most, and a connection from which
    /// no byte came for that long while a question is open is given up.
    pub fn new(node: &Node, patience: Duration, dial: Dial) -> Self {
        let longest = patience.max(LONGEST);
        Peer::on(Line::new(node.clone(), patience, longest, dial))
    }

    fn on(line: Arc<Line>) -> Self {
        Peer(Arc::new(Lines {
            newest: Mutex::new(line),
        }))
    }

    /// The same where an answer may take as long as it comes.
    pub(crate) fn apart(node: &Node, patience: Duration, dial: Dial) -> Self {
        Peer::on(Line::new(node.clone(), patience, Duration::MAX, dial))
    }

    /// The node has this address from now on. What was asked at another one is still answered there.
    pub fn move_to(&self, address: &str) {
        let mut line = lock(&self.0.newest);
        if line.node.address != address {
            let (address, name) = (address.to_owned(), line.node.name.clone());
            let fresh = line.afresh(Node { name, address });
            std::mem::replace(&mut *line, fresh).to_watch.notify_one();
        }
    }

    /// Asks. The question is on its way when this returns. The answer takes as long as bytes
    /// arrive: an asker that cannot wait so long has a bound of its own. Each of `params`, 15 at most,
    /// is a value as MessagePack.
    pub fn call(&self, method: &str, params: &[&[u8]]) -> Call {
        let count = u8::try_from(params.len()).unwrap_or(0x0f);
        self.call_in_pieces(method, count, params)
    }

    /// Asks, and takes no answer that comes later than `patience`, however slowly bytes arrive.
    pub async fn ask(&self, method: &str, params: &[&[u8]]) -> Result<Encoded, Error> {
        let patience = lock(&self.0.newest).patience;
        // Where no byte comes, the line ends first, and says so with the address.
        self.call(method, params).within(patience + 2 * HEDGE).await
    }

    /// The same with parameters that lie in any number of pieces.
    pub(crate) fn call_in_pieces(&self, method: &str, params: u8, pieces: &[&[u8]]) -> Call {
        let line = lock(&self.0.newest);
        let mut state = lock(&line.state);
        let now = Instant::now();
        let refused = match &state.down {
            Some((until, why)) if now < *until => Some(why.clone()),
            _ => line.too_much(&state, pieces),
        };
        let slot = Arc::<Slot>::default();
        if let Some(error) = refused {
            slot.answer((now, Err(error)));
            return Call(slot);
        }
        if state.questions.is_empty() {
            line.to_watch.notify_one();
        }
        if state.outbox.is_empty() {
            line.to_write.notify_one();
        }
        let place = u32::try_from(state.questions.len()).unwrap_or(u32::MAX);
        let id = state.first.wrapping_add(place);
        write_request(&mut state.outbox, id, method, params, pieces);
        state.questions.push_back(Some((now, slot.clone())));
        let idle = !std::mem::replace(&mut state.running, true);
        drop(state);
        if idle {
            line.clone()
                .start(Arc::downgrade(&self.0), (line.dial)(&line.node));
        }
        Call(slot)
    }

    /// The turn of this node among those who are asked.
    pub fn turn(&self, now: Instant) -> Turn {
        let line = lock(&self.0.newest);
        if !line.out_of_turn.load(Relaxed) {
            return Turn::Usual;
        }
        let state = lock(&line.state);
        let until = [state.suspect_until, state.full_until, state.joining_until];
        let turn = match until.map(|until| until > Some(now)) {
            [true, ..] => Turn::Late,
            [_, true, _] => Turn::Full,
            [.., true] => Turn::Joining,
            _ => Turn::Usual,
        };
        line.out_of_turn.store(turn != Turn::Usual, Relaxed);
        turn
    }

    /// Whether anything has come from it since then.
    pub fn is_heard_since(&self, since: Option<Instant>) -> bool {
        lock(&lock(&self.0.newest).state).heard > since
    }

    /// Whether a question is still on its way.
    pub fn is_busy(&self) -> bool {
        !lock(&lock(&self.0.newest).state).questions.is_empty()
    }

    /// How many bytes came since this was last asked.
    pub fn take_received(&self) -> usize {
        std::mem::take(&mut lock(&lock(&self.0.newest).state).received)
    }
}

impl Line {
    fn new(node: Node, patience: Duration, longest: Duration, dial: Dial) -> Arc<Self> {
        Arc::new(Line {
            node,
            dial,
            patience,
            longest,
            state: Mutex::default(),
            out_of_turn: AtomicBool::new(false),
            to_write: Notify::new(),
            to_watch: Notify::new(),
        })
    }

    /// The same, perhaps at another address, without a connection and without questions.
    fn afresh(&self, node: Node) -> Arc<Self> {
        Line::new(node, self.patience, self.longest, self.dial.clone())
    }

    fn too_much(&self, state: &State, pieces: &[&[u8]]) -> Option<Error> {
        let size = 64 + pieces.iter().map(|piece| piece.len()).sum::<usize>();
        if size > MESSAGE.bytes {
            let most = MESSAGE.bytes;
            let why = format!("a request of {size} bytes, at most {most} are taken");
            return Some(Error::too_large(why));
        }
        (state.outbox.len() + size > MAX_OUTBOX)
            .then(|| self.trouble(Kind::Unavailable, "takes nothing any more"))
    }

    fn trouble(&self, kind: Kind, why: impl std::fmt::Display) -> Error {
        Error::new(kind, format!("{}: {why}", self.node.address))
    }

    /// Connects, reads, writes and watches the clock until something breaks.
    fn start(self: Arc<Self>, lines: Weak<Lines>, dial: Connecting) {
        // Not in the task: a runtime that ends may drop that before it begins.
        let end = End {
            line: self,
            sent: true,
            why: io::Error::other("the runtime that kept this connection is gone"),
        };
        tokio::spawn(async move {
            let mut end = end;
            let line = end.line.clone();
            (end.sent, end.why) = tokio::select! {
                biased;
                broken = line.converse(dial) => broken,
                silent = line.watch(&lines) => (true, silent),
            };
        });
    }

    /// What broke the connection, and whether questions may have been sent on it.
    async fn converse(&self, dial: Connecting) -> (bool, io::Error) {
        let dialled = timeout(self.patience, dial).await;
        let (from, to) = match dialled.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(stream) => tokio::io::split(stream),
            Err(error) => return (false, error),
        };
        lock(&self.state).heard = Some(Instant::now());
        let Err(broken) = tokio::select! {
            biased;
            broken = self.read(from) => broken,
            broken = self.write(to) => broken,
        };
        (true, broken)
    }

    async fn write(&self, mut to: impl AsyncWrite + Unpin) -> io::Result<Infallible> {
        let mut batch = Vec::new();
        loop {
            self.to_write.notified().await;
            if lock(&self.state).outbox.len() < BATCH {
                yield_now().await; // other tasks that are ready now ask too: one write for all
            }
            std::mem::swap(&mut batch, &mut lock(&self.state).outbox);
            to.write_all(&batch).await?;
            to.flush().await?;
            batch.clear();
            batch.shrink_to(MESSAGE.bytes);
        }
    }

    async fn read(&self, mut from: impl AsyncRead + Unpin) -> io::Result<Infallible> {
        let (mut codec, mut input) = (Codec::default(), BytesMut::new());
        loop {
            input.reserve(input.len().clamp(16 << 10, 256 << 10));
            let count = from.read_buf(&mut input).await?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let arrived = Instant::now(); // after the bytes: the window must not count them early
            let mut state = lock(&self.state); // once for all answers that came together
            (state.heard, state.received) = (Some(arrived), state.received + count);
            loop {
                match codec.next(&input) {
                    Ok(Some(end)) => {
                        let message = input.get(..end).unwrap_or_default();
                        let response = Response::read(message).map_err(io::Error::other)?;
                        self.answered(&response, arrived, &mut state)?;
                        input.advance(end);
                    }
                    Ok(None) => break,
                    Err(_) if input.starts_with(&TLS_ALERT) => {
                        return Err(io::Error::other("it speaks TLS; see [tls] in cluster.toml"));
                    }
                    Err(malformed) => return Err(io::Error::other(malformed.error)),
                }
            }
        }
    }

    /// Wakes askers whose answer is late, dials beside a silent connection, and returns once it was
    /// silent for too long, or was replaced or let go and has no questions left.
    async fn watch(self: &Arc<Self>, lines: &Weak<Lines>) -> io::Error {
        let (mut beside, mut dial_from): (Option<Connecting>, _) = (None, Instant::now());
        loop {
            let now = Instant::now();
            let is_newest = |lines: Arc<Lines>| Arc::ptr_eq(self, &lock(&lines.newest));
            let replaced = !lines.upgrade().is_some_and(is_newest);
            let Some((silent, stale)) = self.wake_late(now) else {
                if replaced {
                    return io::ErrorKind::ConnectionAborted.into();
                }
                beside = None;
                self.to_watch.notified().await;
                continue;
            };
            if silent >= self.patience {
                return io::ErrorKind::TimedOut.into();
            }
            if replaced || !stale {
                beside = None;
            } else if beside.is_none() && now >= dial_from {
                beside = Some((self.dial)(&self.node));
            }
            tokio::select! {
                biased;
                Some(dialled) = OptionFuture::from(beside.as_mut()) => {
                    (beside, dial_from) = (None, now + REDIAL);
                    if let Ok(stream) = dialled {
                        self.replace(lines, stream);
                    }
                }
                () = sleep(HEDGE) => {}
            }
        }
    }

    /// Asks what comes next on a fresh connection, unless the node has moved meanwhile.
    fn replace(self: &Arc<Self>, lines: &Weak<Lines>, stream: Box<dyn Connection>) {
        let Some(kept) = lines.upgrade() else {
            return;
        };
        let mut newest = lock(&kept.newest);
        if Arc::ptr_eq(self, &newest) {
            *newest = self.afresh(self.node.clone());
            lock(&newest.state).running = true;
            newest.clone().start(lines.clone(), connected(stream));
        }
    }

    /// Wakes askers that have waited longer than [`HEDGE`]. Says how long the connection has been
    /// silent while a question was open, and whether that is longer than it usually is.
    fn wake_late(&self, now: Instant) -> Option<(Duration, bool)> {
        let mut state = lock(&self.state);
        let (oldest, _) = state.questions.front()?.as_ref()?;
        let oldest = *oldest;
        if now - oldest >= HEDGE {
            state.suspect_until = Some(now + SUSPICION);
            self.out_of_turn.store(true, Relaxed);
        }
        let open = state.questions.iter().flatten();
        let late = open.take_while(|(asked, _)| now - *asked >= HEDGE);
        late.for_each(|(_, slot)| slot.asker.wake());
        // A dial has a bound of its own, and its end says that nothing was sent.
        let since = |heard: Instant| match now - oldest < self.longest {
            true => now - heard.max(oldest),
            false => self.patience,
        };
        let silent = state.heard.map(since).unwrap_or_default();
        // One that never answered is not stale: dialling once more would change nothing.
        let unusual = |took: Duration| silent >= STALE.max(2 * took);
        Some((silent, state.took.is_some_and(unusual)))
    }

    fn answered(&self, response: &Response, arrived: Instant, state: &mut State) -> io::Result<()> {
        let answer = match (response.result, response.result.err().and_then(string)) {
            (Ok(result), _) => Ok(Encoded::from_slice(result)),
            (_, Some(text)) => Err(Error::parse(&String::from_utf8_lossy(text))),
            (Err(odd), None) => Err(self.trouble(Kind::UnknownOutcome, quoted(odd))),
        };
        let place = response.id.wrapping_sub(state.first) as usize;
        let question = state.questions.get_mut(place).and_then(Option::take);
        let unasked = || io::Error::other("an answer, and nothing was asked"); // or a second one
        let (asked, slot) = question.ok_or_else(unasked)?;
        state.took = Some(arrived - asked);
        while let Some(None) = state.questions.front() {
            state.questions.pop_front();
            state.first = state.first.wrapping_add(1);
        }
        state.suspect_until = None;
        if let Err(error) = &answer {
            match error.kind {
                Kind::Full => state.full_until = Some(arrived + FULL),
                Kind::Joining => state.joining_until = Some(arrived + JOINING),
                _ => {}
            }
            self.out_of_turn.store(true, Relaxed);
        }
        slot.answer((arrived, answer));
        Ok(())
    }
}

/// The end of a connection: no question that was asked on it will be answered any more.
/// The askers are told however the end comes, also when a runtime drops its tasks.
struct End {
    line: Arc<Line>,
    sent: bool, // otherwise the dial failed
    why: io::Error,
}

impl Drop for End {
    fn drop(&mut self) {
        // What was never sent was not carried out. What was sent may have been.
        let kind = match self.sent {
            true => Kind::UnknownOutcome,
            false => Kind::Unavailable,
        };
        let why = self.line.trouble(kind, explain(&self.why));
        let mut state = lock(&self.line.state);
        let now = Instant::now();
        let open = std::mem::take(&mut state.questions);
        state.running = false;
        state.outbox = Vec::new();
        state.heard = None;
        state.suspect_until = Some(now + SUSPICION);
        self.line.out_of_turn.store(true, Relaxed);
        state.down = (!self.sent).then(|| (now + REDIAL, why.clone()));
        drop(state);
        for (_, slot) in open.into_iter().flatten() {
            slot.answer((now, Err(why.clone())));
        }
    }
}

/// A question on its way. Ready with the moment when the answer had arrived, and the
/// answer. Wakes its task too when the answer is late.
pub struct Call(Arc<Slot>);

impl Call {
    /// The answer, if it comes within this time. A late call wakes its task: no timer is needed.
    pub async fn within(mut self, most: Duration) -> Result<Encoded, Error> {
        let asked = Instant::now();
        let late = || Error::new(Kind::UnknownOutcome, "no answer in time");
        let poll = |context: &mut Context<'_>| match Pin::new(&mut self).poll(context) {
            Poll::Ready((_, answer)) => Poll::Ready(answer),
            Poll::Pending if asked.elapsed() < most => Poll::Pending,
            Poll::Pending => Poll::Ready(Err(late())),
        };
        poll_fn(poll).await
    }
}

impl Future for Call {
    type Output = Arrived;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Arrived> {
        self.0.asker.register(context.waker()); // before the look: no answer comes unseen between
        let answer = lock(&self.0.answer).take();
        answer.map_or(Poll::Pending, Poll::Ready)
    }
}

impl Slot {
    fn answer(&self, arrived: Arrived) {
        *lock(&self.answer) = Some(arrived);
        self.asker.wake();
    }
}

/// The cause of a broken connection in a person's words, without the system's error numbers.
fn explain(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "connection refused".into(),
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => "connection reset".into(),
        io::ErrorKind::UnexpectedEof => "connection closed".into(),
        io::ErrorKind::TimedOut => "no answer in time".into(),
        io::ErrorKind::HostUnreachable => "no route to this host".into(),
        io::ErrorKind::NetworkUnreachable => "network unreachable".into(),
        _ => error.to_string(),
    }
}

//! One connection to one node, shared by all that ask it something.
//! It is made when the first question comes and made again after it broke.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use futures::task::AtomicWaker;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::Notify;
use tokio::task::yield_now;
use tokio::time::{Instant, sleep, timeout};

use super::codec::{Codec, Encoded, MESSAGE, Response, quoted, string, write_request};
use super::{Dial, lock};
use crate::cluster::Node;
use crate::error::{Error, Kind};

/// A question unanswered for this long wakes its asker, which may then ask another replica too.
pub const HEDGE: Duration = Duration::from_millis(10);
/// How long a node that did not answer in time is asked last.
const SUSPICION: Duration = Duration::from_secs(1);
/// How long a node that had no memory for a set is asked first by the next ones.
const FULL: Duration = Duration::from_secs(1);
/// How long a node that could not be dialled is not dialled again.
const REDIAL: Duration = Duration::from_millis(50);
/// Unsent questions, in bytes, that are sent at once. With less, a write waits one round for more.
const BATCH: usize = 1 << 10;
/// Unsent questions, in bytes; more are refused.
const MAX_OUTBOX: usize = 64 << 20;
/// How a node with certificates begins its answer to a plain question.
const TLS_ALERT: [u8; 2] = [21, 3];

/// A node that can be asked. Cloning it gives another handle on the same connection.
#[derive(Clone)]
pub struct Peer(Arc<Shared>);

struct Shared {
    node: Mutex<Node>,
    dial: Dial,
    patience: Duration,
    state: Mutex<State>,
    to_write: Notify,
    to_watch: Notify,
    to_move: Notify,
}

#[derive(Default)]
struct State {
    running: bool, // a task dials, reads and writes
    outbox: Vec<u8>,
    first: u32,                    // the msgid of the oldest question
    questions: VecDeque<Question>, // by msgid; the oldest one is open
    suspect_until: Option<Instant>,
    full_until: Option<Instant>,
    down: Option<(Instant, Error)>, // not dialled before then, and why
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
    /// This node, as the file has it. A dial takes `patience` at most, and a
    /// connection that leaves a question unanswered for that long is given up.
    pub fn new(node: &Node, patience: Duration, dial: Dial) -> Self {
        Peer(Arc::new(Shared {
            node: Mutex::new(node.clone()),
            dial,
            patience,
            state: Mutex::default(),
            to_write: Notify::new(),
            to_watch: Notify::new(),
            to_move: Notify::new(),
        }))
    }

    /// The node has this address from now on. A connection to another one ends, and the questions
    /// on it with it; the next question dials the new address.
    pub fn move_to(&self, address: &str) {
        address.clone_into(&mut lock(&self.0.node).address);
        self.0.to_move.notify_one();
    }

    /// Asks. The question is on its way when this returns; the answer, or an error, comes
    /// within `patience` of it. Each of `params`, 15 at most, is a value as MessagePack.
    pub fn call(&self, method: &str, params: &[&[u8]]) -> Call {
        let count = u8::try_from(params.len()).unwrap_or(0x0f);
        self.call_in_pieces(method, count, params)
    }

    /// The same with parameters that lie in any number of pieces.
    pub(crate) fn call_in_pieces(&self, method: &str, params: u8, pieces: &[&[u8]]) -> Call {
        let mut state = lock(&self.0.state);
        let now = Instant::now();
        let refused = match &state.down {
            Some((until, why)) if now < *until => Some(why.clone()),
            _ => self.0.too_much(&state, pieces),
        };
        if let Some(error) = refused {
            let slot = Arc::<Slot>::default();
            slot.answer((now, Err(error)));
            return Call(slot);
        }
        if state.questions.is_empty() {
            self.0.to_watch.notify_one();
        }
        if state.outbox.is_empty() {
            self.0.to_write.notify_one();
        }
        let place = u32::try_from(state.questions.len()).unwrap_or(u32::MAX);
        let id = state.first.wrapping_add(place);
        write_request(&mut state.outbox, id, method, params, pieces);
        let slot = Arc::<Slot>::default();
        state.questions.push_back(Some((now, Arc::clone(&slot))));
        if !std::mem::replace(&mut state.running, true) {
            tokio::spawn(self.0.clone().run());
        }
        Call(slot)
    }

    /// The turn of this node among those who are asked, the lowest first. The last one was late or
    /// out of reach a moment ago. The first one had no memory for a set, and may refuse the next.
    pub fn turn(&self, now: Instant) -> u8 {
        let state = lock(&self.0.state);
        match (
            state.suspect_until > Some(now),
            state.full_until > Some(now),
        ) {
            (true, _) => 2,
            (false, false) => 1,
            (false, true) => 0,
        }
    }

    /// Whether a question is still on its way.
    pub fn is_busy(&self) -> bool {
        !lock(&self.0.state).questions.is_empty()
    }
}

impl Shared {
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
        Error::new(kind, format!("{}: {why}", lock(&self.node).address))
    }

    /// Dials, reads, writes and watches the clock until something breaks.
    async fn run(self: Arc<Self>) {
        let gone = io::Error::other("the runtime that kept this connection is gone");
        let mut end = End {
            peer: self.clone(),
            redial: None,
            why: gone,
        };
        let node = lock(&self.node).clone();
        (end.redial, end.why) = tokio::select! {
            biased;
            broken = self.converse(&node) => broken,
            silent = self.watch() => (None, silent),
            moved = self.leave(&node.address) => (None, moved),
        };
    }

    /// Returns once the node has another address than this one.
    async fn leave(&self, address: &str) -> io::Error {
        while lock(&self.node).address == address {
            self.to_move.notified().await;
        }
        io::Error::other("cluster.toml names this address now")
    }

    async fn converse(&self, node: &Node) -> (Option<Duration>, io::Error) {
        let dialled = timeout(self.patience, (self.dial)(node)).await;
        let (from, to) = match dialled.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(stream) => tokio::io::split(stream),
            Err(error) => return (Some(REDIAL), error),
        };
        let Err(broken) = tokio::select! {
            biased;
            broken = self.read(from) => broken,
            broken = self.write(to) => broken,
        };
        (None, broken)
    }

    async fn write(&self, mut to: impl AsyncWrite + Unpin) -> io::Result<Infallible> {
        let mut batch = Vec::new();
        loop {
            self.to_write.notified().await;
            if lock(&self.state).outbox.len() < BATCH {
                yield_now().await; // other tasks that are ready now ask too: one write for all
            }
            batch.clear();
            std::mem::swap(&mut batch, &mut lock(&self.state).outbox);
            to.write_all(&batch).await?;
            to.flush().await?;
            batch.shrink_to(MESSAGE.bytes);
        }
    }

    async fn read(&self, mut from: impl AsyncRead + Unpin) -> io::Result<Infallible> {
        let (mut codec, mut input) = (Codec::default(), BytesMut::new());
        loop {
            input.reserve(input.len().clamp(16 << 10, 256 << 10));
            if from.read_buf(&mut input).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let arrived = Instant::now(); // after the bytes: the window must not count them early
            loop {
                match codec.next(&input) {
                    Ok(Some(end)) => {
                        let response = Response::read(&input).map_err(io::Error::other)?;
                        self.answered(arrived, &response)?;
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

    /// Wakes askers whose answer is late, and returns once one is too late for this connection.
    async fn watch(&self) -> io::Error {
        loop {
            let now = Instant::now();
            match self.wake_late(now) {
                None => self.to_watch.notified().await,
                Some(oldest) if now - oldest >= self.patience => {
                    return io::ErrorKind::TimedOut.into();
                }
                Some(_) => sleep(HEDGE).await,
            }
        }
    }

    /// Wakes askers that have waited longer than [`HEDGE`]; says when the oldest question was asked.
    fn wake_late(&self, now: Instant) -> Option<Instant> {
        let mut state = lock(&self.state);
        let (oldest, _) = state.questions.front()?.as_ref()?;
        let oldest = *oldest;
        if now - oldest >= HEDGE {
            state.suspect_until = Some(now + SUSPICION);
        }
        let open = state.questions.iter().flatten();
        let late = open.take_while(|(asked, _)| now - *asked >= HEDGE);
        late.for_each(|(_, slot)| slot.asker.wake());
        Some(oldest)
    }

    fn answered(&self, arrived: Instant, response: &Response<'_>) -> io::Result<()> {
        let answer = match (response.result, response.result.err().and_then(string)) {
            (Ok(result), _) => Ok(Encoded::from_slice(result)),
            (_, Some(text)) => Err(Error::parse(&String::from_utf8_lossy(text))),
            (Err(odd), None) => Err(self.trouble(Kind::UnknownOutcome, quoted(odd))),
        };
        let mut state = lock(&self.state);
        let place = response.id.wrapping_sub(state.first) as usize;
        let question = state.questions.get_mut(place).and_then(Option::take);
        let unasked = || io::Error::other("an answer, and nothing was asked"); // or a second one
        let (_, slot) = question.ok_or_else(unasked)?;
        while let Some(None) = state.questions.front() {
            state.questions.pop_front();
            state.first = state.first.wrapping_add(1);
        }
        state.suspect_until = None;
        if matches!(&answer, Err(error) if error.kind == Kind::Full) {
            state.full_until = Some(arrived + FULL);
        }
        drop(state);
        slot.answer((arrived, answer));
        Ok(())
    }
}

/// The end of a connection: no question that was asked on it will be answered any more.
/// The askers are told however the end comes, also when a runtime drops its tasks.
struct End {
    peer: Arc<Shared>,
    redial: Option<Duration>, // the dial failed, so nothing was sent: when to dial again
    why: io::Error,
}

impl Drop for End {
    fn drop(&mut self) {
        // What was never sent was not carried out. What was sent may have been.
        let kind = match self.redial {
            Some(_) => Kind::Unavailable,
            None => Kind::UnknownOutcome,
        };
        let why = self.peer.trouble(kind, explain(&self.why));
        let mut state = lock(&self.peer.state);
        let now = Instant::now();
        let open = std::mem::take(&mut state.questions);
        state.running = false;
        state.outbox = Vec::new();
        state.suspect_until = Some(now + SUSPICION);
        state.down = self.redial.map(|pause| (now + pause, why.clone()));
        drop(state);
        for (_, slot) in open.into_iter().flatten() {
            slot.answer((now, Err(why.clone())));
        }
    }
}

/// A question on its way. Ready with the moment when the answer had arrived, and the
/// answer. Wakes its task too when the answer is late.
pub struct Call(Arc<Slot>);

impl Future for Call {
    type Output = Arrived;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Arrived> {
        self.0.asker.register(context.waker()); // before the look: no answer comes unseen between
        lock(&self.0.answer)
            .take()
            .map_or(Poll::Pending, Poll::Ready)
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

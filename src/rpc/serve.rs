//! The loop that answers. All connections of a node live in one task, and all
//! requests of a connection in its own small set: nothing is spawned. What is
//! ready at once is answered in place, and what a batch of requests produced
//! leaves in one write.

use std::future::Future;
use std::io;
use std::panic::AssertUnwindSafe;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use futures::stream::{FuturesUnordered, Stream, StreamExt as _};
use futures::task::AtomicWaker;
use futures::{FutureExt as _, future};
use msgpack_rpc::Value;
use tokio::io::{AsyncReadExt as _, AsyncWrite as _, AsyncWriteExt as _};
use tokio::task::yield_now;
use tokio::time::{Instant, Sleep, sleep, timeout};
use tokio_util::io::poll_read_buf;
use tokio_util::sync::{CancellationToken, ReusableBoxFuture};

use super::codec::{Codec, Malformed, Request, write_response};
use super::{Connection, Service, lock};
use crate::error::{Error, Kind};

/// Requests in flight on one connection; the next one waits in the socket.
const MAX_IN_FLIGHT: usize = 1024;
/// The same in bytes: requests in flight, the answers that they may get, and answers unsent.
const MAX_PENDING: usize = 2 << 20;
/// What an answer may be, in bytes, as long as none has shown it.
const UNKNOWN_ANSWER: usize = 64 << 10;
/// A connection's turn, in bytes that come, go and are held meanwhile; then the others have theirs. Who has
/// taken more sits out as many turns (deficit round robin; Shreedhar, Varghese 1995): a message is not divided.
const TURN: usize = 96 << 10;
/// What a request counts for in a turn beside its bytes.
const REQUEST: usize = 64;
/// How much more a byte of a map counts for: it is made and written value by value.
const NESTED: usize = 8;
/// What a request in flight takes beside its values, in bytes: its future, and its questions.
const FUTURE: usize = 2 << 10;
/// The time an unfinished message may take.
const MAX_DRIP: Duration = Duration::from_secs(10);
/// The time that requests in flight have when the node stops.
const MAX_FAREWELL: Duration = Duration::from_secs(2);
/// The time a connection that was refused has to read why.
const MAX_LINGER: Duration = Duration::from_secs(1);

/// Between two log lines about refused connections.
const REFUSALS: Duration = Duration::from_secs(1);

/// What a server takes from all its connections together.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at once; one more is closed at once.
    pub connections: usize,
    /// Unfinished input, requests in flight and unsent answers, in bytes. At the
    /// limit the connection that holds the most of it is closed.
    pub buffers: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            connections: 1024,
            buffers: 256 << 20,
        }
    }
}

/// Answers every request on every connection until `stop`, then finishes what is in flight.
pub async fn serve<L, S>(mut incoming: L, service: &S, limits: Limits, stop: CancellationToken)
where
    L: Stream<Item = io::Result<Box<dyn Connection>>> + Unpin,
    S: Service,
{
    let buffers = Buffers {
        limit: limits.buffers,
        total: AtomicUsize::new(0),
        shares: Mutex::default(),
    };
    let mut connections = FuturesUnordered::new();
    let mut refused: Option<Instant> = None;
    let mut stopped = pin!(stop.cancelled());
    loop {
        tokio::select! {
            biased;
            () = &mut stopped => break,
            Some(()) = connections.next() => {}
            Some(accepted) = incoming.next() => match accepted {
                Ok(stream) if connections.len() < limits.connections => {
                    connections.push(connection(stream, service, &buffers, stop.clone()));
                }
                // A line for each would be one more thing to be flooded with.
                Ok(_) if refused.is_some_and(|last| last.elapsed() < REFUSALS) => {}
                Ok(_) => {
                    refused = Some(Instant::now());
                    log::warn!("connections are refused: {} are open", limits.connections);
                }
                Err(error) => log::warn!("a connection could not be accepted: {error}"),
            },
            else => break,
        }
    }
    let farewell = async { while connections.next().await.is_some() {} };
    if timeout(MAX_FAREWELL, farewell).await.is_err() {
        log::warn!("stopped with requests in flight");
    }
}

async fn connection<S: Service>(
    stream: Box<dyn Connection>,
    service: &S,
    buffers: &Buffers,
    stop: CancellationToken,
) {
    let mut session = Session {
        stream,
        service,
        codec: Codec::default(),
        input: BytesMut::new(),
        ended: false,
        in_flight: FuturesUnordered::new(),
        spare: None,
        weight: 0,
        output: Vec::new(),
        sent: 0,
        expected: UNKNOWN_ANSWER,
        turn: 0,
        drip: None,
        share: buffers.join(),
    };
    let mut stopped = pin!(stop.cancelled());
    let end = future::poll_fn(|context| {
        session.ended |= stopped.as_mut().poll(context).is_ready();
        session.poll(context)
    });
    // An answer that cannot be delivered is nobody's any more.
    if end.await.is_ok() {
        let _ = timeout(MAX_LINGER, session.linger()).await;
    }
}

/// One connection: what came in, what is being answered, what goes out.
struct Session<'a, S> {
    stream: Box<dyn Connection>,
    service: &'a S,
    codec: Codec,
    input: BytesMut,
    ended: bool, // nothing more is read
    in_flight: FuturesUnordered<ReusableBoxFuture<'a, Answer>>,
    spare: Option<ReusableBoxFuture<'a, Answer>>, // one that is done, for the next: most are ready at once
    weight: usize,                                // of the requests in flight, in bytes
    output: Vec<u8>,
    sent: usize,     // of the output, in bytes
    expected: usize, // of one answer, in bytes: the latest ones were no larger
    turn: usize,     // what has come and gone in it, and what it owes from those before, in bytes
    drip: Option<Pin<Box<Sleep>>>,
    share: Share<'a>,
}

struct Answer {
    id: Option<u32>,
    weight: usize,
    in_step: bool, // what follows the request in the stream is one, too
    result: Result<Value, Error>,
}

impl From<Malformed> for Answer {
    fn from(Malformed { id, in_step, error }: Malformed) -> Self {
        Answer {
            id,
            weight: 0, // it is refused at the first poll, before it is counted
            in_step,
            result: Err(error),
        }
    }
}

impl<S: Service> Session<'_, S> {
    /// Reads until the input runs dry, then writes all that it gave rise to in one go. Ready
    /// when nothing more will be read and everything is answered.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.turn = self.turn.saturating_sub(TURN);
        loop {
            self.take_requests(context);
            let mut full = self.is_full();
            // Also where nobody reads them: an answer is counted here, and nowhere before.
            while let Poll::Ready(Some(answer)) = self.in_flight.poll_next_unpin(context) {
                self.weight -= answer.weight;
                self.reply(answer);
            }
            full |= self.is_full();
            let held = self.input.capacity() + self.output.capacity();
            self.share
                .hold(held + self.weight + self.awaited(), context)?;
            if !self.ended && !self.is_full() && self.turn < TURN {
                self.input
                    .reserve(self.input.len().clamp(16 << 10, 256 << 10));
                let read = poll_read_buf(Pin::new(&mut self.stream), context, &mut self.input);
                if let Poll::Ready(count) = read {
                    let count = count?;
                    self.ended = count == 0;
                    self.turn += count;
                    continue;
                }
            }
            self.poll_drip(full, context);
            ready!(self.poll_write(context))?;
            if self.turn >= TURN {
                // Not woken at once: the network is looked at before this connection again.
                return pin!(yield_now()).poll(context).map(Ok);
            }
            if full && !self.is_full() {
                continue; // there is room again, and nothing else would come back for the rest
            }
            return if self.ended && self.in_flight.is_empty() {
                Poll::Ready(Ok(()))
            } else {
                Poll::Pending
            };
        }
    }

    fn is_full(&self) -> bool {
        let pending = self.weight + self.awaited() + self.unsent();
        self.in_flight.len() >= MAX_IN_FLIGHT || pending >= MAX_PENDING
    }

    /// What the answers to come may take, in bytes, if they are like the latest ones.
    fn awaited(&self) -> usize {
        self.in_flight.len() * self.expected
    }

    fn unsent(&self) -> usize {
        self.output.len() - self.sent
    }

    fn take_requests(&mut self, context: &mut Context<'_>) {
        while !self.is_full() && self.turn < TURN {
            let message = match self.codec.next(&self.input) {
                Ok(Some(end)) => take(&mut self.input, end),
                Ok(None) => break,
                Err(malformed) => return self.reply(malformed.into()),
            };
            self.drip = None;
            let (service, weight) = (self.service, self.codec.weight() + FUTURE);
            self.turn += self.codec.weight() + REQUEST;
            let answer = async move {
                let Request { id, method, params } = match Request::read(&message) {
                    Ok(request) => request,
                    Err(malformed) => return malformed.into(),
                };
                let answer = AssertUnwindSafe(service.answer(method, &params))
                    .catch_unwind()
                    .await;
                Answer {
                    id,
                    weight,
                    in_step: true,
                    result: answer.unwrap_or_else(|_| Err(panicked(method))),
                }
            };
            let mut answering = match self.spare.take() {
                Some(mut spare) => {
                    spare.set(answer);
                    spare
                }
                None => ReusableBoxFuture::new(answer),
            };
            match answering.poll(context) {
                Poll::Ready(answer) => {
                    self.reply(answer);
                    self.spare = Some(answering);
                }
                Poll::Pending => {
                    self.weight += weight;
                    self.in_flight.push(answering);
                }
            }
        }
        if self.input.is_empty() && self.codec.weight() > 64 << 10 {
            self.input = BytesMut::new(); // a large message's buffer is not kept for small ones
        }
    }

    fn reply(&mut self, answer: Answer) {
        if let Some(id) = answer.id {
            let before = self.output.len();
            write_response(&mut self.output, id, &answer.result);
            let size = self.output.len() - before;
            self.turn += match answer.result {
                Ok(Value::Map(_)) => NESTED * size,
                _ => size,
            };
            self.expected = size.max(self.expected - self.expected / 8);
        }
        if let (false, Err(error)) = (answer.in_step, answer.result) {
            self.refuse(error);
        }
    }

    /// Nothing more is read here: the stream cannot be trusted. What is in flight is still answered.
    fn refuse(&mut self, why: impl std::fmt::Display) {
        log::debug!("a connection is closed: {why}");
        self.ended = true;
        self.input = BytesMut::new();
        self.codec = Codec::default();
    }

    /// Gives up on a message that takes longer than [`MAX_DRIP`] to arrive.
    fn poll_drip(&mut self, full: bool, context: &mut Context<'_>) {
        if full || self.input.is_empty() || self.ended {
            self.drip = None;
        } else {
            let drip = self.drip.get_or_insert_with(|| Box::pin(sleep(MAX_DRIP)));
            // Who sits out turns is not slow.
            if drip.as_mut().poll(context).is_ready() && self.turn < TURN {
                self.refuse(format!("a message was unfinished for {MAX_DRIP:?}"));
            }
        }
    }

    fn poll_write(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(unsent @ [_, ..]) = self.output.get(self.sent..) {
            match ready!(Pin::new(&mut self.stream).poll_write(context, unsent))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                count => self.sent += count,
            }
            if self.sent >= MAX_PENDING / 2 {
                self.output.drain(..self.sent); // what a slow reader has read is not held for it
                self.sent = 0;
            }
        }
        if self.sent > 0 {
            self.output.clear();
            self.output.shrink_to(64 << 10);
            self.sent = 0;
        }
        Pin::new(&mut self.stream).poll_flush(context)
    }

    /// Lets the peer read the last answers: closing on unread input would reset the connection.
    async fn linger(&mut self) -> io::Result<()> {
        self.stream.shutdown().await?;
        let mut unread = [0; 4096];
        while self.stream.read(&mut unread).await? > 0 {}
        Ok(())
    }
}

/// Takes a message off the front. A large one keeps the buffer, and what lies behind it gets a new
/// one: two that shared a buffer would hold more than either is counted for.
fn take(input: &mut BytesMut, end: usize) -> BytesMut {
    let (message, rest) = input.split_at_checked(end).unwrap_or_default();
    if end < TURN.max(rest.len()) {
        let message = message.into();
        input.advance(end);
        return message;
    }
    let rest = rest.into();
    let mut message = std::mem::replace(input, rest);
    message.truncate(end);
    message
}

fn panicked(method: &str) -> Error {
    Error::new(
        Kind::UnknownOutcome,
        format!("{method} failed inside the node; its log says where"),
    )
}

/// What all connections of a server hold together, in bytes.
struct Buffers {
    limit: usize,
    total: AtomicUsize,
    shares: Mutex<Vec<Arc<Held>>>,
}

/// What one connection holds of it.
struct Share<'a> {
    buffers: &'a Buffers,
    held: Arc<Held>,
}

#[derive(Default)]
struct Held {
    bytes: AtomicUsize,
    over: AtomicBool,
    waker: AtomicWaker,
}

impl Buffers {
    fn join(&self) -> Share<'_> {
        let held = Arc::new(Held::default());
        lock(&self.shares).push(held.clone());
        Share {
            buffers: self,
            held,
        }
    }

    /// Marks the largest connections until the rest of them fits.
    fn make_room(&self) {
        let mut shares = lock(&self.shares);
        shares.sort_by_key(|held| held.bytes.load(Relaxed));
        let mut total = self.total.load(Relaxed);
        for held in shares.iter().rev() {
            if total <= self.limit {
                break;
            }
            total = total.saturating_sub(held.bytes.load(Relaxed));
            if !held.over.swap(true, Relaxed) {
                held.waker.wake();
            }
        }
    }
}

impl Share<'_> {
    /// Says how much this connection holds now; fails if it is the one to be closed.
    fn hold(&self, bytes: usize, context: &Context<'_>) -> io::Result<()> {
        let before = self.held.bytes.swap(bytes, Relaxed);
        let total = self
            .buffers
            .total
            .fetch_add(bytes.wrapping_sub(before), Relaxed);
        if bytes > before && total + bytes - before > self.buffers.limit {
            self.buffers.make_room();
        }
        self.held.waker.register(context.waker());
        if self.held.over.load(Relaxed) {
            log::warn!(
                "a connection is closed: its {bytes} bytes are the most of all buffers, which are full"
            );
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        Ok(())
    }
}

impl Drop for Share<'_> {
    fn drop(&mut self) {
        self.buffers
            .total
            .fetch_sub(self.held.bytes.load(Relaxed), Relaxed);
        lock(&self.buffers.shares).retain(|held| !Arc::ptr_eq(held, &self.held));
    }
}

//! The loop that answers. All connections of a node live in one task, and all
//! requests of a connection in its own small set: nothing is spawned. What is
//! ready at once is answered in place, and what a batch of requests produced
//! leaves in one write.

use std::future::Future;
use std::io;
use std::panic::AssertUnwindSafe;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use futures::stream::{FuturesUnordered, Stream, StreamExt as _};
use futures::{FutureExt as _, future};
use tokio::io::{AsyncWrite as _, AsyncWriteExt as _};
use tokio::task::yield_now;
use tokio::time::{Sleep, sleep, timeout};
use tokio_util::io::poll_read_buf;
use tokio_util::sync::{CancellationToken, ReusableBoxFuture};

use super::buffers::{Buffers, Share};
use super::codec::{Codec, Malformed, Request, write_response};
use super::meter::{Counted, Meter, Tally};
use super::{Answer, Connecting, Connection, Rarely, Service};
use crate::cluster::Limits;
use crate::error::{Error, Kind};
use crate::methods::AMONG_NODES;

/// Requests in flight on one connection; the next one waits in the socket.
const MAX_IN_FLIGHT: usize = 1024;
/// The same in bytes: requests in flight, the answers that they may get, and answers unsent.
const MAX_PENDING: usize = 2 << 20;
/// What an answer may be, in bytes, as long as none has shown it.
const UNKNOWN_ANSWER: usize = 64 << 10;
/// A connection's turn: so many bytes are read, answered and held, then the other connections have
/// their turns. A message is not divided: a connection that used more than its turn skips as many
/// turns (deficit round robin; Shreedhar, Varghese 1995).
const TURN: usize = 96 << 10;
/// What a request counts for in a turn beside its bytes.
const REQUEST: usize = 64;
/// What a value in it counts for beside its bytes: it is walked over from two to five times.
const VALUE: usize = 8;
/// What a request in flight takes beside its bytes: its future, and its questions to other nodes.
const FUTURE: usize = 2 << 10;
/// A message longer than this takes its buffer along, so that none of its size stays behind.
const LARGE: usize = 32 << 10;
/// An unfinished message must bring [`PROGRESS`] bytes in each such time, or its end: as much as a
/// link of 50 kbit/s brings in a third of it, and more than a client sends that only holds on.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);
const PROGRESS: usize = 16 << 10;
/// The time that requests in flight have when the node stops.
const STOP_GRACE: Duration = Duration::from_secs(2);
/// The time in which a connection of the reserve must ask what only nodes ask.
const TRIAL: Duration = Duration::from_secs(1);
/// The time that the peer of a closed connection has to read the last answers.
const CLOSE_GRACE: Duration = Duration::from_secs(1);

/// Answers every request on every connection until `stop`, then finishes what is in flight. Of the
/// limits, those of connections and buffers count here. The former may change at any time.
pub async fn serve<L, S>(
    incoming: L,
    service: &S,
    limits: impl Fn() -> Limits,
    stop: CancellationToken,
) where
    L: Stream<Item = io::Result<Connecting>> + Unpin,
    S: Service,
{
    serve_counted(incoming, service, limits, &Meter::default(), stop).await;
}

/// The same, where `meter` counts what is answered.
pub async fn serve_counted<L, S>(
    mut incoming: L,
    service: &S,
    limits: impl Fn() -> Limits,
    meter: &Meter,
    stop: CancellationToken,
) where
    L: Stream<Item = io::Result<Connecting>> + Unpin,
    S: Service,
{
    let (buffers, mut connections) = (Buffers::new(limits().buffers), FuturesUnordered::new());
    let (shared, refused) = ((&buffers, meter), Rarely::every(Duration::from_secs(1)));
    let mut stopped = pin!(stop.cancelled());
    loop {
        meter.open(connections.len());
        tokio::select! {
            biased;
            () = &mut stopped => break,
            Some(()) = connections.next() => {}
            Some(accepted) = incoming.next() => match accepted {
                Ok(connecting) => {
                    let Limits { connections: most, reserve, .. } = limits();
                    let full = connections.len() >= most;
                    if full {
                        refused.warn(&format!("connections are refused: {most} are open"));
                    }
                    if connections.len() < most + reserve {
                        connections.push(connection(connecting, service, shared, full, stop.clone()));
                    }
                }
                Err(error) => refused.warn(&format!("a connection could not be accepted: {error}")),
            },
            else => break,
        }
    }
    let finish = async { while connections.next().await.is_some() {} };
    if timeout(STOP_GRACE, finish).await.is_err() {
        log::warn!("stopped with requests in flight");
    }
}

async fn connection<S: Service>(
    connecting: Connecting,
    service: &S,
    (buffers, meter): (&Buffers, &Meter),
    on_trial: bool,
    stop: CancellationToken,
) {
    let patience = if on_trial { TRIAL } else { Duration::MAX };
    let made = timeout(patience, stop.run_until_cancelled(connecting));
    let Ok(Some(Ok(stream))) = made.await else {
        return;
    };
    let mut session = Session {
        stream,
        service,
        codec: Codec::default(),
        input: BytesMut::new(),
        on_trial,
        ended: false,
        in_flight: InFlight::new(),
        output: Output::default(),
        turn: 0,
        timer: None,
        due: 0,
        share: buffers.join(),
        tally: meter.tally(),
    };
    let (mut stopped, mut trial) = (pin!(stop.cancelled()), pin!(sleep(TRIAL)));
    let end = future::poll_fn(|context| {
        session.ended |= stopped.as_mut().poll(context).is_ready()
            || session.on_trial && trial.as_mut().poll(context).is_ready();
        session.poll(context)
    });
    // An error means that the peer has gone: there is no one to tell.
    if end.await.is_ok() {
        close(session.stream).await;
    }
}

/// Lets the peer read the last bytes: closing on unread input would reset the connection.
pub(super) async fn close(mut stream: Box<dyn Connection>) {
    let read_to_end = async {
        stream.shutdown().await?;
        tokio::io::copy(&mut stream, &mut tokio::io::sink()).await
    };
    let _ = timeout(CLOSE_GRACE, read_to_end).await;
}

/// One connection: what came in, what is being answered, what goes out.
struct Session<'a, S> {
    stream: Box<dyn Connection>,
    service: &'a S,
    codec: Codec,
    input: BytesMut,
    on_trial: bool, // only the first request shows whether this is another node
    ended: bool,    // nothing more is read
    in_flight: InFlight<'a>,
    output: Output,
    turn: usize, // what it has used of its turn, and what it owes from those before, in bytes
    timer: Option<Pin<Box<Sleep>>>, // runs while a message is unfinished
    due: usize,  // the bytes of the message that must be there when it ends
    share: Share<'a>,
    tally: Tally<'a>,
}

impl<S: Service> Session<'_, S> {
    /// Reads until the input runs dry, then writes all that it gave rise to in one go. Ready
    /// when nothing more will be read and everything is answered.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.turn = self.turn.saturating_sub(TURN);
        loop {
            self.take_requests(context);
            let mut was_full = self.is_full();
            // Also while the peer reads nothing: only here is an answer counted. What does not fit
            // into the output stays where it is, in a store or with another node.
            while self.output.unsent() < MAX_PENDING {
                let Some(reply) = self.in_flight.next(context) else {
                    break;
                };
                self.reply(reply);
            }
            self.tally.take_time();
            was_full |= self.is_full();
            let buffers = self.input.capacity() + self.output.bytes.capacity();
            self.share.hold(buffers + self.in_flight.bytes(), context)?;
            if self.read(context)? {
                continue;
            }
            self.check_timer(was_full, context);
            ready!(self.output.poll_write(&mut self.stream, context))?;
            if self.turn_is_over() {
                // `yield_now` wakes this task only after the network was polled; `wake_by_ref` would not.
                return pin!(yield_now()).poll(context).map(Ok);
            }
            if was_full && !self.is_full() {
                continue; // there is room again, and no other event would wake this connection
            }
            return match self.ended && self.in_flight.answers.is_empty() {
                true => Poll::Ready(Ok(())),
                false => Poll::Pending,
            };
        }
    }

    /// Whether no more requests are taken until some are answered, and answers sent.
    fn is_full(&self) -> bool {
        let pending = self.in_flight.bytes() + self.output.unsent();
        self.in_flight.answers.len() >= MAX_IN_FLIGHT || pending >= MAX_PENDING
    }

    fn turn_is_over(&self) -> bool {
        self.turn >= TURN
    }

    /// Reads once, if more may be read now; whether anything came.
    fn read(&mut self, context: &mut Context<'_>) -> io::Result<bool> {
        if self.ended || self.is_full() || self.turn_is_over() {
            return Ok(false);
        }
        let room = self.input.len().clamp(16 << 10, 256 << 10);
        self.input.reserve(room);
        let read = poll_read_buf(Pin::new(&mut self.stream), context, &mut self.input)?;
        let Poll::Ready(count) = read else {
            return Ok(false);
        };
        self.ended = count == 0;
        self.turn += count;
        Ok(true)
    }

    /// Begins to answer the requests that have arrived.
    fn take_requests(&mut self, context: &mut Context<'_>) {
        self.tally.meter.begin_batch();
        while !self.is_full() && !self.turn_is_over() {
            let message = match self.codec.next(&self.input) {
                Ok(Some(end)) => take(&mut self.input, end),
                Ok(None) => break,
                Err(malformed) => return self.reply(malformed.into()),
            };
            self.timer = None;
            if self.on_trial {
                if let Err(refused) = of_a_node(&message) {
                    return self.reply(refused.into());
                }
                self.on_trial = false;
            }
            // The message itself, and once more as it goes to other nodes.
            let weight = 2 * message.len();
            self.turn += weight + REQUEST + VALUE * self.codec.last_values;
            let answer = answer(self.service, self.tally.meter, message, weight + FUTURE);
            if let Some(reply) = self.in_flight.start(answer, weight + FUTURE, context) {
                self.reply(reply);
            }
        }
    }

    /// Appends an answer to the output.
    fn reply(&mut self, reply: Reply) {
        if let Some(id) = reply.id {
            let before = self.output.bytes.len();
            write_response(&mut self.output.bytes, id, &reply.result);
            let size = self.output.bytes.len() - before;
            self.turn += size;
            let estimate = &mut self.in_flight.estimate;
            *estimate = size.max(*estimate - *estimate / 8);
        }
        if let Some(counted) = reply.counted {
            self.tally.count(counted, reply.result.is_err());
        }
        if let (false, Err(error)) = (reply.recoverable, reply.result) {
            // The stream cannot be trusted any more. What is in flight is still answered.
            log::debug!("a connection is closed: {error}");
            self.ended = true;
            (self.input, self.codec) = Default::default();
        }
    }

    /// Gives up on an unfinished message that makes too little progress.
    fn check_timer(&mut self, was_full: bool, context: &mut Context<'_>) {
        if was_full || self.input.is_empty() || self.ended {
            self.timer = None;
            return;
        }
        let skips_turns = self.turn_is_over();
        let timer = self.timer.get_or_insert_with(|| {
            self.due = PROGRESS;
            Box::pin(sleep(MESSAGE_TIMEOUT))
        });
        while timer.as_mut().poll(context).is_ready() {
            if skips_turns {
                return; // it is not slow
            }
            if self.input.len() < self.due {
                let why =
                    format!("it came too slowly: below {PROGRESS} bytes in {MESSAGE_TIMEOUT:?}");
                let error = Error::new(Kind::Unavailable, why);
                return self.reply(Malformed::lost(&self.input, error).into());
            }
            self.due = self.input.len() + PROGRESS;
            timer.set(sleep(MESSAGE_TIMEOUT));
        }
    }
}

/// What is said to one request.
struct Reply {
    id: Option<u32>,
    weight: usize,
    recoverable: bool, // the next message in the stream can still be found
    counted: Option<Counted>,
    result: Result<Answer, Error>,
}

impl From<Malformed> for Reply {
    fn from(malformed: Malformed) -> Self {
        Reply {
            id: malformed.id,
            weight: 0, // it is refused at the first poll, before it is counted
            recoverable: malformed.recoverable,
            counted: None,
            result: Err(malformed.error),
        }
    }
}

/// Refuses what a client asks on a connection that is kept for the other nodes.
fn of_a_node(message: &[u8]) -> Result<(), Malformed> {
    let Request { id, method, .. } = Request::read(message)?;
    if AMONG_NODES.contains(&method) {
        return Ok(());
    }
    Err(Malformed {
        id,
        recoverable: false,
        error: Error::new(Kind::Unavailable, "all connections for clients are taken"),
    })
}

/// Answers the request in a message. A panic of the service becomes an error.
async fn answer<S: Service>(service: &S, meter: &Meter, message: BytesMut, weight: usize) -> Reply {
    let Request { id, method, params } = match Request::read(&message) {
        Ok(request) => request,
        Err(malformed) => return malformed.into(),
    };
    let counted = meter.begin(method);
    let answering = AssertUnwindSafe(service.answer(method, &params)).catch_unwind();
    let panicked = |_| {
        let why = format!("{method} failed inside the node; its log says where");
        Err(Error::new(Kind::UnknownOutcome, why))
    };
    Reply {
        id,
        weight,
        recoverable: true,
        counted,
        result: answering.await.unwrap_or_else(panicked),
    }
}

/// The requests of one connection that wait for their answers.
#[derive(Default)]
struct InFlight<'a> {
    answers: FuturesUnordered<ReusableBoxFuture<'a, Reply>>,
    spare: Option<ReusableBoxFuture<'a, Reply>>, // memory for the next: most are answered at once
    weight: usize,                               // of the requests, in bytes
    estimate: usize, // of one answer, in bytes: a decaying maximum of recent answers
}

impl<'a> InFlight<'a> {
    fn new() -> Self {
        let estimate = UNKNOWN_ANSWER;
        InFlight {
            estimate,
            ..InFlight::default()
        }
    }

    /// Polls an answer once. If it is not ready, it stays here.
    fn start(
        &mut self,
        answer: impl Future<Output = Reply> + Send + 'a,
        weight: usize,
        context: &mut Context<'_>,
    ) -> Option<Reply> {
        let mut answering = match self.spare.take() {
            None => ReusableBoxFuture::new(answer),
            Some(mut spare) => {
                spare.set(answer);
                spare
            }
        };
        let Poll::Ready(reply) = answering.poll(context) else {
            self.weight += weight;
            self.answers.push(answering);
            return None;
        };
        self.spare = Some(answering);
        Some(reply)
    }

    /// The next answer that is ready.
    fn next(&mut self, context: &mut Context<'_>) -> Option<Reply> {
        let Poll::Ready(Some(reply)) = self.answers.poll_next_unpin(context) else {
            return None;
        };
        self.weight -= reply.weight;
        Some(reply)
    }

    /// The requests, and their answers if those are like the latest ones.
    fn bytes(&self) -> usize {
        self.weight + self.answers.len() * self.estimate
    }
}

/// Answers on their way out.
#[derive(Default)]
struct Output {
    bytes: Vec<u8>,
    sent: usize, // of the bytes
}

impl Output {
    fn unsent(&self) -> usize {
        self.bytes.len() - self.sent
    }

    fn poll_write(
        &mut self,
        stream: &mut Box<dyn Connection>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        while let Some(unsent @ [_, ..]) = self.bytes.get(self.sent..) {
            match ready!(Pin::new(&mut *stream).poll_write(context, unsent))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                count => self.sent += count,
            }
            if self.sent >= MAX_PENDING / 2 {
                self.bytes.drain(..self.sent); // what a slow reader has read is not held for it
                self.sent = 0;
            }
        }
        if self.sent > 0 {
            self.bytes.clear();
            self.bytes.shrink_to(64 << 10);
            self.sent = 0;
        }
        Pin::new(stream).poll_flush(context)
    }
}

/// Takes a message off the front. A large one keeps the buffer, and what lies behind it gets a new
/// one: two that shared a buffer would hold more than either is counted for.
fn take(input: &mut BytesMut, end: usize) -> BytesMut {
    let (message, rest) = input.split_at_checked(end).unwrap_or_default();
    if end < LARGE.max(rest.len()) {
        let message = message.into();
        input.advance(end);
        return message;
    }
    let rest = rest.into();
    let mut message = std::mem::replace(input, rest);
    message.truncate(end);
    message
}

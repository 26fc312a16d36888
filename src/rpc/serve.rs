//! The loop that answers. All connections of a thread live in one task, and all
//! requests of a connection in its own small set: nothing is spawned. What is
//! ready at once is answered in place, and what a batch of requests produced
//! leaves in one write.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::BytesMut;
use futures::channel::mpsc::UnboundedSender;
use futures::stream::{FuturesUnordered, Stream, StreamExt as _};
use futures::{FutureExt as _, future};
use tokio::io::{AsyncReadExt as _, AsyncWrite as _, AsyncWriteExt as _};
use tokio::task::{unconstrained, yield_now};
use tokio::time::{Instant, Sleep, sleep, timeout};
use tokio_util::io::poll_read_buf;
use tokio_util::sync::CancellationToken;

use super::buffers::{Buffers, Share};
use super::meter::{Meter, Tally};
use super::protocol::{MessagePackRpc, Protocol};
use super::tasks::{Spares, Tasks};
use super::{Connecting, Connection, Rarely, Reached, Service};
use crate::cluster::Limits;
use crate::error::{Error, Kind};

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
/// What a request in flight takes beside its bytes: its future, and its questions to other nodes.
const FUTURE: usize = 2 << 10;
/// An unfinished message must bring [`PROGRESS`] bytes in each such time, or its end: as much as a
/// link of 50 kbit/s brings in a third of it, and more than a client sends that only holds on.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);
const PROGRESS: usize = 16 << 10;
/// The time that requests in flight have when the node stops.
const STOP_GRACE: Duration = Duration::from_secs(2);
/// The time in which a connection of the reserve must ask what only nodes ask.
const TRIAL: Duration = Duration::from_secs(1);
/// An answer that is held back for longer ends its connection: whoever asked has given up, or has gone.
const HELD: Duration = Duration::from_secs(10);
/// The time that the peer of a closed connection has to read the last answers.
const CLOSE_GRACE: Duration = Duration::from_secs(1);

/// Answers every request on every connection until `stop`, then finishes what is in flight. Of the
/// limits, those of connections and buffers count here. They may change at any time.
pub async fn serve<L, S>(
    incoming: L,
    service: &S,
    limits: impl Fn() -> Limits,
    stop: CancellationToken,
) where
    L: Stream<Item = io::Result<Connecting>> + Unpin,
    S: Service,
{
    let admitted = admit(incoming, limits);
    serve_counted(admitted, service, &Meter::default(), stop).await;
}

/// The same for connections that are let in, where `meter` counts what is answered.
pub async fn serve_counted<L, S>(admitted: L, service: &S, meter: &Meter, stop: CancellationToken)
where
    L: Stream<Item = Admitted> + Unpin,
    S: Service,
{
    serve_admitted(admitted, &MessagePackRpc(service, meter), stop).await;
}

/// The same in another protocol.
pub async fn serve_protocol<L, P>(
    incoming: L,
    protocol: &P,
    limits: impl Fn() -> Limits,
    stop: CancellationToken,
) where
    L: Stream<Item = io::Result<Connecting>> + Unpin,
    P: Protocol,
{
    serve_admitted(admit(incoming, limits), protocol, stop).await;
}

/// A connection that is let in.
pub struct Admitted {
    connecting: Connecting,
    on_trial: bool,
    share: Share,
    thread: Option<Arc<()>>, // that serves it: its clones count the connections of the thread
}

/// Lets connections in as these limits allow. They are the limits of a node: all its threads take their
/// connections from one such stream.
pub fn admit<L>(incoming: L, limits: impl Fn() -> Limits) -> impl Stream<Item = Admitted> + Unpin
where
    L: Stream<Item = io::Result<Connecting>> + Unpin,
{
    let buffers = Arc::new(Buffers::new(limits().buffers()));
    let refused = Rarely::every(Duration::from_secs(1));
    incoming.filter_map(move |accepted| {
        let limits = limits();
        let (most, reserve) = (limits.connections, limits.reserve());
        buffers.limit(limits.buffers());
        let open = buffers.connections();
        let on_trial = open >= most;
        if let (Ok(_), true) = (&accepted, on_trial) {
            refused.warn(&format!(
                "connections are refused: at most {most} may be open"
            ));
        }
        future::ready(match accepted {
            Ok(connecting) => (open < most + reserve).then(|| Admitted {
                connecting,
                on_trial,
                share: buffers.join(),
                thread: None,
            }),
            Err(error) => {
                refused.warn(&format!("a connection could not be accepted: {error}"));
                None
            }
        })
    })
}

/// Hands connections out to the threads of a node, each to the one that has the fewest. What comes out of the stream
/// is for the thread that polls it.
pub fn hand_out(
    admitted: impl Stream<Item = Admitted> + Unpin,
    others: Vec<UnboundedSender<Admitted>>,
) -> impl Stream<Item = Admitted> + Unpin {
    let all = others.into_iter().map(Some).chain([None]);
    let threads: Vec<_> = all.map(|to| (to, Arc::new(()))).collect();
    admitted.filter_map(move |mut connection| {
        let fewest = threads
            .iter()
            .min_by_key(|(_, thread)| Arc::strong_count(thread));
        connection.thread = fewest.map(|(_, thread)| thread.clone());
        future::ready(match fewest {
            Some((Some(other), _)) => {
                let _ = other.unbounded_send(connection); // one that has ended ends the node
                None
            }
            _ => Some(connection),
        })
    })
}

async fn serve_admitted<L, P>(mut admitted: L, protocol: &P, stop: CancellationToken)
where
    L: Stream<Item = Admitted> + Unpin,
    P: Protocol,
{
    let (mut connections, spares) = (FuturesUnordered::new(), Spares::default());
    let mut stopped = pin!(stop.cancelled());
    loop {
        let open = connections.len();
        protocol.meter().inspect(|meter| meter.open(open));
        tokio::select! {
            biased;
            () = &mut stopped => break,
            // A task's budget is too small for many connections: those that it leaves out would come last each time.
            Some(()) = unconstrained(connections.next()) => {}
            Some(admitted) = admitted.next() => {
                let answering = (protocol, P::answer as Answering<_, _>);
                connections.push(connection(admitted, answering, spares.clone(), stop.clone()));
            }
            else => break,
        }
    }
    if timeout(STOP_GRACE, connections.count()).await.is_err() {
        log::warn!("stopped with requests in flight");
    }
}

async fn connection<'a, P: Protocol, F: Future<Output = P::Reply>>(
    admitted: Admitted,
    (protocol, answer): (&'a P, Answering<'a, P, F>),
    spares: Spares<F>,
    stop: CancellationToken,
) {
    let Admitted {
        connecting,
        on_trial,
        share,
        thread: _counted,
    } = admitted;
    let patience = if on_trial { TRIAL } else { Duration::MAX };
    let made = timeout(patience, stop.run_until_cancelled(connecting));
    let Ok(Some(Ok(stream))) = made.await else {
        return;
    };
    let session = Session {
        stream,
        protocol,
        answer,
        state: P::Stream::default(),
        input: BytesMut::new(),
        on_trial,
        ended: false,
        in_flight: InFlight::new(spares),
        output: Output::default(),
        turn: 0,
        timer: None,
        due: 0,
        share,
        tally: protocol.meter().map(Meter::tally),
    };
    session.serve(stop).await;
}

/// Lets the peer read the last bytes: closing on unread input would reset the connection.
pub(super) async fn close(mut stream: Box<dyn Connection>) {
    let read_to_end = async {
        stream.shutdown().await?;
        let mut rest = vec![0; 8 << 10]; // not in the future of each connection
        while stream.read(&mut rest).await? > 0 {
            yield_now().await; // who sends on and on has no more than a turn
        }
        Ok::<_, io::Error>(())
    };
    let _ = timeout(CLOSE_GRACE, read_to_end).await;
}

/// One connection: what came in, what is being answered, what goes out.
struct Session<'a, P: Protocol, F> {
    stream: Box<dyn Connection>,
    protocol: &'a P,
    answer: Answering<'a, P, F>,
    state: P::Stream,
    input: BytesMut,
    on_trial: bool, // only the first request shows whether this is another node
    ended: bool,    // nothing more is read
    in_flight: InFlight<P, F>,
    output: Output,
    turn: usize, // what it has used of its turn, and what it owes from those before, in bytes
    timer: Option<Pin<Box<Sleep>>>, // runs while a message is unfinished
    due: usize,  // the bytes of the message that must be there when it ends
    share: Share,
    tally: Option<Tally<'a>>, // where it is counted
}

/// [`Protocol::answer`], whose futures are of this type: the trait has no name for it, and a set keeps one type.
type Answering<'a, P, F> = fn(&'a P, <P as Protocol>::Request) -> F;

impl<P: Protocol, F: Future<Output = P::Reply>> Session<'_, P, F> {
    async fn serve(mut self, stop: CancellationToken) {
        let (mut stopped, mut trial) = (pin!(stop.cancelled()), pin!(sleep(TRIAL)));
        let end = future::poll_fn(|context| {
            self.ended |= stopped.as_mut().poll(context).is_ready()
                || self.on_trial && trial.as_mut().poll(context).is_ready();
            self.poll(context)
        });
        // An error means that the peer has gone: there is no one to tell.
        if end.await.is_ok() {
            close(self.stream).await;
        }
    }

    /// Reads until the input runs dry, then writes all that it gave rise to in one go. Ready
    /// when nothing more will be read and everything is answered.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.turn = self.turn.saturating_sub(TURN);
        loop {
            self.take_requests();
            let mut was_full = self.is_full();
            // Also while the peer reads nothing: only here is an answer counted. What does not fit
            // into the output stays where it is, in a store or with another node.
            let has_room = |session: &Self| session.output.unsent() < MAX_PENDING;
            while has_room(self) {
                let Some(reply) = self.in_flight.next(context) else {
                    break;
                };
                self.reply(reply);
            }
            let more_may_wait = !has_room(self);
            self.tally.as_mut().map(Tally::take_time);
            was_full |= self.is_full();
            if self.read(context)? {
                continue;
            }
            if self.ended {
                self.protocol.ended(&mut self.state);
            }
            self.check_timer(was_full, context);
            let written = self.output.poll_write(&mut self.stream, context);
            self.hold(context)?;
            ready!(written)?;
            if self.turn_is_over() {
                // `yield_now` wakes this task only after the network was polled; `wake_by_ref` would not.
                return pin!(yield_now()).poll(context).map(Ok);
            }
            if more_may_wait || was_full && !self.is_full() {
                continue; // there is room again, and no other event would wake this connection
            }
            return match self.ended && self.in_flight.is_empty() && self.output.held.is_empty() {
                true => Poll::Ready(Ok(())),
                false => Poll::Pending,
            };
        }
    }

    /// Notes what is held, once that is no more than what has to wait.
    fn hold(&self, context: &Context<'_>) -> io::Result<()> {
        let buffers = self.input.capacity() + self.output.capacity();
        self.share.hold(buffers + self.in_flight.bytes(), context)
    }

    /// Whether no more requests are taken until some are answered, and answers sent.
    fn is_full(&self) -> bool {
        let pending = self.in_flight.bytes() + self.output.held.len() + self.output.unsent();
        self.in_flight.requests() >= MAX_IN_FLIGHT || pending >= MAX_PENDING
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
    fn take_requests(&mut self) {
        if let Some(tally) = &self.tally {
            tally.meter.begin_batch();
        }
        while !self.is_full() && !self.turn_is_over() {
            let Some(found) = self.protocol.next(&mut self.state, &mut self.input) else {
                break;
            };
            self.timer = None;
            if self.on_trial {
                if let Err(refused) = self.protocol.of_a_node(&found.request) {
                    return self.reply(refused);
                }
                self.on_trial = false;
            }
            self.turn += found.bytes + found.work;
            let answer = (self.answer)(self.protocol, found.request);
            if let Some(reply) = self.in_flight.start(answer, found.bytes + FUTURE) {
                self.reply(reply);
            }
        }
    }

    /// Appends an answer to the output.
    fn reply(&mut self, mut reply: P::Reply) {
        let counted = self.tally.as_mut().zip(P::counted(&reply));
        if let Some((tally, (counted, failed))) = counted {
            tally.count(counted, failed);
        }
        let (held, moved) = (P::held(&mut reply), P::moved(&reply));
        let out = match held {
            Some(_) => &mut self.output.held,
            None => &mut self.output.bytes,
        };
        let before = out.len();
        if !self.protocol.write(&mut self.state, reply, out) {
            self.ended = true;
            (self.input, self.state) = Default::default();
        }
        let written = out.len() - before;
        if let Some(reached) = held {
            self.output.note(reached, written);
        }
        let size = moved.max(written);
        if size > 0 {
            self.turn += size;
            self.in_flight.learn(size);
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
                return self.give_up(error);
            }
            self.due = self.input.len() + PROGRESS;
            timer.set(sleep(MESSAGE_TIMEOUT));
        }
    }

    /// Answers what will have no end, and nothing after it.
    fn give_up(&mut self, error: Error) {
        let reply = self.protocol.give_up(&self.input, error);
        self.ended = true;
        self.input = BytesMut::new();
        if let Some(reply) = self.in_flight.end_at_once(reply) {
            self.reply(reply);
        }
    }
}

/// The requests of one connection that wait for their answers.
struct InFlight<P: Protocol, F> {
    answers: Tasks<Request, F>,
    weight: usize,                     // of the requests, in bytes
    estimate: usize, // of one answer, in bytes: a decaying maximum of recent answers
    queue: VecDeque<Option<P::Reply>>, // where answers leave in order: one for each request, once it is there
    left: usize,                       // answers that were in the queue
    early: usize,                      // bytes of the answers in the queue
}

/// A request that waits for its answer.
struct Request {
    number: usize, // among those of the connection
    weight: usize,
}

impl<P: Protocol, F: Future<Output = P::Reply>> InFlight<P, F> {
    fn new(spares: Spares<F>) -> Self {
        InFlight {
            answers: Tasks::new(spares),
            weight: 0,
            estimate: UNKNOWN_ANSWER,
            queue: VecDeque::new(),
            left: 0,
            early: 0,
        }
    }

    /// Polls an answer once. If it is not ready, or others come before it, it stays here.
    fn start(&mut self, answer: F, weight: usize) -> Option<P::Reply> {
        let number = self.left + self.queue.len();
        if let Some((_, reply)) = self.answers.start(Request { number, weight }, answer) {
            return self.end_at_once(reply);
        }
        if P::IN_ORDER {
            self.queue.push_back(None);
        }
        self.weight += weight;
        None
    }

    /// An answer that was ready at once, if it may leave now. Else it is kept, and counted.
    fn end_at_once(&mut self, reply: P::Reply) -> Option<P::Reply> {
        if self.queue.is_empty() {
            return Some(reply);
        }
        self.early += P::size(&reply);
        self.queue.push_back(Some(reply));
        None
    }

    /// The next answer that may leave.
    fn next(&mut self, context: &mut Context<'_>) -> Option<P::Reply> {
        loop {
            if let Some(reply) = self.queue.front_mut().and_then(Option::take) {
                self.queue.pop_front();
                if self.queue.is_empty() {
                    self.queue.shrink_to(32); // most connections are idle for most of their time
                }
                self.left += 1;
                self.early -= P::size(&reply);
                return Some(reply);
            }
            let (request, reply) = self.answers.next(context)?;
            self.weight -= request.weight;
            let Some(place) = self.queue.get_mut(request.number - self.left) else {
                return Some(reply);
            };
            self.early += P::size(&reply);
            *place = Some(reply);
        }
    }

    /// Notes how large an answer was. Those that wait for others must not have been taken for small.
    fn learn(&mut self, size: usize) {
        let least = if P::IN_ORDER { UNKNOWN_ANSWER } else { 0 };
        let estimate = self.estimate - self.estimate / 8;
        self.estimate = size.max(estimate).max(least);
    }

    fn is_empty(&self) -> bool {
        self.requests() == 0
    }

    /// Those that are not answered, and those of which the answer waits for others.
    fn requests(&self) -> usize {
        self.answers.len().max(self.queue.len())
    }

    /// The requests, their answers if those are like the latest ones, and those that wait for others.
    fn bytes(&self) -> usize {
        self.weight + self.answers.len() * self.estimate + self.early
    }
}

/// Answers that are held back until then.
struct Held {
    until: Reached,
    bytes: usize,
    since: Instant,
}

/// Answers on their way out.
#[derive(Default)]
struct Output {
    bytes: Vec<u8>,
    sent: usize,           // of the bytes
    held: Vec<u8>,         // answers that are held back
    until: VecDeque<Held>, // one behind the other
}

impl Output {
    fn unsent(&self) -> usize {
        self.bytes.len() - self.sent
    }

    fn capacity(&self) -> usize {
        self.bytes.capacity() + self.held.capacity()
    }

    /// So many bytes more are held until then. None overtakes another one.
    fn note(&mut self, reached: Reached, size: usize) {
        match self.until.back_mut() {
            Some(last) if last.until.is_behind(&reached) => last.bytes += size,
            _ => self.until.push_back(Held {
                until: reached,
                bytes: size,
                since: Instant::now(),
            }),
        }
    }

    /// Those leave for which nothing is waited any more.
    fn release(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        while let Some(first) = self.until.front_mut() {
            if first.until.poll_unpin(context).is_pending() {
                return match first.since.elapsed() > HELD {
                    true => Err(io::ErrorKind::TimedOut.into()), // who waits is woken while it is late
                    false => Ok(()),
                };
            }
            self.bytes.extend(self.held.drain(..first.bytes));
            self.held.shrink_to(64 << 10);
            self.until.pop_front();
        }
        Ok(())
    }

    fn poll_write(
        &mut self,
        stream: &mut Box<dyn Connection>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        self.release(context)?;
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

//! The text protocol of memcached, classic and meta commands, for any [`Cache`]: that of the ring is the
//! [`Gateway`], which coordinates by itself as every client does. The nodes know nothing of it.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::process;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use futures::{FutureExt as _, future::join};
use tokio::select;
use tokio::task::unconstrained;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use self::queues::{Place, Queue};
use crate::entry::{Packed, Stamp};
use crate::error::{Error, Kind};
use crate::replicas::now;
use crate::rpc::{Found, Protocol, REQUEST};

mod answer;
mod gateway;
mod item;
mod parser;
mod queues;

pub use answer::Said;
pub use gateway::Gateway;
pub use item::Item;
pub use parser::{Request, Stream, Verb};
pub use queues::Queues;

/// What says the version: clients read the level of the protocol from it.
const VERSION: &str = concat!("VERSION 1.6.18-kv54-", env!("CARGO_PKG_VERSION"));

/// What answers the commands about keys, and `flush_all`.
pub trait Cache: Sync {
    /// How long a request may take, with the time that it waits for others.
    fn timeout(&self) -> Duration {
        Duration::from_secs(5)
    }

    /// Answers one request, in its turn, and notes in it how much it has moved. An error becomes a
    /// `SERVER_ERROR`, or where the request makes no sense, a `CLIENT_ERROR`.
    fn answer(
        &self,
        request: &mut Request,
        turn: &Turn,
    ) -> impl Future<Output = Result<Outcome, Error>> + Send;
}

/// What became of a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// It is done, and this is the item.
    Done(Item),
    /// There is no such item.
    Missing,
    /// Nothing is stored, since there is an item, or since there is none.
    NotStored,
    /// The item has another cas unique.
    Exists,
}

impl Outcome {
    /// The item that was kept as this, or none.
    pub fn of(kept: &Packed) -> Self {
        Item::read(kept, Stamp::default()).map_or(Outcome::Missing, Outcome::Done)
    }
}

/// The protocol, answered by a cache.
pub struct Memcached<C> {
    cache: C,
    started: Instant,
}

impl<C: Cache> Memcached<C> {
    /// The same commands about these keys.
    pub fn of(cache: C) -> Self {
        let started = Instant::now();
        Memcached { cache, started }
    }

    /// Answers when no earlier request of the connection is in the way.
    async fn in_turn(&self, request: &mut Request, turn: Turn) -> Result<Outcome, Error> {
        let all = turn.shared.all.turn(request.verb == Verb::Flush);
        let may_mark = request.verb == Verb::Get && request.meta.is_some(); // that it is being made anew
        let key = turn.key.queue.turn(!request.only_reads() || may_mark);
        // It enters both queues before any later request does. Unconstrained: who has used up a task's
        // budget would stand in no queue, and be overtaken.
        let turns = timeout_at(turn.until, unconstrained(join(all, key))).await;
        let _turns = turns.map_err(|_| turn.key.late())?;
        let answering = AssertUnwindSafe(self.cache.answer(request, &turn)).catch_unwind();
        let why = "it failed inside the gateway, whose log says where";
        let panicked = |_| Err(Error::new(Kind::UnknownOutcome, why));
        answering.await.unwrap_or_else(panicked)
    }

    fn stats(&self, of: &[u8]) -> String {
        match of {
            b"" => format!(
                "STAT pid {}\r\nSTAT uptime {}\r\nSTAT time {}\r\nSTAT version {}\r\nEND",
                process::id(),
                self.started.elapsed().as_secs(),
                now() / 1000,
                VERSION.trim_start_matches("VERSION "),
            ),
            b"reset" => "RESET".to_owned(),
            b"settings" | b"items" | b"slabs" | b"sizes" | b"conns" => "END".to_owned(),
            _ => "ERROR".to_owned(),
        }
    }
}

/// How far a connection is. Its commands about one key take effect one after the other, so that a client
/// need not wait for an answer before it sends the next one; so do all that stand beside a `flush_all`.
#[derive(Default)]
pub struct Connection {
    stream: Stream,
    shared: Arc<Shared>,
    keys: Arc<Queues>,
    get_failed: bool, // its other keys are not answered
}

/// What the requests of a connection share.
#[derive(Default)]
struct Shared {
    all: Queue,
    left: CancellationToken,
}

/// What a request waits for, and until when.
pub struct Turn {
    shared: Arc<Shared>,
    key: Place,
    /// When it should be answered.
    pub until: Instant,
}

impl Turn {
    /// Awaits an answer that may take long. It is dropped as soon as nothing more can be read from the client: most
    /// likely that has gone.
    pub async fn unless_left<T>(
        &self,
        answer: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        select! {
            biased;
            answer = answer => answer,
            () = self.shared.left.cancelled() => {
                Err(Error::new(Kind::Unavailable, "nothing more was read from its client"))
            }
        }
    }
}

impl<C: Cache> Protocol for Memcached<C> {
    type Stream = Connection;
    type Request = (Request, Option<Turn>);
    type Reply = Said;
    const IN_ORDER: bool = true;

    fn next(&self, at: &mut Connection, input: &mut BytesMut) -> Option<Found<Self::Request>> {
        let request = at.stream.next(input)?;
        let turn = !matches!(request.verb, Verb::Said { .. } | Verb::Stats);
        let turn = turn.then(|| Turn {
            shared: at.shared.clone(),
            key: at.keys.place(&request.key),
            until: Instant::now() + self.cache.timeout(),
        });
        let (bytes, work) = (2 * (request.key.len() + request.value.len()), REQUEST);
        Some(Found {
            request: (request, turn),
            bytes,
            work,
        })
    }

    async fn answer(&self, (mut request, turn): Self::Request) -> Said {
        match (request.verb, turn) {
            (Verb::Said { closes, .. }, _) if request.is_quiet => Said::line("", closes),
            (Verb::Said { line, closes }, _) => Said::line(line, closes),
            (_, None) => Said::line(&self.stats(&request.key), false),
            (_, Some(turn)) => {
                let outcome = self.in_turn(&mut request, turn).await;
                Said::to(&request, outcome, now())
            }
        }
    }

    fn give_up(&self, _: &[u8], error: Error) -> Said {
        Said::line(&format!("SERVER_ERROR {error}"), true)
    }

    fn ended(&self, at: &mut Connection) {
        at.shared.left.cancel();
    }

    fn write(&self, at: &mut Connection, said: Said, out: &mut Vec<u8>) -> bool {
        if !at.get_failed {
            out.extend_from_slice(&said.bytes);
        }
        at.get_failed = said.goes_on && (at.get_failed || said.is_error);
        !said.closes
    }

    fn size(said: &Said) -> usize {
        said.bytes.capacity() + REQUEST
    }

    fn moved(said: &Said) -> usize {
        said.moved
    }
}

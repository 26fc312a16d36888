//! The text protocol of memcached, classic and meta commands, for any [`Cache`]: that of the ring is the
//! [`Gateway`], which coordinates by itself as every client does. The nodes know nothing of it.

use std::collections::HashMap;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::process;
use std::sync::Arc;

use bytes::BytesMut;
use futures::FutureExt as _;
use tokio::sync::RwLock;
use tokio::task::unconstrained;
use tokio::time::Instant;

use crate::error::{Error, Kind};
use crate::replicas::now;
use crate::rpc::{Found, Protocol};

mod answer;
mod gateway;
mod item;
mod parser;

pub use answer::Said;
pub use gateway::Gateway;
pub use item::Item;
pub use parser::{Request, Stream, Verb};

/// What a request counts for in a turn beside its bytes.
const REQUEST: usize = 64;

/// How many keys of a connection may have had turns before those are forgotten that nobody waits for.
const KEYS: usize = 64;

/// What is said to be the version: clients read the level of the protocol from it.
const VERSION: &str = concat!("1.6.18-kv54-", env!("CARGO_PKG_VERSION"));

/// What answers the commands about keys, and `flush_all`.
pub trait Cache: Sync {
    /// Answers one request. An error becomes a `SERVER_ERROR`, or where the request makes no sense, a
    /// `CLIENT_ERROR`.
    fn answer(&self, request: &Request) -> impl Future<Output = Result<Outcome, Error>> + Send;
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
    /// These lines.
    Text(String),
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

    async fn outcome(&self, request: &Request) -> Result<Outcome, Error> {
        let text = match request.verb {
            Verb::Stats => self.stats(&request.key),
            Verb::Version => format!("VERSION {VERSION}"),
            Verb::Verbosity => "OK".to_owned(),
            Verb::Noop => "MN".to_owned(),
            _ => {
                let answering = AssertUnwindSafe(self.cache.answer(request)).catch_unwind();
                let why = "it failed inside the gateway, whose log says where";
                let panicked = |_| Err(Error::new(Kind::UnknownOutcome, why));
                return answering.await.unwrap_or_else(panicked);
            }
        };
        Ok(Outcome::Text(text))
    }

    fn stats(&self, of: &[u8]) -> String {
        let (pid, uptime, time) = (
            process::id(),
            self.started.elapsed().as_secs(),
            now() / 1000,
        );
        match of {
            b"" => format!(
                "STAT pid {pid}\r\nSTAT uptime {uptime}\r\nSTAT time {time}\r\nSTAT version {VERSION}\r\nEND"
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
    all: Arc<RwLock<()>>,
    keys: HashMap<Vec<u8>, Arc<RwLock<()>>>,
    get_failed: bool, // its other keys are not answered
}

/// What a request waits for.
pub struct Turn {
    all: Arc<RwLock<()>>,
    key: Arc<RwLock<()>>,
}

impl Connection {
    fn turn(&mut self, key: &[u8]) -> Turn {
        if self.keys.len() >= KEYS {
            self.keys.retain(|_, turn| Arc::strong_count(turn) > 1);
        }
        let key = self.keys.entry(key.to_owned()).or_default().clone();
        let all = self.all.clone();
        Turn { all, key }
    }
}

impl<C: Cache> Protocol for Memcached<C> {
    type Stream = Connection;
    type Request = (Request, Turn);
    type Reply = Said;
    const IN_ORDER: bool = true;

    fn next(&self, at: &mut Connection, input: &mut BytesMut) -> Option<Found<Self::Request>> {
        let request = at.stream.next(input)?;
        let turn = at.turn(&request.key);
        let (bytes, work) = (2 * (request.key.len() + request.value.len()), REQUEST);
        Some(Found {
            request: (request, turn),
            bytes,
            work,
        })
    }

    async fn answer(&self, (request, turn): Self::Request) -> Said {
        match request.verb {
            Verb::Quit => Said::line("", true),
            Verb::Lost => Said::line("CLIENT_ERROR line too long\r\n", true),
            Verb::Wrong(_) if request.is_quiet => Said::line("", false),
            Verb::Wrong(line) => Said::line(&format!("{line}\r\n"), false),
            _ => {
                // Unconstrained: who has used up a task's budget would stand in no queue, and be overtaken.
                let (mut _alone, mut _beside, mut _reads, mut _writes) = (None, None, None, None);
                match request.verb {
                    Verb::Flush => _alone = Some(unconstrained(turn.all.write()).await),
                    _ => _beside = Some(unconstrained(turn.all.read()).await),
                }
                match request.only_reads() {
                    true => _reads = Some(unconstrained(turn.key.read()).await),
                    false => _writes = Some(unconstrained(turn.key.write()).await),
                }
                Said::to(&request, self.outcome(&request).await, now())
            }
        }
    }

    fn give_up(&self, _: &[u8], error: Error) -> Said {
        Said::line(&format!("SERVER_ERROR {error}\r\n"), true)
    }

    fn write(&self, at: &mut Connection, said: Said, out: &mut Vec<u8>) -> bool {
        if !at.get_failed {
            out.extend_from_slice(&said.bytes);
        }
        at.get_failed = said.goes_on && (at.get_failed || said.is_error);
        !said.closes
    }

    fn size(said: &Said) -> usize {
        said.bytes.len()
    }
}

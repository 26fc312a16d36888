//! The ring as a cache. A command that looks at the item before it writes is a swap of one key, done once
//! or not at all, by one function of the item: [`Request::made`].

use std::sync::Arc;
use std::time::Duration;

use futures::future::try_join_all;
use tokio::time::{Instant, timeout};

use super::queues::Queues;
use super::{Cache, Item, Outcome, Request, Turn, Verb};
use crate::client::Client;
use crate::cluster::Cluster;
use crate::entry::{Packed, Stamp, check_value};
use crate::error::{Error, Kind};
use crate::join::{Scan, entries};
use crate::replicas::Operation;
use crate::rpc::codec::{NIL, string};

/// A time to live up to this, in seconds, begins now; a longer one is a time of day.
const RELATIVE: i64 = 30 * 86_400;
/// How many keys of one page are deleted at once.
const AT_ONCE: usize = 64;
/// How long a swap waits for those of its key that came before. Only speed depends on it, and who reads no answers
/// would keep the turn.
const TURN: Duration = Duration::from_secs(1);

const REFUSED: &str = "flush_all is refused: it would delete every key of the ring; kv54 memcached --allow-flush lets it";
const DELAY: &str = "flush_all is refused: a delay is not taken";
const NO_NUMBER: &str = "cannot increment or decrement non-numeric value";

/// Answers by asking the nodes.
pub struct Gateway {
    client: Arc<Client>,
    may_flush: bool,
    swaps: Arc<Queues>, // of one key they would only be in each other's way
}

impl Cache for Gateway {
    fn timeout(&self) -> Duration {
        self.client.replicas.timeout
    }

    async fn answer(&self, request: &mut Request, turn: &Turn) -> Result<Outcome, Error> {
        let until = turn.until;
        match request.verb {
            Verb::Get | Verb::Touch | Verb::Debug => self.get(request, until).await,
            Verb::Flush => Box::pin(self.flush(request)).await,
            Verb::Set if request.compare.is_none() && !request.wants_cas => {
                self.set(request, until).await
            }
            _ => Box::pin(self.swap(request, until)).await,
        }
    }
}

impl Gateway {
    /// Asks by this client. Whether `flush_all` may delete every key of the ring is said here.
    pub fn of(client: Arc<Client>, may_flush: bool) -> Self {
        Gateway {
            client,
            may_flush,
            swaps: Arc::default(),
        }
    }

    /// Begins an operation that has until then.
    fn operation<'a>(&'a self, key: &'a [u8], until: Instant) -> Result<Operation<'a>, Error> {
        self.client.replicas.of_until(key, until)
    }

    async fn get(&self, request: &mut Request, until: Instant) -> Result<Outcome, Error> {
        let newest = self.operation(&request.key, until)?.get().await?.entry;
        request.moved = newest.value.len();
        let old = Item::read(&newest.value, newest.stamp);
        match request.made(old, self.client.replicas.now()) {
            (None, outcome) => outcome,
            _ => Box::pin(self.swap(request, until)).await,
        }
    }

    async fn set(&self, request: &Request, until: Instant) -> Result<Outcome, Error> {
        let now = self.client.replicas.now();
        let item = || request.item(request.ttl, now); // not held meanwhile: the request has its data
        let (kept, operation) = (item().kept(now), self.operation(&request.key, until)?);
        let stamp = operation.load_stamp(&kept).await?;
        operation.store(stamp.newer(&kept)).await?;
        Ok(Outcome::Done(item()))
    }

    /// Writes what the request makes of the item, and answers what it says of it.
    async fn swap(&self, request: &mut Request, until: Instant) -> Result<Outcome, Error> {
        let place = self.swaps.place(&request.key);
        let half = until.saturating_duration_since(Instant::now()) / 2;
        let _turn = timeout(half.min(TURN), place.queue.turn(true)).await;
        let (replicas, mut outcomes, mut moved) = (&self.client.replicas, Vec::new(), 0);
        let mut change = |old: &Packed, stamp: Stamp| {
            let (new, mut outcome) = request.made(Item::read(old, stamp), replicas.now());
            moved = moved.max(old.len().max(new.as_ref().map_or(0, |new| new.len())));
            if let (Ok(Outcome::Done(item)), false) =
                (&mut outcome, new.as_ref().is_some_and(Packed::is_nil))
            {
                (item.data, item.value) = (Vec::new(), None); // the swap brings it, once: there may be many attempts
            }
            outcomes.push((new.is_none(), outcome));
            new
        };
        let operation = self.operation(&request.key, until)?;
        let swapped = operation.swap(&mut change, true).await;
        request.moved = moved;
        let ended = swapped?;
        let odd = || Error::new(Kind::UnknownOutcome, "it has no outcome");
        let mut outcome = ended.noted(outcomes).ok_or_else(odd)?;
        if let (Ok(Outcome::Done(item)), Some(kept)) =
            (&mut outcome, Item::read(&ended.value, ended.stamp))
        {
            (item.data, item.cas) = (kept.data, kept.cas);
        }
        outcome
    }

    async fn flush(&self, request: &Request) -> Result<Outcome, Error> {
        match (self.may_flush, request.number) {
            (true, 0) => self
                .delete_all()
                .await
                .map(|()| Outcome::Done(Item::default())),
            (true, _) => Err(Error::new(Kind::NoSuchMethod, DELAY)),
            _ => Err(Error::new(Kind::NoSuchMethod, REFUSED)),
        }
    }

    /// Deletes every key that was there before.
    async fn delete_all(&self) -> Result<(), Error> {
        let replicas = &self.client.replicas;
        replicas.exchange_all().await; // the file may be behind
        loop {
            let state = replicas.state();
            let parts = 0..state.ring.nodes().len();
            let mut deleted = Ok(());
            for part in parts {
                deleted = deleted.and(self.delete_part(&state.ring, part).await);
            }
            if replicas.state().is(&state) {
                return deleted;
            }
        }
    }

    /// Deletes what so many replicas of a part list that every answered write is on one of them.
    async fn delete_part(&self, ring: &Cluster, part: usize) -> Result<(), Error> {
        let (mut listed, mut ended) = (0, Ok(()));
        for place in ring.replicas(part) {
            match self.delete_listed(place, part).await {
                Ok(()) => listed += 1,
                error => ended = error,
            }
            if listed > ring.copies() - ring.majority() {
                return Ok(());
            }
        }
        ended
    }

    async fn delete_listed(&self, place: usize, part: usize) -> Result<(), Error> {
        let mut scan = Scan::of_a_ready_node(&self.client.replicas, place, part).await?;
        while let Some(page) = scan.page().await? {
            let mut kept = entries(&page)?;
            kept.retain(|(_, entry, _)| entry.value != NIL);
            for kept in kept.chunks(AT_ONCE) {
                try_join_all(kept.iter().map(|(key, ..)| self.client.delete(key))).await?;
            }
        }
        Ok(())
    }
}

/// What becomes of a value (nil is no item, `None` leaves it), and what is answered.
type Made = (Option<Packed>, Result<Outcome, Error>);

impl Request {
    /// Whether it leaves every item as it is.
    pub(super) fn only_reads(&self) -> bool {
        matches!(self.verb, Verb::Get | Verb::Debug)
            && [self.ttl, self.vivify, self.recache] == [None; 3]
    }

    /// Whether it is a set or a get of the data of one key alone, without times and conditions.
    pub fn is_plain(&self) -> bool {
        let is_known = match self.verb {
            Verb::Set => self.vivify.is_none() && self.ttl.unwrap_or(0) == 0,
            _ => self.wants_value && self.only_reads() && !self.is_of_many,
        };
        is_known && self.compare.is_none() && !self.wants_cas
    }

    /// The value that is kept of the data and flags of a set.
    pub fn kept(&self) -> Packed {
        self.item(None, 0).kept(0)
    }

    /// The item that it stores.
    fn item(&self, ttl: Option<i64>, now: u64) -> Item {
        Item {
            data: self.value.to_vec(),
            flags: self.flags,
            end: end(ttl.unwrap_or(0), now),
            ..Item::default()
        }
    }

    /// What it makes of an item, or where there is none.
    fn made(&self, old: Option<Item>, now: u64) -> Made {
        match old {
            Some(mut old) => {
                old.is_known = self.compare == Some(old.cas);
                self.changed(old, now)
            }
            None => self.created(now),
        }
    }

    fn changed(&self, old: Item, now: u64) -> Made {
        match self.verb {
            Verb::Get | Verb::Touch | Verb::Debug => self.read(old, now),
            Verb::Add => (None, Ok(Outcome::NotStored)),
            _ if self.compare.is_some() && !old.is_known => (None, Ok(Outcome::Exists)),
            Verb::Delete if self.makes_stale => {
                let mut new = old.with(old.data.clone());
                (new.end, new.is_stale) = (self.end(&old, now), true);
                stored(new, now)
            }
            Verb::Delete => (Some(Packed::default()), Ok(Outcome::Done(Item::default()))),
            Verb::Incr | Verb::Decr => match self.counted(&old, now) {
                Some(new) => stored(new, now),
                None => (None, Err(Error::bad_request(NO_NUMBER))),
            },
            Verb::Append => stored(old.with([&*old.data, &self.value].concat()), now),
            Verb::Prepend => stored(old.with([&self.value, &*old.data].concat()), now),
            _ => stored(self.item(self.ttl, now), now),
        }
    }

    fn created(&self, now: u64) -> Made {
        let ttl = match self.verb {
            Verb::Set | Verb::Add => self.ttl,
            _ => self.vivify,
        };
        let mut item = self.item(ttl, now);
        match (self.verb, self.vivify, self.compare) {
            (Verb::Get, Some(_), _) => (item.is_being_made, item.wins) = (true, true),
            (Verb::Incr | Verb::Decr, Some(_), _) => item.data = self.initial.to_string().into(),
            (Verb::Append | Verb::Prepend, Some(_), _) | (Verb::Add, ..) | (Verb::Set, _, None) => {
            }
            (Verb::Append | Verb::Prepend, ..) | (Verb::Replace, _, None) => {
                return (None, Ok(Outcome::NotStored));
            }
            _ => return (None, Ok(Outcome::Missing)),
        }
        stored(item, now)
    }

    /// What a read answers. It writes where it changes when the item ends, or who makes it anew.
    fn read(&self, mut item: Item, now: u64) -> Made {
        let soon = self.recache.and_then(|recache| end(recache, now));
        let is_due = item.is_stale || item.end.is_some_and(|end| Some(end) < soon);
        let before = item.end;
        item.end = self.end(&item, now);
        if is_due && !item.is_being_made && self.meta.is_some() && self.verb == Verb::Get {
            item.is_being_made = true;
            let kept = item.kept(now);
            item.wins = check_value(&kept).is_ok(); // a string may have no room for marks
            item.is_being_made = item.wins;
            if item.wins {
                return (Some(kept), Ok(Outcome::Done(item)));
            }
        }
        let kept = (item.end != before).then(|| item.kept(now));
        (kept, Ok(Outcome::Done(item)))
    }

    /// A number after so much was added or taken away.
    fn counted(&self, old: &Item, now: u64) -> Option<Item> {
        let number: u64 = std::str::from_utf8(&old.data).ok()?.trim().parse().ok()?;
        let number = match self.verb {
            Verb::Decr => number.saturating_sub(self.number),
            _ => number.wrapping_add(self.number),
        };
        let is_integer = old.value.as_ref().is_some_and(|old| string(old).is_none());
        let value = is_integer.then(|| Packed::of(number)); // it stays one
        let end = self.end(old, now);
        let new = old.with(number.to_string().into());
        Some(Item { end, value, ..new })
    }

    /// When an item ends after this.
    fn end(&self, old: &Item, now: u64) -> Option<u64> {
        self.ttl.map_or(old.end, |ttl| end(ttl, now))
    }
}

fn stored(item: Item, now: u64) -> Made {
    (Some(item.kept(now)), Ok(Outcome::Done(item)))
}

/// When an item ends that gets this time to live now; `None` is never.
fn end(ttl: i64, now: u64) -> Option<u64> {
    match u64::try_from(ttl).map(|seconds| seconds.saturating_mul(1000)) {
        Ok(0) => None,
        Ok(ms) if ttl <= RELATIVE => Some(now.saturating_add(ms)),
        Ok(ms) => Some(ms),
        Err(_) => Some(0),
    }
}

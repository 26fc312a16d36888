//! The ring as a cache. A command that looks at the item before it writes is a swap of one key, done once
//! or not at all, by one function of the item: [`Request::made`].

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use futures::future::try_join_all;
use tokio::sync::{Mutex as Turn, OwnedMutexGuard};
use tokio::time::timeout;

use super::item::unique;
use super::{Cache, Item, Outcome, Request, Verb};
use crate::client::Client;
use crate::cluster::Cluster;
use crate::entry::{Packed, Stamp};
use crate::error::{Error, Kind};
use crate::join::{Scan, entries};
use crate::rpc::codec::NIL;
use crate::rpc::lock;

/// A time to live up to this, in seconds, begins now; a longer one is a time of day.
const RELATIVE: i64 = 30 * 86_400;
/// How many keys may have had swaps before those are forgotten that nobody waits for.
const KEYS: usize = 1024;

/// How many keys of one page are deleted at once.
const AT_ONCE: usize = 64;

const NO_NUMBER: &str = "cannot increment or decrement non-numeric value";

/// Answers by asking the nodes.
pub struct Gateway {
    client: Arc<Client>,
    may_flush: bool,
    swaps: Mutex<HashMap<Vec<u8>, Arc<Turn<()>>>>,
}

impl Cache for Gateway {
    async fn answer(&self, request: &Request) -> Result<Outcome, Error> {
        match request.verb {
            Verb::Get | Verb::Touch | Verb::Debug => self.get(request).await,
            Verb::Flush => Box::pin(self.flush(request)).await,
            Verb::Set if request.compare.is_none() && !request.wants_cas => {
                let now = self.client.replicas.now();
                let item = request.item(request.ttl, now);
                match item.kept(now) {
                    gone if gone.is_nil() => self.client.delete(&request.key).await?,
                    kept => self.client.set(&request.key, &kept).await?,
                }
                Ok(Outcome::Done(item))
            }
            _ => Box::pin(self.swap(request)).await,
        }
    }
}

impl Gateway {
    /// Asks by this client. Whether `flush_all` may delete every key of the ring is said here.
    pub fn of(client: Arc<Client>, may_flush: bool) -> Self {
        Gateway {
            client,
            may_flush,
            swaps: Mutex::default(),
        }
    }

    async fn get(&self, request: &Request) -> Result<Outcome, Error> {
        let replicas = &self.client.replicas;
        let newest = replicas.of(&request.key)?.get().await?.entry;
        match request.made(Item::read(&newest.value, newest.stamp), replicas.now()) {
            (None, outcome) => outcome,
            _ => Box::pin(self.swap(request)).await,
        }
    }

    /// Writes what the request makes of the item, and answers what it says of it.
    async fn swap(&self, request: &Request) -> Result<Outcome, Error> {
        let _turn = self.turn(&request.key).await?;
        let (replicas, mut outcomes) = (&self.client.replicas, Vec::new());
        let mut change = |old: &Packed, stamp: Stamp| {
            let (new, outcome) = request.made(Item::read(old, stamp), replicas.now());
            outcomes.push(outcome);
            new
        };
        let operation = replicas.of(&request.key)?;
        let ended = operation.swap(&mut change, true).await?;
        let at = ended.change.unwrap_or(outcomes.len()).saturating_sub(1); // else the last one
        let odd = || Error::new(Kind::UnknownOutcome, "it has no outcome");
        let mut outcome = outcomes.into_iter().nth(at).ok_or_else(odd)?;
        if let (Ok(Outcome::Done(item)), Some(_)) = (&mut outcome, ended.change) {
            item.cas = unique(ended.stamp);
        }
        outcome
    }

    /// Waits until no other swap of this gateway writes the key: they would only be in each other's way.
    async fn turn(&self, key: &[u8]) -> Result<OwnedMutexGuard<()>, Error> {
        let turn = {
            let mut swaps = lock(&self.swaps);
            if swaps.len() >= KEYS {
                swaps.retain(|_, turn| Arc::strong_count(turn) > 1);
            }
            swaps.entry(key.to_owned()).or_default().clone()
        };
        let begun = timeout(self.client.replicas.timeout, turn.lock_owned()).await;
        begun.map_err(|_| {
            let why = format!("key {:?}: others write it", String::from_utf8_lossy(key));
            Error::new(Kind::Unavailable, why)
        })
    }

    async fn flush(&self, request: &Request) -> Result<Outcome, Error> {
        let said = match (self.may_flush, request.number) {
            (true, 0) => self.delete_all().await.map(|()| "OK")?,
            (true, _) => "SERVER_ERROR flush_all is refused: a delay is not taken",
            _ => {
                "SERVER_ERROR flush_all is refused: it would delete every key of the ring; \
                 kv54 memcached --allow-flush lets it"
            }
        };
        Ok(Outcome::Text(said.to_owned()))
    }

    /// Deletes every key that was there before.
    async fn delete_all(&self) -> Result<(), Error> {
        let replicas = &self.client.replicas;
        replicas.exchange_all().await; // the file may be behind
        loop {
            let state = replicas.state();
            let parts = 0..state.ring.nodes().len();
            let deleted = try_join_all(parts.map(|part| self.delete_part(&state.ring, part))).await;
            if replicas.state().is(&state) {
                return deleted.map(drop);
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
            Verb::Get | Verb::Touch | Verb::Debug => self.read(&old, now),
            Verb::Add => (None, Ok(Outcome::NotStored)),
            _ if self.compare.is_some() && !old.is_known => (None, Ok(Outcome::Exists)),
            Verb::Delete if self.makes_stale => {
                let mut new = old.with(old.data.clone());
                (new.end, new.is_stale) = (self.end(&old, now), true);
                stored(new, now)
            }
            Verb::Delete => (Some(Packed::default()), Ok(Outcome::Done(old))),
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
    fn read(&self, old: &Item, now: u64) -> Made {
        let soon = self.recache.and_then(|recache| end(recache, now));
        let is_due = old.is_stale || old.end.is_some_and(|end| Some(end) < soon);
        let wins = is_due && !old.is_being_made && self.meta.is_some() && self.verb == Verb::Get;
        let (is_being_made, end) = (old.is_being_made || wins, self.end(old, now));
        let item = Item {
            end,
            is_being_made,
            ..old.clone()
        };
        let kept = (item != *old).then(|| item.kept(now));
        (kept, Ok(Outcome::Done(Item { wins, ..item })))
    }

    /// A number after so much was added or taken away.
    fn counted(&self, old: &Item, now: u64) -> Option<Item> {
        let number: u64 = std::str::from_utf8(&old.data).ok()?.trim().parse().ok()?;
        let number = match self.verb {
            Verb::Decr => number.saturating_sub(self.number),
            _ => number.wrapping_add(self.number),
        };
        let other = old.other.as_ref().map(|_| Packed::of(number)); // it was an integer, and stays one
        let end = self.end(old, now);
        let new = old.with(number.to_string().into());
        Some(Item { end, other, ..new })
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

//! Values that end by themselves. Such a value carries its end, and nodes keep it like any other. A coordinator
//! that finds by its own clock that it is over makes it nil by a swap, before it says so
//! ([`Operation::load`](crate::replicas::Operation::load)): gone for one is gone for all, however their clocks differ.

use std::ops::RangeInclusive;
use std::time::Duration;

use futures::future::join_all;
use tokio::time::{Instant, sleep};

use crate::beyond::swap::Swapped;
use crate::client::Client;
use crate::entry::Packed;
use crate::error::Error;
use crate::server::Node;

/// How long a value may live.
const TIMES: RangeInclusive<Duration> =
    Duration::from_millis(1)..=Duration::from_secs(36_525 * 86_400);

/// Between two looks for values that have ended.
const LOOK: Duration = Duration::from_secs(2);

/// How many milliseconds after the owner of a key its other replicas look: it may be down.
const LATER: u64 = 4_000;

impl Client {
    /// The value with a time to live, from now on by this program's clock. `bad-request:` if that is below a
    /// millisecond or above 100 years.
    pub fn lasting(&self, value: &[u8], ttl: Duration) -> Result<Packed, Error> {
        let end = end(self.replicas.now(), ttl)?;
        Ok(Packed::from(value).until(Some(end)))
    }

    /// Changes when a value ends, and not the value; `None` is never. False if the key is absent.
    pub async fn expire(&self, key: &[u8], ttl: Option<Duration>) -> Result<bool, Error> {
        let end = ttl.map(|ttl| end(self.replicas.now(), ttl)).transpose()?;
        let mut change = |old: &Packed, _| (!old.is_nil()).then(|| old.clone().until(end));
        let swapped = self.replicas.of(key)?.swap(&mut change, true).await?.into();
        Ok(matches!(swapped, Swapped::Done(_)))
    }

    /// The newest value of a key with its end, which a set of it keeps.
    pub async fn get_to_keep(&self, key: &[u8]) -> Result<Packed, Error> {
        Ok(self.replicas.of(key)?.get().await?.entry.value)
    }

    /// The newest value of a key, and how long it lasts still, by this program's clock.
    pub async fn get_with_ttl(&self, key: &[u8]) -> Result<(Packed, Option<Duration>), Error> {
        let value = self.get_to_keep(key).await?;
        let left = |end: u64| Duration::from_millis(end.saturating_sub(self.replicas.now()));
        let left = value.end().map(left);
        Ok((value.plain(), left))
    }
}

/// When a time to live is over that begins now.
pub(crate) fn end(now: u64, ttl: Duration) -> Result<u64, Error> {
    match u64::try_from(ttl.as_millis()) {
        Ok(ms) if TIMES.contains(&ttl) => Ok(now.saturating_add(ms)),
        _ => Err(Error::bad_request(
            "a time to live is from 1 ms to 100 years",
        )),
    }
}

impl Node {
    /// Looks for values that have ended, which nobody may read any more. Never ends.
    pub(crate) async fn sweep(&self) {
        loop {
            sleep(LOOK).await;
            let own = self.store.at(0);
            for part in own.parts() {
                let later = match part == own.place() {
                    true => 0,
                    false => LATER,
                };
                let now = self.client.replicas.now().saturating_sub(later);
                let mut cursor = Some(0);
                while let Some(from) = cursor {
                    let (begun, (keys, next)) = (Instant::now(), own.ended(part, from, now));
                    let gets = join_all(keys.iter().map(|key| self.client.get(key))).await;
                    sleep(begun.elapsed()).await; // guests go first
                    // Where two nodes are down, the other parts do not wait.
                    cursor = next.filter(|_| gets.iter().all(Result::is_ok));
                }
            }
        }
    }
}

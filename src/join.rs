//! Catching up. A node that has started knows nothing of what it answered before: its word
//! counts again, part by part, once it has read what every other replica of the part holds.
//! A node that was cut off has missed writes: where its digest of a part stays unlike a
//! neighbour's, it reads the part again.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::future::join_all;
use msgpack_rpc::Value;
use tokio::time::{Instant, sleep, sleep_until};

use crate::error::{Error, Kind};
use crate::replicas::Replicas;
use crate::sabotage::{Bug, planted};
use crate::store::{Entry, Loaded, Status, Store};

/// Between two looks at a neighbour's digests.
const LOOK: Duration = Duration::from_secs(1);
/// Before a reading is tried again that failed, or that was refused.
const RETRY: Duration = Duration::from_millis(100);
const RETRY_REFUSED: Duration = Duration::from_secs(5);
/// Between two log lines about a joining that takes long.
const REPORT: Duration = Duration::from_secs(5);

/// Reads from every neighbour what this node should hold, and goes on to compare. Never ends.
pub async fn join(store: &Store, replicas: &Replicas) {
    let shared = store.shared();
    // A write that was answered with the help of this node's former memory was begun before
    // it stopped. Two windows later, whoever was to store it has, or it was given up.
    if !shared.is_empty() && !planted(Bug::NoWaitBeforeJoining) {
        sleep_until(store.started() + 2 * replicas.cluster().window).await;
    }
    let followed = shared
        .iter()
        .map(|(place, parts)| follow(store, replicas, *place, parts));
    tokio::join!(join_all(followed), report(store));
    std::future::pending::<()>().await;
}

/// Says how far it has come, when it is done and once in a while until then.
async fn report(store: &Store) {
    let mut told = store.started();
    loop {
        let Status {
            state,
            progress,
            waiting_for,
            keys,
            ..
        } = store.status();
        if state == "ready" {
            let (s, took) = (if keys == 1 { "" } else { "s" }, store.started().elapsed());
            return log::info!("ready with {keys} key{s} after {took:.1?}");
        }
        if told.elapsed() >= REPORT {
            log::info!(
                "joining, {progress} %, waiting for {}",
                waiting_for.join(", ")
            );
            told = Instant::now();
        }
        sleep(RETRY).await;
    }
}

/// One neighbour: reads all parts shared with it, then keeps an eye on its digests.
async fn follow(store: &Store, replicas: &Replicas, place: usize, parts: &[usize]) {
    for &part in parts {
        while let Err(error) = read(store, replicas, place, part).await {
            if error.kind.is_refusal() {
                log::warn!(
                    "cannot join from {}: {error}",
                    replicas.cluster().name(place)
                );
                sleep(RETRY_REFUSED).await;
            } else {
                sleep(RETRY).await;
            }
        }
        store.has_all(part, place);
    }
    let mut differences = BTreeMap::new();
    loop {
        sleep(LOOK).await;
        let Ok(theirs) = replicas.status(place).await else {
            continue;
        };
        let ours = store.status();
        for &part in parts {
            let owner = replicas.cluster().name(part);
            let pair = [&ours, &theirs].map(|status| status.digests.get(owner).cloned());
            if pair[0] == pair[1] {
                differences.remove(&part);
            } else if differences.get(&part) == Some(&(pair.clone(), Look::First)) {
                // Writes in flight make digests differ for a moment; this has stayed. If reading
                // the part does not change it, reading it once more will not either.
                match read(store, replicas, place, part).await {
                    Err(error) if !error.kind.is_refusal() => continue,
                    Err(error) => log::warn!("cannot repair: {error}"),
                    Ok(()) => {}
                }
                differences.insert(part, (pair, Look::Read));
            } else if differences.get(&part).is_none_or(|(seen, _)| *seen != pair) {
                differences.insert(part, (pair, Look::First));
            }
        }
    }
}

/// How often a difference has been seen: once, or often enough to have read the part.
#[derive(PartialEq)]
enum Look {
    First,
    Read,
}

/// Reads one part at a neighbour to its end, page by page.
async fn read(store: &Store, replicas: &Replicas, place: usize, part: usize) -> Result<(), Error> {
    let entries = replicas.status(place).await?.entries;
    let owner = replicas.cluster().name(part);
    let of = entries.get(owner).copied().unwrap_or(0);
    let (mut scan, mut quickest) = (Scan::new(replicas, place, part), Duration::MAX);
    loop {
        let asked = Instant::now();
        let page = scan.page().await?;
        let took = asked.elapsed();
        for (key, entry) in page.iter().flatten() {
            store.keep(key, &entry.encode()?)?;
        }
        let Some(read) = scan.cursor else {
            return Ok(());
        };
        store.has_read(part, place, usize::try_from(read).unwrap_or(0), of);
        // A neighbour that takes far longer than it could is busy with its guests: they go first.
        quickest = quickest.min(took);
        if took > 4 * quickest {
            sleep(took).await;
        }
    }
}

/// One part as one node holds it, page by page: every entry that it held at the first page, and
/// perhaps some that came later.
pub struct Scan<'a> {
    replicas: &'a Replicas,
    place: usize,
    part: usize,
    start_id: Option<u64>,
    cursor: Option<u64>,
}

impl<'a> Scan<'a> {
    /// Begins before the first page.
    pub fn new(replicas: &'a Replicas, place: usize, part: usize) -> Self {
        Scan {
            replicas,
            place,
            part,
            start_id: None,
            cursor: Some(0),
        }
    }

    /// Begins anew, and fails if the node has restarted since the first page.
    pub fn rewind(&mut self) {
        self.cursor = Some(0);
    }

    /// The next page: keys and entries; `None` after the last one.
    pub async fn page(&mut self) -> Result<Option<Vec<(Vec<u8>, Entry)>>, Error> {
        let Some(cursor) = self.cursor else {
            return Ok(None);
        };
        let page = self
            .replicas
            .ask(self.place, "scan", &[self.part.into(), cursor.into()])
            .await?;
        let [start_id, next, entries] = items(page)?;
        let start_id = start_id.as_u64().ok_or_else(odd)?;
        // A node that has restarted counts its entries anew.
        if *self.start_id.get_or_insert(start_id) != start_id {
            return Err(Error::new(Kind::Unavailable, "it has restarted meanwhile"));
        }
        self.cursor = match next.as_u64() {
            Some(next) if next > cursor => Some(next),
            None if next.is_nil() => None,
            _ => return Err(odd()),
        };
        let Value::Array(entries) = entries else {
            return Err(odd());
        };
        let entries = entries.into_iter().map(|pair| {
            let [name, entry] = items(pair)?;
            let Loaded { stamp, value } = entry.try_into()?;
            let value = value.ok_or_else(odd)?;
            Ok((
                name.as_slice().ok_or_else(odd)?.to_vec(),
                Entry { stamp, value },
            ))
        });
        entries.collect::<Result<_, _>>().map(Some)
    }
}

/// The items of an array of so many.
fn items<const N: usize>(value: Value) -> Result<[Value; N], Error> {
    match value {
        Value::Array(items) => items.try_into().map_err(|_| odd()),
        _ => Err(odd()),
    }
}

fn odd() -> Error {
    Error::bad_request("a page is [start id, next cursor or nil, [[key, entry] …]]")
}

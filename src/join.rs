//! Catching up. A node that has started knows nothing of what it answered before: its
//! answers count again, part by part, once it has read what every other replica of the part holds.
//! A node that was cut off has missed writes: where its digest of a part stays unlike a
//! neighbour's, it reads the part again.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::future::join_all;
use tokio::time::{Instant, sleep, sleep_until};

use crate::doubt::{look, look_around};
use crate::entry::{Entry, entry, key};
use crate::error::{Error, Kind};
use crate::replicas::Replicas;
use crate::rpc::codec::{self, Encoded};
use crate::sabotage::{Bug, planted};
use crate::store::{MAX_PAGE, Store};

/// Between two looks at a neighbour's digests.
const LOOK: Duration = Duration::from_secs(1);
/// Before a reading is tried again that failed, or that was refused.
const RETRY: Duration = Duration::from_millis(100);
const RETRY_REFUSED: Duration = Duration::from_secs(5);
/// How long a neighbour may be silent at least: with a short window, longer than between two packets.
const SILENCE: Duration = Duration::from_secs(1);
/// A page grows until it takes longer than this, or than twice the quickest.
const QUICK: Duration = Duration::from_millis(50);
/// The smallest page that is asked for.
const MIN_PAGE: usize = 4 << 10;
/// Between two log lines about a joining that takes long.
const REPORT: Duration = Duration::from_secs(5);

/// Reads from every neighbour what this node should hold, and goes on to compare. Never ends.
pub async fn join(store: &Store, replicas: &Replicas) {
    // No majority counts on what is read here: the window does not bound it.
    let patience = replicas.cluster.limits.window.max(SILENCE);
    let replicas = &replicas.apart(patience);
    let shared = store.shared();
    // A write that was answered with the help of this node's former memory was begun before
    // it stopped. Two windows later every replica that was told of it has it, or it was given up.
    let wait = match planted(Bug::NoWaitBeforeJoining) {
        false => 2 * replicas.cluster.limits.window,
        true => Duration::ZERO,
    };
    let followed = shared.iter().map(async |(place, parts)| {
        // Meanwhile it sees which neighbours have entries: they may lose them before it reads them.
        while store.started.elapsed() < wait {
            let _ = look(store, replicas, *place).await;
            sleep_until((Instant::now() + RETRY).min(store.started + wait)).await;
        }
        catch_up(store, replicas, *place, parts).await;
        compare(store, replicas, *place, parts).await;
    });
    tokio::join!(join_all(followed), report(store, replicas));
    std::future::pending::<()>().await;
}

/// Says how far it has come, when it is done and once in a while until then. Notes the rates.
async fn report(store: &Store, replicas: &Replicas) {
    let (mut told, mut counted) = (store.started, Instant::now());
    loop {
        if counted.elapsed() >= LOOK {
            counted = Instant::now();
            for place in store.shared().into_keys() {
                store.note_rate(place, replicas.take_received(place));
            }
        }
        let status = store.status();
        if status.state == "ready" {
            let keys = status.keys;
            let (s, took) = (if keys == 1 { "" } else { "s" }, store.started.elapsed());
            let nowhere = match store.parts_with_entries()[..] {
                [] => ": no neighbour had any, as at a first start",
                _ => "",
            };
            return log::info!("ready with {keys} key{s} after {took:.1?}{nowhere}");
        }
        if told.elapsed() >= REPORT {
            log::info!("joining, {}", status.waiting());
            told = Instant::now();
        }
        sleep(RETRY).await;
    }
}

/// Reads all parts that are shared with one neighbour.
async fn catch_up(store: &Store, replicas: &Replicas, place: usize, parts: &[usize]) {
    for &part in parts {
        while let Err(error) = read(store, replicas, place, part).await {
            if error.kind.is_refusal() {
                let name = replicas.cluster.name(place);
                log::warn!("cannot join from {name}: {error}");
                sleep(RETRY_REFUSED).await;
            } else {
                sleep(RETRY).await;
            }
        }
        look_around(store, replicas, part).await;
        store.mark_read(part, place);
    }
}

/// Compares digests with one neighbour, and reads a part again where they stay different.
async fn compare(store: &Store, replicas: &Replicas, place: usize, parts: &[usize]) {
    let mut looks = BTreeMap::new(); // the digests of each part, and how often they were the same
    loop {
        sleep(LOOK).await;
        let Ok(theirs) = look(store, replicas, place).await else {
            continue;
        };
        let ours = store.status();
        for &part in parts {
            let owner = replicas.cluster.name(part);
            let pair = [&ours, &theirs].map(|status| status.digests.get(owner).cloned());
            let times = match looks.get(&part) {
                Some((seen, times)) if *seen == pair => times + 1,
                _ => 1,
            };
            looks.insert(part, (pair.clone(), times));
            // Writes in flight make digests differ for a moment, so one look is not enough. If
            // reading the part changes nothing, reading it once more will not either.
            if pair[0] != pair[1] && times == 2 {
                match read(store, replicas, place, part).await {
                    // Failed, not refused: the next look that is the same reads again.
                    Err(error) if !error.kind.is_refusal() => drop(looks.insert(part, (pair, 1))),
                    Err(error) => log::warn!("cannot repair: {error}"),
                    Ok(()) => {}
                }
            }
        }
    }
}

/// Reads one part at a neighbour to its end, and notes how that goes.
async fn read(store: &Store, replicas: &Replicas, place: usize, part: usize) -> Result<(), Error> {
    let mut scan = Scan::new(replicas, place, part);
    let (mut reached, mut lost) = (scan.cursor, 0);
    while let Err(error) = read_on(store, &mut scan).await {
        let node = replicas.cluster.nodes().get(place);
        let address = node.map_or("", |node| &node.address);
        let why = match error.kind.is_refusal() {
            true => error.kind.word().to_owned(), // the log has more
            false => error.why.replace(&format!("{address}: "), ""),
        };
        store.note_trouble(place, why);
        // A page that was lost with its connection: what was read before it is still read.
        if scan.cursor != reached {
            (reached, lost) = (scan.cursor, 0);
        }
        lost += 1;
        if error.kind != Kind::UnknownOutcome || lost > 3 {
            return Err(error);
        }
        scan.most = MIN_PAGE.max(scan.most / 4);
        sleep(RETRY).await;
    }
    Ok(())
}

/// Reads a part from where the scan is to its end.
async fn read_on(store: &Store, scan: &mut Scan<'_>) -> Result<(), Error> {
    let owner = scan.replicas.cluster.name(scan.part);
    let theirs = look(store, scan.replicas, scan.place).await?.entries;
    let (of, mut quickest) = (theirs.get(owner).copied().unwrap_or(0), Duration::MAX);
    while let Some(read) = scan.cursor {
        store.note_progress(
            scan.part,
            scan.place,
            usize::try_from(read).unwrap_or(0),
            of,
        );
        let asked = Instant::now();
        let Some(page) = scan.page().await? else {
            break;
        };
        let took = asked.elapsed();
        for (key, entry) in entries(&page)? {
            store.store(key, entry)?;
        }
        // A neighbour that takes far longer than it could is busy with its guests: they go first.
        let kilobytes = u32::try_from(page.len().max(MIN_PAGE) >> 10).unwrap_or(u32::MAX);
        quickest = quickest.min(took / kilobytes);
        if scan.cursor.is_some() && took / kilobytes > 4 * quickest {
            sleep(took).await;
        }
    }
    Ok(())
}

/// One part as one node holds it, page by page: every entry that it held at the first page, and
/// perhaps some that came later.
pub struct Scan<'a> {
    replicas: &'a Replicas,
    place: usize,
    part: usize,
    start_id: Option<u64>,
    most: usize, // bytes of the next page
    quickest: Duration,
    /// Where the next page begins. From 0 again, it fails if the node has restarted meanwhile.
    pub cursor: Option<u64>,
}

/// A key and its entry, as they lie in a page.
pub type Pair<'a> = (&'a [u8], Entry<&'a [u8]>);

impl<'a> Scan<'a> {
    /// Begins before the first page.
    pub fn new(replicas: &'a Replicas, place: usize, part: usize) -> Self {
        Scan {
            replicas,
            place,
            part,
            start_id: None,
            most: MIN_PAGE,
            quickest: Duration::MAX,
            cursor: Some(0),
        }
    }

    /// The next page, as it came, with [`entries`] in it; `None` after the last one.
    pub async fn page(&mut self) -> Result<Option<Encoded>, Error> {
        let Some(cursor) = self.cursor else {
            return Ok(None);
        };
        let numbers = [self.part as u64, cursor, self.most as u64];
        let [part, from, most] = numbers.map(|number| codec::encode_numbers([number]));
        let (asked, params): (_, [&[u8]; 3]) = (Instant::now(), [&part, &from, &most]);
        let answer = match self.replicas.ask(self.place, "scan", &params).await {
            // A node of the former version takes no size.
            Err(error) if error.kind == Kind::BadRequest => {
                self.replicas.ask(self.place, "scan", &params[..2]).await?
            }
            answer => answer?,
        };
        self.adapt(asked.elapsed());
        let page = codec::items(&answer).ok_or_else(odd)?;
        let [start_id, next, _] = page[..] else {
            return Err(odd());
        };
        let start_id = codec::number(start_id).ok_or_else(odd)?;
        // A node that has restarted counts its entries anew.
        if *self.start_id.get_or_insert(start_id) != start_id {
            return Err(Error::new(Kind::Unavailable, "it has restarted meanwhile"));
        }
        self.cursor = match codec::number(next) {
            Some(next) if next > cursor => Some(next),
            None if next == codec::NIL => None,
            _ => return Err(odd()),
        };
        drop(page);
        Ok(Some(answer))
    }

    /// Chooses the size of the next page: small on a slow link, large on one with a long way.
    fn adapt(&mut self, took: Duration) {
        self.quickest = self.quickest.min(took);
        let usual = self.quickest.max(QUICK);
        if took <= 2 * usual {
            self.most = MAX_PAGE.min(2 * self.most);
        } else if took > 4 * usual {
            self.most = MIN_PAGE.max(self.most / 2);
        }
    }
}

/// The keys and entries of a page.
pub fn entries(page: &[u8]) -> Result<Vec<Pair<'_>>, Error> {
    let entries = codec::items(page).and_then(|page| codec::items(page.last()?));
    let pairs = entries.ok_or_else(odd)?.into_iter();
    let pairs = pairs.map(|pair| match codec::items(pair).ok_or_else(odd)?[..] {
        [name, kept] => Ok((key(name)?, entry(kept)?)),
        _ => Err(odd()),
    });
    pairs.collect()
}

fn odd() -> Error {
    Error::bad_request("a page is [start id, next cursor or nil, [[key, entry] …]]")
}

//! Catching up. A node that has started knows nothing of what it answered before: its
//! answers count again, part by part, once it has read what every other replica of the part holds.
//! A node that was cut off has missed writes: where its digest of a part stays unlike a
//! neighbour's, it reads the part again.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::future::join_all;
use tokio::task::yield_now;
use tokio::time::{Instant, sleep, sleep_until};

use crate::cluster::Cluster;
use crate::doubt::Neighbour;
use crate::entry::{Entry, Stamp, entry, key};
use crate::error::{Error, Kind};
use crate::replicas::{Replicas, Source};
use crate::rpc::codec::{self, Encoded};
use crate::sabotage::{Bug, planted};
use crate::status::Status;
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

/// Hears how the ring is, reads from every neighbour what this node should hold, and goes on to
/// compare; anew for each change of the ring. Never ends.
pub async fn join(store: &Store, replicas: &Replicas) {
    // No majority counts on what is read here: the window does not bound it.
    let patience = replicas.cluster().limits.window.max(SILENCE);
    let (coordinator, replicas) = (replicas, &replicas.apart(patience));
    tokio::join!(report(store, replicas), async {
        hear(store, replicas).await;
        loop {
            let moved = store.rings.moved();
            tokio::select! {
                biased;
                () = moved => {}
                () = follow(store, replicas, coordinator) => {}
            }
        }
    });
}

/// Hears how the ring is from every node that could know a later state. Until then this node
/// answers nothing: at the state that it knows it may have answered before its start, and the others
/// may have moved on.
async fn hear(store: &Store, replicas: &Replicas) {
    let mut refusals = BTreeMap::new(); // the last of each node, which is logged once
    loop {
        let unheard = store.unheard_or_answers();
        if unheard.is_empty() {
            return;
        }
        let names: Vec<&str> = unheard.iter().map(|name| &**name).collect();
        let told = replicas.exchange_with(&names, true).await;
        for (name, told) in unheard.iter().zip(&told) {
            let Err(error) = told else {
                store.note_reading(name, None);
                continue;
            };
            if error.kind == Kind::NoSuchMethod {
                store.note_heard(name); // a former version knows its file alone
            }
            store.note_reading(name, Some(remark(&replicas.cluster(), name, error)));
            let line = format!("cannot hear from {name} how the ring is: {error}");
            if error.kind.is_refusal() && refusals.get(name) != Some(&line) {
                log::warn!("{line}");
                refusals.insert(name.clone(), line);
            }
        }
        if store.unheard().len() >= unheard.len() {
            sleep(RETRY).await;
        }
    }
}

/// Catches up with every neighbour, in each ring that is asked.
async fn follow(store: &Store, replicas: &Replicas, coordinator: &Replicas) {
    let state = replicas.state();
    // A write that was answered with the help of this node's former memory was begun before
    // it stopped. Two windows later every replica that was told of it has it, or it was given up.
    let wait = match planted(Bug::NoWaitBeforeJoining) {
        false => 2 * state.ring.limits.window,
        true => Duration::ZERO,
    };
    let rings = state.rings().enumerate();
    let followed = rings.map(async |(ring, cluster)| {
        let own = &store.at(ring);
        let others = cluster.nodes().iter().enumerate().map(|(place, node)| {
            let told = (ring == 0).then(|| state.fingerprint(0, &node.name));
            Ok::<_, Error>((replicas.source(ring, place)?, told))
        });
        let Ok(others) = others.collect::<Result<Vec<_>, _>>() else {
            return; // the ring has changed again
        };
        let shared = own.shared();
        let followed = shared.iter().map(async |(place, parts)| {
            let (place, others) = (*place, &*others);
            let at = Neighbour {
                own,
                cluster,
                others,
                coordinator,
                place,
            };
            follow_neighbour(store, &at, parts, store.started + wait).await;
        });
        join_all(followed).await;
    });
    join_all(followed).await;
    std::future::pending::<()>().await;
}

/// The same with one neighbour in one ring.
async fn follow_neighbour(store: &Store, at: &Neighbour<'_>, parts: &[usize], until: Instant) {
    if at.place == at.own.place() {
        return be_alone(store, at, parts, until).await;
    }
    look_until(until, at).await;
    catch_up(store, at, parts).await;
    if at.is_of_the_old_ring() {
        compare(store, at, parts).await;
    }
}

/// A node that is alone in its ring has no others to read, and waits all the same.
async fn be_alone(store: &Store, at: &Neighbour<'_>, parts: &[usize], until: Instant) {
    let why = "two windows pass first".to_owned();
    store.note_reading(at.cluster.name(at.place), Some(why));
    sleep_until(until).await;
    for part in parts {
        at.own.mark_read(*part, at.place);
    }
}

/// Sees meanwhile whether a neighbour has entries: it may lose them before it is read.
async fn look_until(until: Instant, at: &Neighbour<'_>) {
    while Instant::now() < until {
        let _ = at.look().await;
        sleep_until((Instant::now() + RETRY).min(until)).await;
    }
}

/// Says what has become of this node, and once in a while how far its joining is. Notes the rates.
async fn report(store: &Store, replicas: &Replicas) {
    let (mut told, mut counted, mut said) = (store.started, Instant::now(), String::new());
    loop {
        if counted.elapsed() >= LOOK {
            counted = Instant::now();
            for name in store.neighbours() {
                store.note_rate(&name, replicas.take_received(&name));
            }
        }
        let status = store.status();
        let is_joining = status.state == "joining";
        if is_joining && told.elapsed() >= REPORT {
            log::info!("joining, {}", status.waiting());
            told = Instant::now();
        } else if status.state != said {
            if let Some(line) = line(store, &status) {
                log::info!("{line}");
            }
            said = status.state;
        }
        sleep(if is_joining { RETRY } else { LOOK }).await;
    }
}

/// The line of the log for a node that has come to this state.
fn line(store: &Store, status: &Status) -> Option<String> {
    let keys = status.keys;
    let (s, took) = (if keys == 1 { "" } else { "s" }, store.started.elapsed());
    let nowhere = match store.knows_entries() {
        false => ": no neighbour had any, as at a first start",
        true => "",
    };
    match &*status.state {
        "ready" => Some(format!(
            "ready with {keys} key{s} after {took:.1?}{nowhere}"
        )),
        "joining" => None,
        other => Some(format!("{other}: {}", status.notes())),
    }
}

/// Reads all parts that are shared with one neighbour.
async fn catch_up(store: &Store, at: &Neighbour<'_>, parts: &[usize]) {
    let name = at.cluster.name(at.place);
    for &part in parts {
        if !at.own.is_missing(part, at.place) {
            continue; // it was read before the ring changed
        }
        while let Err(error) = read(store, at, part).await {
            if error.kind == Kind::WrongRing {
                let _ = at.coordinator.exchange(name).await; // one of the two has missed a change
            } else if error.kind.is_refusal() {
                log::warn!("cannot join from {name}: {error}");
                sleep(RETRY_REFUSED).await;
            }
            sleep(RETRY).await;
        }
        at.look_around(part).await;
        while !at.own.mark_read(part, at.place) {
            if let Err(error) = settle(at, part).await {
                let remark = remark(at.cluster, name, &error);
                store.note_reading(name, Some(remark));
                sleep(RETRY).await;
            }
        }
    }
}

/// Compares digests with one neighbour, and reads a part again where they stay different.
async fn compare(store: &Store, at: &Neighbour<'_>, parts: &[usize]) {
    let mut looks = BTreeMap::new(); // how the digests of each part differ, and how often they did so
    loop {
        sleep(LOOK).await;
        let Some(theirs) = look_or_exchange(at).await else {
            continue;
        };
        let ours = store.status();
        for &part in parts {
            let owner = at.cluster.name(part);
            let difference = ours.difference(&theirs, owner).unwrap_or(0);
            let times = match looks.get(&part) {
                Some((seen, times)) if *seen == difference => times + 1,
                _ => 1,
            };
            looks.insert(part, (difference, times));
            // Writes in flight make digests differ for a moment, so one look is not enough. If
            // reading the part changes nothing, reading it once more will not either.
            if difference != 0 && times == 2 {
                let repaired = match read(store, at, part).await {
                    Ok(()) => settle(at, part).await,
                    failed => failed,
                };
                match repaired {
                    // Failed, not refused: the next look that is the same reads again.
                    Err(error) if !error.kind.is_refusal() => {
                        looks.insert(part, (difference, 1));
                    }
                    Err(error) => log::warn!("cannot repair: {error}"),
                    Ok(()) => {}
                }
            }
        }
    }
}

/// What a neighbour says that is in the same state of the ring. Else one of the two has missed a change, and hears of it:
/// perhaps no guest asks it.
async fn look_or_exchange(at: &Neighbour<'_>) -> Option<Status> {
    let theirs = at.look().await.ok()?;
    if at.is_same(&theirs, at.place) {
        return Some(theirs);
    }
    let _ = at.coordinator.exchange(at.cluster.name(at.place)).await;
    None
}

/// Reads one part at a neighbour to its end, and notes how that goes.
async fn read(store: &Store, at: &Neighbour<'_>, part: usize) -> Result<(), Error> {
    let name = at.cluster.name(at.place);
    let mut scan = Scan::of(at.source()?.clone(), part);
    let (mut reached, mut lost) = (scan.cursor, 0);
    while let Err(error) = read_on(store, at, &mut scan).await {
        store.note_reading(name, Some(remark(at.cluster, name, &error)));
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

/// Keeps what swaps have left at neighbours and this node could not accept: no majority may have it.
async fn settle(at: &Neighbour<'_>, part: usize) -> Result<(), Error> {
    let others = at.cluster.replicas(part);
    let others = others.filter(|place| *place != at.own.place());
    let others = others.filter_map(|place| Some(&at.others.get(place)?.0));
    let (others, mut after, mut result) = (others.collect::<Vec<_>>(), None, Ok(()));
    loop {
        let (keys, last) = at.own.unsettled(part, after)?;
        if last.is_none() {
            return result;
        }
        after = last;
        let settled = keys
            .iter()
            .map(|(key, found)| settle_key(at, &others, part, key, found));
        for settled in join_all(settled).await {
            result = result.and(settled);
        }
        yield_now().await; // guests go first
    }
}

/// Copies what all other replicas have. Where they differ, a swap that changes nothing makes them equal.
async fn settle_key(
    at: &Neighbour<'_>,
    others: &[&Source],
    part: usize,
    key: &[u8],
    found: &Entry,
) -> Result<(), Error> {
    let encoded = codec::encode_bytes(key);
    let params: [&[u8]; 1] = [&encoded];
    let loads = others.iter().map(|other| other.ask("load", &params));
    let mut copies = Vec::new();
    for answer in join_all(loads).await {
        match answer {
            Ok(answer) => copies.push(entry(&answer)?.to_owned()),
            // It has lost its memory, as this node has.
            Err(error) if error.kind == Kind::Joining && at.own.is_missing(part, at.place) => {}
            Err(error) => return Err(error),
        }
    }
    let newest = copies.iter().max_by_key(|copy| copy.stamp).unwrap_or(found);
    if copies.iter().any(|copy| copy.stamp != newest.stamp) {
        at.coordinator.of(key)?.read_by_swap(true).await?;
        return Err(Error::new(Kind::Unavailable, "a swap is not settled yet"));
    }
    at.own.settle(key, newest.borrow())
}

/// Why a node cannot be read or heard, for those who know its address.
fn remark(cluster: &Cluster, name: &str, error: &Error) -> String {
    match cluster.node(name) {
        _ if error.kind.is_refusal() => error.kind.word().to_owned(), // the log has more
        Some(node) => error.why.replace(&format!("{}: ", node.address), ""),
        None => error.why.clone(),
    }
}

/// Reads a part from where the scan is to its end.
async fn read_on(store: &Store, at: &Neighbour<'_>, scan: &mut Scan) -> Result<(), Error> {
    let owner = at.cluster.name(scan.part);
    let theirs = at.look().await?.entries;
    let (of, mut quickest) = (theirs.get(owner).copied().unwrap_or(0), Duration::MAX);
    store.note_reading(at.cluster.name(at.place), None);
    while let Some(read) = scan.cursor {
        let read = usize::try_from(read).unwrap_or(0);
        at.own.note_progress(scan.part, at.place, read, of);
        let asked = Instant::now();
        let Some(page) = scan.page().await? else {
            break;
        };
        let took = asked.elapsed();
        for (key, entry, promised) in entries(&page)? {
            while let Err(error) = at.own.take_over(key, entry, promised) {
                match store.journal().filter(|journal| journal.is_behind()) {
                    Some(journal) => journal.all_settled().await,
                    None => return Err(error),
                }
            }
        }
        if let Some(journal) = store.journal() {
            journal.all_settled().await; // a disk sets the pace
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
pub struct Scan {
    source: Source,
    part: usize,
    start_id: Option<u64>,
    most: usize, // bytes of the next page
    quickest: Duration,
    /// Where the next page begins. From 0 again, it fails if the node has restarted meanwhile.
    pub cursor: Option<u64>,
}

/// A key, its entry and the highest ballot that is promised for it, as they lie in a page.
pub type Kept<'a> = (&'a [u8], Entry<&'a [u8]>, u64);

impl Scan {
    /// Begins before the first page, at a node of the ring as it is now.
    pub fn new(replicas: &Replicas, place: usize, part: usize) -> Result<Self, Error> {
        Ok(Scan::of(replicas.source(0, place)?, part))
    }

    /// The same at a node that is ready, or an error. A joining node's list may lack answered writes. Such a
    /// node refuses `load`, so it is asked one, for any key of the part. The pages before and after
    /// it have one start id: the node has not restarted since.
    pub async fn of_a_ready_node(
        replicas: &Replicas,
        place: usize,
        part: usize,
    ) -> Result<Self, Error> {
        let mut scan = Scan::new(replicas, place, part)?;
        scan.page().await?;
        let (ring, mut keys) = (
            replicas.cluster(),
            (0_u64..).map(|number| number.to_string()),
        );
        let key = keys
            .find(|key| ring.owner(key.as_bytes()) == part)
            .unwrap_or_default();
        let load: [&[u8]; 2] = [&codec::encode_bytes(key.as_bytes()), &Stamp::MAX.begin(2)];
        scan.source.ask("load", &load).await?;
        scan.cursor = Some(0);
        Ok(scan)
    }

    fn of(source: Source, part: usize) -> Self {
        Scan {
            source,
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
        let answer = match self.source.ask("scan", &params).await {
            // A node of the former version takes no size.
            Err(error) if error.kind == Kind::BadRequest => {
                self.source.ask("scan", &params[..2]).await?
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
pub fn entries(page: &[u8]) -> Result<Vec<Kept<'_>>, Error> {
    let entries = codec::items(page).and_then(|page| codec::items(page.last()?));
    let pairs = entries.ok_or_else(odd)?.into_iter();
    let pairs = pairs.map(|pair| match codec::items(pair).ok_or_else(odd)?[..] {
        [name, kept] => Ok((key(name)?, entry(kept)?, 0)),
        [name, kept, promised] => {
            let promised = codec::number(promised).ok_or_else(odd)?;
            Ok((key(name)?, entry(kept)?, promised))
        }
        _ => Err(odd()),
    });
    pairs.collect()
}

fn odd() -> Error {
    Error::bad_request(
        "a page is [start id, next cursor or nil, [[key, entry, promised ballot or nothing] …]]",
    )
}

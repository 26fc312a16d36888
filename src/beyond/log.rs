//! The log on disk, for a node with `[disk]` in its file: an answered write survives the loss of power of all hosts at
//! once, and no answer reveals what the disk does not hold. What a store keeps goes to its journal, the
//! journal to the end of the log, all of a moment in one commit, and an answer about a key waits until
//! the key's records are synced. A node that starts takes a whole log back and is ready at once.

mod dir;
pub mod files;
pub mod segment;

use std::future::Future;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::task::{spawn_blocking, yield_now};
use tokio::time::{Instant, sleep, timeout};

use crate::cluster::Cluster;
use crate::entry::key;
use crate::error::Error;
use crate::rpc::{Answer, Reached, Service};
use crate::sabotage::{Bug, planted};
use crate::server::Node;
use crate::store::Store;
use crate::store::journal::{Batch, Journal};
use dir::Dir;
use files::{Files, Found, Segments, is_full};

/// The size of a segment: making one does not hold a commit up for long.
const SEGMENT: u32 = 4 << 20;
/// What is written anew at a time, in bytes.
const PAGE: usize = 256 << 10;
/// How many such pages are written between two commits, at most, and synced together.
const AT_ONCE: usize = 8;
/// What handing a commit over to a thread costs, about: on a disk that needs no longer, a node of one thread makes
/// it in place.
const HAND_OVER: Duration = Duration::from_micros(50);
/// How many commits are handed over after one that took longer.
const SLOW: u32 = 4;
/// Before a full disk is tried again.
const RETRY: Duration = Duration::from_millis(500);
/// Before all is written anew again on a disk that had no room for it.
const PAUSE: Duration = Duration::from_secs(30);

/// The signal at the limit of a file's size, which ends a process that does not take it.
const SIGXFSZ: i32 = 25;

/// What writes a store down.
pub struct Disk<F> {
    segments: Option<Segments<F>>, // else a job has them
    journal: Arc<Journal>,
    batch: Option<Batch>,           // what is to be committed next
    page: Option<crate::store::At>, // the next one of those that are written anew
    most: usize,                    // its bytes
    is_alone: bool,                 // its node has one thread
    slow: u32,                      // so many commits are handed over
    owed: usize,                    // bytes of those, before the next commit
    woken: Instant,                 // those who wait for what is late
    rests: Instant,                 // until then a full disk is not tried again
    begins: Instant,                // until then nothing is written anew
}

impl Store {
    /// The store of a node, with what its log has if it has one.
    pub(crate) fn open(
        cluster: Arc<Cluster>,
        place: usize,
    ) -> io::Result<(Self, Option<Disk<Dir>>)> {
        let Some(path) = cluster
            .disk
            .as_ref()
            .map(|path| path.join(cluster.name(place)))
        else {
            return Ok((Store::new(cluster, place), None));
        };
        // A file that may not grow any more is a full disk, and no reason to end the process.
        drop(signal(SignalKind::from_raw(SIGXFSZ)));
        let opened = Disk::open(cluster, place, || Dir::open(&path), SEGMENT);
        let (store, disk) = opened.map_err(|error| of(&path, &error))?;
        Ok((store, Some(disk)))
    }
}

fn of(path: &Path, error: &io::Error) -> io::Error {
    io::Error::other(format!("{}: {error}", path.display()))
}

impl<F: Files> Disk<F> {
    /// A store, and the log that has been read for it. A log that is damaged is put aside.
    pub fn open(
        cluster: Arc<Cluster>,
        place: usize,
        files: impl Fn() -> io::Result<F>,
        size: u32,
    ) -> io::Result<(Store, Self)> {
        let (begun, store) = (Instant::now(), Store::new(cluster.clone(), place));
        let mut segments = Segments::new(files()?, store.name(), size);
        match segments.open(&mut |records| store.replay(records).map_err(io::Error::other))? {
            Found::Whole => take_over(&mut segments, &store, begun.elapsed())?,
            Found::Nothing => {
                segments.begin()?;
                log::warn!("there is no log yet: it begins one, and this node joins");
            }
            Found::Damaged(why) => {
                let kept = segments.files.put_aside()?;
                log::warn!("its log is damaged: {why}; it is kept as {kept}, and this node joins");
                return Disk::open(cluster, place, files, size);
            }
        }
        let disk = Disk {
            segments: Some(segments),
            journal: Arc::default(),
            batch: None,
            page: None,
            most: PAGE.min(size as usize / 4),
            is_alone: true,
            slow: SLOW,
            owed: 0,
            woken: begun,
            rests: Instant::now(),
            begins: Instant::now(),
        };
        store.write_down(disk.journal.clone());
        Ok((store, disk))
    }

    /// Writes down what the store keeps. Ends with the first error that is more than a full disk.
    pub async fn write(&mut self, store: &Store) -> io::Result<()> {
        // A commit in place stops this thread alone. Nobody would wake the others, who wait for it, while it is late.
        self.is_alone = store.limits().threads.unwrap_or(1) == 1;
        loop {
            let done = match self.commit().await {
                Ok(()) => self.look_ahead(store).await,
                failed => failed,
            };
            match (done, &mut self.segments) {
                (Ok(()), _) => {}
                (Err(error), Some(segments)) => return Err(segments.ended(error)),
                (failed, None) => return failed,
            }
        }
    }

    /// Does something with the segments, while the node goes on.
    async fn on<T: Send + 'static>(
        &mut self,
        job: impl FnOnce(&mut Segments<F>) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        self.on_or_in(job, false).await
    }

    /// The same. A job that takes no longer than to hand it over is done in place.
    async fn on_or_in<T: Send + 'static>(
        &mut self,
        job: impl FnOnce(&mut Segments<F>) -> io::Result<T> + Send + 'static,
        in_place: bool,
    ) -> io::Result<T> {
        let lost = || io::Error::other("the log was lost in a panic");
        let mut segments = self.segments.take().ok_or_else(lost)?;
        let pause = segments.files.pause();
        if in_place || pause.is_some() {
            let done = job(&mut segments);
            self.segments = Some(segments);
            if let Some(pause) = pause {
                self.journal.late(pause, &mut self.woken).await;
            }
            return done;
        }
        let job = spawn_blocking(move || {
            let done = job(&mut segments);
            (segments, done)
        });
        let done = self.journal.late(job, &mut self.woken).await;
        let (segments, done) = done.map_err(io::Error::other)?;
        self.segments = Some(segments);
        done
    }

    /// Commits the next batch, if there is one. While the disk is full, it waits.
    async fn commit(&mut self) -> io::Result<()> {
        self.batch = self.batch.take().or_else(|| self.journal.take());
        let Some(batch) = &self.batch else {
            if self.page.is_none() && !self.segments.as_ref().is_some_and(Segments::has_old) {
                let _ = timeout(RETRY, self.journal.grown()).await;
            }
            return Ok(());
        };
        let records = batch.array();
        let bytes = records.len();
        let commit = |segments: &mut Segments<F>| {
            let begun = Instant::now();
            segments.commit(records)?;
            Ok((segments.bytes(), begun.elapsed()))
        };
        let is_quick = self.is_alone && self.slow == 0 && !self.needs_spare();
        match self.on_or_in(commit, is_quick).await {
            Ok((size, took)) => {
                self.slow = match took > HAND_OVER {
                    true => SLOW,
                    false => self.slow.saturating_sub(1),
                };
                let batch = self.batch.take().unwrap_or_default();
                self.journal.note_settled(&batch, took, size);
                self.owed += 2 * bytes; // what is written anew is done before as much is old again
                Ok(())
            }
            Err(error) if is_full(&error) => {
                self.note_full(&error);
                self.journal.note_stuck();
                if self.page.is_none() {
                    let retry = sleep(RETRY);
                    self.journal.late(retry, &mut self.woken).await;
                }
                Ok(())
            }
            failed => failed.map(drop),
        }
    }

    /// Makes the next segment, and writes all anew once a third of what is on disk is old.
    async fn look_ahead(&mut self, store: &Store) -> io::Result<()> {
        if self.segments.as_ref().is_some_and(Segments::has_old) {
            self.on(Segments::remove_old).await?;
        }
        self.prepare().await?;
        match self.write_anew(store).await {
            Err(error) if is_full(&error) => {
                (self.page, self.begins) = (None, Instant::now() + PAUSE);
                let give_up = |segments: &mut Segments<F>| {
                    segments.give_up();
                    Ok(())
                };
                self.on(give_up).await
            }
            done => done,
        }
    }

    fn needs_spare(&self) -> bool {
        self.segments.as_ref().is_some_and(Segments::needs_spare)
    }

    async fn prepare(&mut self) -> io::Result<()> {
        if self.rests > Instant::now() {
            return Ok(());
        }
        if self.needs_spare() {
            match self.on(Segments::prepare).await {
                Err(error) if is_full(&error) => {
                    self.rests = Instant::now() + RETRY;
                    self.note_full(&error);
                    return Ok(());
                }
                done => done?,
            }
        }
        if self.batch.is_none() && self.journal.note_full(false) {
            log::info!("the disk has room again");
        }
        Ok(())
    }

    /// Some pages of what is written anew: so few that no commit waits for them long.
    async fn write_anew(&mut self, store: &Store) -> io::Result<()> {
        if self.page.is_none() {
            let mut segments = self.segments.iter();
            let is_worn = segments.any(|segments| segments.is_worn(store.bytes()));
            if !is_worn || self.begins > Instant::now() {
                self.owed = 0;
                return Ok(());
            }
            self.page = Some((0, 0, 0, true));
            let kept = store.bytes();
            self.on(move |segments| segments.rebase(kept)).await?;
        }
        let mut pages = Vec::new();
        while let Some(at) = self.page {
            let (records, next) = store.page(at, self.most);
            self.owed = self.owed.saturating_sub(records.len());
            self.page = next;
            pages.push(records);
            yield_now().await; // guests go first
            if self.owed == 0 || pages.len() == AT_ONCE {
                break;
            }
        }
        let (is_whole, kept) = (self.page.is_none(), store.bytes());
        let add = move |segments: &mut Segments<F>| match is_whole {
            true => segments.add(pages).and_then(|()| segments.based(kept)),
            false => segments.add(pages),
        };
        self.on(add).await
    }

    fn note_full(&self, error: &io::Error) {
        if !self.journal.note_full(true) {
            log::warn!("the disk is full ({error}): new sets are refused until it has room");
        }
    }
}

/// Goes on with a whole log, which was read for this store in that time.
fn take_over<F: Files>(
    segments: &mut Segments<F>,
    store: &Store,
    took: Duration,
) -> io::Result<()> {
    let is_ready = store.replayed().map_err(io::Error::other)?;
    segments.take_over(store.bytes())?;
    match is_ready {
        true => log::info!("read its log in {took:.1?}"),
        false => log::info!("read its log in {took:.1?}, was not ready, and joins"),
    }
    Ok(())
}

/// A node that answers what is on disk alone. A coordinator counts its own replica in the same way; see `replicas`.
pub(crate) struct Gated<'a>(&'a Node);

impl Node {
    /// This node, with each answer of its store held back until the disk has what it reveals.
    pub(crate) fn gated(&self) -> Gated<'_> {
        Gated(self)
    }

    /// Writes down what it keeps; without a disk, nothing ever. Ends when that fails.
    pub(crate) async fn write_down(&self, disk: Option<Disk<impl Files>>) -> io::Error {
        let Some(mut disk) = disk else {
            return std::future::pending().await;
        };
        match disk.write(&self.store).await {
            Err(error) => error,
            Ok(()) => io::Error::other("the log ended"),
        }
    }
}

impl Service for Gated<'_> {
    fn answer(
        &self,
        method: &str,
        params: &[&[u8]],
    ) -> impl Future<Output = Result<Answer, Error>> + Send {
        self.0.answer(method, params)
    }

    fn held(&self, method: &str, params: &[&[u8]]) -> Option<Reached> {
        let journal = self.0.store.journal()?;
        match (method, params) {
            ("load", _) if planted(Bug::LoadNotGated) => None,
            ("store", _) if planted(Bug::StoreNotGated) => None,
            ("load" | "store" | "promise", [_, named, ..]) => {
                journal.settling(Some(key(named).ok()?))
            }
            ("ring", _) => journal.settling(None),
            _ => None,
        }
    }
}

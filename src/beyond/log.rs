//! The log on disk, for a node with `[disk]` in its file: an answered write survives the loss of power of all hosts at
//! once, and no answer reveals what the disk does not hold. What a store keeps goes to its journal, the
//! journal to the end of the log, all of a moment in one commit, and an answer about a key waits until
//! the key's records are synced. A node that starts takes a whole log back and is ready at once.

mod dir;
pub mod files;
pub mod segment;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, timeout};

use crate::cluster::Cluster;
use crate::entry::key;
use crate::error::Error;
use crate::rpc::{Answer, Service};
use crate::sabotage::{Bug, planted};
use crate::server::Node;
use crate::status::micros;
use crate::store::Store;
use crate::store::journal::{Batch, Journal, Room};
use dir::Dir;
use files::{Files, Found, Segments, is_full};

/// The size of a segment: making one does not hold a commit up for long.
const SEGMENT: u32 = 4 << 20;
/// What is written anew between two commits, in bytes.
const PAGE: usize = 256 << 10;
/// Before a full disk is tried again.
const RETRY: Duration = Duration::from_millis(500);

/// The signal at the limit of a file's size, which ends a process that does not take it.
const SIGXFSZ: i32 = 25;

/// What writes a store down.
pub struct Disk<F> {
    segments: Option<Segments<F>>, // else a job has them
    journal: Arc<Journal>,
    page: Option<crate::store::At>, // the next one of those that are written anew
    rests: Instant,                 // until then nothing is written anew
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
        let status = store.status();
        if status.bytes > status.memory {
            let why = format!(
                "{} bytes, and memory in [limits] is {}",
                status.bytes, status.memory
            );
            return Err(of(&path, &io::Error::other(why)));
        }
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
        let mut store = Store::new(cluster.clone(), place);
        let mut segments = Segments::new(files()?, store.name(), size);
        let begun = Instant::now();
        match segments.open(&mut |records| store.replay(records).map_err(io::Error::other))? {
            Found::Whole => {
                let is_ready = store.replayed().map_err(io::Error::other)?;
                let then = if is_ready {
                    ""
                } else {
                    ", was not ready, and joins"
                };
                log::info!("read its log in {:.1?}{then}", begun.elapsed());
            }
            Found::Nothing => segments.begin()?,
            Found::Damaged(why) => {
                let kept = segments.files.put_aside()?;
                log::warn!("its log is damaged: {why}; it is kept as {kept}, and this node joins");
                store = Store::new(cluster, place);
                segments = Segments::new(files()?, store.name(), size);
                segments.begin()?;
            }
        }
        let journal = Arc::new(Journal::default());
        store.write_down(journal.clone());
        let disk = Disk {
            segments: Some(segments),
            journal,
            page: None,
            rests: Instant::now(),
        };
        Ok((store, disk))
    }

    /// Writes down what the store keeps. Ends with the first error that is more than a full disk: the log is put aside
    /// then.
    pub async fn write(&mut self, store: &Store) -> io::Result<()> {
        loop {
            let done = match self.journal.take() {
                Some(batch) => self.commit(batch).await,
                None if self.page.is_some() => Ok(()),
                None => {
                    let _ = timeout(RETRY, self.journal.grown()).await;
                    Ok(())
                }
            };
            let done = match done {
                Ok(()) => self.look_ahead(store).await,
                failed => failed,
            };
            if let Err(error) = done {
                return self.on(move |segments| Err(segments.suspect(&error))).await;
            }
        }
    }

    /// Does something with the segments, while the node goes on.
    async fn on<T: Send + 'static>(
        &mut self,
        job: impl FnOnce(&mut Segments<F>) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let lost = || io::Error::other("the log was lost in a panic");
        let mut segments = self.segments.take().ok_or_else(lost)?;
        let (segments, done) = if let Some(pause) = segments.files.pause() {
            let done = job(&mut segments);
            pause.await;
            (segments, done)
        } else {
            let job = spawn_blocking(move || {
                let done = job(&mut segments);
                (segments, done)
            });
            job.await.map_err(io::Error::other)?
        };
        self.segments = Some(segments);
        done
    }

    /// Commits a batch. While the disk is full, it waits.
    async fn commit(&mut self, batch: Batch) -> io::Result<()> {
        loop {
            let (records, begun) = (batch.array(), Instant::now());
            let commit = |segments: &mut Segments<F>| {
                segments.commit(records)?;
                Ok(segments.bytes())
            };
            match self.on(commit).await {
                Ok(bytes) => {
                    let took = micros(begun.elapsed());
                    self.journal.note_settled(&batch, took, bytes);
                    if self.journal.room() == Room::None {
                        self.journal.note_room(Room::Little); // until the next segment is there
                    }
                    return Ok(());
                }
                Err(error) if is_full(&error) => {
                    self.note_full(Room::None, &error);
                    sleep(RETRY).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Makes the next segment, and writes all anew once half of what is on disk is old: so much that no commit waits for it long.
    async fn look_ahead(&mut self, store: &Store) -> io::Result<()> {
        let Some(segments) = &self.segments else {
            return Ok(());
        };
        let (is_worn, needs_spare) = (segments.is_worn(), segments.needs_spare());
        if needs_spare || self.journal.room() > Room::Enough {
            match self.on(Segments::prepare).await {
                Ok(()) if self.journal.note_room(Room::Enough) != Room::Enough => {
                    log::info!("the disk has room again");
                }
                Err(error) if is_full(&error) => self.note_full(Room::Little, &error),
                done => return done,
            }
        }
        let written = match self.page.take() {
            Some(at) => self.write_page(store, at).await,
            None if is_worn && self.rests <= Instant::now() => {
                self.page = Some((0, 0, 0));
                self.on(Segments::rebase).await
            }
            None => Ok(()),
        };
        match written {
            Err(error) if is_full(&error) => {
                (self.page, self.rests) = (None, Instant::now() + 10 * RETRY);
                let give_up = |segments: &mut Segments<F>| {
                    segments.give_up();
                    Ok(())
                };
                self.on(give_up).await
            }
            written => written,
        }
    }

    async fn write_page(&mut self, store: &Store, at: crate::store::At) -> io::Result<()> {
        let (records, next) = store.page(at, PAGE);
        self.on(move |segments| segments.add(records)).await?;
        self.page = next;
        match next {
            Some(_) => Ok(()),
            None => self.on(Segments::based).await,
        }
    }

    fn note_full(&self, room: Room, error: &io::Error) {
        if self.journal.note_room(room) == Room::Enough {
            log::warn!("the disk is full ({error}): new sets are refused until it has room");
        }
    }
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
    async fn answer(&self, method: &str, params: &[&[u8]]) -> Result<Answer, Error> {
        let answer = self.0.answer(method, params).await;
        let Some(journal) = self.0.store.journal() else {
            return answer;
        };
        match (method, params) {
            ("load", _) if planted(Bug::LoadNotGated) => {}
            ("store", _) if planted(Bug::StoreNotGated) => {}
            ("load" | "store" | "promise", [_, named, ..]) => {
                if let Some(settling) = key(named).ok().and_then(|key| journal.settling(key)) {
                    settling.await;
                }
            }
            ("scan" | "ring", _) => journal.all_settled().await,
            _ => {}
        }
        answer
    }
}

//! The files of a log, and their order. `1.base` begins a log: from the newest `base` on, each segment's closing frame
//! names the next one, until the last, which has none. A `log` has what was committed; a `more` goes on with a
//! base. What is in none of these places is left over from something that a crash ended, or is damage.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::io::{self, ErrorKind};

use futures::future::BoxFuture;

use super::segment::{Body, Header, SECTOR, Segment, VERSION, Verdict, frame, read, sectors};
use crate::sabotage::{Bug, planted};

/// What a segment is filled with at first.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
/// How many files are removed at a time: each takes a fraction of a millisecond.
const FEW: usize = 8;

/// What a log asks of the folder in which it lies. Names are names of files in it.
pub trait Files: Send + 'static {
    /// The names that are there.
    fn list(&self) -> io::Result<Vec<String>>;
    /// All bytes of a file.
    fn read(&self, name: &str) -> io::Result<Vec<u8>>;
    /// Writes from this byte on; the file is made if it is not there. Fails with [`disk_failed`] where the disk does.
    fn write(&mut self, name: &str, at: usize, bytes: &[u8]) -> io::Result<()>;
    /// What was written to a file is on disk when this returns. Fails like `write`.
    fn sync(&mut self, name: &str) -> io::Result<()>;
    /// Which names there are is on disk when this returns. Fails like `write`.
    fn sync_names(&mut self) -> io::Result<()>;
    /// Gives a file another name.
    fn rename(&mut self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file.
    fn remove(&mut self, name: &str) -> io::Result<()>;
    /// Gives the folder another name, under which nothing looks for it; which one. It is on disk when this returns.
    fn put_aside(&mut self) -> io::Result<String>;
    /// How long a job waits that runs where it stands, in a simulation. Else it has a thread of its own.
    fn pause(&self) -> Option<BoxFuture<'static, ()>> {
        None
    }
}

/// What a log was found to be.
#[derive(Debug, PartialEq)]
pub enum Found {
    /// There is none.
    Nothing,
    /// All that was answered is there. Of the last commit some may be missing.
    Whole,
    /// Something is missing or wrong: why.
    Damaged(String),
}

/// Segments that are written to.
pub struct Segments<F> {
    pub(super) files: F,
    header: Header,
    end: End,
    newest: u64,         // the highest number that a segment has
    spare: Option<u64>,  // the segment that goes on when the current one is full
    before: Vec<String>, // the segments before the current one
    based: usize,        // how many there were when all was last written anew
    kept: usize,         // how many bytes the store kept then, at most
    base: Option<Base>,
    is_torn: bool,    // its last frame, when it was read
    old: Vec<String>, // files that are not part of it any more
}

/// Behind the name of a segment that does not count yet.
const NEW: &str = ".new";

/// The first segment of a log, the only base that may have no end yet.
const FIRST: &str = "1.base";

/// Where the next frame goes.
struct End {
    number: u64,
    name: String,
    at: usize, // in sectors
}

/// A base that is being written.
struct Base {
    kept: usize,       // by the store when it was begun
    instead_of: usize, // so many segments
    next: u64,         // the one behind them
    done: Vec<String>, // the first one has no name yet by which it counts
    end: End,
}

/// A write or a sync that fails is never tried again: the system forgets what it could not write, and what is read
/// from now on may not be on disk.
#[derive(Debug)]
struct DiskFailed(io::Error);

impl fmt::Display for DiskFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Error for DiskFailed {}

/// The error of a disk that could not write or sync.
pub fn disk_failed(error: io::Error) -> io::Error {
    io::Error::other(DiskFailed(error))
}

fn is_of_disk(error: &io::Error) -> bool {
    error
        .get_ref()
        .is_some_and(<dyn Error + Send + Sync>::is::<DiskFailed>)
}

fn damaged(why: impl Into<String>) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, why.into())
}

/// Whether there is no room: then nothing was changed, and it may be tried again.
pub fn is_full(error: &io::Error) -> bool {
    use ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(error.kind(), FileTooLarge | QuotaExceeded | StorageFull)
}

/// The parts of a name: number and kind.
fn parts(name: &str) -> Option<(u64, &str)> {
    let (number, kind) = name.split_once('.')?;
    Some((number.parse().ok()?, kind))
}

fn new(name: &str) -> String {
    format!("{name}{NEW}")
}

fn is(name: &str, kind: &str) -> bool {
    parts(name).is_some_and(|(_, found)| found == kind)
}

impl<F: Files> Segments<F> {
    /// A log of this node in segments of this size, which may not be there yet: see [`Segments::open`].
    pub fn new(files: F, node: &str, size: u32) -> Self {
        let node = node.to_owned();
        let header = Header {
            version: VERSION,
            size,
            log: fastrand::u64(..),
            node,
        };
        let (number, name, at) = (1, "1.base".to_owned(), 0);
        Segments {
            files,
            header,
            end: End { number, name, at },
            newest: 1,
            spare: None,
            before: Vec::new(),
            based: 0,
            kept: 0,
            base: None,
            is_torn: false,
            old: Vec::new(),
        }
    }

    /// Reads all records that are there, commit by commit. An error is one of reading, or what `take` says.
    pub fn open(&mut self, take: &mut impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<Found> {
        let (mut names, mut news) = (BTreeMap::new(), Vec::new());
        for name in self.files.list()? {
            self.newest = parts(&name)
                .map_or(0, |(number, _)| number)
                .max(self.newest);
            match parts(&name) {
                Some((number, "base" | "log" | "more")) => {
                    if let Some(other) = names.insert(number, name) {
                        return Ok(Found::Damaged(format!("{other} is there twice")));
                    }
                }
                Some((_, "base.new" | "log.new" | "more.new")) => news.push(name),
                _ => {}
            }
        }
        if names.is_empty() {
            return Ok(Found::Nothing);
        }
        match self.follow(&mut names, take) {
            Ok(is_torn) => {
                self.old = news.into_iter().chain(names.into_values()).collect();
                self.is_torn = is_torn;
                Ok(Found::Whole)
            }
            Err(error) if error.kind() == ErrorKind::InvalidData => {
                Ok(Found::Damaged(error.to_string()))
            }
            Err(error) => Err(error),
        }
    }

    /// Reads from the newest base on to the last segment; whether its last frame is torn. What is left in `names` is
    /// not part of it.
    fn follow(
        &mut self,
        names: &mut BTreeMap<u64, String>,
        take: &mut impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<bool> {
        let mut bases = names.iter().filter(|(_, name)| is(name, "base"));
        let base = bases.next_back().map(|(number, _)| *number);
        let base = base.ok_or_else(|| damaged("its first segment is missing"))?;
        let (mut number, mut oldest) = (base, None);
        let is_torn = loop {
            let name = names.remove(&number);
            let name = name.ok_or_else(|| damaged(format!("segment {number} is missing")))?;
            if is(&name, "log") {
                oldest = oldest.or(Some(number));
            }
            let segment = read(number, &self.files.read(&name)?);
            let next = self.checked(&name, &segment, number == base)?;
            for body in &segment.bodies {
                if let Body::Records(records) = body {
                    take(records)?;
                }
            }
            let Some(next) = next else {
                let (at, is_torn) = (segment.end, segment.verdict == Verdict::TornLast);
                self.end = End { number, name, at };
                break is_torn;
            };
            self.before.push(name);
            number = next;
        };
        // Where the last one has lost its end, another one has what followed.
        for (number, name) in names.range(oldest.unwrap_or(base)..) {
            if is(name, "log") && read(*number, &self.files.read(name)?).bodies.len() > 1 {
                return Err(damaged(format!("nothing leads to {name}")));
            }
        }
        Ok(is_torn)
    }

    /// Which segment goes on behind this one, if any. The log of another node, or in a later format, is no damage.
    fn checked(
        &mut self,
        name: &str,
        segment: &Segment,
        is_first: bool,
    ) -> io::Result<Option<u64>> {
        let wrong = |why: &str| damaged(format!("{name}: {why}"));
        match segment.bodies.first() {
            Some(Body::Header(Header { version, .. })) if *version != VERSION => {
                let why =
                    format!("it is in version {version} of the format, and this is {VERSION}");
                return Err(io::Error::other(why));
            }
            Some(Body::Header(Header { node, .. })) if *node != self.header.node => {
                return Err(io::Error::other(format!("this is the log of {node}")));
            }
            Some(Body::Header(header)) if is_first => self.header = header.clone(),
            Some(Body::Header(header)) if *header != self.header => {
                return Err(wrong("it is of another log"));
            }
            _ => {}
        }
        if let Verdict::Damaged(why) = &segment.verdict {
            return Err(wrong(why));
        }
        let is_end = |body: &Body| matches!(body, Body::Closing(_));
        match segment.bodies.iter().position(is_end) {
            None if name != FIRST && !is(name, "log") => Err(wrong("it leads nowhere")),
            None => Ok(None),
            Some(at) if at + 1 < segment.bodies.len() || segment.verdict != Verdict::Whole => {
                Err(wrong("it goes on behind its end"))
            }
            Some(_) => match segment.bodies.last() {
                Some(Body::Closing(next)) => Ok(Some(*next)),
                _ => Ok(None),
            },
        }
    }

    /// Takes over a whole log that was read for a store that keeps so many bytes now. After a crash it may be in memory
    /// alone, so that all of it is synced.
    pub fn take_over(&mut self, kept: usize) -> io::Result<()> {
        self.tidy().map_err(|error| self.ended(error))?;
        self.kept = kept.max(self.based * self.size() / 2); // in memory an entry is longer
        Ok(())
    }

    fn tidy(&mut self) -> io::Result<()> {
        if self.is_torn {
            self.write_zeros(&self.end.name.clone(), self.end.at)?;
        }
        if !planted(Bug::NoSyncAtOpen) {
            for name in self.before.iter().chain([&self.end.name]) {
                self.files.sync(name)?;
            }
            self.files.sync_names()?;
        }
        let is_based = |name: &&String| !is(name, "log");
        self.based = self.before.iter().filter(is_based).count();
        Ok(())
    }

    /// What ends the node. Where its disk has failed, the log is put aside.
    pub fn ended(&mut self, error: io::Error) -> io::Error {
        if !is_of_disk(&error) {
            return error;
        }
        let kept = match self.files.put_aside() {
            Ok(name) => format!("the log is kept as {name}, and the next start joins"),
            Err(error) => format!("rename the log before the next start: that failed ({error})"),
        };
        io::Error::other(format!("{error}; {kept}"))
    }

    fn sync(&mut self, name: &str) -> io::Result<()> {
        match self.files.sync(name) {
            Err(error) if is_of_disk(&error) && planted(Bug::FailedSyncIgnored) => Ok(()),
            synced => synced,
        }
    }

    fn size(&self) -> usize {
        self.header.size as usize
    }

    /// The longest frame: beside it are a header and a closing frame.
    fn most(&self) -> usize {
        (self.size() / SECTOR).saturating_sub(3)
    }

    /// Begins a log in a folder that has none.
    pub fn begin(&mut self) -> io::Result<()> {
        self.end.at = self.make(&new(FIRST), 1)?;
        self.publish(FIRST)
    }

    /// Makes a segment, which has no frame but a header; where the next one goes.
    fn make(&mut self, name: &str, number: u64) -> io::Result<usize> {
        let header = self.header(number);
        let at = header.len() / SECTOR;
        let made = self.files.write(name, 0, &header);
        let made = made.and_then(|()| self.write_zeros(name, at));
        let made = made.and_then(|()| self.files.sync(name));
        if made.is_err() {
            let _ = self.files.remove(name); // what is left is removed at the next start
        }
        made.map(|()| at)
    }

    /// The frame with which a segment begins.
    fn header(&self, number: u64) -> Vec<u8> {
        frame(number, 0, &Body::Header(self.header.clone()).bytes())
    }

    /// Nothing, from this sector on to the end of a segment.
    fn write_zeros(&mut self, name: &str, at: usize) -> io::Result<()> {
        for start in (at * SECTOR..self.size()).step_by(ZEROS.len()) {
            let zeros = ZEROS.get(..self.size() - start).unwrap_or(&ZEROS);
            self.files.write(name, start, zeros)?;
        }
        Ok(())
    }

    /// Gives a segment that is on disk its name.
    fn publish(&mut self, name: &str) -> io::Result<()> {
        self.files.rename(&new(name), name)?;
        self.sync_names()
    }

    fn sync_names(&mut self) -> io::Result<()> {
        match planted(Bug::FolderNotSynced) {
            true => Ok(()),
            false => self.files.sync_names(),
        }
    }

    fn next_number(&mut self) -> u64 {
        self.newest = self.newest.saturating_add(1);
        self.newest
    }

    /// Makes the segment that goes on when this one is full, unless it is there: so it shows early that a
    /// disk is full.
    pub fn prepare(&mut self) -> io::Result<()> {
        if self.spare.is_none() {
            let number = self.next_number();
            let name = format!("{number}.log");
            self.make(&new(&name), number)?;
            self.publish(&name)?;
            self.spare = Some(number);
        }
        Ok(())
    }

    /// Whether it is not there.
    pub fn needs_spare(&self) -> bool {
        self.spare.is_none()
    }

    /// Writes records that belong together, and syncs them. If there is no room it may be tried again with the same
    /// ones; after any other error nothing may be written any more.
    pub fn commit(&mut self, records: Vec<u8>) -> io::Result<()> {
        let (body, count) = self.body(records)?;
        if self.end.at + count >= self.size() / SECTOR {
            self.go_on()?;
        }
        let End { number, name, at } = &self.end;
        self.files
            .write(name, at * SECTOR, &frame(*number, *at, &body))?;
        let name = name.clone();
        self.sync(&name)?;
        self.end.at += count;
        Ok(())
    }

    /// Records as they are written, and how many sectors they take.
    fn body(&self, records: Vec<u8>) -> io::Result<(Vec<u8>, usize)> {
        let body = Body::Records(records).bytes();
        match sectors(body.len()) {
            count if count <= self.most() => Ok((body, count)),
            _ => Err(io::Error::other(format!("a frame of {} bytes", body.len()))),
        }
    }

    /// Goes on in the next segment.
    fn go_on(&mut self) -> io::Result<()> {
        self.prepare()?;
        let Some(next) = self.spare else {
            return Err(io::Error::other("no next segment"));
        };
        let End { number, name, at } = &self.end;
        self.files.write(
            name,
            at * SECTOR,
            &frame(*number, *at, &Body::Closing(next).bytes()),
        )?;
        let name = name.clone();
        self.sync(&name)?;
        let at = self.header(next).len() / SECTOR;
        let (number, name) = (next, format!("{next}.log"));
        let before = std::mem::replace(&mut self.end, End { number, name, at });
        self.before.push(before.name);
        self.spare = None;
        Ok(())
    }

    /// How many bytes the files have.
    pub fn bytes(&self) -> usize {
        let base = self.base.as_ref().map_or(0, |base| base.done.len() + 1);
        let current = 1 + usize::from(self.spare.is_some());
        (self.before.len() + current + base + self.old.len()) * self.size()
    }

    /// Whether a third of it is old, where a store keeps so many bytes now: then all that is kept should be
    /// written anew.
    pub fn is_worn(&self, kept: usize) -> bool {
        let then = self.kept.max(kept).max(1);
        let needed = (self.based.saturating_mul(kept)).div_ceil(then);
        let needed = needed.max(self.based.min(1));
        self.base.is_none() && self.before.len() > needed + needed / 2
    }

    /// Whether there are files to remove.
    pub fn has_old(&self) -> bool {
        !self.old.is_empty()
    }

    /// Removes some of the files that are not part of it any more.
    pub fn remove_old(&mut self) -> io::Result<()> {
        let few = ..self.old.len().min(FEW);
        self.old
            .drain(few)
            .try_for_each(|name| match self.files.remove(&name) {
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(()), // there was no room to make it
                removed => removed,
            })
    }

    /// Begins to write anew all that a store keeps, in so many bytes now. The current segment stands behind it, whatever
    /// it has.
    pub fn rebase(&mut self, kept: usize) -> io::Result<()> {
        let number = self.next_number();
        let name = new(&format!("{number}.base"));
        let at = match (self.make(&name, number), self.spare.take()) {
            (Err(error), Some(spare)) if is_full(&error) => {
                self.files.remove(&format!("{spare}.log"))?; // a small disk has room for one of them
                self.make(&name, number)?
            }
            (made, spare) => {
                self.spare = spare;
                made?
            }
        };
        self.base = Some(Base {
            kept,
            instead_of: self.before.len(),
            next: self.end.number,
            done: Vec::new(),
            end: End { number, name, at },
        });
        Ok(())
    }

    /// Writes pages of records into the base.
    pub fn add(&mut self, pages: Vec<Vec<u8>>) -> io::Result<()> {
        for records in pages {
            self.add_page(records)?;
        }
        match &self.base {
            Some(base) => self.files.sync(&base.end.name),
            None => Ok(()),
        }
    }

    fn add_page(&mut self, records: Vec<u8>) -> io::Result<()> {
        let (body, count) = self.body(records)?;
        if self
            .base
            .as_ref()
            .is_some_and(|base| base.end.at + count >= self.size() / SECTOR)
        {
            let number = self.next_number();
            self.close(number)?;
            let (name, header) = (format!("{number}.more"), self.header(number));
            let at = header.len() / SECTOR;
            if let Some(base) = &mut self.base {
                base.end = End { number, name, at };
                self.files.write(&base.end.name, 0, &header)?; // and no zeros: it does not count before it is closed
            }
        }
        let Some(Base { end, .. }) = &mut self.base else {
            return Ok(());
        };
        let bytes = frame(end.number, end.at, &body);
        self.files.write(&end.name, end.at * SECTOR, &bytes)?;
        end.at += count;
        Ok(())
    }

    /// Ends the current segment of the base, which this one follows.
    fn close(&mut self, next: u64) -> io::Result<()> {
        if let Some(Base { done, end, .. }) = &mut self.base {
            let End { number, name, at } = end;
            let bytes = frame(*number, *at, &Body::Closing(next).bytes());
            let (name, behind) = (name.clone(), *at + bytes.len() / SECTOR);
            done.push(name.clone());
            self.files.write(&name, *at * SECTOR, &bytes)?;
            self.write_zeros(&name, behind)?;
            self.files.sync(&name)?;
        }
        Ok(())
    }

    /// The base is complete, of a store that keeps so many bytes now. It counts once its first segment has its name.
    pub fn based(&mut self, kept: usize) -> io::Result<()> {
        self.close(self.base.as_ref().map_or(0, |base| base.next))?;
        let Some(Base {
            kept: before,
            mut done,
            instead_of,
            ..
        }) = self.base.take()
        else {
            return Ok(());
        };
        self.sync_names()?; // those of the others
        if let Some(first) = done.first_mut() {
            *first = first.trim_end_matches(NEW).to_owned();
            self.publish(first)?;
        }
        (self.based, self.kept) = (done.len(), kept.max(before));
        self.old.extend(self.before.splice(..instead_of, done));
        Ok(())
    }

    /// Gives the base up: there is no room.
    pub fn give_up(&mut self) {
        if let Some(Base { done, end, .. }) = self.base.take() {
            self.old.extend(done.into_iter().chain([end.name]));
        }
    }
}

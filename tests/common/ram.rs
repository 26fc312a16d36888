//! A disk that keeps what was synced. Of the rest a power cut leaves any part: of what was written any sectors, of
//! names that were given or taken away any.

#![allow(dead_code, unreachable_pub)]

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use fastrand::Rng;
use kv54::beyond::log::files::{Files, disk_failed};

const SECTOR: usize = 512;

/// A disk; what a node has of it is a clone.
#[derive(Clone, Default)]
pub struct Ram(Arc<Mutex<Disk>>);

#[derive(Default)]
struct Disk {
    synced: Tree,
    seen: Tree,     // by those who read now
    done: Vec<Op>,  // since what is synced
    settled: usize, // so many of them are over; the others, of one job, may be under way
    asides: usize,
    least: u64, // that a job takes, in milliseconds
    slow: u64,  // the longest that it takes
    rng: Option<Rng>,
    is_full: bool, // for new files
    broken: Option<Part>,
}

/// Files by numbers, and their names.
#[derive(Clone, Default)]
struct Tree {
    names: BTreeMap<String, usize>,
    files: BTreeMap<usize, Vec<u8>>,
}

/// What a disk may fail to do.
#[derive(Clone, Copy, PartialEq)]
pub enum Part {
    Writing,
    Bytes,
    Names,
    Reading,
}

#[derive(Clone)]
pub enum Op {
    Write(usize, usize, Vec<u8>),
    Sync(usize),
    Name(String, Option<usize>), // a file gets a name, or a name goes
    Rename(String, String),
    SyncNames,
}

impl Tree {
    fn apply(&mut self, op: &Op) {
        match op {
            Op::Write(file, at, bytes) => {
                let file = self.files.entry(*file).or_default();
                file.resize(file.len().max(at + bytes.len()), 0);
                file[*at..at + bytes.len()].copy_from_slice(bytes);
            }
            Op::Name(name, Some(file)) => {
                self.names.insert(name.clone(), *file);
                self.files.entry(*file).or_default();
            }
            Op::Name(name, None) => drop(self.names.remove(name)),
            Op::Rename(from, to) => {
                if let Some(file) = self.names.remove(from) {
                    self.names.insert(to.clone(), file);
                }
            }
            Op::Sync(_) | Op::SyncNames => {}
        }
    }
}

/// Of these, those that no sync has made last; the others are applied.
fn unsynced(tree: &mut Tree, ops: &[Op]) -> Vec<Op> {
    let mut open: Vec<Op> = Vec::new();
    for op in ops {
        let is_made_to_last = |other: &Op| match (op, other) {
            (Op::Sync(file), Op::Write(other, ..)) => file == other,
            (Op::SyncNames, Op::Name(..) | Op::Rename(..)) => true,
            _ => false,
        };
        let (lasts, stays): (Vec<Op>, _) = open.into_iter().partition(is_made_to_last);
        for op in &lasts {
            tree.apply(op);
        }
        open = stays;
        if !matches!(op, Op::Sync(_) | Op::SyncNames) {
            open.push(op.clone());
        }
    }
    open
}

/// The same one by one: sectors, and names.
fn open_parts(tree: &mut Tree, ops: &[Op]) -> Vec<Op> {
    let open = unsynced(tree, ops).into_iter();
    let parts = open.flat_map(|op| match op {
        Op::Write(file, at, bytes) => {
            let sectors = bytes.chunks(SECTOR).enumerate();
            let part =
                |(nth, sector): (_, &[u8])| Op::Write(file, at + nth * SECTOR, sector.to_vec());
            sectors.map(part).collect()
        }
        name => vec![name],
    });
    parts.collect()
}

/// What a power cut leaves of these operations, of which no later one was begun.
fn left(tree: &Tree, ops: &[Op], rng: &mut Rng) -> Tree {
    let mut tree = tree.clone();
    let open = open_parts(&mut tree, ops);
    let keeps = [0, 1, 2, 4][rng.usize(..4)]; // of four: nothing, some, or all
    for part in open.iter().filter(|_| rng.u8(..4) < keeps) {
        tree.apply(part);
    }
    tree
}

/// All that it may leave where few parts are open, which is every order in which a disk may write them; else some.
fn all_left(tree: &Tree, ops: &[Op], rng: &mut Rng) -> Vec<Tree> {
    let mut synced = tree.clone();
    let open = open_parts(&mut synced, ops);
    if open.len() > 6 {
        return (0..4).map(|_| left(tree, ops, rng)).collect();
    }
    let subset = |kept: usize| {
        let mut tree = synced.clone();
        let parts = open.iter().enumerate();
        for (_, part) in parts.filter(|(nth, _)| kept >> nth & 1 == 1) {
            tree.apply(part);
        }
        tree
    };
    (0..1 << open.len()).map(subset).collect()
}

impl Ram {
    /// One on which a job takes so many milliseconds at most.
    pub fn slow(milliseconds: u64, rng: Rng) -> Ram {
        let ram = Ram::default();
        (ram.lock().slow, ram.lock().rng) = (milliseconds, Some(rng));
        ram
    }

    /// From now on a job takes so many milliseconds.
    pub fn stall(&self, milliseconds: u64) {
        let mut disk = self.lock();
        (disk.least, disk.slow) = (milliseconds, milliseconds);
    }

    fn lock(&self) -> MutexGuard<'_, Disk> {
        self.0.lock().unwrap()
    }

    /// All that was done.
    pub fn ops(&self) -> usize {
        self.lock().done.len()
    }

    /// What a power cut leaves after so many of the operations.
    pub fn cut_after(&self, ops: usize, rng: &mut Rng) -> Ram {
        let disk = self.lock();
        Ram::of(left(&disk.synced, &disk.done[..ops], rng))
    }

    /// All that it may leave, or some of it.
    pub fn cuts_after(&self, ops: usize, rng: &mut Rng) -> Vec<Ram> {
        let disk = self.lock();
        let left = all_left(&disk.synced, &disk.done[..ops], rng);
        left.into_iter().map(Ram::of).collect()
    }

    fn of(tree: Tree) -> Ram {
        let (synced, seen) = (tree.clone(), tree);
        let disk = Disk {
            synced,
            seen,
            ..Disk::default()
        };
        Ram(Arc::new(Mutex::new(disk)))
    }

    /// A power cut.
    pub fn cut(&self, rng: &mut Rng) {
        let mut disk = self.lock();
        let ops = rng.usize(disk.settled..=disk.done.len());
        let tree = left(&disk.synced, &disk.done[..ops], rng);
        (disk.synced, disk.seen, disk.settled) = (tree.clone(), tree, 0);
        disk.done.clear();
    }

    /// The process alone ends: what was not synced is still there, until the power is cut.
    pub fn kill(&self, rng: &mut Rng) {
        let ops = {
            let disk = self.lock();
            rng.usize(disk.settled..=disk.done.len())
        };
        self.kill_after(ops);
    }

    /// The same after so many of the operations.
    pub fn kill_after(&self, ops: usize) {
        let mut disk = self.lock();
        disk.done.truncate(ops);
        disk.seen = disk.synced.clone();
        let Disk { seen, done, .. } = &mut *disk;
        for op in done {
            seen.apply(op);
        }
        disk.settled = ops;
    }

    /// What was done is over: no later power cut undoes it in part.
    pub fn settle(&self) {
        let mut disk = self.lock();
        let Disk { synced, done, .. } = &mut *disk;
        *done = unsynced(synced, done);
        disk.settled = disk.done.len();
    }

    /// Has no room for new files, or has it again.
    pub fn fill(&self, is_full: bool) {
        self.lock().is_full = is_full;
    }

    /// Fails to read, or fails to write or to sync once more. What it should have made to last never will, although it is still read.
    pub fn break_down(&self, part: Part) {
        self.lock().broken = Some(part);
    }

    /// Syncs again.
    pub fn mend(&self) {
        self.lock().broken = None;
    }

    /// Whether this fails, after which none of what it is about ever lasts.
    fn fails(&self, part: Part, is_about: impl Fn(&Op) -> bool) -> io::Result<()> {
        let mut disk = self.lock();
        if disk.broken != Some(part) {
            return Ok(());
        }
        disk.broken = None;
        let settled = &disk.done[..disk.settled];
        disk.settled = settled.iter().filter(|op| !is_about(op)).count();
        disk.done.retain(|op| !is_about(op));
        Err(disk_failed(io::Error::other("it cannot be written")))
    }

    /// All is lost.
    pub fn lose(&self) {
        let mut disk = self.lock();
        (disk.synced, disk.seen, disk.settled) = (Tree::default(), Tree::default(), 0);
        disk.done.clear();
    }

    /// One byte of what is there becomes another.
    pub fn damage(&self, rng: &mut Rng) {
        let mut disk = self.lock();
        let names: Vec<usize> = disk.synced.names.values().copied().collect();
        if let Some(file) = rng.choice(names) {
            let bytes = disk.synced.files.entry(file).or_default();
            if !bytes.is_empty() {
                let at = rng.usize(..bytes.len());
                bytes[at] ^= rng.u8(1..);
            }
        }
        disk.done.clear();
        (disk.seen, disk.settled) = (disk.synced.clone(), 0);
    }

    fn file(&self, name: &str) -> io::Result<usize> {
        let file = self.lock().seen.names.get(name).copied();
        file.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn does(&self, op: Op) {
        let mut disk = self.lock();
        disk.seen.apply(&op);
        disk.done.push(op);
    }
}

impl Files for Ram {
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.lock().seen.names.keys().cloned().collect())
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        if self.lock().broken == Some(Part::Reading) {
            return Err(io::Error::from_raw_os_error(5));
        }
        let file = self.file(name)?;
        Ok(self.lock().seen.files[&file].clone())
    }

    fn write(&mut self, name: &str, at: usize, bytes: &[u8]) -> io::Result<()> {
        if self.file(name).is_err() {
            if self.lock().is_full {
                return Err(io::ErrorKind::StorageFull.into());
            }
            let last = self.lock().seen.files.keys().next_back().copied();
            let file = last.map_or(0, |last| last + 1); // files without a name stay, so numbers are new
            self.does(Op::Name(name.to_owned(), Some(file)));
        }
        self.fails(Part::Writing, |_| false)?;
        self.does(Op::Write(self.file(name)?, at, bytes.to_vec()));
        Ok(())
    }

    fn sync(&mut self, name: &str) -> io::Result<()> {
        let file = self.file(name)?;
        self.fails(
            Part::Bytes,
            |op| matches!(op, Op::Write(other, ..) if *other == file),
        )?;
        self.does(Op::Sync(file));
        Ok(())
    }

    fn sync_names(&mut self) -> io::Result<()> {
        self.fails(Part::Names, |op| {
            matches!(op, Op::Name(..) | Op::Rename(..))
        })?;
        self.does(Op::SyncNames);
        Ok(())
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        self.file(from)?;
        self.does(Op::Rename(from.to_owned(), to.to_owned()));
        Ok(())
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        self.file(name)?;
        self.does(Op::Name(name.to_owned(), None));
        Ok(())
    }

    fn put_aside(&mut self) -> io::Result<String> {
        self.lose();
        self.lock().asides += 1;
        Ok("aside".to_owned())
    }

    fn pause(&self) -> Option<futures::future::BoxFuture<'static, ()>> {
        let (ram, mut disk) = (self.clone(), self.lock());
        let (least, slow) = (disk.least, disk.slow);
        let pause = Duration::from_millis(disk.rng.as_mut()?.u64(least..=slow));
        Some(Box::pin(async move {
            tokio::time::sleep(pause).await;
            ram.settle();
        }))
    }
}

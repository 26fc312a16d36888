//! Any bytes as the files of a log: they are read or refused, what is read is no more than the files have, and what is
//! whole is read again as it was, after a power cut too. No fuzzer guesses a checksum, so it gets
//! each one that it asks for.
#![no_main]

#[path = "../../tests/common/ram.rs"]
mod ram;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

use fastrand::Rng;
use kv54::beyond::log::Disk;
use kv54::beyond::log::files::{Files as _, Found, Segments};
use kv54::beyond::log::segment::SECTOR;
use kv54::cluster::Cluster;
use kv54::store::Store;
use libfuzzer_sys::fuzz_target;
use ram::Ram;

/// What a file's second byte says of its name.
const KINDS: [&str; 8] = [
    "base", "more", "log", "base.new", "more.new", "log.new", "", "old",
];
/// What a log is begun with that is not there, in bytes.
const SIZE: u32 = 16 * 512;
/// A record that takes a few bytes takes its place in a map.
const MOST: usize = 64;

fuzz_target!(|bytes: &[u8]| {
    is_read_alike(&disk(bytes));
    for nodes in [1, 3] {
        is_taken_back_alike(&disk(bytes), nodes);
    }
});

/// Files, of which nothing is synced yet: number, kind and length, and how many sectors follow. The last sector of
/// a file is empty, as a node leaves room for a closing frame, and two files never have one number.
fn disk(mut bytes: &[u8]) -> Ram {
    let (mut disk, mut numbers) = (Ram::default(), BTreeSet::new());
    while let [number, kind, count, rest @ ..] = bytes {
        bytes = rest;
        let name = format!("{number}.{}", KINDS[usize::from(kind % 8)]);
        let (sectors, is_cut) = (4 + usize::from(kind >> 4), kind & 8 > 0);
        let sectors_there = (0..*count).map_while(|at| sector(*number, at, &mut bytes));
        let mut file: Vec<u8> = sectors_there.flatten().collect();
        file.resize(file.len().min((sectors - 1) * SECTOR), 0);
        file.resize(sectors * SECTOR - usize::from(is_cut), 0);
        if numbers.insert(number) {
            disk.write(&name, 0, &file).expect("it has room");
        }
    }
    disk
}

/// The next sector: its length, and whether it gets the checksum that it should have.
fn sector(number: u8, at: u8, bytes: &mut &[u8]) -> Option<[u8; SECTOR]> {
    let (head, rest) = bytes.split_first_chunk()?;
    let length = u16::from_le_bytes(*head);
    let (is_sealed, length) = (length >> 15 > 0, usize::from(length & 0x3ff));
    let start = if is_sealed { 4 } else { 0 };
    let (piece, rest) = rest.split_at(length.min(rest.len()).min(SECTOR - start));
    *bytes = rest;
    let mut sector = [0; SECTOR];
    sector[start..start + piece.len()].copy_from_slice(piece);
    if is_sealed {
        let mut sum = crc32fast::Hasher::new();
        sum.update(&u64::from(number).to_le_bytes());
        sum.update(&u64::from(at).to_le_bytes());
        sum.update(&sector[4..]);
        sector[..4].copy_from_slice(&sum.finalize().to_le_bytes());
    }
    Some(sector)
}

/// The commits of a log, read once and once more.
fn is_read_alike(disk: &Ram) {
    let before = files(disk);
    let size: usize = before.values().map(Vec::len).sum();
    let (found, commits, mut segments) = read(disk);
    let length: usize = commits.iter().map(Vec::len).sum();
    assert!(length <= size, "{length} bytes of {size}");
    if found != Ok(Found::Whole) {
        assert_eq!(files(disk), before, "it is touched: {found:?}");
        let (again, ..) = read(disk);
        assert_eq!(again, found);
        return;
    }
    segments.take_over(size).expect("it has room");
    let mut rng = Rng::with_seed(54);
    let cut = disk.cut_after(disk.ops(), &mut rng);
    let (again, same, _) = read(&cut);
    assert_eq!((again, &same), (Ok(Found::Whole), &commits), "cut");
    // What follows a torn commit is read as well.
    if segments.commit(b"\x90".to_vec()).is_ok() {
        let cut = disk.cut_after(disk.ops(), &mut rng);
        let (again, more, _) = read(&cut);
        assert_eq!(again, Ok(Found::Whole), "gone on");
        assert_eq!(more, [commits, vec![b"\x90".to_vec()]].concat());
    }
}

type Commits = Vec<Vec<u8>>;

fn read(disk: &Ram) -> (Result<Found, String>, Commits, Segments<Ram>) {
    let mut segments = Segments::new(disk.clone(), "alice", SIZE);
    let mut commits = Vec::new();
    let mut take = |records: &[u8]| {
        commits.push(records.to_owned());
        io::Result::Ok(())
    };
    let found = segments.open(&mut take);
    let found = found.map_err(|error| error.to_string());
    (found, commits, segments)
}

/// The names of files, and what is in them.
fn files(disk: &Ram) -> BTreeMap<String, Vec<u8>> {
    let names = disk.list().expect("names");
    let read = |name: String| disk.read(&name).map(|bytes| (name, bytes));
    names
        .into_iter()
        .map(|name| read(name).expect("a file"))
        .collect()
}

/// What a node keeps after a start: the same after the next one, and when it is written anew.
fn is_taken_back_alike(disk: &Ram, nodes: usize) {
    let size: usize = files(disk).values().map(Vec::len).sum();
    let ring = Arc::new(ring(nodes));
    let open = |disk: &Ram| {
        let (store, _) = Disk::open(ring.clone(), 0, || Ok(disk.clone()), SIZE)?;
        io::Result::Ok(store)
    };
    let Ok(store) = open(disk) else {
        return;
    };
    let (kept, bytes) = (pages(&store), store.status().bytes);
    assert!(bytes <= MOST * size, "{bytes} bytes of {size}");
    let cut = disk.cut_after(disk.ops(), &mut Rng::with_seed(54));
    let next = open(&cut).expect("it was opened before");
    assert_eq!(pages(&next), kept, "after a power cut");
    let anew = Store::new(ring.clone(), 0);
    for page in &kept {
        anew.replay(page).expect("it is written as it is read");
    }
    anew.replayed().expect("the same ring");
    assert_eq!(pages(&anew), kept, "written anew");
    for other in [next, anew] {
        let (status, same) = (store.status(), other.status());
        let facts = (status.state, status.keys, status.tombstones, bytes);
        assert_eq!(
            (same.state, same.keys, same.tombstones, same.bytes),
            facts,
            "state, keys, tombstones and bytes"
        );
    }
}

fn pages(store: &Store) -> Vec<Vec<u8>> {
    let (mut pages, mut next) = (Vec::new(), Some((0, 0, 0, true)));
    while let Some(at) = next {
        let (page, then) = store.page(at, SIZE as usize);
        pages.push(page);
        next = then;
    }
    pages
}

fn ring(nodes: usize) -> Cluster {
    let nodes = ["alice = 'alice:54'", "bob = 'bob:54'", "carol = 'carol:54'"][..nodes].join("\n");
    let file = format!("[nodes]\n{nodes}");
    Cluster::parse("cluster.toml".as_ref(), &file).expect("a ring")
}

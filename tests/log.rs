//! The log on disk: what can happen to its bytes is either harmless or seen.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[path = "common/disks.rs"]
mod disks;
#[path = "common/ram.rs"]
mod ram;

use std::collections::BTreeMap;
use std::time::Duration;

use fastrand::Rng;
use kv54::beyond::log::files::{Files as _, Found, Segments};
use kv54::beyond::log::segment::{Body, Header, SECTOR, Verdict, frame, read};
use kv54::entry::{Entry, Packed, Stamp};
use kv54::error::Kind;

/// Sectors of the segment in these tests.
const SECTORS: usize = 24;
/// Sectors of its last frame.
const LAST: usize = 8;
const NUMBER: u64 = 7;

#[test]
fn what_was_written_is_read() {
    let (bytes, bodies) = segment();
    let read = read(NUMBER, &bytes);
    assert_eq!(read.verdict, Verdict::Whole);
    assert_eq!(read.bodies, bodies);
    assert_eq!(read.end, written(&bytes) / SECTOR);
}

#[test]
fn no_flipped_byte_goes_unnoticed() {
    let (bytes, _) = segment();
    for at in 0..bytes.len() {
        for byte in [bytes[at] ^ 1, bytes[at] ^ 0xff, 0] {
            let mut flipped = bytes.clone();
            flipped[at] = byte;
            if flipped != bytes {
                is_damaged(&flipped, &format!("byte {at} is {byte}"));
            }
        }
    }
}

#[test]
fn no_truncation_goes_unnoticed() {
    let (bytes, _) = segment();
    for length in 0..bytes.len() {
        is_damaged(&bytes[..length], &format!("{length} bytes are left"));
    }
}

#[test]
fn whatever_a_power_cut_leaves_of_the_last_frame_is_harmless() {
    let (bytes, bodies) = segment();
    let start = written(&bytes) / SECTOR - LAST;
    let (earlier, _) = bodies.split_at(bodies.len() - 1);
    for subset in 0..1_u32 << LAST {
        let mut cut = bytes.clone();
        let lost = (0..LAST).filter(|nth| subset & 1 << nth == 0);
        lost.for_each(|nth| zero(&mut cut, start + nth));
        let read = read(NUMBER, &cut);
        if subset.count_ones() as usize == LAST {
            assert_eq!(read.bodies, bodies);
            continue;
        }
        let verdict = match subset {
            0 => Verdict::Whole,
            _ => Verdict::TornLast,
        };
        assert_eq!(read.verdict, verdict, "{subset:b}");
        assert_eq!((&*read.bodies, read.end), (earlier, start), "{subset:b}");
    }
}

#[test]
fn a_sector_that_is_lost_before_the_last_frame_is_noticed() {
    let (bytes, _) = segment();
    for at in 0..written(&bytes) / SECTOR - LAST {
        let mut lost = bytes.clone();
        zero(&mut lost, at);
        is_damaged(&lost, &format!("sector {at} is lost"));
    }
}

#[test]
fn a_short_frame_that_is_lost_before_a_short_one_is_noticed() {
    let bytes = segment_of(&[header(), records(b"green"), records(b"black")]);
    let mut lost = bytes.clone();
    zero(&mut lost, 1);
    is_damaged(&lost, "the last but one of three sectors is lost");
}

#[test]
fn what_was_written_elsewhere_is_noticed() {
    let (bytes, _) = segment();
    let other = read(NUMBER + 1, &bytes);
    assert!(matches!(other.verdict, Verdict::Damaged(_)), "{other:?}");
    let sectors = written(&bytes) / SECTOR;
    for (from, to) in (0..sectors).flat_map(|from| (0..SECTORS).map(move |to| (from, to))) {
        let mut moved = bytes.clone();
        moved.copy_within(from * SECTOR..(from + 1) * SECTOR, to * SECTOR);
        if moved != bytes {
            is_damaged(&moved, &format!("sector {from} is at {to}"));
        }
    }
}

#[test]
fn a_log_in_a_later_format_is_left_alone() {
    let disk = ram::Ram::default();
    Segments::new(disk.clone(), "alice", 6 * 512)
        .begin()
        .unwrap();
    let Body::Header(header) = header() else {
        panic!("no header");
    };
    let later = Body::Header(Header {
        version: 2,
        ..header
    });
    disk.clone()
        .write("1.base", 0, &frame(1, 0, &later.bytes()))
        .unwrap();
    let opened = Segments::new(disk.clone(), "alice", 6 * 512).open(&mut |_| Ok(()));
    let why = opened.unwrap_err().to_string();
    assert_eq!(why, "it is in version 2 of the format, and this is 1");
    assert!(disk.list().unwrap().contains(&"1.base".to_owned()));
}

/// Numbers under keys, as they are kept, and committed as text: `key number key number`.
type Kept = BTreeMap<u64, u64>;

/// Commits, in which all is written anew again and again, and what had been kept after each operation of the disk: at
/// least this much, and at most that.
fn history(seed: u64) -> (ram::Ram, Vec<(usize, Kept)>) {
    let (disk, mut rng) = (ram::Ram::default(), Rng::with_seed(seed));
    let mut segments = Segments::new(disk.clone(), "alice", 6 * 512);
    let (mut kept, mut answered) = (Kept::new(), Vec::new());
    segments.begin().unwrap();
    answered.push((disk.ops(), kept.clone()));
    let mut page = None;
    for number in 1..120 {
        let key = rng.u64(..8);
        kept.insert(key, number);
        let records = format!("{key} {number} {}", "0 0 ".repeat(rng.usize(..300)));
        segments.commit(records.into_bytes()).unwrap();
        answered.push((disk.ops(), kept.clone()));
        if rng.bool() {
            segments.prepare().unwrap();
            segments.remove_old().unwrap();
        }
        match page {
            None if segments.is_worn(1) => {
                segments.rebase(1).unwrap();
                page = Some(0);
            }
            None => {}
            Some(8) => {
                segments.based(1).unwrap();
                page = None;
            }
            Some(key) => {
                let number = kept.get(&key).copied().unwrap_or(0);
                let records = format!("{key} {number} {}", "0 0 ".repeat(200));
                segments.add(vec![records.into_bytes()]).unwrap();
                page = Some(key + 1);
            }
        }
    }
    (disk, answered)
}

/// Reads a log; what it keeps is the largest number of each key.
fn open(disk: &ram::Ram) -> (Found, Kept, Segments<ram::Ram>) {
    let (mut kept, mut segments) = (Kept::new(), Segments::new(disk.clone(), "alice", 6 * 512));
    let mut take = |records: &[u8]| {
        let text = std::str::from_utf8(records).unwrap().split_whitespace();
        let numbers: Vec<u64> = text.map(|number| number.parse().unwrap()).collect();
        for pair in numbers.chunks(2).filter(|pair| pair[1] > 0) {
            let kept = kept.entry(pair[0]).or_default();
            *kept = pair[1].max(*kept);
        }
        Ok(())
    };
    let found = segments.open(&mut take).unwrap();
    if found == Found::Whole {
        segments.take_over(1).unwrap();
    }
    (found, kept, segments)
}

#[test]
fn a_power_cut_after_any_operation_loses_nothing_that_was_answered() {
    let mut bases = 0;
    for seed in 0..3 {
        let (disk, answered) = history(seed);
        let mut rng = Rng::with_seed(seed);
        let cuts = |ops| {
            disk.cuts_after(ops, &mut rng)
                .into_iter()
                .map(move |cut| (ops, cut))
        };
        let cuts: Vec<_> = (0..=disk.ops()).flat_map(cuts).collect();
        for (ops, cut) in cuts {
            let behind = answered.partition_point(|(at, _)| *at <= ops);
            let (found, kept, mut segments) = open(&cut);
            let Some((_, before)) = answered[..behind].last() else {
                assert!(!matches!(found, Found::Damaged(_)), "{ops}: {found:?}");
                continue; // it had not begun
            };
            assert_eq!(found, Found::Whole, "seed {seed}, {ops} operations");
            let after = answered.get(behind).map_or(before, |(_, after)| after);
            assert!(
                kept == *before || kept == *after,
                "seed {seed}, {ops}: {kept:?}, not {before:?}"
            );
            // What a reader has seen stays, and it goes on.
            segments.commit(b"9 1000".to_vec()).unwrap();
            let (found, more, _) = open(&cut.cut_after(cut.ops(), &mut rng));
            let kept: Kept = kept.into_iter().chain([(9, 1000)]).collect();
            assert_eq!(
                (found, more),
                (Found::Whole, kept),
                "seed {seed}, {ops} operations"
            );
        }
        bases += newest(&disk);
    }
    assert!(bases > 30, "all was written anew too seldom");
}

/// The number of the newest base, the larger the more often all was written anew.
fn newest(disk: &ram::Ram) -> u64 {
    let names = disk.list().unwrap();
    let numbers = names.iter().filter_map(|name| name.strip_suffix(".base"));
    numbers
        .map(|number| number.parse::<u64>().unwrap())
        .max()
        .unwrap()
}

/// Forty keys are written again and again, faster than what is old is left behind.
#[test]
fn a_log_takes_three_times_the_room_of_what_is_kept_and_four_files_at_most() {
    let disk = ram::Ram::default();
    let (store, mut log) = disks::alone(&disk);
    let value = Packed::of(vec![b'x'; 50_000]);
    let goes_on = async {
        for number in 1..=1_500_u64 {
            let (key, stamp) = (format!("key{}", number % 40), Stamp::new(number, 1, 0));
            let entry = Entry {
                stamp,
                value: &*value,
            };
            store.at(0).store(key.as_bytes(), entry).unwrap();
            if number % 4 == 0 {
                store.journal().unwrap().all_settled().await;
            }
            let (files, kept) = (store.journal().unwrap().told().bytes, store.bytes());
            let most = 3 * kept + 4 * disks::SIZE as usize;
            assert!(files <= most, "{files} bytes in files, {kept} are kept");
        }
    };
    assert_eq!(disks::write_while(&store, &mut log, goes_on), None);
    assert!(newest(&disk) > 5, "all was written anew too seldom");
}

#[test]
fn a_lost_segment_is_noticed_whichever_it_is() {
    for seed in 0..6 {
        let (disk, answered) = history(seed);
        let whole = disk.cut_after(disk.ops(), &mut Rng::with_seed(seed));
        for name in whole.list().unwrap() {
            let mut lost = disk.cut_after(disk.ops(), &mut Rng::with_seed(seed));
            let is_spare = lost
                .read(&name)
                .map(|bytes| bytes[SECTOR..].iter().all(|byte| *byte == 0));
            if name.strip_suffix(".new").is_some() || is_spare.unwrap() {
                continue;
            }
            lost.remove(&name).unwrap();
            let (found, kept, _) = open(&lost);
            let is_all = kept == answered.last().unwrap().1;
            assert!(
                is_all || matches!(found, Found::Damaged(_)),
                "seed {seed}, {name}: {found:?}"
            );
        }
    }
}

/// One sector at the end of a base says where the log goes on: to a segment with a smaller number, if nothing was
/// made meanwhile.
#[test]
fn a_lost_end_of_a_base_is_noticed() {
    let disk = ram::Ram::default();
    let mut segments = Segments::new(disk.clone(), "alice", 64 * 512);
    segments.begin().unwrap();
    while !segments.is_worn(1) {
        segments.commit(b"1 1 ".repeat(100)).unwrap();
        segments.prepare().unwrap();
    }
    segments.rebase(1).unwrap();
    segments.add(vec![b"1 1".to_vec()]).unwrap();
    segments.based(1).unwrap();
    segments.commit(b"9 1000".to_vec()).unwrap();
    let mut lost = disk.cut_after(disk.ops(), &mut Rng::with_seed(1));
    let (found, kept, _) = open(&lost);
    assert_eq!((found, kept.get(&9)), (Found::Whole, Some(&1000)));
    let name = format!("{}.base", newest(&lost));
    let end = written(&lost.read(&name).unwrap()) - SECTOR;
    lost.write(&name, end, &[0; SECTOR]).unwrap();
    let (found, ..) = open(&lost);
    assert!(matches!(found, Found::Damaged(_)), "{found:?}");
}

/// It may be back at the next start.
#[test]
fn what_the_disk_cannot_read_now_is_no_damage() {
    let (disk, _) = history(1);
    let before = disk.list().unwrap();
    disk.break_down(ram::Part::Reading);
    let found = Segments::new(disk.clone(), "alice", 6 * 512).open(&mut |_| Ok(()));
    assert_eq!(found.unwrap_err().raw_os_error(), Some(5));
    assert_eq!(disk.list().unwrap(), before);
}

fn block_on<T>(story: impl Future<Output = T>) -> T {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_all().build().unwrap().block_on(story)
}

#[test]
fn a_disk_that_cannot_sync_ends_the_node_and_its_log_is_put_aside() {
    disks::a_sync_that_fails().unwrap();
}

#[test]
fn what_is_read_at_the_start_is_made_to_last_first() {
    disks::read_from_memory_alone().unwrap();
}

#[test]
fn a_node_that_was_joining_joins_again() {
    disks::half_joined().unwrap();
}

#[test]
fn a_full_disk_refuses_sets_reads_on_and_goes_on_when_it_has_room() {
    let disk = ram::Ram::slow(1, Rng::with_seed(1));
    let (store, mut log) = disks::alone(&disk);
    let value = [&[0xda, 0x40, 0x00][..], &[b'x'; 0x4000]].concat();
    let set = |counter| {
        let (stamp, value) = (Stamp::new(counter, 1, 0), &*value);
        store.at(0).store(b"tea", Entry { stamp, value })
    };
    let new = || store.at(0).load(b"tea", Some(Stamp::of_a_set(&value)));
    let settles = async || {
        if let Some(settling) = store.journal().unwrap().settling(Some(b"tea")) {
            settling.await;
        }
    };
    let told = async {
        settles().await;
        disk.fill(true);
        let mut counter = 0;
        while store.status().disk_full != Some(true) {
            counter += 1;
            set(counter).unwrap();
            settles().await;
            tokio::task::yield_now().await;
        }
        // What is under way is taken, what is new is not, and reads go on.
        assert_eq!(new().unwrap_err().kind, Kind::Full);
        set(counter + 1).unwrap();
        let begun = counter;
        while set(counter + 2).is_ok() {
            counter += 1; // until what it has is full, too
            tokio::time::sleep(Duration::from_millis(3)).await; // one in each commit
        }
        let taken = (counter - begun) << 14;
        assert!(taken < 4 << 20, "{taken} bytes for a segment of 2 MiB");
        assert_eq!(set(counter + 3).unwrap_err().kind, Kind::Unavailable);
        assert_eq!(
            store.at(0).load(b"tea", None).unwrap().stamp.counter,
            counter + 1
        );
        assert!(
            store.journal().unwrap().settling(Some(b"tea")).is_some(),
            "not all of it is there"
        );

        disk.fill(false);
        settles().await;
        while store.status().disk_full == Some(true) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        new().unwrap();
        set(counter + 3).unwrap();
        settles().await;
        counter + 3
    };
    let last = block_on(async {
        tokio::select! {
            ended = log.write(&store) => panic!("{ended:?}"),
            last = tokio::time::timeout(Duration::from_secs(30), told) => last.unwrap(),
        }
    });
    drop((store, log));
    disk.cut(&mut Rng::with_seed(1));
    let (store, _) = disks::alone(&disk);
    let loaded = store.at(0).load(b"tea", None).unwrap();
    assert_eq!(
        (loaded.stamp.counter, loaded.value.as_deref()),
        (last, Some(&*value))
    );
}

/// A segment with a header, three frames of records, of which one is full of zeros, and a long one.
fn segment() -> (Vec<u8>, Vec<Body>) {
    let mut zeros = vec![0; LAST * 490];
    zeros[1] = 1;
    let bodies = vec![
        header(),
        records(b"green"),
        records(&[0; 1200]),
        records(b"black"),
        records(&zeros),
    ];
    (segment_of(&bodies), bodies)
}

fn segment_of(bodies: &[Body]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for body in bodies {
        bytes.extend(frame(NUMBER, bytes.len() / SECTOR, &body.bytes()));
    }
    assert!(bytes.len() < SECTORS * SECTOR);
    bytes.resize(SECTORS * SECTOR, 0);
    bytes
}

fn header() -> Body {
    Body::Header(Header {
        version: 1,
        size: u32::try_from(SECTORS * SECTOR).unwrap(),
        log: 54,
        node: "alice".to_owned(),
    })
}

fn records(records: &[u8]) -> Body {
    Body::Records(records.to_vec())
}

/// Where the last frame ends, in bytes.
fn written(bytes: &[u8]) -> usize {
    let last = bytes.iter().rposition(|byte| *byte != 0).unwrap();
    (last / SECTOR + 1) * SECTOR
}

fn zero(bytes: &mut [u8], sector: usize) {
    bytes[sector * SECTOR..(sector + 1) * SECTOR].fill(0);
}

fn is_damaged(bytes: &[u8], what: &str) {
    let verdict = read(NUMBER, bytes).verdict;
    assert!(
        matches!(verdict, Verdict::Damaged(_)),
        "{what}: {verdict:?}"
    );
}

//! The log on disk: what can happen to its bytes is either harmless or seen.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use kv54::beyond::log::segment::{Body, Header, SECTOR, Verdict, frame, read};

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
fn another_version_of_the_format_is_not_read() {
    let mut header = header().bytes();
    header[9] += 1; // behind the kind and eight letters
    let mut bytes = frame(NUMBER, 0, &header);
    bytes.resize(SECTORS * SECTOR, 0);
    is_damaged(&bytes, "version 2");
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

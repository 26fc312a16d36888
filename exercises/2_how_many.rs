//! # Exercise 2: how many are enough? (10 minutes)
//!
//! A write is answered when `write` of a key's `copies` have it, a read when `read` of them have
//! been asked. When does a read always meet the newest write that was answered? And when do both
//! go on while one replica is down? With three copies kv54 takes two and two. Is there a choice?
//!
//! Hint: draw three circles, colour those that have the write, tick those that are asked. When
//! can you avoid a coloured one?

/// Yours: whether a read can never miss an answered write.
#[cfg(not(feature = "solutions"))]
fn always_meet(copies: u32, write: u32, read: u32) -> bool {
    write <= copies && read <= copies
}

/// Yours: whether writes and reads are answered while any one replica is down.
#[cfg(not(feature = "solutions"))]
fn survive_one(copies: u32, write: u32, read: u32) -> bool {
    write <= copies && read <= copies
}

#[test]
#[cfg_attr(
    not(feature = "solutions"),
    ignore = "exercise 2: how many are enough?"
)]
fn exercise_2() {
    for copies in 1..=6 {
        for (write, read) in pairs(copies) {
            let what = format!("{copies} copies, write to {write}, read from {read}");
            match old_read(copies, write, read) {
                Some([written, asked]) => assert!(
                    !always_meet(copies, write, read),
                    "{what}: written to {written:?}, then read from {asked:?}"
                ),
                None => assert!(always_meet(copies, write, read), "{what}: they always meet"),
            }
            let without_0 = |size| sets(copies, size).any(|set| set & 1 == 0);
            let survives = without_0(write) && without_0(read);
            let told = survive_one(copies, write, read);
            assert_eq!(told, survives, "{what}, replica 0 is down");
        }
    }
    let good =
        |(write, read): &(u32, u32)| always_meet(3, *write, *read) && survive_one(3, *write, *read);
    assert_eq!(pairs(3).filter(good).collect::<Vec<_>>(), [(2, 2)]);
}

fn pairs(copies: u32) -> impl Iterator<Item = (u32, u32)> {
    (1..=copies).flat_map(move |write| (1..=copies).map(move |read| (write, read)))
}

/// Which replicas to write to and which to read from, so that the read is old.
fn old_read(copies: u32, write: u32, read: u32) -> Option<[Vec<u32>; 2]> {
    let replicas = |set: u32| (0..copies).filter(|at| set >> at & 1 == 1).collect();
    let asked = |written| sets(copies, read).map(move |asked| [written, asked]);
    let mut both = sets(copies, write).flat_map(asked);
    both.find(|[written, asked]| written & asked == 0)
        .map(|both| both.map(replicas))
}

/// All sets of so many replicas, a bit for each.
fn sets(copies: u32, size: u32) -> impl Iterator<Item = u32> {
    (0..1 << copies).filter(move |set: &u32| set.count_ones() == size)
}

#[cfg(feature = "solutions")]
#[path = "solutions/2_how_many.rs"]
mod solution;
#[cfg(feature = "solutions")]
use solution::{always_meet, survive_one};

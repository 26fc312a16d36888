//! # Exercise 11: points on a circle (20 minutes)
//!
//! `% N` moves nearly every key when a node comes (exercise 1). The classic cure is a circle (Karger and
//! others, "Consistent Hashing and Random Trees", 1997): every node has points on it, a key has one, and
//! its owner is the node of the next point clockwise. kumofs placed its keys so. Put the points there
//! ([`circle`]) and find the owner ([`owner`]).
//!
//! The test prints how many keys move when frank comes, and how full the fullest of the six is then, with
//! 1, 10 and 100 points each. Why is one point not enough? And what do more of them cost?
//!
//! Hint: where do the keys go that lie behind the last point? Sort once, then search: a circle of 100
//! nodes with 100 points each has 10,000.
//!
//! kv54 keeps `% N` all the same. Its ring changes as a whole (exercise 9), a node and a client need no
//! table, and "the next two names" stays something that can be said aloud.

/// Yours: the points of these nodes in the order of the circle, so many for each node, and whose they are.
#[cfg(not(feature = "solutions"))]
fn circle(names: &[&str], points: usize) -> Vec<(u64, usize)> {
    let _ = points;
    let owners = names.iter().enumerate();
    owners.map(|(owner, name)| (at(name), owner)).collect()
}

/// Yours: the place of the key's owner in the list of names.
#[cfg(not(feature = "solutions"))]
fn owner(circle: &[(u64, usize)], key: &str) -> usize {
    let behind = circle.iter().find(|(point, _)| *point >= at(key));
    behind.unwrap_or(&circle[circle.len() - 1]).1
}

/// Where a text lies on the circle: a number that looks random, the same everywhere.
fn at(text: &str) -> u64 {
    let hash = u64::from(crc32fast::hash(text.as_bytes())) << 32 | text.len() as u64;
    let mixed = (hash ^ hash >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

#[test]
#[cfg_attr(
    not(feature = "solutions"),
    ignore = "exercise eleven: points on a circle"
)]
fn exercise_eleven() {
    let six = ["alice", "bob", "carol", "dave", "erin", "frank"];
    let keys: Vec<String> = (0..10_000).map(|n| format!("key{n}")).collect();
    let mut fullest = Vec::new(); // of 100, how many more keys than its share
    for points in [1, 10, 100] {
        let (five, all) = (circle(&six[..5], points), circle(&six, points));
        assert_eq!(all.len(), 6 * points, "each node has {points} points");
        assert!(all.is_sorted(), "in the order of the circle");
        let (mut owned, mut moved) = ([0; 6], 0);
        for key in &keys {
            let (before, after) = (owner(&five, key), owner(&all, key));
            owned[after] += 1;
            moved += usize::from(before != after);
            let behind = all.iter().find(|(point, _)| *point >= at(key));
            let (_, clockwise) = behind.unwrap_or(&all[0]);
            assert_eq!(after, *clockwise, "{key}: the next point clockwise");
            assert!(
                before == after || six[after] == "frank",
                "{key} moves for nothing"
            );
        }
        let most = owned.iter().max().unwrap();
        println!("{points} points each: {moved} of 10000 keys moved; the nodes own {owned:?}");
        fullest.push(most * 6 / 100);
    }
    assert!(
        fullest[0] > fullest[2],
        "more points, fairer shares: {fullest:?}"
    );
    assert!(fullest[2] < 130, "{fullest:?} percent of a fair share");
}

#[cfg(feature = "solutions")]
#[path = "solutions/11_points_on_a_circle.rs"]
mod solution;
#[cfg(feature = "solutions")]
use solution::{circle, owner};

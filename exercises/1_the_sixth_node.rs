//! # Exercise 1: the sixth node (15 minutes)
//!
//! kv54 puts a key on node `crc32(key) % N`. frank joins alice, bob, carol, dave and erin: how
//! many keys have another owner now? Write an [`owner`] with which the only keys that move are
//! those that frank gets.
//!
//! Hint: must a node's claim to a key depend on who else is there? Let every node make a bid
//! for every key ([`bid`]). Whose is it? (This is *rendezvous hashing*: Thaler and Ravishankar,
//! 1998.) And what would it cost to find an owner among 1,000 nodes?
//!
//! To move few keys is one thing. To move them while clients write is exercise 9.

/// Yours: the place of the key's owner in this list.
#[cfg(not(feature = "solutions"))]
fn owner(key: &[u8], names: &[&str]) -> usize {
    let _ = bid; // for you
    crc32fast::hash(key) as usize % names.len()
}

/// A number that looks random, the same for the same name and key everywhere. (crc32 alone would
/// not do: the numbers of two names would differ by the same bits for every key.)
fn bid(name: &str, key: &[u8]) -> u64 {
    let both = u64::from(crc32fast::hash(name.as_bytes())) << 32 | u64::from(crc32fast::hash(key));
    let mixed = (both ^ both >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

#[test]
#[cfg_attr(not(feature = "solutions"), ignore = "exercise 1: the sixth node")]
fn exercise_1() {
    let six = ["alice", "bob", "carol", "dave", "erin", "frank"];
    let keys: Vec<String> = (0..10_000).map(|n| format!("key{n}")).collect();
    let mut owned = [0; 6];
    let mut moved = 0;
    for key in &keys {
        let (before, after) = (
            owner(key.as_bytes(), &six[..5]),
            owner(key.as_bytes(), &six),
        );
        owned[after] += 1;
        moved += usize::from(before != after);
        assert!(
            before == after || six[after] == "frank",
            "{key} moves from {} to {}, and frank has nothing of it",
            six[before],
            six[after],
        );
    }
    println!("{moved} of 10000 keys moved; each node owns {owned:?}");
    assert_eq!(moved, owned[5], "what frank owns has moved there");
    let fair = 1_450..1_900;
    assert!(owned.iter().all(|keys| fair.contains(keys)), "{owned:?}");
}

#[cfg(feature = "solutions")]
#[path = "solutions/1_the_sixth_node.rs"]
mod solution;
#[cfg(feature = "solutions")]
use solution::owner;

//! # Exercise 6: a time to live (30 minutes)
//!
//! A value is to vanish by itself: clients write `[until, value]` and count `until` in seconds
//! on their own clocks, which do not agree. A get that finds `now >= until` answers nil. But then
//! a client with a slow clock asks, and gets the value: it was absent, and is back, and nobody
//! has set it. What must a get that found it expired do before it says so? Write the entry that
//! it has two of three keep. Two other clients set tea in the same moment, and their sets must not
//! be lost. The first has read the same old entry, so its counter is one higher. The second has read
//! only what the writer of the old entry had read, so it has the same counter, and by chance a
//! higher writer.
//!
//! Hint: `Client::delete` does nearly that. Which stamp would it take, and which stamps do those
//! two sets take? Is there a stamp between an entry's and every later one's? What if two clients
//! find it expired at once?
//!
//! Then read `src/beyond/expire.rs`, and `Operation::load` in `src/replicas.rs`: `kv54 set tea green --ttl 30m`.
//! Why does kv54 swap the value for nil, and does not store your entry? (What if a swap has renewed the
//! value: which stamp has it?)

use kv54::entry::{Entry, Packed, Stamp};
use msgpack_rpc::Value;

/// Yours: what to store before a get may answer nil; `None` where the value lives.
#[cfg(not(feature = "solutions"))]
fn expired(entry: &Entry, now: u64) -> Option<Entry> {
    let lives = now < until(entry)?;
    (!lives).then(|| entry.stamp.newer(Packed::default()))
}

/// When the value expires; `None` where there is none.
fn until(entry: &Entry) -> Option<u64> {
    entry.value.value().ok()?.as_array()?.first()?.as_u64()
}

#[test]
#[cfg_attr(not(feature = "solutions"), ignore = "exercise 6: a time to live")]
fn exercise_6() {
    for writer in [0, 54, u64::MAX / 2, u64::MAX - 2] {
        let stamp = |counter, writer| Stamp {
            counter,
            writer,
            ballot: 0,
        };
        let old = Entry {
            stamp: stamp(9, writer),
            value: Packed::of(vec![Value::from(1_000), "green".into()]),
        };
        assert_eq!(expired(&old, 999), None, "it still lives");
        let Some(gone) = expired(&old, 1_000) else {
            panic!("it has expired");
        };
        assert!(gone.value.is_nil());
        assert!(gone.stamp > old.stamp, "the slow clock still reads green");
        // Such sets, with the lowest writers that they can have.
        for set in [stamp(10, 0), stamp(9, writer + 2)] {
            assert!(set > gone.stamp, "{set:?} is lost under {:?}", gone.stamp);
        }
        let later = expired(&old, 1_234);
        assert_eq!(later, Some(gone.clone()), "two that find it expired agree");
        assert_eq!(expired(&gone, 1_234), None, "what is gone does not expire");
    }
}

#[cfg(feature = "solutions")]
#[path = "solutions/6_time_to_live.rs"]
mod solution;
#[cfg(feature = "solutions")]
use solution::expired;

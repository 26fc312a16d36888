//! # Exercise 6: a time to live (30 minutes)
//!
//! A value is to vanish by itself: clients write `[until, value]` and count `until` in seconds
//! on their own clocks, which do not agree. A get that finds `now >= until` answers nil. But then
//! a client with a slow clock asks, and gets the value: it was absent, and is back, and nobody
//! has set it. What must a get that found it expired do before it says so? Write the entry that
//! it has two of three keep. Mind the client that sets tea anew in the same moment: its set is
//! not to be lost.
//!
//! Hint: `Client::delete` does nearly that. Which stamp would it take, and which stamp does a set
//! take that has seen the same old entry? Is there a stamp between an entry's and every later
//! one's? What if two clients find it expired at once?

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
    let green = Packed::of(vec![Value::from(1_000), "green".into()]);
    let black = Packed::of(vec![Value::from(2_000), "black".into()]);
    for _ in 0..100 {
        let old = Stamp::default().newer(green.clone());
        assert_eq!(expired(&old, 999), None, "it still lives");
        let Some(gone) = expired(&old, 1_000) else {
            panic!("it has expired");
        };
        assert!(gone.value.is_nil());
        assert!(gone.stamp > old.stamp, "the slow clock still reads green");
        let set = old.stamp.newer(black.clone());
        assert!(set.stamp > gone.stamp, "a set that came in between is lost");
        assert_eq!(
            expired(&old, 1_234),
            Some(gone.clone()),
            "two that find it expired agree"
        );
        assert_eq!(expired(&gone, 1_234), None, "what is gone does not expire");
    }
}

#[cfg(feature = "solutions")]
#[path = "solutions/6_time_to_live.rs"]
mod solution;
#[cfg(feature = "solutions")]
use solution::expired;

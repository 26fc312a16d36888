//! # Exercise 12: a dead holder (25 minutes)
//!
//! Whoever finds a key absent and writes its name there holds a lock. If it dies, nobody else gets the lock
//! for ever. So the name gets a time to live: it ends by itself, and a holder that needs longer renews
//! it. Taking it is easy, if the key is absent. Renew it ([`renewed`]) and give it back ([`returned`]),
//! each in one swap: what do they make of what is there?
//!
//! Then the hard part. A holder asks for the lock, and its answer comes later. How long may it work
//! ([`may_work_until`])? The ring knows only until when the name lasts, and nobody tells a holder
//! that it has slept. It has but its own clock.
//!
//! Hint: what if the holder has slept, its name has ended, and another one is there? And from which of the
//! two moments on does the name last: from the question, or from the answer?
//!
//! Look afterwards at `src/commands/lock.rs`, at what `kv54 lock --ttl` does with `begun`. What remains: a holder
//! that looks at its clock, sleeps, and then works. Against that only the other side helps, if it refuses
//! those that come with a lower number than it has seen (a "fencing token"). Where would you get such numbers?

/// What the key has: whose name, and until when it lasts.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Name {
    of: &'static str,
    until: u64,
}

/// Yours: what a swap makes of the key when `me` renews its name until then; `None` leaves it as it is,
/// and `me` does not hold the lock.
#[cfg(not(feature = "solutions"))]
fn renewed(there: Option<Name>, me: &'static str, until: u64) -> Option<Name> {
    let _ = there;
    Some(Name { of: me, until })
}

/// Yours: what is there after a swap by which `me` gives the lock back.
#[cfg(not(feature = "solutions"))]
fn returned(there: Option<Name>, me: &str) -> Option<Name> {
    let _ = (there, me);
    None
}

/// Yours: until when a holder may work whose name lasts for `ttl`.
#[cfg(not(feature = "solutions"))]
fn may_work_until(asked: u64, answered: u64, ttl: u64) -> u64 {
    let _ = asked;
    answered + ttl
}

const TTL: u64 = 10;

/// The key at this time: a name that is over is gone.
fn at(now: u64, there: Option<Name>) -> Option<Name> {
    there.filter(|name| now < name.until)
}

/// Alice takes the lock, and the answer is late. She sleeps, renews, whose answer is late as well, and
/// gives it back. Bob asks every second, and keeps what he gets. When each of them may work.
fn play(late: u64, sleep: u64, late_again: u64) -> Vec<(&'static str, u64, u64)> {
    let mut key = Some(Name {
        of: "alice",
        until: TTL, // she asked at 0
    });
    let mut works = vec![("alice", late, may_work_until(0, late, TTL))];
    let (renews, returns) = (late + sleep, late + sleep + late_again);
    for now in 1..200 {
        key = at(now, key);
        if now == renews {
            let new = renewed(key, "alice", now + TTL);
            if new.is_some() {
                let until = may_work_until(now, returns, TTL);
                works.push(("alice", returns, until));
            }
            key = new.or(key);
        }
        if now == returns {
            key = returned(key, "alice");
            for (_, _, until) in works.iter_mut().filter(|(name, ..)| *name == "alice") {
                *until = now.min(*until);
            }
        }
        if key.is_none() {
            let until = now + TTL;
            key = Some(Name { of: "bob", until });
            works.push(("bob", now, until));
        } else if key.is_some_and(|name| name.of == "bob") {
            key = renewed(key, "bob", now + TTL).or(key);
            works.push(("bob", now, now + 1));
        }
    }
    works
}

#[test]
#[cfg_attr(not(feature = "solutions"), ignore = "exercise twelve: a dead holder")]
fn exercise_twelve() {
    for late in 0..15 {
        for sleep in 0..30 {
            for late_again in 0..15 {
                let works = play(late, sleep, late_again);
                let of = |name| works.iter().filter(move |(of, ..)| *of == name);
                for (_, from, until) in of("alice") {
                    let both = of("bob").find(|(_, begun, ended)| begun < until && from < ended);
                    assert_eq!(
                        both, None,
                        "alice works from {from} to {until} and bob too: her answer came after {late}, she \
                         slept for {sleep}, and the next answer came after {late_again}"
                    );
                }
                assert!(of("bob").count() > 100, "bob must get what alice leaves");
            }
        }
    }
    let alice = |until| Some(Name { of: "alice", until });
    assert_eq!(
        renewed(alice(5), "alice", 14),
        alice(14),
        "it is hers still"
    );
    assert_eq!(
        renewed(None, "alice", 14),
        None,
        "it has ended: she must take it again"
    );
    assert_eq!(
        may_work_until(3, 3, TTL),
        13,
        "an answer at once loses no time"
    );
}

#[cfg(feature = "solutions")]
#[path = "solutions/12_a_dead_holder.rs"]
mod solution;
#[cfg(feature = "solutions")]
use solution::{may_work_until, renewed, returned};

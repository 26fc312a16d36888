//! # Exercise 12: a dead holder (25 minutes)
//!
//! A client that finds a key absent and writes its name there holds a lock. If this client dies, no other one
//! ever gets the lock. So the name gets a time to live: it ends by itself, and a holder that needs longer
//! renews it. Taking the lock is easy: the key is absent. Renew it ([`renewed`]) and give it back ([`returned`]),
//! each in one swap: what do they make of what is there?
//!
//! Then the hard part. A holder asks for the lock, and its answer comes later. How long may it work
//! ([`may_work_until`])? The ring knows only until when the name lasts, and nobody tells a holder
//! that it has slept. It has only its own clock.
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
#[allow(clippy::unnecessary_wraps)] // as it stands
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

/// Alice takes the lock, and the answer is late. She sleeps, renews, and this answer is late too. Then she gives it
/// back. Bob takes what is free and renews it every second, carol takes what is free while bob works. Who may work
/// from when to when.
fn play(late: u64, sleep: u64, late_again: u64) -> Vec<(&'static str, u64, u64)> {
    let until = TTL; // she asked at 0
    let mut key = Some(Name { of: "alice", until });
    let mut works = vec![("alice", late, may_work_until(0, late, TTL))];
    let (renews, returns) = (late + sleep, late + sleep + late_again);
    for now in 1..100 {
        key = at(now, key);
        if now == renews {
            let new = renewed(key, "alice", now + TTL);
            if new.is_some() {
                works.push(("alice", returns, may_work_until(now, returns, TTL)));
            }
            key = new.or(key);
        }
        if now == returns {
            let hers = works.iter_mut().filter(|(name, ..)| *name == "alice");
            hers.for_each(|(_, _, until)| *until = now.min(*until));
            key = returned(key, "alice");
        }
        let until = now + TTL;
        match key {
            Some(name) if name.of == "bob" => {
                key = renewed(key, "bob", until).or(key);
                works.push(("bob", now, until));
            }
            Some(_) => {}
            None => {
                let bob_works = works.iter().any(|(name, ..)| *name == "bob");
                let of = if bob_works { "carol" } else { "bob" };
                key = Some(Name { of, until });
                works.push((of, now, until));
            }
        }
    }
    works.retain(|(_, from, until)| from < until);
    works
}

#[test]
#[cfg_attr(not(feature = "solutions"), ignore = "exercise twelve: a dead holder")]
fn exercise_twelve() {
    for late in 0..15 {
        for (sleep, late_again) in (0..30).flat_map(|sleep| (0..15).map(move |late| (sleep, late)))
        {
            let works = play(late, sleep, late_again);
            let both = works.iter().find_map(|one| {
                let (name, from, until) = one;
                let at_once =
                    |(of, begun, ended): &&(_, _, _)| of != name && begun < until && from < ended;
                Some((one, works.iter().find(at_once)?))
            });
            assert_eq!(
                both, None,
                "two work at once, from … to …: alice's answer came after {late}, she slept for {sleep}, \
                 and her next answer came after {late_again}"
            );
            let bob = works.iter().any(|(name, ..)| *name == "bob");
            assert!(bob, "bob gets what alice has left");
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
    assert_eq!(returned(alice(5), "alice"), None, "it is free at once");
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

//! # Exercise 9: two rings at once (30 minutes)
//!
//! Tea moves from an old ring (erin, alice, bob) to a new one (frank alone), while clients use it.
//! There are three states, which only move forward (RAMBO: Lynch and Shvartsman, 2002). Under
//! `Old` an operation asks a majority of the old ring, under `New` a majority of the new one,
//! under `Both` a majority of each. Each call carries a state. A node that is behind it moves
//! forward and serves the call; a node that is ahead refuses it. A node that restarts is at `Old`
//! again, and serves nothing before the other two of the old ring have told it their states.
//!
//! First a driver tells all four nodes that the state is `Both`. When all four are there, it hands
//! tea over: it reads tea under `Both`, and stores what it has read at both rings. Then the state
//! is `New`. Somebody proposes to leave out the first step: the driver's reads move two nodes of
//! the old ring to `Both` anyway, and a set under `Old` needs one of these two, which refuses it.
//! Be the network of a driver that does not wait ([`Rings`]): one node restarts once, a set under
//! `Old` is answered, and the get after it says green.
//!
//! Hint: one node must serve both the driver and, later, the set. What would make it refuse the
//! set, and how can it forget that? Who could tell it again, and what have they been told?

use crate::rings::{ALICE, BOB, ERIN, FRANK, Rings};

/// Yours: what arrives, and when who restarts and hears from whom.
#[cfg(not(feature = "solutions"))]
fn schedule(rings: &mut Rings) {
    rings.restart(BOB);
    rings.tell(ERIN);
    rings.hear(BOB, ERIN);
    rings.hear(BOB, ALICE);
    rings.store(ALICE);
    rings.store(BOB);
    for node in [ERIN, ALICE, FRANK] {
        rings.hand_over(node);
    }
    rings.get();
}

#[test]
#[cfg_attr(not(feature = "solutions"), ignore = "exercise 9: two rings at once")]
fn exercise_9() {
    let mut rings = Rings::green();
    rings.waits = false;
    schedule(&mut rings);
    assert_eq!(rings.restarts, 1, "one node restarts, and once");
    let story = ["set black: ok", "get: green"];
    assert!(
        rings.told(&story),
        "wanted: {story:?}, told: {:?}",
        rings.log
    );

    let mut rings = Rings::green();
    schedule(&mut rings);
    let all = [ERIN, ALICE, BOB, FRANK];
    for node in all {
        rings.tell(node);
    }
    for node in all {
        rings.hand_over(node);
    }
    rings.get();
    assert!(
        !rings.told(&story),
        "with a driver that waits it cannot happen: {:?}",
        rings.log
    );
}

#[cfg(feature = "solutions")]
#[path = "solutions/9_two_rings.rs"]
mod solution;
#[cfg(feature = "solutions")]
use solution::schedule;

//! # Exercise 5: the deleted return (20 minutes)
//!
//! A deleted key leaves a tombstone: a nil with a stamp. Somebody proposes to throw it away as soon
//! as all three replicas have it, for then nobody has an old copy any more ([`Tea::collect`]). Be the
//! network: tea is set, deleted, collected, and comes back.
//!
//! Hint: all replicas have the tombstone. Where else can an old entry be? A set is answered when
//! two have it; what of its third message?
//!
//! Then read `src/beyond/forget.rs`: kv54 forgets all tombstones at once, and asks another ring from then on.
//! What happens there to that third message?

use crate::tea::{ALICE, BOB, ERIN, Tea};

/// Yours: what arrives, in which order.
#[cfg(not(feature = "solutions"))]
fn schedule(tea: &mut Tea) {
    let black = tea.begin_set("black", [ERIN, ALICE]);
    tea.store([ERIN, ALICE, BOB], &black);
    let deleted = tea.begin_delete([ERIN, ALICE]);
    tea.store([ERIN, ALICE, BOB], &deleted);
    tea.collect();
    tea.get([ERIN, BOB]);
}

#[test]
#[cfg_attr(not(feature = "solutions"), ignore = "exercise 5: the deleted return")]
fn exercise_5() {
    let mut tea = Tea::green();
    schedule(&mut tea);
    let story = ["set black: ok", "delete: ok", "collected", "get: black"];
    assert!(tea.told(&story), "wanted: {story:?}, told: {:?}", tea.log);

    let mut tea = Tea::green();
    tea.collects = false;
    schedule(&mut tea);
    assert!(
        !tea.told(&["delete: ok", "get: black"]),
        "it returns without being collected: {:?}",
        tea.log
    );
}

#[cfg(feature = "solutions")]
#[path = "solutions/5_the_deleted_return.rs"]
mod solution;
#[cfg(feature = "solutions")]
use solution::schedule;

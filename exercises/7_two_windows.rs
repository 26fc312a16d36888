//! # Exercise 7: two windows (30 minutes)
//!
//! A node that has started waits two seconds before it reads anything (`src/join.rs`). Why, if
//! it then reads everything that the others have? Be the network of a kv54 that does not wait:
//! one replica restarts once, a set is answered, and the get after it says green.
//!
//! Hint: a set counts answers of two different replicas. What are they worth if one of them
//! forgets before the other one answers? What must the forgetful one have read, and when?

use crate::tea::{ALICE, BOB, ERIN, Tea};

/// Yours: what arrives, and when who restarts and joins.
#[cfg(not(feature = "solutions"))]
fn schedule(tea: &mut Tea) {
    let black = tea.begin_set("black", [ERIN, ALICE]);
    tea.store([ERIN], &black);
    tea.store([ALICE], &black);
    tea.restart(ERIN);
    tea.join(ERIN);
    tea.get([ERIN, BOB]);
}

#[test]
#[cfg_attr(not(feature = "solutions"), ignore = "exercise 7: two windows")]
fn exercise_7() {
    let mut tea = Tea::green();
    tea.waits = false;
    schedule(&mut tea);
    assert_eq!(tea.restarts, 1, "one replica restarts, and once");
    let story = ["set black: ok", "get: green"];
    assert!(tea.told(&story), "no answered set is lost: {:?}", tea.log);

    let mut tea = Tea::green();
    schedule(&mut tea);
    assert!(
        !tea.told(&story),
        "with the wait it cannot happen: {:?}",
        tea.log
    );
}

#[cfg(feature = "solutions")]
#[path = "solutions/7_two_windows.rs"]
mod solution;
#[cfg(feature = "solutions")]
use solution::schedule;

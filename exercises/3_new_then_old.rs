//! # Exercise 3: new, then old (15 minutes)
//!
//! `Client::get` has three lines that look like a luxury: if its two replicas do not agree, it
//! repairs the old one *before* it answers. Here gets do not. Be the network, and show what goes
//! wrong while one client sets black: three gets, one after the other, say black, green, and
//! black again. The set is answered between the last two.
//!
//! Hint: how far may a `set` have come that is not answered yet? Which two replicas does the
//! second get have to ask?

use crate::tea::{ALICE, BOB, ERIN, Tea};

/// Yours: what arrives, in which order.
#[cfg(not(feature = "solutions"))]
fn schedule(tea: &mut Tea) {
    let black = tea.begin_set("black", [ERIN, ALICE]);
    tea.store([ERIN, ALICE], &black);
    tea.get([ERIN, BOB]);
}

#[test]
#[cfg_attr(not(feature = "solutions"), ignore = "exercise 3: new, then old")]
fn exercise_3() {
    let mut tea = Tea::green();
    tea.repairs = false;
    schedule(&mut tea);
    let story = ["get: black", "get: green", "set black: ok", "get: black"];
    assert!(tea.told(&story), "wanted: {story:?}, told: {:?}", tea.log);

    let mut tea = Tea::green();
    schedule(&mut tea);
    assert!(
        !tea.told(&["get: black", "get: green"]),
        "with repair it cannot happen: {:?}",
        tea.log
    );
}

#[cfg(feature = "solutions")]
#[path = "solutions/3_new_then_old.rs"]
mod solution;
#[cfg(feature = "solutions")]
use solution::schedule;

//! # Exercise 3: new, then old (15 minutes)
//!
//! `Client::get` has three lines that look like a luxury: if its two replicas do not agree, it
//! repairs the old one *before* it answers. Here gets do not. Be the network, and show what goes
//! wrong: two gets, one after the other, of which the first says black and the second green.
//!
//! Hint: how far may a `set` have come that is not answered yet? Which two replicas does the
//! second get have to ask?

use crate::tea::{ALICE, BOB, ERIN, Tea};

/// Yours: what arrives, in which order.
#[cfg(not(feature = "solutions"))]
fn schedule(tea: &mut Tea) {
    let black = tea.begin_set("black", [ERIN, ALICE]);
    tea.store([ERIN], &black);
    tea.store([ALICE], &black);
    tea.get([ERIN, BOB]);
    tea.get([ALICE, BOB]);
}

#[test]
#[cfg_attr(not(feature = "solutions"), ignore = "exercise 3: new, then old")]
fn exercise_3() {
    let mut tea = Tea::green();
    tea.repairs = false;
    schedule(&mut tea);
    assert!(new_then_old(&tea.log), "{:?}", tea.log);

    let mut tea = Tea::green();
    schedule(&mut tea);
    assert!(
        !new_then_old(&tea.log),
        "with repair it cannot happen: {:?}",
        tea.log
    );
}

fn new_then_old(log: &[String]) -> bool {
    let new = log.iter().position(|line| line == "get: black");
    let old = log.iter().rposition(|line| line == "get: green");
    new.is_some() && new < old
}

#[cfg(feature = "solutions")]
#[path = "solutions/3_new_then_old.rs"]
mod solution;
#[cfg(feature = "solutions")]
use solution::schedule;

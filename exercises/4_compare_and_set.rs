//! # Exercise 4: compare and set (15 minutes)
//!
//! Two clients want the last cup: *if tea is green, make it mine*. kv54 has no such method, so
//! they build it from a get and a set ([`Cas`]). Be the network, and let both be told that they
//! have it.
//!
//! Hint: what does a client know when its get is answered: how tea is, or how tea was?
//!
//! And then: no cleverer use of get and set helps. A register like this cannot make even two
//! clients agree on one of them if either may stop at any time (Herlihy, "Wait-free
//! synchronization", 1991). Which of the methods in `src/server.rs` would have to compare, and
//! what if one replica says yes to one client, one to the other, and the third is down?

use crate::tea::{ALICE, BOB, ERIN, Tea};

/// Yours: who gets and who sets, in which order.
#[cfg(not(feature = "solutions"))]
fn schedule(tea: &mut Tea, mine: &mut Cas, yours: &mut Cas) {
    mine.get(tea, [ERIN, ALICE]);
    mine.set(tea, [ERIN, ALICE]);
    yours.get(tea, [ALICE, BOB]);
    yours.set(tea, [ALICE, BOB]);
}

/// Compare and set, as a client would build it: two steps, and the network between them.
struct Cas {
    value: &'static str,
    green: bool,
    done: bool,
}

impl Cas {
    fn new(value: &'static str) -> Cas {
        let (green, done) = (false, false);
        Cas { value, green, done }
    }

    /// The first step: is tea green?
    fn get(&mut self, tea: &mut Tea, asked: [usize; 2]) {
        self.green = tea.get(asked).as_str() == Some("green");
    }

    /// The second step, if it was: takes it, and its client is told.
    fn set(&mut self, tea: &mut Tea, asked: [usize; 2]) {
        if self.green {
            let taken = tea.begin_set(self.value, asked);
            tea.store(asked, &taken);
            self.done = true;
        }
    }
}

#[test]
#[cfg_attr(not(feature = "solutions"), ignore = "exercise 4: compare and set")]
fn exercise_4() {
    let (mut tea, mut mine, mut yours) = (Tea::green(), Cas::new("mine"), Cas::new("yours"));
    schedule(&mut tea, &mut mine, &mut yours);
    assert!(mine.done, "mine was refused: {:?}", tea.log);
    assert!(yours.done, "yours was refused: {:?}", tea.log);
}

#[cfg(feature = "solutions")]
#[path = "solutions/4_compare_and_set.rs"]
mod solution;
#[cfg(feature = "solutions")]
use solution::schedule;

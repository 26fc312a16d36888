//! While a set is under way, one replica may have it and the others not: a get that asks this one
//! says black, a get that asks the others says green. A get that repairs leaves two replicas with
//! black before it answers, and every later get asks one of the two.

use super::{ALICE, BOB, ERIN, Tea};

pub fn schedule(tea: &mut Tea) {
    let black = tea.begin_set("black", [ERIN, ALICE]);
    tea.store([ERIN], &black);
    tea.get([ERIN, ALICE]);
    tea.get([ALICE, BOB]);
    tea.store([ALICE], &black);
    tea.get([ALICE, BOB]);
}

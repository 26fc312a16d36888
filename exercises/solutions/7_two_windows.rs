//! erin answers, forgets, and reads the others before the same set reaches alice. Then alice
//! answers too: two have answered, and only one has it. With the wait, erin reads when the set's
//! window is over: either alice has it by then, or its answer does not count.

use super::{ALICE, BOB, ERIN, Tea};

pub fn schedule(tea: &mut Tea) {
    let black = tea.begin_set("black", [ERIN, ALICE]);
    tea.store([ERIN], &black);
    tea.restart(ERIN);
    tea.join(ERIN);
    tea.store([ALICE], &black);
    tea.get([ERIN, BOB]);
}

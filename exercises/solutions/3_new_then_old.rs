//! A set may have reached one replica when its client dies. Who asks that one sees it, who asks
//! the others does not, and no later than the first answer everybody must.

use super::{ALICE, BOB, ERIN, Tea};

pub fn schedule(tea: &mut Tea) {
    let black = tea.begin_set("black", [ERIN, ALICE]);
    tea.store([ERIN], &black);
    tea.get([ERIN, ALICE]);
    tea.get([ALICE, BOB]);
}

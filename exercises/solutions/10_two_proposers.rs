//! Both believe that tea is green when they have heard two replicas. Then mine is taken by erin and
//! alice, and is what a get answers. Yours has heard alice before that, and replaces mine as if it were
//! green: nothing that it asks could tell it. The ballots order the two, but yours has compared with
//! what was there before mine. With promises alice refuses mine, since it has promised to take nothing
//! below ballot 2: so what yours has heard is still so when its value arrives. If alice takes mine
//! first, yours hears of it in its first phase.

use super::{ALICE, BOB, ERIN, Swap, Tea};

pub fn schedule(tea: &mut Tea, mine: &mut Swap, yours: &mut Swap) {
    mine.promise(tea, [ERIN, ALICE]);
    yours.promise(tea, [ALICE, BOB]);
    mine.accept(tea, [ERIN, ALICE]);
    tea.get([ERIN, ALICE]);
    yours.accept(tea, [ALICE, BOB]);
}

//! A client that is told green knows how tea was, not how it is. And a set that is answered was
//! the newest somewhere in between, but need not be it any more: mine has seen the stamp of yours
//! at bob, and goes above it, before the second answer to yours arrives. (To look again after the
//! set does not help. Each of the two can look before the other one's set arrives.)
//!
//! With replicas that compare, two yes are the cup, and two no are the other one's. One yes and
//! one no: the third replica may have said yes to either and have gone down then, or to none yet.
//! Each answer but "wait" is wrong in one of these cases. So one replica that is down can keep
//! both clients waiting, and if it has lost its memory when it comes back, it says yes once more.
//! To decide even then takes rounds of promises that a later round can take over: consensus.

use super::{ALICE, BOB, Cas, ERIN, Tea};

pub fn schedule(tea: &mut Tea, mine: &mut Cas, yours: &mut Cas) {
    mine.get(tea, [ERIN, ALICE]);
    yours.get(tea, [ALICE, BOB]);
    let your_set = yours.begin_set(tea, [ALICE, BOB]);
    tea.store([BOB], &your_set);
    let my_set = mine.begin_set(tea, [ALICE, BOB]);
    tea.store([ALICE, BOB], &my_set);
    tea.store([ALICE], &your_set);
    tea.get([ALICE, BOB]);
}

pub fn has_the_cup(yes: u32, no: u32) -> Option<bool> {
    match (yes, no) {
        (2.., _) => Some(true),
        (_, 2..) => Some(false),
        _ => None,
    }
}

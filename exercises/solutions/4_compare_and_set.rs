//! A client that is told green knows how tea was, not how it is. And a set that is answered was
//! the newest somewhere in between, but need not be it any more: mine has seen the stamp of yours
//! at bob, and goes above it, before the second answer to yours arrives. (To look again after the
//! set does not help. Each of the two can look before the other one's set arrives.)
//!
//! With replicas that compare, two yes are the cup, and two no are the other one's. One yes and
//! one no: the third replica may have said yes to either and have gone down then, or to none yet.
//! Each answer but "wait" is wrong in one of these cases. So one replica that is down can keep
//! both clients waiting, and if it has lost its memory when it comes back, it says yes once more.
//! To decide even then takes rounds, and what a later round takes over: consensus.
//!
//! If something is decided, one of the two replicas that decided it is among those that you hear: the
//! cup is theirs who got it in the highest round of which you hear. A lower round was not decided, for
//! the client of the higher one had heard of it. And what you heard stays true while you make something
//! of it, since the replicas have promised to take nothing of a lower round meanwhile: that is what the
//! first phase is for. So a client may compare after all, on what two replicas have promised. This is a
//! swap of kv54 (`src/replicas/swap.rs`); exercise 10 breaks it.

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

pub fn who_gets_it(said: [Option<(u32, &'static str)>; 2]) -> &'static str {
    let taken = said.into_iter().flatten();
    taken.max().map_or("mine", |(_, name)| name)
}

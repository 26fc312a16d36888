//! The third message of an answered set may still be on its way, and a network does not say how
//! long. Where nothing is known about tea, the oldest entry is news. So one would have to know
//! that no message older than the tombstone can arrive: by closing every connection on which one
//! could, and by a promise of every client that it sends no more.

use super::{ALICE, BOB, ERIN, Tea};

pub fn schedule(tea: &mut Tea) {
    let black = tea.begin_set("black", [ERIN, ALICE]);
    tea.store([ERIN, ALICE], &black);
    let deleted = tea.begin_delete([ERIN, ALICE]);
    tea.store([ERIN, ALICE, BOB], &deleted);
    tea.collect();
    tea.store([BOB], &black);
    tea.get([ALICE, BOB]);
}

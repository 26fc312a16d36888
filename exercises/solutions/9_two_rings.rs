//! The two majorities meet at alice, and she is asked with two different memories. She answers the
//! driver, restarts, and hears `Old` from erin and bob: the driver has not told them yet. So she
//! serves the set as well, after the driver has read her. A driver that waits begins when all four
//! nodes are at `Both`. From then on a node that restarts hears `Both` from the others, and no
//! store under `Old` is served any more. A set that was answered before is at two nodes of the old
//! ring, and the driver reads one of them.

use super::{ALICE, BOB, ERIN, FRANK, Rings};

pub fn schedule(rings: &mut Rings) {
    rings.hand_over(FRANK);
    rings.hand_over(ALICE);
    rings.restart(ALICE);
    rings.hear(ALICE, ERIN);
    rings.hear(ALICE, BOB);
    rings.store(ERIN);
    rings.store(ALICE);
    rings.hand_over(BOB);
    rings.get();
}

//! A nil with the next writer of the same counter: above the entry, below every later one, and the
//! same for every client that finds the entry expired. A higher writer would do for the set that
//! has seen the entry, whose counter is higher. But a set with the same counter has drawn its
//! writer at random: the higher the nil, the more of these sets it hides. Below the next writer
//! but one there is only one place.
//!
//! It is right for a register alone. But a swap that renews the value keeps its counter and its writer
//! (`Stamp::swapped`), so this nil hides it. kv54 has the end of a value be a swap, too
//! (`src/beyond/expire.rs`): it ends what it has found over, and not what came in between.

use kv54::entry::{Entry, Packed, Stamp};

use super::until;

pub fn expired(entry: &Entry, now: u64) -> Option<Entry> {
    let gone = Entry {
        stamp: Stamp {
            writer: entry.stamp.writer.saturating_add(1),
            ..entry.stamp
        },
        value: Packed::default(),
    };
    (now >= until(entry)?).then_some(gone)
}

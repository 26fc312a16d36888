//! A nil with the next writer of the same counter: above the entry, below every set that has seen
//! it, and the same for everybody. (Another set with this very counter has seen as little of the
//! entry as the entry of it: either order is right.)

use kv54::entry::{Entry, Packed, Stamp};

use super::until;

pub fn expired(entry: &Entry, now: u64) -> Option<Entry> {
    let Stamp { counter, writer } = entry.stamp;
    let gone = Entry {
        stamp: Stamp {
            counter,
            writer: writer.saturating_add(1),
        },
        value: Packed::default(),
    };
    (now >= until(entry)?).then_some(gone)
}

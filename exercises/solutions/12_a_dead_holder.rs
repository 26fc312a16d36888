//! Both swaps look whose name is there. A holder that has slept may find another one: a blind set would take the
//! lock from it, and a blind delete would give away what is not hers. Where the name has ended and nothing
//! is there, renewing is refused too: another holder may have come and gone meanwhile, and what alice
//! knows of the world is from before that.
//!
//! The name lasts from the question on, since the end was written into it before it left. From the answer on
//! it lasts shorter, and alice does not know by how much: so she counts from before she asked. Numbers
//! for a fence: an `incr` of another key by the one that has the lock, or the stamp of the name, which only rises.

use super::Name;

pub fn renewed(there: Option<Name>, me: &'static str, until: u64) -> Option<Name> {
    let mine = there.filter(|name| name.of == me);
    mine.map(|name| Name { until, ..name })
}

pub fn returned(there: Option<Name>, me: &str) -> Option<Name> {
    there.filter(|name| name.of != me)
}

pub fn may_work_until(asked: u64, _answered: u64, ttl: u64) -> u64 {
    asked + ttl
}

//! A task is taken where nobody has it in hand, or the time of the one that has it is over. So it is done again if its
//! worker died, and also if the worker only slept: from outside both look the same. The number of the task
//! goes into the account by the swap that adds the cups: both are there, or neither. Who comes second
//! finds the number, and leaves the account as it is.
//!
//! A number is needed for as long as some worker may still have its task in hand, and a worker that sleeps may
//! have it for ever. If all tasks below one are in the account, one number stands for all of these:
//! begun in order, few are missing, and the account stays small.

use super::{Account, Task};

pub fn taken(task: &Task, me: &'static str, now: u64, until: u64) -> Option<Task> {
    let is_free = task.taken.is_none_or(|(_, until)| until <= now);
    let taken = Some((me, until));
    is_free.then_some(Task { taken, ..*task })
}

pub fn added(account: &Account, task: &Task) -> Option<Account> {
    let mut account = account.clone();
    account.cups += task.cups;
    account.numbers.insert(task.number).then_some(account)
}

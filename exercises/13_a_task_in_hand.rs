//! # Exercise 13: a task in hand (30 minutes)
//!
//! Tasks wait in a queue, one key each: a number, and how many cups it adds to the account, another key.
//! A worker does three things, each one swap: it takes a task, it adds the cups, it removes the task.
//! No swap changes two keys. And a worker may die between any two of them, with a task in hand.
//!
//! If it removes a task before it adds, the task may be lost. So it leaves the task there, with its name and
//! a time until when nobody else takes it ([`taken`]). But then one that slept too long, or died
//! late, has its task done twice. Have each task be in the account once all the same ([`added`]).
//!
//! Hint: what does the second worker have to find in the account, and in which swap must it get there? Who may
//! take a task, and when? And does it do harm if a worker that was asleep removes a task that another one has taken?
//!
//! And then: what must the account keep, for how long? When can it forget a number, if tasks are begun in their order?
//! This is what "at least once" costs, and no queue can take it from you: only the one that keeps the result
//! can tell whether a task is already in it.

use std::collections::BTreeSet;

/// A task in the queue.
#[derive(Clone, Debug, PartialEq)]
struct Task {
    number: u64,
    cups: u64,
    /// Who has it in hand, and until when nobody else takes it.
    taken: Option<(&'static str, u64)>,
}

/// The account: how many cups, and whatever you need beside them.
#[derive(Clone, Debug, Default)]
struct Account {
    cups: u64,
    #[cfg_attr(not(feature = "solutions"), allow(dead_code))] // as it stands
    numbers: BTreeSet<u64>,
}

/// Yours: the task after `me` has taken it until then; `None` where it may not.
#[cfg(not(feature = "solutions"))]
#[allow(clippy::unnecessary_wraps)] // as it stands
fn taken(task: &Task, me: &'static str, now: u64, until: u64) -> Option<Task> {
    let _ = now;
    let taken = Some((me, until));
    let task = Task { taken, ..*task };
    Some(task)
}

/// Yours: the account after a task; `None` leaves it as it is.
#[cfg(not(feature = "solutions"))]
#[allow(clippy::unnecessary_wraps)] // as it stands
fn added(account: &Account, task: &Task) -> Option<Account> {
    let mut account = account.clone();
    account.cups += task.cups;
    Some(account)
}

/// For so long a task is in the hands of one worker.
const PATIENCE: u64 = 10;

/// A worker: what it has in hand, and at which of the three things it is.
struct Worker {
    name: &'static str,
    task: Option<Task>,
    has_added: bool,
}

impl Worker {
    /// The next of the three things.
    fn work(&mut self, queue: &mut Vec<Task>, account: &mut Account, now: u64) {
        match &self.task {
            None => {
                let mut places = queue.iter_mut();
                self.task = places.find_map(|task| {
                    *task = taken(task, self.name, now, now + PATIENCE)?;
                    Some(task.clone())
                });
            }
            Some(task) if !self.has_added => {
                if let Some(new) = added(account, task) {
                    *account = new;
                }
                self.has_added = true;
            }
            Some(task) => {
                // It is in the account, whoever removes it.
                queue.retain(|waiting| waiting.number != task.number);
                (self.task, self.has_added) = (None, false);
            }
        }
    }
}

/// Alice does so many things and then sleeps, for ever or not; bob works all the time. The account in the end,
/// and whether bob ever had a task in hand that was alice's at that time.
fn play(things: u64, wakes: u64) -> (Account, bool) {
    let (mut account, mut both) = (Account::default(), false);
    let of = |number| Task {
        number,
        cups: 1 << number,
        taken: None,
    };
    let mut queue: Vec<Task> = (0..4).map(of).collect();
    let worker = |name| Worker {
        name,
        task: None,
        has_added: false,
    };
    let (mut alice, mut bob) = (worker("alice"), worker("bob"));
    for now in 0..100 {
        if now < things || now >= wakes {
            alice.work(&mut queue, &mut account, now);
        }
        let held = |worker: &Worker| {
            worker
                .task
                .clone()
                .filter(|task| task.taken.is_some_and(|(_, until)| now < until))
        };
        let before = held(&bob);
        bob.work(&mut queue, &mut account, now);
        let [hers, his] = [&alice, &bob].map(held);
        both |= before.is_none()
            && his.is_some_and(|his| hers.is_some_and(|hers| hers.number == his.number));
    }
    assert!(
        queue.is_empty(),
        "alice stopped after {things}: left in the queue: {queue:?}"
    );
    (account, both)
}

#[test]
#[cfg_attr(
    not(feature = "solutions"),
    ignore = "exercise thirteen: a task in hand"
)]
fn exercise_thirteen() {
    let (number, cups, hers) = (0, 1, Some(("alice", PATIENCE)));
    let task = |taken| Task {
        number,
        cups,
        taken,
    };
    let by_alice = taken(&task(None), "alice", 0, PATIENCE);
    assert_eq!(by_alice, Some(task(hers)), "her name and her time");
    for things in 0..12 {
        for wakes in (things..60).chain([u64::MAX]) {
            let (account, both) = play(things, wakes);
            let world = format!("alice did {things} things and slept until {wakes}");
            assert!(!both, "{world}: both had one task in hand, within its time");
            assert_eq!(
                account.cups, 0b1111,
                "{world}: each task once, in binary {:b}",
                account.cups
            );
        }
    }
}

#[cfg(feature = "solutions")]
#[path = "solutions/13_a_task_in_hand.rs"]
mod solution;
#[cfg(feature = "solutions")]
use solution::{added, taken};

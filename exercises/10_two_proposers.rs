//! # Exercise 10: two proposers (20 minutes)
//!
//! kv54 can compare and set, by a swap in two phases. It has a ballot, a number that no other swap has.
//! First it asks two replicas for their promises: to take nothing of a swap with a lower ballot any
//! more. Each replica answers what it has, and the swap compares (it, not the replicas). If tea is
//! green, it has two replicas take its value. Then it is done.
//!
//! Somebody proposes replicas that keep no such promise: "A swap with an old ballot cannot hurt, the
//! higher one is newer and stays." Be the network of mine, which has ballot 1, and yours, which has
//! ballot 2 ([`Swap`]). Let both be told that they have the last cup, and a get in between say mine.
//! Then the test plays the same with kv54's own replicas, and one of the two is refused.
//!
//! Hint: at which moment does each of them believe that tea is green? What may still arrive after
//! that moment, and which replica would have refused it?
//!
//! Look afterwards at `src/replicas/swap.rs`, where a swap is done, at `src/beyond/swap.rs`, where its
//! clients come from, and at `accepts` in `src/store/held.rs`: the promise is kept in one comparison.

use kv54::entry::Packed;

use crate::tea::{ALICE, BOB, ERIN, Entry, Tea};

/// Yours: which swap reaches whom, and in which order.
#[cfg(not(feature = "solutions"))]
fn schedule(tea: &mut Tea, mine: &mut Swap, yours: &mut Swap) {
    mine.promise(tea, [ERIN, ALICE]);
    mine.accept(tea, [ERIN, ALICE]);
    tea.get([ERIN, ALICE]);
    yours.promise(tea, [ALICE, BOB]);
    yours.accept(tea, [ALICE, BOB]);
}

/// A proposer: if tea is green, it becomes this value.
struct Swap {
    value: &'static str,
    ballot: u64,
    green: Option<Entry>, // as two replicas have promised
}

impl Swap {
    fn new(value: &'static str, ballot: u64) -> Swap {
        Swap {
            value,
            ballot,
            green: None,
        }
    }

    /// The first phase, at two replicas: their promises, and what is there.
    fn promise(&mut self, tea: &mut Tea, asked: [usize; 2]) {
        let [Some(one), Some(other)] = asked.map(|at| tea.promise(at, self.ballot)) else {
            return self.log(tea, "refused");
        };
        let newest = if one.stamp > other.stamp { one } else { other };
        let is_green = newest.value.value().unwrap().as_str() == Some("green");
        self.green = is_green.then_some(newest);
        if !is_green {
            self.log(tea, "not green");
        }
    }

    /// The second phase, at the same replicas or others: they take the value.
    fn accept(&self, tea: &mut Tea, reached: [usize; 2]) {
        let Some(Entry { stamp, .. }) = self.green else {
            return; // it has seen no green tea
        };
        let entry = Entry {
            stamp: stamp.swapped(self.ballot),
            value: Packed::of(self.value),
        };
        let done = tea.accept(reached, &entry);
        self.log(tea, if done { "done" } else { "refused" });
    }

    fn log(&self, tea: &mut Tea, told: &str) {
        tea.log.push(format!("swap to {}: {told}", self.value));
    }
}

#[test]
#[cfg_attr(not(feature = "solutions"), ignore = "exercise 10: two proposers")]
fn exercise_ten() {
    let play = |promises| {
        let mut tea = Tea::green();
        tea.promises = promises;
        schedule(
            &mut tea,
            &mut Swap::new("mine", 1),
            &mut Swap::new("yours", 2),
        );
        assert_eq!(tea.restarts, 0, "no replica restarts");
        tea
    };
    let story = ["swap to mine: done", "get: mine", "swap to yours: done"];
    let tea = play(false);
    assert!(tea.told(&story), "wanted: {story:?}, told: {:?}", tea.log);
    let tea = play(true);
    let told = tea.log.iter().filter(|line| line.ends_with("done")).count();
    assert_eq!(told, 1, "with promises one has the cup: {:?}", tea.log);
}

#[cfg(feature = "solutions")]
#[path = "solutions/10_two_proposers.rs"]
mod solution;
#[cfg(feature = "solutions")]
use solution::schedule;

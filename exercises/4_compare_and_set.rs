//! # Exercise 4: compare and set (30 minutes)
//!
//! Two clients want the last cup: *if tea is green, make it mine*. They build it from a get and a
//! set ([`Cas`]). Be the network: let both be told that they have the cup, `yours` last, and after
//! that a get says mine.
//!
//! Hint: what does a client know when its get is answered: how tea is, or how tea was? And which
//! of two sets stays: the one that is answered last, or the one with the higher stamp?
//!
//! And then: no cleverer use of get and set helps. A register like this cannot make even two
//! clients agree on one of them if either may stop at any time (Herlihy, "Wait-free
//! synchronization", 1991). So let the replicas compare: each says yes to the first client that
//! asks for the cup, and no to the other. But what if one replica says yes to one client, one to
//! the other, and the third is down? Write what a client is told ([`has_the_cup`]).
//!
//! Hint: whom may the third replica have answered before it went down?
//!
//! So who must compare, and when? Let there be rounds, each of one client, in two phases. In the
//! first phase replicas promise to take nothing of a lower round any more, and each says what it
//! took last: of which round, and who gets the cup. In the second phase they take what the client
//! makes of that. When two of three have taken it, it is decided. The promises of two are here,
//! and you write who gets the cup in the second phase of my round ([`who_gets_it`]).
//!
//! Hint: it may be decided already. Which of the two replicas that decided it do you hear?

use crate::tea::{ALICE, BOB, ERIN, Entry, Tea};

/// Yours: who gets and who sets, and what arrives, in which order.
#[cfg(not(feature = "solutions"))]
fn schedule(tea: &mut Tea, mine: &mut Cas, yours: &mut Cas) {
    mine.get(tea, [ERIN, ALICE]);
    let set = mine.begin_set(tea, [ERIN, ALICE]);
    tea.store([ERIN, ALICE], &set);
    yours.get(tea, [ALICE, BOB]);
}

/// Yours: whether this client has the cup, if so many of the three replicas have said yes to it,
/// and so many no; the rest is down. `None`: it must wait for them.
#[cfg(not(feature = "solutions"))]
fn has_the_cup(yes: u32, no: u32) -> Option<bool> {
    (yes + no > 0).then_some(yes > no)
}

/// Yours: who gets the cup in my round, by what two replicas have said: in which lower round each
/// took something last, and who gets the cup there.
#[cfg(not(feature = "solutions"))]
fn who_gets_it(said: [Option<(u32, &'static str)>; 2]) -> &'static str {
    match said {
        [Some((_, name)), _] => name,
        _ => "mine",
    }
}

/// Compare and set, as a client would build it: two steps, and the network between them.
struct Cas {
    value: &'static str,
    green: bool,
}

impl Cas {
    fn new(value: &'static str) -> Cas {
        let green = false;
        Cas { value, green }
    }

    /// The first step: is tea green?
    fn get(&mut self, tea: &mut Tea, asked: [usize; 2]) {
        self.green = tea.get(asked) == "green";
    }

    /// The second step, if it was: the message `store` that takes the cup.
    fn begin_set(&self, tea: &Tea, asked: [usize; 2]) -> Entry {
        assert!(self.green, "{} has not seen green tea", self.value);
        tea.begin_set(self.value, asked)
    }
}

#[test]
#[cfg_attr(not(feature = "solutions"), ignore = "exercise 4: compare and set")]
fn exercise_4() {
    for _ in 0..20 {
        // Stamps are drawn at random, and the same must happen with all of them.
        let mut tea = Tea::green();
        schedule(&mut tea, &mut Cas::new("mine"), &mut Cas::new("yours"));
        let story = ["set mine: ok", "set yours: ok", "get: mine"];
        assert!(tea.told(&story), "wanted: {story:?}, told: {:?}", tea.log);
    }
}

#[test]
#[cfg_attr(not(feature = "solutions"), ignore = "exercise 4: one yes each")]
fn exercise_4_one_yes_each() {
    // A set of replicas has a bit for each. Those in `yes` say yes to mine and no to yours.
    let heard_of = |set: u32, heard: u32| (set & heard).count_ones();
    let told = |yes, heard| has_the_cup(heard_of(yes, heard), heard_of(!yes, heard));
    let two_or_three = [0b111, 0b110, 0b101, 0b011];
    for yes in 0b000..=0b111 {
        for heard in two_or_three {
            let mine = told(yes, heard);
            let world = format!("yes to mine: {}; mine hears {}", names(yes), names(heard));
            for other in two_or_three {
                let yours = told(!yes, other);
                let world = format!("{world}; yours hears {}", names(other));
                let both = format!("{world}: both are told {mine:?}");
                assert!(mine.is_none() || mine != yours, "{both}");
            }
            let split = heard_of(yes, heard) == heard_of(!yes, heard);
            assert!(mine.is_some() || split, "{world}: two say the same");
        }
    }
    assert_eq!(has_the_cup(3, 0), Some(true), "all three say yes");
    for (yes, no) in [(0, 0), (1, 0), (0, 1)] {
        let told = has_the_cup(yes, no);
        assert_eq!(told, None, "{yes} yes, {no} no: two are down");
    }
}

#[test]
#[cfg_attr(not(feature = "solutions"), ignore = "exercise 4: two phases")]
fn exercise_4_two_phases() {
    let took = |round, name| Some((round, name));
    // What each of the three replicas took last, and what two of them have decided.
    let worlds = [
        ([took(1, "yours"), took(1, "yours"), None], "yours"),
        ([took(1, "mine"), took(1, "mine"), None], "mine"),
        ([took(2, "yours"), took(2, "yours"), None], "yours"),
        (
            [took(1, "mine"), took(2, "yours"), took(2, "yours")],
            "yours",
        ),
        ([took(1, "yours"), took(2, "mine"), took(2, "mine")], "mine"),
        (
            [took(1, "yours"), took(1, "yours"), took(2, "yours")],
            "yours",
        ),
    ];
    for (took, decided) in worlds {
        for [one, other] in [[0, 1], [1, 0], [0, 2], [2, 0], [1, 2], [2, 1]] {
            let said = [took[one], took[other]];
            let world = format!("taken: {took:?}; said to you: {said:?}");
            assert_eq!(who_gets_it(said), decided, "{world}");
        }
    }
    let free = who_gets_it([None, None]);
    assert_eq!(free, "mine", "nothing was taken: your round may decide");
}

/// The replicas in a set.
fn names(set: u32) -> String {
    let all = [(1, "erin"), (2, "alice"), (4, "bob")].into_iter();
    let names = all.filter_map(|(bit, name)| (set & bit > 0).then_some(name));
    names.collect::<Vec<_>>().join(", ")
}

#[cfg(feature = "solutions")]
#[path = "solutions/4_compare_and_set.rs"]
mod solution;
#[cfg(feature = "solutions")]
use solution::{has_the_cup, schedule, who_gets_it};

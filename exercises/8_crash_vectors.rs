//! # Exercise 8: crash vectors (an hour, with the paper)
//!
//! The two windows of exercise 7 need seconds that are seconds everywhere. There is a way
//! without clocks: Michael, Ports, Sharma and Szekeres, "Recovering Shared Objects Without Stable
//! Storage" (DISC 2017). Every replica counts how often each of the three has restarted, as far
//! as it knows; it learns of a restart when a joining replica reads from it, and every answer
//! carries its counts. Which answers make a majority?
//!
//! Hint: go through the answer to exercise 7 again. What does alice know when it answers that
//! erin did not know when it answered? Whose word is worth nothing then? And what has the paper
//! to say of a count that is forgotten in a restart as well?

/// What a replica says of itself with its answer.
#[derive(Clone, Copy, Debug)]
struct Answer {
    /// Who answers: 0, 1 or 2.
    replica: usize,
    /// How often each of the three has restarted, as far as this one knows.
    restarts: [u64; 3],
}

/// Yours: whether two different replicas have answered with a memory that they still have, as
/// far as anybody knows who answered.
#[cfg(not(feature = "solutions"))]
fn is_majority(answers: &[Answer]) -> bool {
    let agree = |one: &Answer, other: &Answer| {
        one.replica != other.replica && one.restarts == other.restarts
    };
    answers
        .iter()
        .any(|one| answers.iter().any(|other| agree(one, other)))
}

#[test]
#[cfg_attr(not(feature = "solutions"), ignore = "exercise 8: crash vectors")]
fn exercise_8() {
    let [erin, alice, bob] = [0, 1, 2].map(|replica| move |restarts| Answer { replica, restarts });
    let majorities = [
        vec![erin([0, 0, 0]), alice([0, 0, 0])],
        vec![erin([1, 0, 0]), alice([0, 0, 0])],
        vec![erin([0, 3, 0]), alice([0, 3, 0]), bob([0, 2, 0])],
        vec![erin([0, 0, 0]), alice([1, 0, 0]), bob([1, 0, 0])],
        vec![erin([0, 0, 0]), erin([1, 0, 0]), bob([0, 0, 0])],
    ];
    for answers in majorities {
        assert!(is_majority(&answers), "a majority: {answers:?}");
    }
    let others = [
        vec![],
        vec![bob([0, 0, 0])],
        vec![bob([0, 0, 0]), bob([0, 0, 0])],
        // Exercise 7: erin's memory is gone, and alice knows.
        vec![erin([0, 0, 0]), alice([1, 0, 0])],
        vec![alice([1, 0, 0]), erin([0, 0, 0])],
        vec![erin([0, 0, 0]), erin([1, 0, 0])],
        vec![erin([0, 0, 1]), alice([1, 0, 0]), bob([0, 0, 0])],
    ];
    for answers in others {
        assert!(!is_majority(&answers), "no majority: {answers:?}");
    }
}

#[cfg(feature = "solutions")]
#[path = "solutions/8_crash_vectors.rs"]
mod solution;
#[cfg(feature = "solutions")]
use solution::is_majority;

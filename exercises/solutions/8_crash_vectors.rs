//! An answer is worth something while no other answer knows of a later restart of its replica.
//! A restarted replica has forgotten its own count too, and must learn it from a majority; a
//! late message of its former life must not set it back. The paper is about that.

use std::collections::BTreeSet;

use super::Answer;

pub fn is_majority(answers: &[Answer]) -> bool {
    let known = |replica: usize| answers.iter().map(|answer| answer.restarts[replica]).max();
    let stands = |answer: &&Answer| Some(answer.restarts[answer.replica]) == known(answer.replica);
    let standing = answers.iter().filter(stands).map(|answer| answer.replica);
    standing.collect::<BTreeSet<_>>().len() >= 2
}

//! A proof that finds nothing is only worth something if it would find a bug. Here are bugs,
//! planted one at a time, and how many seeds of the simulation it takes to catch each.
//!
//! `cargo test --features sabotage --test sabotage -- --nocapture`
#![allow(
    unreachable_pub,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing
)]

#[path = "common/history.rs"]
mod history;
#[path = "common/world.rs"]
mod world;

use kv54::sabotage::Bug;
use strum::VariantArray as _;

/// The seed to begin with: one bug shows itself about once in three thousand.
fn first(bug: Bug) -> u64 {
    match bug {
        Bug::SetAnsweredAfterChange => 2500,
        _ => 0,
    }
}

/// The seeds within which each bug must be caught.
fn limit(bug: Bug) -> u64 {
    match bug {
        Bug::NoWaitBeforeJoining
        | Bug::AnswersCountedAcrossWindows
        | Bug::ReadyAfterOneNeighbour
        | Bug::HandOverBeforeAllKnow
        | Bug::NewStampAfterChange
        | Bug::SetAnsweredAfterChange
        | Bug::StartingNodeTakesNewRingAsRead => 3000, // it takes two accidents at the right moment
        _ => 200,
    }
}

#[test]
fn every_planted_bug_is_caught() {
    if std::env::var("KV54_SABOTAGE").is_ok_and(|bug| bug.parse() == Ok(Bug::OldStampForNewRing)) {
        world::late_set().unwrap(); // no run of a seed is so late by chance
    }
    if let Some(seed) = world::number("KV54_SEED") {
        return world::print(seed);
    }
    println!("{:<30} caught by seed, at most", "planted bug");
    for bugs in Bug::VARIANTS.chunks(2) {
        std::thread::scope(|scope| {
            for bug in bugs {
                scope.spawn(move || {
                    let caught = (first(*bug)..limit(*bug)).find(|seed| is_caught(*bug, *seed));
                    let caught = caught.unwrap_or_else(|| {
                        panic!("{bug:?} was not caught within {} seeds", limit(*bug))
                    });
                    println!(
                        "{:<30} {caught:>14}, {:>7}",
                        format!("{bug:?}"),
                        limit(*bug)
                    );
                });
            }
        });
    }
}

/// Whether this seed shows an answer that no register could have given, or one that a full memory
/// must not give.
fn is_caught(bug: Bug, seed: u64) -> bool {
    let run = world::alone("every_planted_bug_is_caught", seed, &format!("{bug:?}"));
    let wrong = [
        "is not linearizable",
        "was replaced twice",
        "and was not swapped",
        "failed for memory",
        "handed over before",
        "ended before",
        "answered before",
        "as read",
        "tea was deleted",
        "a stamp of an epoch before",
    ];
    run.is_err_and(|why| wrong.iter().any(|wrong| why.contains(wrong)))
}

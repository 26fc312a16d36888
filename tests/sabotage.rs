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

#[path = "common/disks.rs"]
mod disks;
#[path = "common/history.rs"]
mod history;
#[path = "common/ram.rs"]
mod ram;
#[path = "common/stories.rs"]
mod stories;
#[path = "common/world.rs"]
mod world;

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use kv54::sabotage::Bug;
use strum::VariantArray as _;

/// The story that shows this bug, where no run of a seed meets it by chance.
fn story(bug: Bug) -> Option<fn() -> Result<(), String>> {
    Some(match bug {
        Bug::OldStampForNewRing => stories::deleted_before_a_change,
        Bug::NewTombstoneStaysBehind => stories::deleted_during_a_change,
        Bug::AnswersCountedAcrossWindows => stories::counted_before_a_restart,
        Bug::JoiningAnswersLoad => stories::answered_while_joining,
        Bug::NoWaitBeforeJoining => stories::set_before_a_restart,
        Bug::ReadyAfterOneNeighbour => stories::read_from_one_neighbour,
        Bug::SetAnsweredAfterChange => stories::answered_after_a_change,
        Bug::HiddenSetAnswered => stories::hidden_by_a_swap,
        Bug::JoiningNodePromises | Bug::PromisesNotCopied => stories::promised_before_a_restart,
        Bug::JoinerCopiesBallots => stories::copied_after_a_restart,
        Bug::RepairIgnoresPromises => stories::copied_by_repair,
        Bug::LastOwnBallotAlone => stories::found_again,
        Bug::NoWithoutAccept => stories::not_after_all,
        Bug::SwapBuildsOnOldEpoch => stories::nothing_to_build_on,
        Bug::FormerLifeFollowed => stories::before_all_memories_were_lost,
        Bug::ClientKeepsFormerRing => stories::all_memories_lost,
        Bug::LoadNotGated => stories::read_before_a_power_cut,
        Bug::StoreNotGated => stories::set_before_a_power_cut,
        Bug::NoReadyMark => disks::half_joined,
        Bug::NoSyncAtOpen => disks::read_from_memory_alone,
        Bug::FailedSyncIgnored => disks::a_sync_that_fails,
        Bug::OldWriteIgnoresPromises => stories::read_before_a_swap,
        Bug::UnknownTaskTakenForDone | Bug::UnknownTaskTakenForRefused => stories::tasks_in_doubt,
        _ => return None,
    })
}

/// The seeds within which each bug must be caught.
fn limit(bug: Bug) -> u64 {
    match bug {
        Bug::HandOverBeforeAllKnow
        | Bug::NewStampAfterChange
        | Bug::StartingNodeTakesNewRingAsRead => 3000, // it takes two accidents at the right moment
        _ => 200,
    }
}

#[test]
fn every_planted_bug_is_caught() {
    let planted = std::env::var("KV54_SABOTAGE").ok();
    let planted = planted.map(|bug| bug.parse::<Bug>().unwrap());
    if let Some(story) = planted.and_then(story) {
        return story().unwrap();
    }
    if let Some(seed) = world::number("KV54_SEED") {
        return world::print(seed, planted == Some(Bug::FolderNotSynced));
    }
    println!("{:<30} caught by seed, at most", "planted bug");
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                while let Some(bug) = Bug::VARIANTS.get(next.fetch_add(1, Relaxed)) {
                    must_be_caught(*bug);
                }
            });
        }
    });
}

fn must_be_caught(bug: Bug) {
    let name = format!("{bug:?}");
    if story(bug).is_some() {
        assert!(is_caught(bug, 0), "no story shows {name}");
        return println!("{name:<30} {:>14}", "by a story");
    }
    let limit = limit(bug);
    let caught = (0..limit).find(|seed| is_caught(bug, *seed));
    let caught = caught.unwrap_or_else(|| panic!("{name} was not caught within {limit} seeds"));
    println!("{name:<30} {caught:>14}, {limit:>7}");
}

/// Whether this seed, or the bug's story, shows an answer that no register could have given, or one that
/// a full memory must not give.
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
        "tea is ",
        "tasks are taken",
        "a stamp of an epoch before",
    ];
    run.is_err_and(|why| wrong.iter().any(|wrong| why.contains(wrong)))
}

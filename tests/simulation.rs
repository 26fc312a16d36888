//! The promise, over a simulated network: real clients, real nodes and the real codec, while
//! nodes crash and forget, links break one way or both, and some are slow. Everything that
//! happens follows from one number, so that what went wrong once goes wrong again.
//!
//! `cargo test --test simulation` runs some hundred seeds, `KV54_SEEDS=3000` that many and a fifth
//! as many with disks, and `KV54_SEED=17` the one.
#![allow(
    unreachable_pub,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing
)]

#[path = "common/history.rs"]
mod history;
#[path = "common/ram.rs"]
mod ram;
#[path = "common/stories.rs"]
mod stories;
#[path = "common/world.rs"]
mod world;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

#[test]
fn every_answer_is_one_that_a_single_register_could_have_given() {
    if let Some(seed) = world::number("KV54_SEED") {
        return world::print(seed, false);
    }
    let test = "every_answer_is_one_that_a_single_register_could_have_given";
    let (seeds, sum) = run_all(test, 1);
    assert!(seeds < 100 || sum("rounds") > 0 && sum("changes") > 0);
}

/// Nodes have disks, and all lose their power at once, again and again.
#[test]
fn so_is_it_where_all_power_is_lost() {
    if let Some(seed) = world::number("KV54_SEED") {
        return world::print(seed, true);
    }
    let (seeds, sum) = run_all("so_is_it_where_all_power_is_lost", 5);
    assert!(sum("blackouts") > seeds, "too few blackouts");
}

/// Runs one in so many of the seeds that are asked for; how many they were, and the sum of what they counted.
fn run_all(test: &str, one_in: u64) -> (u64, impl Fn(&str) -> u64) {
    let asked = world::number("KV54_SEEDS").unwrap_or(300);
    let seeds = asked.div_ceil(one_in);
    let start = Instant::now();
    let (next, runs) = (AtomicU64::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Relaxed);
                    if seed >= seeds {
                        break;
                    }
                    let run = world::alone(test, seed, "");
                    let run = run.unwrap_or_else(|why| panic!("seed {seed}: {why}"));
                    runs.lock().unwrap().push(run);
                }
            });
        }
    });
    let runs = runs.into_inner().unwrap();
    let sum = move |field: &str| runs.iter().map(|run| world::field(run, field)).sum::<u64>();
    println!(
        "{seeds} seeds in {:.0?}: {} operations done, {} refused, {} unknown; {} swaps done, {} unknown, {} outrun; {} values ended; {} for memory, {} changes of the ring, {} rounds of forgetting, {} crashes, {} blackouts, {} cuts, {} slow links, {} dead clients; \
         {} forgetful runs, {} of them with wrong answers that a node had warned of",
        start.elapsed(),
        sum("done"),
        sum("refused"),
        sum("unknown"),
        sum("swapped"),
        sum("unknown swaps"),
        sum("outrun"),
        sum("ended"),
        sum("full"),
        sum("changes"),
        sum("rounds"),
        sum("crashes"),
        sum("blackouts"),
        sum("cuts"),
        sum("slow"),
        sum("dead"),
        sum("forgetful"),
        sum("wrong"),
    );
    (seeds, sum)
}

/// Whether a register could have done this.
fn one_after_the_other(is_right: bool, case: &[(history::Operation, history::End)]) {
    let history = history::History::default();
    for (operation, end) in case {
        let began = history.begin("tea", *operation);
        history.end(began, *end);
    }
    let checked = history.check();
    assert_eq!(checked.is_ok(), is_right, "{case:?}: {checked:?}");
}

#[test]
fn a_value_ends_once_and_no_other_one_with_it() {
    use history::{End::*, Operation::*};
    let (set, read) = (|value| (Set(Some(value)), Done), |value| (Get, Got(value)));
    let ends = |value| (Expiry(value), Unknown);
    let [one, two] = [1, 2].map(Some);
    let (renews, swaps) = (
        |end| (Renew, end),
        |end| {
            (
                Cas {
                    expected: one,
                    new: two,
                },
                end,
            )
        },
    );
    for (is_right, case) in [
        (true, vec![set(1), ends(1), read(one), read(None)]),
        (true, vec![set(1), ends(1), renews(Got(one)), read(one)]),
        (
            true,
            vec![set(1), ends(1), renews(Got(None)), set(2), read(two)],
        ),
        (false, vec![set(1), read(None)]), // before any clock says so
        (false, vec![set(1), read(None), ends(1)]),
        (false, vec![set(1), ends(1), read(None), read(one)]), // it is back
        (false, vec![set(1), ends(1), renews(Got(None)), read(one)]),
        (false, vec![set(1), ends(1), set(2), read(None)]), // a renewal is gone
        (false, vec![set(1), ends(1), swaps(Done), read(None)]),
        // What nobody has seen has hidden the one before it, and ended.
        (
            true,
            vec![set(1), (Set(two), Unknown), ends(2), read(one), read(None)],
        ),
        (
            true,
            vec![set(1), read(one), swaps(Unknown), ends(2), read(None)],
        ),
        (
            false,
            vec![set(1), (Set(two), Refused), ends(2), read(None)],
        ),
        (
            false,
            vec![
                set(1),
                read(one),
                set(3),
                swaps(Unknown),
                ends(2),
                read(None),
            ],
        ),
    ] {
        one_after_the_other(is_right, &case);
    }
}

#[test]
#[allow(clippy::too_many_lines)] // one small history after the other
fn a_swap_counts_once() {
    use history::{End::*, History, Operation::*};
    let cas = |expected, new| Cas { expected, new };
    let (set, read) = (|value| (Set(Some(value)), Done), |value| (Get, Got(value)));
    let [one, two, three] = [1, 2, 3].map(Some);
    // One after the other: whether a register could have done it.
    let cases = [
        (
            true,
            vec![(cas(None, one), Done), (cas(one, two), Done), read(two)],
        ),
        (
            false,
            vec![set(1), (cas(one, two), Done), (cas(one, three), Done)],
        ),
        (false, vec![set(1), (cas(two, three), Done)]),
        (true, vec![set(1), (cas(two, three), Got(one)), read(one)]),
        (false, vec![set(1), (cas(one, two), Got(one))]), // it was what was expected
        (false, vec![set(1), (cas(one, two), Refused), read(two)]),
        (
            true,
            vec![
                set(1),
                (cas(one, two), Unknown),
                read(one),
                read(two),
                set(3),
            ],
        ),
        (
            false,
            vec![
                set(1),
                (cas(one, two), Unknown),
                read(two),
                set(3),
                read(two),
            ],
        ), // twice
        (
            false,
            vec![set(1), set(3), (cas(one, two), Unknown), read(two)],
        ),
        (
            true,
            vec![(Set(one), Unknown), (cas(one, two), Unknown), read(two)],
        ),
        (
            false,
            vec![
                (Set(one), Unknown),
                (cas(one, two), Unknown),
                read(two),
                read(one),
            ],
        ),
        (
            true,
            vec![
                set(1),
                (cas(one, None), Unknown),
                read(one),
                read(None),
                set(2),
            ],
        ),
        (false, vec![set(1), (cas(two, None), Unknown), read(None)]),
        (
            false,
            vec![set(1), (Set(None), Unknown), read(None), set(2), read(None)],
        ),
        (
            true,
            vec![
                set(1),
                (Set(None), Unknown),
                set(2),
                read(None),
                set(3),
                read(three),
            ],
        ),
    ];
    for (is_right, case) in cases {
        one_after_the_other(is_right, &case);
    }
    // A replace over 1 makes 2, and in another attempt 3 over 1, or 4 over 2.
    for (is_right, end, later) in [
        (true, Replaced(two), two),
        (true, Replaced(three), three),
        (false, Replaced(two), three),
        (false, Replaced(Some(4)), Some(4)), // 2 was its own
        (false, Replaced(Some(5)), Some(5)),
        (true, Unknown, one),
        (true, Unknown, two),
        (true, Unknown, three),
        (false, Refused, two),
    ] {
        let history = History::default();
        let began = history.begin("tea", Set(one));
        history.end(began, Done);
        let began = history.begin("tea", Replace);
        for (old, new) in [(one, 2), (one, 3), (two, 4)] {
            history.made(began, old, new);
        }
        history.end(began, end);
        for read in [later, later] {
            let began = history.begin("tea", Get);
            history.end(began, Got(read));
        }
        assert_eq!(
            history.check().is_ok(),
            is_right,
            "{end:?} {later:?}: {:?}",
            history.check()
        );
    }
}

#[test]
fn a_set_that_meets_a_change_brings_no_deleted_value_back() {
    stories::deleted_before_a_change().unwrap();
}

#[test]
fn what_a_node_said_before_it_restarts_does_not_count() {
    stories::counted_before_a_restart().unwrap();
}

#[test]
fn what_a_joining_node_says_does_not_count() {
    stories::answered_while_joining().unwrap();
}

#[test]
fn what_is_on_its_way_when_a_node_restarts_is_waited_for() {
    stories::set_before_a_restart().unwrap();
}

#[test]
fn one_neighbour_is_not_enough_to_join() {
    stories::read_from_one_neighbour().unwrap();
}

#[test]
fn a_set_that_the_old_ring_alone_has_is_not_answered() {
    stories::answered_after_a_change().unwrap();
}

#[test]
fn a_set_that_a_swap_has_hidden_is_not_answered() {
    stories::hidden_by_a_swap().unwrap();
}

#[test]
fn a_node_that_restarts_keeps_its_promises() {
    stories::promised_before_a_restart().unwrap();
}

#[test]
fn a_get_ends_what_a_dead_swap_has_begun() {
    stories::ended_by_a_get().unwrap();
}

#[test]
fn what_a_joining_node_copies_is_no_vote() {
    stories::copied_after_a_restart().unwrap();
}

#[test]
fn what_a_repair_copies_is_no_vote() {
    stories::copied_by_repair().unwrap();
}

#[test]
fn a_swap_finds_the_first_of_what_it_has_sent() {
    stories::found_again().unwrap();
}

#[test]
fn a_swap_that_answers_no_is_not_done_after_all() {
    stories::not_after_all().unwrap();
}

#[test]
fn a_swap_hides_what_was_deleted_before_a_change() {
    stories::nothing_to_build_on().unwrap();
}

#[test]
fn a_delete_that_began_during_a_change_hides_nothing_that_comes_later() {
    stories::deleted_during_a_change().unwrap();
}

#[test]
fn what_was_read_during_a_change_is_what_a_swap_finds() {
    stories::read_before_a_swap().unwrap();
}

#[test]
fn a_task_in_doubt_is_there_once() {
    stories::tasks_in_doubt().unwrap();
}

#[test]
fn a_client_outlives_the_memory_of_all_nodes() {
    stories::all_memories_lost().unwrap();
    stories::before_all_memories_were_lost().unwrap();
}

#[test]
fn what_was_answered_outlives_the_power() {
    stories::set_before_a_power_cut().unwrap();
}

#[test]
fn what_was_read_outlives_the_power() {
    stories::read_before_a_power_cut().unwrap();
}

#[test]
fn a_guest_does_not_wait_for_a_disk_that_stalls() {
    stories::stalled().unwrap();
}

#[test]
fn a_seed_replays_exactly() {
    for seed in [1, 2, 3, 5, 8] {
        for test in [
            "every_answer_is_one_that_a_single_register_could_have_given",
            "so_is_it_where_all_power_is_lost",
        ] {
            let run = || world::alone(test, seed, "").unwrap();
            assert_eq!(run(), run(), "seed {seed}");
        }
    }
}

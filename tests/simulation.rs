//! The promise, over a simulated network: real clients, real nodes and the real codec, while
//! nodes crash and forget, links break one way or both, and some are slow. Everything that
//! happens follows from one number, so that what went wrong once goes wrong again.
//!
//! `cargo test --test simulation` runs some hundred seeds, `KV54_SEEDS=3000` that many, and
//! `KV54_SEED=17` the one.
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

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

#[test]
fn every_answer_is_one_that_a_single_register_could_have_given() {
    if let Some(seed) = world::number("KV54_SEED") {
        return world::print(seed);
    }
    let (seeds, start) = (world::number("KV54_SEEDS").unwrap_or(300), Instant::now());
    let (next, runs) = (AtomicU64::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Relaxed);
                    if seed >= seeds {
                        break;
                    }
                    let run = alone(seed).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
                    runs.lock().unwrap().push(run);
                }
            });
        }
    });
    let runs = runs.into_inner().unwrap();
    let sum = |field: &str| runs.iter().map(|run| world::field(run, field)).sum::<u64>();
    println!(
        "{seeds} seeds in {:.0?}: {} operations done, {} refused, {} unknown; {} for memory, {} changes of the ring, {} crashes, {} cuts, {} slow links, {} dead clients; \
         {} forgetful runs, {} of them with wrong answers that a node had warned of",
        start.elapsed(),
        sum("done"),
        sum("refused"),
        sum("unknown"),
        sum("full"),
        sum("changes"),
        sum("crashes"),
        sum("cuts"),
        sum("slow"),
        sum("dead"),
        sum("forgetful"),
        sum("wrong"),
    );
}

#[test]
fn a_set_that_meets_a_change_brings_no_deleted_value_back() {
    world::late_set().unwrap();
}

#[test]
fn a_seed_replays_exactly() {
    for seed in [1, 2, 3, 5, 8] {
        assert_eq!(alone(seed).unwrap(), alone(seed).unwrap(), "seed {seed}");
    }
}

fn alone(seed: u64) -> Result<String, String> {
    world::alone(
        "every_answer_is_one_that_a_single_register_could_have_given",
        seed,
        "",
    )
}

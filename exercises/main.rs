//! Exercises, from easy to hard. Each file asks a question, has a place for your answer, which
//! is a wrong one until you change it, and a test that waits for you:
//!
//! `cargo exercise 1`, and `cargo exercise ten` (1 would find a test with 10 in its name as well)
//!
//! In 3, 4, 5, 7, 9 and 10 you are the network: [`tea`] has three replicas, [`rings`] two rings,
//! and nothing arrives before you say so. Every exercise has an answer in `solutions/`, which the
//! project's own checks turn on with `--features solutions`. Look there last.
#![allow(
    unreachable_pub,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod rings;
mod tea;

#[path = "1_the_sixth_node.rs"]
mod the_sixth_node;

#[path = "2_how_many.rs"]
mod how_many;

#[path = "3_new_then_old.rs"]
mod new_then_old;

#[path = "4_compare_and_set.rs"]
mod compare_and_set;

#[path = "5_the_deleted_return.rs"]
mod the_deleted_return;

#[path = "6_time_to_live.rs"]
mod time_to_live;

#[path = "7_two_windows.rs"]
mod two_windows;

#[path = "8_crash_vectors.rs"]
mod crash_vectors;

#[path = "9_two_rings.rs"]
mod two_rings;

#[path = "10_two_proposers.rs"]
mod two_proposers;

#[path = "11_points_on_a_circle.rs"]
mod points_on_a_circle;

#[path = "12_a_dead_holder.rs"]
mod a_dead_holder;

#[path = "13_a_task_in_hand.rs"]
mod a_task_in_hand;

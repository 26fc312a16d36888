//! The log on disk.

pub mod segment;

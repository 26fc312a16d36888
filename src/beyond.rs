//! What the essay did not have. Each file is a capability of its own, which the rest does not know.

pub mod expire;
pub mod forget;
pub mod large;
pub mod log;
pub mod memcached;
pub mod programs;
pub mod queue;
pub mod rings;
pub mod swap;

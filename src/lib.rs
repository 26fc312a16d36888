//! kv54: a distributed key-value store in 54 lines, and what stands beside them.
//!
//! | file | what lives there |
//! | --- | --- |
//! | [`cluster`] | `cluster.toml` → sorted names → `crc32 % N`, next, next |
//! | [`store`] | the newest entry of each key, in memory |
//! | [`rpc`] | MessagePack-RPC: codec, server loop, connections |
//! | [`error`] | what can go wrong, as the wire says it |
//!

pub mod cluster;
pub mod error;
pub mod rpc;
pub mod store;

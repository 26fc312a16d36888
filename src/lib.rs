//! kv54: a distributed key-value store whose heart is at most 54 lines, and what stands beside it.
//!
//! | file | what lives there |
//! | --- | --- |
//! | `main.rs` | the door: reads the arguments, runs a server or a client |
//! | [`server`] | **a node**: what it answers to each method |
//! | [`client`] | **any two of three**: get, set, delete |
//! | [`node`] | a node's life: it is put together, binds, joins, serves, stops |
//! | [`cluster`] | the ring: sorted names → `crc32 % N`, next, next; the file `cluster.toml`; the steps of a change |
//! | [`entry`] | stamp and value, and their one wire form |
//! | [`store`] | the newest entry of each key, in memory |
//! | [`status`] | what a node says of itself |
//! | [`join`] | catching up after a restart or a cut |
//! | [`doubt`] | what a node cannot vouch for, when two memories were lost at once |
//! | [`replicas`] | asking a key's replicas: whom first, how many, for how long |
//! | [`rpc`] | MessagePack-RPC: codec, connections; a loop that serves any [protocol](rpc::Protocol); [TLS](rpc::tls) is one kind of connection |
//! | [`methods`] | what a node can be asked, in one table |
//! | [`error`] | what can go wrong, as the wire says it |
//! | [`sabotage`] | bugs that the proof must find, compiled in for its test only |
//! | [`beyond`] | what the essay did not have: [a ring that changes](beyond::rings), [compare and set](beyond::swap), [values that end](beyond::expire), [memcached's protocol](beyond::memcached), [a log on disk](beyond::log), [large ones](beyond::large), [queues](beyond::queue), [programs](beyond::programs) |
//! | [`commands`] | what a person types |
//!
//! Start with [`server`] and [`client`]: they are the heart, the 54 lines.
//!
//! A program that has `cluster.toml` can be a client itself, without any node in between:
//!
//! ```no_run
//! # use std::{path::Path, sync::Arc, time::Duration};
//! use kv54::{client::Client, cluster::Cluster, entry::Packed, replicas::Replicas, rpc::tcp};
//!
//! # async fn story() -> Result<(), Box<dyn std::error::Error>> {
//! let cluster = Arc::new(Cluster::read(Path::new("cluster.toml"))?);
//! let replicas = Replicas::new(cluster, Duration::from_secs(5), &tcp());
//! let client = Client { replicas };
//! client.set(b"tea", &Packed::of("green")).await?;
//! assert_eq!(client.get(b"tea").await?, Packed::of("green"));
//! # Ok(())
//! # }
//! ```

pub mod beyond;
pub mod client;
pub mod cluster;
pub mod commands;
pub mod doubt;
pub mod entry;
pub mod error;
pub mod join;
pub mod methods;
pub mod node;
pub mod replicas;
pub mod rpc;
pub mod sabotage;
pub mod server;
pub mod status;
pub mod store;

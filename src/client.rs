//! Any two of three: what a majority has answered, every later majority knows,
//! since any two of them share a replica. Each key is a register in the way of
//! Attiya, Bar-Noy and Dolev ("Sharing memory robustly in message-passing
//! systems", 1995), with many writers as in Lynch and Shvartsman (1997).
//!
//! Every program that has `cluster.toml` can do this: a command, and every node for its guests.

use crate::entry::Packed;
use crate::{error::Error, replicas::Replicas, rpc::codec::NIL};

/// A coordinator: it asks a key's replicas and believes what two of three say.
pub struct Client {
    /// The nodes of the ring, and how to ask them.
    pub replicas: Replicas,
}

impl Client {
    /// The newest value of the key; nil where there is none.
    pub async fn get(&self, key: &[u8]) -> Result<Packed, Error> {
        let replicas = self.replicas.of(key)?;
        let mut newest = replicas.load().await?;
        if !newest.agreed {
            // Before answering: else a later get could miss what this one saw.
            newest = replicas.repair(newest).await?;
        }
        Ok(newest.entry.value.plain())
    }

    /// Writes the value, which is MessagePack: text must be packed first ([`Packed::of`]). An error
    /// says whether it was not written, or (`unknown-outcome:`) may have been.
    pub async fn set(&self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        let replicas = self.replicas.of(key)?;
        let stamp = replicas.load_stamp(value).await?;
        replicas.store(stamp.newer(value)).await
    }

    /// Writes nil, which is an absent key, unless a majority agrees that it is one.
    pub async fn delete(&self, key: &[u8]) -> Result<(), Error> {
        let replicas = self.replicas.of(key)?;
        match replicas.load().await? {
            gone if gone.agreed && gone.entry.value.is_nil() => Ok(()),
            old => replicas.store(old.entry.stamp.newer(NIL)).await,
        }
    }
}

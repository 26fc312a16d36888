//! A node: what it answers to each method. It is a replica of its own parts (`load`,
//! `store`, `scan`), and a client of the whole ring for guests that know one address.

use crate::entry::{entry, key, stamp, value};
use crate::rpc::{Answer, Service};
use crate::{client::Client, error::Error, store::Store};
use std::sync::Arc;

/// One node of the ring.
pub struct Node {
    /// What it keeps.
    pub store: Arc<Store>,
    /// How it asks a majority of replicas, itself first.
    pub client: Arc<Client>,
}

impl Service for Node {
    async fn answer(&self, method: &str, params: &[&[u8]]) -> Result<Answer, Error> {
        Ok(match (method, params) {
            ("get", [k]) => self.client.get(key(k)?).await?.into(),
            ("set", [k, v]) => self.client.set(key(k)?, value(v)?).await?.into(),
            ("delete", [k]) => self.client.delete(key(k)?).await?.into(),
            ("set" | "cas" | "incr" | "swap" | "promise", _) => self.swap(method, params).await?,
            ("load", [ring, k, known @ ..]) => {
                self.store.on(ring)?.load(key(k)?, stamp(known)?)?.into()
            }
            ("store", [ring, k, e]) => self.store.on(ring)?.store(key(k)?, entry(e)?)?.into(),
            ("scan", [ring, part, page @ ..]) => self.store.on(ring)?.scan(part, page)?,
            ("status", []) => self.store.status().into(),
            ("ring", told) => self.store.ring(told)?,
            ("acknowledge", []) => self.store.acknowledge(),
            _ => return Err(Error::not_a_request(method, params.len())),
        })
    }
}

//! A node: what it answers to each method. It is a replica of its own parts (`load`,
//! `store`, `scan`), and a client of the whole ring for guests that know one address.

use crate::store::{Store, key, stamp};
use crate::{client::Client, error::Error, rpc::Service, rpc::ValueRef};
use msgpack_rpc::Value;
use std::sync::Arc;

/// One node of the ring.
pub struct Node {
    /// What it keeps.
    pub store: Arc<Store>,
    /// How it asks a majority of replicas, itself first.
    pub client: Client,
}

impl Service for Node {
    async fn answer(&self, method: &str, params: &[ValueRef<'_>]) -> Result<Value, Error> {
        match (method, params) {
            ("get", [k]) => self.client.get(key(k)?).await,
            ("set", [k, value]) => self.client.set(key(k)?, value).await,
            ("delete", [k]) => self.client.delete(key(k)?).await,
            ("load", [ring, k, known @ ..]) => {
                Ok(self.store.on(ring)?.load(key(k)?, stamp(known)?)?.into())
            }
            ("store", [ring, k, entry]) => self.store.on(ring)?.store(key(k)?, entry.try_into()?),
            ("scan", [ring, part, cursor]) => self.store.on(ring)?.scan(part, cursor),
            ("status", []) => Ok(self.store.status().into()),
            _ => Err(Error::not_a_request(method, params.len())),
        }
    }
}

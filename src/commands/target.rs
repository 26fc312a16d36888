//! What a command asks: a majority of a key's replicas, or the node that was named.

use crate::beyond::swap::{Swap, Swapped};
use crate::client::Client;
use crate::entry::Packed;
use crate::error::Error;
use crate::rpc::Peer;
use crate::rpc::codec::encode_bytes;

pub(super) enum Target {
    Majority(Client),
    Node(String, Peer),
}

impl Target {
    pub(super) async fn get(&self, key: &[u8]) -> Result<Packed, Error> {
        match self {
            Target::Majority(client) => client.get(key).await,
            Target::Node(name, peer) => call(name, peer, "get", &[&encode_bytes(key)]).await,
        }
    }

    /// Sets a key, or deletes it if there is no value.
    pub(super) async fn write(&self, key: &[u8], value: Option<&[u8]>) -> Result<(), Error> {
        match (self, value) {
            (Target::Majority(client), Some(value)) => client.set(key, value).await,
            (Target::Majority(client), None) => client.delete(key).await,
            (Target::Node(name, peer), _) => {
                let method = if value.is_some() { "set" } else { "delete" };
                let key = encode_bytes(key);
                let params: Vec<&[u8]> = Some(&*key).into_iter().chain(value).collect();
                call(name, peer, method, &params).await.map(drop)
            }
        }
    }

    pub(super) async fn swap(&self, key: &[u8], swap: &Swap) -> Result<Swapped, Error> {
        match self {
            Target::Majority(client) => client.swap_anywhere(key, swap, None).await,
            Target::Node(name, peer) => {
                let (method, params) = swap.request(key);
                let params: Vec<&[u8]> = params.iter().map(|param| &**param).collect();
                swap.read(&call(name, peer, method, &params).await?)
            }
        }
    }

    /// Waits until all that was sent has arrived, for a moment at most.
    pub(super) async fn settle(&self) {
        if let Target::Majority(client) = self {
            client.replicas.settle().await;
        }
    }
}

/// Asks one node. Its errors begin with its name.
async fn call(name: &str, peer: &Peer, method: &str, params: &[&[u8]]) -> Result<Packed, Error> {
    let answer = peer.ask(method, params).await;
    let named = |error: Error| Error::new(error.kind, format!("{name}: {}", error.why));
    Ok(Packed::from(&*answer.map_err(named)?))
}

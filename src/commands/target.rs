//! What a command asks: a majority of a key's replicas, or the node that was named.

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

    pub(super) async fn set(&self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        match self {
            Target::Majority(client) => client.set(key, value).await,
            Target::Node(name, peer) => {
                let params: [&[u8]; 2] = [&encode_bytes(key), value];
                call(name, peer, "set", &params).await.map(drop)
            }
        }
    }

    pub(super) async fn delete(&self, key: &[u8]) -> Result<(), Error> {
        match self {
            Target::Majority(client) => client.delete(key).await,
            Target::Node(name, peer) => {
                let deleted = call(name, peer, "delete", &[&encode_bytes(key)]).await;
                deleted.map(drop)
            }
        }
    }
}

/// Asks one node. Its errors begin with its name.
async fn call(name: &str, peer: &Peer, method: &str, params: &[&[u8]]) -> Result<Packed, Error> {
    let (_, answer) = peer.call(method, params).await;
    let named = |error: Error| Error::new(error.kind, format!("{name}: {}", error.why));
    Ok(Packed::from(&*answer.map_err(named)?))
}

//! What a command asks: a majority of a key's replicas, or the node that was named.

use std::time::Duration;

use crate::beyond::swap::{Swap, Swapped};
use crate::client::Client;
use crate::entry::Packed;
use crate::error::Error;
use crate::replicas::now;
use crate::rpc::Peer;
use crate::rpc::codec::{Encoded, encode_bytes, encode_numbers};

pub(super) enum Target {
    Majority(Client),
    Node(String, Peer),
}

impl Target {
    /// A value, and how long it lasts still, if it ends. A node does not say that.
    pub(super) async fn get(&self, key: &[u8]) -> Result<(Packed, Option<Duration>), Error> {
        match self {
            Target::Majority(client) => client.get_with_ttl(key).await,
            Target::Node(name, peer) => {
                let value = call(name, peer, "get", [&*encode_bytes(key)]).await?;
                Ok((value, None))
            }
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
                call(name, peer, method, [&*key].into_iter().chain(value))
                    .await
                    .map(drop)
            }
        }
    }

    pub(super) async fn swap(&self, key: &[u8], swap: &Swap) -> Result<Swapped, Error> {
        match self {
            Target::Majority(client) => client.swap_anywhere(key, swap, None).await,
            Target::Node(name, peer) => {
                let (method, params) = swap.request(key);
                let params = params.iter().map(|param| &**param);
                swap.read(&call(name, peer, method, params).await?)
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
async fn call<'p>(
    name: &str,
    peer: &Peer,
    method: &str,
    params: impl IntoIterator<Item = &'p [u8]>,
) -> Result<Packed, Error> {
    let params: Vec<Encoded> = params.into_iter().flat_map(of_a_guest).collect();
    let params: Vec<&[u8]> = params.iter().map(|param| &**param).collect();
    let answer = peer.ask(method, &params).await;
    let named = |error: Error| Error::new(error.kind, format!("{name}: {}", error.why));
    Ok(Packed::from(&*answer.map_err(named)?))
}

/// A value as guests send it: behind one that ends, how long it lasts still.
fn of_a_guest(value: &[u8]) -> impl Iterator<Item = Encoded> + use<> {
    let value = Packed::from(value);
    let left = |end: u64| encode_numbers([end.saturating_sub(now()).max(1)]);
    let left = value.end().map(left);
    [Encoded::from_slice(&value.plain())]
        .into_iter()
        .chain(left)
}

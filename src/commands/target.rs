//! What a command asks: a majority of a key's replicas, or the node that was named.

use msgpack_rpc::Value;

use crate::beyond::swap::Swapped;
use crate::client::Client;
use crate::entry::Packed;
use crate::error::{Error, Kind};
use crate::rpc::Peer;
use crate::rpc::codec::{encode, encode_bytes};

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

    /// Writes the new value where the expected one is.
    pub(super) async fn cas(
        &self,
        key: &[u8],
        old: &Packed,
        new: &Packed,
    ) -> Result<Swapped, Error> {
        let (name, peer) = match self {
            Target::Majority(client) => return client.cas(key, old, new).await,
            Target::Node(name, peer) => (name, peer),
        };
        let answer = call(name, peer, "cas", &[&encode_bytes(key), old, new]).await?;
        match answer.value()?.as_array().map(Vec::as_slice) {
            Some([Value::Boolean(true), _]) => Ok(Swapped::Done(new.clone())),
            Some([Value::Boolean(false), current]) => Ok(Swapped::Not(Packed::of(current.clone()))),
            _ => Err(odd(name)),
        }
    }

    /// Adds to an integer.
    pub(super) async fn incr(&self, key: &[u8], by: i64) -> Result<i128, Error> {
        let (name, peer) = match self {
            Target::Majority(client) => return client.incr(key, by).await,
            Target::Node(name, peer) => (name, peer),
        };
        let params = [&*encode_bytes(key), &encode(&by.into())];
        let answer = call(name, peer, "incr", &params).await?.value()?;
        let signed = answer.as_i64().map(i128::from);
        let integer = signed.or(answer.as_u64().map(i128::from));
        integer.ok_or_else(|| odd(name))
    }

    /// Waits until all that was sent has arrived, for a moment at most.
    pub(super) async fn settle(&self) {
        if let Target::Majority(client) = self {
            client.replicas.settle().await;
        }
    }
}

fn odd(name: &str) -> Error {
    let why = format!("{name}: an answer to a swap that is none");
    Error::new(Kind::UnknownOutcome, why)
}

/// Asks one node. Its errors begin with its name.
async fn call(name: &str, peer: &Peer, method: &str, params: &[&[u8]]) -> Result<Packed, Error> {
    let answer = peer.ask(method, params).await;
    let named = |error: Error| Error::new(error.kind, format!("{name}: {}", error.why));
    Ok(Packed::from(&*answer.map_err(named)?))
}

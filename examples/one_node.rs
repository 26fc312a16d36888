//! The first step: a key-value store on one node, and nothing distributed about it. The rest of
//! kv54 answers what this one cannot: what if that node dies?
//!
//! `cargo example one_node`, and then anybody who speaks MessagePack-RPC.

use kv54::rpc::{self, Answer};
use kv54::{entry::Packed, entry::key, error::Error, error::Kind};
use std::{collections::HashMap, env, io, sync::Mutex};

struct OneNode(Mutex<HashMap<Vec<u8>, Packed>>);

impl rpc::Service for OneNode {
    async fn answer(&self, method: &str, params: &[&[u8]]) -> Result<Answer, Error> {
        let mut map = rpc::lock(&self.0);
        let answer = match (method, params) {
            ("get", [k]) => map.get(key(k)?).cloned(),
            // A set answers nil, not the former value.
            ("set", [k, value]) => map.insert(key(k)?.into(), (*value).into()).and(None),
            _ => return Err(Error::new(Kind::NoSuchMethod, method)),
        };
        Ok(answer.unwrap_or_default().into())
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> io::Result<()> {
    let address = env::args().nth(1).unwrap_or("127.0.0.1:5401".into());
    rpc::listen(&address, &OneNode(Mutex::default())).await
}

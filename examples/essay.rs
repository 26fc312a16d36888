//! The second step: the essay's own store (Sadayuki Furuhashi, 2009), on the endpoint of `msgpack-rpc`. A
//! key lives on node `hash % N`, which answers a set and then tells the next two names. What that
//! loses is what the rest of kv54 is about; `tests/examples.rs` plays it.
//!
//! `cargo example essay serve alice` for each name in `cluster.toml`, then `cargo example essay set tea green`.

use kv54::cluster::{Cluster, Node};
use msgpack_rpc::{Client, Service, Value, serve};
use std::{collections::HashMap, env, error::Error, future, sync::Arc, sync::Mutex};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::compat::TokioAsyncReadCompatExt as _;

struct Essay(Arc<Mutex<HashMap<String, Value>>>, Arc<Cluster>);

impl Service for Essay {
    type RequestFuture = future::Ready<Result<Value, Value>>;

    fn handle_request(&mut self, method: &str, params: &[Value]) -> Self::RequestFuture {
        let mut map = kv54::rpc::lock(&self.0);
        future::ready(match (method, params) {
            ("get", [key]) => Ok(map.get(&key.to_string()).cloned().unwrap_or(Value::Nil)),
            ("set" | "copy", [key, value]) => {
                map.insert(key.to_string(), value.clone());
                for node in nodes(&self.1, key).skip(1).filter(|_| method == "set") {
                    tokio::spawn(ask(node.clone(), "copy", params.to_vec())); // nobody waits for it
                }
                Ok(Value::Nil)
            }
            _ => Err("get KEY or set KEY VALUE".into()),
        })
    }

    fn handle_notification(&mut self, _: &str, _: &[Value]) {}
}

/// A key's owner, and the next two names.
fn nodes<'a>(ring: &'a Cluster, key: &Value) -> impl Iterator<Item = &'a Node> {
    let places = ring.replicas(ring.owner(key.as_str().unwrap_or_default().as_bytes()));
    places.filter_map(|place| ring.nodes().get(place))
}

async fn ask(node: Node, method: &str, params: Vec<Value>) -> Option<Value> {
    let client = Client::new(TcpStream::connect(&node.address).await.ok()?.compat());
    client.request(method, &params).await.ok()
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let ring = Arc::new(Cluster::read("cluster.toml".as_ref())?);
    let method = env::args().nth(1).unwrap_or_default();
    let params: Vec<Value> = env::args().skip(2).map(Value::from).collect();
    let key = params.first().unwrap_or(&Value::Nil);
    if let ("serve", Some(node)) = (&*method, ring.node(key.as_str().unwrap_or_default())) {
        let listener = TcpListener::bind(&node.address).await?;
        let map = Arc::default();
        loop {
            let node = Essay(Arc::clone(&map), ring.clone());
            tokio::spawn(serve(listener.accept().await?.0.compat(), node));
        }
    }
    let mut asked = nodes(&ring, key).take(if method == "get" { 3 } else { 1 });
    let mut answer = None;
    while let (None, Some(node)) = (&answer, asked.next()) {
        answer = ask(node.clone(), &method, params.clone()).await;
    }
    println!("{}", answer.ok_or("no node has answered")?);
    Ok(())
}

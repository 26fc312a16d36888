//! How many requests kv54's own client sends for one operation: `calls cluster.toml`. The
//! bytes that go out are read back by kv54's own codec.

use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf as _, BytesMut};
use kv54::client::Client;
use kv54::cluster::Cluster;
use kv54::entry::Packed;
use kv54::replicas::Replicas;
use kv54::rpc::codec::Codec;
use kv54::rpc::{Connection, Dial, tcp};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

const OPERATIONS: u32 = 1000;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).unwrap_or("cluster.toml".into());
    let calls = Arc::new(AtomicU32::new(0));
    let cluster = Arc::new(Cluster::read(Path::new(&path))?);
    let dial = counting(calls.clone());
    let client = Client {
        replicas: Replicas::new(cluster, Duration::from_secs(5), &dial),
    };
    let value = "v".repeat(100);
    for number in 0..OPERATIONS {
        client
            .set(&key(number), &Packed::of(value.as_str()))
            .await?;
    }
    client.replicas.settle().await;
    let sets = calls.swap(0, Relaxed);
    for number in 0..OPERATIONS {
        client.get(&key(number)).await?;
    }
    client.replicas.settle().await;
    let each = |calls: u32| f64::from(calls) / f64::from(OPERATIONS);
    println!(
        "{}",
        json!({ "get": each(calls.load(Relaxed)), "set": each(sets) })
    );
    Ok(())
}

fn key(number: u32) -> Vec<u8> {
    format!("bench:{number:010}").into_bytes()
}

/// Dials over TCP and counts what is asked.
fn counting(calls: Arc<AtomicU32>) -> Dial {
    let dial = tcp();
    Arc::new(move |node| {
        let (dialled, calls) = (dial(node), calls.clone());
        Box::pin(async move {
            let counted = Counted {
                stream: dialled.await?,
                codec: Codec::default(),
                seen: BytesMut::new(),
                calls,
            };
            Ok(Box::new(counted) as Box<dyn Connection>)
        })
    })
}

struct Counted {
    stream: Box<dyn Connection>,
    codec: Codec,
    seen: BytesMut,
    calls: Arc<AtomicU32>,
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, into)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        if let Poll::Ready(Ok(count)) = written {
            let Counted {
                codec, seen, calls, ..
            } = &mut *self;
            seen.extend_from_slice(&bytes[..count]);
            while let Ok(Some(end)) = codec.next(seen) {
                seen.advance(end);
                calls.fetch_add(1, Relaxed);
            }
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

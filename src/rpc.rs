//! MessagePack-RPC over any stream of bytes: `[0, msgid, method, [params]]` is
//! answered by `[1, msgid, error, result]`, in any order, on one connection.
//!
//! The endpoint of the crate `msgpack-rpc` is not used: it spawns a task for every request,
//! writes every answer by itself and bounds nothing. Here are a [`codec`] with limits, a loop
//! that [`serve`](serve())s, and a [`Peer`] that asks.

use std::future::{Future, ready};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt as _};
use futures::stream::{self, BoxStream, FuturesUnordered, StreamExt as _, TryStreamExt as _};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, lookup_host};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use self::codec::{Encoded, NIL};
use self::protocol::MessagePackRpc;
use crate::cluster::{Limits, Node};
use crate::error::Error;

mod buffers;
pub mod codec;
mod gate;
mod meter;
mod peer;
mod protocol;
mod serve;
mod tasks;
pub mod tls;

pub use gate::{Gate, Reached};
pub use meter::Meter;
pub use peer::{Call, HEDGE, Peer, Turn};
pub use protocol::{Found, Protocol, REQUEST, take};
pub use serve::{Admitted, admit, hand_out, serve, serve_counted, serve_protocol};

/// A connection: TCP here, a simulated or an encrypted one elsewhere.
pub trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Connection for S {}

/// A connection that is being made: dialled here, or accepted and perhaps not yet let in.
pub type Connecting = BoxFuture<'static, io::Result<Box<dyn Connection>>>;

/// How a node is reached.
pub type Dial = Arc<dyn Fn(&Node) -> Connecting + Send + Sync>;

/// A service answers requests. `examples/one_node.rs` is a whole one.
pub trait Service: Sync {
    /// The answer to one request, whose parameters come as MessagePack. An answer that is ready
    /// at once is sent in order, at once, unless it is [`held`](Service::held).
    fn answer(
        &self,
        method: &str,
        params: &[&[u8]],
    ) -> impl Future<Output = Result<Answer, Error>> + Send;

    /// What holds the answer back that was just made, if anything does.
    fn held(&self, _method: &str, _params: &[&[u8]]) -> Option<Reached> {
        None
    }
}

/// An answer, which is one value as MessagePack in two pieces.
#[derive(Clone, Debug)]
pub struct Answer {
    /// What was made for this answer.
    pub made: Encoded,
    /// What is kept in memory, shared instead of copied.
    pub kept: Option<Arc<[u8]>>,
}

impl Answer {
    /// Appends it.
    pub fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.made);
        out.extend_from_slice(self.kept.as_deref().unwrap_or_default());
    }
}

impl From<Encoded> for Answer {
    fn from(made: Encoded) -> Self {
        Answer { made, kept: None }
    }
}

impl From<()> for Answer {
    fn from((): ()) -> Self {
        Encoded::from_slice(NIL).into()
    }
}

/// A connection that is already made.
pub fn connected(stream: Box<dyn Connection>) -> Connecting {
    Box::pin(ready(Ok(stream)))
}

/// Dials over TCP.
pub fn tcp() -> Dial {
    Arc::new(|node| {
        let address = node.address.clone();
        Box::pin(async move {
            let stream = reach(lookup_host(address).await?.collect()).await?;
            tune(&stream)?;
            Ok(Box::new(stream) as Box<dyn Connection>)
        })
    })
}

/// Connects to whichever of these addresses answers. Each try begins with another one: the first may be silent.
pub async fn reach(mut found: Vec<SocketAddr>) -> io::Result<TcpStream> {
    let connect = || {
        let tries = found.clone();
        found.rotate_left(tries.len().min(1));
        async move { TcpStream::connect(&*tries).await }
    };
    insist(connect).await
}

/// Connects. The kernel sends a lost first packet again only after 1 s, then 2 s, then 4 s: a host
/// that is reachable again would wait for so long. So another try begins every 200 ms beside those
/// that are open, and the first to succeed or to fail ends them all.
pub async fn insist<S, F>(mut connect: impl FnMut() -> F) -> io::Result<S>
where
    F: Future<Output = io::Result<S>>,
{
    let every = Duration::from_millis(200);
    let (mut tries, mut longest) = (FuturesUnordered::new(), Duration::MAX); // the first: for a slow link
    loop {
        tries.push(timeout(longest, connect()));
        tokio::select! {
            biased;
            Some(Ok(done)) = tries.next() => return done,
            () = sleep(every) => longest = 3 * every, // so at most four are open
        }
    }
}

/// Answers on a TCP address for as long as the process lives.
pub async fn listen(address: &str, service: &impl Service) -> io::Result<()> {
    listen_in(&MessagePackRpc(service, &Meter::default()), address).await
}

/// The same in another protocol.
pub async fn listen_in(protocol: &impl Protocol, address: &str) -> io::Result<()> {
    let listener = TcpListener::bind(address).await?;
    let never = CancellationToken::new();
    let incoming = incoming(&listener, |stream, _| connected(stream));
    serve_protocol(incoming, protocol, Limits::default, never).await;
    Ok(())
}

/// The connections to a TCP listener, each as `welcome` makes it from the stream and the address
/// of its peer. The listener stays bound for as long as its owner keeps it.
pub fn incoming<'a>(
    listener: &'a TcpListener,
    welcome: impl Fn(Box<dyn Connection>, SocketAddr) -> Connecting + Send + 'a,
) -> BoxStream<'a, io::Result<Connecting>> {
    let accepted = stream::repeat(listener).then(accept);
    accepted
        .map_ok(move |(stream, from)| welcome(Box::new(stream), from))
        .boxed()
}

/// The same for several threads: each connection belongs to the runtime of the thread that makes it.
pub fn incoming_for_threads(
    listener: &TcpListener,
    welcome: tls::Guard,
) -> BoxStream<'_, io::Result<Connecting>> {
    let accepted = stream::repeat(listener).then(accept);
    let moved = accepted.map_ok(move |(stream, from)| {
        let welcome = welcome.clone();
        let moved = async move {
            let stream = TcpStream::from_std(stream.into_std()?)?;
            welcome(Box::new(stream), from).await
        };
        moved.boxed()
    });
    moved.boxed()
}

/// The next connection to a TCP listener. An error takes a moment: most likely there are no
/// more files, and one that closes is worth waiting for.
async fn accept(listener: &TcpListener) -> io::Result<(TcpStream, SocketAddr)> {
    let accepted = listener.accept().await;
    if accepted.is_err() {
        sleep(Duration::from_millis(100)).await;
    }
    let (stream, from) = accepted?;
    tune(&stream)?;
    Ok((stream, from))
}

/// Without `TCP_NODELAY` the kernel holds a small answer back for up to 40 ms. Without keepalive a
/// node never notices that a host has vanished.
fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let every = Duration::from_secs(10);
    SockRef::from(stream)
        .set_tcp_keepalive(&TcpKeepalive::new().with_time(every).with_interval(every))
}

/// Warns once in each such time at most. A line for each refused peer would be one more way to
/// flood a node.
struct Rarely(Duration, Mutex<Option<Instant>>);

impl Rarely {
    fn every(period: Duration) -> Self {
        Rarely(period, Mutex::default())
    }

    fn warn(&self, line: &str) {
        let (mut last, now) = (lock(&self.1), Instant::now());
        if last.is_some_and(|last| now - last < self.0) {
            return log::debug!("{line}");
        }
        *last = Some(now);
        log::warn!("{line}");
    }
}

/// Locks for a few instructions. A panic elsewhere does not matter here: the data is whole.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

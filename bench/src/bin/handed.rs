//! A node whose connections are in many threads and whose store is in one, as in servers whose logic has a thread
//! of its own: `handed THREADS cluster.toml` runs the first node of the file, which must be alone in it.
//! `bench/compare threads` has it beside nodes whose threads do everything.

use std::io;
use std::path::Path;
use std::sync::Arc;

use futures::{FutureExt as _, channel::mpsc, stream};
use kv54::cluster::Cluster;
use kv54::error::{Error, Kind};
use kv54::node::{self, TIMEOUT};
use kv54::rpc::{self, Admitted, Answer, Meter, Service, tls};
use kv54::server::Node;
use kv54::store::Store;
use tokio::net::TcpListener;
use tokio::sync::{mpsc as requests, oneshot};
use tokio_util::sync::CancellationToken;

type Answered = Result<Answer, Error>;

/// A request on its way to the thread that answers.
struct Asked {
    method: String,
    params: Vec<Vec<u8>>,
    answer: oneshot::Sender<Answered>,
}

/// Hands each request over.
#[derive(Clone)]
struct Handed(requests::UnboundedSender<Asked>);

impl Service for Handed {
    async fn answer(&self, method: &str, params: &[&[u8]]) -> Answered {
        let gone = |_| Error::new(Kind::UnknownOutcome, "the thread that answers has gone");
        let (answer, answered) = oneshot::channel();
        let asked = Asked {
            method: method.to_owned(),
            params: params.iter().map(|param| param.to_vec()).collect(),
            answer,
        };
        let _ = self.0.send(asked); // if nobody takes it, nobody answers it
        answered.await.map_err(gone)?
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut words = std::env::args().skip(1);
    let (Some(threads), Some(path)) = (words.next(), words.next()) else {
        return Err("usage: handed THREADS cluster.toml".into());
    };
    let cluster = Arc::new(Cluster::read(Path::new(&path))?);
    let listener = TcpListener::bind(&cluster.nodes()[0].address).await?;
    let listener: &TcpListener = Box::leak(Box::new(listener)); // the connections of all threads come from it
    let (requests, asked) = requests::unbounded_channel();
    let (service, mut others) = (Handed(requests), Vec::new());
    let answering = answer(cluster.clone(), asked);
    drop(node::in_thread("answers".to_owned(), answering)?);
    for _ in 1..threads.parse()? {
        let (to, connections) = mpsc::unbounded();
        let serving = serve(connections, service.clone());
        drop(node::in_thread("serves".to_owned(), serving)?);
        others.push(to);
    }
    let guard = tls::guard(&cluster, cluster.name(0))?;
    let (incoming, limits) = (rpc::incoming_for_threads(listener, guard), move || {
        cluster.limits
    });
    let connections = rpc::hand_out(rpc::admit(incoming, limits), others);
    Ok(serve(connections, service).await?)
}

async fn serve<L>(connections: L, service: Handed) -> io::Result<()>
where
    L: stream::Stream<Item = Admitted> + Unpin,
{
    rpc::serve_counted(
        connections,
        &service,
        &Meter::default(),
        CancellationToken::new(),
    )
    .await;
    Ok(())
}

/// Lives without connections, and answers what is handed over: at once, since nobody else need be asked.
async fn answer(
    cluster: Arc<Cluster>,
    mut asked: requests::UnboundedReceiver<Asked>,
) -> io::Result<()> {
    let node = Node::new(Arc::new(Store::new(cluster, 0)), TIMEOUT, &rpc::tcp());
    let alive = node.clone();
    tokio::spawn(async move {
        alive
            .live(stream::pending(), CancellationToken::new())
            .await
    });
    while let Some(Asked {
        method,
        params,
        answer,
    }) = asked.recv().await
    {
        let params: Vec<&[u8]> = params.iter().map(|param| &**param).collect();
        let waits = || {
            Err(Error::new(
                Kind::UnknownOutcome,
                "it has to wait for another node",
            ))
        };
        let answered = node.answer(&method, &params).now_or_never();
        let _ = answer.send(answered.unwrap_or_else(waits)); // the guest may be gone
    }
    Ok(())
}

//! A queue of tasks for any client of memcached: `set tasks …` puts a task in, and `get tasks` waits for one.
//! `docs/programs.md` has more.
//!
//! The tasks are in the ring (`src/beyond/queue.rs`). A server knows only who waits, and many may serve the same
//! queues. What is taken from the ring is given to a worker, or put in again: also if its connection ends meanwhile.

use kv54::beyond::memcached::{Cache, Item, Memcached, Outcome, Queues, Request, Turn, Verb};
use kv54::{beyond::programs, client::Client, entry::Packed, error::Error, rpc::listen_in};
use std::{sync::Arc, time::Duration};
use tokio::{select, sync::Notify, sync::oneshot, time::sleep, time::timeout};

/// How soon a task is seen that came through another server, and how soon is tried again what has failed.
const POLL: Duration = Duration::from_millis(50);

/// Asks the ring, has those that put and those that take stand in lines, and tells of a new task.
#[derive(Clone)]
struct Server(Arc<Client>, Arc<Queues>, Arc<Notify>);

impl Server {
    async fn put(&self, queue: &[u8], task: &Packed) -> Result<Outcome, Error> {
        let line = self.1.place(&[b"put ", queue].concat());
        // Or all of them would want the same slot. Who reads no answers does not stop them for long.
        let _turn = timeout(20 * POLL, line.queue.turn(true)).await;
        self.0.put_task(queue, task).await?;
        self.2.notify_one();
        Ok(Outcome::Done(Item::default()))
    }

    /// Waits for a task. This may be dropped at any time.
    async fn take(&self, queue: &[u8]) -> Result<Outcome, Error> {
        let (worker, taken) = oneshot::channel();
        tokio::spawn(self.clone().give(queue.to_owned(), worker));
        Ok(Outcome::of(&taken.await.unwrap_or(Ok(Packed::default()))?))
    }

    /// Gives a task to a worker in its turn, or puts it in again where the worker has gone meanwhile.
    async fn give(self, queue: Vec<u8>, mut worker: oneshot::Sender<Result<Packed, Error>>) {
        let line = self.1.place(&[b"get ", &*queue].concat());
        let turn = select! { turn = line.queue.turn(true) => turn, () = worker.closed() => return };
        let taken = loop {
            match self.0.take_task(&queue).await {
                Ok(Some(task)) => break Ok(task),
                Err(error) if error.kind.is_refusal() => break Err(error),
                _ => {}
            }
            select! { () = worker.closed() => return, _ = timeout(POLL, self.2.notified()) => {} }
        };
        drop(turn); // a queue may be full until somebody takes
        if let Err(Ok(task)) = worker.send(taken) {
            while self.put(&queue, &task).await.is_err() {
                sleep(POLL).await;
            }
        }
    }
}

impl Cache for Server {
    async fn answer(&self, request: &mut Request, turn: &Turn) -> Result<Outcome, Error> {
        match request.verb {
            Verb::Set if request.is_plain() => self.put(&request.key, &request.kept()).await,
            Verb::Get if request.is_plain() => turn.unless_left(self.take(&request.key)).await,
            _ => Err(Error::bad_request("a queue knows plain set and get")),
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), programs::Failed> {
    let address = programs::words().pop().unwrap_or("127.0.0.1:11300".into());
    let server = Server(programs::client()?.into(), Arc::default(), Arc::default());
    Ok(listen_in(&Memcached::of(server), &address).await?)
}

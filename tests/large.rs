//! What is larger than a value: whole or not at all, also where two clients write it at once and a node is killed.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use common::{Cluster, block_on};
use futures::future::{join, join_all};
use futures::poll;
use kv54::entry::Packed;
use kv54::error::Kind;
use tokio::time::sleep;

/// More than two pieces.
const BYTES: usize = 600_000;

#[test]
fn a_reader_finds_one_whole_version_while_two_write_and_a_node_is_killed() {
    let mut ring = Cluster::five();
    let (clients, reader) = ([ring.client(), ring.client()], ring.client());
    let owner = ring.replicas("film").remove(0);
    let done = Cell::new(0);
    let write = async |letter: u8, client| {
        let mut versions: Vec<u64> = Vec::new();
        for n in 0..10 {
            let bytes = vec![letter + n; BYTES + usize::from(n)];
            // What was answered with an error may be there or not, and is whole.
            versions.extend(
                kv54::client::Client::set_large(client, b"film", &bytes)
                    .await
                    .ok(),
            );
            done.set(done.get() + 1);
        }
        versions
    };
    let read = async {
        let (mut seen, mut killed) = (Vec::new(), false);
        while done.get() < 20 {
            if done.get() >= 5 && !killed {
                ring.kill(&owner);
                killed = true;
            }
            match reader.get_large(b"film").await {
                Ok(Some((version, bytes))) => {
                    assert!(bytes.iter().all(|byte| *byte == bytes[0]));
                    assert_eq!(bytes.len(), BYTES + usize::from((bytes[0] - b'a') % 13));
                    seen.push(version);
                }
                Ok(None) => assert!(seen.is_empty(), "it was there: {seen:?}"),
                Err(error) => panic!("{error}"),
            }
        }
        seen
    };
    let writes = join_all(
        [(b'a', &clients[0]), (b'n', &clients[1])].map(|(letter, client)| write(letter, client)),
    );
    let (versions, seen, last) = block_on(async {
        let (versions, seen) = join(writes, read).await;
        (versions, seen, reader.get_large(b"film").await)
    });
    assert!(!seen.is_empty() && seen.is_sorted(), "{seen:?}");
    assert!(versions.iter().all(|own| own.is_sorted()), "{versions:?}");
    let all: BTreeSet<u64> = versions.iter().flatten().copied().collect();
    let answered: usize = versions.iter().map(Vec::len).sum();
    assert_eq!(all.len(), answered, "none twice: {versions:?}");
    let (last, _) = last.unwrap().unwrap();
    assert!(Some(&last) >= all.last(), "{versions:?}, and then {last}");
}

#[test]
fn a_reader_that_is_overtaken_looks_again() {
    let ring = Cluster::running(&["alice", "bob", "carol"]);
    let (writer, reader) = (ring.client(), ring.client());
    block_on(async {
        writer.set_large(b"film", &vec![0; BYTES]).await.unwrap();
        for steps in 1..10 {
            let mut read = pin!(reader.get_large(b"film"));
            let mut found = poll!(&mut read);
            for _ in 1..steps {
                if found.is_pending() {
                    sleep(Duration::from_millis(20)).await; // an answer may come, or not
                    found = poll!(&mut read);
                }
            }
            let new = writer
                .set_large(b"film", &vec![steps; BYTES])
                .await
                .unwrap();
            let found = match found {
                Poll::Ready(found) => found,
                Poll::Pending => read.await,
            };
            let (version, bytes) = found.unwrap().unwrap();
            assert!([new - 1, new].contains(&version));
            let whole = vec![u8::try_from(version - 1).unwrap(); BYTES];
            assert!(bytes == whole, "after {steps} steps");
        }
    });
}

#[test]
fn former_pieces_go_and_those_that_are_missing_are_said() {
    let ring = Cluster::running(&["alice", "bob", "carol"]);
    let client = ring.client();
    block_on(async {
        assert_eq!(client.get_large(b"film").await, Ok(None));
        assert_eq!(client.set_large(b"film", &vec![1; BYTES]).await, Ok(1));
        assert_eq!(client.set_large(b"film", b"short").await, Ok(2));
        assert_eq!(
            client.get_large(b"film").await,
            Ok(Some((2, b"short".to_vec())))
        );
    });
    let keys = ring.kv54(["keys", "--prefix", "film"]).exits(0);
    assert_eq!(
        keys.text().lines().count(),
        2,
        "itself and one piece: {keys:?}"
    );
    block_on(async {
        assert_eq!(client.set_large(b"film", b"").await, Ok(3));
        assert_eq!(client.get_large(b"film").await, Ok(Some((3, Vec::new()))));
        let head = |numbers: Vec<u64>| {
            let numbers = numbers.into_iter().map(msgpack_rpc::Value::from);
            Packed::of(numbers.collect::<Vec<_>>())
        };
        client.set(b"film", &head(vec![7, 54, 54])).await.unwrap();
        let error = client.get_large(b"film").await.unwrap_err();
        assert_eq!(error.kind, Kind::Unavailable);
        assert!(error.why.contains("\"film\""), "{error}");
        assert_eq!(client.set_large(b"film", b"new").await, Ok(8));
        client.set(b"film", &head(vec![7, 54])).await.unwrap();
        assert_eq!(client.get_large(b"film").await, Ok(None), "another value");
    });
}

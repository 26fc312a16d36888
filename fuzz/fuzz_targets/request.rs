//! Any bytes to a node, the way a guest sends them, in a ring of one that is soon full and in a
//! ring of three: every request is answered once, in words that a guest can read; afterwards the
//! nodes still answer, have counted every byte, agree on how the ring is, and come to hold the same:
//! all but a ring of which one node was led two steps away from the others.
#![no_main]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use futures::channel::mpsc;
use futures::future::join_all;
use kv54::cluster::{self, Cluster};
use kv54::entry::Stamp;
use kv54::error::Error;
use kv54::join::entries;
use kv54::rpc::codec::{
    Codec, NIL, Request, Response, decode, encode_numbers, string, write_request,
};
use kv54::rpc::{Dial, admit, connected};
use kv54::server::Node;
use kv54::status::Status;
use kv54::store::Store;
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex, split};
use tokio::task::yield_now;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

const NAMES: [&str; 3] = ["alice", "bob", "carol"];
/// How long an operation is tried again.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How long anything may take that is to happen at all.
const PATIENCE: Duration = Duration::from_secs(60);
/// What a pipe holds, in bytes: less than many a message and many an answer.
const PIPE: usize = 512;
/// The longest error, in bytes: room for a key or two, not for a whole message.
const MAX_ERROR: usize = 17 << 10;
/// What an entry takes beside its key and value, in bytes, as the README says.
const OVERHEAD: usize = 100;
/// What a key takes beside that which was ever swapped, in bytes.
const SWAPS: usize = 80;

// A node answers a panic and goes on; the fuzzer's own hook aborts before it can.
fuzz_target!(|bytes: &[u8]| {
    for (nodes, memory) in [(1, 400), (3, 1 << 30)] {
        fastrand::seed(54);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build();
        let played = visit(ring(nodes, memory), bytes);
        runtime.expect("a runtime").block_on(played);
    }
});

fn ring(nodes: usize, memory: usize) -> Cluster {
    let nodes = NAMES[..nodes]
        .iter()
        .map(|name| format!("{name} = '{name}:54'\n"));
    let file = format!(
        "limits.window = '50ms'\n[nodes]\n{}",
        nodes.collect::<String>()
    );
    let mut cluster = Cluster::parse("cluster.toml".as_ref(), &file).expect("a ring");
    cluster.limits.memory = memory;
    cluster
}

/// Nodes, and a guest of the first of them who sends these bytes.
async fn visit(cluster: Cluster, bytes: &[u8]) {
    let cluster = Arc::new(cluster);
    let (doors, incoming): (Vec<_>, Vec<_>) =
        cluster.nodes().iter().map(|_| mpsc::unbounded()).unzip();
    let ring = cluster.clone();
    let dial: Dial = Arc::new(move |node| {
        let (near, far) = duplex(PIPE);
        // The guest may tell of nodes that do not exist: the other end of these is gone.
        if let Some(place) = ring.place(&node.name) {
            let entered = doors[place].unbounded_send(Ok(connected(Box::new(far))));
            entered.expect("nodes do not stop");
        }
        connected(Box::new(near))
    });
    let node = |place| {
        let store = Arc::new(Store::new(cluster.clone(), place));
        Node::new(store, TIMEOUT, &dial)
    };
    let nodes: Vec<Arc<Node>> = (0..cluster.nodes().len()).map(node).collect();
    let stores: Vec<Arc<Store>> = nodes.iter().map(|node| node.store.clone()).collect();
    let lives = nodes.iter().zip(incoming).map(async |(node, incoming)| {
        let connections = admit(incoming, || node.store.limits());
        node.live(connections, CancellationToken::new()).await;
    });
    let guest = async {
        until("ready", || {
            stores.iter().all(|store| store.status().state == "ready")
        })
        .await;
        // What a coordinator or a neighbour stores is kept, however little is left.
        let asks = |method: &[u8]| bytes.windows(method.len()).any(|part| part == method);
        let is_guest = !asks(b"store") && !asks(b"ring");
        let mut answered = answers(&ask(&dial, "alice", bytes).await);
        let mut asked = asked(bytes);
        asked.sort_unstable();
        answered.sort_unstable();
        assert_eq!(answered, asked, "one answer for each request");
        for store in &stores {
            is_alive(&dial, store).await;
            let of_swaps = has_counted_every_byte(store);
            let (bytes, memory) = (store.status().bytes, cluster.limits.memory);
            assert!(
                bytes - of_swaps <= memory || !is_guest,
                "{bytes} bytes are kept"
            );
        }
        if agree(&stores) && cluster.limits.memory > 1 << 20 {
            until("alike", || are_alike(&stores)).await;
        }
    };
    tokio::select! {
        biased;
        _ = join_all(lives) => panic!("nodes do not stop"),
        () = guest => {}
    }
}

/// Has the nodes tell each other how the ring is, until all know the same: the guest may have told
/// one of them. Only who was led so far alone that entries were left behind is refused.
fn agree(stores: &[Arc<Store>]) -> bool {
    for one in stores {
        for other in stores {
            let (told, known) = (one.rings.known(), other.rings.known());
            if let Err(refused) = other.hear(&one.told()) {
                let follows = known.state.is_followed_by(&told.state);
                assert!(!follows, "a step that follows is taken: {refused}");
                return false;
            }
        }
    }
    let last = stores[0].rings.known().state;
    let mut states = stores.iter().map(|store| store.rings.known().state);
    assert!(states.all(|state| state.is(&last)), "one ring");
    true
}

/// Whether all nodes that hold a part of the ring hold the same of it.
fn are_alike(stores: &[Arc<Store>]) -> bool {
    let statuses: Vec<Status> = stores.iter().map(|store| store.status()).collect();
    let mut parts = BTreeMap::new();
    let mut held = statuses.iter().flat_map(|status| &status.digests);
    held.all(|(owner, digest)| parts.entry(owner).or_insert(digest) == &digest)
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    let held = async {
        while !holds() {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, held)
        .await
        .unwrap_or_else(|_| panic!("never {what}"));
}

/// Sends bytes in pieces as long as their first bytes say; all that comes back, to the end.
async fn ask(dial: &Dial, name: &str, mut bytes: &[u8]) -> Vec<u8> {
    let node = cluster::Node {
        name: name.to_owned(),
        address: format!("{name}:54"),
    };
    let (mut from, mut to) = split(dial(&node).await.expect("a connection"));
    let sent = async {
        while let Some(first) = bytes.first() {
            let (piece, rest) = bytes.split_at(usize::from(*first).clamp(1, bytes.len()));
            if to.write_all(piece).await.is_err() {
                return; // it need not listen to all of it
            }
            yield_now().await;
            bytes = rest;
        }
        let _ = to.shutdown().await;
    };
    let mut answers = Vec::new();
    let heard = from.read_to_end(&mut answers);
    let ((), heard) = timeout(PATIENCE, async { tokio::join!(sent, heard) })
        .await
        .expect("an end");
    heard.expect("an end in order");
    answers
}

/// The msgids that are to be answered. What comes after bytes that are no message is not read.
fn asked(bytes: &[u8]) -> Vec<u32> {
    let (mut codec, mut input, mut ids) = (Codec::default(), BytesMut::from(bytes), Vec::new());
    loop {
        let message = match codec.next(&input) {
            Ok(None) => return ids,
            Ok(Some(end)) => input.split_to(end),
            Err(malformed) => {
                ids.extend(malformed.id);
                return ids;
            }
        };
        match Request::read(&message) {
            Ok(request) => ids.extend(request.id),
            Err(malformed) => {
                ids.extend(malformed.id);
                if !malformed.recoverable {
                    return ids;
                }
            }
        }
    }
}

/// The msgids that were answered, each with a value or with an error that a person can read.
fn answers(bytes: &[u8]) -> Vec<u32> {
    let (mut codec, mut input, mut ids) = (Codec::default(), BytesMut::from(bytes), Vec::new());
    while let Some(end) = codec.next(&input).expect("answers within the bounds") {
        let message = input.split_to(end);
        let Response { id, result } = Response::read(&message).expect("an answer");
        if let Err(error) = result {
            let text = string(error).expect("an error is a string");
            let text = std::str::from_utf8(text).expect("an error is text");
            assert_eq!(
                Error::parse(text).to_string(),
                text,
                "its first word is known"
            );
            assert!(!text.contains(char::is_control), "one line: {text:?}");
            assert!(text.len() <= MAX_ERROR, "an error of {} bytes", text.len());
        }
        ids.push(id);
    }
    assert!(input.is_empty(), "half an answer");
    ids
}

/// Whether a node answers others than the one who has sent it these bytes.
async fn is_alive(dial: &Dial, store: &Store) {
    let mut question = Vec::new();
    write_request(&mut question, 54, "status", 0, &[]);
    let answer = ask(dial, store.name(), &question).await;
    let answer = Response::read(&answer).expect("an answer");
    let status = answer.result.expect("a status");
    assert_eq!(answer.id, 54);
    let status = Status::read(status).expect("a status");
    assert_eq!(
        (&*status.name, status.bytes),
        (store.name(), store.status().bytes)
    );
}

/// Whether a store's figures are those of the entries that it has. A value that it holds of two
/// rings lies in memory once; a promise without an entry takes memory, and is neither key nor tombstone.
/// How many of the bytes are for swaps: these are taken also where little is left.
fn has_counted_every_byte(store: &Store) -> usize {
    let (mut keys, mut tombstones, mut bytes, mut of_swaps) = (0, 0, 0, 0);
    let state = store.rings.known().state;
    let mut of_old_ring = BTreeMap::new();
    for (number, ring) in state.rings().enumerate() {
        for part in ring
            .place(store.name())
            .map_or(0..0, |_| 0..ring.nodes().len())
        {
            for (key, stamp, value, promised) in part_of(store, number, part) {
                bytes += key.len() + OVERHEAD;
                of_swaps += promised.map_or(0, |_| SWAPS);
                if number == 0 {
                    tombstones += usize::from(value == NIL && stamp != Stamp::default());
                    keys += usize::from(value != NIL);
                }
                let entry = (stamp, value);
                if entry.1 != NIL && of_old_ring.get(&key) != Some(&entry) {
                    bytes += entry.1.len();
                }
                if number == 0 {
                    of_old_ring.insert(key, entry);
                }
            }
        }
    }
    let status = store.status();
    assert_eq!(
        (status.keys, status.tombstones, status.bytes),
        (keys, tombstones, bytes + of_swaps)
    );
    of_swaps
}

/// A key, its entry, and the promised ballot if it was ever swapped.
type Listed = (Vec<u8>, Stamp, Vec<u8>, Option<u64>);

/// The entries of a part that a node holds; none of another one.
fn part_of(store: &Store, ring: usize, part: usize) -> Vec<Listed> {
    let (mut found, mut next) = (Vec::new(), Some(0));
    while let Some(cursor) = next {
        let (part, cursor) = (encode_numbers([part as u64]), encode_numbers([cursor]));
        let Ok(answer) = store.at(ring).scan(&part, &[&cursor]) else {
            return found;
        };
        let mut page = Vec::new();
        answer.write(&mut page);
        for (key, entry, promised) in entries(&page).expect("entries") {
            let ballot = entry.stamp.ballot;
            assert!(
                ballot <= promised,
                "{ballot} is kept, {promised} is promised"
            );
            let promised = Some(promised).filter(|promised| *promised > 0);
            found.push((key.to_vec(), entry.stamp, entry.value.to_vec(), promised));
        }
        next = decode(&page).expect("a page")[1].as_u64();
    }
    found
}

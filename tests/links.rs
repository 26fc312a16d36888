//! Stories of links that are slow, fall silent, or lose the first packet: who waits, and for how long.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

mod common;

use std::io::{self, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Barrier, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use common::wire::Wire;
use common::{Cluster, Hiccups, block_on};
use futures::stream;
use kv54::cluster::{self, Limits, Node};
use kv54::entry::{Packed, Stamp};
use kv54::error::{Error, Kind};
use kv54::join::{Scan, entries};
use kv54::replicas::Replicas;
use kv54::rpc::codec::{NIL, encode_bytes};
use kv54::rpc::{self, Answer, Dial, Gate, HEDGE, Peer, Reached, Service, connected, insist, tcp};
use kv54::store::Store;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_util::sync::CancellationToken;

const THREE: [&str; 3] = ["alice", "bob", "carol"];

#[test]
fn over_a_link_of_5_mbit_a_value_of_1_mib_is_read_though_no_window_is_so_long() {
    joins_over_a_link_of(625_000, "100ms");
}

#[test]
#[ignore = "takes three minutes"]
fn over_a_link_of_50_kbit_too() {
    joins_over_a_link_of(6_250, "1s");
}

/// carol comes back, and all that she reads comes over slow links.
fn joins_over_a_link_of(rate: u32, window: &str) {
    let mut cluster = Cluster::with_limits(&THREE, &format!("window = \"{window}\""));
    cluster.start_all();
    block_on(async {
        let client = cluster.client();
        for n in 0..300 {
            let value = Packed::of(format!("value {n}"));
            client
                .set(format!("small{n}").as_bytes(), &value)
                .await
                .unwrap();
        }
        let large = Packed::of("x".repeat((1 << 20) - 10));
        client.set(b"large", &large).await.unwrap();
        client.replicas.settle().await;
    });
    cluster.wait_until_equal();
    cluster.kill("carol");
    let mut file = std::fs::read_to_string(cluster.dir.join("cluster.toml")).unwrap();
    for name in ["alice", "bob"] {
        let behind = cluster.address(name);
        file = file.replace(&behind, &slow_link(&behind, rate));
    }
    cluster.file("slow.toml", &file);
    let begun = Instant::now();
    cluster.start_behind("carol", "slow.toml", &cluster.address("carol"));

    // Meanwhile, no operation waits: neither over healthy links nor, in carol, behind a page.
    let (mut longest, mut said, mut operations) = (Duration::ZERO, String::new(), 0);
    let hiccups = Hiccups::watch();
    block_on(async {
        let client = cluster.client();
        let ring = cluster.ring();
        let [carol, status] =
            [(); 2].map(|()| Peer::new(&ring.nodes()[2], Duration::from_secs(5), tcp()));
        let said_by_carol = async || {
            let answer = status.call("status", &[]).await.1.unwrap();
            kv54::status::Status::read(&answer).unwrap()
        };
        let mut told = said_by_carol().await;
        while told.state == "joining" {
            assert!(begun.elapsed() < Duration::from_secs(600), "{told:?}");
            for key in ["small1", "small2", "small3"] {
                let asked = Instant::now();
                client
                    .set(key.as_bytes(), &Packed::of("new"))
                    .await
                    .unwrap();
                let key = encode_bytes(key.as_bytes());
                carol.call("get", &[&key]).await.1.unwrap();
                longest = longest.max(asked.elapsed());
                operations += 1;
            }
            told = said_by_carol().await;
            let rate = told.remarks.get("alice");
            if rate.is_some_and(|rate| rate.ends_with("kB/s")) {
                said = told.waiting();
            }
        }
    });
    let took = begun.elapsed();
    println!(
        "ready after {took:.1?}; {operations} times set and got, {longest:.0?} at most; {said}"
    );
    assert!(
        said.contains("waiting for alice ("),
        "no rate was told: {said:?}"
    );
    let longest = longest.saturating_sub(hiccups.longest());
    assert!(longest < Duration::from_millis(700), "{longest:?}");
    assert_eq!(cluster.differences(), [""; 0]);
}

#[test]
fn a_neighbour_of_the_former_version_which_takes_no_size_is_read_to_the_end() {
    struct Former(Store);
    impl Service for Former {
        async fn answer(&self, method: &str, params: &[&[u8]]) -> Result<Answer, Error> {
            match (method, params) {
                ("scan", [ring, part, cursor]) => self.0.on(ring)?.scan(part, &[cursor]),
                _ => Err(Error::not_a_request(method, params.len())),
            }
        }
    }
    block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let file = format!("[nodes]\nsolo = \"{}\"", listener.local_addr().unwrap());
        let cluster = cluster::Cluster::parse("cluster.toml".as_ref(), &file).unwrap();
        let (cluster, keys) = (Arc::new(cluster), 1_000);
        let former = Former(Store::new(cluster.clone(), 0));
        former.0.heard_all();
        for n in 0..keys {
            let entry = Stamp::default();
            former
                .0
                .at(0)
                .keep(format!("key{n}").as_bytes(), entry.newer(b"\x01"))
                .unwrap();
        }
        let stop = CancellationToken::new();
        let incoming = rpc::incoming(&listener, |stream, _| connected(stream));
        let limits = Limits::default();
        let serving = rpc::serve(incoming, &former, || limits, stop.clone());
        let replicas = Replicas::new(cluster, Duration::from_secs(5), &tcp());
        let reading = async {
            let (mut scan, mut read, mut pages) = (Scan::new(&replicas, 0, 0).unwrap(), 0, 0);
            while let Some(page) = scan.page().await.unwrap() {
                read += entries(&page).unwrap().len();
                pages += 1;
            }
            stop.cancel();
            (read, pages > 1)
        };
        let ((), read) = tokio::join!(serving, reading);
        assert_eq!(read, (keys, true));
    });
}

/// Answers nothing before its disk is done, which it never is.
struct Stalled(Arc<Gate>);

impl Service for Stalled {
    async fn answer(&self, _: &str, _: &[&[u8]]) -> Result<Answer, Error> {
        Ok(().into())
    }

    fn held(&self, _: &str, _: &[&[u8]]) -> Option<Reached> {
        self.0.reached(1)
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_a_disk_never_lets_go_does_not_keep_its_connection() {
    let stalled = Stalled(Arc::default());
    let (mut gone, far) = tokio::io::duplex(1 << 10);
    let (mut waits, other) = tokio::io::duplex(1 << 10);
    let incoming = [far, other].map(|far| Ok(connected(Box::new(far))));
    let talk = async {
        gone.write_all(&[0x94, 0, 1, 0xa0, 0x90]).await.unwrap();
        gone.shutdown().await.unwrap();
        waits.write_all(&[0x94, 0, 1, 0xa0, 0x90]).await.unwrap();
        let mut answers = Vec::new();
        gone.read_to_end(&mut answers).await.unwrap();
        waits.read_to_end(&mut answers).await.unwrap();
        answers
    };
    let late = async {
        loop {
            tokio::time::sleep(HEDGE).await;
            stalled.0.wake();
        }
    };
    let limits = Limits::default();
    tokio::select! {
        () = rpc::serve(stream::iter(incoming), &stalled, || limits, CancellationToken::new()) => panic!("it serves on"),
        () = late => {}
        answers = tokio::time::timeout(Duration::from_secs(60), talk) => assert_eq!(answers.unwrap(), b""),
    }
}

#[test]
fn pages_are_small_at_first_and_grow_while_they_come_quickly() {
    let cluster = Cluster::running(&["solo"]);
    block_on(async {
        let client = cluster.client();
        for n in 0..2_000 {
            client
                .set(format!("key{n}").as_bytes(), &Packed::of(n))
                .await
                .unwrap();
        }
        let (mut scan, mut counts) = (Scan::new(&client.replicas, 0, 0).unwrap(), Vec::new());
        while let Some(page) = scan.page().await.unwrap() {
            counts.push(entries(&page).unwrap().len());
        }
        assert!(counts[0] < 50, "{counts:?}");
        assert!(
            counts.iter().any(|count| *count > 5 * counts[0]),
            "{counts:?}"
        );
        assert_eq!(counts.iter().sum::<usize>(), 2_000);
    });
}

#[test]
fn a_peer_is_given_up_when_no_byte_came_for_a_window_and_not_while_bytes_come() {
    let patience = Duration::from_secs(1);
    let (node, _) = pretend(|mut stream, _| {
        let question = hear(&mut stream);
        for byte in answer(&question).chunks(1) {
            thread::sleep(Duration::from_millis(200)); // nine bytes, more than a window in all
            stream.write_all(byte).unwrap();
        }
        hear(&mut stream); // and no word more
        thread::sleep(Duration::from_secs(10));
    });
    block_on(async {
        let peer = Peer::new(&node, patience, tcp());
        let asked = Instant::now();
        peer.call("status", &[]).await.1.unwrap();
        assert!(asked.elapsed() > patience, "{:?}", asked.elapsed());
        let asked = Instant::now();
        let error = peer.call("status", &[]).await.1.unwrap_err();
        assert_eq!(error.kind, Kind::UnknownOutcome, "{error}");
        assert!(error.why.contains("no answer in time"), "{error}");
        let waited = asked.elapsed();
        assert!(waited >= patience && waited < 4 * patience, "{waited:?}");
        // Whoever cannot wait so long for bytes that come slowly has a bound of its own.
        let peer = Peer::new(&node, patience, tcp());
        let error = peer.ask("status", &[]).await.unwrap_err();
        assert_eq!(error.kind, Kind::UnknownOutcome, "{error}");
    });
}

#[test]
fn answers_that_arrive_together_are_told_apart() {
    let (node, _) = pretend(|mut stream, _| {
        let mut questions = Vec::new();
        while questions.len() < 30 {
            questions.extend(hear(&mut stream)); // two, of 15 bytes each
        }
        let answers = questions.chunks(15).map(answer);
        stream
            .write_all(&answers.collect::<Vec<_>>().concat())
            .unwrap();
        hear(&mut stream);
    });
    block_on(async {
        let peer = Peer::new(&node, Duration::from_secs(5), tcp());
        let calls = [peer.call("status", &[]), peer.call("status", &[])];
        for call in calls {
            assert_eq!(call.await.1.unwrap().as_slice(), NIL);
        }
    });
}

#[test]
fn a_connection_that_fell_silent_is_replaced_and_what_was_asked_on_it_may_still_be_answered() {
    let (release, released) = mpsc::channel();
    let released = std::sync::Mutex::new(released);
    let (node, dials) = pretend(move |mut stream, number| {
        let question = hear(&mut stream);
        stream.write_all(&answer(&question)).unwrap();
        let question = hear(&mut stream);
        if number == 0 {
            released.lock().unwrap().recv().unwrap(); // the cut
        }
        let _ = stream.write_all(&answer(&question));
        hear(&mut stream);
    });
    block_on(async {
        let peer = Peer::new(&node, Duration::from_secs(20), tcp());
        peer.call("status", &[]).await.1.unwrap();
        let asked = Instant::now();
        let lost = peer.call("status", &[]);
        while dials.load(Relaxed) < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let noticed = asked.elapsed();
        let moment = Duration::from_millis(50); // until the dial has ended, the old one is asked
        while peer.call("status", &[]).within(moment).await.is_err() {}
        println!(
            "dialled after {noticed:.0?}, answered after {:.0?}",
            asked.elapsed()
        );
        assert!(noticed > Duration::from_millis(240) && noticed < Duration::from_secs(2));
        assert!(
            asked.elapsed() < Duration::from_secs(3),
            "{:?}",
            asked.elapsed()
        );
        release.send(()).unwrap();
        lost.await.1.unwrap();
        assert_eq!(dials.load(Relaxed), 2);
    });
}

#[test]
fn a_node_that_moves_while_its_old_address_is_dialled_afresh_stays_at_the_new_one() {
    let (old, old_dials) = pretend(|mut stream, _| {
        let question = hear(&mut stream);
        stream.write_all(&answer(&question)).unwrap();
        hear(&mut stream); // and silence
        thread::sleep(Duration::from_secs(10));
    });
    let (new, new_dials) = pretend(|mut stream, _| {
        let question = hear(&mut stream);
        stream.write_all(&answer(&question)).unwrap();
        thread::sleep(Duration::from_secs(10));
    });
    let moving = Arc::new(Mutex::new(None::<Peer>));
    let (mover, tcp, number) = (moving.clone(), tcp(), AtomicUsize::new(0));
    let dial: Dial = Arc::new(move |node| {
        let (dialled, mover, new) = (tcp(node), mover.clone(), new.address.clone());
        let is_fresh = number.fetch_add(1, Relaxed) == 1;
        Box::pin(async move {
            let stream = dialled.await;
            if is_fresh {
                mover.lock().unwrap().as_ref().unwrap().move_to(&new);
            }
            stream
        })
    });
    block_on(async {
        let asked = Peer::new(&old, Duration::from_secs(3), dial);
        *moving.lock().unwrap() = Some(asked.clone());
        asked.call("status", &[]).await.1.unwrap();
        asked.call("status", &[]).await.1.unwrap_err();
        assert_eq!(
            old_dials.load(Relaxed),
            2,
            "the second one beside the first"
        );
        asked.call("status", &[]).await.1.unwrap();
        assert_eq!((old_dials.load(Relaxed), new_dials.load(Relaxed)), (2, 1));
    });
}

#[test]
fn a_dial_that_takes_too_long_has_sent_nothing_however_late_it_began() {
    let dial: Dial = Arc::new(|_| Box::pin(std::future::pending()));
    block_on(async {
        let peer = Peer::new(&nowhere(), Duration::from_millis(100), dial);
        let call = peer.call("set", &[]);
        thread::sleep(Duration::from_millis(80)); // no task runs meanwhile
        let error = call.await.1.unwrap_err();
        assert_eq!(error.kind, Kind::Unavailable, "{error}");
    });
}

#[test]
fn a_call_is_answered_also_if_its_runtime_ends_before_the_dial_begins() {
    let peer = Peer::new(&nowhere(), Duration::from_millis(100), tcp());
    let mut call = None;
    block_on(async { call = Some(peer.call("status", &[])) });
    let bound = Duration::from_secs(5);
    let answer = block_on(async { tokio::time::timeout(bound, call.unwrap()).await });
    let error = answer.unwrap().1.unwrap_err();
    assert!(error.why.contains("is gone"), "{error}");
}

#[test]
fn a_process_that_is_stopped_is_not_stormed_with_dials() {
    let (node, dials) = pretend(|mut stream, _| {
        hear(&mut stream);
        thread::sleep(Duration::from_secs(10)); // the kernel accepts, nobody answers
    });
    block_on(async {
        let peer = Peer::new(&node, Duration::from_millis(700), tcp());
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(2) {
            peer.call("status", &[]).await.1.unwrap_err();
        }
        let dials = dials.load(Relaxed);
        assert!(dials <= 4, "{dials} dials in two seconds");
    });
}

#[test]
fn a_dial_whose_first_packet_was_lost_is_begun_again_beside_it() {
    block_on(async {
        let (tries, begun) = (AtomicUsize::new(0), Instant::now());
        let dialled = insist(async || match tries.fetch_add(1, Relaxed) {
            0 => std::future::pending().await,
            n => io::Result::Ok(n),
        });
        assert_eq!(dialled.await.unwrap(), 1);
        assert!(
            begun.elapsed() < Duration::from_millis(900),
            "{:?}",
            begun.elapsed()
        );
        let refused =
            insist(async || io::Result::<()>::Err(io::ErrorKind::ConnectionRefused.into()));
        assert_eq!(
            refused.await.unwrap_err().kind(),
            io::ErrorKind::ConnectionRefused
        );
    });
}

#[test]
fn a_name_whose_first_address_is_silent_is_reached_at_its_second() {
    let silent = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    let any: std::net::SocketAddr = "127.0.0.1:0".parse().unwrap();
    silent.bind(&any.into()).unwrap();
    silent.listen(0).unwrap();
    let silent_at = silent.local_addr().unwrap().as_socket().unwrap();
    let mut filling = Vec::new(); // the queue of those that nobody accepts
    while let Ok(one) = TcpStream::connect_timeout(&silent_at, Duration::from_millis(200)) {
        filling.push(one);
    }
    let there = TcpListener::bind(any).unwrap();
    let (there_at, begun) = (there.local_addr().unwrap(), Instant::now());
    let reached = block_on(rpc::reach(vec![silent_at, there_at])).unwrap();
    assert_eq!(reached.peer_addr().unwrap(), there_at);
    assert!(
        begun.elapsed() < Duration::from_millis(900),
        "{:?}",
        begun.elapsed()
    );
}

/// A node's address behind a link that carries so many bytes in a second towards the dialler, on
/// each connection.
fn slow_link(behind: &str, rate: u32) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, behind) = (
        listener.local_addr().unwrap().to_string(),
        behind.to_owned(),
    );
    thread::spawn(move || {
        for near in listener.incoming() {
            let Ok(far) = TcpStream::connect(&behind) else {
                continue;
            };
            let near = near.unwrap();
            let (mut up, mut to_far) = (near.try_clone().unwrap(), far.try_clone().unwrap());
            thread::spawn(move || io::copy(&mut up, &mut to_far));
            thread::spawn(move || carry_slowly(far, near, rate));
        }
    });
    address
}

fn carry_slowly(mut from: TcpStream, mut to: TcpStream, rate: u32) {
    let mut packet = vec![0; (rate as usize / 20).min(1_448)]; // at least twenty packets a second
    while let Ok(count @ 1..) = from.read(&mut packet) {
        thread::sleep(Duration::from_secs(1) * u32::try_from(count).unwrap() / rate);
        if to.write_all(&packet[..count]).is_err() {
            break;
        }
    }
}

/// A node that does as it is told with each connection, and how many there were.
fn pretend(talk: impl Fn(TcpStream, usize) + Send + Sync + 'static) -> (Node, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (talk, dials) = (Arc::new(talk), Arc::new(AtomicUsize::new(0)));
    let counted = dials.clone();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (talk, number) = (talk.clone(), counted.fetch_add(1, Relaxed));
            thread::spawn(move || talk(stream.unwrap(), number));
        }
    });
    let name = "pretender".to_owned();
    (Node { name, address }, dials)
}

/// A node at a port where none listens.
fn nowhere() -> Node {
    let [name, address] = ["nowhere", "127.0.0.1:1"].map(str::to_owned);
    Node { name, address }
}

/// The bytes of the next question.
fn hear(stream: &mut TcpStream) -> Vec<u8> {
    let mut question = vec![0; 1_024];
    let count = stream.read(&mut question).unwrap_or(0);
    question.truncate(count);
    question
}

/// `[1, msgid, nil, nil]`
fn answer(question: &[u8]) -> Vec<u8> {
    let msgid = question.get(2..7).unwrap_or(&[0xc0]);
    [&[0x94, 0x01], msgid, &[0xc0, 0xc0]].concat()
}

/// A part of a program may ask a ring for a while: what it has dialled does not stay open for ever.
#[test]
fn the_connection_of_a_peer_that_is_let_go_is_closed_when_all_is_answered() {
    let (ended, end) = mpsc::channel();
    let ended = Mutex::new(ended);
    let (node, dials) = pretend(move |mut stream, _| {
        let mut question = hear(&mut stream);
        while !question.is_empty() {
            thread::sleep(Duration::from_millis(50));
            stream.write_all(&answer(&question)).unwrap();
            question = hear(&mut stream);
        }
        ended.lock().unwrap().send(()).unwrap();
    });
    block_on(async {
        let peer = Peer::new(&node, Duration::from_secs(5), tcp());
        let is_open = || end.recv_timeout(Duration::from_millis(100)).is_err();
        peer.call("status", &[]).await.1.unwrap();
        drop(peer.clone());
        tokio::task::yield_now().await;
        assert!(is_open(), "another handle is left");
        let last = peer.call("status", &[]);
        drop(peer);
        last.await.1.unwrap();
        let closed = async || {
            while is_open() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), closed())
            .await
            .unwrap();
    });
    assert_eq!(dials.load(Relaxed), 1);
}

/// All connections of a thread are in one task, which may read and write so often before others have their turn.
#[test]
fn of_many_busy_connections_each_is_answered_as_often_as_the_others() {
    const CONNECTIONS: usize = 200;
    let mut cluster = Cluster::with_limits(&["alice"], "threads = 1");
    cluster.start_all();
    let answered: Vec<_> = (0..CONNECTIONS).map(|_| AtomicUsize::new(0)).collect();
    let all = Barrier::new(CONNECTIONS);
    let total = || {
        answered
            .iter()
            .map(|count| count.load(Relaxed))
            .sum::<usize>()
    };
    thread::scope(|scope| {
        for count in &answered {
            let mut wire = Wire::to(&cluster, "alice");
            let all = &all;
            scope.spawn(move || {
                all.wait();
                while total() < 50 * CONNECTIONS {
                    wire.does("get", ["tea".into()]);
                    count.fetch_add(1, Relaxed);
                }
            });
        }
    });
    let counts = answered.iter().map(|count| count.load(Relaxed));
    let (fewest, most) = (counts.clone().min().unwrap(), counts.max().unwrap());
    assert!(fewest >= 10, "from {fewest} to {most} answers");
}

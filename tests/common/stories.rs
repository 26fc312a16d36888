//! Stories of accidents at just the wrong moments, which no run of a seed meets by chance. Three real
//! nodes play them over a simulated network, with real clients; of a swap that is slow or dies, the
//! story sends the messages itself. All three keep the one key, `tea`. Each story passes, and fails with
//! the bugs that it is told for.

#![allow(dead_code)]

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;

use kv54::beyond::rings::Driver;
use kv54::beyond::swap::Swapped;
use kv54::client::Client;
use kv54::cluster::{Cluster, Told};
use kv54::entry::{Entry, Packed, Stamp, loaded};
use kv54::error::Error;
use kv54::replicas::{Replicas, Source};
use kv54::rpc::codec::{Encoded, encode};
use kv54::store::Store;
use msgpack_rpc::Value;
use tokio::sync::Notify;
use tokio::time::sleep;
use turmoil::Builder;

use crate::world::{NAMES, PATIENCE, TICK, WINDOW, dial, file_of, serve};

const TEA: &[u8] = b"tea";
const ALL: [&str; 3] = [ALICE, BOB, CAROL];
const ALICE: &str = NAMES[0];
const BOB: &str = NAMES[1];
const CAROL: &str = NAMES[2];
/// Above the ballots of the clients' swaps, which begin low.
const HIGH: u64 = 1 << 32;

/// What the two who play a story share with the one who can restart a node.
#[derive(Default)]
struct Stage {
    restarts: RefCell<Option<&'static str>>,
    has_begun: Notify, // the late set
    is_over: Notify,
    was_answered: Cell<bool>,
}

/// Plays a story, and beside it, on a host of its own, what somebody does who is `late`.
fn play<S, L>(
    story: impl FnOnce(Rc<Stage>) -> S,
    late: impl FnOnce(Rc<Stage>) -> L,
) -> Result<(), String>
where
    S: Future<Output = turmoil::Result> + 'static,
    L: Future<Output = turmoil::Result> + 'static,
{
    fastrand::seed(54);
    let mut sim = Builder::new()
        .rng_seed(54)
        .simulation_duration(2 * PATIENCE)
        .build();
    for (place, name) in ALL.into_iter().enumerate() {
        sim.host(name, move || serve(Arc::new(Store::new(file(), place))));
    }
    let stage = Rc::new(Stage::default());
    let (story, late) = (story(stage.clone()), late(stage.clone()));
    sim.client("story", async {
        for name in ALL {
            until_ready(name).await;
        }
        story.await
    });
    sim.client("late", late);
    while !sim.step().map_err(|error| error.to_string())? {
        if let Some(name) = stage.restarts.take() {
            sim.bounce(name);
        }
    }
    Ok(())
}

async fn nobody(_: Rc<Stage>) -> turmoil::Result {
    Ok(())
}

fn file() -> Arc<Cluster> {
    file_of(&ALL, &[])
}

/// A client that has no connections yet, and knows nothing.
fn client() -> Client {
    Client {
        replicas: Replicas::new(file(), PATIENCE, &dial()),
    }
}

/// From now on this one reaches these nodes alone.
fn reach(who: &str, names: &[&str]) {
    for name in ALL {
        match names.contains(&name) {
            true => turmoil::repair(who, name),
            false => turmoil::partition(who, name),
        }
    }
}

/// Restarts a node, until it has forgotten all.
async fn restart(stage: &Stage, name: &'static str) {
    stage.restarts.replace(Some(name));
    while load(name).await.is_ok() {
        sleep(TICK).await;
    }
}

async fn until_ready(name: &str) {
    let client = client();
    let place = file().place(name).unwrap();
    let is_joining = async || {
        let status = client.replicas.status(place).await;
        status.is_ok_and(|status| status.state == "ready")
    };
    while !is_joining().await {
        sleep(TICK).await;
    }
}

/// One node as a replica, on one of the rings that this client knows.
fn node(client: &Client, ring: usize, name: &str) -> Result<Source, Error> {
    let place = file().place(name).unwrap();
    client.replicas.source(ring, place)
}

/// The first message of a swap to a node.
async fn promise(node: Source, ballot: u64) -> Result<Encoded, Error> {
    let key = encode(&"tea".into());
    node.ask("promise", &[&key, &encode(&ballot.into())]).await
}

/// The second one, or that of a set.
async fn store(node: Source, stamp: Stamp, value: &str) -> Result<Encoded, Error> {
    let (key, value, [begin, end]) = (encode(&"tea".into()), encode(&value.into()), stamp.around());
    node.ask("store", &[&key, &[&*begin, &*value, &*end].concat()])
        .await
}

/// What a node has.
async fn load(name: &str) -> Result<Entry<Option<Packed>>, Error> {
    let client = client();
    loaded(
        &node(&client, 0, name)?
            .ask("load", &[&encode(&"tea".into())])
            .await?,
    )
}

/// Has all three nodes have this, and nothing newer; its stamp.
async fn all_have(value: impl Into<Value>) -> Result<Stamp, Error> {
    client().set(TEA, &Packed::of(value)).await?;
    until_equal().await
}

/// Waits until all three nodes have the same; its stamp.
async fn until_equal() -> Result<Stamp, Error> {
    loop {
        let [one, two, three] = [load(ALICE).await?, load(BOB).await?, load(CAROL).await?];
        if one == two && two == three {
            return Ok(one.stamp);
        }
        sleep(TICK).await;
    }
}

/// What a client reads that reaches these nodes alone.
async fn read(names: &[&str]) -> Result<Packed, Error> {
    reach("story", names);
    let read = client().get(TEA).await;
    reach("story", &ALL);
    read
}

fn expect(what: &str, found: &Packed, expected: impl Into<Value>) -> turmoil::Result {
    let (found, expected) = (found.value()?, expected.into());
    match found == expected {
        true => Ok(()),
        false => Err(format!("tea is {found}, and not {expected}: {what}").into()),
    }
}

/// Has the ring begin to change to the same names, until every node knows it; who drives it.
async fn begin_change() -> Result<Client, Error> {
    let driving = client();
    driving.replicas.exchange_all().await;
    let changing = driving.replicas.state().changing_to(file());
    driving.replicas.hear(&Told::of(&changing, true))?;
    let is_behind = |told: &Result<Told, _>| told.as_ref().map_or(true, |told| told.step != 1);
    let mut told = driving.replicas.exchange_all().await;
    while told.iter().any(|(_, told)| is_behind(told)) {
        sleep(TICK).await;
        told = driving.replicas.exchange_all().await;
    }
    Ok(driving)
}

async fn end_change(driving: &Client) -> Result<(), Error> {
    let driver = Driver {
        client: driving,
        file: &file(),
        again: true,
        progress: &|_| {},
    };
    driver.carry_out(&driver.plan().await?).await
}

/// A set that reaches alice at once, and the others when somebody lets it.
async fn late_set(stage: Rc<Stage>) -> turmoil::Result {
    until_ready(CAROL).await;
    let client = client();
    let set = client.replicas.of(TEA)?;
    let green = Packed::of("green");
    let stamp = set.load_stamp(&green).await?;
    reach("late", &[ALICE]);
    stage.has_begun.notify_one();
    let stored = set.store(stamp.newer(&*green)).await;
    stage.was_answered.set(stored.is_ok());
    stage.is_over.notify_one();
    Ok(())
}

/// It is at alice before this returns.
async fn until_late_set_begins(stage: &Stage) -> Result<(), Error> {
    stage.has_begun.notified().await;
    while load(ALICE).await?.stamp == Stamp::default() {
        sleep(TICK).await;
    }
    Ok(())
}

/// The key of a late set is deleted; the ring begins to change; the set reaches the other nodes, and
/// the change ends. The key must stay deleted, though its tombstone stays behind.
pub fn deleted_before_a_change() -> Result<(), String> {
    let story = |stage: Rc<Stage>| async move {
        until_late_set_begins(&stage).await?;
        client().set(TEA, &Packed::of("white")).await?; // so the delete is later than the late set
        client().delete(TEA).await?;
        let driving = begin_change().await?;
        reach("late", &ALL);
        stage.is_over.notified().await;
        end_change(&driving).await?;
        expect("it was deleted", &read(&ALL).await?, Value::Nil)
    };
    play(story, late_set)
}

/// While the ring changes, a swap finds nothing, since it does not reach alice. The late set, which
/// reaches all then, must not be answered: nobody will ever read it.
pub fn hidden_by_a_swap() -> Result<(), String> {
    let story = |stage: Rc<Stage>| async move {
        until_late_set_begins(&stage).await?;
        begin_change().await?;
        reach("story", &[BOB, CAROL]);
        client().swap(TEA, |_| Some(Packed::of("black"))).await?;
        reach("late", &ALL);
        stage.is_over.notified().await;
        match stage.was_answered.get() {
            true => expect("a set of it was answered last", &read(&ALL).await?, "green"),
            false => Ok(()),
        }
    };
    play(story, late_set)
}

/// Carol promises something to a swap, and restarts; another swap goes by alice and carol alone; what
/// the first one has sent arrives. Had carol not kept her promise, it would hide the second one.
pub fn promised_before_a_restart() -> Result<(), String> {
    let story = |stage: Rc<Stage>| async move {
        let (green, slow) = (all_have("green").await?, client());
        for name in [BOB, CAROL] {
            promise(node(&slow, 0, name)?, HIGH).await?;
        }
        restart(&stage, CAROL).await;
        reach("story", &[ALICE, CAROL]);
        client().swap(TEA, |_| Some(Packed::of("black"))).await?;
        reach("story", &ALL);
        for name in [ALICE, BOB] {
            let _ = store(node(&client(), 0, name)?, green.swapped(HIGH), "white").await;
        }
        expect("a swap made it", &read(&ALL).await?, "black")
    };
    play(story, nobody)
}

/// A swap has reached bob alone. Carol takes over what bob has, and it is read. Now what another swap
/// has sent arrives, to which the others have promised more: it must not hide what was read.
async fn copied(stage: Rc<Stage>, restarts: bool) -> turmoil::Result {
    let (green, slow) = (all_have("green").await?, client());
    store(node(&slow, 0, BOB)?, green.swapped(1), "white").await?;
    for name in [ALICE, CAROL] {
        promise(node(&slow, 0, name)?, HIGH).await?;
    }
    if restarts {
        restart(&stage, CAROL).await;
        until_ready(CAROL).await;
    } else {
        until_equal().await?;
    }
    expect("carol took it over", &read(&[BOB, CAROL]).await?, "white")?;
    for name in [ALICE, BOB] {
        let _ = store(node(&client(), 0, name)?, green.swapped(HIGH), "black").await;
    }
    expect("it was read before", &read(&ALL).await?, "white")
}

/// Carol takes it over since she has restarted.
pub fn copied_after_a_restart() -> Result<(), String> {
    play(|stage| copied(stage, true), nobody)
}

/// Carol takes it over since she compares what she has with bob.
pub fn copied_by_repair() -> Result<(), String> {
    play(|stage| copied(stage, false), nobody)
}

/// Waits until alice has something newer, and nobody else; from then on bob and carol are reached.
async fn until_alice_alone_has_it(before: Stamp) -> Result<(), Error> {
    while load(ALICE).await?.stamp <= before {
        sleep(TICK).await;
    }
    reach("story", &[BOB, CAROL]);
    Ok(())
}

/// A swap adds one. What it sends reaches alice alone; then it begins again with bob and carol, but
/// nothing that it sends arrives; then it reaches alice and bob, and finds what it has sent first.
pub fn found_again() -> Result<(), String> {
    let story = |_| async {
        let zero = all_have(0).await?;
        let again = Arc::new(Notify::new());
        let mut reached = [&[ALICE][..], &[], &ALL].into_iter();
        let count = |old: &Packed| {
            reach("story", reached.next().unwrap_or(&ALL));
            if reached.len() == 1 {
                again.notify_one();
            }
            Some(Packed::of(old.value().ok()?.as_u64()? + 1))
        };
        let network = async {
            until_alice_alone_has_it(zero).await?;
            again.notified().await;
            sleep(WINDOW).await; // what was sent is lost
            reach("story", &[ALICE, BOB]);
            Ok(())
        };
        let client = client();
        tokio::try_join!(client.swap(TEA, count), network)?;
        expect("one was added", &read(&ALL).await?, 1)
    };
    play(story, nobody)
}

/// A swap wants black instead of white, and finds white at alice, where another one has left it. What it
/// sends reaches alice alone. It begins again with bob and carol, and answers that it was green.
pub fn not_after_all() -> Result<(), String> {
    let story = |_| async {
        let (green, dead) = (all_have("green").await?, client());
        let white = green.swapped(1);
        store(node(&dead, 0, ALICE)?, white, "white").await?;
        reach("story", &[ALICE, BOB]);
        let swap = |old: &Packed| {
            (*old == Packed::of("white")).then(|| {
                reach("story", &[ALICE]);
                Packed::of("black")
            })
        };
        let client = client();
        match tokio::try_join!(client.swap(TEA, swap), until_alice_alone_has_it(white))? {
            (Swapped::Not(tea), ()) => expect("carol and bob have it", &tea, "green")?,
            (Swapped::Done(tea), ()) => expect("white was not there", &tea, "green")?,
        }
        expect("it was not swapped", &read(&[ALICE, BOB]).await?, "green")
    };
    play(story, nobody)
}

/// While the ring changes, somebody takes a tombstone to alice's part of the new ring. A swap that does
/// not reach alice then finds nothing; what it makes must be newer than the tombstone.
pub fn nothing_to_build_on() -> Result<(), String> {
    let story = |_| async {
        all_have("green").await?;
        client().delete(TEA).await?;
        let tombstone = until_equal().await?;
        let driving = begin_change().await?;
        let nil = [&*tombstone.begin(3), &[0xc0]].concat();
        let alice = node(&driving, 1, ALICE)?;
        alice.ask("store", &[&encode(&"tea".into()), &nil]).await?;
        end_change(&driving).await?;
        reach("story", &[BOB, CAROL]);
        client().swap(TEA, |_| Some(Packed::of("black"))).await?;
        expect("a swap made it", &read(&[ALICE, BOB]).await?, "black")
    };
    play(story, nobody)
}

/// An unfinished set lies at carol alone. While the ring changes, a swap has the promises of alice and
/// bob, who have nothing; the set is read at carol; then what the swap has made of nothing arrives.
pub fn read_before_a_swap() -> Result<(), String> {
    let story = |_| async {
        let set = Stamp::default().newer(()).stamp;
        store(node(&client(), 0, CAROL)?, set, "green").await?;
        let slow = begin_change().await?;
        for (ring, name) in [(0, ALICE), (0, BOB), (1, ALICE), (1, BOB)] {
            promise(node(&slow, ring, name)?, HIGH).await?;
        }
        expect("it was set", &read(&[ALICE, CAROL]).await?, "green")?;
        let made = Stamp::nothing(1).swapped(HIGH);
        for (ring, name) in [(0, ALICE), (0, BOB), (1, ALICE), (1, BOB)] {
            let _ = store(node(&slow, ring, name)?, made, "black").await;
        }
        expect("it was read before", &read(&ALL).await?, "green")
    };
    play(story, nobody)
}

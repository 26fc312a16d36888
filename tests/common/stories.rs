//! Stories of accidents at just the wrong moments, which hardly a seed meets by chance. Real nodes and
//! clients play them over a simulated network; what a swap sends that is slow or dies, the story sends
//! itself. All nodes of a ring keep all keys, of which most stories know one, `tea`. `tests/sabotage.rs` knows the
//! bug that each shows.

#![allow(dead_code)]

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use fastrand::Rng;
use kv54::beyond::rings::Driver;
use kv54::beyond::swap::Swapped;
use kv54::client::Client;
use kv54::cluster::{Cluster, State, Told};
use kv54::entry::{Entry, Packed, Stamp, loaded};
use kv54::error::Error;
use kv54::replicas::{Replicas, Source};
use kv54::rpc::codec::{Encoded, encode};
use kv54::rpc::{Connection, Dial, Peer};
use kv54::store::Store;
use msgpack_rpc::Value;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::io::InspectWriter;
use turmoil::Builder;

use crate::ram::Ram;
use crate::world::{NAMES, PATIENCE, TICK, WINDOW, dial, file_of, serve, serve_first};

const TEA: &[u8] = b"tea";
const ALL: [&str; 3] = [ALICE, BOB, CAROL];
const ALICE: &str = NAMES[0];
const BOB: &str = NAMES[1];
const CAROL: &str = NAMES[2];
/// These come with another ring, if one does.
const NEW: [&str; 2] = [NAMES[3], NAMES[4]];
/// Above the ballots of the clients' swaps, which begin low.
const HIGH: u64 = 1 << 32;
/// So long a client tries before it says that an outcome is unknown.
const DOUBT: Duration = Duration::from_millis(600);

/// What the two who play a story share with the one who can restart a node.
#[derive(Default)]
struct Stage {
    restarts: RefCell<Vec<&'static str>>,
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
        .max_message_latency(WINDOW / 30)
        .build();
    for (file, names) in [(file(), &ALL[..]), (new_file(), &NEW)] {
        for name in names {
            let (file, place) = (file.clone(), file.place(name).unwrap());
            sim.host(*name, move || {
                serve(Arc::new(Store::new(file.clone(), place)))
            });
        }
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
        for name in stage.restarts.take() {
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

fn new_file() -> Arc<Cluster> {
    file_of(&NEW, &ALL)
}

/// A client that has no connections yet, and knows nothing.
fn client() -> Client {
    Client {
        replicas: Replicas::new(file(), PATIENCE, &dial()),
    }
}

/// From now on this one reaches these nodes alone.
fn reach(who: &str, names: &[&str]) {
    for name in ALL.into_iter().chain(NEW) {
        match names.contains(&name) {
            true => turmoil::repair(who, name),
            false => turmoil::partition(who, name),
        }
    }
}

/// Restarts a node, until it has forgotten all.
async fn restart(stage: &Stage, name: &'static str) {
    let asked = node(&client(), 0, name).unwrap();
    let life = async || asked.status().await.map(|status| status.start_id);
    let before = life().await.unwrap();
    stage.restarts.borrow_mut().push(name);
    while life().await.map_or(true, |now| now == before) {
        sleep(TICK).await;
    }
}

async fn until_ready(name: &str) {
    let client = client();
    let place = file().place(name).unwrap();
    let is_ready = async || {
        let status = client.replicas.status(place).await;
        status.is_ok_and(|status| status.state == "ready")
    };
    while !is_ready().await {
        sleep(TICK).await;
    }
}

/// One node as a replica, on one of the rings that this client knows.
fn node(client: &Client, ring: usize, name: &str) -> Result<Source, Error> {
    let place = file().place(name).unwrap();
    client.replicas.source(ring, place)
}

fn key() -> Vec<u8> {
    encode(&"tea".into())
}

/// The first message of a swap to a node.
async fn promise(node: Source, ballot: u64) -> Result<Encoded, Error> {
    node.ask("promise", &[&key(), &encode(&ballot.into())])
        .await
}

/// The second one, or that of a set.
async fn store(node: Source, stamp: Stamp, value: impl Into<Value>) -> Result<Encoded, Error> {
    let (value, (around, at)) = (encode(&value.into()), stamp.around());
    let (begin, end) = around.split_at(at);
    node.ask("store", &[&key(), &[begin, &value, end].concat()])
        .await
}

/// What a node has.
async fn load(name: &str) -> Result<Entry<Option<Packed>>, Error> {
    load_of(&client(), name).await
}

/// The same in the old ring, while this client knows that it changes.
async fn load_of(client: &Client, name: &str) -> Result<Entry<Option<Packed>>, Error> {
    let asked = node(client, 0, name)?;
    loaded(&asked.ask("load", &[&key()]).await?)
}

async fn until_it_has_some(client: &Client, name: &str) -> Result<(), Error> {
    while load_of(client, name).await?.stamp == Stamp::default() {
        sleep(TICK).await;
    }
    Ok(())
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

/// Has the ring begin to change to that of a file, until every node knows it; who drives it.
async fn begin_change(to: Arc<Cluster>) -> Result<Client, Error> {
    let driving = Client {
        replicas: Replicas::new(to.clone(), PATIENCE, &dial()),
    };
    driving.replicas.exchange_all().await;
    let state = driving.replicas.state();
    move_on(&driving, &state.changing_to(to)).await?;
    Ok(driving)
}

/// Has every node move on to this state.
async fn move_on(driving: &Client, state: &State) -> Result<(), Error> {
    driving.replicas.hear(&Told::of(state, true))?;
    let is_there = |told: &Result<Told, _>| told.as_ref().is_ok_and(|told| told.step == state.step);
    let is_asked = |name: &str| state.has(name);
    loop {
        let told = driving.replicas.exchange_all().await;
        let mut asked = told.iter().filter(|(node, _)| is_asked(&node.name));
        if asked.all(|(_, told)| is_there(told)) {
            return Ok(());
        }
        sleep(TICK).await;
    }
}

async fn end_change(driving: &Client) -> Result<(), Error> {
    let driver = Driver {
        client: driving,
        file: &file(),
        again: true,
        rest: 1,
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
    until_it_has_some(&client(), ALICE).await
}

/// Lets a late set reach all nodes, if it has not ended. If it was answered, it must be what is read.
async fn end_late_set(stage: &Stage) -> turmoil::Result {
    let all = [&ALL[..], &NEW].concat();
    reach("late", &all);
    stage.is_over.notified().await;
    match stage.was_answered.get() {
        true => expect("a set of it was answered", &read(&all).await?, "green"),
        false => Ok(()),
    }
}

/// A client that knows of a change, of which all nodes have forgotten everything.
async fn outlive_all(stage: &Stage) -> Result<Client, Error> {
    let driving = begin_change(file()).await?;
    end_change(&driving).await?;
    let client = Client {
        replicas: Replicas::new(file(), PATIENCE / 4, &dial()),
    };
    client.set(TEA, &Packed::of("black")).await?;
    stage.restarts.borrow_mut().extend(ALL);
    sleep(10 * WINDOW).await;
    Ok(client)
}

/// All nodes lose their memory at once, after a change: a client that lives on goes on with them.
pub fn all_memories_lost() -> Result<(), String> {
    play(
        async |stage| {
            let client = outlive_all(&stage).await?;
            let written = client.set(TEA, &Packed::of("black")).await;
            written.map_err(|error| format!("tea is not written any more: {error}").into())
        },
        nobody,
    )
}

/// The same client comes while the nodes change their ring for the first time since: they are a step behind it.
pub fn before_all_memories_were_lost() -> Result<(), String> {
    play(
        async |stage| {
            let client = outlive_all(&stage).await?;
            all_have("green").await?;
            let driving = begin_change(file()).await?;
            let _ = client.get(TEA).await;
            end_change(&driving).await?;
            expect("nothing was handed over", &read(&ALL).await?, "green")
        },
        nobody,
    )
}

/// Alice restarts in the middle of a late set. What she has kept before, and said so, does not count.
pub fn counted_before_a_restart() -> Result<(), String> {
    let story = |stage: Rc<Stage>| async move {
        until_late_set_begins(&stage).await?;
        reach("late", &[]);
        restart(&stage, ALICE).await;
        until_ready(ALICE).await;
        reach("late", &[BOB]);
        until_it_has_some(&client(), BOB).await?;
        sleep(WINDOW).await; // nobody else answers in this one
        match stage.was_answered.get() {
            true => expect(
                "a set of it was answered",
                &read(&[ALICE, CAROL]).await?,
                "green",
            ),
            false => end_late_set(&stage).await,
        }
    };
    play(story, late_set)
}

/// Alice and bob have a set of which carol has not heard. Bob restarts, and alice is not reached: what bob
/// says now does not count, until he has read what alice has.
pub fn answered_while_joining() -> Result<(), String> {
    let story = |stage: Rc<Stage>| async move {
        all_have("white").await?;
        reach("story", &[ALICE, BOB]);
        client().set(TEA, &Packed::of("green")).await?;
        restart(&stage, BOB).await;
        expect("it was set", &read(&[BOB, CAROL]).await?, "green")
    };
    play(story, nobody)
}

/// The same, and once bob has heard how the ring is he reaches carol alone: what she has is not enough.
pub fn read_from_one_neighbour() -> Result<(), String> {
    let story = |stage: Rc<Stage>| async move {
        all_have("white").await?;
        reach("story", &[ALICE, BOB]);
        client().set(TEA, &Packed::of("green")).await?;
        turmoil::partition(ALICE, CAROL);
        restart(&stage, BOB).await;
        sleep(WINDOW).await; // he reads nothing yet
        turmoil::partition(ALICE, BOB);
        let early = timeout(8 * WINDOW, read(&[BOB, CAROL])).await;
        if let Ok(Ok(tea)) = early {
            expect("alice has it", &tea, "green")?;
        }
        for name in [BOB, CAROL] {
            turmoil::repair(ALICE, name);
        }
        expect("it was set", &read(&[BOB, CAROL]).await?, "green")
    };
    play(story, nobody)
}

/// A set has reached bob when he restarts, and then alice, within its window: it is answered. What the others
/// have when he starts is not enough; what they have two windows later is.
pub fn set_before_a_restart() -> Result<(), String> {
    let story = |stage: Rc<Stage>| async move {
        let (black, begun) = (all_have("green").await?.newer(()).stamp, Instant::now());
        store(node(&client(), 0, BOB)?, black, "black").await?;
        restart(&stage, BOB).await;
        let _ = timeout_at(begun + WINDOW * 3 / 4, until_ready(BOB)).await;
        store(node(&client(), 0, ALICE)?, black, "black").await?;
        assert!(begun.elapsed() < WINDOW, "it would not be answered");
        expect("it was set", &read(&[BOB, CAROL]).await?, "black")
    };
    play(story, nobody)
}

/// The ring changes to other nodes. A late set reaches the old ring, after the hand-over; then the change
/// ends. It must not be answered: the new ring has never heard of it.
pub fn answered_after_a_change() -> Result<(), String> {
    let story = |stage: Rc<Stage>| async move {
        until_late_set_begins(&stage).await?;
        let driving = begin_change(new_file()).await?;
        reach("late", &ALL);
        until_it_has_some(&driving, BOB).await?;
        until_it_has_some(&driving, CAROL).await?;
        sleep(WINDOW).await; // it asks the new ring, too, and hears nothing
        let ended = driving.replicas.state().changed();
        move_on(&driving, &ended).await?;
        end_late_set(&stage).await
    };
    play(story, late_set)
}

/// The key of a late set is deleted; the ring begins to change; the set reaches the other nodes, and
/// the change ends. The key must stay deleted, though its tombstone stays behind.
pub fn deleted_before_a_change() -> Result<(), String> {
    let story = |stage: Rc<Stage>| async move {
        until_late_set_begins(&stage).await?;
        client().set(TEA, &Packed::of("white")).await?; // so the delete is later than the late set
        client().delete(TEA).await?;
        let driving = begin_change(file()).await?;
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
        begin_change(file()).await?;
        reach("story", &[BOB, CAROL]);
        client().swap(TEA, |_| Some(Packed::of("black"))).await?;
        end_late_set(&stage).await
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

/// A swap has reached alice alone, and its next attempt has died with the promises of the others. A get that
/// asks alice says how it has ended, and nothing else comes after that.
pub fn ended_by_a_get() -> Result<(), String> {
    let story = |_| async {
        let (green, dead) = (all_have("green").await?, client());
        store(node(&dead, 0, ALICE)?, green.swapped(1), "white").await?;
        for name in [BOB, CAROL] {
            promise(node(&dead, 0, name)?, HIGH).await?;
        }
        let seen = timeout(2 * WINDOW, read(&[ALICE, BOB])).await??.value()?; // long before they compare
        expect("it was read before", &read(&[BOB, CAROL]).await?, seen)
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
    let seen = read(&[BOB, CAROL]).await?.value()?; // one or the other
    for name in [ALICE, BOB] {
        let _ = store(node(&client(), 0, name)?, green.swapped(HIGH), "black").await;
    }
    expect("it was read before", &read(&ALL).await?, seen)
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

/// A delete that began during a change has reached the old ring alone when the change ends. A swap then
/// makes something of nothing. When the rest of the delete arrives, it must not hide that.
pub fn deleted_during_a_change() -> Result<(), String> {
    let story = |_| async {
        all_have("green").await?;
        let driving = begin_change(file()).await?;
        let deleted = Stamp::nothing(1).newer(()).stamp;
        for name in ALL {
            store(node(&driving, 0, name)?, deleted, Value::Nil).await?;
        }
        end_change(&driving).await?;
        let black = |old: &Packed| old.is_nil().then(|| Packed::of("black"));
        client().swap(TEA, black).await?;
        for name in ALL {
            store(node(&driving, 0, name)?, deleted, Value::Nil).await?;
        }
        expect("it was made of nil", &read(&ALL).await?, "black")
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
        let driving = begin_change(file()).await?;
        let nil = [&*tombstone.begin(3), &[0xc0]].concat();
        let alice = node(&driving, 1, ALICE)?;
        alice.ask("store", &[&key(), &nil]).await?;
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
        let slow = begin_change(file()).await?;
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

/// Plays a story with alice alone, who has a slow disk. To restart her is to cut her power.
fn play_alone<S>(story: impl FnOnce(Rc<Stage>) -> S) -> Result<(), String>
where
    S: Future<Output = turmoil::Result> + 'static,
{
    fastrand::seed(54);
    let mut sim = Builder::new()
        .rng_seed(54)
        .simulation_duration(2 * PATIENCE)
        .max_message_latency(WINDOW / 30)
        .build();
    let (disk, mut rng) = (Ram::slow(100, Rng::with_seed(54)), Rng::with_seed(54));
    let (hers, stage) = (disk.clone(), Rc::new(Stage::default()));
    sim.host(ALICE, move || {
        serve_first(hers.clone(), file_of(&[ALICE], &[]))
    });
    sim.client("story", story(stage.clone()));
    while !sim.step().map_err(|error| error.to_string())? {
        if !stage.restarts.take().is_empty() {
            sim.crash(ALICE);
            disk.cut(&mut rng);
            sim.bounce(ALICE);
        }
    }
    Ok(())
}

/// A client of the ring that is alice.
fn client_of_one() -> Client {
    Client {
        replicas: Replicas::new(file_of(&[ALICE], &[]), PATIENCE, &dial()),
    }
}

/// Cuts alice's power; then this must be what is there.
async fn cut_power(stage: &Stage, number: u64) -> turmoil::Result {
    stage.restarts.borrow_mut().push(ALICE);
    sleep(WINDOW).await;
    expect("it was answered", &client_of_one().get(TEA).await?, number)
}

/// Power is lost as soon as a set is answered, again and again.
pub fn set_before_a_power_cut() -> Result<(), String> {
    play_alone(async |stage| {
        for number in 0..40_u64 {
            client_of_one().set(TEA, &Packed::of(number)).await?;
            cut_power(&stage, number).await?;
        }
        Ok(())
    })
}

/// Power is lost as soon as somebody has read what somebody else is still writing.
pub fn read_before_a_power_cut() -> Result<(), String> {
    play_alone(async |stage| {
        for number in 0..40_u64 {
            let (writer, reader, new) = (client_of_one(), client_of_one(), Packed::of(number));
            let read = async {
                while reader.get(TEA).await? != new {
                    sleep(TICK).await;
                }
                Ok(())
            };
            let ended: Result<(), Error> = tokio::select! {
                biased;
                read = read => read,
                written = writer.set(TEA, &new) => written,
            };
            ended?;
            cut_power(&stage, number).await?;
        }
        Ok(())
    })
}

/// Alice's disk stalls while she keeps what was answered. Her guests need not wait for it: bob and carol have it.
pub fn stalled() -> Result<(), String> {
    // Bob answers before carol would be asked for his sake.
    let (quick, disk) = (Duration::from_millis(1), Ram::slow(1, Rng::with_seed(54)));
    let mut sim = Builder::new().max_message_latency(quick).build();
    let hers = disk.clone();
    sim.host(ALICE, move || serve_first(hers.clone(), file()));
    for name in [BOB, CAROL] {
        let place = file().place(name).unwrap();
        sim.host(name, move || serve(Arc::new(Store::new(file(), place))));
    }
    sim.client("story", async move {
        for name in ALL {
            until_ready(name).await;
        }
        all_have("black").await?;
        disk.stall(10_000);
        client().set(TEA, &Packed::of("green")).await?;
        sleep(WINDOW).await; // it is at alice too
        let alice = Peer::new(&file().nodes()[0], PATIENCE, dial());
        let asked = timeout(WINDOW, alice.ask("get", &[&key()])).await;
        let answer = asked.map_err(|_| "tea is with two of three, and alice waits for her disk")?;
        expect("it was answered", &Packed::from(&*answer?), "green")
    });
    sim.run().map_err(|error| error.to_string())
}

/// A client of whose swaps the first one is kept by one node alone, and the name of that.
fn unlucky() -> (Client, Arc<OnceLock<String>>) {
    let keeper = Arc::<OnceLock<String>>::default();
    let (told, dial) = (keeper.clone(), dial());
    let dial: Dial = Arc::new(move |node| {
        let (told, name, connecting) = (told.clone(), node.name.clone(), dial(node));
        let sent = move |bytes: &[u8]| {
            let is_store = bytes.windows(6).any(|bytes| bytes == b"\xa5store");
            if is_store && told.set(name.clone()).is_ok() {
                reach("story", &[&name]);
            }
        };
        Box::pin(async move {
            let stream = InspectWriter::new(connecting.await?, sent);
            Ok(Box::new(stream) as Box<dyn Connection>)
        })
    });
    let replicas = Replicas::new(file(), DOUBT, &dial);
    (Client { replicas }, keeper)
}

/// A task is put or taken, and what is to be kept for it reaches one node alone until the outcome is unknown. Then
/// this node and another one are reached, or both others. How often the task is taken, and how often it should be.
async fn task_in_doubt(takes: bool, finds_it: bool) -> Result<[usize; 2], Error> {
    let (queue, task) = (b"tasks", Packed::of("steep"));
    if takes {
        // By a set: after another swap, the first one may be refused, and asks the key's owner.
        let first = Value::from(vec![0.into(), 54.into(), Value::Nil, "steep".into()]);
        client().set(b"tasks:0", &Packed::of(first)).await?;
    }
    let (unlucky, keeper) = unlucky();
    let ended = async {
        match takes {
            true => unlucky.take_task(queue).await,
            false => unlucky.put_task(queue, &task).await.map(|()| None),
        }
    };
    let network = async {
        let keeper = loop {
            match keeper.get() {
                Some(keeper) => break keeper,
                None => sleep(TICK).await,
            }
        };
        sleep(DOUBT + WINDOW).await; // before the nodes compare what they have
        let others = ALL.into_iter().filter(|name| *name != keeper);
        let met = match finds_it {
            true => others.take(1).chain([&**keeper]).collect::<Vec<_>>(),
            false => others.collect(),
        };
        reach("story", &met);
    };
    let (ended, ()) = tokio::join!(ended, network);
    let expected = usize::from(takes || ended.is_ok());
    let mut times = ended.iter().flatten().count();
    while client().take_task(queue).await?.is_some() {
        times += 1;
    }
    reach("story", &ALL);
    Ok([times, expected])
}

/// Who puts or takes a task finds out what became of it, whoever can tell.
pub fn tasks_in_doubt() -> Result<(), String> {
    for (takes, finds_it) in [(false, false), (false, true), (true, false), (true, true)] {
        let story = move |_| async move {
            match task_in_doubt(takes, finds_it).await? {
                [taken, expected] if taken == expected => Ok(()),
                [taken, expected] => {
                    let what = if takes { "take" } else { "put" };
                    let why =
                        format!("{taken} tasks are taken, not {expected}: {what}, {finds_it}");
                    Err(why.into())
                }
            }
        };
        play(story, nobody)?;
    }
    Ok(())
}

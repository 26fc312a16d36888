//! Writes the fuzzers' first messages, as guests and nodes send them, and logs, as nodes leave them, into `fuzz/seeds`:
//!
//! `cargo run --manifest-path fuzz/Cargo.toml --example seeds`

#[path = "../../tests/common/ram.rs"]
mod ram;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kv54::beyond::log::Disk;
use kv54::beyond::log::files::Files as _;
use kv54::beyond::log::segment::SECTOR;
use kv54::cluster::{Cluster, State, Told};
use kv54::entry::{Entry, Packed, Stamp};
use kv54::error::{Error, Kind};
use kv54::rpc::codec::{NIL, decode, encode, write_request, write_response};
use kv54::store::{Prepare, Store};
use msgpack_rpc::Value;
use ram::Ram;

const NAMES: [&str; 5] = ["alice", "bob", "carol", "dave", "erin"];

fn main() -> std::io::Result<()> {
    let get = request("get", &["tea".into()]);
    let set = request("set", &["tea".into(), "green".into()]);
    let delete = request("delete", &["tea".into()]);
    let status = request("status", &[]);
    let notification = encode(&array([
        2.into(),
        "set".into(),
        array(["tea".into(), "green".into()]),
    ]));
    let nested = array([Value::Map(vec![(
        "cups".into(),
        array([1.into(), 2.5.into(), Value::Nil]),
    )])]);
    let nested = request("set", &["tea".into(), nested]);
    let bytes = Value::Binary(b"\x00\xff".to_vec());
    let odd = request("set", &[bytes, Value::Ext(5, vec![1, 2, 3])]);
    let shapeless = encode(&array([0.into(), 54.into(), "get".into(), "tea".into()]));
    let old = array([1.into(), 54.into(), "green".into()]);
    let mut answer = Vec::new();
    write_response(&mut answer, 54, &Ok(Packed::of(old.clone()).into()));
    let mut refusal = Vec::new();
    write_response(
        &mut refusal,
        54,
        &Err(Error::new(Kind::Joining, "waiting for bob")),
    );

    save("codec", "batch", &[&set, &get, &delete, &status])?;
    save("codec", "nested", &[&nested])?;
    save("codec", "bin-and-ext", &[&odd])?;
    save("codec", "notification", &[&notification, &get])?;
    save("codec", "shapeless", &[&shapeless, &get])?;
    save("codec", "answer", &[&answer])?;
    save("codec", "refusal", &[&refusal])?;
    save("codec", "too-large", &[&set[..12], b"\xdd\x00\x01\x00\x00"])?;

    let cas = |old: Value, new: Value| request("cas", &["tea".into(), old, new]);
    let swaps = [
        cas(Value::Nil, "green".into()),
        cas("green".into(), 53.into()),
        request("incr", &["tea".into()]),
        request("incr", &["tea".into(), (-1).into(), true.into()]),
        cas("green".into(), "black".into()),
        cas(53.into(), Value::Nil),
    ]
    .concat();

    save("request", "guest", &[&set, &get, &delete, &get])?;
    save("request", "swaps", &[&swaps, &set, &swaps, &delete, &swaps])?;
    save("request", "values", &[&nested, &odd, &get])?;
    save("request", "status", &[&status])?;
    save("request", "notification", &[&notification, &get])?;
    save("request", "shapeless", &[&shapeless, &get])?;
    for names in [&["alice"][..], &["alice", "bob", "carol"]] {
        let [load, store, promise, accept, scan] = neighbour(ring(names), &old);
        let name = format!("neighbour-of-{}", names.len());
        save("request", &name, &[&load, &store, &load, &scan, &get])?;
        let name = format!("swap-of-{}", names.len());
        save(
            "request",
            &name,
            &[&promise, &accept, &store, &promise, &scan, &swaps],
        )?;
    }
    resizes(&[&set, &get, &swaps, &delete], &old)?;
    logs()
}

/// What nodes leave on their disks.
fn logs() -> std::io::Result<()> {
    let bob = log_of(&["bob"], async |_, _| {});
    save("log", "of-bob", &[&short(&bob)])?;
    let fresh = log_of(&["alice", "bob", "carol"], async |_, _| {});
    save("log", "fresh", &[&short(&fresh)])?;
    let full = log_of(&["alice"], async |store, _| {
        keep(store, 0, 1, &encode(&"green".into()));
        store
            .at(0)
            .promise(b"coffee", Prepare::of(54))
            .expect("a promise");
        settled(store).await;
        keep(store, 0, 2, NIL);
    });
    save("log", "full", &[&short(&full)])?;
    let mut torn = log_of(&["alice"], async |store, _| {
        keep(store, 0, 1, &encode(&"green ".repeat(200).into()));
    });
    let bytes = torn.read("1.base")?;
    let last = used(&bytes).div_ceil(SECTOR) - 1;
    torn.write("1.base", (last - 1) * SECTOR, &[0; SECTOR])?;
    save("log", "torn", &[&short(&torn)])?;
    let worn = log_of(&["alice"], async |store, disk| {
        for counter in 1.. {
            keep(store, 0, counter, &encode(&"green ".repeat(200).into()));
            settled(store).await;
            tokio::time::sleep(Duration::from_secs(1)).await;
            if is_based(disk) {
                break;
            }
        }
    });
    save("log", "worn", &[&short(&worn)])?;
    let resized = log_of(&["alice"], async |store, _| {
        let both = State::of(store.rings.known().file.clone());
        let both = both.changing_to(Arc::new(cluster(&["alice", "bob"])));
        keep(store, 0, 1, &encode(&"green".into()));
        store.hear(&Told::of(&both, true)).expect("a next state");
        keep(store, 1, 1 << 37, &encode(&"black".into())); // of the next epoch
        settled(store).await;
        let after = Told::of(&both.changed(), true);
        store.hear(&after).expect("a next state");
    });
    save("log", "resized", &[&short(&resized)])
}

/// The disk of the first of these nodes, who is ready, after a story.
fn log_of(names: &[&str], happens: impl AsyncFnOnce(&Store, &Ram)) -> Ram {
    let (ring, disk) = (
        Arc::new(cluster(names)),
        Ram::slow(1, fastrand::Rng::with_seed(54)),
    );
    let opened = Disk::open(ring, 0, || Ok(disk.clone()), 16 * 512);
    let (store, mut log) = opened.expect("an empty disk");
    store.heard_all();
    for (place, parts) in store.at(0).shared() {
        for part in parts {
            store.at(0).mark_read(part, place);
        }
    }
    store.at(0).mark_read(0, 0); // alone
    let told = async {
        settled(&store).await;
        happens(&store, &disk).await;
        settled(&store).await;
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build();
    runtime.expect("a runtime").block_on(async {
        tokio::select! {
            ended = log.write(&store) => panic!("{ended:?}"),
            () = told => {}
        }
    });
    disk
}

fn keep(store: &Store, ring: usize, counter: u64, value: &[u8]) {
    let stamp = Stamp::new(counter, 54, 0);
    let kept = store.at(ring).store(b"tea", Entry { stamp, value });
    kept.expect("it is taken");
}

async fn settled(store: &Store) {
    store.journal().expect("a disk").all_settled().await;
}

fn is_based(disk: &Ram) -> bool {
    let names = disk.list().expect("names");
    let is_base = |name: &String| name.split_once('.').is_some_and(|(_, kind)| kind == "base");
    names.iter().any(is_base) && !names.contains(&"1.base".to_owned())
}

/// How many bytes there are before the zeros at the end.
fn used(bytes: &[u8]) -> usize {
    let last = bytes.iter().rposition(|byte| *byte != 0);
    last.map_or(0, |last| last + 1)
}

/// The files of a disk as the target reads them: it makes the checksums, and adds the zeros.
fn short(disk: &Ram) -> Vec<u8> {
    let mut short = Vec::new();
    for name in disk.list().expect("names") {
        let (number, kind) = name.split_once('.').expect("a number and a kind");
        let kinds = ["base", "more", "log", "base.new", "more.new", "log.new"];
        let kind = kinds.iter().position(|known| *known == kind);
        let bytes = disk.read(&name).expect("a file");
        let count = used(&bytes).div_ceil(SECTOR);
        short.push(number.parse().expect("a small number"));
        short.push(u8::try_from(kind.expect("a kind")).expect("a few") | 12 << 4);
        short.push(u8::try_from(count).expect("a few"));
        for sector in bytes.chunks(SECTOR).take(count) {
            let length = used(sector);
            let (sealed, start) = if length > 0 { (1 << 15, 4) } else { (0, 0) };
            let length = u16::try_from(length - start).expect("a sector");
            short.extend((length | sealed).to_le_bytes());
            short.extend(&sector[start..start + usize::from(length)]);
        }
    }
    short
}

/// Rings that change, step by step: a far step would leave no meaning to what comes after it.
fn resizes(guest: &[&[u8]], entry: &Value) -> std::io::Result<()> {
    let asked = request("ring", &[]);
    for (from, to) in [(1, 1), (3, 2), (3, 3), (3, 5)] {
        let [from, to] = [from, to].map(|nodes| Arc::new(cluster(&NAMES[..nodes])));
        let both = State::of(from.clone()).changing_to(to.clone());
        let mut messages = vec![asked.clone(), guest.concat()];
        for state in [both.clone(), both.changed()] {
            messages.push(request("ring", &[told(&state)]));
            for ring in 0..state.rings().count() {
                messages.extend(neighbour(state.fingerprint(ring, "alice"), entry));
            }
            messages.push(guest.concat());
        }
        let messages: Vec<&[u8]> = messages.iter().map(Vec::as_slice).collect();
        let name = format!("resize-{}-to-{}", from.nodes().len(), to.nodes().len());
        save("request", &name, &messages)?;
    }
    Ok(())
}

/// What a node asks alice: everything that only nodes ask.
fn neighbour(ring: u32, entry: &Value) -> [Vec<u8>; 5] {
    let (ring, ballot) = (Value::from(ring), 54);
    let accepted = array([1.into(), 54.into(), "black".into(), ballot.into()]);
    [
        request(
            "load",
            &[
                ring.clone(),
                "tea".into(),
                array([Stamp::MAX.counter.into(), Stamp::MAX.writer.into()]),
            ],
        ),
        request("store", &[ring.clone(), "tea".into(), entry.clone()]),
        request("promise", &[ring.clone(), "tea".into(), ballot.into()]),
        request("store", &[ring.clone(), "tea".into(), accepted]),
        request("scan", &[ring, 0.into(), 0.into()]),
    ]
}

/// What alice wants to hear as `ring`, where the target `request` plays.
fn ring(names: &[&str]) -> u32 {
    cluster(names).fingerprint("alice")
}

fn cluster(names: &[&str]) -> Cluster {
    let nodes: Vec<String> = names
        .iter()
        .map(|name| format!("{name} = '{name}:54'"))
        .collect();
    let file = format!("limits.window = '50ms'\n[nodes]\n{}", nodes.join("\n"));
    Cluster::parse("cluster.toml".as_ref(), &file).expect("a ring")
}

/// What a client tells that knows of this state.
fn told(state: &State) -> Value {
    decode(&Told::of(state, true).packed()).expect("MessagePack")
}

fn request(method: &str, params: &[Value]) -> Vec<u8> {
    let encoded: Vec<Vec<u8>> = params.iter().map(encode).collect();
    let encoded: Vec<&[u8]> = encoded.iter().map(Vec::as_slice).collect();
    let mut bytes = Vec::new();
    let count = u8::try_from(encoded.len()).expect("a few parameters");
    write_request(&mut bytes, 54, method, count, &encoded);
    bytes
}

fn array<const N: usize>(items: [Value; N]) -> Value {
    Value::Array(items.into())
}

fn save(target: &str, name: &str, messages: &[&[u8]]) -> std::io::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("seeds")
        .join(target);
    std::fs::create_dir_all(&folder)?;
    std::fs::write(folder.join(name), messages.concat())
}

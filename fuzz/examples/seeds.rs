//! Writes the fuzzers' first messages, as guests and nodes send them, into `fuzz/seeds`:
//!
//! `cargo run --manifest-path fuzz/Cargo.toml --example seeds`

use std::path::Path;
use std::sync::Arc;

use kv54::cluster::{Cluster, State, Told};
use kv54::entry::{Packed, Stamp};
use kv54::error::{Error, Kind};
use kv54::rpc::codec::{decode, encode, write_request, write_response};
use msgpack_rpc::Value;

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
    resizes(&[&set, &get, &swaps, &delete], &old)
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

//! Stories of one node and its disk, at moments that hardly a seed meets by chance. `tests/sabotage.rs` knows
//! the bug that each shows.

#![allow(dead_code, unreachable_pub)]

use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use kv54::beyond::log::Disk;
use kv54::cluster::Cluster;
use kv54::entry::{Entry, Stamp};
use kv54::error::Kind;
use kv54::store::Store;
use tokio::time::{sleep, timeout};

use crate::ram::{Part, Ram};

const TEA: &[u8] = b"tea";
/// The size of a segment.
pub const SIZE: u32 = 2 << 20;

/// The store of alice in a ring of so many, and its log.
pub fn opened(disk: &Ram, size: usize) -> (Store, Disk<Ram>) {
    let nodes = ["alice", "bob", "carol"].into_iter().zip(5401..);
    let lines = nodes.map(|(name, port)| format!("{name} = \"127.0.0.1:{port}\""));
    let lines: Vec<String> = lines.take(size).collect();
    let file = format!("[nodes]\n{}", lines.join("\n"));
    let cluster = Arc::new(Cluster::parse("cluster.toml".as_ref(), &file).unwrap());
    Disk::open(cluster, 0, || Ok(disk.clone()), SIZE).unwrap()
}

/// The same of a node that is alone and ready.
pub fn alone(disk: &Ram) -> (Store, Disk<Ram>) {
    let (store, log) = opened(disk, 1);
    store.heard_all();
    store.at(0).mark_read(0, 0);
    (store, log)
}

/// Keeps tea, in its version with this number.
fn keep(store: &Store, number: u64) {
    let (stamp, value) = (Stamp::new(number, 1, 0), &[0xc3][..]);
    store.at(0).store(TEA, Entry { stamp, value }).unwrap();
}

pub async fn settle(store: &Store) {
    if let Some(settling) = store.journal().unwrap().settling(Some(TEA)) {
        settling.await;
    }
}

/// Writes the log down while this goes on; what ended the log, if that was first.
pub fn write_while(
    store: &Store,
    log: &mut Disk<Ram>,
    goes_on: impl Future<Output = ()>,
) -> Option<String> {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_all().build().unwrap().block_on(async {
        let both = async {
            tokio::select! {
                biased;
                ended = log.write(store) => Some(ended.unwrap_err().to_string()),
                () = goes_on => None,
            }
        };
        timeout(Duration::from_secs(30), both).await.unwrap()
    })
}

/// A write or a sync fails, once: the sync of what was written, or that of a new segment's name. Whoever would try again
/// would be told that all is well.
pub fn a_sync_that_fails() -> Result<(), String> {
    for part in [Part::Writing, Part::Bytes, Part::Names] {
        let disk = Ram::slow(1, Rng::with_seed(1));
        let (store, mut log) = alone(&disk);
        keep(&store, 1);
        disk.break_down(part);
        let goes_on = async {
            settle(&store).await;
            if part == Part::Names {
                sleep(Duration::from_secs(5)).await; // a segment is made beside the commits
            }
        };
        match write_while(&store, &mut log, goes_on).as_deref() {
            None => return Err("tea is kept by a disk that could not sync".to_owned()),
            Some("it cannot be written; the log is kept as aside, and the next start joins") => {}
            Some(other) => return Err(other.to_owned()),
        }
    }
    Ok(())
}

/// A process is killed between a write and its sync, and the next one reads what was written. Then the power is cut.
pub fn read_from_memory_alone() -> Result<(), String> {
    for seed in 0..20 {
        let disk = Ram::default();
        let (store, mut log) = alone(&disk);
        let mut before = 0;
        let twice = async {
            keep(&store, 1);
            settle(&store).await;
            before = disk.ops();
            keep(&store, 2);
            settle(&store).await;
        };
        assert_eq!(write_while(&store, &mut log, twice), None);
        drop((store, log));
        disk.kill_after(before + 1); // it was written
        let read = |disk: &Ram| alone(disk).0.at(0).load(TEA, None).unwrap().stamp.counter;
        assert_eq!(read(&disk), 2);
        disk.settle();
        disk.cut(&mut Rng::with_seed(seed));
        if read(&disk) != 2 {
            return Err("tea is as it was before it was read".to_owned());
        }
    }
    Ok(())
}

/// A node is killed that has joined in part.
pub fn half_joined() -> Result<(), String> {
    let disk = Ram::slow(1, Rng::with_seed(1));
    let (store, mut log) = opened(&disk, 3);
    store.heard_all();
    keep(&store, 1);
    assert_eq!(write_while(&store, &mut log, settle(&store)), None);
    drop((store, log));
    let (store, _) = opened(&disk, 3);
    store.heard_all();
    match store.at(0).load(TEA, None) {
        Err(error) if error.kind == Kind::Joining => Ok(()),
        answer => Err(format!("tea is answered before all was read: {answer:?}")),
    }
}

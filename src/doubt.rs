//! What a node cannot vouch for. A write may be held by two of a part's three replicas alone. If
//! these two are without their memory at the same time, the write is gone, and they
//! become ready without it. A node that sees this says so until a person acknowledges it.

use futures::future::join_all;
use tokio::time::{Instant, timeout};

use crate::error::Error;
use crate::replicas::Replicas;
use crate::status::Status;
use crate::store::Store;

/// Asks another node how it is, and doubts each part of which two replicas are not ready at the
/// same time. At a first start this is so for all parts: what has no entry yet is not doubted.
pub async fn look(store: &Store, replicas: &Replicas, place: usize) -> Result<Status, Error> {
    // Entries that are known before the question is sent are older than the answer. A write needs
    // two ready replicas, so if two are not ready afterwards, one of them has lost its memory.
    let (asked, known) = (Instant::now(), store.parts_with_entries());
    let theirs = replicas.status(place).await?;
    if theirs.ring != replicas.cluster.fingerprint(replicas.cluster.name(place)) {
        return Ok(theirs); // its parts are other ones
    }
    store.note_status(place, &theirs);
    for part in known {
        let owner = replicas.cluster.name(part);
        if theirs.is_ready_for(owner) {
            continue;
        }
        if !store.is_ready_for(part) {
            doubt(store, part, [store.place, place]);
            continue;
        }
        // This node kept its memory. A joining node joins for two windows: if `place` is not ready
        // before and after, and all of it was quicker, then both were not ready in between.
        let others = replicas.cluster.replicas(part);
        for third in others.filter(|other| ![store.place, place].contains(other)) {
            let joins = async |place| {
                let status = replicas.status(place).await;
                status.is_ok_and(|status| !status.is_ready_for(owner))
            };
            let both = joins(third).await && joins(place).await;
            if both && asked.elapsed() < 2 * replicas.cluster.limits.window {
                doubt(store, part, [place, third]);
            }
        }
    }
    Ok(theirs)
}

/// Looks at every other replica of a part, with all that is known by now: before this node is
/// ready for the part, it must know whether another one still is not.
pub async fn look_around(store: &Store, replicas: &Replicas, part: usize) {
    let others = replicas.cluster.replicas(part);
    let others = others.filter(|place| *place != store.place);
    let looks = join_all(others.map(|place| look(store, replicas, place)));
    let _ = timeout(replicas.cluster.limits.window, looks).await; // one that is silent shows nothing
}

fn doubt(store: &Store, part: usize, [one, other]: [usize; 2]) {
    let name = |place| store.cluster.name(place);
    let why = format!(
        "{}'s keys: {} and {} were without their memory at the same time; \
         a write that only these two held is gone",
        name(part),
        name(one.min(other)),
        name(one.max(other)),
    );
    if store.doubt(part, &why) {
        log::warn!("{why}; once you know, kv54 status --acknowledge");
    }
}

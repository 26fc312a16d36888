//! What a node cannot vouch for. A write may be held by two of a part's three replicas alone. If
//! these two are without their memory at the same time, the write is gone, and they
//! become ready without it. A node that sees this says so until a person acknowledges it.

use futures::future::join_all;
use tokio::time::{Instant, timeout};

use crate::cluster::Cluster;
use crate::error::Error;
use crate::replicas::{Replicas, Source};
use crate::status::Status;
use crate::store::Replica;

/// Another node that keeps what a node keeps, in one ring.
pub(crate) struct Neighbour<'a> {
    /// The node itself.
    pub own: &'a Replica<'a>,
    /// The ring.
    pub cluster: &'a Cluster,
    /// Its other nodes, by their places, and the fingerprints that they tell. None tells that of a new ring
    /// while the old one is asked too.
    pub others: &'a [(Source, Option<u32>)],
    /// Asks a majority, which the node itself need not belong to.
    pub coordinator: &'a Replicas,
    /// The place of the other one.
    pub place: usize,
}

impl Neighbour<'_> {
    /// Whether it is one of the old ring, or of the only one.
    pub(crate) fn is_of_the_old_ring(&self) -> bool {
        let told = self.others.get(self.place).and_then(|(_, told)| *told);
        told.is_some()
    }

    /// Asks it how it is, and doubts each part of which two replicas are not ready at the
    /// same time. At a first start this is so for all parts: what has no entry yet is not doubted.
    pub(crate) async fn look(&self) -> Result<Status, Error> {
        // Entries that are known before the question is sent are older than the answer. A write needs
        // two ready replicas, so if two are not ready afterwards, one of them has lost its memory.
        let (asked, known) = (Instant::now(), self.own.parts_with_entries());
        let theirs = self.status(self.place).await?;
        if !self.is_same(&theirs, self.place) {
            return Ok(theirs); // its parts are other ones
        }
        self.own.note_status(self.place, &theirs);
        let own = self.own.place();
        for part in known {
            let owner = self.cluster.name(part);
            if theirs.is_ready_for(owner) {
                continue;
            }
            if !self.own.is_ready_for(part) {
                self.doubt(part, [own, self.place]);
                continue;
            }
            // This node kept its memory. A joining node joins for two windows: if `place` is not ready
            // before and after, and all of it was quicker, then both were not ready in between.
            let others = self.cluster.replicas(part);
            for third in others.filter(|other| ![own, self.place].contains(other)) {
                let joins = async |place| {
                    let status = self.status(place).await;
                    status.is_ok_and(|status| {
                        self.is_same(&status, place) && !status.is_ready_for(owner)
                    })
                };
                let both = joins(third).await && joins(self.place).await;
                if both && asked.elapsed() < 2 * self.cluster.limits.window {
                    self.doubt(part, [self.place, third]);
                }
            }
        }
        Ok(theirs)
    }

    /// Looks at every other replica of a part, with all that is known by now: before this node is
    /// ready for the part, it must know whether another one still is not.
    pub(crate) async fn look_around(&self, part: usize) {
        let others = self.cluster.replicas(part);
        let others = others.filter(|place| *place != self.own.place());
        let looks =
            join_all(others.map(|place| async move { Neighbour { place, ..*self }.look().await }));
        let _ = timeout(self.cluster.limits.window, looks).await; // one that is silent shows nothing
    }

    /// This neighbour, to be asked.
    pub(crate) fn source(&self) -> Result<&Source, Error> {
        self.source_at(self.place)
    }

    fn source_at(&self, place: usize) -> Result<&Source, Error> {
        let other = self.others.get(place).map(|(source, _)| source);
        other.ok_or_else(|| Error::bad_request("the ring has no such place"))
    }

    async fn status(&self, place: usize) -> Result<Status, Error> {
        self.source_at(place)?.status().await
    }

    /// Whether what it says concerns this ring.
    pub(crate) fn is_same(&self, theirs: &Status, place: usize) -> bool {
        let expected = self.others.get(place).and_then(|(_, ring)| *ring);
        expected == Some(theirs.ring)
    }

    fn doubt(&self, part: usize, [one, other]: [usize; 2]) {
        let name = |place| self.cluster.name(place);
        let why = format!(
            "{}'s keys: {} and {} were without their memory at the same time; \
             a write that only these two held is gone",
            name(part),
            name(one.min(other)),
            name(one.max(other)),
        );
        if self.own.doubt(part, &why) {
            log::warn!("{why}; once you know, kv54 status --acknowledge");
        }
    }
}

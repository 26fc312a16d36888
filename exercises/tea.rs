//! The three replicas of tea, and no network between them and their clients: you are the
//! network. They are kv54's own [`Store`]s, and tea is green at all of them when you begin.
//! What clients are told is noted in a log, which the tests read.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use kv54::cluster::Cluster;
pub use kv54::entry::Entry;
use kv54::entry::{Packed, Stamp};
use kv54::store::{Prepare, Promise, Store};

/// Tea's owner.
pub const ERIN: usize = 4;
/// The first copy.
pub const ALICE: usize = 0;
/// The second copy.
pub const BOB: usize = 1;

/// Tea's replicas.
#[allow(clippy::struct_excessive_bools)] // each is a rule that an exercise breaks
pub struct Tea {
    stores: BTreeMap<usize, Store>,
    answered: BTreeMap<Stamp, BTreeSet<usize>>,
    /// Whether a get that meets an old copy repairs it before it answers, as kv54 does.
    pub repairs: bool,
    /// Whether [`collect`](Tea::collect) does something, which it does not in kv54.
    pub collects: bool,
    /// Whether a replica keeps what it has promised to a swap, as kv54's do.
    pub promises: bool,
    /// Whether a restarted replica lets two windows pass before it reads, as kv54's do.
    pub waits: bool,
    /// How often a replica has lost its memory.
    pub restarts: usize,
    /// What clients were told, in order: `get: green`, `set black: ok`, `delete: ok`.
    pub log: Vec<String>,
}

impl Tea {
    /// Tea is green, and three replicas know it.
    pub fn green() -> Tea {
        let stores = [ERIN, ALICE, BOB].map(|at| (at, ready(empty(at))));
        let tea = Tea {
            stores: stores.into(),
            answered: BTreeMap::new(),
            repairs: true,
            collects: true,
            promises: true,
            waits: true,
            restarts: 0,
            log: Vec::new(),
        };
        let green = Stamp::default().newer(Packed::of("green"));
        for at in [ERIN, ALICE, BOB] {
            tea.keep(at, &green);
        }
        tea
    }

    /// The first half of a set: asks two replicas for their stamps. What it gives back is the
    /// message `store` for all three, and it has reached nobody yet.
    pub fn begin_set(&self, value: &str, asked: [usize; 2]) -> Entry {
        self.newest(asked).stamp.newer(Packed::of(value))
    }

    /// The first half of a delete.
    pub fn begin_delete(&self, asked: [usize; 2]) -> Entry {
        self.newest(asked).stamp.newer(Packed::default())
    }

    /// The message `store` reaches these replicas, and their answers the client. The second one
    /// that answers makes the write done, and its client is told so.
    pub fn store<const N: usize>(&mut self, reached: [usize; N], entry: &Entry) {
        for at in reached {
            self.keep(at, entry);
            let answered = self.answered.entry(entry.stamp).or_default();
            if answered.insert(at) && answered.len() == 2 {
                self.log.push(match said(entry) {
                    Some(value) => format!("set {value}: ok"),
                    None => "delete: ok".to_owned(),
                });
            }
        }
    }

    /// The first half of a swap at this replica, which promises to keep no value of a swap with a lower
    /// ballot, and says what it has. `None`: it has promised as much already.
    pub fn promise(&self, at: usize, ballot: u64) -> Option<Entry> {
        if !self.promises {
            return Some(self.load(at));
        }
        match self.stores[&at]
            .at(0)
            .promise(b"tea", Prepare::of(ballot))
            .unwrap()
        {
            Promise::Given(entry) => Some(entry),
            _ => None,
        }
    }

    /// The second half: the swap's value reaches these two. Whether both took it.
    pub fn accept(&self, reached: [usize; 2], entry: &Entry) -> bool {
        assert_ne!(reached[0], reached[1], "two different replicas");
        reached.map(|at| self.keep(at, entry)) == [true, true]
    }

    /// A whole get that asks these two.
    pub fn get(&mut self, asked: [usize; 2]) -> String {
        let newest = self.newest(asked);
        let mut repaired = asked.into_iter().filter(|_| self.repairs);
        let said = if repaired.all(|at| self.keep(at, &newest)) {
            said(&newest).unwrap_or("nothing".to_owned())
        } else {
            "refused, a swap has a promise".to_owned() // kv54's get would finish by a swap
        };
        self.log.push(format!("get: {said}"));
        said
    }

    /// The three forget that there ever was tea, if it is deleted and all of them know.
    pub fn collect(&mut self) {
        let stamps = [ERIN, ALICE, BOB].map(|at| self.load(at).stamp);
        let deleted = self.load(ERIN).value.is_nil();
        if self.collects && deleted && stamps.iter().all(|stamp| *stamp == stamps[0]) {
            for store in self.stores.values_mut() {
                *store = ready(empty(store.at(0).place()));
            }
            self.log.push("collected".to_owned());
        }
    }

    /// A replica loses its memory and starts again: it keeps what it is told, but is not asked.
    pub fn restart(&mut self, at: usize) {
        self.restarts += 1;
        self.stores.insert(at, empty(at));
    }

    /// A restarted replica reads what the other two have now; from now on it is asked again.
    pub fn join(&mut self, at: usize) {
        if self.waits {
            self.answered.clear(); // the windows are over in which they counted
        }
        for other in [ERIN, ALICE, BOB].into_iter().filter(|other| *other != at) {
            self.keep(at, &self.load(other));
        }
        let store = self.stores.remove(&at).unwrap();
        self.stores.insert(at, ready(store));
    }

    /// Whether clients were told all this, in this order, whatever they were told in between.
    pub fn told(&self, story: &[&str]) -> bool {
        let mut log = self.log.iter();
        story.iter().all(|told| log.any(|line| line == told))
    }

    fn newest(&self, asked: [usize; 2]) -> Entry {
        assert_ne!(asked[0], asked[1], "two different replicas");
        let [one, other] = asked.map(|at| self.load(at));
        if one.stamp > other.stamp { one } else { other }
    }

    fn load(&self, at: usize) -> Entry {
        let loaded = self.stores[&at].at(0).load(b"tea", None);
        let loaded = loaded.unwrap_or_else(|error| panic!("replica {at}: {error}"));
        Entry {
            stamp: loaded.stamp,
            value: loaded.value.unwrap(),
        }
    }

    /// Whether this replica takes an entry. It refuses only what a promise forbids.
    fn keep(&self, at: usize, entry: &Entry) -> bool {
        if entry.stamp == Stamp::default() {
            return true;
        }
        let kept = self.stores[&at].at(0).store(b"tea", entry.borrow());
        kept.is_ok() || !self.promises
    }
}

/// An entry's value; `None` where it is deleted.
fn said(entry: &Entry) -> Option<String> {
    entry.value.value().unwrap().as_str().map(str::to_owned)
}

/// A replica that has just started.
fn empty(at: usize) -> Store {
    let ring = include_str!("../cluster.toml");
    let cluster = Cluster::parse("cluster.toml".as_ref(), ring).unwrap();
    let store = Store::new(Arc::new(cluster), at);
    store.heard_all();
    store
}

/// A replica that has heard from everybody.
fn ready(store: Store) -> Store {
    for (place, parts) in store.at(0).shared() {
        for part in parts {
            store.at(0).mark_read(part, place);
        }
    }
    store
}

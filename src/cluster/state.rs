//! The state of a ring that can change while it runs. It is asked alone, or together with the ring
//! into which it changes: two rings side by side, in the manner of RAMBO (Lynch, Shvartsman,
//! "RAMBO: A reconfigurable atomic memory service for dynamic networks", DISC 2002).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use super::{Cluster, Node};
use crate::error::{Error, Kind, beginning};
use crate::sabotage::{Bug, planted};

/// The last step whose epoch a stamp can carry, above the counters of all epochs before it.
const MAX_STEP: u64 = (1 << 27) - 2;

/// Which ring is asked, or which two. A state is followed by the next step, and never comes back.
#[derive(Clone, Debug)]
pub struct State {
    /// Even where one ring is asked, odd while it changes into the next one.
    pub step: u64,
    /// Drawn when the ring first changes: if all nodes lose their memory, the steps begin anew, and are others.
    pub life: u64,
    /// The ring; while it changes, the old one.
    pub ring: Arc<Cluster>,
    /// The new one, while it changes.
    pub next: Option<Arc<Cluster>>,
}

impl State {
    /// The ring of a file, as a node or a client begins: it may be another one than what runs.
    pub fn of(file: Arc<Cluster>) -> Self {
        State {
            step: 0,
            life: 0,
            ring: file,
            next: None,
        }
    }

    /// The rings that are asked, the old one first.
    pub fn rings(&self) -> impl Iterator<Item = &Arc<Cluster>> {
        [&self.ring].into_iter().chain(&self.next)
    }

    /// The step at which a ring of [`State::rings`] was first asked. A ring of the same names that
    /// comes later is another one.
    pub fn born(&self, ring: usize) -> u64 {
        match (self.step % 2, ring) {
            (0, _) => self.step.saturating_sub(1),
            (_, 0) => self.step.saturating_sub(2),
            _ => self.step,
        }
    }

    /// How often the ring has begun to change.
    pub fn epoch(&self) -> u64 {
        self.step.div_ceil(2)
    }

    /// What a call must carry that a node of this name is to answer from its part of that ring.
    pub fn fingerprint(&self, ring: usize, name: &str) -> u32 {
        let mut lines = self.ring.common(name);
        if self.step > 0 {
            lines = format!("{lines}\n{} {ring} {}", self.step, self.life);
        }
        if let Some(next) = &self.next {
            lines = format!("{lines}\n{}", next.names().join("\n"));
        }
        crc32fast::hash(lines.as_bytes())
    }

    /// The same state with another ring beside the one that is asked.
    #[must_use]
    pub fn changing_to(&self, next: Arc<Cluster>) -> Self {
        let life = match self.step {
            0 => fastrand::u64(1..),
            _ => self.life,
        };
        let (step, ring, next) = (self.step + 1, self.ring.clone(), Some(next));
        State {
            step,
            life,
            ring,
            next,
        }
    }

    /// The state after a change: the new ring alone.
    #[must_use]
    pub fn changed(&self) -> Self {
        match &self.next {
            Some(next) => State {
                step: self.step + 1,
                life: self.life,
                ring: next.clone(),
                next: None,
            },
            None => self.clone(),
        }
    }

    /// Whether another state can be reached from this one: by one step, or from one change into
    /// the next.
    pub fn is_followed_by(&self, other: &State) -> bool {
        let kept = self.next.as_ref().unwrap_or(&self.ring);
        let steps = other.step.checked_sub(self.step);
        let is_near = steps == Some(1) || steps == Some(2) && self.next.is_some();
        let is_of_this_life =
            self.step == 0 || self.life == other.life || planted(Bug::FormerLifeFollowed);
        is_near && is_of_this_life && other.ring.names() == kept.names()
    }

    /// Whether it is the same step with the same names.
    pub fn is(&self, other: &State) -> bool {
        let names = |state: &State| state.rings().map(|ring| ring.names().join(" ")).collect();
        let [own, others]: [Vec<String>; 2] = [self, other].map(names);
        (self.step, self.life) == (other.step, other.life) && own == others
    }

    /// Whether it changes into the same names: what was deleted stays behind.
    pub fn is_round(&self) -> bool {
        let next = self.next.as_ref();
        next.is_some_and(|next| next.names() == self.ring.names())
    }

    /// What it means, in a line of the log.
    pub fn told(&self) -> String {
        let ring = self.ring.names().join(" ");
        match &self.next {
            None => format!("the ring is {ring}"),
            Some(_) if self.is_round() => format!("the ring {ring} forgets what was deleted"),
            Some(next) => format!("the ring changes from {ring} to {}", next.names().join(" ")),
        }
    }

    /// Whether this node is in a ring that is asked.
    pub fn has(&self, name: &str) -> bool {
        self.rings().any(|ring| ring.place(name).is_some())
    }
}

/// What is said of the state in the method `ring`, by the asker and by the node.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Told {
    /// The node's name; empty for a client.
    pub name: String,
    /// Drawn at each start of the node.
    pub start_id: u64,
    /// Whether a node that serves is known to have this state. Else it is only what a file says.
    pub certain: bool,
    /// Whether the node has started and does not know yet what it missed.
    pub joining: bool,
    /// Whether a resize is waiting for its turn: no round of forgetting begins meanwhile.
    pub resizes: bool,
    /// The window of the ring, in milliseconds.
    pub window: u64,
    /// See [`State`].
    pub step: u64,
    /// See [`State`].
    pub life: u64,
    /// The nodes of the ring.
    pub ring: Vec<Node>,
    /// The nodes of the next one, while it changes.
    pub next: Vec<Node>,
    /// The names in the node's file, as it was last read.
    pub file: Vec<String>,
}

impl Told {
    /// Reads what somebody tells.
    pub fn read(told: &[u8]) -> Result<Self, Error> {
        let told = rmp_serde::from_slice(told);
        told.map_err(|error: rmp_serde::decode::Error| {
            let why = error.to_string(); // it may quote all that came
            Error::bad_request(format!("ring: {}", beginning(&why)))
        })
    }

    /// A state that a client tells.
    pub fn of(state: &State, certain: bool) -> Self {
        let nodes =
            |ring: Option<&Arc<Cluster>>| ring.map_or(Vec::new(), |ring| ring.nodes.clone());
        Told {
            certain,
            window: u64::try_from(state.ring.limits.window.as_millis()).unwrap_or(u64::MAX),
            step: state.step,
            life: state.life,
            ring: nodes(Some(&state.ring)),
            next: nodes(state.next.as_ref()),
            ..Told::default()
        }
    }

    /// As MessagePack.
    pub fn packed(&self) -> Vec<u8> {
        rmp_serde::to_vec_named(self).unwrap_or_default() // writing to memory cannot fail
    }

    /// The state that is told, read by a program that has this file: it has the addresses.
    pub fn state(&self, file: &Cluster) -> Result<State, Error> {
        if self.step > MAX_STEP {
            let why = format!("a ring has at most {MAX_STEP} steps, not {}", self.step);
            return Err(Error::bad_request(why));
        }
        let window = file.limits.window.as_millis();
        if u128::from(self.window) != window {
            let why = format!("a window of {} ms, and not of {window} ms", self.window);
            return Err(Error::new(Kind::WrongRing, why));
        }
        let is_changing = self.step % 2 == 1;
        let next = is_changing.then(|| ring_of(&self.next, file));
        let next = next.transpose()?;
        Ok(State {
            step: self.step,
            life: self.life,
            ring: ring_of(&self.ring, file)?,
            next,
        })
    }
}

/// A ring of these nodes, at the addresses that a file has.
fn ring_of(nodes: &[Node], file: &Cluster) -> Result<Arc<Cluster>, Error> {
    let own = |node: &Node| file.node(&node.name).unwrap_or(node).clone();
    let nodes: Vec<Node> = nodes.iter().map(own).collect();
    let ring = file.with(&nodes).map_err(Error::bad_request)?;
    Ok(Arc::new(ring))
}

/// The state as one program knows it. A node's store and its coordinator share one.
#[derive(Debug)]
pub struct Rings {
    known: Mutex<Known>,
    version: AtomicU64,
    resizes: AtomicBool, // see `Told`
    moved: Notify,
}

/// What is known.
#[derive(Clone, Debug)]
pub struct Known {
    /// The file, as it was last read.
    pub file: Arc<Cluster>,
    /// The state.
    pub state: Arc<State>,
    /// Whether a node that serves is known to have it.
    pub certain: bool,
}

impl Known {
    /// The ring, while it changes the old one, at the addresses that the file has now.
    pub fn ring(&self) -> Arc<Cluster> {
        let ring = &self.state.ring;
        ring_of(&ring.nodes, &self.file).unwrap_or_else(|_| ring.clone())
    }
}

impl Rings {
    /// What a program knows that has read a file.
    pub fn new(file: Arc<Cluster>) -> Arc<Self> {
        let (state, certain) = (Arc::new(State::of(file.clone())), false);
        Arc::new(Rings {
            known: Mutex::new(Known {
                file,
                state,
                certain,
            }),
            version: AtomicU64::new(0),
            resizes: AtomicBool::new(false),
            moved: Notify::new(),
        })
    }

    /// What is known now.
    pub fn known(&self) -> Known {
        self.lock().clone()
    }

    /// A number that grows with each change of what is known.
    pub fn version(&self) -> u64 {
        self.version.load(Relaxed)
    }

    /// The next change.
    pub fn moved(&self) -> tokio::sync::futures::Notified<'_> {
        self.moved.notified()
    }

    /// Takes the addresses and limits of a newer file.
    pub fn read_again(&self, file: Arc<Cluster>) {
        self.lock().file = file;
        self.version.fetch_add(1, Relaxed);
    }

    /// Who asks from now on waits to change the ring.
    pub fn resize(&self) {
        self.resizes.store(true, Relaxed);
    }

    /// The state is certain: every node that could know of a later one has been heard.
    pub fn is_certain(&self) {
        self.lock().certain = true;
    }

    /// Moves to the state that a node tells, if it is further than the own one. What a file says
    /// gives way to what is certain; who holds entries takes only what follows its own state, and
    /// anybody else what a client or a node of its ring tells: another ring may have gone further.
    pub fn hear(&self, told: &Told, holds_entries: bool) -> Result<Option<Arc<State>>, Error> {
        let mut known = self.lock();
        let heard = told.state(&known.file)?;
        if heard.is(&known.state) {
            known.certain |= told.certain;
            return Ok(None);
        }
        if !told.certain || known.certain && heard.step < known.state.step {
            return Ok(None);
        }
        let follows = known.state.is_followed_by(&heard);
        let is_known = told.name.is_empty() || known.state.has(&told.name);
        let is_later = heard.step > known.state.step && is_known;
        if known.certain && !follows && (holds_entries || !is_later) {
            let why = format!("{}, and not {}", known.state.told(), heard.told());
            return Err(Error::new(Kind::WrongRing, why));
        }
        (known.certain, known.state) = (true, Arc::new(heard));
        let state = known.state.clone();
        self.version.fetch_add(1, Relaxed); // still locked: what another thread knows is never older
        drop(known);
        self.moved.notify_waiters();
        Ok(Some(state))
    }

    /// Moves back to a state before this one.
    pub fn begin_anew(&self, state: State, known: &State) {
        let mut now = self.lock();
        if now.state.is(known) {
            now.state = Arc::new(state);
            drop(now);
            self.version.fetch_add(1, Relaxed);
            self.moved.notify_waiters();
        }
    }

    /// What this program tells: under a node's name and start id, or without them.
    pub fn told(&self, name: &str, start_id: u64) -> Told {
        let Known {
            state,
            certain,
            file,
        } = self.known();
        let file = file.nodes.iter().chain(&file.leaving);
        Told {
            name: name.to_owned(),
            start_id,
            resizes: self.resizes.load(Relaxed),
            file: file.map(|node| node.name.clone()).collect(),
            ..Told::of(&state, certain)
        }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

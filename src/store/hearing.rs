//! How a node comes to know the state of the ring: what it tells, and what it hears. A node that has
//! started answers nothing before it has heard every node that could know a later state.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;

use super::{Kept, Store};
use crate::cluster::Told;
use crate::error::Error;
use crate::rpc::codec::Encoded;
use crate::rpc::{Answer, lock};

/// Who waits to change the ring says so again before this is over.
const WAITS: Duration = Duration::from_secs(2);

impl Store {
    /// How the ring is, for one who says how it is for them.
    pub fn ring(&self, told: &[&[u8]]) -> Result<Answer, Error> {
        match told {
            [] => {}
            [told] => {
                let told = Told::read(told)?;
                // A node that has just started goes by what it asks, not by who comes first.
                if self.rings.known().certain {
                    self.hear(&told)?;
                }
            }
            _ => return Err(Error::not_a_request("ring", told.len())),
        }
        Ok(Encoded::from(self.told().packed()).into())
    }

    /// How the ring is, in this node's words.
    pub fn told(&self) -> Told {
        let kept = lock(&self.kept);
        let joining = kept.unheard || kept.is_joining();
        let told = self.rings.told(&self.name, self.start_id);
        Told { joining, ..told }
    }

    /// Moves to the state that is told, if it is further than the own one.
    pub fn hear(&self, told: &Told) -> Result<(), Error> {
        let mut kept = lock(&self.kept);
        if told.resizes {
            kept.resize = Some(Instant::now());
        }
        // Until it has heard all, it takes any later state, but only of the nodes that it asks.
        let is_asking = kept.unheard && !told.name.is_empty();
        let holds_entries = !is_asking && kept.held.iter().any(|held| held.place.is_some());
        let before = self.rings.known().state;
        if let Some(state) = self.rings.hear(told, holds_entries)? {
            kept.move_to(&state, &self.name);
            self.note_state(&mut kept);
            let is_of_a_round = state.is_round() || before.is_round() && state.next.is_none();
            let level = match is_of_a_round {
                true => log::Level::Debug, // the node that drives a round says so
                false => log::Level::Info,
            };
            log::log!(level, "{}", state.told());
        }
        let known = self.rings.known();
        let is_awaited = self.unheard_in(&kept).contains(&told.name);
        if is_awaited && told.state(&known.file)?.is(&known.state) {
            kept.heard.insert(told.name.clone());
        }
        Ok(())
    }

    /// Whether somebody has been waiting lately to change the ring.
    pub(crate) fn is_to_be_resized(&self) -> bool {
        let since = lock(&self.kept).resize;
        since.is_some_and(|since| since.elapsed() < WAITS)
    }

    /// The nodes that could know of a later state than this node does, and have not said anything
    /// yet. Nobody is left where it has answered for its state before.
    pub fn unheard(&self) -> Vec<String> {
        self.unheard_in(&lock(&self.kept))
    }

    /// The same. If nobody is left, this node answers from now on: at this state, not at one to which another
    /// thread moves it meanwhile.
    pub(crate) fn unheard_or_answers(&self) -> Vec<String> {
        let mut kept = lock(&self.kept);
        let unheard = self.unheard_in(&kept);
        if unheard.is_empty() {
            self.answer_from_now_on(&mut kept);
        }
        unheard
    }

    pub(super) fn unheard_in(&self, kept: &Kept) -> Vec<String> {
        let known = self.rings.known();
        if !kept.unheard {
            return Vec::new();
        }
        let (file, state) = (&known.file, &known.state);
        let mut names: BTreeSet<&str> = if !known.certain && state.step == 0 {
            let all = file.nodes().iter().chain(file.leaving()); // whoever may be in a running ring
            all.map(|node| &*node.name)
                .filter(|name| *name != self.name)
                .collect()
        } else if state.has(&self.name) {
            state
                .rings()
                .flat_map(|ring| ring.neighbours(&self.name))
                .collect()
        } else {
            file.neighbours(&self.name).into_iter().collect()
        };
        names.retain(|name| !kept.heard.contains(*name));
        names.into_iter().map(str::to_owned).collect()
    }

    /// Notes that a node knows of no later state.
    pub fn note_heard(&self, name: &str) {
        lock(&self.kept).heard.insert(name.to_owned());
    }

    /// Every node that could know of a later state has been heard: this node answers from now on.
    pub fn heard_all(&self) {
        self.answer_from_now_on(&mut lock(&self.kept));
    }

    fn answer_from_now_on(&self, kept: &mut Kept) {
        kept.unheard = false;
        kept.starting = kept.is_joining();
        kept.member = self.rings.known().state.has(&self.name);
        self.rings.is_certain();
        self.note_state(kept);
    }
}

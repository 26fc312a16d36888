//! Two rings that tea moves between, a driver that moves it, and no network between them: you are
//! the network. What happens is noted in a log, which the test reads.

use std::collections::BTreeSet;

use State::{Both, New, Old};

pub const ERIN: usize = 0;
pub const ALICE: usize = 1;
pub const BOB: usize = 2;
/// The new ring: one node, and its own majority.
pub const FRANK: usize = 3;
const NAMES: [&str; 4] = ["erin", "alice", "bob", "frank"];
const OLD_RING: [usize; 3] = [ERIN, ALICE, BOB];

/// Which rings an operation asks. It only moves forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum State {
    Old,
    Both,
    New,
}

/// A stamp and a value.
type Entry = (u32, &'static str);

#[derive(Clone)]
struct Node {
    state: State,
    tea: Entry,
    /// Whose state it must still hear before it serves anything.
    unheard: Vec<usize>,
    /// Whether it may be read. A restarted node is joining: here its two windows do not end.
    ready: bool,
}

/// The nodes of both rings, a driver, and a client at `Old` that sets black.
pub struct Rings {
    nodes: [Node; 4],
    /// The state at which a new client begins.
    state: State,
    /// Whether the driver reads tea only when all four nodes are at `Both`.
    pub waits: bool,
    /// How often a node has lost its memory.
    pub restarts: usize,
    /// The nodes that have answered the set, those that the driver has read, and the newest there.
    stored: BTreeSet<usize>,
    read: Vec<usize>,
    newest: Entry,
    /// What clients and the driver were told, in order, and which calls nodes refused.
    pub log: Vec<String>,
}

impl Rings {
    /// The old ring knows that tea is green, and the driver has begun.
    pub fn green() -> Rings {
        let tea = |tea| Node {
            state: Old,
            tea,
            unheard: Vec::new(),
            ready: true,
        };
        let [green, nothing] = [tea((1, "green")), tea((0, "nothing"))];
        Rings {
            nodes: [green.clone(), green.clone(), green, nothing],
            state: Both,
            waits: true,
            restarts: 0,
            stored: BTreeSet::new(),
            read: Vec::new(),
            newest: (0, "nothing"),
            log: Vec::new(),
        }
    }

    /// The set's store reaches this node under `Old`. The second node that serves it makes the set
    /// done.
    pub fn store(&mut self, at: usize) {
        assert!(OLD_RING.contains(&at), "the set asks the old ring");
        if self.serves(at, Old) {
            self.keep(at, (2, "black"));
            if self.stored.insert(at) && self.stored.len() == 2 {
                self.log.push("set black: ok".to_owned());
            }
        }
    }

    /// The driver tells this node that the state is `Both`.
    pub fn tell(&mut self, at: usize) {
        self.serves(at, Both);
    }

    /// The driver reads tea at this node, under `Both`. When it has read a majority of each ring,
    /// it stores the newest at all that serve `Both`, and the state is `New`.
    pub fn hand_over(&mut self, at: usize) {
        let all_told = self.nodes.iter().all(|node| node.state >= Both);
        if self.waits && self.read.is_empty() && !all_told {
            self.log.push("the driver waits".to_owned());
        } else if self.state == Both && self.reads(at, Both) {
            self.read.push(at);
            self.newest = self.newest.max(self.nodes[at].tea);
            if is_majority(Both, &self.read) {
                for node in ERIN..=FRANK {
                    if self.serves(node, Both) {
                        self.keep(node, self.newest);
                    }
                }
                self.log.push(format!("handed over: {}", self.newest.1));
                self.state = New;
            }
        }
    }

    /// This node loses its memory and starts again, at `Old`.
    pub fn restart(&mut self, at: usize) {
        assert!(OLD_RING.contains(&at), "one of the old ring restarts");
        self.restarts += 1;
        let others = OLD_RING.into_iter().filter(|other| *other != at);
        self.nodes[at] = Node {
            state: Old,
            tea: (0, "nothing"),
            unheard: others.collect(),
            ready: false,
        };
    }

    /// The restarted node hears at which state this other node is now.
    pub fn hear(&mut self, at: usize, other: usize) {
        let state = self.nodes[other].state;
        let node = &mut self.nodes[at];
        node.state = node.state.max(state);
        node.unheard.retain(|unheard| *unheard != other);
    }

    /// A whole get of a client that asks now. It asks every node of its rings.
    pub fn get(&mut self) {
        let state = self.state;
        let mut asked: Vec<usize> = (ERIN..=FRANK).collect();
        asked.retain(|at| (state == Both || *at == FRANK) && self.reads(*at, state));
        let newest = asked.iter().map(|at| self.nodes[*at].tea).max();
        match newest.filter(|_| is_majority(state, &asked)) {
            Some(newest) => {
                for at in asked {
                    self.keep(at, newest);
                }
                self.log.push(format!("get: {}", newest.1));
            }
            None => self.log.push("get: no majority".to_owned()),
        }
    }

    /// Whether clients were told all this, in this order, whatever they were told in between.
    pub fn told(&self, story: &[&str]) -> bool {
        let mut log = self.log.iter();
        story.iter().all(|told| log.any(|line| line == told))
    }

    /// Whether this node serves a call of this state. If the node is behind, it moves forward.
    fn serves(&mut self, at: usize, state: State) -> bool {
        let (name, node) = (NAMES[at], &mut self.nodes[at]);
        let refused = if let Some(other) = node.unheard.first() {
            format!("{name} waits to hear from {}", NAMES[*other])
        } else if node.state > state {
            format!("{name} refuses {state:?}, it is at {:?}", node.state)
        } else {
            node.state = state;
            return true;
        };
        self.log.push(refused);
        false
    }

    fn reads(&mut self, at: usize, state: State) -> bool {
        let (serves, ready) = (self.serves(at, state), self.nodes[at].ready);
        if serves && !ready {
            self.log.push(format!("{} is joining", NAMES[at]));
        }
        serves && ready
    }

    fn keep(&mut self, at: usize, entry: Entry) {
        let node = &mut self.nodes[at];
        node.tea = node.tea.max(entry); // the stamp decides
    }
}

/// Whether these nodes are a majority of each ring that an operation under `Both` or `New` asks.
fn is_majority(state: State, nodes: &[usize]) -> bool {
    let old = OLD_RING.iter().filter(|at| nodes.contains(at)).count();
    nodes.contains(&FRANK) && (state == New || old >= 2)
}

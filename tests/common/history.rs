//! What clients asked and were told, in the order in which it happened, and whether a single
//! register for each key could have told them the same.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use todc_utils::linearizability::WGLChecker;
use todc_utils::linearizability::history::Action::{Call, Response};
use todc_utils::linearizability::history::History as Sequence;
use todc_utils::specifications::Specification;

/// A key's value: a number that only one write uses, or nothing.
pub type Content = Option<u64>;

/// One thing that a client does to one key.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Operation {
    Get,
    Set(Content),
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum End {
    /// A get's answer.
    Got(Content),
    /// A set was confirmed.
    Done,
    /// It was refused: it changed nothing, at no time.
    Refused,
    /// Nobody knows: a set may take effect at any later time.
    Unknown,
}

/// All operations of all clients.
#[derive(Debug, Default)]
pub struct History(Mutex<Vec<Event>>);

#[derive(Clone, Debug)]
enum Event {
    Began { key: String, operation: Operation },
    Ended { began: usize, end: End },
}

/// How many operations ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tally {
    pub done: usize,
    pub refused: usize,
    pub unknown: usize,
}

impl History {
    /// Notes that an operation begins; its number.
    pub fn begin(&self, key: &str, operation: Operation) -> usize {
        let mut events = self.0.lock().unwrap();
        events.push(Event::Began {
            key: key.to_owned(),
            operation,
        });
        events.len() - 1
    }

    /// Notes how it ended. What never ends, because its client dies, is unknown.
    pub fn end(&self, began: usize, end: End) {
        self.0.lock().unwrap().push(Event::Ended { began, end });
    }

    pub fn tally(&self) -> Tally {
        let mut tally = Tally::default();
        for event in self.0.lock().unwrap().iter() {
            match event {
                Event::Began { .. } => tally.unknown += 1,
                Event::Ended {
                    end: End::Unknown, ..
                } => {}
                Event::Ended {
                    end: End::Refused, ..
                } => {
                    tally.unknown -= 1;
                    tally.refused += 1;
                }
                Event::Ended { .. } => {
                    tally.unknown -= 1;
                    tally.done += 1;
                }
            }
        }
        tally
    }

    /// A number that two equal histories share: a replay can be held against it.
    pub fn fingerprint(&self) -> u32 {
        crc32fast::hash(format!("{:?}", self.0.lock().unwrap()).as_bytes())
    }

    /// Checks every key; on failure the key and its history, as text.
    pub fn check(&self) -> Result<(), String> {
        self.check_but(|_| false)
    }

    /// The same without the keys that are excused.
    pub fn check_but(&self, is_excused: impl Fn(&str) -> bool) -> Result<(), String> {
        let events = self.0.lock().unwrap().clone();
        let (mut ends, mut seen) = (BTreeMap::new(), BTreeSet::new());
        for event in &events {
            if let Event::Ended { began, end } = event {
                ends.insert(*began, *end);
                if let End::Got(Some(content)) = end {
                    seen.insert(*content);
                }
            }
        }
        let mut keys: BTreeMap<&str, Vec<_>> = BTreeMap::new();
        let mut open: BTreeMap<&str, Vec<_>> = BTreeMap::new();
        for (number, event) in events.iter().enumerate() {
            let began = match event {
                Event::Began { .. } => number,
                Event::Ended { began, .. } => *began,
            };
            let Event::Began { key, operation } = &events[began] else {
                unreachable!()
            };
            let end = ends.get(&began).copied().unwrap_or(End::Unknown);
            let what = match (*operation, end) {
                // It may have come last of all, and nobody saw it: it explains nothing, and each one
                // that the checker tries doubles its work.
                (Operation::Set(Some(content)), End::Unknown) if !seen.contains(&content) => {
                    continue;
                }
                (Operation::Get, End::Got(content)) => Register::Read(content),
                (Operation::Set(content), End::Done | End::Unknown) => Register::Write(content),
                _ => continue, // a get without an answer, a set that was refused
            };
            match event {
                Event::Began { .. } => {
                    keys.entry(key).or_default().push((began, Call(what)));
                    if end == End::Unknown {
                        open.entry(key).or_default().push((began, Response(what)));
                    }
                }
                Event::Ended {
                    end: End::Unknown, ..
                } => {}
                Event::Ended { .. } => keys.entry(key).or_default().push((began, Response(what))),
            }
        }
        for (key, mut actions) in keys {
            actions.extend(open.remove(key).unwrap_or_default());
            if !is_excused(key)
                && !WGLChecker::<Register>::is_linearizable(Sequence::from_actions(actions.clone()))
            {
                let lines: Vec<String> =
                    actions.iter().map(|action| format!("{action:?}")).collect();
                return Err(format!(
                    "key {key} is not linearizable:\n{}",
                    lines.join("\n")
                ));
            }
        }
        Ok(())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Read(Content),
    Write(Content),
}

impl Specification for Register {
    type State = Content;
    type Operation = Register;

    fn init() -> Content {
        None
    }

    fn apply(operation: &Register, state: &Content) -> (bool, Content) {
        match operation {
            Register::Read(content) => (content == state, *state),
            Register::Write(content) => (true, *content),
        }
    }
}

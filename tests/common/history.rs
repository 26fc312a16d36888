//! What clients asked and were told, in the order in which it happened, and whether a single
//! register for each key could have told them the same.

use std::collections::BTreeMap;
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
    /// A swap of this value, and of no other, by that one.
    Cas {
        expected: Content,
        new: Content,
    },
    /// The value stays, and ends at another time.
    Renew,
    /// A value ends by itself: some clock says so from now on, and somebody may make it nil.
    Expiry(u64),
    /// A swap of any value by a new one, which every attempt makes anew ([`History::made`]).
    Replace,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum End {
    /// A get's answer, or the value that a swap found in place of the one that it expected.
    Got(Content),
    /// A set or swap was confirmed.
    Done,
    /// A replace was confirmed, with the value that it made.
    Replaced(Content),
    /// It was refused: it changed nothing, at no time.
    Refused,
    /// Nobody knows: a set or swap may take effect at any later time, once.
    Unknown,
}

/// All operations of all clients.
#[derive(Debug, Default)]
pub struct History(Mutex<Vec<Event>>);

#[derive(Clone, Debug)]
enum Event {
    Began {
        key: String,
        operation: Operation,
    },
    Made {
        began: usize,
        old: Content,
        new: u64,
    },
    Ended {
        began: usize,
        end: End,
    },
    Calm,
    RingChanged,
}

/// How many operations ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tally {
    pub done: usize,
    pub refused: usize,
    pub unknown: usize,
    /// Those of the done and the unknown ones that are swaps.
    pub swapped: usize,
    pub unknown_swaps: usize,
    /// Values whose time was over.
    pub ended: usize,
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

    /// Notes that a replace may put this value in the place of that one. A swap may finish an
    /// earlier attempt: so the value that its answer names says which attempt it was.
    pub fn made(&self, began: usize, old: Content, new: u64) {
        self.0.lock().unwrap().push(Event::Made { began, old, new });
    }

    /// Notes how it ended. What never ends, because its client dies, is unknown.
    pub fn end(&self, began: usize, end: End) {
        self.0.lock().unwrap().push(Event::Ended { began, end });
    }

    /// Notes that from now on nothing fails.
    pub fn calm(&self) {
        self.0.lock().unwrap().push(Event::Calm);
    }

    /// Notes that the ring has changed for a node.
    pub fn ring_changed(&self) {
        self.0.lock().unwrap().push(Event::RingChanged);
    }

    pub fn tally(&self) -> Tally {
        let mut tally = Tally::default();
        for asked in all(&self.0.lock().unwrap()) {
            if matches!(asked.operation, Operation::Expiry(_)) {
                tally.ended += 1;
                continue; // nobody asked for it
            }
            let is_swap = matches!(
                asked.operation,
                Operation::Cas { .. } | Operation::Replace | Operation::Renew
            );
            let (count, swaps) = match asked.end {
                End::Unknown => (&mut tally.unknown, Some(&mut tally.unknown_swaps)),
                End::Refused => (&mut tally.refused, None),
                End::Got(_) => (&mut tally.done, None),
                End::Done | End::Replaced(_) => (&mut tally.done, Some(&mut tally.swapped)),
            };
            *count += 1;
            if let (true, Some(swaps)) = (is_swap, swaps) {
                *swaps += 1;
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
        let mut keys: BTreeMap<&str, Vec<Asked>> = BTreeMap::new();
        for asked in all(&events) {
            keys.entry(asked.key).or_default().push(asked);
        }
        for (key, asked) in keys {
            if !is_excused(key) {
                check_key(&asked, events.len()).map_err(|why| format!("key {key} {why}"))?;
            }
        }
        Ok(())
    }

    /// Whether a swap that nothing disturbed has an unknown outcome; if so which.
    pub fn check_calm(&self) -> Result<(), String> {
        let events = self.0.lock().unwrap();
        let calm = events.iter().position(|event| matches!(event, Event::Calm));
        let calm = calm.unwrap_or(events.len());
        let all = all(&events);
        let writes = |asked: &&Asked| asked.operation != Operation::Get;
        for swap in all.iter().filter(writes) {
            let meets = |other: &&Asked| {
                let is_other = other.began != swap.began && other.key == swap.key;
                is_other && other.began < swap.ended && other.ended > swap.began
            };
            let is_alone = !all.iter().filter(writes).any(|other| meets(&other));
            let is_over = swap.ended < events.len(); // else its client has died
            let mut meanwhile = events.iter().take(swap.ended).skip(swap.began);
            let is_disturbed =
                !is_alone || meanwhile.any(|event| matches!(event, Event::RingChanged));
            if swap.began > calm && is_over && !is_disturbed && swap.end == End::Unknown {
                let (key, operation) = (swap.key, swap.operation);
                return Err(format!(
                    "in calm times, with no other write of {key}, {operation:?} has an unknown outcome"
                ));
            }
        }
        Ok(())
    }
}

/// An operation, and the places in the history where it began and ended.
struct Asked<'a> {
    key: &'a str,
    operation: Operation,
    began: usize,
    made: Vec<(Content, u64)>,
    end: End,
    ended: usize,
}

fn all(events: &[Event]) -> Vec<Asked<'_>> {
    let mut asked: BTreeMap<usize, Asked> = BTreeMap::new();
    for (place, event) in events.iter().enumerate() {
        match event {
            Event::Began { key, operation } => {
                let operation = *operation;
                let (made, end, ended) = (Vec::new(), End::Unknown, events.len());
                let began = Asked {
                    key,
                    operation,
                    began: place,
                    made,
                    end,
                    ended,
                };
                asked.insert(place, began);
            }
            Event::Made { began, old, new } => {
                asked.get_mut(began).unwrap().made.push((*old, *new));
            }
            Event::Ended { began, end } => {
                let asked = asked.get_mut(began).unwrap();
                (asked.end, asked.ended) = (*end, place);
            }
            Event::Calm | Event::RingChanged => {}
        }
    }
    asked.into_values().collect()
}

impl Asked<'_> {
    /// What it certainly did; nothing if it was refused or is unknown.
    fn told(&self) -> Result<Option<Register>, String> {
        let (made, operation) = (&self.made, self.operation);
        Ok(match (operation, self.end) {
            (Operation::Cas { expected, .. }, End::Got(content)) if expected == content => {
                return Err(format!(
                    "has what {operation:?} expected, and was not swapped"
                ));
            }
            (Operation::Get | Operation::Cas { .. } | Operation::Renew, End::Got(content)) => {
                Some(Register::Read(content))
            }
            (Operation::Set(content), End::Done) => Some(Register::Write(content)),
            (Operation::Cas { expected, new }, End::Done) => Some(Register::Swap(expected, new)),
            (Operation::Replace, End::Replaced(content)) => {
                let attempt = made.iter().find(|(_, new)| Some(*new) == content);
                let (old, new) = attempt.ok_or_else(|| {
                    format!("was replaced by {content:?}, which was not made: {made:?}")
                })?;
                Some(Register::Swap(*old, Some(*new)))
            }
            (_, End::Refused | End::Unknown) => None,
            (_, end) => return Err(format!("answered {operation:?} with {end:?}")),
        })
    }

    /// What it may have done, if it is unknown: one of these, or nothing.
    fn perhaps(&self) -> Vec<Register> {
        let made = |(old, new): &(Content, u64)| Register::Swap(*old, Some(*new));
        match self.operation {
            _ if self.end != End::Unknown => vec![],
            Operation::Get | Operation::Renew | Operation::Expiry(_) => vec![],
            Operation::Set(content) => vec![Register::Write(content)],
            Operation::Cas { expected, new } => vec![Register::Swap(expected, new)],
            Operation::Replace => self.made.iter().map(made).collect(),
        }
    }
}

/// Where each value was seen first, by an operation that was certainly done.
struct Seen(BTreeMap<u64, usize>);

impl Seen {
    fn of(asked: &[Asked], told: &[Option<Register>]) -> Seen {
        let mut seen = Seen(BTreeMap::new());
        for (asked, register) in asked.iter().zip(told) {
            if let Some(Register::Read(content) | Register::Swap(content, _)) = register {
                seen.note(*content, asked.ended);
            }
        }
        // An unknown swap whose new value was seen has seen the old one.
        let perhaps: Vec<Register> = asked.iter().flat_map(Asked::perhaps).collect();
        while perhaps
            .iter()
            .filter(|register| seen.follow(register))
            .count()
            > 0
        {}
        seen
    }

    /// Whether it was not known to be seen as early.
    fn note(&mut self, content: Content, place: usize) -> bool {
        let Some(value) = content else {
            return false;
        };
        let first = self.0.entry(value).or_insert(usize::MAX);
        std::mem::replace(first, place.min(*first)) > place
    }

    /// What an unknown write is for the checker, and where it was over. One that nobody saw may
    /// have come last of all: it explains nothing.
    fn response(
        &self,
        register: Register,
        began: usize,
        end: usize,
    ) -> Option<(Register, (usize, u8))> {
        match register {
            Register::Write(Some(new)) | Register::Swap(_, Some(new)) => {
                let place = *self.0.get(&new)?;
                Some((register, (place, 0).max((began, 2))))
            }
            Register::Swap(None, None) => None,
            Register::Write(old) | Register::Swap(old, None) => {
                Some((Register::Lost(old, 0), (end, 2)))
            }
            _ => None,
        }
    }

    /// What the end of a value did. One that nobody saw, by an unknown write, may have hidden another one.
    fn hidden(&self, value: u64, perhaps: &[Register]) -> Register {
        let is_seen = |value: &u64| self.0.contains_key(value);
        let hides = |register: &Register| match *register {
            Register::Write(Some(new)) if new == value => Some(None),
            Register::Swap(Some(old), Some(new)) if new == value => Some(Some(old).filter(is_seen)),
            _ => None,
        };
        let hidden = perhaps.iter().find_map(hides).filter(|_| !is_seen(&value));
        Register::Lost(hidden.unwrap_or(Some(value)), 0)
    }

    fn follow(&mut self, register: &Register) -> bool {
        match register {
            Register::Swap(old, Some(new)) => match self.0.get(new).copied() {
                Some(place) => self.note(*old, place),
                None => false,
            },
            _ => false,
        }
    }
}

/// Whether a single register could have given one key's answers.
fn check_key(asked: &[Asked], end: usize) -> Result<(), String> {
    let told: Vec<_> = asked.iter().map(Asked::told).collect::<Result<_, _>>()?;
    let seen = Seen::of(asked, &told);
    let perhaps: Vec<Register> = asked.iter().flat_map(Asked::perhaps).collect();
    let (mut actions, mut any_lost, mut deletes) = (Vec::new(), false, 0);
    let there = |value| there(value, asked, &told, &seen);
    for (asked, told) in asked.iter().zip(&told) {
        let was_seen =
            |new: &u64| seen.0.contains_key(new) || asked.end == End::Replaced(Some(*new));
        let done: Vec<_> = asked.made.iter().filter(|(_, new)| was_seen(new)).collect();
        if done.len() > 1 {
            return Err(format!("was replaced twice by one swap: {done:?}"));
        }
        let told = told.as_ref().map(|register| (*register, (asked.ended, 1)));
        let unknown = || {
            asked
                .perhaps()
                .into_iter()
                .find_map(|register| seen.response(register, asked.began, end))
        };
        let action = match asked.operation {
            Operation::Expiry(value) => Some((seen.hidden(value, &perhaps), (end, 2))),
            _ => told.or_else(unknown),
        };
        if let Some((mut register, mut response)) = action {
            match &mut register {
                Register::Lost(None, number) => (*number, deletes) = (deletes, deletes + 1),
                Register::Lost(Some(value), number) => match there(*value) {
                    There::Never => continue,
                    There::Until(Some(place)) => (*number, response) = (1, (place, 2)),
                    There::Until(None) => {}
                },
                _ => {}
            }
            any_lost |= matches!(register, Register::Lost(..));
            if response.0 < asked.began {
                continue; // it had nothing to delete any more
            }
            actions.push(((asked.began, 1), asked.began, Call(register)));
            actions.push((response, asked.began, Response(register)));
        }
    }
    if any_lost {
        actions.push(((end, 0), end, Call(Register::End)));
        actions.push(((end, 1), end, Response(Register::End)));
    }
    actions.sort_by_key(|(place, ..)| *place);
    let actions: Vec<_> = actions
        .into_iter()
        .map(|(_, began, action)| (began, action))
        .collect();
    let lines: Vec<String> = actions.iter().map(|action| format!("{action:?}")).collect();
    match actions.is_empty()
        || WGLChecker::<Register>::is_linearizable(Sequence::from_actions(actions))
    {
        true => Ok(()),
        false => Err(format!("is not linearizable:\n{}", lines.join("\n"))),
    }
}

/// How long a value may have been there.
enum There {
    /// Nothing that is checked leaves it: its end finds nothing.
    Never,
    /// Not beyond the end of an operation that began after it was seen, or written, and that left another one; to the
    /// end where there is none. No value is written twice.
    Until(Option<usize>),
}

fn there(value: u64, asked: &[Asked], told: &[Option<Register>], seen: &Seen) -> There {
    let left = |register: &Register| match *register {
        Register::Read(content) | Register::Write(content) | Register::Swap(_, content) => content,
        Register::Lost(..) | Register::End => None,
    };
    let told = asked.iter().zip(told);
    let told = told.filter_map(|(asked, told)| Some((asked, left(told.as_ref()?))));
    let its_own = told.clone().filter(|(_, left)| *left == Some(value));
    let since = its_own
        .map(|(asked, _)| asked.ended)
        .chain(seen.0.get(&value).copied());
    let Some(since) = since.min() else {
        return There::Never;
    };
    let others = told.filter(|(asked, left)| asked.began > since && *left != Some(value));
    There::Until(others.map(|(asked, _)| asked.ended).min())
}

/// What happened to the register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Read(Content),
    Write(Content),
    /// The one value was there, and then the other.
    Swap(Content, Content),
    /// A delete that may have happened. Of those of any value, the first one that began happens first: nothing
    /// that a later one explains can it not explain as well. One of a single value has a 1 if it ends: then it has
    /// happened, or that value is not there any more.
    Lost(Content, usize),
    /// All that certainly happened did so before. What is lost comes after it, or where it
    /// explains an answer: each other place that the checker tries would double its work.
    End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct State {
    content: Content,
    /// It is nil by a lost delete, which explains nothing yet.
    unexplained: bool,
    deletes: usize, // that have happened, of those that may have
    is_over: bool,
}

impl Specification for Register {
    type State = State;
    type Operation = Register;

    fn init() -> State {
        State {
            content: None,
            unexplained: false,
            deletes: 0,
            is_over: false,
        }
    }

    fn apply(operation: &Register, state: &State) -> (bool, State) {
        let (content, is_over, deletes) = (state.content, state.is_over, state.deletes);
        let becomes = |content| State {
            content,
            unexplained: false,
            deletes,
            is_over,
        };
        match *operation {
            Register::Read(read) => (read == content, becomes(content)),
            Register::Write(new) => (!state.unexplained, becomes(new)),
            Register::Swap(old, new) => (old == content, becomes(new)),
            Register::Lost(..) if is_over => (true, *state),
            Register::Lost(old, number) => {
                let is_next = match old {
                    None => content.is_some() && number == deletes,
                    Some(_) if old != content && number == 1 => return (true, *state),
                    Some(_) => old == content,
                };
                (
                    is_next,
                    State {
                        unexplained: true,
                        deletes: deletes + usize::from(old.is_none()),
                        ..becomes(None)
                    },
                )
            }
            Register::End => (
                !state.unexplained,
                State {
                    is_over: true,
                    ..*state
                },
            ),
        }
    }
}

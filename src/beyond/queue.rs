//! A queue of tasks in the ring. Each task is given to one taker, in the order in which they were put.
//!
//! The tasks have the numbers 0, 1, 2 and so on. Number n lies in the slot `QUEUE:(n % SLOTS)`, which only a swap
//! changes. A put makes `[n, putter, nil, task]` of a slot whose task before was taken, and a take makes
//! `[n, putter, taker]` of that. So no number is without a task, and whose swap was the one is seen also where
//! its answer was lost. `QUEUE:put` and `QUEUE:got` only say where to begin: all numbers before them were put, or taken.
//!
//! ```text
//!        got             put
//! [0,…] [1,…] [2,…,tea] [3,…,milk] nil  …
//!        └─ the next take └─ is 2     └─ and the next put 4
//! ```

use std::cmp::Ordering::{Equal, Greater, Less};
use std::fmt::Display;
use std::time::Duration;

use futures::future::join;
use msgpack_rpc::Value;
use tokio::time::sleep;

use crate::beyond::swap::Swapped;
use crate::client::Client;
use crate::entry::Packed;
use crate::error::{Error, Kind, plain};
use crate::sabotage::{Bug, planted};

/// So many tasks may wait in a queue. Slots are used again, since a key stays whose value is deleted.
const SLOTS: u64 = 100_000;
/// Before a slot is looked at again whose swap has an unknown outcome.
const PAUSE: Duration = Duration::from_millis(200);

/// What a slot means for one who puts, or takes.
enum Slot {
    Own,         // it shows its own swap
    Swap(Value), // it becomes this
    PassOver,
    Lost, // a later task is there: what became of its own is not known any more
    End,  // of the queue: there is no room, or no task
}

/// A put of this task, or a take.
struct Step<'a> {
    put: Option<&'a Value>,
    id: Value,
    number: u64,
    task: Value, // that was taken
}

impl Client {
    /// Puts a task, which is not nil, at the end of a queue, once. An error means that it is not there, but for
    /// `unknown-outcome:`. While the outcome is unknown, this goes on until it is known, or all slots are used again: if
    /// it is dropped in the middle, the task may be there.
    pub async fn put_task(&self, queue: &[u8], task: &Packed) -> Result<(), Error> {
        let task = task.value()?;
        let full = || format!("queue {:?} has {SLOTS} tasks that wait", plain(queue));
        match self.step(queue, Some(&task)).await? {
            Some(_) => Ok(()),
            None => Err(Error::new(Kind::Full, full())),
        }
    }

    /// Takes the first task of a queue, if there is one. No other take gets it: if this is dropped in the middle, or
    /// ends with `unknown-outcome:`, the task may be lost.
    pub async fn take_task(&self, queue: &[u8]) -> Result<Option<Packed>, Error> {
        Ok(self.step(queue, None).await?.map(Packed::of))
    }

    async fn step(&self, queue: &[u8], put: Option<&Value>) -> Result<Option<Value>, Error> {
        let hint = key(queue, if put.is_some() { "put" } else { "got" });
        let begin = self.get(&hint).await?.value()?.as_u64().unwrap_or(0);
        let mut step = Step {
            put,
            id: fastrand::u32(..).into(), // with the number beside it
            number: begin,
            task: Value::Nil,
        };
        let mut is_sent = false;
        loop {
            let slot = key(queue, step.number % SLOTS);
            let hint = (&*hint, (step.number > begin).then_some(step.number));
            match self.try_step(&mut step, &slot, hint).await {
                Ok(Slot::Own) => return Ok(Some(step.task)),
                Ok(Slot::End) => return Ok(None),
                Ok(Slot::Lost) if is_sent => {
                    let why = format!("{SLOTS} later tasks came while it had no answer");
                    return Err(Error::new(Kind::UnknownOutcome, why));
                }
                Ok(Slot::PassOver | Slot::Lost) => {
                    (step.number, is_sent) = (step.number + 1, false);
                }
                Ok(Slot::Swap(_)) => {} // others were faster
                Err(error) if is_sent || error.kind == Kind::UnknownOutcome => {
                    if planted(Bug::UnknownTaskTakenForDone) {
                        return Ok(Some(step.task));
                    }
                    if planted(Bug::UnknownTaskTakenForRefused) {
                        return Err(error);
                    }
                    is_sent = true;
                    sleep(PAUSE).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn try_step(
        &self,
        step: &mut Step<'_>,
        slot: &[u8],
        (hint, begin): (&[u8], Option<u64>),
    ) -> Result<Slot, Error> {
        let kept = self.get(slot).await?;
        let old = kept.value()?;
        let Slot::Swap(new) = step.at(&old) else {
            return Ok(step.at(&old));
        };
        step.task = old[3].clone();
        let new = Packed::of(new);
        let told = async {
            if let Some(begin) = begin {
                let _ = self.set(hint, &Packed::of(begin)).await; // others only look at more slots
            }
        };
        let (swapped, ()) = join(self.cas(slot, &kept, &new), told).await;
        Ok(match swapped? {
            Swapped::Done(_) => Slot::Own,
            Swapped::Not(_) => Slot::Swap(Value::Nil),
        })
    }
}

impl Step<'_> {
    /// What to do with the slot of its number, in which this is.
    fn at(&self, old: &Value) -> Slot {
        let (number, id) = (self.number, &self.id);
        let own = if self.put.is_some() { 1 } else { 2 };
        match (old[0].as_u64().cmp(&Some(number)), self.put) {
            (Less, Some(task)) if old[3].is_nil() => {
                Slot::Swap(vec![number.into(), id.clone(), Value::Nil, task.clone()].into())
            }
            (Less, _) => Slot::End,
            (Equal, _) if old[own] == *id => Slot::Own,
            (Equal, None) if !old[3].is_nil() => {
                Slot::Swap(vec![number.into(), old[1].clone(), id.clone()].into())
            }
            (Greater, _) => Slot::Lost,
            _ => Slot::PassOver,
        }
    }
}

fn key(queue: &[u8], part: impl Display) -> Vec<u8> {
    [queue, format!(":{part}").as_bytes()].concat()
}

//! Compare and set, and counting: what a register cannot do, since two writers may both read the old
//! value. A swap does it, beside sets that never wait for it (`replicas/swap.rs` has the protocol).

use std::sync::Arc;
use std::time::Duration;

use futures::future::OptionFuture;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};

use crate::client::Client;
use crate::entry::{Packed, check_value, key, value};
use crate::error::{Error, Kind};
use crate::replicas::{Swapped as Outcome, Turns, Waiting};
use crate::rpc::Answer;
use crate::rpc::codec::{self, Encoded, encode_bytes, encode_numbers, number, quoted, string};
use crate::server::Node;
use crate::store::Prepare;

pub use crate::replicas::Swapped;

/// A longer window is taken for this one: a node gives an operation twice as long.
const LONGEST: Duration = Duration::from_millis(2500);

/// A change that can travel: what a client asks of a node.
#[derive(Clone)]
pub(crate) enum Swap {
    /// Writes the new value where the expected one is.
    Cas { expected: Packed, new: Packed },
    /// Adds this.
    Incr { by: i128 },
}

impl Client {
    /// Replaces the value of a key by what the function makes of it: nil deletes, `None` leaves it. The
    /// function may be asked several times, of which one counts. What it makes stays, unless it says
    /// when it ends ([`Packed::until`]). An error says whether nothing was changed, or
    /// (`unknown-outcome:`) it may have been, once. Prefer [`Client::cas`] and [`Client::incr`] where
    /// many clients change one key: its owner lets them take turns.
    pub async fn swap(
        &self,
        key: &[u8],
        mut change: impl FnMut(&Packed) -> Option<Packed> + Send,
    ) -> Result<Swapped, Error> {
        let mut change = |old: &Packed, _| change(&old.clone().plain());
        Ok(self.replicas.of(key)?.swap(&mut change, true).await?.into())
    }

    /// Writes a new value where the expected one is; nil is an absent key, in both places.
    pub async fn cas(&self, key: &[u8], expected: &Packed, new: &Packed) -> Result<Swapped, Error> {
        let (expected, new) = (expected.clone(), new.clone());
        let swap = Swap::Cas { expected, new };
        self.swap_anywhere(key, &swap, None).await
    }

    /// Adds to an integer, absent is 0; the new value. `bad-request:` where the value is no integer, or
    /// the sum is none of 64 bits.
    pub async fn incr(&self, key: &[u8], by: i64) -> Result<i128, Error> {
        let by = by.into();
        let swap = Swap::Incr { by };
        let swapped = self.swap_anywhere(key, &swap, None).await?;
        swap.sum(key, swapped)
    }

    /// Does a swap here, a node in turn. Where swaps of others are in its way, or were a moment ago, the
    /// key's owner is asked to do it, as long as it was surely not done and there is time.
    pub(crate) async fn swap_anywhere(
        &self,
        key: &[u8],
        swap: &Swap,
        node: Option<&Arc<Self>>,
    ) -> Result<Swapped, Error> {
        let (end, turns) = (Instant::now() + self.replicas.timeout, &self.replicas.turns);
        let left = || end.saturating_duration_since(Instant::now());
        let mut insists = turns.is_contended(key);
        loop {
            let at_owner = match insists {
                true => self.at_owner(key, swap).await,
                false => None,
            };
            let done = match (at_owner, node) {
                (Some(answer), _) => answer.and_then(|answer| swap.read(&answer)),
                (None, Some(node)) if insists => node.at_home(key, swap).await,
                (None, Some(node)) => node.in_turn(key, swap, insists, end).await,
                (None, None) => {
                    let operation = self.replicas.of_until(key, end)?;
                    let ended = operation.swap(&mut |old, _| swap.made(old), insists).await;
                    ended.map(Swapped::from)
                }
            };
            match done {
                Err(error) if was_not_done(&error) && left() > self.window() => {
                    if insists {
                        sleep(self.window() / 20).await;
                    }
                    insists = true;
                    turns.note_contended(key);
                }
                done => return done,
            }
        }
    }

    fn window(&self) -> Duration {
        self.replicas.cluster().limits.window.min(LONGEST)
    }

    async fn at_owner(&self, key: &[u8], swap: &Swap) -> Option<Result<Encoded, Error>> {
        let (_, params) = swap.request(key);
        let params: Vec<&[u8]> = params.iter().map(|param| &**param).collect();
        self.replicas.ask_owner(key, "swap", &params).await
    }

    /// Does a swap that insists when its turn has come: as the key's owner does for other nodes.
    async fn at_home(self: &Arc<Self>, key: &[u8], swap: &Swap) -> Result<Swapped, Error> {
        self.in_turn(key, swap, true, self.deadline(true)).await
    }

    /// Does a swap when its turn has come.
    async fn in_turn(
        self: &Arc<Self>,
        key: &[u8],
        swap: &Swap,
        insists: bool,
        deadline: Instant,
    ) -> Result<Swapped, Error> {
        let mut answered = None;
        let number = self.replicas.turns.enter(key, || {
            let (answer, received) = oneshot::channel();
            answered = Some(received);
            let (since, swap) = (Instant::now(), swap.clone());
            let change = Box::new(move |old: &Packed, _| swap.made(old));
            Waiting {
                since,
                change,
                insists,
                answer,
            }
        });
        let client = self;
        let Some(number) = number else {
            return self.wait(key, answered).await;
        };
        let _turn = Turn {
            client,
            key,
            number,
        };
        let operation = self.replicas.of_until(key, deadline)?;
        let mut change = |old: &Packed, _| swap.made(old);
        Ok(operation.swap(&mut change, insists).await?.into())
    }

    /// Waits for a swap that is done together with others: after the one before them, or when that has taken too
    /// long.
    async fn wait(
        self: &Arc<Self>,
        key: &[u8],
        answered: Option<oneshot::Receiver<Result<Swapped, Error>>>,
    ) -> Result<Swapped, Error> {
        let unknown = |why| Error::new(Kind::UnknownOutcome, why);
        let (turns, longest) = (&self.replicas.turns, self.replicas.timeout);
        let mut waits = Waits {
            turns,
            key,
            answered,
        };
        for _ in 0..2 {
            let answer = OptionFuture::from(waits.answered.as_mut());
            if let Ok(answer) = timeout(longest, answer).await {
                waits.answered = None;
                let stopping = || unknown("this node is stopping");
                return answer.and_then(Result::ok).ok_or_else(stopping)?;
            }
            if let Some((number, waiting)) = turns.take_over(key, longest) {
                Turn::of_all(self, key, number, waiting);
            }
        }
        Err(unknown("it has waited too long for its turn"))
    }

    /// By when a swap must have ended here. An owner must answer before the one who asks takes it for silent.
    fn deadline(&self, insists: bool) -> Instant {
        let patience = match insists {
            true => self.window() / 2,
            false => self.replicas.timeout,
        };
        Instant::now() + patience
    }

    /// Those of these swaps for which somebody still waits. Who has waited too long is told so.
    fn in_time(&self, mut waiting: Vec<Waiting>) -> Vec<Waiting> {
        waiting.retain(|swap| !swap.answer.is_closed());
        let is_late = |swap: &Waiting| swap.insists && swap.since.elapsed() > self.window() / 4;
        let (late, in_time): (Vec<_>, Vec<_>) = waiting.into_iter().partition(is_late);
        for swap in late {
            let why = "it has waited too long for its turn";
            let _ = swap.answer.send(Err(Error::new(Kind::Unavailable, why)));
        }
        in_time
    }

    /// Does all of these as one swap, one after the other.
    async fn swap_all(&self, key: &[u8], waiting: Vec<Waiting>) {
        let mut waiting = self.in_time(waiting);
        let insists = waiting.iter().any(|swap| swap.insists);
        let mut made = Vec::new(); // by each change that was asked for, what became of each swap
        let mut change = |old: &Packed, stamp| {
            let mut value = old.clone();
            let each = |swap: &mut Waiting| match (swap.change)(&value, stamp) {
                None => Outcome::Not(value.clone().plain()),
                Some(new) => {
                    value = new;
                    Outcome::Done(value.clone().plain())
                }
            };
            let swaps: Vec<Outcome> = waiting.iter_mut().map(each).collect();
            let is_done = swaps.iter().any(|swap| matches!(swap, Outcome::Done(_)));
            made.push((!is_done, swaps));
            is_done.then_some(value)
        };
        let ended = match self.replicas.of_until(key, self.deadline(insists)) {
            Ok(operation) => operation.swap(&mut change, insists).await,
            Err(error) => Err(error),
        };
        if ended.as_ref().is_err_and(is_of_one) && waiting.len() > 1 {
            for swap in waiting {
                Box::pin(self.swap_all(key, vec![swap])).await; // one is too large: which one?
            }
            return;
        }
        let mut outcomes = ended.map(|ended| ended.noted(made).unwrap_or_default().into_iter());
        for swap in waiting {
            let outcome = match &mut outcomes {
                Ok(outcomes) => outcomes.next().ok_or_else(odd),
                Err(error) => Err(error.clone()),
            };
            let _ = swap.answer.send(outcome); // its guest may be gone
        }
    }
}

/// The turn of a key's swaps. When it ends, those that wait are done: also if the guest whose swap it
/// was has gone away.
struct Turn<'a> {
    client: &'a Arc<Client>,
    key: &'a [u8],
    number: u64,
}

impl Turn<'_> {
    /// Has all of these done, whether their guests read or not.
    fn of_all(client: &Arc<Client>, key: &[u8], number: u64, waiting: Vec<Waiting>) {
        if let Ok(runtime) = Handle::try_current() {
            let (client, key) = (client.clone(), key.to_vec());
            runtime.spawn(async move {
                let (client, key) = (&client, &*key);
                let _turn = Turn {
                    client,
                    key,
                    number,
                };
                client.swap_all(key, waiting).await;
            });
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let Turn {
            client,
            key,
            number,
        } = *self;
        if let Some(waiting) = client.replicas.turns.next(key, number) {
            Turn::of_all(client, key, number, waiting);
        }
    }
}

/// A swap that waits for its turn.
struct Waits<'a> {
    turns: &'a Turns,
    key: &'a [u8],
    answered: Option<oneshot::Receiver<Result<Swapped, Error>>>, // until it is
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        if self.answered.take().is_some() {
            self.turns.leave(self.key);
        }
    }
}

impl Node {
    /// Answers the methods of swaps.
    pub async fn swap(&self, method: &str, params: &[&[u8]]) -> Result<Answer, Error> {
        let (swap, key) = match (method, params) {
            ("promise", [ring, k, ballot]) => {
                let odd = || Error::bad_request("a ballot is from 1 to 2^64-1");
                let (key, prepare) = (key(k)?, Prepare::read(ballot).ok_or_else(odd)?);
                return Ok(self.store.on(ring)?.promise(key, prepare)?.into());
            }
            ("set", [k, new, ttl]) => {
                let new = self.client.lasting(value(new)?, time(ttl))?;
                return Ok(self.client.set(key(k)?, &new).await?.into());
            }
            ("cas", [k, expected, new]) => (Swap::cas(value(expected)?, value(new)?)?, key(k)?),
            ("cas", [k, expected, new, ttl]) => {
                let new = self.client.lasting(value(new)?, time(ttl))?;
                (Swap::cas(value(expected)?, &new)?, key(k)?)
            }
            ("swap", [k, expected, new]) => (Swap::cas(expected, new)?, key(k)?),
            ("incr" | "swap", [k, by]) => (Swap::Incr { by: integer(by)? }, key(k)?),
            ("incr", [k]) => (Swap::Incr { by: 1 }, key(k)?),
            _ => return Err(Error::not_a_request(method, params.len())),
        };
        let client = &self.client;
        let swapped = match method {
            "swap" => client.at_home(key, &swap).await, // another node asks the owner
            _ => client.swap_anywhere(key, &swap, Some(client)).await,
        };
        swap.answer(key, swapped?)
    }
}

/// Whether it was surely not done, and may be at another time or place.
fn was_not_done(error: &Error) -> bool {
    matches!(error.kind, Kind::Unavailable | Kind::Joining)
}

/// Whether it failed for what one of several swaps brings.
fn is_of_one(error: &Error) -> bool {
    matches!(error.kind, Kind::Full | Kind::TooLarge)
}

impl Swap {
    fn cas(expected: &[u8], new: &[u8]) -> Result<Self, Error> {
        check_value(expected).and_then(|()| check_value(new))?;
        let (expected, new) = (expected.into(), new.into());
        Ok(Swap::Cas { expected, new })
    }

    /// What it makes of a value.
    fn made(&self, old: &Packed) -> Option<Packed> {
        let plain = old.clone().plain();
        match self {
            Swap::Cas { expected, new } => are_equal(&plain, expected).then(|| new.clone()),
            // A counter lives no longer for being counted.
            Swap::Incr { by } => Some(sum(&[], &plain, *by).ok()?.until(old.end())),
        }
    }

    /// The method of guests, and the parameters.
    pub(crate) fn request(&self, key: &[u8]) -> (&'static str, Vec<Encoded>) {
        let key = encode_bytes(key);
        match self {
            Swap::Cas { expected, new } => {
                let [expected, new] = [expected, new].map(|value| Encoded::from_slice(value));
                ("cas", vec![key, expected, new])
            }
            Swap::Incr { by } => ("incr", vec![key, Encoded::from_slice(&packed(*by))]),
        }
    }

    /// The answer to a guest.
    fn answer(&self, key: &[u8], swapped: Swapped) -> Result<Answer, Error> {
        match (self, swapped) {
            (Swap::Cas { .. }, Swapped::Done(_)) => {
                Ok(Encoded::from_slice(&[0x92, 0xc3, 0xc0]).into())
            }
            (Swap::Cas { .. }, Swapped::Not(current)) => {
                Ok(Encoded::from([&[0x92, 0xc2], &*current].concat()).into())
            }
            (Swap::Incr { .. }, Swapped::Done(sum)) => Ok(sum.into()),
            (Swap::Incr { .. }, left) => Ok(packed(self.sum(key, left)?).into()),
        }
    }

    /// The sum, or why there is none.
    pub(crate) fn sum(&self, key: &[u8], swapped: Swapped) -> Result<i128, Error> {
        match (self, swapped) {
            (Swap::Incr { by }, Swapped::Not(value)) => {
                Err(sum(key, &value, *by).err().unwrap_or_else(odd))
            }
            (_, Swapped::Done(value) | Swapped::Not(value)) => integer(&value),
        }
    }

    /// Reads such an answer.
    pub(crate) fn read(&self, answer: &[u8]) -> Result<Swapped, Error> {
        match (self, codec::items(answer).as_deref()) {
            (Swap::Cas { new, .. }, Some([[0xc3], _])) => Ok(Swapped::Done(new.clone().plain())),
            (Swap::Cas { .. }, Some([[0xc2], current])) => Ok(Swapped::Not(Packed::from(*current))),
            (Swap::Incr { .. }, _) => Ok(Swapped::Done(Packed::from(answer))),
            _ => Err(odd()),
        }
    }
}

/// Whether two values have equal bytes. Str, bin and raw with the same bytes are equal.
fn are_equal(one: &[u8], other: &[u8]) -> bool {
    match (string(one), string(other)) {
        (Some(one), Some(other)) => one == other,
        _ => one == other,
    }
}

/// A value and so much more.
fn sum(key: &[u8], old: &Packed, by: i128) -> Result<Packed, Error> {
    let refused = |error: Error| {
        let key = String::from_utf8_lossy(key);
        Error::bad_request(format!("key {key:?}: {}", error.why))
    };
    let old = if old.is_nil() {
        0
    } else {
        integer(old).map_err(refused)?
    };
    let sum = packed(old + by);
    match sum.is_nil() {
        false => Ok(sum),
        true => Err(refused(Error::bad_request(format!(
            "{old} and {by} are beyond 64 bits"
        )))),
    }
}

/// A time to live, in milliseconds. What is none is as if it were 0.
fn time(ttl: &[u8]) -> Duration {
    Duration::from_millis(number(ttl).unwrap_or(0))
}

pub(crate) fn integer(value: &[u8]) -> Result<i128, Error> {
    let is_none = || Error::bad_request(format!("{} is no integer", quoted(value)));
    codec::integer(value).ok_or_else(is_none)
}

/// An integer as MessagePack; nil if it has more than 64 bits.
fn packed(integer: i128) -> Packed {
    let encoded = match (u64::try_from(integer), i64::try_from(integer)) {
        (Ok(integer), _) => encode_numbers([integer]),
        (_, Ok(negative)) => codec::encode(&negative.into()).into(),
        _ => return Packed::default(),
    };
    Packed::from(&*encoded)
}

fn odd() -> Error {
    Error::new(Kind::UnknownOutcome, "not an answer to a swap")
}

//! What a swap asks of a replica, and what that answers.

use std::slice;

use smallvec::SmallVec;

use crate::entry::{Entry, Packed, Stamp, entry};
use crate::error::Error;
use crate::rpc::Answer;
use crate::rpc::codec::{self, Encoded, NIL, encode_numbers};

/// What a swap asks of a replica: to accept no swap of a key with a lower ballot.
#[derive(Clone, Copy)]
pub struct Prepare {
    /// From 1.
    pub ballot: u64,
    /// Whether no memory may be lacking for it: for a get, a delete, or what has begun.
    pub is_read: bool,
    /// The stamp of an entry that the asker has: the same need not be sent.
    pub known: Option<Stamp>,
}

impl Prepare {
    /// For a swap that knows nothing yet.
    pub fn of(ballot: u64) -> Self {
        Prepare {
            ballot,
            is_read: false,
            known: None,
        }
    }

    /// As a parameter: the ballot, `[ballot]` for a get, or `[ballot, counter, writer, ballot]` with the
    /// stamp that is known.
    pub fn encoded(self) -> Encoded {
        let (begin, known): (&[u8], _) = match self.known {
            _ if self.is_read => (&[0x91], Encoded::new()),
            Some(known) => (
                &[0x94],
                encode_numbers([known.counter, known.writer, known.ballot]),
            ),
            None => (&[], Encoded::new()),
        };
        let mut out = Encoded::from_slice(begin);
        out.extend_from_slice(&encode_numbers([self.ballot]));
        out.extend_from_slice(&known);
        out
    }

    /// Reads it.
    pub fn read(param: &[u8]) -> Option<Self> {
        let array = codec::items(param);
        let parts = array.as_deref().unwrap_or(slice::from_ref(&param));
        let numbers = parts.iter().map(|part| codec::number(part));
        let numbers: SmallVec<[u64; 4]> = numbers.collect::<Option<_>>()?;
        let (ballot, known) = match *numbers {
            [ballot] => (ballot, None),
            [ballot, counter, writer, known] => (ballot, Some(Stamp::new(counter, writer, known))),
            _ => return None,
        };
        (ballot > 0).then_some(Prepare {
            ballot,
            is_read: array.is_some() && known.is_none(),
            known,
        })
    }
}

/// What a replica answers to a swap that asks for its promise.
pub enum Promise {
    /// It is given; this is what is kept.
    Given(Entry),
    /// It is given; what is kept is known.
    Same,
    /// As much is promised already: this ballot.
    Refused(u64),
}

impl From<Promise> for Answer {
    fn from(promise: Promise) -> Self {
        match promise {
            Promise::Given(entry) => entry.into(),
            Promise::Same => Packed::default().into(),
            Promise::Refused(promised) => encode_numbers([promised]).into(),
        }
    }
}

impl Promise {
    /// Reads it.
    pub fn read(bytes: &[u8]) -> Result<Self, Error> {
        match codec::number(bytes) {
            Some(promised) => Ok(Promise::Refused(promised)),
            None if bytes == NIL => Ok(Promise::Same),
            None => entry(bytes).map(|entry| Promise::Given(entry.to_owned())),
        }
    }
}

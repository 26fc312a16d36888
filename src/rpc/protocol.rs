//! What the bytes of a connection mean. The loop that serves connections knows only [`Protocol`]; here
//! is the one that nodes speak, MessagePack-RPC, for any [`Service`].

use std::future::Future;
use std::panic::AssertUnwindSafe;

use bytes::{Buf as _, BytesMut};
use futures::FutureExt as _;

use super::codec::{Codec, Malformed, Request, write_response};
use super::meter::{Counted, Meter};
use super::{Answer, Reached, Service};
use crate::error::{Error, Kind};
use crate::methods::AMONG_NODES;

/// What a request counts for in a turn beside its bytes.
pub const REQUEST: usize = 64;
/// What a value in it counts for beside its bytes: it is walked over up to five times.
const VALUE: usize = 8;
/// A message longer than this takes its buffer along, so that none of its size stays behind.
const LARGE: usize = 32 << 10;

/// How requests are found in a stream of bytes, answered, and their answers written.
pub trait Protocol: Sync {
    /// How far one connection is in its requests and answers.
    type Stream: Default + Send;
    /// A request that was taken off the input.
    type Request: Send;
    /// What is said to it.
    type Reply: Send;
    /// Whether answers leave in the order of their requests. If not, they say whose they are.
    const IN_ORDER: bool;

    /// Takes a request off the front of the input; `None` if its end is still to come. What has no
    /// place in the stream is a request too, which is answered with an error.
    fn next(&self, stream: &mut Self::Stream, input: &mut BytesMut)
    -> Option<Found<Self::Request>>;

    /// Refuses what a client asks on a connection that is kept for the other nodes.
    fn of_a_node(&self, _request: &Self::Request) -> Result<(), Self::Reply> {
        Ok(())
    }

    /// Answers a request.
    fn answer(&self, request: Self::Request) -> impl Future<Output = Self::Reply> + Send;

    /// What is said to an unfinished request that is given up for this reason.
    fn give_up(&self, input: &[u8], error: Error) -> Self::Reply;

    /// Nothing more is read: most likely the client has gone, but it may still read. Told more than once.
    fn ended(&self, _stream: &mut Self::Stream) {}

    /// Appends a reply to the output. If this is false, it was the last one of the connection.
    fn write(&self, stream: &mut Self::Stream, reply: Self::Reply, out: &mut Vec<u8>) -> bool;

    /// How many bytes a reply takes that waits for those before it.
    fn size(reply: &Self::Reply) -> usize;

    /// How many bytes were moved for a reply, where it is smaller than that.
    fn moved(_reply: &Self::Reply) -> usize {
        0
    }

    /// What holds a reply back, if anything does. Others may overtake it.
    fn held(_reply: &mut Self::Reply) -> Option<Reached> {
        None
    }

    /// Where what is answered is counted, if it is.
    fn meter(&self) -> Option<&Meter> {
        None
    }

    /// How a reply is counted, and whether it is an error.
    fn counted(_reply: &Self::Reply) -> Option<(Counted, bool)> {
        None
    }
}

/// A request, and what it costs.
pub struct Found<R> {
    /// The request.
    pub request: R,
    /// The bytes that it takes until it is answered.
    pub bytes: usize,
    /// What it counts for beside them in the connection's turn.
    pub work: usize,
}

/// MessagePack-RPC, answered by a service, and counted.
pub(super) struct MessagePackRpc<'a, S>(pub(super) &'a S, pub(super) &'a Meter);

/// What is said to one request.
pub(super) struct Reply {
    id: Option<u32>,
    recoverable: bool, // the next message in the stream can still be found
    counted: Option<Counted>,
    result: Result<Answer, Error>,
    held: Option<Box<Reached>>, // boxed: most replies have none
}

impl From<Malformed> for Reply {
    fn from(malformed: Malformed) -> Self {
        Reply {
            id: malformed.id,
            recoverable: malformed.recoverable,
            counted: None,
            held: None,
            result: Err(malformed.error),
        }
    }
}

impl<S: Service> Protocol for MessagePackRpc<'_, S> {
    type Stream = Codec;
    type Request = Result<BytesMut, Malformed>;
    type Reply = Reply;
    const IN_ORDER: bool = false;

    fn next(&self, codec: &mut Codec, input: &mut BytesMut) -> Option<Found<Self::Request>> {
        let request = match codec.next(input) {
            Ok(None) => return None,
            Ok(Some(end)) => Ok(take(input, end)),
            Err(malformed) => Err(malformed),
        };
        // The message itself, and once more as it goes to other nodes.
        let bytes = 2 * request.as_ref().map_or(0, BytesMut::len);
        let work = REQUEST + VALUE * codec.last_values;
        Some(Found {
            request,
            bytes,
            work,
        })
    }

    fn of_a_node(&self, request: &Self::Request) -> Result<(), Reply> {
        let Ok(message) = request else {
            return Ok(()); // it is refused for what it is
        };
        let Request { id, method, .. } = Request::read(message)?;
        if AMONG_NODES.contains(&method) {
            return Ok(());
        }
        Err(Reply {
            id,
            recoverable: false,
            counted: None,
            held: None,
            result: Err(Error::new(
                Kind::Unavailable,
                "all connections for clients are taken",
            )),
        })
    }

    /// A panic of the service becomes an error.
    async fn answer(&self, request: Self::Request) -> Reply {
        let message = match request {
            Ok(message) => message,
            Err(malformed) => return malformed.into(),
        };
        let Request { id, method, params } = match Request::read(&message) {
            Ok(request) => request,
            Err(malformed) => return malformed.into(),
        };
        let counted = self.1.begin(method);
        let answering = AssertUnwindSafe(self.0.answer(method, &params)).catch_unwind();
        let panicked = |_| {
            let why = format!("{method} failed inside the node; its log says where");
            Err(Error::new(Kind::UnknownOutcome, why))
        };
        let result = answering.await.unwrap_or_else(panicked);
        let held = match &result {
            Ok(_) => self.0.held(method, &params), // by what the answer has just read or changed
            Err(_) => None,                        // it reveals nothing
        };
        Reply {
            id,
            recoverable: true,
            counted,
            result,
            held: held.map(Box::new),
        }
    }

    fn give_up(&self, input: &[u8], error: Error) -> Reply {
        Malformed::lost(input, error).into()
    }

    fn write(&self, _: &mut Codec, reply: Reply, out: &mut Vec<u8>) -> bool {
        if let Some(id) = reply.id {
            write_response(out, id, &reply.result);
        }
        if let (false, Err(error)) = (reply.recoverable, reply.result) {
            // The stream cannot be trusted any more. What is in flight is still answered.
            log::debug!("a connection is closed: {error}");
        }
        reply.recoverable
    }

    fn size(_: &Reply) -> usize {
        0
    }

    fn held(reply: &mut Reply) -> Option<Reached> {
        reply.held.take().map(|held| *held)
    }

    fn meter(&self) -> Option<&Meter> {
        Some(self.1)
    }

    fn counted(reply: &Reply) -> Option<(Counted, bool)> {
        Some((reply.counted?, reply.result.is_err()))
    }
}

/// Takes a message off the front. A large one keeps the buffer, and what lies behind it gets a new
/// one: two that shared a buffer would hold more than either is counted for.
pub fn take(input: &mut BytesMut, end: usize) -> BytesMut {
    let (message, rest) = input.split_at_checked(end).unwrap_or_default();
    if end < LARGE.max(rest.len()) {
        let message = message.into();
        input.advance(end);
        return message;
    }
    let rest = rest.into();
    let mut message = std::mem::replace(input, rest);
    message.truncate(end);
    message
}

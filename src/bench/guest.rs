//! MessagePack-RPC as plain clients speak it: `get` and `set` of any node.

use super::{Answer, Op, Parsed, Response, Values, Wire, key};
use crate::rpc::codec::{self, Codec, Response as Reply};

/// A guest of one node.
#[derive(Debug, Default)]
pub struct Guest;

impl Wire for Guest {
    fn request(&mut self, out: &mut Vec<u8>, id: u32, op: Op, number: u32, values: &Values) {
        out.extend([0x94, 0x00, 0xce]);
        out.extend(id.to_be_bytes());
        out.extend(match op {
            Op::Get => b"\xa3get\x91\xb0",
            Op::Set => b"\xa3set\x92\xb0",
        });
        out.extend(key(number));
        if op == Op::Set {
            let len = u32::try_from(values.len()).unwrap_or(u32::MAX);
            let _ = rmp::encode::write_str_len(out, len); // a Vec takes every byte
            values.write(out, number);
        }
    }

    fn response<'a>(&mut self, input: &'a [u8], _: &mut Vec<u8>) -> Parsed<'a> {
        let Some((head, rest)) = input.split_first_chunk::<8>() else {
            return Ok(None);
        };
        let [0x94, 0x01, 0xce, i, j, k, l, 0xc0] = *head else {
            return any(input);
        };
        let id = u32::from_be_bytes([i, j, k, l]);
        let size = |width: usize| {
            let digits = rest.get(1..=width)?;
            Some(
                digits
                    .iter()
                    .fold(0, |n, digit| n << 8 | usize::from(*digit)),
            )
        };
        let (skip, size) = match rest.first() {
            None => return Ok(None),
            Some(0xc0) => {
                let answer = Some((id, Answer::Nil));
                return Ok(Some(Response { len: 9, answer }));
            }
            Some(first @ 0xa0..=0xbf) => (1, Some(usize::from(first & 0x1f))),
            Some(0xd9 | 0xc4) => (2, size(1)),
            Some(0xda | 0xc5) => (3, size(2)),
            Some(0xdb | 0xc6) => (5, size(4)),
            Some(_) => return any(input),
        };
        let value = size.and_then(|size| rest.get(skip..skip + size));
        Ok(value.map(|value| Response {
            len: head.len() + skip + value.len(),
            answer: Some((id, Answer::Value(value))),
        }))
    }
}

/// The same for any other message, at the price of reading all of it.
fn any(input: &[u8]) -> Parsed<'_> {
    let end = Codec::default().next(input);
    let Some(len) = end.map_err(|malformed| malformed.error.to_string())? else {
        return Ok(None);
    };
    let Reply { id, result } = Reply::read(input).map_err(|error| error.to_string())?;
    let answer = match result {
        Ok(codec::NIL) => Answer::Nil,
        Ok(_) => Answer::Value(&[]),
        Err(error) => {
            let text = codec::string(error).unwrap_or(b"?");
            Answer::Error(String::from_utf8_lossy(text).into_owned())
        }
    };
    let answer = Some((id, answer));
    Ok(Some(Response { len, answer }))
}

//! MessagePack-RPC as plain clients speak it: `get` and `set` of any node, and swaps.

use crate::load::{Answer, Op, Parsed, Response, Values, Wire, key};

/// A guest of one node, and how it writes.
#[derive(Clone, Copy, Debug)]
pub enum Guest {
    /// By `set`.
    Set,
    /// By `cas`, from the value that the key has to the same one.
    Cas,
    /// By `incr`, of other keys.
    Incr,
}

impl Wire for Guest {
    fn request(&mut self, out: &mut Vec<u8>, id: u32, op: Op, number: u32, values: &Values) {
        out.extend([0x94, 0x00, 0xce]);
        out.extend(id.to_be_bytes());
        let (method, copies): (&[u8], _) = match (op, *self) {
            (Op::Get, _) => (b"\xa3get\x91\xb0", 0),
            (Op::Set, Guest::Set) => (b"\xa3set\x92\xb0", 1),
            (Op::Set, Guest::Cas) => (b"\xa3cas\x93\xb0", 2),
            (Op::Set, Guest::Incr) => (b"\xa4incr\x91\xb0", 0),
        };
        out.extend(method);
        let mut key = key(number);
        if let (Op::Set, Guest::Incr) = (op, *self) {
            key[..5].copy_from_slice(b"count");
        }
        out.extend(key);
        let len = u32::try_from(values.len()).unwrap_or(u32::MAX);
        for _ in 0..copies {
            let _ = rmp::encode::write_str_len(out, len); // a Vec takes every byte
            values.write(out, number);
        }
    }

    /// A node answers `[1, id, error, result]`, the id always in 4 bytes.
    fn response<'a>(&mut self, input: &'a [u8], _: &mut Vec<u8>) -> Parsed<'a> {
        let Some((head, mut rest)) = input.split_first_chunk::<7>() else {
            return Ok(None);
        };
        let [0x94, 0x01, 0xce, i, j, k, l] = *head else {
            return Err(format!("not an answer: {head:02x?}"));
        };
        let Some(error) = text(&mut rest)? else {
            return Ok(None);
        };
        if let (None, Some(len)) = (error, swapped(rest)) {
            return Ok(Some(Response {
                len: input.len() - rest.len() + len,
                answer: Some((u32::from_be_bytes([i, j, k, l]), Answer::Nil)),
            }));
        }
        let Some(result) = text(&mut rest)? else {
            return Ok(None);
        };
        let answer = match (error, result) {
            (Some(error), _) => Answer::Error(String::from_utf8_lossy(error).into_owned()),
            (None, Some(value)) => Answer::Value(value),
            (None, None) => Answer::Nil,
        };
        Ok(Some(Response {
            len: input.len() - rest.len(),
            answer: Some((u32::from_be_bytes([i, j, k, l]), answer)),
        }))
    }
}

/// The length of an answer that a swap was done: `[true, nil]`, or an integer.
fn swapped(bytes: &[u8]) -> Option<usize> {
    let len = match bytes {
        [0x92, 0xc3, 0xc0, ..] => 3,
        [0..=0x7f, ..] => 1,
        [0xcc, ..] => 2,
        [0xcd, ..] => 3,
        [0xce, ..] => 5,
        [0xcf, ..] => 9,
        _ => return None,
    };
    (bytes.len() >= len).then_some(len)
}

/// Takes a nil, a str or a bin off the front; `None` if its end is still to come. There is
/// nothing else in an answer: the generator has written all values that it reads.
fn text<'a>(bytes: &mut &'a [u8]) -> Result<Option<Option<&'a [u8]>>, String> {
    let width = match bytes.first() {
        None => return Ok(None),
        Some(0xc0) => {
            *bytes = &bytes[1..];
            return Ok(Some(None));
        }
        Some(0xa0..=0xbf) => 0,
        Some(0xd9 | 0xc4) => 1,
        Some(0xda | 0xc5) => 2,
        Some(0xdb | 0xc6) => 4,
        Some(other) => return Err(format!("an answer with {other:#04x} in it")),
    };
    let Some(length) = bytes.get(1..=width) else {
        return Ok(None);
    };
    let length = match width {
        0 => usize::from(bytes[0] & 0x1f),
        _ => length
            .iter()
            .fold(0, |n, digit| n << 8 | usize::from(*digit)),
    };
    let Some((value, rest)) = bytes[1 + width..].split_at_checked(length) else {
        return Ok(None);
    };
    *bytes = rest;
    Ok(Some(Some(value)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One value of each kind that an answer has, with its text.
    fn values() -> Vec<(Vec<u8>, Option<Vec<u8>>)> {
        let text = |header: &[u8], len| (header.to_vec(), Some(vec![b'x'; len]));
        let values = [
            (vec![0xc0], None),
            text(&[0xa0], 0),
            text(&[0xbf], 31),
            text(&[0xd9, 32], 32),
            text(&[0xda, 0, 100], 100),
            text(&[0xda, 1, 44], 300),
            text(&[0xdb, 0, 1, 0x11, 0x70], 70_000),
            text(&[0xc4, 40], 40),
            text(&[0xc5, 1, 44], 300),
        ];
        let whole = |(header, text): (Vec<u8>, Option<Vec<u8>>)| {
            ([header, text.clone().unwrap_or_default()].concat(), text)
        };
        values.map(whole).into()
    }

    /// Reads an answer, and finds no end of it wherever it is cut.
    fn read(error: &[u8], result: &[u8]) -> String {
        let head = [0x94, 0x01, 0xce, 0xc0, 0xc0, 0x00, 0x01];
        let mut bytes = [&head, error, result].concat();
        let len = bytes.len();
        bytes.extend([0x94, 0x01]); // the next one
        let cuts = (0..len.min(400)).chain([len - 1]);
        for cut in cuts.filter(|cut| *cut < len) {
            let early = Guest::Set.response(&bytes[..cut], &mut Vec::new()).unwrap();
            assert!(early.is_none(), "{cut} of {len}: {early:?}");
        }
        let found = Guest::Set
            .response(&bytes, &mut Vec::new())
            .unwrap()
            .unwrap();
        assert_eq!(found.len, len);
        let (id, answer) = found.answer.unwrap();
        assert_eq!(id, 0xc0c0_0001);
        match answer {
            Answer::Nil => "nil".into(),
            Answer::Value(value) => format!("value {}", String::from_utf8_lossy(value)),
            Answer::Error(error) => format!("error {error}"),
        }
    }

    #[test]
    fn an_answer_is_cut_off_the_stream_wherever_it_was_cut() {
        for (bytes, text) in values() {
            let text = text.map(|text| String::from_utf8(text).unwrap());
            let value = text.as_ref().map(|text| format!("value {text}"));
            assert_eq!(read(&[0xc0], &bytes), value.unwrap_or("nil".into()));
            let error = text.map(|text| format!("error {text}"));
            assert_eq!(read(&bytes, &[0xc0]), error.unwrap_or("nil".into()));
        }
    }

    #[test]
    fn what_is_no_answer_breaks_the_connection() {
        for bytes in [&b"\x01garbage"[..], b"\x94\x01\xce\0\0\0\x01\xc0\xc3"] {
            assert!(Guest::Set.response(bytes, &mut Vec::new()).is_err());
        }
    }

    #[test]
    fn a_swap_is_answered_by_true_or_by_the_sum() {
        for result in [&b"\x92\xc3\xc0"[..], b"\x07", b"\xcd\x01\x00"] {
            let bytes = [b"\x94\x01\xce\0\0\0\x01\xc0", result].concat();
            let found = Guest::Cas.response(&bytes, &mut Vec::new());
            let found = found.unwrap().unwrap();
            assert_eq!(found.len, bytes.len());
            assert!(matches!(found.answer, Some((1, Answer::Nil))));
        }
        let refused = b"\x94\x01\xce\0\0\0\x01\xc0\x92\xc2\xa1x";
        assert!(Guest::Cas.response(refused, &mut Vec::new()).is_err());
    }

    #[test]
    fn a_request_is_messagepack_rpc() {
        let mut out = Vec::new();
        Guest::Set.request(&mut out, 7, Op::Get, 42, &Values::new(1));
        assert_eq!(out, b"\x94\0\xce\0\0\0\x07\xa3get\x91\xb0bench:0000000042");
        out.clear();
        Guest::Set.request(&mut out, 8, Op::Set, 42, &Values::new(3));
        assert_eq!(
            out,
            b"\x94\0\xce\0\0\0\x08\xa3set\x92\xb0bench:0000000042\xa3042"
        );
    }
}

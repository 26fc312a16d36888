//! memcached's text protocol. Answers come in the order of the requests.

use std::collections::VecDeque;
use std::io::Write as _;

use crate::load::{Answer, Op, Parsed, Response, Values, Wire, key};

#[derive(Default)]
pub struct Memcached {
    asked: VecDeque<u32>,
}

impl Wire for Memcached {
    fn request(&mut self, out: &mut Vec<u8>, id: u32, op: Op, number: u32, values: &Values) {
        self.asked.push_back(id);
        match op {
            Op::Get => out.extend(b"get "),
            Op::Set => out.extend(b"set "),
        }
        out.extend(key(number));
        if op == Op::Set {
            let _ = write!(out, " 0 0 {}\r\n", values.len());
            values.write(out, number);
        }
        out.extend(b"\r\n");
    }

    fn response<'a>(&mut self, input: &'a [u8], _: &mut Vec<u8>) -> Parsed<'a> {
        let Some(line) = line(input) else {
            return Ok(None);
        };
        let mut len = line.len() + 2;
        let answer = match line {
            b"STORED" | b"END" => Answer::Nil,
            // VALUE <key> <flags> <bytes>, the value, END
            [b'V', b'A', b'L', b'U', b'E', b' ', rest @ ..] => {
                let digits = rest.rsplit(|byte| *byte == b' ').next().unwrap_or(rest);
                let Some(value) = input.get(len..len + number(digits)? + 7) else {
                    return Ok(None);
                };
                len += value.len();
                Answer::Value(&value[..value.len() - 7])
            }
            other => Answer::Error(String::from_utf8_lossy(other).into_owned()),
        };
        let id = self.asked.pop_front().ok_or("an answer to nothing")?;
        let answer = Some((id, answer));
        Ok(Some(Response { len, answer }))
    }
}

/// The first line of the input, if its end is there.
pub fn line(input: &[u8]) -> Option<&[u8]> {
    let end = input.iter().position(|byte| *byte == b'\n')?;
    input[..end].strip_suffix(b"\r")
}

/// Decimal digits as a number.
pub fn number(digits: &[u8]) -> Result<usize, String> {
    digits.iter().try_fold(0_usize, |n, digit| match digit {
        b'0'..=b'9' if n < 1 << 30 => Ok(n * 10 + usize::from(digit - b'0')),
        _ => Err("a length is no number".to_owned()),
    })
}

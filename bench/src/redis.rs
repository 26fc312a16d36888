//! RESP, as redis speaks it. Answers come in the order of the requests.

use std::collections::VecDeque;
use std::io::Write as _;

use crate::load::{Answer, Op, Parsed, Response, Values, Wire, key};
use crate::memcached::{line, number};

#[derive(Default)]
pub struct Redis {
    asked: VecDeque<u32>,
    waits: bool,
}

impl Redis {
    /// A set is done when a replica has it, too.
    pub fn waiting() -> Self {
        Redis {
            waits: true,
            ..Redis::default()
        }
    }
}

impl Wire for Redis {
    fn request(&mut self, out: &mut Vec<u8>, id: u32, op: Op, number: u32, values: &Values) {
        self.asked.push_back(id);
        match op {
            Op::Get => out.extend(b"*2\r\n$3\r\nGET\r\n$16\r\n"),
            Op::Set => out.extend(b"*3\r\n$3\r\nSET\r\n$16\r\n"),
        }
        out.extend(key(number));
        if op == Op::Set {
            let _ = write!(out, "\r\n${}\r\n", values.len());
            values.write(out, number);
        }
        out.extend(b"\r\n");
        if op == Op::Set && self.waits {
            out.extend(b"*3\r\n$4\r\nWAIT\r\n$1\r\n1\r\n$1\r\n0\r\n"); // for one, as long as it takes
        }
    }

    fn response<'a>(&mut self, input: &'a [u8], _: &mut Vec<u8>) -> Parsed<'a> {
        let Some(line) = line(input) else {
            return Ok(None);
        };
        let mut len = line.len() + 2;
        let answer = match line {
            b"+OK" if self.waits => return Ok(Some(Response { len, answer: None })),
            b"+OK" | b"$-1" | b":1" | b":2" => Answer::Nil,
            [b'$', digits @ ..] => {
                let Some(value) = input.get(len..len + number(digits)? + 2) else {
                    return Ok(None);
                };
                len += value.len();
                Answer::Value(&value[..value.len() - 2])
            }
            other => Answer::Error(String::from_utf8_lossy(other).replacen('-', "", 1)),
        };
        let id = self.asked.pop_front().ok_or("an answer to nothing")?;
        let answer = Some((id, answer));
        Ok(Some(Response { len, answer }))
    }
}

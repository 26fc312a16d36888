//! A connection to a node with nothing but bytes on it, and the messages that go over it.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, ErrorKind, Write as _};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use kv54::rpc::codec::encode;
use msgpack_rpc::Value;

use super::Cluster;

/// A node that says nothing for so long has forgotten somebody.
pub const PATIENCE: Duration = Duration::from_secs(20);
pub const MIB: usize = 1 << 20;
pub const NIL: Value = Value::Nil;

pub type Outcome = Result<Value, String>;

/// A connection to a node, with nothing but bytes on it.
pub struct Wire {
    pub stream: BufReader<TcpStream>,
    next: u32,
}

impl Wire {
    pub fn to(cluster: &Cluster, node: &str) -> Wire {
        let stream = TcpStream::connect(cluster.address(node)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Wire {
            stream: BufReader::new(stream),
            next: 1000,
        }
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.get_mut().write_all(bytes).unwrap();
    }

    pub fn finish_asking(&mut self) {
        self.stream.get_ref().shutdown(Shutdown::Write).unwrap();
    }

    /// The next answer; `None` where the node has closed the connection.
    pub fn answer(&mut self) -> Option<(u32, Outcome)> {
        let come = loop {
            match self.stream.fill_buf() {
                Err(error) if error.kind() == ErrorKind::Interrupted => {} // this machine has stood still
                come => break come.unwrap(),
            }
        };
        if come.is_empty() {
            return None;
        }
        let answer = rmpv::decode::read_value(&mut self.stream).unwrap();
        let Value::Array(items) = answer else {
            panic!("{answer}")
        };
        let [kind, id, error, result] = items.try_into().unwrap();
        assert_eq!(kind, 1.into());
        let outcome = match error {
            Value::Nil => Ok(result),
            error => Err(error.as_str().unwrap().to_owned()),
        };
        Some((id.as_u64().unwrap().try_into().unwrap(), outcome))
    }

    /// So many answers, in whichever order, each to another question.
    pub fn answers(&mut self, count: usize) -> BTreeMap<u32, Outcome> {
        let mut answers = BTreeMap::new();
        for _ in 0..count {
            let (id, outcome) = self.answer().unwrap();
            assert!(
                answers.insert(id, outcome).is_none(),
                "{id} is answered twice"
            );
        }
        answers
    }

    /// One question and its answer.
    pub fn asks(&mut self, method: &str, params: impl Into<Vec<Value>>) -> Outcome {
        self.next += 1;
        let asked = self.next;
        self.send(&request(asked, method, params));
        let (id, outcome) = self.answer().unwrap();
        assert_eq!(id, asked);
        outcome
    }

    #[track_caller]
    pub fn does(&mut self, method: &str, params: impl Into<Vec<Value>>) -> Value {
        self.asks(method, params).unwrap()
    }

    #[track_caller]
    pub fn refuses(&mut self, method: &str, params: impl Into<Vec<Value>>, parts: &[&str]) {
        says(self.asks(method, params), parts);
    }

    /// A number of the node's status.
    pub fn status(&mut self, field: &str) -> u64 {
        self.does("status", [])[field].as_u64().unwrap()
    }

    /// The node's status, if it takes this connection at all.
    pub fn greets(&mut self) -> Option<Outcome> {
        let question = request(1, "status", []);
        if self.stream.get_mut().write_all(&question).is_err() {
            return None;
        }
        match self.stream.fill_buf() {
            Err(error) if error.kind() == ErrorKind::ConnectionReset => None,
            _ => self.answer().map(|(_, outcome)| outcome),
        }
    }

    /// The node has said all that it will, and ended the connection in order.
    #[track_caller]
    pub fn is_closed(&mut self) {
        assert_eq!(self.answer(), None);
    }

    /// There is not one answer more than were asked for.
    #[track_caller]
    pub fn falls_silent(&mut self) {
        self.finish_asking();
        self.is_closed();
    }
}

/// An error that begins with the first of these parts, and has the others in it.
#[track_caller]
pub fn says(outcome: Outcome, parts: &[&str]) {
    let error = outcome.unwrap_err();
    assert!(error.starts_with(parts[0]), "not {:?}: {error}", parts[0]);
    for part in parts {
        assert!(error.contains(part), "{part:?} is missing: {error}");
    }
}

pub fn request(id: u32, method: &str, params: impl Into<Vec<Value>>) -> Vec<u8> {
    let params = Value::Array(params.into());
    encode(&array([0.into(), id.into(), method.into(), params]))
}

pub fn stamp(counter: u64, writer: u64) -> Value {
    array([counter.into(), writer.into()])
}

pub fn entry(counter: u64, writer: u64, value: impl Into<Value>) -> Value {
    array([counter.into(), writer.into(), value.into()])
}

pub fn array<const N: usize>(items: [Value; N]) -> Value {
    Value::Array(items.into())
}

pub fn bin(bytes: &[u8]) -> Value {
    Value::Binary(bytes.to_vec())
}

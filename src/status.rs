//! How a node is, in its own words.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytesize::ByteSize;
use msgpack_rpc::Value;
use serde::{Deserialize, Serialize};

use crate::error::{Error, plain};
use crate::rpc::codec::{self, Encoded};
use crate::rpc::{Answer, Meter};

/// What a node answers to `status`.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)] // a node of another version may tell less
pub struct Status {
    /// The node's name.
    pub name: String,
    /// The version of kv54 that runs there.
    pub version: String,
    /// `joining` or `ready`; `waiting` or `left` where it is not in the ring yet, or not any more.
    pub state: String,
    /// The nodes that it must hear from before it is ready.
    pub waiting_for: Vec<String>,
    /// The parts for which its word does not count yet, by their owners.
    pub not_ready: Vec<String>,
    /// What it cannot vouch for: one line for each part, until somebody acknowledges it.
    pub doubts: Vec<String>,
    /// How fast each of them is read, or why it cannot be.
    pub remarks: BTreeMap<String, String>,
    /// How much it has heard of what it must hear, in percent.
    pub progress: usize,
    /// The fingerprint that `load`, `store` and `scan` to this node must carry.
    pub ring: u32,
    /// How often the ring has begun to change while it ran.
    pub epoch: u64,
    /// How many keys and tombstones it holds for the ring into which it is changing.
    pub handed_over: usize,
    /// Keys with a value.
    pub keys: usize,
    /// Keys that were deleted: their stamps stay, so that no old copy comes back.
    pub tombstones: usize,
    /// Keys, values and overhead, in bytes.
    pub bytes: usize,
    /// How many of these bytes go when the ring changes: tombstones, and promises for absent keys.
    pub garbage: usize,
    /// How many of these were read during the last change and taken along.
    pub carried: usize,
    /// Seconds since it last forgot what was deleted.
    pub forgot_s: Option<u64>,
    /// How many bytes they may take before a set that adds to them is refused.
    pub memory: usize,
    /// Whether the last set that was refused for that would be refused again.
    pub full: bool,
    /// How many bytes its log on disk has, where it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<usize>,
    /// How long a commit takes there, in microseconds: a decaying maximum of the last ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub commit_us: Option<u64>,
    /// Whether the disk is full: sets are refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_full: Option<bool>,
    /// Whether a key has used half of the stamps of its epoch.
    pub worn: bool,
    /// How many entries it holds of each part, by the part's owner: keys and tombstones.
    pub entries: BTreeMap<String, usize>,
    /// How many of these are tombstones, by the part's owner.
    pub deleted: BTreeMap<String, usize>,
    /// A digest of each part, by its owner: equal where two nodes hold the same.
    pub digests: BTreeMap<String, String>,
    /// Seconds since the node started.
    pub uptime_s: u64,
    /// The same in microseconds: the counters below grow from 0 in this time.
    pub uptime_us: u64,
    /// A number that it has drawn at its start: with another one, the counters have begun anew.
    pub start_id: u64,
    /// How long its threads were at work, in microseconds, all together.
    pub busy_us: u64,
    /// How many connections are open now.
    pub connections: usize,
    /// How many connections it has accepted.
    pub accepted: u64,
    /// How many requests it has answered, by their methods.
    pub answered: BTreeMap<String, u64>,
    /// How many of those of its guests got an error.
    pub failed: u64,
    /// How many of its guests' requests took less than so many microseconds, and not less than the
    /// number before: from the read that brought the request until its answer was there.
    pub waited: BTreeMap<u64, u64>,
    /// How long all of them took, in microseconds.
    pub waited_us: u64,
}

impl Status {
    /// What has been counted, by all threads together.
    pub fn counted(meters: &[Arc<Meter>]) -> Self {
        let mut status = Status::default();
        for meter in meters {
            let (connections, accepted) = meter.connections();
            status.connections += connections;
            status.accepted += accepted;
            for (method, count) in meter.answered() {
                *status.answered.entry(method.to_owned()).or_default() += count;
            }
            status.failed += meter.failed();
            for (end, count) in meter.waited() {
                *status.waited.entry(end).or_default() += count;
            }
            status.waited_us += meter.waited_us();
            status.busy_us += micros(meter.busy());
        }
        status
    }

    /// Reads a node's answer, and makes every text in it plain.
    pub fn read(bytes: &[u8]) -> Result<Self, Error> {
        let status = codec::encode(&all_plain(codec::decode(bytes)?));
        rmp_serde::from_slice(&status).map_err(|error| Error::bad_request(error.to_string()))
    }

    /// What there is to say beside the state: how far it has come, and that it is full.
    pub fn notes(&self) -> String {
        let waiting = (!self.waiting_for.is_empty()).then(|| self.waiting());
        let full = format!("full: {} of {} bytes", self.bytes, self.memory);
        let place = match &*self.state {
            "waiting" => Some("not yet in the ring; kv54 resize takes it in".to_owned()),
            "left" => Some("not in the ring any more; it can be stopped".to_owned()),
            _ => None,
        };
        let worn = "a key has used half of its stamps: kv54 resize --again gives it new ones";
        let worn = self.worn.then(|| worn.to_owned());
        let remarks = waiting.into_iter().chain(place).chain(worn);
        let remarks = remarks
            .chain(self.full.then_some(full))
            .chain(self.on_disk());
        remarks.collect::<Vec<_>>().join("; ")
    }

    /// What there is to say about its disk: `on disk 8.4 MB, commits took 1.2ms at most`.
    fn on_disk(&self) -> Option<String> {
        let (bytes, took) = (self.disk? as u64, Duration::from_micros(self.commit_us?));
        let full = match self.disk_full {
            Some(true) => ", which is full",
            _ => "",
        };
        let size = ByteSize(bytes).display().si();
        Some(format!(
            "on disk {size}{full}, commits took {took:.1?} at most"
        ))
    }

    /// Whether its word counts for the part of this owner. A node of an older version does not say
    /// where it does not.
    pub fn is_ready_for(&self, owner: &str) -> bool {
        !self.not_ready.iter().any(|name| name == owner)
    }

    /// How this node's digest of the part of this owner differs from another one's: 0 where both hold the same.
    /// Digests are sums (XOR), so a write that both have got meanwhile changes nothing.
    pub fn difference(&self, other: &Status, owner: &str) -> Option<u64> {
        let digest = |status: &Status| u64::from_str_radix(status.digests.get(owner)?, 16).ok();
        Some(digest(self)? ^ digest(other)?)
    }

    /// How far a joining node is: `45 %, waiting for bob (5.9 kB/s)`.
    pub fn waiting(&self) -> String {
        let names = self.waiting_for.iter();
        let names = names.map(|name| match self.remarks.get(name) {
            Some(remark) => format!("{name} ({remark})"),
            None => name.clone(),
        });
        let names = names.collect::<Vec<_>>().join(", ");
        format!("{} %, waiting for {names}", self.progress)
    }
}

/// A time in whole microseconds.
pub(crate) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// The same with every text in it as one plain line.
fn all_plain(value: Value) -> Value {
    let both = |(key, value)| (all_plain(key), all_plain(value));
    match value {
        Value::Array(items) => items.into_iter().map(all_plain).collect(),
        Value::Map(pairs) => Value::Map(pairs.into_iter().map(both).collect()),
        value => match value.as_slice() {
            Some(text) => plain(text).into(),
            None => value,
        },
    }
}

impl From<Status> for Answer {
    fn from(status: Status) -> Self {
        let encoded = rmp_serde::to_vec_named(&status);
        Encoded::from(encoded.unwrap_or_default()).into() // writing to memory cannot fail
    }
}

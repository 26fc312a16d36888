//! What a node can be asked, in one table. The `match` in `server.rs` answers these methods;
//! `docs/wire.md` shows the same table, and a test compares the three.

use crate::error::{Error, Kind, beginning};

/// Each method: its name, its parameters, its answer.
pub const METHODS: [(&str, &str, &str); 7] = [
    ("get", "key", "the value; nil where the key is absent"),
    ("set", "key, value", "nil"),
    ("delete", "key", "nil, also where the key was absent"),
    (
        "load",
        "ring, key, known stamp (optional)",
        "[counter, writer, value]; [counter, writer] alone where the known stamp is as new",
    ),
    (
        "store",
        "ring, key, [counter, writer, value]",
        "nil, whether the entry was newer or not",
    ),
    (
        "scan",
        "ring, part, cursor",
        "[start id, next cursor or nil, [[key, [counter, writer, value]] …]]",
    ),
    ("status", "", "a map: how this node is"),
];

impl Error {
    /// The error of a method that does not exist, or does not take so many parameters.
    pub fn not_a_request(method: &str, params: usize) -> Self {
        match METHODS.iter().find(|(name, ..)| *name == method) {
            None => Error::new(Kind::NoSuchMethod, format!("{:?}", beginning(method))),
            Some((_, usage, _)) => {
                Error::bad_request(format!("{method} takes [{usage}], not {params} parameters"))
            }
        }
    }
}

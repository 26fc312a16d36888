//! What a node can be asked, in one table. The `match` in `server.rs` answers these methods, and
//! `docs/wire.md` shows the same table: a test compares the three.

use crate::error::{Error, Kind, beginning};

/// Each method: its name, its parameters, its answer.
pub const METHODS: &str = "\
| `get` | key | the value; nil where the key is absent |
| `set` | key, value, time to live in ms (optional) | nil |
| `delete` | key | nil, also where the key was absent |
| `cas` | key, expected, new, time to live in ms (optional) | [true, nil]; [false, the value] where it is not the expected one. nil is an absent key |
| `incr` | key, by (optional, 1) | the new value; absent is 0 |
| `swap` | key, expected, new; or key, by | as `cas` or `incr`, by this node itself |
| `promise` | ring, key, ballot or [ballot] or [ballot, counter, writer, ballot] | [counter, writer, value, ballot]; nil where the asker knows it; the promised ballot alone where it is refused |
| `load` | ring, key, known stamp (optional) | [counter, writer, value], and a swap's ballot behind it; [counter, writer] alone where the known stamp is as new |
| `store` | ring, key, [counter, writer, value] or [counter, writer, value, ballot] | nil, whether the entry was newer or not; `busy:` if a higher ballot was promised |
| `scan` | ring, part, cursor, most bytes (optional) | [start id, next cursor or nil, [[key, [counter, writer, value], promised ballot (or nothing)] …]] |
| `status` | none | a map: how this node is |
| `ring` | how the ring is for the asker (optional) | a map: how the ring is for this node |
| `acknowledge` | none | nil: the node forgets its doubts |
";

/// What guests ask: clients that leave it to a node to coordinate.
pub const FOR_GUESTS: [&str; 5] = ["get", "set", "delete", "cas", "incr"];

/// What nodes ask each other.
pub const AMONG_NODES: [&str; 8] = [
    "swap",
    "promise",
    "load",
    "store",
    "scan",
    "status",
    "ring",
    "acknowledge",
];

impl Error {
    /// The error of a method that does not exist, or does not take so many parameters.
    pub fn not_a_request(method: &str, params: usize) -> Self {
        let row = format!("| `{method}` | ");
        let usage = METHODS
            .lines()
            .find_map(|line| line.strip_prefix(&row)?.split(" | ").next());
        match usage {
            None => Error::new(Kind::NoSuchMethod, format!("{:?}", beginning(method))),
            Some(usage) => {
                Error::bad_request(format!("{method} takes [{usage}], not {params} parameters"))
            }
        }
    }
}

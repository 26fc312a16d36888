//! What can go wrong, in the words of the wire: an error travels as one string
//! whose first word says which of these it is.

use std::fmt::{self, Write as _};

use strum::{EnumString, IntoStaticStr};

/// What kind of trouble it is: the stable first word of every error.
#[derive(Clone, Copy, Debug, EnumString, IntoStaticStr, PartialEq, Eq)]
#[strum(serialize_all = "kebab-case")]
pub enum Kind {
    /// No majority answered, or a node could not be reached. A set has written nothing.
    Unavailable,
    /// This node has started a moment ago and does not yet know what it missed.
    Joining,
    /// It was asked and not answered in time: it may have happened, and it may not.
    UnknownOutcome,
    /// A key, a value or a message is over its limit.
    TooLarge,
    /// One of the key's nodes has no memory for this set; nothing was evicted, nothing was written.
    Full,
    /// One of the key's nodes may have no memory for this set, if other sets write that it has allowed; or
    /// it has promised another swap a higher ballot.
    Busy,
    /// Asker and node do not have the same `cluster.toml`, or this key is not kept there.
    WrongRing,
    /// The request makes no sense: wrong parameters, wrong types, wrong shape.
    BadRequest,
    /// There is no such method.
    NoSuchMethod,
}

impl Kind {
    /// The first word of such an error, as the wire has it: `unknown-outcome`.
    pub fn word(self) -> &'static str {
        self.into()
    }

    /// Whether asking again cannot help: the node heard the question and said no for good.
    pub fn is_refusal(self) -> bool {
        use Kind::{Busy, Joining, Unavailable, UnknownOutcome};
        !matches!(self, Unavailable | Joining | UnknownOutcome | Busy)
    }
}

/// How many characters of what a stranger sent are quoted.
const MAX_QUOTE: usize = 100;
/// How many characters of an error from the wire are believed to be one: far more than any has.
const MAX_TEXT: usize = 16 << 10;

/// As much of a stranger's text as is quoted to them.
pub(crate) fn beginning(text: &str) -> String {
    text.chars().take(MAX_QUOTE).collect()
}

/// Whether a terminal obeys this character: a control, a break of lines, a turn of the direction.
pub(crate) fn is_control(c: char) -> bool {
    c.is_control() || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// One line of text that a terminal only shows. What others wrote passes here before people read it.
pub fn plain(text: impl AsRef<[u8]>) -> String {
    escaped(text.as_ref(), is_control)
}

/// Bytes as text. These characters are written as Rust does, `\n` or `\u{1b}`, and a byte that is not UTF-8 as `\xff`.
pub(crate) fn escaped(bytes: &[u8], special: impl Fn(char) -> bool) -> String {
    let mut shown = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match special(c) {
                true => shown.extend(c.escape_default()),
                false => shown.push(c),
            }
        }
        for byte in chunk.invalid() {
            let _ = write!(shown, "\\x{byte:02x}"); // writing to memory cannot fail
        }
    }
    shown
}

/// An error of kv54, printed and sent as `kind: why`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// What kind of trouble it is.
    pub kind: Kind,
    /// One line that names the key, the node or the address.
    pub why: String,
}

impl Error {
    /// An error of this kind, for this reason.
    pub fn new(kind: Kind, why: impl Into<String>) -> Self {
        let why = why.into();
        Error { kind, why }
    }

    /// Something that is over its limit, for this reason.
    pub fn too_large(why: impl Into<String>) -> Self {
        Error::new(Kind::TooLarge, why)
    }

    /// A request that makes no sense, for this reason.
    pub fn bad_request(why: impl Into<String>) -> Self {
        Error::new(Kind::BadRequest, why)
    }

    /// The error that this text from the wire stands for, as one line of plain text. What a first word that this
    /// version does not know means for a write is unknown.
    pub fn parse(text: &str) -> Self {
        let text = plain(text.chars().take(MAX_TEXT).collect::<String>());
        let (word, why) = text.split_once(": ").unwrap_or(("", &text));
        match word.parse() {
            Ok(kind) => Error::new(kind, why),
            Err(_) => Error::new(Kind::UnknownOutcome, text),
        }
    }

    /// The same error for a read: an unknown outcome is only unavailable, since nothing was written.
    #[must_use]
    pub fn of_read(mut self) -> Self {
        if self.kind == Kind::UnknownOutcome {
            self.kind = Kind::Unavailable;
        }
        self
    }
}

impl Error {
    /// The same error for what comes after a write: it may have happened.
    #[must_use]
    pub fn of_a_write(mut self) -> Self {
        self.kind = Kind::UnknownOutcome;
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind.word(), self.why)
    }
}

impl std::error::Error for Error {}

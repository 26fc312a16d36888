//! Bugs that a test plants, one at a time, to see that the proof would find them. They are
//! compiled in only with the feature `sabotage`, which that test alone turns on.

use strum::{EnumString, VariantArray};

/// A bug that kv54 does not have.
#[derive(Clone, Copy, Debug, EnumString, PartialEq, Eq, VariantArray)]
pub enum Bug {
    /// A get answers without making sure that the next one sees the same.
    GetWithoutRepair,
    /// A set is answered when one replica has it.
    SetWaitsForOne,
    /// A joining node is ready when one neighbour has been read.
    ReadyAfterOneNeighbour,
    /// A joining node answers `load`.
    JoiningAnswersLoad,
    /// A joining node reads its neighbours at once, while writes are still on their way.
    NoWaitBeforeJoining,
    /// Answers of an earlier attempt, in an earlier window, count as well.
    AnswersCountedAcrossWindows,
    /// Two sets can have the same stamp.
    SameStampForTwoSets,
    /// A replica keeps the entry that came last, not the newest.
    OldEntryReplacesNew,
}

/// Whether this bug is planted: never, but for the process that a test starts with its name
/// in `KV54_SABOTAGE`.
#[cfg(feature = "sabotage")]
pub fn planted(bug: Bug) -> bool {
    static PLANTED: std::sync::LazyLock<Option<Bug>> =
        std::sync::LazyLock::new(|| std::env::var("KV54_SABOTAGE").ok()?.parse().ok());
    *PLANTED == Some(bug)
}

/// Whether this bug is planted: never.
#[cfg(not(feature = "sabotage"))]
pub const fn planted(_: Bug) -> bool {
    false
}

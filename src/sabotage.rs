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
    /// A replica without memory refuses what a majority may have answered for.
    FullReplicaRefusesToStore,
    /// The stamps of a new ring begin anew.
    StampsWithoutEpoch,
    /// A change of the ring hands nothing over.
    HandOverSkipped,
    /// It hands over deletes alone.
    LiveValuesNotHandedOver,
    /// It hands over no tombstone, not even one of a delete that is still under way.
    NewTombstoneStaysBehind,
    /// It hands over before all nodes know of the change.
    HandOverBeforeAllKnow,
    /// It ends before all nodes know of it.
    EndsBeforeAllKnow,
    /// A node goes on to serve those that do not know of the change.
    LowerStateServed,
    /// A get repairs the old ring alone.
    GetRepairsOldRingAlone,
    /// A set or delete waits for the old ring alone.
    SetWaitsForOldRingAlone,
    /// A set that meets a change takes another stamp, though a replica may have the first one.
    NewStampAfterChange,
    /// A stamp that was chosen before the new ring was asked goes to it.
    OldStampForNewRing,
    /// A set that the old ring alone has is answered after the end of the change.
    SetAnsweredAfterChange,
    /// A node that has started serves before it has been told how the ring is.
    ServesBeforeHearing,
    /// A node that has started takes its part of the new ring as read.
    StartingNodeTakesNewRingAsRead,
    /// A replica accepts what a swap has left, whatever it has promised.
    AcceptIgnoresPromises,
    /// It does so where a newer set is there already.
    SupersededIgnoresPromises,
    /// A value whose time is over is answered as nil, and stays.
    ExpiredWithoutSwap,
    /// A value whose time is over is deleted, whatever is there now.
    ExpiredBlindly,
    /// A joining node promises and accepts.
    JoiningNodePromises,
    /// A joining node does not hear of promises.
    PromisesNotCopied,
    /// A joining node copies what a swap has left at one neighbour.
    JoinerCopiesBallots,
    /// A node that compares with its neighbours does so, whatever it has promised.
    RepairIgnoresPromises,
    /// A swap starts over, although what it has sent may be kept.
    SwapAlwaysStartsOver,
    /// A swap knows the last one alone of what it has sent.
    LastOwnBallotAlone,
    /// A swap says that the value is another one, although it has sent what may still be made.
    NoWithoutAccept,
    /// A node moves on to a state of before all nodes lost their memory.
    FormerLifeFollowed,
    /// A swap takes what was refused by all who have answered for what nobody will keep.
    SilentTakenForRefused,
    /// A swap that finds nothing deletes it first.
    SwapDeletesNothing,
    /// A client goes on as before when all nodes have lost their memory.
    ClientKeepsFormerRing,
    /// A swap builds on a write of before the change of the ring.
    SwapBuildsOnOldEpoch,
    /// A replica takes a write of before the change of the ring, whatever it has promised.
    OldWriteIgnoresPromises,
    /// A set is answered that met a change of the ring and that a swap has hidden.
    HiddenSetAnswered,
    /// A put or a take of a task whose outcome is unknown is taken for done.
    UnknownTaskTakenForDone,
    /// It is taken for not done.
    UnknownTaskTakenForRefused,
    /// A node that sees two memories lost at once says nothing.
    DoubtsNeverNoted,
    /// A node with a disk answers `load` with what the disk does not have.
    LoadNotGated,
    /// It answers `store` before the disk has the entry.
    StoreNotGated,
    /// It takes a log as complete that was written while it joined.
    NoReadyMark,
    /// It takes a sync that failed for one that was made.
    FailedSyncIgnored,
    /// It answers with what it has read of its log, which may be in the memory of its host alone.
    NoSyncAtOpen,
    /// It gives a file its name and does not sync the folder.
    FolderNotSynced,
}

/// Whether this bug is planted: never, but in a build with the feature `sabotage`, in the process
/// that a test starts with the bug's name in `KV54_SABOTAGE`.
pub fn planted(bug: Bug) -> bool {
    let is_named = |name: String| name.parse() == Ok(bug);
    cfg!(feature = "sabotage") && std::env::var("KV54_SABOTAGE").is_ok_and(is_named)
}

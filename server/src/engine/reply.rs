//! The result of an operation, and where it goes.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::op::Op;
use crate::lease::{Key, LeaseId, Snapshot, Standing};
use crate::store::{Outcome, StoreError};

/// The result of an operation.
pub(super) type CommitResult = Result<Done, StoreError>;

/// What the commit of an operation returned.
#[derive(Debug, Clone)]
pub(super) struct Done {
    /// The record after the operation.
    pub(super) snapshot: Arc<Snapshot>,
    /// As [`crate::store::Committed::is_repeated`] of the operation's batch.
    pub(super) is_repeated: bool,
}

/// Returns the error for an operation whose task ended without an answer, because of a shutdown or
/// a defect.
pub(super) fn lost() -> StoreError {
    StoreError::Unavailable { outcome: Outcome::Unknown, cause: "the commit was given up".to_owned() }
}

/// Where the result of an operation goes.
#[derive(Debug)]
pub(super) enum Reply {
    /// Nowhere.
    Nobody,
    /// Nowhere, but the operation is committed again if it failed.
    Leftover(Box<Leftover>),
    /// To the caller.
    One(oneshot::Sender<CommitResult>),
    /// To the caller of many operations, with the position of this one among them.
    OneOfMany(usize, mpsc::Sender<(usize, CommitResult)>),
}

/// An id that the daemon picked for a call that has ended. Nobody else knows the id, so the daemon
/// gives it up.
#[derive(Debug)]
pub(super) struct Leftover {
    pub(super) key: Key,
    pub(super) id: LeaseId,
    /// When to stop trying.
    pub(super) until: Instant,
}

impl Leftover {
    /// Whether the id must be given up again after this result.
    fn is_left(&self, result: &CommitResult) -> bool {
        match result {
            // The record had no room to remember the id.
            Ok(done) => done.snapshot.standing(self.id) == Standing::Unknown,
            Err(error) => matches!(error, StoreError::Unavailable { .. }),
        }
    }

    /// Returns the operation that gives the id up.
    pub(super) fn into_queued(self) -> (Key, Op, Reply) {
        (self.key.clone(), Op::GiveUp(self.id), Reply::Leftover(Box::new(self)))
    }
}

impl Reply {
    /// Whether a call awaits the result.
    pub(super) fn is_awaited(&self) -> bool {
        !matches!(self, Self::Nobody | Self::Leftover(_))
    }

    /// Whether the call that awaited the result has ended, so that the operation need not be
    /// committed any more.
    pub(super) fn is_closed(&self) -> bool {
        match self {
            Self::Nobody | Self::Leftover(_) => false,
            Self::One(sender) => sender.is_closed(),
            Self::OneOfMany(_, sender) => sender.is_closed(),
        }
    }

    /// Sends the result. Returns a leftover that must be committed again, because the store failed
    /// or the record was full. Both pass with time.
    pub(super) fn send(self, result: CommitResult) -> Option<Leftover> {
        match self {
            Self::Leftover(leftover) if leftover.is_left(&result) => return Some(*leftover),
            Self::Nobody | Self::Leftover(_) => {}
            Self::One(sender) => {
                // The caller may have gone away.
                let _ = sender.send(result);
            }
            Self::OneOfMany(position, sender) => {
                // The channel has room for every result, so sending fails only if the caller has
                // gone away.
                let _ = sender.try_send((position, result));
            }
        }
        None
    }
}

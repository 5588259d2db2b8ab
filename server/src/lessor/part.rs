//! What one call brings to the next edit of its key, and how parts merge into that edit.

use std::sync::Arc;

use crate::lease::{Acquisition, Edit, FencingToken, LeaseId};

/// One call's share of an edit.
#[derive(Debug, Clone)]
pub(super) enum Part {
    /// Joins the line or refreshes the place there, and renews the lease if it is held already: a repeated acquire
    /// is answered with a lease that lasts a whole TTL from the repetition on, whatever became of the first.
    Acquire(Arc<Acquisition>),
    Touch(LeaseId),
    Release(LeaseId),
    Revoke(Vec<FencingToken>),
    /// Leaves the line.
    Cancel(LeaseId),
    /// Leaves the line, and gives back what may have been granted meanwhile.
    Abandon(LeaseId),
    /// Admits whoever's turn has come.
    Nudge,
}

/// The edit that contains all `parts`.
///
/// The parts are concurrent, so whatever the order, it is a right one. A call that ended and another that took over
/// its id, which happens when a client reconnects, cancel out in favour of the place in line.
pub(super) fn merge<'a>(parts: impl Iterator<Item = &'a Part> + Clone) -> Edit {
    let arrives = |id: LeaseId| {
        parts.clone().any(|part| matches!(part, Part::Acquire(acquisition) if acquisition.id == id))
    };
    parts.clone().fold(Edit::default(), |edit, part| match part {
        Part::Acquire(acquisition) => edit.touch(acquisition.id).enqueue(Arc::clone(acquisition)),
        Part::Touch(id) => edit.touch(*id),
        Part::Release(id) => edit.release(*id),
        Part::Revoke(tokens) => tokens.iter().fold(edit, |edit, token| edit.revoke(*token)),
        Part::Cancel(id) if arrives(*id) => edit,
        Part::Cancel(id) => edit.cancel(*id),
        Part::Abandon(id) => edit.cancel(*id).release(*id),
        Part::Nudge => edit,
    })
}

impl Part {
    /// About how much the part adds to a command, in bytes.
    pub(super) fn weight(&self) -> usize {
        match self {
            Self::Acquire(acquisition) => acquisition.size(),
            Self::Revoke(tokens) => 16 * tokens.len(),
            _ => 32,
        }
    }
}

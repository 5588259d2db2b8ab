//! What one call brings to the next edit of its key, and how parts merge into that edit.

use std::mem::take;
use std::sync::{Arc, Weak};

use crate::lease::{Acquisition, Edit, LeaseId, Timestamp};

/// One call's share of an edit.
#[derive(Debug, Clone)]
pub(crate) enum Part {
    /// Joins the line or refreshes the place there, and renews the lease if it is held already: a repeated acquire
    /// is answered with a lease that lasts a whole TTL from the repetition on, whatever became of the first.
    Acquire(Arc<Acquisition>),
    /// Keeps the place of a call that waits, while it does.
    Refresh(LeaseId, Weak<Presence>),
    /// Takes a new place for a call that waits and has lost its own, while it does: a place that was given up is not
    /// taken anew. Claims the lease if there is one by now.
    Rejoin(Arc<Acquisition>, Weak<Presence>),
    /// Renews the lease that another daemon's commit granted to a call that waits, while it does.
    Claim(LeaseId, Weak<Presence>),
    Touch(LeaseId),
    Release(LeaseId),
    /// Releases an id whose acquire may still be under way.
    GiveUp(LeaseId),
    /// Keeps out an acquire with this id that comes later, unless the id is in use by then.
    KeepOut(LeaseId),
    /// Takes these leases away, and ends the block that lasts until then.
    Revoke(Vec<LeaseId>, Option<Timestamp>),
    /// Leaves the line.
    Cancel(LeaseId),
    /// Admits whoever's turn has come.
    Nudge,
}

/// There is as long as a call stands in line here.
#[derive(Debug)]
pub(crate) struct Presence;

/// Parts that may become one edit.
#[derive(Debug, Default)]
pub(crate) struct Gathered(Edit);

impl Gathered {
    /// Merges `part`, unless it asks for an id that an earlier one gives up or the other way round, or for an id that an
    /// earlier one wants with another mode or limit. Such an edit would not be idempotent, or could not answer both; the
    /// part is for the next.
    pub(crate) fn merge(&mut self, part: &Part) -> bool {
        let edit = &self.0;
        let fits = match part {
            Part::Acquire(acquisition) | Part::Rejoin(acquisition, _) => {
                let Acquisition { id, mode, shared_limit, .. } = **acquisition;
                !edit.releases(id)
                    && !edit.keeps_out(id)
                    && !edit.cancels(id)
                    && (!edit.enqueues(id) || edit.asks(id, mode, shared_limit))
            }
            Part::Release(id) | Part::GiveUp(id) | Part::KeepOut(id) | Part::Cancel(id) => {
                !edit.enqueues(*id)
            }
            Part::Refresh(..) | Part::Claim(..) | Part::Touch(_) | Part::Revoke(..) | Part::Nudge => true,
        };
        if fits {
            self.0 = part.add_to(take(&mut self.0));
        }
        fits
    }

    /// The edit that contains all that was merged.
    pub(crate) fn into_edit(self) -> Edit {
        self.0
    }
}

impl Part {
    fn add_to(&self, edit: Edit) -> Edit {
        match self {
            Self::Acquire(acquisition) => edit.enqueue(Arc::clone(acquisition)),
            // The first command for the place may have been delayed, and still come.
            Self::Rejoin(acquisition, _) => {
                edit.enqueue(Arc::new(Acquisition { repeated: true, ..Acquisition::clone(acquisition) }))
            }
            Self::Refresh(id, _) => edit.refresh(*id),
            Self::Claim(id, _) | Self::Touch(id) => edit.touch(*id),
            Self::Release(id) => edit.release(*id),
            Self::GiveUp(id) => edit.give_up(*id),
            Self::KeepOut(id) => edit.keep_out(*id),
            Self::Revoke(ids, until) => {
                let edit = ids.iter().fold(edit, |edit, id| edit.revoke(*id));
                until.iter().fold(edit, |edit, until| edit.unblock(*until))
            }
            Self::Cancel(id) => edit.cancel(*id),
            Self::Nudge => edit,
        }
    }

    /// Whether what it was for is over.
    pub(crate) fn is_moot(&self) -> bool {
        match self {
            Self::Refresh(_, presence) | Self::Rejoin(_, presence) | Self::Claim(_, presence) => {
                presence.strong_count() == 0
            }
            _ => false,
        }
    }

    /// About how much the part adds to a command, in bytes.
    pub(crate) fn weight(&self) -> usize {
        match self {
            Self::Acquire(acquisition) | Self::Rejoin(acquisition, _) => acquisition.size(),
            Self::Revoke(ids, _) => 32 * ids.len(),
            _ => 32,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::Mode;

    fn acquire(id: LeaseId) -> Part {
        Part::Acquire(Arc::new(Acquisition::waiting(id)))
    }

    #[test]
    fn an_id_is_not_asked_for_and_given_up_in_one_edit() {
        let [one, two] = [LeaseId::random(), LeaseId::random()];
        for give_up in [Part::Release(one), Part::GiveUp(one), Part::KeepOut(one), Part::Cancel(one)] {
            for (first, second) in [(acquire(one), give_up.clone()), (give_up, acquire(one))] {
                let mut gathered = Gathered::default();
                assert!(gathered.merge(&first));
                assert!(gathered.merge(&acquire(two)));
                assert!(!gathered.merge(&second), "{first:?} then {second:?}");
                assert!(gathered.merge(&Part::Touch(one)));
            }
        }
    }

    #[test]
    fn an_id_is_asked_for_in_one_way_in_one_edit() {
        let id = LeaseId::random();
        let shared = Acquisition { mode: Mode::Shared, ..Acquisition::waiting(id) };
        let wider = Acquisition { shared_limit: 2, ..shared.clone() };
        let mut gathered = Gathered::default();
        assert!(gathered.merge(&Part::Acquire(Arc::new(shared.clone()))));
        assert!(gathered.merge(&Part::Acquire(Arc::new(shared))));
        assert!(!gathered.merge(&acquire(id)));
        assert!(!gathered.merge(&Part::Acquire(Arc::new(wider))));
    }
}

//! What one call brings to the next edit of its key, and how parts merge into that edit.

use std::mem::take;
use std::sync::{Arc, Weak};

use crate::lease::{Acquisition, Edit, FencingToken, LeaseId};

/// One call's share of an edit.
#[derive(Debug, Clone)]
pub(super) enum Part {
    /// Joins the line or refreshes the place there, and renews the lease if it is held already: a repeated acquire
    /// is answered with a lease that lasts a whole TTL from the repetition on, whatever became of the first.
    Acquire(Arc<Acquisition>),
    /// The same for a call that waits already, while it does: a place that was given up is not taken anew.
    Rejoin(Arc<Acquisition>, Weak<Presence>),
    /// Renews the lease that another daemon's commit granted to a call that waits, while it does.
    Claim(LeaseId, Weak<Presence>),
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

/// There is as long as a call stands in line here.
#[derive(Debug)]
pub(super) struct Presence;

/// Parts that may become one edit.
#[derive(Debug, Default)]
pub(super) struct Gathered(Edit);

impl Gathered {
    /// Merges `part`, unless it asks for an id that an earlier one gives up or the other way round. Such an edit
    /// would not be idempotent; the part is for the next.
    pub(super) fn merge(&mut self, part: &Part) -> bool {
        let edit = &self.0;
        let fits = match part {
            Part::Acquire(acquisition) | Part::Rejoin(acquisition, _) => {
                !edit.releases(acquisition.id) && !edit.cancels(acquisition.id)
            }
            Part::Release(id) | Part::Cancel(id) | Part::Abandon(id) => !edit.enqueues(*id),
            Part::Claim(..) | Part::Touch(_) | Part::Revoke(_) | Part::Nudge => true,
        };
        if fits {
            self.0 = part.add_to(take(&mut self.0));
        }
        fits
    }

    /// The edit that contains all that was merged.
    pub(super) fn into_edit(self) -> Edit {
        self.0
    }
}

impl Part {
    fn add_to(&self, edit: Edit) -> Edit {
        match self {
            Self::Acquire(acquisition) | Self::Rejoin(acquisition, _) => {
                edit.touch(acquisition.id).enqueue(Arc::clone(acquisition))
            }
            Self::Claim(id, _) | Self::Touch(id) => edit.touch(*id),
            Self::Release(id) => edit.release(*id),
            Self::Revoke(tokens) => tokens.iter().fold(edit, |edit, token| edit.revoke(*token)),
            Self::Cancel(id) => edit.cancel(*id),
            Self::Abandon(id) => edit.cancel(*id).release(*id),
            Self::Nudge => edit,
        }
    }

    /// Whether what it was for is over.
    pub(super) fn is_moot(&self) -> bool {
        match self {
            Self::Rejoin(_, presence) | Self::Claim(_, presence) => presence.strong_count() == 0,
            _ => false,
        }
    }

    /// About how much the part adds to a command, in bytes.
    pub(super) fn weight(&self) -> usize {
        match self {
            Self::Acquire(acquisition) | Self::Rejoin(acquisition, _) => acquisition.size(),
            Self::Revoke(tokens) => 16 * tokens.len(),
            _ => 32,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acquire(id: LeaseId) -> Part {
        Part::Acquire(Arc::new(Acquisition::waiting(id)))
    }

    #[test]
    fn an_id_is_not_asked_for_and_given_up_in_one_edit() {
        let [one, two] = [LeaseId::random(), LeaseId::random()];
        for give_up in [Part::Release(one), Part::Cancel(one), Part::Abandon(one)] {
            for (first, second) in [(acquire(one), give_up.clone()), (give_up, acquire(one))] {
                let mut gathered = Gathered::default();
                assert!(gathered.merge(&first));
                assert!(gathered.merge(&acquire(two)));
                assert!(!gathered.merge(&second), "{first:?} then {second:?}");
                assert!(gathered.merge(&Part::Touch(one)));
            }
        }
    }
}

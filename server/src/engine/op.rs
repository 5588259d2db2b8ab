//! The operations of calls for one key, and how they merge into the next edit of the key.

use std::mem::take;
use std::sync::{Arc, Weak};

use crate::lease::{Acquisition, Edit, LeaseId, Timestamp};

/// One operation of an edit.
#[derive(Debug, Clone)]
pub(crate) enum Op {
    /// Asks for a lease. If the lease is not granted at once and the acquisition waits, makes a
    /// waiter's entry, or refreshes the entry that the id has already.
    ///
    /// Renews the lease if it is held already: a caller that repeats its call counts the TTL from
    /// the repetition.
    Acquire(Arc<Acquisition>),
    /// Refreshes the waiter's entry of a call. Obsolete once the call has ended.
    Refresh(LeaseId, Weak<Liveness>),
    /// Makes a new waiter's entry for a call whose entry is gone, or renews the call's lease if one
    /// has been granted. Obsolete once the call has ended: the entry would belong to nobody.
    Rejoin(Arc<Acquisition>, Weak<Liveness>),
    /// Renews a lease that another daemon's commit granted to a waiting call. Obsolete once the
    /// call has ended.
    Claim(LeaseId, Weak<Liveness>),
    /// Renews a lease.
    Touch(LeaseId),
    /// Releases a lease, or takes its id out of the queue.
    Release(LeaseId),
    /// Releases an id whose acquire may still be under way.
    GiveUp(LeaseId),
    /// Keeps out later acquires with this id, unless the id holds or waits by now.
    KeepOut(LeaseId),
    /// Takes these leases away, and ends a block by `min_hold` that lasts until exactly this
    /// instant.
    Revoke(Vec<LeaseId>, Option<Timestamp>),
    /// Takes the id out of the queue.
    Cancel(LeaseId),
    /// Admits the waiters that can be admitted now, and changes nothing else.
    Nudge,
}

/// Alive while a call is queued on this daemon.
#[derive(Debug)]
pub(crate) struct Liveness;

/// Merges operations into one edit.
#[derive(Debug, Default)]
pub(crate) struct EditBuilder(Edit);

impl EditBuilder {
    /// Merges `op` if it fits into the edit, and returns whether it does. Otherwise `op` is for the
    /// next edit.
    ///
    /// Two operations do not fit together if one asks for an id that the other ends: an edit
    /// with both would not be idempotent. Two that ask for one id with different modes or limits do
    /// not fit together either: one record could not answer both.
    pub(crate) fn merge(&mut self, op: &Op) -> bool {
        let edit = &self.0;
        let fits = match op {
            Op::Acquire(acquisition) | Op::Rejoin(acquisition, _) => {
                let Acquisition { id, mode, shared_limit, .. } = **acquisition;
                !edit.releases(id)
                    && !edit.keeps_out(id)
                    && !edit.cancels(id)
                    && (!edit.enqueues(id) || edit.asks(id, mode, shared_limit))
            }
            Op::Release(id) | Op::GiveUp(id) | Op::KeepOut(id) | Op::Cancel(id) => !edit.enqueues(*id),
            Op::Refresh(..) | Op::Claim(..) | Op::Touch(_) | Op::Revoke(..) | Op::Nudge => true,
        };
        if fits {
            self.0 = op.add_to(take(&mut self.0));
        }
        fits
    }

    /// Returns the edit with all merged operations.
    pub(crate) fn build(self) -> Edit {
        self.0
    }
}

impl Op {
    fn add_to(&self, edit: Edit) -> Edit {
        match self {
            Self::Acquire(acquisition) => edit.enqueue(Arc::clone(acquisition)),
            // Marked as repeated, because the command that asked first may still arrive.
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

    /// Whether the waiting call that the operation is for has ended.
    pub(crate) fn is_obsolete(&self) -> bool {
        match self {
            Self::Refresh(_, liveness) | Self::Rejoin(_, liveness) | Self::Claim(_, liveness) => {
                liveness.strong_count() == 0
            }
            _ => false,
        }
    }

    /// About how many bytes the operation adds to a command.
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

    fn acquire(id: LeaseId) -> Op {
        Op::Acquire(Arc::new(Acquisition::waiting(id)))
    }

    #[test]
    fn one_edit_does_not_ask_for_an_id_and_give_it_up() {
        let [one, two] = [LeaseId::random(), LeaseId::random()];
        for give_up in [Op::Release(one), Op::GiveUp(one), Op::KeepOut(one), Op::Cancel(one)] {
            for (first, second) in [(acquire(one), give_up.clone()), (give_up, acquire(one))] {
                let mut builder = EditBuilder::default();
                assert!(builder.merge(&first));
                assert!(builder.merge(&acquire(two)));
                assert!(!builder.merge(&second), "{first:?} then {second:?}");
                assert!(builder.merge(&Op::Touch(one)));
            }
        }
    }

    #[test]
    fn one_edit_asks_for_an_id_with_one_mode_and_limit() {
        let id = LeaseId::random();
        let shared = Acquisition { mode: Mode::Shared, ..Acquisition::waiting(id) };
        let wider = Acquisition { shared_limit: 2, ..shared.clone() };
        let mut builder = EditBuilder::default();
        assert!(builder.merge(&Op::Acquire(Arc::new(shared.clone()))));
        assert!(builder.merge(&Op::Acquire(Arc::new(shared))));
        assert!(!builder.merge(&acquire(id)));
        assert!(!builder.merge(&Op::Acquire(Arc::new(wider))));
    }
}

//! Mutants of the specification and of the pipeline. For each mutant one test of the rules must
//! fail, so that a change which breaks that rule cannot pass unnoticed.

use std::collections::{HashMap, HashSet};
use std::panic::{catch_unwind, panic_any};

use rstest::rstest;

use super::backends::{Backend, Step, Unanswered};
use super::{differential, rules};
use crate::lease::{
    Departure, Edit, FencingToken, Key, LeaseId, MAX_SHARED_HOLDERS, Mode, REMEMBERED_DEPARTURES, Reason,
    Record, Rules, Timestamp, Waiter, step,
};
use crate::store::StoreError;

/// A deliberate mistake in one rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) enum Mutant {
    TokenResetOnRelease,
    TouchWithoutId,
    ReleaseWithoutId,
    LapsedWaiterAdmitted,
    SharedOvertakes,
    GraceIgnored,
    RevisionKept,
    MinHoldIgnored,
    DeparturesForgotten,
    /// A release does not remove a waiter.
    WaiterOutlivesRelease,
    /// A release of an unknown id is not remembered.
    UnknownReleaseForgotten,
    /// An id in use is kept out.
    KeptOutWhatIsInUse,
    /// Releases of unknown ids take the room of other departures.
    SettledTakeAllRoom,
    /// A lasting departure is forgotten as soon as eight newer ones exist.
    LastingForgotten,
    /// A departure whose id the edit names is forgotten like any other.
    NamedForgotten,
    /// A repeated acquire does not mark the holder as repeated.
    RepetitionUnmarked,
    /// An acquire with another mode renews an id in use.
    OtherModeRenewed,
    /// The limits of holders do not apply to later callers.
    HoldersLimitIgnored,
    /// A block cannot be lifted.
    BlockKept,
    /// A caller's value is in the pipeline without `$literal`.
    OutsideLiteral,
    /// Changes of holders or queue look like touches to the change feed.
    NotifyRevKept,
    /// Touches look like changes of holders or queue to the change feed.
    NotifyRevAlwaysRises,
}

impl Mutant {
    /// The specification with this mistake.
    pub(super) fn step(self) -> Step {
        match self {
            Self::TokenResetOnRelease => |record, edit, now, rules| {
                let mut after = step(record, edit, now, rules);
                if after.holders.is_empty() {
                    after.token = FencingToken(0);
                }
                after
            },
            Self::TouchWithoutId => |record, edit, now, rules| {
                let all = record.holders.iter().fold(edit.clone(), |edit, holder| edit.touch(holder.id));
                step(record, if edit.touched().is_empty() { edit } else { &all }, now, rules)
            },
            Self::ReleaseWithoutId => |record, edit, now, rules| {
                let all = record.holders.iter().fold(edit.clone(), |edit, holder| edit.release(holder.id));
                step(record, if edit.released().is_empty() { edit } else { &all }, now, rules)
            },
            Self::LapsedWaiterAdmitted => |mut record, edit, now, rules| {
                for waiter in &mut record.waiters {
                    waiter.expires_at = waiter.expires_at.max(Timestamp(now.0 + 1));
                }
                step(record, edit, now, rules)
            },
            Self::SharedOvertakes => |mut record, edit, now, rules| {
                record.waiters.sort_by_key(|waiter| waiter.acquisition.mode == Mode::Exclusive);
                step(record, edit, now, rules)
            },
            Self::GraceIgnored => |record, edit, now, rules| {
                step(record, edit, now, &Rules { grace: std::time::Duration::ZERO, ..*rules })
            },
            Self::RevisionKept => |record, edit, now, rules| {
                let rev = record.rev;
                Record { rev, ..step(record, edit, now, rules) }
            },
            Self::MinHoldIgnored => |record, edit, now, rules| {
                let blocked_until = record.blocked_until;
                Record { blocked_until, ..step(record, edit, now, rules) }
            },
            Self::DeparturesForgotten => |record, edit: &Edit, now, rules| Record {
                departures: Vec::new(),
                ..step(record, edit, now, rules)
            },
            Self::WaiterOutlivesRelease => |record, edit, now, rules| {
                let released = |waiter: &&Waiter| edit.released().contains(&waiter.acquisition.id);
                let kept: Vec<Waiter> = record.waiters.iter().filter(released).cloned().collect();
                let mut after = step(record, edit, now, rules);
                after.waiters.splice(0..0, kept);
                after
            },
            Self::UnknownReleaseForgotten => |record, edit, now, rules| {
                let mut after = step(record, edit, now, rules);
                after.departures.retain(|departure| departure.reason != Reason::Settled);
                after
            },
            Self::KeptOutWhatIsInUse => |record, edit, now, rules| {
                let released = edit.kept_out().iter().fold(edit.clone(), |edit, id| edit.give_up(*id));
                step(record, &released, now, rules)
            },
            Self::SettledTakeAllRoom => |mut record, edit, now, rules| {
                // `SETTLED_DEPARTURES` limits only settled departures, so this hides them from it.
                let is_settled = |departure: &&mut Departure| departure.reason == Reason::Settled;
                let settled = record.departures.iter_mut().filter(is_settled);
                let settled: HashSet<LeaseId> = settled
                    .map(|departure| {
                        departure.reason = Reason::Withdrawn;
                        departure.id
                    })
                    .collect();
                let mut after = step(record, edit, now, rules);
                let again = after.departures.iter_mut().filter(|departure| settled.contains(&departure.id));
                again.for_each(|departure| departure.reason = Reason::Settled);
                after
            },
            Self::LastingForgotten => |record, edit, now, rules| {
                let mut after = step(record, edit, now, rules);
                let latest = after.departures.iter().filter(|departure| departure.at == now).count();
                after.departures.truncate(latest.max(REMEMBERED_DEPARTURES));
                after
            },
            Self::NamedForgotten => |record, edit, now, rules| {
                let mut after = step(record, edit, now, rules);
                let mut position = 0;
                after.departures.retain(|departure| {
                    position += 1;
                    position <= REMEMBERED_DEPARTURES || departure.lasting
                });
                after
            },
            Self::RepetitionUnmarked => |record, edit, now, rules| {
                let mut after = step(record, edit, now, rules);
                after.holders.iter_mut().for_each(|holder| holder.repeated = false);
                after
            },
            Self::OtherModeRenewed => |record, edit, now, rules| {
                let asked = edit.enqueued().iter().map(|asked| asked.id);
                let touched = asked.fold(edit.clone(), |edit, id| edit.touch(id));
                step(record, &touched, now, rules)
            },
            Self::HoldersLimitIgnored => |mut record, edit, now, rules| {
                let limits: HashMap<LeaseId, u32> =
                    record.holders.iter().map(|holder| (holder.id, holder.shared_limit)).collect();
                record.holders.iter_mut().for_each(|holder| holder.shared_limit = MAX_SHARED_HOLDERS);
                let mut after = step(record, edit, now, rules);
                for holder in &mut after.holders {
                    holder.shared_limit = *limits.get(&holder.id).unwrap_or(&holder.shared_limit);
                }
                after
            },
            Self::BlockKept => |record, edit, now, rules| {
                let blocked_until = record.blocked_until;
                Record { blocked_until, ..step(record, edit, now, rules) }
            },
            Self::OutsideLiteral => panic!("the specification evaluates no text"),
            Self::NotifyRevKept | Self::NotifyRevAlwaysRises => panic!("the specification has no notify_rev"),
        }
    }
}

/// Runs a test of the rules. Returns whether it fails, other than because the store does not
/// answer.
fn is_caught(rule: fn(Backend), backend: Backend) -> bool {
    let Err(panic) = catch_unwind(|| rule(backend)) else { return false };
    if let Some(unanswered) = panic.downcast_ref::<Unanswered>()
        && !unanswered.is_of_a_record()
    {
        panic!("the store did not answer: {unanswered:?}");
    }
    true
}

#[test]
fn a_pipeline_that_the_database_cannot_run_does_not_count_as_a_caught_mutant() {
    fn unanswered(cause: &str) -> Unanswered {
        let key = Key::try_from("key").expect("a key");
        Unanswered(StoreError::Unreadable { key, cause: cause.to_owned() })
    }
    let rule: fn(Backend) = |_| panic_any(unanswered("field holders is missing or of another type"));
    assert!(is_caught(rule, Backend::Step));
    let broken: fn(Backend) =
        |_| panic_any(unanswered("Error code 40324 (Location40324): Unrecognized stage"));
    assert!(catch_unwind(|| is_caught(broken, Backend::Step)).is_err());
}

fn a_repeated_acquire_is_remembered(backend: Backend) {
    rules::an_id_that_may_still_be_asked_for_is_remembered_for_a_minute_after_its_end(0, backend);
}

#[rstest]
#[case(Mutant::TokenResetOnRelease, rules::a_token_rises_even_when_the_clock_stands_still_or_steps_back)]
#[case(Mutant::TouchWithoutId, rules::a_touch_of_an_id_that_holds_nothing_changes_only_the_revision)]
#[case(Mutant::ReleaseWithoutId, rules::a_release_is_remembered_and_may_be_repeated)]
#[case(Mutant::LapsedWaiterAdmitted, rules::a_lapsed_waiter_is_removed_at_its_turn_and_not_before)]
#[case(Mutant::SharedOvertakes, rules::a_shared_request_does_not_overtake_an_earlier_exclusive_one)]
#[case(Mutant::GraceIgnored, rules::a_lease_is_displaced_when_its_ttl_and_the_grace_are_over_and_not_before)]
#[case(Mutant::RevisionKept, rules::every_edit_raises_the_revision_even_a_nudge)]
#[case(Mutant::MinHoldIgnored, rules::min_hold_keeps_others_out_after_an_early_release)]
#[case(
    Mutant::DeparturesForgotten,
    rules::a_late_duplicate_of_an_acquire_whose_lease_departed_grants_nothing
)]
#[case(Mutant::WaiterOutlivesRelease, rules::a_release_removes_a_waiter_for_good)]
#[case(Mutant::UnknownReleaseForgotten, rules::a_release_before_its_acquire_settles_the_id_for_a_minute)]
#[case(Mutant::KeptOutWhatIsInUse, rules::an_id_is_kept_out_for_a_minute_unless_it_is_in_use)]
#[case(
    Mutant::SettledTakeAllRoom,
    rules::releases_of_unknown_ids_leave_half_of_the_memory_to_leases_that_are_taken_away
)]
#[case(Mutant::LastingForgotten, rules::a_release_before_its_acquire_settles_the_id_for_a_minute)]
#[case(Mutant::NamedForgotten, rules::an_edit_never_makes_the_record_forget_an_id_that_it_names)]
#[case(Mutant::RepetitionUnmarked, a_repeated_acquire_is_remembered)]
#[case(Mutant::OtherModeRenewed, rules::an_acquire_with_another_mode_or_limit_does_not_change_an_id_in_use)]
#[case(Mutant::HoldersLimitIgnored, rules::the_smallest_limit_of_shared_holders_applies_to_all)]
#[case(Mutant::BlockKept, rules::lifting_a_block_admits_the_next_waiter_and_may_be_repeated)]
#[case(Mutant::OutsideLiteral, rules::a_callers_text_is_never_evaluated)]
fn each_mutant_is_caught(#[case] mutant: Mutant, #[case] rule: fn(Backend)) {
    if mutant != Mutant::OutsideLiteral {
        assert!(is_caught(rule, Backend::MutantStep(mutant)), "in the specification");
    }
    assert!(is_caught(rule, Backend::MutantPipeline(mutant)), "in the pipeline");
    // Random edits have too few ids to fill a record's memory.
    if mutant != Mutant::SettledTakeAllRoom {
        assert!(differential::catches(mutant), "by random edits");
    }
}

//! Deliberate wrongs, in the specification and in the pipeline, and for each the sentence that notices it. Were one of
//! these rules lost in a change, that sentence would say so.

use std::collections::{HashMap, HashSet};
use std::panic::{catch_unwind, panic_any};

use rstest::rstest;

use super::backends::{Home, Step, Unanswered};
use super::{differential, rules};
use crate::lease::{
    Departure, Edit, FencingToken, Key, LeaseId, MAX_SHARED_HOLDERS, Mode, REMEMBERED_DEPARTURES, Reason,
    Record, Rules, Timestamp, Waiter, step,
};
use crate::store::StoreError;

/// A rule broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) enum Wrong {
    TokenResetOnRelease,
    TouchWithoutId,
    ReleaseWithoutId,
    LapsedWaiterAdmitted,
    SharedOvertakes,
    GraceIgnored,
    RevisionKept,
    MinHoldIgnored,
    DeparturesForgotten,
    /// A release leaves a place in line.
    PlaceOutlivesRelease,
    /// A release that finds nothing leaves nothing.
    UnknownReleaseForgotten,
    /// An id that is in use is kept out.
    KeptOutWhatIsInUse,
    /// Releases that find nothing leave no room for other departures.
    SettledTakeAllRoom,
    /// Departures are forgotten by their number alone.
    LastingForgotten,
    /// A departure that an edit names is forgotten like others.
    NamedForgotten,
    /// That an id was asked for again is not noted.
    RepetitionUnmarked,
    /// An id in use with another mode is renewed.
    OtherModeRenewed,
    /// Holders' limits bind nobody who comes later.
    HoldersLimitIgnored,
    /// A block is not lifted.
    BlockKept,
    /// A caller's value stands in the pipeline as it is.
    OutsideLiteral,
    /// Changes to the line-up look like touches.
    EpochKept,
    /// Touches look like changes to the line-up.
    EpochAlwaysRises,
}

impl Wrong {
    /// The specification with this wrong in it.
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
            Self::PlaceOutlivesRelease => |record, edit, now, rules| {
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
                // What is withdrawn counts for the whole room alone.
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
                let mut place = 0;
                after.departures.retain(|departure| {
                    place += 1;
                    place <= REMEMBERED_DEPARTURES || departure.lasting
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
            Self::OutsideLiteral => panic!("the specification quotes nothing"),
            Self::EpochKept | Self::EpochAlwaysRises => panic!("the specification has no epoch"),
        }
    }
}

/// Runs a sentence that must fail, and not because the store cannot answer.
fn is_noticed(sentence: fn(Home), home: Home) -> bool {
    let Err(panic) = catch_unwind(|| sentence(home)) else { return false };
    if let Some(unanswered) = panic.downcast_ref::<Unanswered>()
        && !unanswered.is_of_a_record()
    {
        panic!("the sentence came to no end: {unanswered:?}");
    }
    true
}

#[test]
fn a_pipeline_that_the_database_cannot_compute_is_no_wrong_that_is_noticed() {
    fn unanswered(cause: &str) -> Unanswered {
        let key = Key::try_from("key").expect("a key");
        Unanswered(StoreError::Unreadable { key, cause: cause.to_owned() })
    }
    let sentence: fn(Home) = |_| panic_any(unanswered("field holders is missing or of another type"));
    assert!(is_noticed(sentence, Home::Step));
    let broken: fn(Home) = |_| panic_any(unanswered("Error code 40324 (Location40324): Unrecognized stage"));
    assert!(catch_unwind(|| is_noticed(broken, Home::Step)).is_err());
}

fn twice_asked_is_remembered(home: Home) {
    rules::what_may_still_be_asked_for_is_remembered_for_a_minute_when_it_is_over(0, home);
}

#[rstest]
#[case(Wrong::TokenResetOnRelease, rules::a_token_rises_also_when_the_clock_stands_still_or_steps_back)]
#[case(Wrong::TouchWithoutId, rules::touching_what_one_does_not_hold_changes_nothing_but_the_revision)]
#[case(Wrong::ReleaseWithoutId, rules::a_release_is_remembered_and_may_be_repeated)]
#[case(Wrong::LapsedWaiterAdmitted, rules::a_lapsed_place_is_lost_at_its_turn_and_not_before)]
#[case(Wrong::SharedOvertakes, rules::a_shared_request_does_not_overtake_an_earlier_exclusive_one)]
#[case(
    Wrong::GraceIgnored,
    rules::a_lease_is_displaced_when_it_ran_out_and_the_grace_is_over_and_not_a_moment_before
)]
#[case(Wrong::RevisionKept, rules::every_edit_is_a_write_and_be_it_a_nudge)]
#[case(Wrong::MinHoldIgnored, rules::min_hold_keeps_others_out_after_an_early_release)]
#[case(Wrong::DeparturesForgotten, rules::a_late_duplicate_of_a_call_whose_lease_departed_makes_no_ghost)]
#[case(Wrong::PlaceOutlivesRelease, rules::a_release_takes_the_place_in_line_too_and_for_good)]
#[case(
    Wrong::UnknownReleaseForgotten,
    rules::a_release_that_comes_before_its_acquire_settles_the_id_for_a_minute
)]
#[case(Wrong::KeptOutWhatIsInUse, rules::an_id_is_kept_out_for_a_minute_unless_it_is_in_use)]
#[case(
    Wrong::SettledTakeAllRoom,
    rules::releases_that_find_nothing_leave_half_of_the_memory_to_leases_that_are_taken_away
)]
#[case(Wrong::LastingForgotten, rules::a_release_that_comes_before_its_acquire_settles_the_id_for_a_minute)]
#[case(Wrong::NamedForgotten, rules::an_edit_never_makes_the_record_forget_whom_it_names)]
#[case(Wrong::RepetitionUnmarked, twice_asked_is_remembered)]
#[case(Wrong::OtherModeRenewed, rules::an_id_in_use_with_another_mode_or_limit_stays_as_it_is)]
#[case(Wrong::HoldersLimitIgnored, rules::the_smallest_limit_of_those_who_share_holds_for_all)]
#[case(Wrong::BlockKept, rules::a_block_that_is_lifted_lets_the_next_in_and_lifting_may_be_repeated)]
#[case(Wrong::OutsideLiteral, rules::what_a_caller_writes_is_text_and_nothing_else)]
fn each_wrong_is_noticed(#[case] wrong: Wrong, #[case] sentence: fn(Home)) {
    if wrong != Wrong::OutsideLiteral {
        assert!(is_noticed(sentence, Home::WrongStep(wrong)), "in the specification");
    }
    assert!(is_noticed(sentence, Home::WrongPipeline(wrong)), "in the pipeline");
    // Random edits have too few ids to fill a record's memory.
    if wrong != Wrong::SettledTakeAllRoom {
        assert!(differential::finds_a_difference(wrong), "by random edits");
    }
}

//! Invariants of the rules over random histories. Each invariant comes with a mutant of the rules,
//! for which the same check must find a counter-example.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};

use super::*;

const RULES: Rules = Rules { grace: Duration::from_millis(300), waiter_ttl: Duration::from_millis(900) };
const START: i64 = 1_000_000;
const IDS: u8 = 40;

/// The specification, or a mutant of it.
type Step = fn(Record, &Edit, Timestamp, &Rules) -> Record;
/// Checks one step of a history.
type Check = fn(&Transition<'_>, &mut Past) -> Result<(), TestCaseError>;

/// One step of a history.
struct Transition<'a> {
    before: &'a Record,
    edit: &'a Edit,
    now: Timestamp,
    after: &'a Record,
    step: Step,
}

/// What a check remembers of the steps before.
#[derive(Default)]
struct Past {
    tokens: HashMap<LeaseId, FencingToken>,
    departed: HashSet<LeaseId>,
}

#[derive(Debug, Clone)]
enum Op {
    Touch(u8),
    Release(u8),
    GiveUp(u8),
    KeepOut(u8),
    Revoke(usize),
    Cancel(u8),
    Enqueue { id: u8, shared: Option<u32>, ttl: u64, min_hold: u64, wait: bool },
}

fn ops() -> impl Strategy<Value = Op> {
    let shared = prop_oneof![3 => Just(None), 2 => (1_u32..4).prop_map(Some)];
    let min_hold = prop_oneof![3 => Just(0), 1 => 1_u64..1500];
    prop_oneof![
        2 => ids().prop_map(Op::Touch),
        2 => ids().prop_map(Op::Release),
        1 => ids().prop_map(Op::GiveUp),
        1 => ids().prop_map(Op::KeepOut),
        1 => (0_usize..3).prop_map(Op::Revoke),
        1 => ids().prop_map(Op::Cancel),
        5 => (ids(), shared, 1_u64..2000, min_hold, any::<bool>())
            .prop_map(|(id, shared, ttl, min_hold, wait)| Op::Enqueue { id, shared, ttl, min_hold, wait }),
    ]
}

/// Generates mostly one of six ids, so that commands meet on the same id. The other ids are so many
/// that a record forgets departures.
fn ids() -> impl Strategy<Value = u8> {
    prop_oneof![4 => 0_u8..6, 1 => 0..IDS]
}

/// Generates histories: for each step, by how much the clock moves, sometimes backwards, and the
/// operations that follow.
fn histories() -> impl Strategy<Value = Vec<(i64, Vec<Op>)>> {
    let elapsed = prop_oneof![6 => 0_i64..700, 1 => -400_i64..0, 1 => 700_i64..3000];
    prop::collection::vec((elapsed, prop::collection::vec(ops(), 0..4)), 1..25)
}

fn id(number: u8) -> LeaseId {
    LeaseId::from([number + 1; 16])
}

/// Returns an edit of these operations. As in the daemon, an edit does not both ask for an id and
/// end it.
fn edit(ops: &[Op], record: &Record) -> Edit {
    let asked = |who: u8| ops.iter().any(|op| matches!(op, Op::Enqueue { id, .. } if *id == who));
    ops.iter().fold(Edit::default(), |edit, op| match *op {
        Op::Touch(who) => edit.touch(id(who)),
        Op::Release(who) | Op::GiveUp(who) | Op::KeepOut(who) | Op::Cancel(who) if asked(who) => edit,
        Op::Release(who) => edit.release(id(who)),
        Op::GiveUp(who) => edit.give_up(id(who)),
        Op::KeepOut(who) => edit.keep_out(id(who)),
        Op::Revoke(index) => edit.revoke(record.holders.get(index).map_or(id(IDS + 1), |holder| holder.id)),
        Op::Cancel(who) => edit.cancel(id(who)),
        Op::Enqueue { id: who, shared, ttl, min_hold, wait } => edit.enqueue(Arc::new(Acquisition {
            mode: if shared.is_some() { Mode::Shared } else { Mode::Exclusive },
            shared_limit: shared.unwrap_or(1),
            ttl: Ttl::new(Duration::from_millis(ttl)).expect("at least a millisecond"),
            min_hold: Duration::from_millis(min_hold),
            wait,
            ..Acquisition::waiting(id(who))
        })),
    })
}

/// Plays a history and checks every step.
fn play(history: &[(i64, Vec<Op>)], step: Step, check: Check) -> Result<(), TestCaseError> {
    let mut record = Record::vacant(Key::try_from("key").expect("a key"));
    let mut past = Past::default();
    let mut now = START;
    for (elapsed, ops) in history {
        now += elapsed;
        let edit = edit(ops, &record);
        let after = step(record.clone(), &edit, Timestamp(now), &RULES);
        check(
            &Transition { before: &record, edit: &edit, now: Timestamp(now), after: &after, step },
            &mut past,
        )?;
        record = after;
    }
    Ok(())
}

fn find_counter_example(cases: u32, step: Step, check: Check) -> Option<String> {
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    // For a mutant the histories are the same in every run, so its counter-example is always found.
    // The rules themselves get new histories in every run.
    let is_rule = std::ptr::fn_addr_eq(step, super::step as Step);
    let max_shrink_iters = if is_rule { 2000 } else { 0 };
    let config = Config { cases, failure_persistence: None, max_shrink_iters, ..Config::default() };
    let mut runner = if is_rule { TestRunner::new(config) } else { TestRunner::new_with_rng(config, rng) };
    match runner.run(&histories(), |history| play(&history, step, check)) {
        Ok(()) => None,
        Err(TestError::Fail(why, history)) => Some(format!("{why}\n{history:#?}")),
        Err(TestError::Abort(why)) => panic!("{why}"),
    }
}

/// Asserts that the check holds for the rules, and that it fails for the mutant.
fn assert_invariant(check: Check, mutant: Step) {
    if let Some(counter_example) = find_counter_example(2000, super::step, check) {
        panic!("{counter_example}");
    }
    assert!(find_counter_example(4000, mutant, check).is_some(), "the check does not notice the mutant");
}

fn live(holder: &Holder, now: Timestamp) -> bool {
    now < holder.expires_at + RULES.grace
}

#[test]
fn tokens_strictly_increase_and_a_lease_has_one() {
    let check: Check = |transition, past| {
        prop_assert!(transition.after.token >= transition.before.token);
        let mut last = transition.before.token;
        for holder in &transition.after.holders {
            match past.tokens.get(&holder.id) {
                Some(token) => prop_assert_eq!(holder.token, *token, "a second token"),
                None => {
                    prop_assert!(holder.token > last, "{:?} after {:?}", holder.token, last);
                    last = holder.token;
                    past.tokens.insert(holder.id, holder.token);
                }
            }
        }
        // An id whose departure is forgotten may be acquired again, with a new token.
        past.tokens.retain(|id, _| transition.after.holders.iter().any(|holder| holder.id == *id));
        Ok(())
    };
    assert_invariant(check, |mut record, edit, now, rules| {
        record.token = FencingToken(0);
        step(record, edit, now, rules)
    });
}

#[test]
fn never_two_live_exclusive_holders_nor_one_beside_shared_ones() {
    let check: Check = |transition, _| {
        let live = transition.after.holders.iter().filter(|holder| live(holder, transition.now));
        let (exclusive, shared): (Vec<_>, Vec<_>) = live.partition(|holder| holder.mode == Mode::Exclusive);
        prop_assert!(exclusive.len() <= 1 && (exclusive.is_empty() || shared.is_empty()));
        Ok(())
    };
    assert_invariant(check, |mut record, edit, now, rules| {
        let holders = std::mem::take(&mut record.holders);
        let mut after = step(record, edit, now, rules);
        after.holders.extend(holders);
        after
    });
}

/// The check looks at the instant of the displacement. A clock that steps back later may make a
/// displaced holder look live again.
#[test]
fn no_holder_is_displaced_before_its_lease_and_the_grace_are_over() {
    let check: Check = |transition, _| {
        for holder in &transition.before.holders {
            let is_gone = !transition.after.holders.iter().any(|other| other.id == holder.id);
            let is_ended = transition.edit.released().contains(&holder.id)
                || transition.edit.revoked().contains(&holder.id);
            prop_assert!(!is_gone || is_ended || !live(holder, transition.now), "{:?}", holder);
        }
        Ok(())
    };
    assert_invariant(check, |record, edit, now, rules| {
        let early = Timestamp(now.0 + 50);
        step(record, edit, early, rules)
    });
}

#[test]
fn no_waiter_overtakes_another() {
    let check: Check = |transition, _| {
        let leaves = |id: &LeaseId| {
            transition.edit.cancelled().contains(id) || transition.edit.released().contains(id)
        };
        let waits = |waiter: &&Waiter| transition.now < waiter.expires_at && !leaves(&waiter.acquisition.id);
        let mut still_waits = false;
        for waiter in transition.before.waiters.iter().filter(waits) {
            let id = waiter.acquisition.id;
            let admitted = transition.after.holders.iter().any(|holder| holder.id == id);
            prop_assert!(!(admitted && still_waits), "{:?} overtakes another waiter", id);
            still_waits |= !admitted;
        }
        let held = |id| transition.before.holders.iter().any(|holder| holder.id == id);
        let waited = |id| transition.before.waiters.iter().any(|waiter| waiter.acquisition.id == id);
        let newcomer = transition.after.holders.iter().any(|holder| !held(holder.id) && !waited(holder.id));
        prop_assert!(!(newcomer && still_waits), "a newcomer overtakes a waiter");
        Ok(())
    };
    assert_invariant(check, |mut record, edit, now, rules| {
        record.waiters.reverse();
        step(record, edit, now, rules)
    });
}

#[test]
fn applying_an_edit_again_at_once_gives_the_same_answers() {
    let check: Check = |transition, _| {
        let again = (transition.step)(transition.after.clone(), transition.edit, transition.now, &RULES);
        let (first, second) = [transition.after, &again]
            .map(|record| Snapshot { record: record.clone(), now: transition.now })
            .into();
        // Skips an id whose acquisition conflicted before the step: the step may remove the lapsed
        // entry that caused the conflict, and then the second answer differs.
        let before = Snapshot { record: transition.before.clone(), now: transition.now };
        let conflicts =
            |id| transition.edit.enqueued().iter().any(|asked| asked.id == id && before.conflicts(asked));
        for id in (0..=IDS + 1).map(id).filter(|id| transition.edit.names(*id) && !conflicts(*id)) {
            match (first.standing(id), second.standing(id)) {
                // An acquisition that did not wait has left the queue, so the waiter behind it may
                // be granted. That grant may displace a holder whose lease is over.
                (Standing::Waiter(_), Standing::Waiter(_) | Standing::Holder(_)) => {}
                (Standing::Holder(holder), Standing::Departed(Reason::Displaced))
                    if !live(holder, transition.now) => {}
                // `repeated` may differ, but no answer shows it.
                (Standing::Holder(first), Standing::Holder(second)) => {
                    prop_assert_eq!(first, &Holder { repeated: first.repeated, ..second.clone() });
                }
                (first, second) => prop_assert_eq!(first, second),
            }
        }
        Ok(())
    };
    assert_invariant(check, |mut record, edit, now, rules| {
        record.departures.clear();
        step(record, edit, now, rules)
    });
}

/// After an unknown outcome a daemon commits the same edit again, some time later.
#[test]
fn applying_an_edit_again_later_contradicts_no_answer() {
    let check: Check = |transition, _| {
        let later = transition.now + Duration::from_millis(250);
        let again = (transition.step)(transition.after.clone(), transition.edit, later, &RULES);
        let is_over = |record: &Record, id| record.departures.iter().any(|departure| departure.id == id);
        for id in transition.edit.released() {
            prop_assert!(is_over(transition.after, *id), "a released id has not ended");
            prop_assert!(is_over(&again, *id), "a release was undone");
        }
        let touched =
            transition.edit.touched().iter().chain(transition.edit.enqueued().iter().map(|asked| &asked.id));
        for id in touched {
            let held =
                |record: &Record| record.holders.iter().any(|holder| holder.id == *id && live(holder, later));
            prop_assert!(!held(transition.after) || held(&again), "a grant or touch was undone");
        }
        Ok(())
    };
    assert_invariant(check, |mut record, edit, now, rules| {
        let revoked = record.holders.iter().fold(edit.clone(), |edit, holder| edit.revoke(holder.id));
        record.rev += 1;
        step(record, &revoked, now, rules)
    });
}

#[test]
fn a_late_duplicate_acquires_nothing() {
    let check: Check = |transition, past| {
        for departure in &transition.before.departures {
            past.departed.insert(departure.id);
        }
        past.departed.retain(|id| transition.before.departures.iter().any(|departure| departure.id == *id));
        for id in &past.departed {
            prop_assert!(
                !transition.after.holders.iter().any(|holder| holder.id == *id),
                "an id that has ended holds"
            );
            prop_assert!(
                !transition.after.waiters.iter().any(|waiter| waiter.acquisition.id == *id),
                "an id that has ended waits"
            );
        }
        Ok(())
    };
    assert_invariant(check, |mut record, edit, now, rules| {
        let departures = std::mem::take(&mut record.departures);
        let mut after = step(record, edit, now, rules);
        after.departures.extend(departures);
        after
    });
}

#[test]
fn nothing_is_shortened_by_a_clock_that_steps_back() {
    let check: Check = |transition, _| {
        let (before, after) = (transition.before, transition.after);
        prop_assert!(after.token >= before.token);
        prop_assert!(after.blocked_until >= before.blocked_until);
        for holder in &before.holders {
            let kept = after.holders.iter().find(|other| other.id == holder.id);
            prop_assert!(kept.is_none_or(|kept| kept.expires_at >= holder.expires_at));
        }
        for waiter in &before.waiters {
            let id = waiter.acquisition.id;
            let kept = after.waiters.iter().find(|other| other.acquisition.id == id);
            prop_assert!(kept.is_none_or(|kept| kept.expires_at >= waiter.expires_at));
        }
        Ok(())
    };
    assert_invariant(check, |record, edit, now, rules| {
        let mut after = step(record, edit, now, rules);
        for holder in after.holders.iter_mut().filter(|holder| edit.touched().contains(&holder.id)) {
            holder.expires_at = now + holder.ttl.get();
        }
        after
    });
}

#[test]
fn an_id_holds_or_waits_at_most_once() {
    let check: Check = |transition, _| {
        let holders = transition.after.holders.iter().map(|holder| holder.id);
        let waiters = transition.after.waiters.iter().map(|waiter| waiter.acquisition.id);
        let ids: Vec<LeaseId> = holders.chain(waiters).collect();
        let distinct: HashSet<LeaseId> = ids.iter().copied().collect();
        prop_assert_eq!(ids.len(), distinct.len());
        Ok(())
    };
    assert_invariant(check, |mut record, edit, now, rules| {
        let holders = std::mem::take(&mut record.holders);
        let mut after = step(record, edit, now, rules);
        after.holders.extend(holders);
        after
    });
}

#[test]
fn a_stale_id_changes_no_more_than_an_empty_edit() {
    let check: Check = |transition, _| {
        let unknown = id(IDS + 1);
        let stale = Edit::default().touch(unknown).cancel(unknown).refresh(unknown).revoke(unknown);
        let after = |step: Step, edit: &Edit| step(transition.before.clone(), edit, transition.now, &RULES);
        let without = after(super::step, &Edit::default());
        prop_assert_eq!(&after(transition.step, &stale), &without);
        let with = after(transition.step, &stale.clone().release(unknown));
        prop_assert_eq!(
            Record { departures: without.departures.clone(), ..with },
            without,
            "only the departures may differ"
        );
        Ok(())
    };
    assert_invariant(check, |mut record, edit, now, rules| {
        if !edit.released().is_empty() {
            record.holders.clear();
        }
        step(record, edit, now, rules)
    });
}

#[test]
fn keeping_an_id_out_changes_no_lease_and_ends_every_unknown_id() {
    let check: Check = |transition, _| {
        let all = (0..=IDS).map(id);
        let after = |step: Step, edit: &Edit| step(transition.before.clone(), edit, transition.now, &RULES);
        let without = after(super::step, &Edit::default());
        let with = after(transition.step, &all.clone().fold(Edit::default(), Edit::keep_out));
        prop_assert_eq!(
            &Record { departures: without.departures.clone(), ..with.clone() },
            &without,
            "only the departures may differ"
        );
        let before = Snapshot { record: transition.before.clone(), now: transition.now };
        let with = Snapshot { record: with, now: transition.now };
        for id in all.filter(|id| before.standing(*id) == Standing::Unknown) {
            prop_assert_eq!(with.standing(id), Standing::Departed(Reason::Settled));
        }
        Ok(())
    };
    assert_invariant(check, |record, edit, now, rules| {
        let released = edit.kept_out().iter().fold(edit.clone(), |edit, id| edit.give_up(*id));
        step(record, &released, now, rules)
    });
}

#[test]
fn every_edit_raises_the_revision() {
    let check: Check = |transition, _| {
        prop_assert_eq!(transition.after.rev, transition.before.rev + 1);
        Ok(())
    };
    assert_invariant(check, |record, edit, now, rules| {
        let before = record.clone();
        let after = step(record, edit, now, rules);
        if (Record { rev: before.rev, ..after.clone() }) == before { before } else { after }
    });
}

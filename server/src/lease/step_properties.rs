//! The rules' invariants over random histories, and for each a twin: the same check must find a counter-example when
//! the rule is broken.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};

use super::*;

const RULES: Rules = Rules { grace: Duration::from_millis(300), place: Duration::from_millis(900) };
const START: i64 = 1_000_000;
const IDS: u8 = 40;

/// A way of changing records: the specification, or a broken one.
type Step = fn(Record, &Edit, Timestamp, &Rules) -> Record;
/// Looks at one step of a history.
type Check = fn(&Moment<'_>, &mut Memory) -> Result<(), TestCaseError>;

/// One step of a history, as a check sees it.
struct Moment<'a> {
    before: &'a Record,
    edit: &'a Edit,
    now: Timestamp,
    after: &'a Record,
    step: Step,
}

/// What a check remembers of a history.
#[derive(Default)]
struct Memory {
    tokens: HashMap<LeaseId, FencingToken>,
    departed: HashSet<LeaseId>,
    highest: i64,
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

/// Mostly one of a few, so that commands meet; and enough others for a record to forget some.
fn ids() -> impl Strategy<Value = u8> {
    prop_oneof![4 => 0_u8..6, 1 => 0..IDS]
}

/// How far the clock goes, now and then backwards, and what happens then.
fn histories() -> impl Strategy<Value = Vec<(i64, Vec<Op>)>> {
    let passes = prop_oneof![6 => 0_i64..700, 1 => -400_i64..0, 1 => 700_i64..3000];
    prop::collection::vec((passes, prop::collection::vec(ops(), 0..4)), 1..25)
}

fn id(number: u8) -> LeaseId {
    LeaseId::from([number + 1; 16])
}

/// The edit of these commands. As wherever edits are made, an id that is asked for is not given up in the same one, and
/// nobody asks for it in two ways.
fn edit(ops: &[Op], record: &Record) -> Edit {
    let asked = |who: u8| ops.iter().any(|op| matches!(op, Op::Enqueue { id, .. } if *id == who));
    ops.iter().fold(Edit::default(), |edit, op| match *op {
        Op::Touch(who) => edit.touch(id(who)),
        Op::Release(who) | Op::GiveUp(who) | Op::KeepOut(who) | Op::Cancel(who) if asked(who) => edit,
        Op::Release(who) => edit.release(id(who)),
        Op::GiveUp(who) => edit.give_up(id(who)),
        Op::KeepOut(who) => edit.keep_out(id(who)),
        Op::Revoke(place) => edit.revoke(record.holders.get(place).map_or(id(IDS + 1), |holder| holder.id)),
        Op::Cancel(who) => edit.cancel(id(who)),
        Op::Enqueue { id: who, shared, ttl, min_hold, wait } => edit.enqueue(Arc::new(Acquisition {
            id: id(who),
            owner: String::new(),
            metadata: BTreeMap::new(),
            mode: if shared.is_some() { Mode::Shared } else { Mode::Exclusive },
            shared_limit: shared.unwrap_or(1),
            ttl: Ttl::new(Duration::from_millis(ttl)).expect("at least a millisecond"),
            min_hold: Duration::from_millis(min_hold),
            wait,
            repeated: false,
        })),
    })
}

/// Plays a history and lets `check` look at every step.
fn play(history: &[(i64, Vec<Op>)], step: Step, check: Check) -> Result<(), TestCaseError> {
    let mut record = Record::vacant(Key::try_from("key").expect("a key"));
    let mut memory = Memory { highest: START, ..Memory::default() };
    let mut now = START;
    for (passes, ops) in history {
        now += passes;
        memory.highest = memory.highest.max(now);
        let edit = edit(ops, &record);
        let after = step(record.clone(), &edit, Timestamp(now), &RULES);
        check(
            &Moment { before: &record, edit: &edit, now: Timestamp(now), after: &after, step },
            &mut memory,
        )?;
        record = after;
    }
    Ok(())
}

fn find_counter_example(cases: u32, step: Step, check: Check) -> Option<String> {
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    // Twins find theirs every time; the rules themselves face new histories in every run.
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

/// The rule holds, and the check notices when it is taken out.
fn holds(check: Check, broken: Step) {
    if let Some(counter_example) = find_counter_example(2000, super::step, check) {
        panic!("{counter_example}");
    }
    assert!(find_counter_example(4000, broken, check).is_some(), "the check does not notice a broken rule");
}

fn live(holder: &Holder, now: Timestamp) -> bool {
    now < holder.expires_at + RULES.grace
}

#[test]
fn tokens_strictly_increase_and_a_lease_has_one() {
    let check: Check = |moment, memory| {
        prop_assert!(moment.after.token >= moment.before.token);
        let mut last = moment.before.token;
        for holder in &moment.after.holders {
            match memory.tokens.get(&holder.id) {
                Some(token) => prop_assert_eq!(holder.token, *token, "a second token"),
                None => {
                    prop_assert!(holder.token > last, "{:?} after {:?}", holder.token, last);
                    last = holder.token;
                    memory.tokens.insert(holder.id, holder.token);
                }
            }
        }
        // An id whose departure is forgotten may come again, as a new acquisition.
        memory.tokens.retain(|id, _| moment.after.holders.iter().any(|holder| holder.id == *id));
        Ok(())
    };
    holds(check, |mut record, edit, now, rules| {
        record.token = FencingToken(0);
        step(record, edit, now, rules)
    });
}

#[test]
fn never_two_live_exclusive_holders_nor_one_beside_shared_ones() {
    let check: Check = |moment, _| {
        let live = moment.after.holders.iter().filter(|holder| live(holder, moment.now));
        let (exclusive, shared): (Vec<_>, Vec<_>) = live.partition(|holder| holder.mode == Mode::Exclusive);
        prop_assert!(exclusive.len() <= 1 && (exclusive.is_empty() || shared.is_empty()));
        Ok(())
    };
    holds(check, |mut record, edit, now, rules| {
        let holders = std::mem::take(&mut record.holders);
        let mut after = step(record, edit, now, rules);
        after.holders.extend(holders);
        after
    });
}

/// With a clock that steps back, a holder may look live again that was displaced in its time; so this is about the
/// instant of the displacement.
#[test]
fn nobody_is_displaced_before_its_time_and_grace_are_over() {
    let check: Check = |moment, _| {
        for holder in &moment.before.holders {
            let gone = !moment.after.holders.iter().any(|other| other.id == holder.id);
            let sent_away =
                moment.edit.released().contains(&holder.id) || moment.edit.revoked().contains(&holder.id);
            prop_assert!(!gone || sent_away || !live(holder, moment.now), "{:?}", holder);
        }
        Ok(())
    };
    holds(check, |record, edit, now, rules| {
        let early = Timestamp(now.0 + 50);
        step(record, edit, early, rules)
    });
}

#[test]
fn nobody_overtakes() {
    let check: Check = |moment, _| {
        let leaves =
            |id: &LeaseId| moment.edit.cancelled().contains(id) || moment.edit.released().contains(id);
        let in_line = |waiter: &&Waiter| moment.now < waiter.expires_at && !leaves(&waiter.acquisition.id);
        let mut still_waits = false;
        for waiter in moment.before.waiters.iter().filter(in_line) {
            let id = waiter.acquisition.id;
            let admitted = moment.after.holders.iter().any(|holder| holder.id == id);
            prop_assert!(!(admitted && still_waits), "{:?} came later", id);
            still_waits |= !admitted;
        }
        let known = |id| moment.before.holders.iter().any(|holder| holder.id == id);
        let waited = |id| moment.before.waiters.iter().any(|waiter| waiter.acquisition.id == id);
        let newcomer = moment.after.holders.iter().any(|holder| !known(holder.id) && !waited(holder.id));
        prop_assert!(!(newcomer && still_waits), "a newcomer was admitted past the line");
        Ok(())
    };
    holds(check, |mut record, edit, now, rules| {
        record.waiters.reverse();
        step(record, edit, now, rules)
    });
}

#[test]
fn applying_an_edit_again_at_once_gives_the_same_answers() {
    let check: Check = |moment, _| {
        let again = (moment.step)(moment.after.clone(), moment.edit, moment.now, &RULES);
        let (first, second) =
            [moment.after, &again].map(|record| Snapshot { record: record.clone(), now: moment.now }).into();
        // Whether an id is in use for something else may change when its place has lapsed.
        let before = Snapshot { record: moment.before.clone(), now: moment.now };
        let conflicts =
            |id| moment.edit.enqueued().iter().any(|asked| asked.id == id && before.conflicts(asked));
        for id in (0..=IDS + 1).map(id).filter(|id| moment.edit.names(*id) && !conflicts(*id)) {
            match (first.standing(id), second.standing(id)) {
                // Whoever tried in vain has left the line, and may have been all that kept the next one out; and who
                // comes in then takes the place of those whose time is over.
                (Standing::Waiter(_), Standing::Waiter(_) | Standing::Holder(_)) => {}
                (Standing::Holder(holder), Standing::Departed(Reason::Displaced))
                    if !live(holder, moment.now) => {}
                // That it was asked for twice is noted, and no answer.
                (Standing::Holder(first), Standing::Holder(second)) => {
                    prop_assert_eq!(first, &Holder { repeated: first.repeated, ..second.clone() });
                }
                (first, second) => prop_assert_eq!(first, second),
            }
        }
        Ok(())
    };
    holds(check, |mut record, edit, now, rules| {
        record.departures.clear();
        step(record, edit, now, rules)
    });
}

/// What a daemon does after an unknown outcome: the same edit some time later, whatever the clock did meanwhile.
#[test]
fn applying_an_edit_again_later_takes_no_answer_back() {
    let check: Check = |moment, _| {
        let later = moment.now + Duration::from_millis(250);
        let again = (moment.step)(moment.after.clone(), moment.edit, later, &RULES);
        let is_over = |record: &Record, id| record.departures.iter().any(|departure| departure.id == id);
        for id in moment.edit.released() {
            prop_assert!(is_over(moment.after, *id), "an id that was released is not settled");
            prop_assert!(is_over(&again, *id), "a release was taken back");
        }
        let touched =
            moment.edit.touched().iter().chain(moment.edit.enqueued().iter().map(|asked| &asked.id));
        for id in touched {
            let held =
                |record: &Record| record.holders.iter().any(|holder| holder.id == *id && live(holder, later));
            prop_assert!(!held(moment.after) || held(&again), "a grant or touch was taken back");
        }
        Ok(())
    };
    holds(check, |mut record, edit, now, rules| {
        let revoked = record.holders.iter().fold(edit.clone(), |edit, holder| edit.revoke(holder.id));
        record.rev += 1;
        step(record, &revoked, now, rules)
    });
}

#[test]
fn a_late_duplicate_makes_no_ghost() {
    let check: Check = |moment, memory| {
        for departure in &moment.before.departures {
            memory.departed.insert(departure.id);
        }
        memory.departed.retain(|id| moment.before.departures.iter().any(|departure| departure.id == *id));
        for id in &memory.departed {
            prop_assert!(!moment.after.holders.iter().any(|holder| holder.id == *id), "a ghost holds");
            prop_assert!(
                !moment.after.waiters.iter().any(|waiter| waiter.acquisition.id == *id),
                "a ghost waits"
            );
        }
        Ok(())
    };
    holds(check, |mut record, edit, now, rules| {
        let departures = std::mem::take(&mut record.departures);
        let mut after = step(record, edit, now, rules);
        after.departures.extend(departures);
        after
    });
}

#[test]
fn nothing_is_shortened_by_a_clock_that_steps_back() {
    let check: Check = |moment, _| {
        let (before, after) = (moment.before, moment.after);
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
    holds(check, |record, edit, now, rules| {
        let mut after = step(record, edit, now, rules);
        for holder in after.holders.iter_mut().filter(|holder| edit.touched().contains(&holder.id)) {
            holder.expires_at = now + holder.ttl.get();
        }
        after
    });
}

#[test]
fn an_id_stands_in_one_place_only() {
    let check: Check = |moment, _| {
        let holders = moment.after.holders.iter().map(|holder| holder.id);
        let waiters = moment.after.waiters.iter().map(|waiter| waiter.acquisition.id);
        let ids: Vec<LeaseId> = holders.chain(waiters).collect();
        let distinct: HashSet<LeaseId> = ids.iter().copied().collect();
        prop_assert_eq!(ids.len(), distinct.len());
        Ok(())
    };
    holds(check, |mut record, edit, now, rules| {
        let holders = std::mem::take(&mut record.holders);
        let mut after = step(record, edit, now, rules);
        after.holders.extend(holders);
        after
    });
}

#[test]
fn a_stale_id_changes_nothing_but_what_time_alone_does() {
    let check: Check = |moment, _| {
        let stranger = id(IDS + 1);
        let stale = Edit::default().touch(stranger).cancel(stranger).refresh(stranger).revoke(stranger);
        let after = |step: Step, edit: &Edit| step(moment.before.clone(), edit, moment.now, &RULES);
        let without = after(super::step, &Edit::default());
        prop_assert_eq!(&after(moment.step, &stale), &without);
        let with = after(moment.step, &stale.clone().release(stranger));
        prop_assert_eq!(
            Record { departures: without.departures.clone(), ..with },
            without,
            "but for what it remembers"
        );
        Ok(())
    };
    holds(check, |mut record, edit, now, rules| {
        if !edit.released().is_empty() {
            record.holders.clear();
        }
        step(record, edit, now, rules)
    });
}

#[test]
fn keeping_an_id_out_takes_nothing_from_anybody_and_leaves_none_that_may_come_yet() {
    let check: Check = |moment, _| {
        let all = (0..=IDS).map(id);
        let after = |step: Step, edit: &Edit| step(moment.before.clone(), edit, moment.now, &RULES);
        let without = after(super::step, &Edit::default());
        let with = after(moment.step, &all.clone().fold(Edit::default(), Edit::keep_out));
        prop_assert_eq!(
            &Record { departures: without.departures.clone(), ..with.clone() },
            &without,
            "but for what it remembers"
        );
        let before = Snapshot { record: moment.before.clone(), now: moment.now };
        let with = Snapshot { record: with, now: moment.now };
        for id in all.filter(|id| before.standing(*id) == Standing::Unknown) {
            prop_assert_eq!(with.standing(id), Standing::Departed(Reason::Settled));
        }
        Ok(())
    };
    holds(check, |record, edit, now, rules| {
        let released = edit.kept_out().iter().fold(edit.clone(), |edit, id| edit.give_up(*id));
        step(record, &released, now, rules)
    });
}

#[test]
fn every_edit_raises_the_revision() {
    let check: Check = |moment, _| {
        prop_assert_eq!(moment.after.rev, moment.before.rev + 1);
        Ok(())
    };
    holds(check, |record, edit, now, rules| {
        let before = record.clone();
        let after = step(record, edit, now, rules);
        if (Record { rev: before.rev, ..after.clone() }) == before { before } else { after }
    });
}

//! Properties of what keepalive streams report, over random sequences of commits, messages and
//! stale reads. Each mutant breaks an input on which a check of the streams relies, and must be
//! noticed.

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};
use tokio::runtime;

use super::model::{Action, LEASES, Mutant, STREAMS, Side, World};

fn actions() -> impl Strategy<Value = Action> {
    let side = || prop_oneof![Just(Side::Here), Just(Side::Elsewhere)];
    let limit = prop_oneof![1 => Just(None), 3 => (2_u32..5).prop_map(Some)];
    prop_oneof![
        4 => (1_u64..80).prop_map(Action::Pass),
        1 => (80_u64..1500).prop_map(Action::Pass),
        1 => (1_u64..1500).prop_map(Action::Suspend),
        8 => (0..STREAMS, 0..LEASES).prop_map(|(stream, lease)| Action::Name(stream, lease)),
        4 => (0..STREAMS, 0..LEASES).prop_map(|(stream, lease)| Action::Coalesce(stream, lease)),
        2 => (0..STREAMS).prop_map(Action::All),
        3 => (side(), 0..LEASES, limit, 200_u64..3000).prop_map(|(side, id, limit, ttl)| Action::Acquire(side, id, limit, ttl)),
        1 => (side(), 0..LEASES).prop_map(|(side, lease)| Action::Touch(side, lease)),
        1 => (side(), 0..LEASES).prop_map(|(side, lease)| Action::Release(side, lease)),
        1 => (side(), 0_usize..3).prop_map(|(side, slot)| Action::Revoke(side, slot)),
        4 => Just(Action::Send),
        4 => Just(Action::Reach),
        1 => Just(Action::Reread),
        4 => Just(Action::Return),
        4 => Just(Action::Read),
        4 => (0_usize..8).prop_map(Action::Receive),
        5 => (0..STREAMS).prop_map(Action::Answer),
        3 => (0..STREAMS).prop_map(Action::Report),
        6 => Just(Action::Commit),
        8 => (0..STREAMS, 0..LEASES).prop_map(|(stream, lease)| Action::Exchange(stream, lease)),
    ]
}

fn play(history: &[Action], mutant: Mutant) -> Result<(), TestCaseError> {
    let runtime = runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.expect("a runtime").block_on(async {
        let mut world = World::new(mutant);
        for action in history {
            world.perform(*action).await?;
        }
        world.end()
    })
}

fn find_counter_example(cases: u32, mutant: Mutant) -> Option<String> {
    // A mutant gets the same histories in every run, which are known to expose it. The correct
    // model gets new ones.
    let is_correct = mutant == Mutant::None;
    let max_shrink_iters = if is_correct { 2000 } else { 0 };
    let config = Config { cases, failure_persistence: None, max_shrink_iters, ..Config::default() };
    let mut runner = if is_correct {
        TestRunner::new(config)
    } else {
        TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]))
    };
    let found = runner.run(&prop::collection::vec(actions(), 1..80), |history| play(&history, mutant));
    match found {
        Ok(()) => None,
        Err(TestError::Fail(reason, history)) => Some(format!("{reason}\n{history:#?}")),
        Err(TestError::Abort(reason)) => panic!("{reason}"),
    }
}

#[test]
fn each_loss_is_reported_once_and_a_coalesced_answer_never_promises_too_much() {
    if let Some(found) = find_counter_example(500, Mutant::None) {
        panic!("{found}");
    }
}

#[test]
fn a_stale_record_that_looks_new_would_be_noticed() {
    assert!(find_counter_example(5000, Mutant::StaleLooksNew).is_some());
}

#[test]
fn a_touch_whose_age_counts_from_its_answer_would_be_noticed() {
    assert!(find_counter_example(5000, Mutant::AgeFromAnswer).is_some());
}

#[test]
fn a_clock_that_stops_during_a_suspension_would_be_noticed() {
    assert!(find_counter_example(5000, Mutant::ClockStopsInSuspension).is_some());
}

/// Two histories that chance finds rarely. In both, a remote read shows a loss before an older
/// commit returns.
#[test]
fn a_commit_that_returns_late_does_not_hide_a_loss() {
    let held_elsewhere =
        [Action::Acquire(Side::Elsewhere, 0, Some(2), 1000), Action::Exchange(0, 0), Action::Pass(200)];
    let loss_received = [Action::Release(Side::Elsewhere, 0), Action::Read, Action::Receive(0)];
    let named_again = [Action::Return, Action::Answer(0), Action::Name(0, 0), Action::Answer(0)];

    let first_commit = [held_elsewhere[0], Action::Name(0, 0), Action::Send, Action::Reach];
    let history = [&first_commit[..], &loss_received, &named_again].concat();
    play(&history, Mutant::None).expect("the loss is reported");
    play(&history, Mutant::IgnoresRemoteReads).expect_err("ignored remote reads would be noticed");

    let touch = [Action::Touch(Side::Here, 0), Action::Send, Action::Reach];
    let named_later = [Action::Report(0), Action::Pass(1), Action::Name(0, 0)];
    play(&[&held_elsewhere[..], &touch, &loss_received, &named_later, &named_again].concat(), Mutant::None)
        .expect("the loss is reported");
}

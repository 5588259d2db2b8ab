//! What keepalive streams are told, over random interleavings of commits, of records that others left, however stale,
//! and of messages; and twins whose inputs lack what a guard relies on, which must be noticed.

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};
use tokio::runtime;

use super::model::{LEASES, Op, STREAMS, Side, Twin, World};

fn ops() -> impl Strategy<Value = Op> {
    let side = || prop_oneof![Just(Side::Here), Just(Side::Elsewhere)];
    let limit = prop_oneof![1 => Just(None), 3 => (2_u32..5).prop_map(Some)];
    prop_oneof![
        4 => (1_u64..80).prop_map(Op::Pass),
        1 => (80_u64..1500).prop_map(Op::Pass),
        1 => (1_u64..1500).prop_map(Op::Suspend),
        8 => (0..STREAMS, 0..LEASES).prop_map(|(stream, lease)| Op::Name(stream, lease)),
        2 => (0..STREAMS).prop_map(Op::All),
        3 => (side(), 0..LEASES, limit, 200_u64..3000).prop_map(|(side, id, limit, ttl)| Op::Acquire(side, id, limit, ttl)),
        1 => (side(), 0..LEASES).prop_map(|(side, lease)| Op::Touch(side, lease)),
        1 => (side(), 0..LEASES).prop_map(|(side, lease)| Op::Release(side, lease)),
        1 => (side(), 0_usize..3).prop_map(|(side, place)| Op::Revoke(side, place)),
        4 => Just(Op::Send),
        4 => Just(Op::Reach),
        1 => Just(Op::Reread),
        4 => Just(Op::Land),
        4 => Just(Op::Read),
        4 => (0_usize..8).prop_map(Op::Hear),
        5 => (0..STREAMS).prop_map(Op::Answer),
        3 => (0..STREAMS).prop_map(Op::Tell),
        6 => Just(Op::Commit),
        8 => (0..STREAMS, 0..LEASES).prop_map(|(stream, lease)| Op::Talk(stream, lease)),
    ]
}

fn play(history: &[Op], twin: Twin) -> Result<(), TestCaseError> {
    let runtime = runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.expect("a runtime").block_on(async {
        let mut world = World::new(twin);
        for op in history {
            world.take(*op).await?;
        }
        world.end()
    })
}

fn find_counter_example(cases: u32, twin: Twin) -> Option<String> {
    // Twins find theirs every time, and that is all; what is right faces new histories in every run.
    let is_right = twin == Twin::Right;
    let max_shrink_iters = if is_right { 2000 } else { 0 };
    let config = Config { cases, failure_persistence: None, max_shrink_iters, ..Config::default() };
    let mut runner = if is_right {
        TestRunner::new(config)
    } else {
        TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]))
    };
    let found = runner.run(&prop::collection::vec(ops(), 1..80), |history| play(&history, twin));
    match found {
        Ok(()) => None,
        Err(TestError::Fail(reason, history)) => Some(format!("{reason}\n{history:#?}")),
        Err(TestError::Abort(reason)) => panic!("{reason}"),
    }
}

#[test]
fn losses_are_told_once_and_truly_and_memory_never_promises_too_much() {
    if let Some(found) = find_counter_example(500, Twin::Right) {
        panic!("{found}");
    }
}

#[test]
fn a_stale_record_that_looks_new_would_be_noticed() {
    assert!(find_counter_example(5000, Twin::StaleLooksNew).is_some());
}

#[test]
fn an_age_that_counts_from_the_answer_would_be_noticed() {
    assert!(find_counter_example(5000, Twin::AgeFromReceipt).is_some());
}

#[test]
fn a_clock_that_stands_still_during_a_suspension_would_be_noticed() {
    assert!(find_counter_example(5000, Twin::Asleep).is_some());
}

/// Two that chance seldom finds: what others did is heard of before a commit returns that is older.
#[test]
fn a_commit_that_returns_late_does_not_hide_a_loss() {
    let held_elsewhere = [Op::Acquire(Side::Elsewhere, 0, Some(2), 1000), Op::Talk(0, 0), Op::Pass(200)];
    let heard_of = [Op::Release(Side::Elsewhere, 0), Op::Read, Op::Hear(0)];
    let asked_again = [Op::Land, Op::Answer(0), Op::Name(0, 0), Op::Answer(0)];

    let first_commit = [held_elsewhere[0], Op::Name(0, 0), Op::Send, Op::Reach];
    let history = [&first_commit[..], &heard_of, &asked_again].concat();
    play(&history, Twin::Right).expect("a loss told");
    play(&history, Twin::Deaf).expect_err("memory that does not hear of others would be noticed");

    let touch = [Op::Touch(Side::Here, 0), Op::Send, Op::Reach];
    let named_anew = [Op::Tell(0), Op::Pass(1), Op::Name(0, 0)];
    play(&[&held_elsewhere[..], &touch, &heard_of, &named_anew, &asked_again].concat(), Twin::Right)
        .expect("a loss told");
}

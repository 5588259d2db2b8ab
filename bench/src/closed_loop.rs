//! Closed loops: every caller begins its next turn when the last one ends, so the contender's speed
//! determines the rate.

use std::time::Duration;

use anyhow::Result;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::connection::Turn;
use crate::cpu::{Cpu, Processes};
use crate::sample::Sample;
use crate::tally::Shared;

/// How long the last turns of callers may take. A turn that is cut off may leave its key held.
const LAST_TURN: Duration = Duration::from_secs(10);
/// How long a caller waits after a failure, so that refusals do not make it call without pause.
const AFTER_FAILURE: Duration = Duration::from_millis(10);

/// Runs all callers for up to a second to warm up, and then counts for `time`.
pub(crate) async fn run<T: Turn>(
    callers: Vec<T>,
    time: Duration,
    processes: &Processes,
    rate: &'static str,
) -> Result<Sample> {
    let start = Instant::now() + (time / 2).min(Duration::from_secs(1));
    let end = start + time;
    let tally = Shared::new(start, end);
    let mut running = JoinSet::new();
    for mut caller in callers {
        let tally = tally.clone();
        running.spawn(async move {
            loop {
                let begun = Instant::now();
                if begun >= end {
                    return;
                }
                let turn = caller.turn().await;
                if !tally.add(begun, turn) {
                    sleep(AFTER_FAILURE).await;
                }
            }
        });
    }
    sleep_until(start).await;
    let cpu = Cpu::now(processes);
    sleep_until(end).await;
    let spent = cpu.spent();
    // Turns that take longer are cut off. They would end after the measured span, and not count.
    let _ = timeout(LAST_TURN, async { while running.join_next().await.is_some() {} }).await;
    Ok(tally.sample(rate)?.spending(&spent, time))
}

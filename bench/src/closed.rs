//! Closed loops: every caller begins its next turn when the last is over, so the rate is what the contender makes of it.

use std::time::Duration;

use anyhow::Result;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::cpu::{Cpu, Processes};
use crate::peer::Turn;
use crate::sample::Sample;
use crate::tally::Shared;

/// How long callers may take over their last turn: one that is cut off could leave its key taken.
const LAST_TURN: Duration = Duration::from_secs(10);
/// What a caller waits after a failure, so that one who is refused does not call in vain without end.
const AFTER_FAILURE: Duration = Duration::from_millis(10);

/// Runs all callers for a while uncounted, and then for `time`.
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
    // Those who take longer are cut off; nothing of theirs was counted.
    drop(timeout(LAST_TURN, async { while running.join_next().await.is_some() {} }).await);
    Ok(tally.sample(rate)?.spending(&spent, time))
}

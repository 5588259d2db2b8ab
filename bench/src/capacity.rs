//! The largest number of leases that are kept alive, as their holders see it.

use std::time::Duration;

use anyhow::{Result, bail};
use tokio::time::{Instant, sleep, timeout};

use crate::connection::Connection;
use crate::open_loop::OpenLoop;
use crate::sample::Sample;
use crate::search::Search;
use crate::trial::Trial;

/// The number with which the search begins.
const FIRST: usize = 10_000;
/// The largest number that is tried, because the load generator has a limit too.
const MOST: usize = 1_280_000;
/// The leases of a stream.
const LEASES_PER_STREAM: usize = 1000;

pub(crate) async fn run<P: Connection>(trial: &Trial<'_>) -> Result<Sample> {
    let ttl = Duration::from_secs(u64::try_from(trial.scale)?);
    // Earlier than the limit of the trial, so that the search ends with a result.
    let give_up = Instant::now() + 50 * trial.time;
    let mut load = OpenLoop::<P>::new(trial.deployment.address()?, ttl, LEASES_PER_STREAM).await?;
    let mut search = Search::new(FIRST, MOST);
    let mut best = None;
    while let Some(count) = search.next() {
        if Instant::now() > give_up {
            break;
        }
        let sample = hold(&mut load, count, trial).await?;
        search.note(count, sample.is_some());
        if search.found() == count {
            best = sample;
        }
    }
    let Some(mut sample) = best else { bail!("not even {} are kept", search.next().unwrap_or(FIRST)) };
    #[expect(clippy::cast_precision_loss, reason = "a number of leases is far below 2^52")]
    sample.note("leases", search.found() as f64);
    Ok(sample)
}

/// Keeps `count` leases alive for a while, and measures. Returns `None` if more than 1 % are lost.
async fn hold<P: Connection>(
    load: &mut OpenLoop<P>,
    count: usize,
    trial: &Trial<'_>,
) -> Result<Option<Sample>> {
    if load.len() > count {
        // The first call closes streams that have lost leases. The second closes streams that have
        // not caught up meanwhile.
        load.shrink(count);
        sleep(load.interval()).await;
        load.shrink(count);
    }
    let patience = 12 * trial.time;
    if !matches!(timeout(patience, load.grow(count)).await, Ok(Ok(()))) {
        return Ok(None);
    }
    sleep(load.interval()).await;
    // Every lease is due at least three times meanwhile.
    let (mut sample, lost) = load.measure(load.interval() * 4, &trial.deployment.processes()).await?;
    #[expect(clippy::cast_precision_loss, reason = "a number of leases is far below 2^52")]
    sample.note("lost %", 100.0 * lost as f64 / count as f64);
    Ok((lost * 100 <= count).then_some(sample))
}

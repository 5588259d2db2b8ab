//! The largest number of leases that are kept alive, in the eyes of their holders.

use std::time::Duration;

use anyhow::{Result, bail};
use tokio::time::{Instant, sleep, timeout};

use crate::crowd::Crowd;
use crate::peer::Peer;
use crate::sample::Sample;
use crate::search::Search;
use crate::trial::Trial;

/// With so many the search begins.
const FIRST: usize = 10_000;
/// None is larger: the load generator has its limits, too.
const MOST: usize = 1_280_000;
/// Leases of a stream.
const A_STREAM: usize = 1000;

pub(crate) async fn run<P: Peer>(trial: &Trial<'_>) -> Result<Sample> {
    let ttl = Duration::from_secs(u64::try_from(trial.scale)?);
    // The search is to end before the trial's time is over.
    let give_up = Instant::now() + 50 * trial.time;
    let mut crowd = Crowd::<P>::new(trial.stage.address()?, ttl, A_STREAM).await?;
    let mut search = Search::new(FIRST, MOST);
    let mut best = None;
    while let Some(count) = search.next() {
        if Instant::now() > give_up {
            break;
        }
        let sample = hold(&mut crowd, count, trial).await?;
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

/// Has so many leases for a while; nothing if more than one in a hundred is lost.
async fn hold<P: Peer>(crowd: &mut Crowd<P>, count: usize, trial: &Trial<'_>) -> Result<Option<Sample>> {
    if crowd.len() > count {
        // What is behind catches up; what does not goes.
        crowd.shrink(count);
        sleep(crowd.interval()).await;
        crowd.shrink(count);
    }
    let patience = 12 * trial.time;
    if !matches!(timeout(patience, crowd.grow(count)).await, Ok(Ok(()))) {
        return Ok(None);
    }
    sleep(crowd.interval()).await;
    // Every lease is due three times and more.
    let (mut sample, lost) = crowd.watch(crowd.interval() * 4, &trial.stage.processes()).await?;
    #[expect(clippy::cast_precision_loss, reason = "a number of leases is far below 2^52")]
    sample.note("lost %", 100.0 * lost as f64 / count as f64);
    Ok((lost * 100 <= count).then_some(sample))
}

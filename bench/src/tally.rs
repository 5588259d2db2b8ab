//! Counts what callers do in a span of time: how much, how long each turn takes, and what fails.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Error, Result, ensure};
use hdrhistogram::Histogram;
use tokio::time::Instant;

use crate::lock::lock;
use crate::sample::Sample;

/// A histogram of latencies.
#[derive(Debug)]
pub(crate) struct Latencies(Histogram<u64>);

impl Latencies {
    pub(crate) fn new() -> Self {
        Self(Histogram::new_with_bounds(1, 3_600_000_000, 3).expect("microseconds up to an hour"))
    }

    pub(crate) fn add(&mut self, latency: Duration) {
        self.0.saturating_record(u64::try_from(latency.as_micros()).unwrap_or(u64::MAX));
    }

    pub(crate) fn len(&self) -> u64 {
        self.0.len()
    }

    /// Notes the median, the 90th and 99th percentiles and the maximum, in milliseconds.
    pub(crate) fn note(&self, sample: &mut Sample) {
        for (name, quantile) in [("p50 ms", 0.5), ("p90 ms", 0.9), ("p99 ms", 0.99), ("max ms", 1.0)] {
            let micros = Duration::from_micros(self.0.value_at_quantile(quantile));
            sample.note(name, micros.as_secs_f64() * 1000.0);
        }
    }
}

/// The turns of all callers that ended within a span of time.
#[derive(Debug)]
pub(crate) struct Tally {
    from: Instant,
    to: Instant,
    done: u64,
    latencies: Latencies,
    errors: u64,
    first_error: Option<Error>,
}

impl Tally {
    fn new(from: Instant, to: Instant) -> Self {
        Self { from, to, done: 0, latencies: Latencies::new(), errors: 0, first_error: None }
    }
}

/// The tally that all callers share. A histogram for each of 10,000 callers would fill the memory,
/// and sharing costs little on one thread.
#[derive(Debug, Clone)]
pub(crate) struct Shared(Arc<Mutex<Tally>>);

impl Shared {
    pub(crate) fn new(from: Instant, to: Instant) -> Self {
        Self(Arc::new(Mutex::new(Tally::new(from, to))))
    }

    /// Clears the tally, and counts another span.
    pub(crate) fn restart(&self, from: Instant, to: Instant) {
        *self.lock() = Tally::new(from, to);
    }

    fn lock(&self) -> MutexGuard<'_, Tally> {
        lock(&self.0)
    }

    /// Counts a turn that was due at `due` and has ended now, if now is within the span. Returns
    /// whether the turn succeeded.
    pub(crate) fn add(&self, due: Instant, turn: Result<u64>) -> bool {
        let now = Instant::now();
        let mut tally = self.lock();
        let counts = tally.from <= now && now < tally.to;
        match turn {
            Ok(done) if counts => {
                tally.done += done;
                tally.latencies.add(now - due);
                true
            }
            Ok(_) => true,
            // A failure before the span counts too: it may be the reason why nothing follows.
            Err(error) => {
                tally.errors += 1;
                tally.first_error.get_or_insert(error);
                false
            }
        }
    }

    /// Returns the rate and the latencies.
    ///
    /// # Errors
    /// If nothing was done. The error is the first one of a caller, if there is one.
    pub(crate) fn sample(&self, rate: &'static str) -> Result<Sample> {
        let mut tally = self.lock();
        if tally.done == 0 {
            return Err(tally.first_error.take().unwrap_or_else(|| Error::msg("nothing was done in time")));
        }
        ensure!(tally.to > tally.from, "no time to measure in");
        let mut sample = Sample::default();
        #[expect(clippy::cast_precision_loss, reason = "a count of turns is far below 2^52")]
        sample.note(rate, tally.done as f64 / (tally.to - tally.from).as_secs_f64());
        tally.latencies.note(&mut sample);
        sample.errors = tally.errors;
        sample.error = tally.first_error.take().map(|error| format!("{error:#}"));
        Ok(sample)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_turns_that_end_within_the_span_count() {
        let start = Instant::now();
        let [from, to] = [1, 3].map(|second| start + Duration::from_secs(second));
        let tally = Shared::new(from, to);
        for second in 0..4 {
            tokio::time::advance(Duration::from_millis(500)).await;
            assert!(tally.add(Instant::now(), Ok(10)), "{second}");
            tokio::time::advance(Duration::from_millis(500)).await;
        }
        assert!(!tally.add(start, Err(Error::msg("cut"))));
        let sample = tally.sample("things/s").expect("a sample");
        assert_eq!(sample.figure("things/s"), Some(10.0));
        assert_eq!((sample.errors, sample.error.as_deref()), (1, Some("cut")));
    }

    #[tokio::test(start_paused = true)]
    async fn an_empty_tally_returns_the_first_error() {
        let start = Instant::now();
        let tally = Shared::new(start, start + Duration::from_secs(1));
        tally.add(start, Err(Error::msg("refused")));
        tally.add(start, Err(Error::msg("cut")));
        assert_eq!(tally.sample("things/s").expect_err("nothing").to_string(), "refused");
    }
}

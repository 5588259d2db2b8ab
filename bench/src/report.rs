//! What was measured: pairs, their latencies, the processors' shares; medians and ranges.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, ensure};
use hdrhistogram::Histogram;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::pairs::{Contender, Round};

/// One round's pairs.
#[derive(Debug)]
pub(crate) struct Pairs {
    latencies: Latencies,
    time: Duration,
}

impl Pairs {
    pub(crate) fn new() -> Self {
        Self { latencies: Latencies::new(), time: Duration::ZERO }
    }

    /// Counts a pair that took `latency`.
    pub(crate) fn add(&mut self, latency: Duration) {
        self.latencies.add(latency);
    }

    /// The pairs of all callers since `start`.
    pub(crate) async fn join(mut callers: JoinSet<Result<Self>>, start: Instant) -> Result<Self> {
        let mut all = Self::new();
        while let Some(pairs) = callers.join_next().await {
            all.latencies.0.add(pairs??.latencies.0)?;
        }
        all.time = start.elapsed();
        ensure!(!all.latencies.0.is_empty(), "not one pair was done");
        Ok(all)
    }

    #[expect(clippy::cast_precision_loss, reason = "a count of pairs is far below 2^52")]
    fn rate(&self) -> f64 {
        self.latencies.0.len() as f64 / self.time.as_secs_f64()
    }
}

/// How long something took, many times.
#[derive(Debug)]
pub(crate) struct Latencies(Histogram<u64>);

impl Latencies {
    pub(crate) fn new() -> Self {
        Self(Histogram::new_with_bounds(1, 3_600_000_000, 3).expect("microseconds up to an hour"))
    }

    pub(crate) fn add(&mut self, latency: Duration) {
        self.0.saturating_record(u64::try_from(latency.as_micros()).unwrap_or(u64::MAX));
    }

    pub(crate) fn at(&self, quantile: f64) -> Duration {
        Duration::from_micros(self.0.value_at_quantile(quantile))
    }

    pub(crate) fn print(&self, what: &str) {
        let [p50, p90, p99, max] = [0.5, 0.9, 0.99, 1.0].map(|quantile| self.at(quantile));
        println!(
            "{what:<34}  {} times  p50 {p50:>9.2?}  p90 {p90:>9.2?}  p99 {p99:>9.2?}  max {max:>9.2?}",
            self.0.len()
        );
    }
}

/// All rounds.
#[derive(Debug, Default)]
pub(crate) struct Report {
    rates: BTreeMap<Contender, Vec<f64>>,
}

impl Report {
    /// Notes and prints a round.
    pub(crate) fn add(&mut self, who: Contender, round: u64, pairs: &Pairs, cpu: &[(&str, Duration)]) {
        let rate = pairs.rate();
        let [p50, p99] = [0.5, 0.99].map(|quantile| pairs.latencies.at(quantile));
        let cpu: Vec<String> = cpu
            .iter()
            .map(|(name, spent)| {
                format!("{name} {:.0} %", 100.0 * spent.as_secs_f64() / pairs.time.as_secs_f64())
            })
            .collect();
        println!(
            "round {round}  {:<10} {rate:>8.0} pairs/s  p50 {p50:>9.2?}  p99 {p99:>9.2?}  cpu: {}",
            format!("{who:?}"),
            cpu.join(", ")
        );
        self.rates.entry(who).or_default().push(rate);
    }

    /// Prints the medians and their ratio.
    pub(crate) fn print(mut self, round: Round) {
        println!("\n{} callers, {:?} a round; median (least .. most) pairs/s", round.callers, round.time);
        let medians: Vec<(Contender, f64)> = self
            .rates
            .iter_mut()
            .map(|(who, rates)| {
                rates.sort_by(f64::total_cmp);
                let median = rates[rates.len() / 2];
                println!(
                    "  {:<10} {median:>8.0} ({:.0} .. {:.0})",
                    format!("{who:?}"),
                    rates[0],
                    rates[rates.len() - 1]
                );
                (*who, median)
            })
            .collect();
        let of_leased = |who| matches!(who, Contender::Embedded | Contender::Mongodb);
        for (leased, fast) in medians.iter().filter(|(who, _)| of_leased(*who)) {
            for (other, slow) in medians.iter().filter(|(who, _)| !of_leased(*who)) {
                println!("  {leased:?} / {other:?}: {:.2}", fast / slow);
            }
        }
    }
}

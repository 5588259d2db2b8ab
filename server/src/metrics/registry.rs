//! The metrics registry of one daemon. Each metric is registered once, and the code that counts
//! keeps a handle to it.
//!
//! There is no global registry, because several daemons run in one test process. Hence
//! `prometheus-client`, whose registry is a value.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet, prometheus_text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::{MetricType, TypedMetric};
use prometheus_client::registry::{Metric, Registry};

/// The name of a label and one of its values. Values are constants and never come from a caller, so
/// the number of series is fixed at start.
pub(crate) type Label = (&'static str, &'static str);

/// The metrics of a daemon.
#[derive(Debug, Default)]
pub(crate) struct MetricsRegistry(Registry);

impl MetricsRegistry {
    /// The content type of [`MetricsRegistry::text`].
    pub(crate) const CONTENT_TYPE: &str = prometheus_text::CONTENT_TYPE;

    /// Registers `metric`. The text format adds `_total` to the name of a counter.
    pub(crate) fn metric<M: Metric + Clone>(&mut self, name: &str, help: &str, metric: M) -> M {
        self.0.register(name, help, metric.clone());
        metric
    }

    /// Registers a counter.
    pub(crate) fn counter(&mut self, name: &str, help: &str) -> Counter {
        self.metric(name, help, Counter::default())
    }

    /// Registers a gauge.
    pub(crate) fn gauge(&mut self, name: &str, help: &str) -> Gauge {
        self.metric(name, help, Gauge::default())
    }

    /// Registers a metric for each set of labels, and returns the metrics in the same rows and
    /// columns. All sets have the same label names.
    pub(crate) fn by_labels<const R: usize, const C: usize, const N: usize, M>(
        &mut self,
        (name, help): (&str, &str),
        labels: [[[Label; N]; C]; R],
        make: fn() -> M,
    ) -> [[M; C]; R]
    where
        M: Metric + TypedMetric + Clone,
    {
        let family = Family::<[Label; N], M, fn() -> M>::new_with_constructor(make);
        let metrics = labels.map(|row| row.map(|labels| family.get_or_create_owned(&labels)));
        self.0.register(name, help, family);
        metrics
    }

    /// Registers a metric for each value of one label.
    pub(crate) fn by_label<const C: usize, M: Metric + TypedMetric + Clone>(
        &mut self,
        about: (&str, &str),
        label: &'static str,
        values: [&'static str; C],
        make: fn() -> M,
    ) -> [M; C] {
        let [row] = self.by_labels(about, [values.map(|value| [(label, value)])], make);
        row
    }

    /// Registers a collector, which reads its values at each scrape.
    pub(crate) fn collect(&mut self, collector: impl Collector) {
        self.0.register_collector(Box::new(collector));
    }

    /// Returns all metrics with their present values, in Prometheus' text format.
    ///
    /// # Errors
    /// If a metric cannot be encoded.
    pub(crate) fn text(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        prometheus_text::encode(&mut text, &self.0)?;
        Ok(text)
    }
}

/// A histogram. An observation is two relaxed additions, while the histogram of `prometheus-client`
/// takes a lock for each observation.
#[derive(Debug, Clone)]
pub(crate) struct Histogram(Arc<Buckets>);

#[derive(Debug)]
struct Buckets {
    /// The upper bounds of the buckets in rising order, in the unit of observations.
    bounds: &'static [u64],
    /// How many units of observations make one unit shown.
    scale: f64,
    /// The observations in each bucket. The last bucket has no bound.
    counts: Box<[AtomicU64]>,
    sum: AtomicU64,
}

impl Histogram {
    /// Returns a histogram of numbers.
    pub(crate) fn of_counts(bounds: &'static [u64]) -> Self {
        Self::new(bounds, 1.0)
    }

    /// Returns a histogram of durations. The bounds are in microseconds, and the metric is shown in
    /// seconds.
    pub(crate) fn of_durations(bounds: &'static [u64]) -> Self {
        Self::new(bounds, 1e6)
    }

    fn new(bounds: &'static [u64], scale: f64) -> Self {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self(Arc::new(Buckets { bounds, scale, counts, sum: AtomicU64::new(0) }))
    }

    /// Observes a duration, in a histogram of durations.
    pub(crate) fn observe_duration(&self, duration: Duration) {
        self.observe(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX));
    }

    /// Observes a number, in a histogram of numbers.
    pub(crate) fn observe_count(&self, count: usize) {
        self.observe(u64::try_from(count).unwrap_or(u64::MAX));
    }

    fn observe(&self, value: u64) {
        let bucket = self.0.bounds.partition_point(|bound| *bound < value);
        self.0.counts[bucket].fetch_add(1, Ordering::Relaxed);
        self.0.sum.fetch_add(value, Ordering::Relaxed);
    }
}

impl EncodeMetric for Histogram {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let Buckets { bounds, scale, counts, sum } = &*self.0;
        let bounds = bounds.iter().map(|bound| *bound as f64 / scale).chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> =
            bounds.zip(counts.iter().map(|count| count.load(Ordering::Relaxed))).collect();
        // Counted from the buckets that were read, so that it agrees with them even if other threads
        // observe meanwhile.
        let count = buckets.iter().map(|(_, count)| count).sum();
        let sum = sum.load(Ordering::Relaxed) as f64 / scale;
        encoder.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

impl TypedMetric for Histogram {
    const TYPE: MetricType = MetricType::Histogram;
}

/// Adds one to a gauge until it is dropped.
#[derive(Debug)]
pub(crate) struct GaugeGuard(Gauge);

impl GaugeGuard {
    pub(crate) fn one_more(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for GaugeGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_belongs_to_its_bucket_and_a_value_above_all_bounds_to_the_last() {
        let mut registry = MetricsRegistry::default();
        let [took] = registry.by_label(("took_seconds", "How long it took"), "who", ["me"], || {
            Histogram::of_durations(&[1_000, 2_500_000])
        });
        for millis in [0, 1, 2, 2500, 2501] {
            took.observe_duration(Duration::from_millis(millis));
        }
        let expected = r#"# HELP took_seconds How long it took.
# TYPE took_seconds histogram
took_seconds_bucket{who="me",le="0.001"} 2
took_seconds_bucket{who="me",le="2.5"} 4
took_seconds_bucket{who="me",le="+Inf"} 5
took_seconds_sum{who="me"} 5.004
took_seconds_count{who="me"} 5
"#;
        assert_eq!(registry.text().expect("text"), expected);
    }
}

//! The metrics registry of one daemon. Each metric is registered once; the code that counts keeps a handle to it.

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

/// A label's name and one of its values. None of them comes from a caller, so there are never more series than at start.
pub(crate) type Label = (&'static str, &'static str);

/// A daemon's metrics.
#[derive(Debug, Default)]
pub(crate) struct Meter(Registry);

impl Meter {
    /// The content type of [`Meter::text`].
    pub(crate) const CONTENT_TYPE: &str = prometheus_text::CONTENT_TYPE;

    /// Registers `metric`. `_total` is added to the name of a counter.
    pub(crate) fn metric<M: Metric + Clone>(&mut self, name: &str, help: &str, metric: M) -> M {
        self.0.register(name, help, metric.clone());
        metric
    }

    /// A counter.
    pub(crate) fn counter(&mut self, name: &str, help: &str) -> Counter {
        self.metric(name, help, Counter::default())
    }

    /// A gauge.
    pub(crate) fn gauge(&mut self, name: &str, help: &str) -> Gauge {
        self.metric(name, help, Gauge::default())
    }

    /// A metric for each of these sets of labels, in rows and columns; all sets have the same names.
    pub(crate) fn table<const R: usize, const C: usize, const N: usize, M>(
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

    /// A metric for each value of one label.
    pub(crate) fn by<const C: usize, M: Metric + TypedMetric + Clone>(
        &mut self,
        about: (&str, &str),
        label: &'static str,
        values: [&'static str; C],
        make: fn() -> M,
    ) -> [M; C] {
        let [row] = self.table(about, [values.map(|value| [(label, value)])], make);
        row
    }

    /// What is known only when it is asked for.
    pub(crate) fn ask(&mut self, collector: impl Collector) {
        self.0.register_collector(Box::new(collector));
    }

    /// All metrics as they are now, in Prometheus' text format.
    ///
    /// # Errors
    /// If one of them cannot be written down.
    pub(crate) fn text(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        prometheus_text::encode(&mut text, &self.0)?;
        Ok(text)
    }
}

/// How often something took how much. Observing is two relaxed additions and takes no lock.
#[derive(Debug, Clone)]
pub(crate) struct Histogram(Arc<Buckets>);

#[derive(Debug)]
struct Buckets {
    /// In units of the observations, rising.
    bounds: &'static [u64],
    /// How many observations are one of the unit that is shown.
    scale: f64,
    /// One more than there are bounds.
    counts: Box<[AtomicU64]>,
    sum: AtomicU64,
}

impl Histogram {
    /// Counts of things.
    pub(crate) fn of_counts(bounds: &'static [u64]) -> Self {
        Self::new(bounds, 1.0)
    }

    /// Durations, shown in seconds; the bounds are in microseconds.
    pub(crate) fn of_durations(bounds: &'static [u64]) -> Self {
        Self::new(bounds, 1e6)
    }

    fn new(bounds: &'static [u64], scale: f64) -> Self {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self(Arc::new(Buckets { bounds, scale, counts, sum: AtomicU64::new(0) }))
    }

    /// For histograms of durations.
    pub(crate) fn took(&self, duration: Duration) {
        self.observe(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX));
    }

    /// For histograms of counts.
    pub(crate) fn counted(&self, count: usize) {
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
        // Read once, so that the last bucket and the count are the same whatever is observed meanwhile.
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

/// One more of a gauge for as long as this lives.
#[derive(Debug)]
pub(crate) struct Present(Gauge);

impl Present {
    pub(crate) fn of(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Present {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_belongs_to_its_bucket_and_what_is_larger_than_all_to_the_last() {
        let mut meter = Meter::default();
        let [took] = meter.by(("took_seconds", "How long it took"), "who", ["me"], || {
            Histogram::of_durations(&[1_000, 2_500_000])
        });
        for millis in [0, 1, 2, 2500, 2501] {
            took.took(Duration::from_millis(millis));
        }
        let expected = r#"# HELP took_seconds How long it took.
# TYPE took_seconds histogram
took_seconds_bucket{who="me",le="0.001"} 2
took_seconds_bucket{who="me",le="2.5"} 4
took_seconds_bucket{who="me",le="+Inf"} 5
took_seconds_sum{who="me"} 5.004
took_seconds_count{who="me"} 5
"#;
        assert_eq!(meter.text().expect("text"), expected);
    }
}

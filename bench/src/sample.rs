//! The figures of one contender in one round of a workload.

use std::time::Duration;

use serde::Serialize;

/// The figures by name, the processor time of each kind of process, and the errors.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(crate) struct Sample {
    #[serde(serialize_with = "as_map")]
    pub(crate) figures: Vec<(&'static str, f64)>,
    /// The share of a processor that each kind of process used; more than 1 for more than one
    /// processor.
    #[serde(serialize_with = "as_map")]
    pub(crate) cpu: Vec<(&'static str, f64)>,
    /// How many calls failed. They are in no other figure.
    pub(crate) errors: u64,
    /// The first error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
}

impl Sample {
    pub(crate) fn note(&mut self, name: &'static str, value: f64) {
        self.figures.push((name, value));
    }

    pub(crate) fn figure(&self, name: &str) -> Option<f64> {
        self.figures.iter().find(|(noted, _)| *noted == name).map(|(_, value)| *value)
    }

    /// Notes the processor time that was spent in `time`.
    #[must_use]
    pub(crate) fn spending(mut self, spent: &[(&'static str, Duration)], time: Duration) -> Self {
        self.cpu =
            spent.iter().map(|(name, spent)| (*name, spent.as_secs_f64() / time.as_secs_f64())).collect();
        self
    }
}

fn as_map<S: serde::Serializer>(pairs: &[(&'static str, f64)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(pairs.iter().copied())
}

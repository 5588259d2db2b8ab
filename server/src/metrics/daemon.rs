//! The metrics that are read from the daemon at each scrape: build, limits, readiness, store and
//! change feed.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeGaugeValue, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::config::Limits;
use crate::engine::Lessor;
use crate::health::{Health, Readiness};
use crate::store::{FeedState, Store};
use crate::{panics, telemetry};

/// Reads the metrics of a daemon.
pub(crate) struct DaemonCollector<S> {
    pub(crate) lessor: Lessor<S>,
    pub(crate) health: Health,
    pub(crate) limits: Limits,
}

/// The registry requires `Debug`, which a store need not have.
impl<S> fmt::Debug for DaemonCollector<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DaemonCollector").field("health", &self.health).finish_non_exhaustive()
    }
}

impl<S: Store> Collector for DaemonCollector<S> {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let store = self.lessor.store();
        let (version, name) = (("version", env!("CARGO_PKG_VERSION")), ("store", store.name()));
        let id = store.id().to_string();
        let info = [version, name, ("store_id", id.as_str())];
        gauge(
            &mut encoder,
            ("leased_build_info", "The version of the daemon and its store."),
            [(info, 1_u64)],
        )?;

        let Limits { connections, bounds, .. } = self.limits;
        let limits = [
            ("connections", connections),
            ("waiting_calls", bounds.waiting_calls),
            ("watches", bounds.watches),
            ("leases", bounds.leases),
        ];
        let limits = limits.map(|(limit, most)| ([("limit", limit)], most as u64));
        gauge(
            &mut encoder,
            ("leased_limit", "The most connections, waiting calls, watches or leases at once."),
            limits,
        )?;

        let is_ready = u64::from(self.health.readiness() == Readiness::Ready);
        gauge(
            &mut encoder,
            ("leased_ready", "1 if the daemon is ready to serve, else 0."),
            [([], is_ready)],
        )?;

        let steps = ConstCounter::new(store.clock_steps());
        let help = "Times that the store's clock and the clock of this host diverged by more than the grace.";
        let mut family =
            encoder.encode_descriptor("leased_store_clock_steps", help, None, MetricType::Counter)?;
        steps.encode(family.encode_family(&[name])?)?;

        for (name, help, count) in [
            ("leased_panics", "Panics that ended a call or a connection.", panics::caught()),
            ("leased_log_lines_dropped", "Log lines that were dropped.", telemetry::lines_dropped()),
        ] {
            let counter = ConstCounter::new(count);
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)?;
        }

        let feed = store.feed_state();
        let states = [
            ("off", feed == FeedState::Off),
            ("following", matches!(feed, FeedState::Behind(_))),
            ("broken", feed == FeedState::Broken),
        ];
        let states = states.map(|(state, is_so)| ([("state", state)], u64::from(is_so)));
        gauge(
            &mut encoder,
            ("leased_feed_state", "The state of the change feed: 1 for the present state."),
            states,
        )?;
        let lag = match feed {
            FeedState::Behind(lag) => lag.as_secs_f64(),
            // Not 0, which would say that the feed is up to date.
            FeedState::Off | FeedState::Broken => f64::NAN,
        };
        let help = "How far the change feed may be behind. NaN unless it is following.";
        gauge(&mut encoder, ("leased_feed_lag_seconds", help), [([], lag)])
    }
}

/// Encodes a gauge with a value for each set of labels.
fn gauge<const N: usize, const L: usize>(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help): (&str, &str),
    series: [([(&str, &str); L], impl EncodeGaugeValue + Copy + fmt::Debug); N],
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (labels, value) in series {
        ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

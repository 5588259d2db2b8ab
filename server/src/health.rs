//! Whether this daemon should be asked, for all who say so: the gRPC health service, the HTTP side port, the metrics.

use std::sync::Arc;
use std::time::Duration;

use leased_proto::v1::admin_service_server::SERVICE_NAME as ADMIN_SERVICE;
use leased_proto::v1::lease_service_server::SERVICE_NAME as LEASE_SERVICE;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::store::{Store, StoreError};

/// How often the store is asked.
const PERIOD: Duration = Duration::from_secs(1);
/// A store that is silent for so long does not answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// What health is reported of; the empty name stands for the whole daemon.
const SERVICES: [&str; 3] = ["", LEASE_SERVICE, ADMIN_SERVICE];

/// Why calls should or should not come here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Readiness {
    Ready,
    /// The store does not answer, and why.
    StoreAway(String),
    Draining,
}

/// Tells everyone who asks.
#[derive(Debug, Clone)]
pub(crate) struct Health {
    reporter: HealthReporter,
    readiness: Arc<watch::Sender<Readiness>>,
}

impl Health {
    /// Not ready until a first look at the store.
    pub(crate) async fn new(reporter: HealthReporter) -> Self {
        let unasked = Readiness::StoreAway("it has not been asked yet".to_owned());
        let health = Self { reporter, readiness: Arc::new(watch::Sender::new(unasked.clone())) };
        health.report(unasked).await;
        health
    }

    /// Looks at the store again and again until the daemon drains, and then says that.
    pub(crate) async fn watch<S: Store>(self, store: &S, draining: CancellationToken) {
        loop {
            let answer = tokio::select! {
                answer = timeout(PATIENCE, store.check()) => answer,
                () = draining.cancelled() => break,
            };
            self.look(answer.map_err(|_| "no answer in time".to_owned()).and_then(cause)).await;
            tokio::select! {
                () = sleep(PERIOD) => {}
                () = draining.cancelled() => break,
            }
        }
        self.report(Readiness::Draining).await;
    }

    async fn look(&self, answer: Result<(), String>) {
        let was_ready = self.readiness() == Readiness::Ready;
        match answer {
            Ok(()) if was_ready => {}
            Ok(()) => {
                tracing::info!("the store answers");
                self.report(Readiness::Ready).await;
            }
            Err(cause) if was_ready => {
                tracing::warn!(cause, "the store does not answer");
                self.report(Readiness::StoreAway(cause)).await;
            }
            // The cause may be another one than before.
            Err(cause) => drop(self.readiness.send_replace(Readiness::StoreAway(cause))),
        }
    }

    async fn report(&self, readiness: Readiness) {
        let status = match &readiness {
            Readiness::Ready => ServingStatus::Serving,
            Readiness::StoreAway(_) | Readiness::Draining => ServingStatus::NotServing,
        };
        for service in SERVICES {
            self.reporter.set_service_status(service, status).await;
        }
        self.readiness.send_replace(readiness);
    }

    /// Ends the streams of those who watch; they have been told that the daemon drains.
    pub(crate) async fn end(mut self) {
        for service in SERVICES {
            self.reporter.clear_service_status(service).await;
        }
    }

    /// Why calls should or should not come here.
    pub(crate) fn readiness(&self) -> Readiness {
        self.readiness.borrow().clone()
    }
}

fn cause(answer: Result<(), StoreError>) -> Result<(), String> {
    answer.map_err(|error| match error {
        // What has become of edits is no matter here.
        StoreError::Unavailable { cause, .. } => cause,
        error => error.to_string(),
    })
}

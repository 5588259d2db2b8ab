//! Whether this daemon is ready to serve.
//!
//! The gRPC health service, the HTTP side port and the metrics all read this one state, so they
//! never disagree.

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

/// The pause between checks of the store.
const PERIOD: Duration = Duration::from_secs(1);
/// How long a check of the store may take.
const CHECK_TIMEOUT: Duration = Duration::from_secs(2);
/// The services whose health is reported. The empty name means the whole daemon.
const SERVICES: [&str; 3] = ["", LEASE_SERVICE, ADMIN_SERVICE];

/// Whether the daemon is ready to serve, or why not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Readiness {
    Ready,
    /// The store does not answer, for this cause.
    StoreUnavailable(String),
    Draining,
}

/// The readiness of the daemon. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Health {
    reporter: HealthReporter,
    readiness: Arc<watch::Sender<Readiness>>,
}

impl Health {
    /// Returns a state that is not ready until the first check of the store.
    pub(crate) async fn new(reporter: HealthReporter) -> Self {
        let unchecked = Readiness::StoreUnavailable("it has not been checked yet".to_owned());
        let health = Self { reporter, readiness: Arc::new(watch::Sender::new(unchecked.clone())) };
        health.report(unchecked).await;
        health
    }

    /// Checks the store about every second until the daemon drains, and then reports the drain.
    pub(crate) async fn watch<S: Store>(self, store: &S, draining: CancellationToken) {
        loop {
            let result = tokio::select! {
                result = timeout(CHECK_TIMEOUT, store.check()) => result,
                () = draining.cancelled() => break,
            };
            self.note(result.map_err(|_| "no answer in time".to_owned()).and_then(cause)).await;
            tokio::select! {
                () = sleep(PERIOD) => {}
                () = draining.cancelled() => break,
            }
        }
        self.report(Readiness::Draining).await;
    }

    /// Notes the result of a check. Logs and reports only changes.
    async fn note(&self, result: Result<(), String>) {
        let was_ready = self.readiness() == Readiness::Ready;
        match result {
            Ok(()) if was_ready => {}
            Ok(()) => {
                tracing::info!("the store answers");
                self.report(Readiness::Ready).await;
            }
            Err(cause) if was_ready => {
                tracing::warn!(cause, "the store does not answer");
                self.report(Readiness::StoreUnavailable(cause)).await;
            }
            // The cause may have changed, and `/readyz` shows it.
            Err(cause) => {
                self.readiness.send_replace(Readiness::StoreUnavailable(cause));
            }
        }
    }

    async fn report(&self, readiness: Readiness) {
        let status = match &readiness {
            Readiness::Ready => ServingStatus::Serving,
            Readiness::StoreUnavailable(_) | Readiness::Draining => ServingStatus::NotServing,
        };
        for service in SERVICES {
            self.reporter.set_service_status(service, status).await;
        }
        self.readiness.send_replace(readiness);
    }

    /// Ends the health streams. To be called after the drain has been reported, so that their
    /// callers receive NOT_SERVING first.
    pub(crate) async fn end_streams(mut self) {
        for service in SERVICES {
            self.reporter.clear_service_status(service).await;
        }
    }

    /// Returns whether the daemon is ready, or why not.
    pub(crate) fn readiness(&self) -> Readiness {
        self.readiness.borrow().clone()
    }
}

fn cause(result: Result<(), StoreError>) -> Result<(), String> {
    result.map_err(|error| match error {
        // Without the outcome, because that is about edits, and a check makes none.
        StoreError::Unavailable { cause, .. } => cause,
        error => error.to_string(),
    })
}

//! Which store each daemon serves. A lease of one store is never requested from a daemon over
//! another store.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, timeout, timeout_at};
use tonic::metadata::MetadataMap;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use super::Endpoints;
use super::call::Failed;
use crate::daemon::{Daemon, Purpose, Slot};
use crate::error::{Error, Failure};

/// How long all daemons have to name their store before the first lease is requested.
const COMPARE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a probe in the background may take.
pub(super) const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
/// The header in which an answer names its store.
pub(super) const STORE: &str = "leased-store";

impl Endpoints {
    /// Notes which store `daemon` serves, as the headers of its `answer` say.
    ///
    /// # Errors
    /// [`Error::DifferentStores`] if another daemon of this client serves a different store.
    pub(crate) fn note_store(&self, daemon: &Arc<Daemon>, answer: &MetadataMap) -> Result<(), Error> {
        let named = answer.get(STORE).and_then(|store| store.to_str().ok());
        let is_news = daemon.note_store(named);
        let Some(named) = named.filter(|_| is_news || self.is_mixed.load(Ordering::Relaxed)) else {
            return Ok(());
        };
        let mut state = self.state();
        let Some((store, other)) = state.store.clone().filter(|(store, _)| store != named) else {
            if state.store.is_none() {
                state.store = Some((named.to_owned(), daemon.name.clone()));
            }
            return Ok(());
        };
        let serves_it =
            |other: &&Arc<Daemon>| !Arc::ptr_eq(other, daemon) && other.store().as_ref() == Some(&store);
        match state.daemons.iter().find(serves_it) {
            Some(elsewhere) => {
                self.is_mixed.store(true, Ordering::Relaxed);
                Err(Error::DifferentStores {
                    endpoint: daemon.name.clone(),
                    store: named.to_owned(),
                    other: elsewhere.name.clone(),
                    other_store: store,
                })
            }
            // No daemon serves the earlier store any more: it has been replaced.
            None => {
                tracing::warn!(
                    daemon = daemon.name,
                    store = named,
                    before = store,
                    from = other,
                    "the daemons now serve another store"
                );
                state.store = Some((named.to_owned(), daemon.name.clone()));
                Ok(())
            }
        }
    }

    /// Notes which store an answer over `slot` comes from, and switches to another daemon if that
    /// is the wrong store.
    ///
    /// # Errors
    /// [`Error::DifferentStores`].
    pub(crate) fn note_store_or_switch(&self, slot: &Slot, answer: &MetadataMap) -> Result<(), Error> {
        self.note_store(&slot.daemon, answer)
            .inspect_err(|error| self.switch(slot, &Failure::Useless(error.clone())))
    }

    /// Asks all daemons once which store they serve. Leaves out a daemon that does not answer
    /// within a second.
    ///
    /// # Errors
    /// [`Error::DifferentStores`] if two daemons serve different stores.
    pub(crate) async fn compare(&self) -> Result<(), Error> {
        let once = || async {
            let mut look_ups = self.look_ups.subscribe();
            let looked_up = look_ups
                .wait_for(|()| self.resolving.iter().all(|name| name.is_looked_up.load(Ordering::Relaxed)));
            let _ = timeout(COMPARE_TIMEOUT, looked_up).await;
            if self.len() > 1 {
                self.probe_all(self.all_but(Daemon::has_answered)).await;
            }
        };
        self.compared.get_or_init(once).await;
        if !self.is_mixed.load(Ordering::Relaxed) {
            return Ok(());
        }
        // The daemon over the wrong store may have been replaced since.
        self.probe_all(self.all_but(|_| false)).await;
        let mixed = self.mixed();
        self.is_mixed.store(mixed.is_some(), Ordering::Relaxed);
        mixed.map_or(Ok(()), Err)
    }

    /// Waits until a daemon answers that it serves leases, and compares the stores of all.
    ///
    /// # Errors
    /// [`Error::NotLeased`], [`Error::DifferentStores`] or [`Error::Unavailable`].
    pub(crate) async fn check(&self) -> Result<(), Error> {
        self.call(Purpose::KeepAlive, (), |channel, _| health(channel)).await?;
        self.compare().await
    }

    /// Probes several daemons at the same time.
    async fn probe_all(&self, daemons: Vec<Arc<Daemon>>) {
        let by = Instant::now() + COMPARE_TIMEOUT;
        join_all(daemons.iter().map(|daemon| self.probe(daemon, by))).await;
    }

    /// Asks a daemon whether it serves, and notes its store. Switches to another daemon if there is
    /// no answer by `by`, or within [`PROBE_TIMEOUT`].
    ///
    /// # Errors
    /// The reason why the daemon cannot be used.
    pub(super) async fn probe(&self, daemon: &Arc<Daemon>, by: Instant) -> Result<(), Failed> {
        let slot = daemon.slot(Purpose::KeepAlive);
        let by = by.min(Instant::now() + PROBE_TIMEOUT);
        match timeout_at(by, health(slot.channel.clone())).await {
            Ok(Ok(response)) => {
                self.note_store_or_switch(&slot, response.metadata())?;
                daemon.unbar();
                Ok(())
            }
            Ok(Err(status)) => {
                let failure = self.fail(&slot, &status);
                if let Failure::Final(_) = failure {
                    // The daemon answered with an error, so the call that follows goes to another.
                    self.switch(&slot, &Failure::Passing(None));
                }
                Err(Failed::at(failure, status))
            }
            Err(_) => {
                self.switch(&slot, &Failure::Passing(None));
                Err(Failed::default())
            }
        }
    }

    /// Finds the first daemon that serves a different store.
    fn mixed(&self) -> Option<Error> {
        let state = self.state();
        let (store, other) = state.store.clone()?;
        let different = |daemon: &Arc<Daemon>| daemon.store().filter(|named| *named != store);
        let (daemon, named) = state.daemons.iter().find_map(|daemon| Some((daemon, different(daemon)?)))?;
        Some(Error::DifferentStores {
            endpoint: daemon.name.clone(),
            store: named,
            other,
            other_store: store,
        })
    }
}

/// Asks a daemon whether it serves leases.
async fn health(channel: Channel) -> Result<Response<()>, Status> {
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_check_response::ServingStatus;
    use tonic_health::pb::health_client::HealthClient;

    let service = leased_proto::v1::lease_service_server::SERVICE_NAME.to_owned();
    match HealthClient::new(channel).check(HealthCheckRequest { service }).await {
        Ok(answer) if answer.get_ref().status() == ServingStatus::Serving => Ok(answer.map(drop)),
        Ok(_) => Err(Status::unavailable(
            "the daemon is not ready: its store does not answer, or it is starting or shutting down",
        )),
        // The server has health checks, but not this service.
        Err(status) if status.code() == Code::NotFound => {
            Err(Status::unimplemented("it has no such service"))
        }
        Err(status) => Err(status),
    }
}

//! Watching: a stream that outlives the daemons it comes from.

use futures_util::stream::{BoxStream, StreamExt, try_unfold};
use leased_proto::v1::lease_service_client::LeaseServiceClient;
use leased_proto::v1::watch_response::Event;
use leased_proto::v1::{self, WatchRequest, WatchResponse};
use tokio::time::{sleep, timeout};
use tonic::{Status, Streaming};

use crate::client::Client;
use crate::daemon::{Purpose, Slot};
use crate::endpoints::{Endpoints, Pauses};
use crate::error::{Error, Failure, cause};
use crate::info::KeyInfo;

/// A watch of keys.
///
/// ```no_run
/// # async fn example(client: leased_client::Client) -> Result<(), leased_client::Error> {
/// use leased_client::WatchEvent;
/// use tokio_stream::StreamExt;
///
/// let mut events = client.watch("reports/").stream();
/// while let Some(event) = events.try_next().await? {
///     match event {
///         WatchEvent::Snapshot(key) => println!("{} is {:?}", key.key, key.state),
///         WatchEvent::SnapshotEnd => println!("that is all there is"),
///         WatchEvent::Change { kind, key } => println!("{} {kind:?}", key.key),
///         WatchEvent::Interrupted { cause } => println!("starting over: {cause}"),
///         _ => {}
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
#[must_use = "nothing is watched until it is streamed"]
pub struct Watch {
    client: Client,
    request: WatchRequest,
}

/// What a watch tells.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum WatchEvent {
    /// A key as it is. A snapshot comes first, after each [`Interrupted`](Self::Interrupted), and whenever the reader was too
    /// slow for the changes.
    Snapshot(KeyInfo),
    /// The snapshot is whole: keys that were not in it are free.
    SnapshotEnd,
    /// A change, in order for each key.
    Change {
        /// What happened.
        kind: ChangeKind,
        /// The key after it.
        key: KeyInfo,
    },
    /// The daemon is gone, and another is being asked. A snapshot follows; of a watch of changes only, some may be missing.
    Interrupted {
        /// Why.
        cause: String,
    },
}

/// What happened to a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChangeKind {
    /// Someone holds it now.
    Granted,
    /// A holder gave it back.
    Released,
    /// A holder's time is over.
    Lapsed,
    /// An operator took it from a holder.
    Revoked,
    /// Someone has come into the line.
    Queued,
    /// Someone has left the line without a grant.
    LeftQueue,
}

impl Watch {
    pub(crate) fn new(client: Client, prefix: String) -> Self {
        Self { client, request: WatchRequest { prefix, changes_only: false } }
    }

    /// No snapshots.
    ///
    /// ```no_run
    /// # async fn example(client: leased_client::Client) -> Result<(), leased_client::Error> {
    /// use tokio_stream::StreamExt;
    ///
    /// let next = client.watch("reports/").changes_only().stream().try_next().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn changes_only(mut self) -> Self {
        self.request.changes_only = true;
        self
    }

    /// The events, for as long as they are read; reconnects by itself, and goes on at another daemon.
    ///
    /// The stream ends after an error, which is one that another try would not mend:
    ///
    /// - [`Error::Invalid`], [`Error::LimitExceeded`] and [`Error::Status`], which a daemon has answered;
    /// - [`Error::NotLeased`], [`Error::DifferentStores`] and [`Error::Status`] (a lack of rights), if all endpoints are of no use.
    ///   One among others is passed over.
    #[must_use]
    pub fn stream(self) -> BoxStream<'static, Result<WatchEvent, Error>> {
        let watching = Watching { watch: self, open: None, pauses: Pauses::default(), interrupted: false };
        try_unfold(watching, |mut watching| async {
            let event = watching.next().await?;
            Ok(Some((event, watching)))
        })
        .boxed()
    }
}

struct Watching {
    watch: Watch,
    open: Option<(Slot, Streaming<WatchResponse>)>,
    pauses: Pauses,
    /// This outage has been told.
    interrupted: bool,
}

/// Why there is no watch: what it means, and what to tell people.
struct Broken {
    failure: Failure,
    cause: String,
}

impl Watching {
    async fn next(&mut self) -> Result<WatchEvent, Error> {
        loop {
            let broken = match self.open.take() {
                None => match self.begin().await {
                    Ok(open) => {
                        self.open = Some(open);
                        continue;
                    }
                    Err(broken) => broken,
                },
                Some((slot, mut events)) => match events.message().await {
                    Ok(Some(response)) => {
                        self.open = Some((slot, events));
                        self.pauses = Pauses::default();
                        self.interrupted = false;
                        match response.event.map(WatchEvent::from) {
                            Some(event) => return Ok(event),
                            // Of a later version.
                            None => continue,
                        }
                    }
                    Ok(None) => self.broken(&slot, &Status::unavailable("the daemon ended the watch")),
                    Err(status) => self.broken(&slot, &status),
                },
            };
            if let Some(interrupted) = self.go_on(broken).await? {
                return Ok(interrupted);
            }
        }
    }

    /// Opens a watch at the daemon to ask.
    async fn begin(&self) -> Result<(Slot, Streaming<WatchResponse>), Broken> {
        let endpoints = self.endpoints();
        let Ok(Ok(daemon)) = timeout(endpoints.timeout(), endpoints.pick()).await else {
            return Err(Broken { failure: Failure::Passing(None), cause: "no address is known".to_owned() });
        };
        let slot = daemon.slot(Purpose::Calls);
        let mut stub = LeaseServiceClient::new(slot.channel.clone());
        match timeout(endpoints.timeout(), stub.watch(self.watch.request.clone())).await {
            Ok(Ok(response)) => match endpoints.meet_at(&slot, response.metadata()) {
                Ok(()) => Ok((slot, response.into_inner())),
                Err(error) => Err(Broken { cause: error.to_string(), failure: Failure::Useless(error) }),
            },
            Ok(Err(status)) => Err(self.broken(&slot, &status)),
            Err(_) => Err(self.broken(&slot, &Status::unavailable("it does not answer in time"))),
        }
    }

    fn endpoints(&self) -> &Endpoints {
        &self.watch.client.shared().endpoints
    }

    /// Turns to another daemon, unless this is an answer.
    fn broken(&self, slot: &Slot, status: &Status) -> Broken {
        Broken { failure: self.endpoints().fail(slot, status), cause: cause(status) }
    }

    /// Tells of an outage once, and waits before the next try.
    ///
    /// # Errors
    /// The answer, or that there is no endpoint to go on at.
    async fn go_on(&mut self, broken: Broken) -> Result<Option<WatchEvent>, Error> {
        let asked = match broken.failure {
            Failure::Final(error) => return Err(error),
            Failure::Passing(asked) => asked,
            Failure::Useless(error) => match self.endpoints().useless() {
                Some(_) => return Err(error),
                None => None,
            },
        };
        if !self.interrupted {
            self.interrupted = true;
            return Ok(Some(WatchEvent::Interrupted { cause: broken.cause }));
        }
        let daemons = self.endpoints().len();
        sleep(self.pauses.next(daemons, asked)).await;
        Ok(None)
    }
}

impl From<Event> for WatchEvent {
    fn from(event: Event) -> Self {
        match event {
            Event::Snapshot(key) => Self::Snapshot(key.into()),
            Event::SnapshotEnd(_) => Self::SnapshotEnd,
            Event::Change(change) => {
                let kind = match change.kind() {
                    v1::ChangeKind::Released => ChangeKind::Released,
                    v1::ChangeKind::Lapsed => ChangeKind::Lapsed,
                    v1::ChangeKind::Revoked => ChangeKind::Revoked,
                    v1::ChangeKind::Queued => ChangeKind::Queued,
                    v1::ChangeKind::LeftQueue => ChangeKind::LeftQueue,
                    v1::ChangeKind::Granted | v1::ChangeKind::Unspecified => ChangeKind::Granted,
                };
                Self::Change { kind, key: change.lease.unwrap_or_default().into() }
            }
        }
    }
}

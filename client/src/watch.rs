//! Watches keys: a stream of events that continues when a daemon fails.

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

/// An event of a watch.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum WatchEvent {
    /// One key of a snapshot. A watch begins with a snapshot. Another follows each
    /// [`Interrupted`](Self::Interrupted), and each time the reader was too slow for the changes.
    Snapshot(KeyInfo),
    /// The end of a snapshot. Keys that were not in it are free.
    SnapshotEnd,
    /// A change. The changes of one key come in order.
    Change {
        /// What happened.
        kind: ChangeKind,
        /// The key after the change.
        key: KeyInfo,
    },
    /// The watch was interrupted, and the client opens it again, at another daemon if need be. A
    /// snapshot follows. A watch with [`changes_only`](Watch::changes_only) has no snapshot, and
    /// may have missed changes.
    Interrupted {
        /// Why the watch was interrupted.
        cause: String,
    },
}

/// What happened to a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChangeKind {
    /// A lease was granted.
    Granted,
    /// A holder released its lease.
    Released,
    /// A holder's lease lapsed.
    Lapsed,
    /// An operator revoked a lease.
    Revoked,
    /// A waiter joined the queue.
    Queued,
    /// A waiter left the queue without a grant.
    LeftQueue,
}

impl Watch {
    pub(crate) fn new(client: Client, prefix: String) -> Self {
        Self { client, request: WatchRequest { prefix, changes_only: false } }
    }

    /// Leaves snapshots out.
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

    /// Returns the events as a stream. When the connection breaks, the stream reconnects or
    /// continues at another daemon.
    ///
    /// The stream ends after its first error, which another attempt would not resolve:
    ///
    /// - [`Error::Invalid`], [`Error::LimitExceeded`] and [`Error::Status`] are answers of a
    ///   daemon.
    /// - [`Error::NotLeased`], [`Error::DifferentStores`] and [`Error::Status`] for a lack of
    ///   rights mean that no endpoint can be used. While some can, the watch skips the others.
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
    /// Whether this outage has been reported.
    interrupted: bool,
}

/// Why a watch is broken.
struct Broken {
    failure: Failure,
    cause: String,
}

impl Watching {
    async fn next(&mut self) -> Result<WatchEvent, Error> {
        loop {
            let broken = match self.read().await {
                Ok(Some(event)) => return Ok(event),
                // An event of a later version is skipped.
                Ok(None) => continue,
                Err(broken) => broken,
            };
            if let Some(interrupted) = self.go_on(broken).await? {
                return Ok(interrupted);
            }
        }
    }

    /// Reads the next event, and opens a watch if none is open. Returns `None` for an event of a
    /// later version.
    async fn read(&mut self) -> Result<Option<WatchEvent>, Broken> {
        let (slot, mut events) = match self.open.take() {
            Some(open) => open,
            None => self.begin().await?,
        };
        let response = match events.message().await {
            Ok(Some(response)) => response,
            Ok(None) => return Err(self.broken(&slot, &Status::unavailable("the daemon ended the watch"))),
            Err(status) => return Err(self.broken(&slot, &status)),
        };
        self.open = Some((slot, events));
        self.pauses = Pauses::default();
        self.interrupted = false;
        Ok(response.event.map(WatchEvent::from))
    }

    /// Opens a watch at the daemon in use.
    async fn begin(&self) -> Result<(Slot, Streaming<WatchResponse>), Broken> {
        let endpoints = self.endpoints();
        let Ok(Ok(daemon)) = timeout(endpoints.timeout(), endpoints.pick()).await else {
            return Err(Broken { failure: Failure::Passing(None), cause: "no address is known".to_owned() });
        };
        let slot = daemon.slot(Purpose::Calls);
        let mut stub = LeaseServiceClient::new(slot.channel.clone());
        match timeout(endpoints.timeout(), stub.watch(self.watch.request.clone())).await {
            Ok(Ok(response)) => match endpoints.note_store_or_switch(&slot, response.metadata()) {
                Ok(()) => Ok((slot, response.into_inner())),
                Err(error) => Err(Broken { cause: error.to_string(), failure: Failure::Useless(error) }),
            },
            Ok(Err(status)) => Err(self.broken(&slot, &status)),
            Err(_) => Err(self.broken(&slot, &Status::unavailable("no answer in time"))),
        }
    }

    fn endpoints(&self) -> &Endpoints {
        &self.watch.client.shared().endpoints
    }

    /// Switches to another daemon, unless `status` is a daemon's answer.
    fn broken(&self, slot: &Slot, status: &Status) -> Broken {
        Broken { failure: self.endpoints().fail(slot, status), cause: cause(status) }
    }

    /// Reports an outage once. After that, waits before the next attempt.
    ///
    /// # Errors
    /// The daemon's answer, or the reason why no endpoint can be used.
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

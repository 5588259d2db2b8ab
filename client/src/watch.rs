//! Watching: a stream that outlives the daemons it comes from.

use futures_util::stream::{BoxStream, StreamExt, try_unfold};
use leased_proto::v1::lease_service_client::LeaseServiceClient;
use leased_proto::v1::watch_response::Event;
use leased_proto::v1::{self, WatchRequest, WatchResponse};
use tokio::time::{sleep, timeout};
use tonic::{Status, Streaming};

use crate::client::Client;
use crate::daemon::{Purpose, Slot};
use crate::endpoints::Pauses;
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
    /// The stream ends after an error, which is none that another try could mend: [`Error::Invalid`],
    /// [`Error::NotLeased`], [`Error::LimitExceeded`].
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

/// A watch at a daemon, or how it failed there if one could be asked.
type Begun = Result<(Slot, Streaming<WatchResponse>), (Option<Slot>, Status)>;

impl Watching {
    async fn next(&mut self) -> Result<WatchEvent, Error> {
        loop {
            let (slot, status) = match self.open.take() {
                None => match self.begin().await? {
                    Ok((slot, events)) => {
                        self.open = Some((slot, events));
                        continue;
                    }
                    Err((slot, status)) => (slot, status),
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
                    Ok(None) => (Some(slot), Status::unavailable("the daemon ended the watch")),
                    Err(status) => (Some(slot), status),
                },
            };
            if let Some(interrupted) = self.fail(slot.as_ref(), &status).await? {
                return Ok(interrupted);
            }
        }
    }

    /// Opens a watch at the daemon to ask.
    ///
    /// # Errors
    /// [`Error::DifferentStores`].
    async fn begin(&self) -> Result<Begun, Error> {
        let endpoints = &self.watch.client.shared().endpoints;
        let Ok(Ok(daemon)) = timeout(endpoints.timeout(), endpoints.pick()).await else {
            return Ok(Err((None, Status::unavailable("no address is known"))));
        };
        let slot = daemon.slot(Purpose::Calls);
        let mut stub = LeaseServiceClient::new(slot.channel.clone());
        match timeout(endpoints.timeout(), stub.watch(self.watch.request.clone())).await {
            Ok(Ok(response)) => {
                endpoints.meet(&daemon, response.metadata())?;
                Ok(Ok((slot, response.into_inner())))
            }
            Ok(Err(status)) => Ok(Err((Some(slot), status))),
            Err(_) => Ok(Err((Some(slot), Status::unavailable("it does not answer in time")))),
        }
    }

    /// Turns to another daemon. Tells of an outage once.
    async fn fail(&mut self, slot: Option<&Slot>, status: &Status) -> Result<Option<WatchEvent>, Error> {
        let endpoints = &self.watch.client.shared().endpoints;
        let asked = match slot.map(|slot| endpoints.fail(slot, status)) {
            Some(Failure::Final(error)) => return Err(error),
            Some(Failure::Passing(asked)) => asked,
            Some(Failure::Useless(error)) => match endpoints.useless() {
                Some(_) => return Err(error),
                None => None,
            },
            None => None,
        };
        if !self.interrupted {
            self.interrupted = true;
            return Ok(Some(WatchEvent::Interrupted { cause: cause(status) }));
        }
        let daemons = endpoints.len();
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

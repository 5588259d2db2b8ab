//! The client: the calls about keys, and the background task that keeps leases alive.

use std::sync::Arc;
use std::time::Duration;

use leased_proto::v1::admin_service_client::AdminServiceClient;
use leased_proto::v1::lease_service_client::LeaseServiceClient;
use leased_proto::v1::{GetRequest, LeaseRef, ReleaseRequest, RevokeRequest, TouchRequest, TouchResponse};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::acquire::Acquire;
use crate::builder::Builder;
use crate::daemon::Purpose;
use crate::endpoints::{Answer, Endpoints, PREVIOUS_ATTEMPTS, Pauses};
use crate::error::Error;
use crate::holdings::{Holdings, watch_deadlines};
use crate::id::LeaseId;
use crate::info::{KeyInfo, span};
use crate::keeper::{Keeper, touch_refused};
use crate::list::List;
use crate::token::FencingToken;
use crate::watch::Watch;

/// The most leases of a client. A daemon accepts no more on one stream by default, and a client has
/// one stream.
pub(crate) const MAX_LEASES: usize = 10_000;
/// The most releases in flight in the background.
const RELEASES: usize = 64;
/// The longest time for which a background release is retried. After that, the lease is left to
/// lapse.
const LONGEST_RELEASE: Duration = Duration::from_secs(60);
/// The pause before the background task starts again after a panic.
const RESTART: Duration = Duration::from_secs(1);

/// A client of one or more leased daemons over the same store. Cheap to clone: all clones share one
/// keepalive stream.
///
/// The background task ends when the last clone and the last [`Lease`](crate::Lease) are dropped.
#[derive(Debug, Clone)]
pub struct Client {
    shared: Arc<Shared>,
    /// Ends the background task when the last clone is dropped.
    _alive: Arc<DropGuard>,
}

/// The state that the clones of a client share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) endpoints: Arc<Endpoints>,
    pub(crate) holdings: Arc<Holdings>,
    pub(crate) owner: String,
    /// Limits the leases to [`MAX_LEASES`].
    pub(crate) slots: Arc<Semaphore>,
    /// Background releases that have not ended.
    background: TaskTracker,
    /// Limits the releases in flight to [`RELEASES`].
    releases: Semaphore,
    /// Runs background releases. A lease may be dropped outside of any runtime.
    runtime: Handle,
}

impl Client {
    /// Connects to the daemons at these URLs (`http://HOST:PORT`). Returns once a daemon has
    /// answered.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a URL is malformed, [`Error::NotLeased`] if the servers at all URLs
    /// are not leased daemons, [`Error::DifferentStores`] if the daemons do not serve the same
    /// store, and [`Error::Unavailable`] if no daemon answers within 5 s.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), leased_client::Error> {
    /// use leased_client::{Client, DEFAULT_ENDPOINT};
    ///
    /// let client = Client::connect([DEFAULT_ENDPOINT]).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn connect(endpoints: impl IntoIterator<Item = impl AsRef<str>>) -> Result<Self, Error> {
        let mut builder = Self::builder();
        for endpoint in endpoints {
            builder = builder.endpoint(endpoint.as_ref())?;
        }
        builder.connect().await
    }

    /// Returns a builder, for a client whose settings differ from the defaults.
    ///
    /// ```no_run
    /// # fn example() -> Result<(), leased_client::Error> {
    /// let builder = leased_client::Client::builder().endpoint("http://10.0.0.1:5327")?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn builder() -> Builder {
        Builder::new()
    }

    pub(crate) fn start(endpoints: Endpoints, owner: String) -> Self {
        let endpoints = Arc::new(endpoints);
        let holdings = Arc::new(Holdings::default());
        let ended = CancellationToken::new();
        tokio::spawn({
            let (holdings, endpoints, ended) = (Arc::clone(&holdings), Arc::clone(&endpoints), ended.clone());
            async move {
                // A panic, of a connector for example, must not leave the leases without a keeper.
                while tokio::spawn(keep(Arc::clone(&holdings), Arc::clone(&endpoints), ended.clone()))
                    .await
                    .is_err()
                {
                    tracing::error!("the client's task panicked; starting it again");
                    sleep(RESTART).await;
                }
            }
        });
        let shared = Shared {
            endpoints,
            holdings,
            owner,
            slots: Arc::new(Semaphore::new(MAX_LEASES)),
            background: TaskTracker::new(),
            releases: Semaphore::new(RELEASES),
            runtime: Handle::current(),
        };
        Self { shared: Arc::new(shared), _alive: Arc::new(ended.drop_guard()) }
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// Acquires a lease of `key` once the returned [`Acquire`] is awaited. A key has 1 to 512 bytes
    /// and no control characters.
    ///
    /// ```no_run
    /// # async fn example(client: leased_client::Client) -> Result<(), leased_client::Error> {
    /// let lease = client.acquire("reports/daily").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn acquire(&self, key: impl Into<String>) -> Acquire {
        Acquire::new(self.clone(), key.into())
    }

    /// Touches a lease that no [`Lease`](crate::Lease) keeps alive, and returns how long the lease
    /// lasts, counted from before this call.
    ///
    /// # Errors
    /// [`Error::Lost`], [`Error::Unavailable`].
    ///
    /// ```no_run
    /// # async fn example(client: leased_client::Client, id: leased_client::LeaseId) -> Result<(), leased_client::Error> {
    /// println!("lasts {:?} more", client.touch("reports/daily", id).await?);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn touch(&self, key: &str, id: LeaseId) -> Result<Duration, Error> {
        let lease = LeaseRef { key: key.to_owned(), lease_id: id.reveal() };
        Ok(span(touch(&self.shared.endpoints, lease).await?.body.remaining))
    }

    /// Releases a lease that no [`Lease`](crate::Lease) keeps alive.
    ///
    /// # Errors
    /// [`Error::Lost`], [`Error::Unavailable`].
    ///
    /// ```no_run
    /// # async fn example(client: leased_client::Client, id: leased_client::LeaseId) -> Result<(), leased_client::Error> {
    /// client.release("reports/daily", id).await
    /// # }
    /// ```
    pub async fn release(&self, key: &str, id: LeaseId) -> Result<(), Error> {
        self.shared.release(LeaseRef { key: key.to_owned(), lease_id: id.reveal() }, Acquired::Granted).await
    }

    /// Shows who holds `key` and who waits for it.
    ///
    /// # Errors
    /// [`Error::KeyUnknown`], [`Error::Invalid`], [`Error::Unavailable`].
    ///
    /// ```no_run
    /// # async fn example(client: leased_client::Client) -> Result<(), leased_client::Error> {
    /// for holder in client.get("reports/daily").await?.holders {
    ///     println!("{} for {:?} more", holder.owner, holder.remaining);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn get(&self, key: &str) -> Result<KeyInfo, Error> {
        let request = GetRequest { key: key.to_owned() };
        let call = self.shared.endpoints.call(Purpose::Calls, request, |channel, request| async move {
            LeaseServiceClient::new(channel).get(request).await
        });
        Ok(KeyInfo::from(call.await?.body.lease.unwrap_or_default()))
    }

    /// Lists the keys that begin with `prefix`, all keys if it is empty.
    ///
    /// ```no_run
    /// # async fn example(client: leased_client::Client) -> Result<(), leased_client::Error> {
    /// use tokio_stream::StreamExt;
    ///
    /// let first = client.list("reports/").stream().try_next().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn list(&self, prefix: impl Into<String>) -> List {
        List::new(self.clone(), prefix.into())
    }

    /// Watches the keys that begin with `prefix`, all keys if it is empty.
    ///
    /// ```no_run
    /// # async fn example(client: leased_client::Client) -> Result<(), leased_client::Error> {
    /// use tokio_stream::StreamExt;
    ///
    /// let first = client.watch("reports/").stream().try_next().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn watch(&self, prefix: impl Into<String>) -> Watch {
        Watch::new(self.clone(), prefix.into())
    }

    /// Revokes the lease of `key` with this token, or the leases of all holders if there is no
    /// token. Returns how many leases daemons have confirmed as revoked. `reason` goes to the
    /// daemon's log.
    ///
    /// Without a token, or if `token` was granted last and its lease was released, the call also
    /// ends a [`min_hold`](Acquire::min_hold) block. The block counts as one lease. A lease that is
    /// granted later is never revoked, even if the call is retried because its answer was lost.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Unavailable`]. Some of the leases may have been revoked all the
    /// same.
    ///
    /// ```no_run
    /// # async fn example(client: leased_client::Client) -> Result<(), leased_client::Error> {
    /// let revoked = client.revoke("reports/daily", None, "the host is gone").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn revoke(&self, key: &str, token: Option<FencingToken>, reason: &str) -> Result<u32, Error> {
        let tokens = match token {
            Some(token) => vec![token],
            // Names each holder by its token. A call without a token could not be retried, because
            // the retry might revoke the next holder's lease.
            None => match self.get(key).await {
                // The block goes last: the token of the latest grant means the block only once no
                // holder has it.
                Ok(info) => {
                    let block = info.blocked_until.map(|_| info.token);
                    info.holders.iter().map(|holder| holder.token).chain(block).collect()
                }
                Err(Error::KeyUnknown) => Vec::new(),
                Err(error) => return Err(error),
            },
        };
        let mut revoked = 0;
        for token in tokens {
            let (key, fencing_token, reason) = (key.to_owned(), token.get(), reason.to_owned());
            let request = RevokeRequest { key, fencing_token, reason };
            let call = self.shared.endpoints.call(Purpose::Calls, request, |channel, request| async move {
                AdminServiceClient::new(channel).revoke(request).await
            });
            revoked += u32::try_from(call.await?.body.revoked).unwrap_or_default();
        }
        Ok(revoked)
    }

    /// Waits until every dropped lease has been released, for at most the client's timeout. If a
    /// process exits without this call, its dropped leases may be left to lapse.
    ///
    /// ```no_run
    /// # async fn example(client: leased_client::Client, lease: leased_client::Lease) {
    /// drop(lease);
    /// client.settle().await;
    /// # }
    /// ```
    pub async fn settle(&self) {
        let background = &self.shared.background;
        // A tracker's `wait` ends only if the tracker is closed.
        background.close();
        let _ = timeout(self.shared.endpoints.timeout(), background.wait()).await;
        background.reopen();
    }

    /// Releases a lease in the background. Retries the call for as long as the lease may last, but
    /// no longer than [`LONGEST_RELEASE`].
    pub(crate) fn release_in_background(&self, lease: LeaseRef, lasts: Duration, acquired: Acquired) {
        let shared = Arc::clone(&self.shared);
        let patience = lasts.min(LONGEST_RELEASE);
        let release = async move {
            let Ok(_permit) = shared.releases.acquire().await else { return };
            let mut pauses = Pauses::default();
            while let Err(Error::Unavailable { cause, .. }) = shared.release(lease.clone(), acquired).await {
                tracing::debug!(key = lease.key, cause, "a lease could not be released yet");
                sleep(pauses.next(1, None)).await;
            }
        };
        let within_patience = async move {
            let _ = timeout(patience, release).await;
        };
        self.shared.background.spawn_on(within_patience, &self.shared.runtime);
    }
}

/// The background task of a client, which ends with the client.
async fn keep(holdings: Arc<Holdings>, endpoints: Arc<Endpoints>, ended: CancellationToken) {
    let keeper = Keeper::new(Arc::clone(&holdings), Arc::clone(&endpoints));
    tokio::select! {
        () = keeper.run() => {}
        () = touch_refused(&holdings, &endpoints) => {}
        () = watch_deadlines(&holdings) => {}
        () = endpoints.maintain() => {}
        () = ended.cancelled() => {}
    }
}

/// What is known of the acquire when its lease is released.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Acquired {
    /// The lease was granted.
    Granted,
    /// The acquire had no answer, and may still be on its way. The release says so by
    /// [`PREVIOUS_ATTEMPTS`], and the daemon remembers for a minute that the lease is over.
    Unanswered,
}

/// Touches a lease by a unary call, outside of the keepalive stream.
pub(crate) async fn touch(endpoints: &Endpoints, lease: LeaseRef) -> Result<Answer<TouchResponse>, Error> {
    let request = TouchRequest { lease: Some(lease) };
    let call = endpoints.call(Purpose::KeepAlive, request, |channel, request| async move {
        LeaseServiceClient::new(channel).touch(request).await
    });
    call.await
}

impl Shared {
    /// Releases a lease, and waits for the answer.
    pub(crate) async fn release(&self, lease: LeaseRef, acquired: Acquired) -> Result<(), Error> {
        let request = ReleaseRequest { lease: Some(lease) };
        let call = self.endpoints.call(Purpose::KeepAlive, request, |channel, mut request| async move {
            let is_retry = request.metadata().contains_key(PREVIOUS_ATTEMPTS);
            if acquired == Acquired::Unanswered && !is_retry {
                request.metadata_mut().insert(PREVIOUS_ATTEMPTS, 1.into());
            }
            LeaseServiceClient::new(channel).release(request).await
        });
        call.await.map(drop)
    }
}

//! Acquires a lease, and returns it once the holder may rely on it. Handles daemons that fail,
//! answers that are lost, and callers that give up.

use std::collections::HashMap;
use std::future::IntoFuture;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use leased_proto::v1::lease_service_client::LeaseServiceClient;
use leased_proto::v1::{AcquireRequest, AcquireResponse, LeaseRef, Mode};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::DEFAULT_TTL;
use crate::belief::{deadline, largest_margin, margin};
use crate::boot_instant::{BootInstant, after};
use crate::client::{Acquired, Client, MAX_LEASES, touch};
use crate::daemon::Purpose;
use crate::endpoints::{Answer, PREVIOUS_ATTEMPTS};
use crate::error::Error;
use crate::holding::Holding;
use crate::info::span;
use crate::lease::Lease;
use crate::token::FencingToken;

/// How long a daemon lets a call wait by default.
const LONGEST_CALL: Duration = Duration::from_secs(3600);
/// How long before the end of a call the next one begins.
const OVERLAP: Duration = Duration::from_secs(30);
/// How long a waiter that has gone silent may still be granted the lease. Either its daemon notices
/// the silent connection, or the daemon is gone and the waiter's entry in the queue lapses after
/// 15 s.
const SILENT_WAITER: Duration = Duration::from_secs(20);

/// A request for a lease. Await it to acquire the lease.
///
/// Without [`wait`](Self::wait) the request tries once. If its future is dropped before it is done,
/// the client releases the lease, or leaves the queue, in the background. If no daemon can be
/// reached, an entry in the queue lasts for about 15 s, and a lease for its TTL.
///
/// ```no_run
/// # async fn example(client: leased_client::Client) -> Result<(), leased_client::Error> {
/// use std::time::Duration;
///
/// let lease = client
///     .acquire("reports/daily")
///     .ttl(Duration::from_secs(10))
///     .wait(Duration::from_secs(60))
///     .metadata("build", "1.2.3")
///     .await?;
/// println!("token {}", lease.token());
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
#[must_use = "nothing is acquired until this is awaited"]
pub struct Acquire {
    client: Client,
    request: AcquireRequest,
    ttl: Option<Duration>,
    /// How long to wait; `None` for as long as it takes.
    wait: Option<Duration>,
    min_hold: Duration,
    margin: Option<Duration>,
}

impl Acquire {
    pub(crate) fn new(client: Client, key: String) -> Self {
        let owner = client.shared().owner.clone();
        let request =
            AcquireRequest { key, owner, mode: Mode::Exclusive.into(), ..AcquireRequest::default() };
        Self {
            client,
            request,
            ttl: None,
            wait: Some(Duration::ZERO),
            min_hold: Duration::ZERO,
            margin: None,
        }
    }

    /// Sets how long the lease lasts without a touch: 100 ms to 24 h unless the daemon's limits
    /// differ, 30 s by default.
    ///
    /// The lease is touched every third of its TTL. A takeover after a crash takes as long as the
    /// TTL. The lease survives an outage of all daemons of up to half of the TTL.
    ///
    /// ```no_run
    /// # async fn example(client: leased_client::Client) -> Result<(), leased_client::Error> {
    /// let lease = client.acquire("reports/daily").ttl(std::time::Duration::from_secs(10)).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = Some(ttl);
        self
    }

    /// Sets how long to wait in the queue: up to 1 h unless the daemon's limit differs. The queue
    /// is first come, first served.
    ///
    /// ```no_run
    /// # async fn example(client: leased_client::Client) -> Result<(), leased_client::Error> {
    /// let lease = client.acquire("reports/daily").wait(std::time::Duration::from_secs(60)).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = Some(wait);
        self
    }

    /// Waits in the queue for as long as it takes, even while daemons restart or are down.
    ///
    /// A daemon ends a call after an hour. Half a minute before that, the client makes the next
    /// call with the same lease id. At the same daemon this call keeps the position in the queue.
    /// At another daemon it may be put at the end. A daemon whose `--max-wait` is less than an hour
    /// refuses these calls with [`Error::Invalid`].
    ///
    /// ```no_run
    /// # async fn example(client: leased_client::Client) -> Result<(), leased_client::Error> {
    /// let lease = client.acquire("leaders/billing").wait_forever().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn wait_forever(mut self) -> Self {
        self.wait = None;
        self
    }

    /// Sets the owner, a label for people of up to 256 bytes. The default is the client's owner.
    /// The label proves nothing: two holders may use the same one.
    ///
    /// ```no_run
    /// # async fn example(client: leased_client::Client) -> Result<(), leased_client::Error> {
    /// let lease = client.acquire("reports/daily").owner("billing@10.0.0.9").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn owner(mut self, owner: impl Into<String>) -> Self {
        self.request.owner = owner.into();
        self
    }

    /// Adds a label for people and tools. A lease has up to 32 labels of up to 4 KiB in all.
    ///
    /// ```no_run
    /// # async fn example(client: leased_client::Client) -> Result<(), leased_client::Error> {
    /// let lease = client.acquire("reports/daily").metadata("build", "1.2.3").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn metadata(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.request.metadata.insert(name.into(), value.into());
        self
    }

    /// Asks for a shared lease: other shared leases of the key may be held at the same time. While
    /// this lease is held, the key has no more than `limit` holders; 0 means any number.
    ///
    /// ```no_run
    /// # async fn example(client: leased_client::Client) -> Result<(), leased_client::Error> {
    /// let lease = client.acquire("reports/daily").shared(3).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn shared(mut self, limit: u32) -> Self {
        self.request.mode = Mode::Shared.into();
        self.request.shared_limit = limit;
        self
    }

    /// Keeps the key taken for at least this long after the grant, even if the lease is released
    /// earlier. So a job that several machines start at about the same time runs once.
    ///
    /// ```no_run
    /// # async fn example(client: leased_client::Client) -> Result<(), leased_client::Error> {
    /// let lease = client.acquire("reports/daily").min_hold(std::time::Duration::from_secs(60)).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn min_hold(mut self, min_hold: Duration) -> Self {
        self.min_hold = min_hold;
        self
    }

    /// Sets the margin: how long before the end of the TTL the holder stops relying on the lease.
    /// Choose it long enough for the work to stop.
    ///
    /// The default is 1 % of the TTL, and at least 5 ms. The most is half of the TTL, because a
    /// lease is touched every third of it.
    ///
    /// ```no_run
    /// # async fn example(client: leased_client::Client) -> Result<(), leased_client::Error> {
    /// let lease = client.acquire("reports/daily").margin(std::time::Duration::from_secs(2)).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn margin(mut self, margin: Duration) -> Self {
        self.margin = Some(margin);
        self
    }

    async fn run(mut self) -> Result<Lease, Error> {
        let until = self.check()?;
        self.client.shared().endpoints.compare().await?;
        let slots = Arc::clone(&self.client.shared().slots);
        let slot = slots.try_acquire_owned().map_err(|_| {
            Error::LimitExceeded(format!("a client holds at most {MAX_LEASES} leases; make another client"))
        })?;
        loop {
            match self.attempt(until).await {
                Ok(holding) => return Ok(Lease::new(self.client, Arc::new(holding), slot)),
                // The lease was granted, and lost before this process received the answer. Its id
                // cannot be used again, so the next attempt has a new one.
                Err(Error::Lost(_))
                    if until.is_none_or(|until| {
                        Instant::now() < after(until, self.client.shared().endpoints.timeout())
                    }) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Checks the durations, writes them into the request, and returns until when to wait.
    fn check(&mut self) -> Result<Option<Instant>, Error> {
        let too_long = |name: &str| Error::Invalid(format!("{name} is too long"));
        let convert = |name: &str, duration: Duration| duration.try_into().map_err(|_| too_long(name));
        self.request.ttl = self.ttl.map(|ttl| convert("ttl", ttl)).transpose()?;
        self.request.min_hold = Some(convert("min_hold", self.min_hold)).transpose()?;
        self.check_margin(self.ttl.unwrap_or(Duration::MAX))?;
        let Some(wait) = self.wait else { return Ok(None) };
        self.request.wait = Some(convert("wait", wait)?);
        Instant::now().checked_add(wait).ok_or_else(|| too_long("wait")).map(Some)
    }

    fn check_margin(&self, ttl: Duration) -> Result<(), Error> {
        let largest = largest_margin(ttl);
        match self.margin.filter(|margin| *margin > largest) {
            None => Ok(()),
            Some(margin) => Err(Error::Invalid(format!(
                "a margin of {margin:?} is too large for a TTL of {ttl:?}; the largest is {largest:?}"
            ))),
        }
    }

    /// Makes one acquisition: retries the call with the same id until its outcome is known.
    async fn attempt(&mut self, until: Option<Instant>) -> Result<Holding, Error> {
        let id = Uuid::new_v4();
        self.request.lease_id = id.to_string();
        let lease = LeaseRef { key: self.request.key.clone(), lease_id: self.request.lease_id.clone() };
        let sends = AtomicUsize::new(0);
        let queued = if self.wait == Some(Duration::ZERO) { Duration::ZERO } else { SILENT_WAITER };
        let lasts = self.ttl.unwrap_or(DEFAULT_TTL).saturating_add(queued);
        let mut unknown = Unknown { client: &self.client, lease: Some(lease), lasts, sends: Some(&sends) };
        let (response, deadline) = self.granted(&mut unknown, &sends, until).await.inspect_err(|error| {
            // The daemon has answered that the id holds no lease, so there is none to release.
            if matches!(error, Error::Lost(_)) {
                unknown.lease = None;
            }
        })?;
        unknown.lease = None;
        let (ttl, margin) = self.times(&response);
        let token = FencingToken::new(response.fencing_token);
        Ok(Holding::new((self.request.key.clone(), id), token, (ttl, margin), deadline))
    }

    /// Sends the call until the lease is granted. If the grant may be old, touches the lease, so
    /// that its deadline counts from a request that was sent just now.
    async fn granted(
        &self,
        unknown: &mut Unknown<'_>,
        sends: &AtomicUsize,
        until: Option<Instant>,
    ) -> Result<(AcquireResponse, BootInstant), Error> {
        let answer = match until {
            Some(until) => self.ask(until, sends).await,
            None => self.ask_for_ever(sends).await,
        };
        let Answer { body: response, sent_at } = answer.inspect_err(|error| {
            // A refused call leaves nothing behind. But if the call was sent more than once, an
            // earlier attempt may have been granted, or may still be.
            if error.is_refusal() && sends.load(Ordering::Relaxed) == 1 {
                unknown.lease = None;
            }
        })?;
        let (ttl, margin) = self.times(&response);
        unknown.lasts = ttl;
        self.check_margin(ttl)?;
        // A daemon of an earlier version does not send `remaining`.
        let lasts = response.remaining.map_or(ttl, |remaining| span(Some(remaining)).min(ttl));
        let mut believed_until = deadline(sent_at, lasts, margin);
        // A grant that has used up half of its TTL would be due for a touch at once.
        if response.waited || deadline(sent_at, lasts, Duration::ZERO).remaining() < ttl / 2 {
            let lease = response.lease.clone().unwrap_or_default();
            let Answer { body: touched, sent_at } = touch(&self.client.shared().endpoints, lease).await?;
            believed_until = deadline(sent_at, span(touched.remaining), margin);
        }
        Ok((response, believed_until))
    }

    /// Makes one call, and retries it until a daemon answers.
    async fn ask(&self, until: Instant, sends: &AtomicUsize) -> Result<Answer<AcquireResponse>, Error> {
        let endpoints = &self.client.shared().endpoints;
        let purpose = if self.wait == Some(Duration::ZERO) { Purpose::Calls } else { Purpose::Waits };
        let call = endpoints.call_waiting(purpose, until, self.request.clone(), |channel, mut request| {
            // Counts the attempts of all calls with this id.
            let before = sends.fetch_add(1, Ordering::Relaxed);
            if before > 0 {
                request.metadata_mut().insert(PREVIOUS_ATTEMPTS, before.into());
            }
            request.get_mut().wait = until.saturating_duration_since(Instant::now()).try_into().ok();
            async move { LeaseServiceClient::new(channel).acquire(request).await }
        });
        call.await
    }

    /// Makes one call after another with the same id. Each begins before the previous one ends, so
    /// that one call always keeps the position in the queue.
    async fn ask_for_ever(&self, sends: &AtomicUsize) -> Result<Answer<AcquireResponse>, Error> {
        let mut calls = FuturesUnordered::new();
        loop {
            calls.push(self.ask(Instant::now() + LONGEST_CALL, sends));
            let next = sleep(LONGEST_CALL - OVERLAP);
            tokio::pin!(next);
            loop {
                tokio::select! {
                    Some(answer) = calls.next() => match answer {
                        // Another call is still waiting. Without one, the next call begins at once.
                        Err(Error::Held(_) | Error::Unavailable { .. }) if !calls.is_empty() => {}
                        Err(Error::Held(_) | Error::Unavailable { .. }) => break,
                        answer => return answer,
                    },
                    () = &mut next => break,
                }
            }
        }
    }

    /// The TTL as granted, and the margin.
    fn times(&self, response: &AcquireResponse) -> (Duration, Duration) {
        let ttl = span(response.ttl);
        (ttl, self.margin.unwrap_or_else(|| margin(ttl)))
    }
}

impl IntoFuture for Acquire {
    type Output = Result<Lease, Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    /// # Errors
    /// - [`Error::Held`] if the key is still not available when the wait is over.
    /// - [`Error::QueueFull`], [`Error::LimitExceeded`], [`Error::Invalid`].
    /// - [`Error::Unavailable`] if no daemon answers within the wait and the client's timeout.
    /// - [`Error::DifferentStores`] if the endpoints do not serve the same store.
    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.run())
    }
}

/// A lease id whose outcome is unknown. On drop, releases the lease in the background, unless
/// `lease` has been set to `None`. The release ends the id for good, even if the acquire with this
/// id arrives later.
pub(crate) struct Unknown<'a> {
    pub(crate) client: &'a Client,
    pub(crate) lease: Option<LeaseRef>,
    /// How long the lease may block other acquisitions.
    pub(crate) lasts: Duration,
    /// How often the acquire was sent; `None` if the lease was granted.
    pub(crate) sends: Option<&'a AtomicUsize>,
}

impl Drop for Unknown<'_> {
    fn drop(&mut self) {
        let acquired = match self.sends.map(|sends| sends.load(Ordering::Relaxed)) {
            // The acquire was never sent.
            Some(0) => return,
            Some(_) => Acquired::Unanswered,
            None => Acquired::Granted,
        };
        if let Some(lease) = self.lease.take() {
            self.client.release_in_background(lease, self.lasts, acquired);
        }
    }
}

/// Adds several labels, as [`Acquire::metadata`] adds one.
impl Extend<(String, String)> for Acquire {
    fn extend<T: IntoIterator<Item = (String, String)>>(&mut self, labels: T) {
        HashMap::extend(&mut self.request.metadata, labels);
    }
}

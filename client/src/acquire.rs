//! Acquiring: from the wish to a lease that may be believed in, through daemons that fail, answers that are lost, and callers
//! that lose interest.

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
use crate::client::{Acquired, Client, MAX_LEASES, touch};
use crate::daemon::Purpose;
use crate::endpoints::{Answer, PREVIOUS_ATTEMPTS};
use crate::error::Error;
use crate::holding::Holding;
use crate::info::span;
use crate::lease::Lease;
use crate::moment::{Moment, after};
use crate::token::FencingToken;

/// How long a daemon lets a call wait, unless it is told otherwise.
const LONGEST_CALL: Duration = Duration::from_secs(3600);
/// How long before its end the next call begins.
const OVERLAP: Duration = Duration::from_secs(30);
/// How long after its last word a waiter may still be granted the key: its daemon notices that the connection is silent, or is gone
/// itself and the place in line runs out after 15 s.
const PLACE: Duration = Duration::from_secs(20);

/// A wish for a lease; await it to have it.
///
/// Without [`wait`](Self::wait) it is tried once. When the future is dropped part-way, the lease or the place in line is given
/// back in the background. If no daemon can be told, a place in line lasts for some 15 s, and a lease for its TTL.
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
    /// `None`: for as long as it takes.
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

    /// How long the lease lasts without a touch, 100 ms to 24 h unless the daemon says otherwise; 30 s if not given. It is
    /// touched every third of it. Takeover after a crash takes as long as this; an outage of the daemons may last half
    /// of it without harm.
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

    /// How long to stand in line at most, up to 1 h; first come, first served.
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

    /// Stands in line for as long as it takes, through daemons that restart or are away.
    ///
    /// A daemon ends a call after an hour. The next one, with the same lease id, begins half a minute before that and keeps the
    /// place, if the same daemon is asked; at another one it may end up at the end of the line. A daemon whose `--max-wait` is less
    /// than an hour refuses these calls with [`Error::Invalid`].
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

    /// A label for people, up to 256 bytes; the client's unless given. It proves nothing, and two may use the same.
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

    /// Another label, for people and tools: up to 32 of them, 4 KiB together.
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

    /// Holds the key together with other shared holders, no more than `limit` in all for as long as this lease is held; 0 for any
    /// number.
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

    /// Keeps the key taken for this long after the grant, even if it is released before: a job that several machines start
    /// at about the same time runs once.
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

    /// How much of the TTL is kept in hand; a hundredth, and at least 5 ms, unless given. Belief ends this long before the
    /// lease can be taken by another: long enough for whatever stopping takes. Half of the TTL is the most, since a lease is
    /// touched every third of it.
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
                // Granted, and over before this process heard of it. That acquisition is spent.
                Err(Error::Lost(_))
                    if until.is_none_or(|until| {
                        Instant::now() < after(until, self.client.shared().endpoints.timeout())
                    }) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Fills in the durations, which a request cannot carry if they are too long for it, and returns until when to wait.
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
                "a margin of {margin:?} is too much for a TTL of {ttl:?}; {largest:?} is the most"
            ))),
        }
    }

    /// One acquisition, repeated with one id until its outcome is known.
    async fn attempt(&mut self, until: Option<Instant>) -> Result<Holding, Error> {
        let id = Uuid::new_v4();
        self.request.lease_id = id.to_string();
        let lease = LeaseRef { key: self.request.key.clone(), lease_id: self.request.lease_id.clone() };
        let sends = AtomicUsize::new(0);
        let place = if self.wait == Some(Duration::ZERO) { Duration::ZERO } else { PLACE };
        let lasts = self.ttl.unwrap_or(DEFAULT_TTL).saturating_add(place);
        let mut unknown = Unknown { client: &self.client, lease: Some(lease), lasts, sends: Some(&sends) };
        let (response, deadline) = self.granted(&mut unknown, &sends, until).await.inspect_err(|error| {
            // The daemon says that there is no lease.
            if matches!(error, Error::Lost(_)) {
                unknown.lease = None;
            }
        })?;
        unknown.lease = None;
        let (ttl, margin) = self.times(&response);
        let token = FencingToken::new(response.fencing_token);
        Ok(Holding::new((self.request.key.clone(), id), token, (ttl, margin), deadline))
    }

    /// Asks until granted and, if the grant may be old, touches: belief starts with what this process has sent last.
    async fn granted(
        &self,
        unknown: &mut Unknown<'_>,
        sends: &AtomicUsize,
        until: Option<Instant>,
    ) -> Result<(AcquireResponse, Moment), Error> {
        let answer = match until {
            Some(until) => self.ask(until, sends).await,
            None => self.ask_for_ever(sends).await,
        };
        let Answer { body: response, sent_at } = answer.inspect_err(|error| {
            // What is refused leaves nothing behind; but one that was sent before may have been granted, or be so yet.
            if error.is_refusal() && sends.load(Ordering::Relaxed) == 1 {
                unknown.lease = None;
            }
        })?;
        let (ttl, margin) = self.times(&response);
        unknown.lasts = ttl;
        self.check_margin(ttl)?;
        // Daemons of an earlier version do not say how much is left.
        let lasts = response.remaining.map_or(ttl, |remaining| span(Some(remaining)).min(ttl));
        let mut believed_until = deadline(sent_at, lasts, margin);
        // A grant that is half over would be due at once.
        if response.waited || deadline(sent_at, lasts, Duration::ZERO).remaining() < ttl / 2 {
            let lease = response.lease.clone().unwrap_or_default();
            let Answer { body: touched, sent_at } = touch(&self.client.shared().endpoints, lease).await?;
            believed_until = deadline(sent_at, span(touched.remaining), margin);
        }
        Ok((response, believed_until))
    }

    /// One call, and its repetitions, until it is answered.
    async fn ask(&self, until: Instant, sends: &AtomicUsize) -> Result<Answer<AcquireResponse>, Error> {
        let endpoints = &self.client.shared().endpoints;
        let purpose = if self.wait == Some(Duration::ZERO) { Purpose::Calls } else { Purpose::Waits };
        let call = endpoints.call_waiting(purpose, until, self.request.clone(), |channel, mut request| {
            // Also those that belong to another call with the same id.
            let before = sends.fetch_add(1, Ordering::Relaxed);
            if before > 0 {
                request.metadata_mut().insert(PREVIOUS_ATTEMPTS, before.into());
            }
            request.get_mut().wait = until.saturating_duration_since(Instant::now()).try_into().ok();
            async move { LeaseServiceClient::new(channel).acquire(request).await }
        });
        call.await
    }

    /// One call after the other with the same id, each of which begins before the one before it ends: so there always is one
    /// that keeps the place in line.
    async fn ask_for_ever(&self, sends: &AtomicUsize) -> Result<Answer<AcquireResponse>, Error> {
        let mut calls = FuturesUnordered::new();
        loop {
            calls.push(self.ask(Instant::now() + LONGEST_CALL, sends));
            let next = sleep(LONGEST_CALL - OVERLAP);
            tokio::pin!(next);
            loop {
                tokio::select! {
                    Some(answer) = calls.next() => match answer {
                        // A later call waits on, or the next one will.
                        Err(Error::Held(_) | Error::Unavailable { .. }) if !calls.is_empty() => {}
                        Err(Error::Held(_) | Error::Unavailable { .. }) => break,
                        answer => return answer,
                    },
                    () = &mut next => break,
                }
            }
        }
    }

    /// The TTL as granted, and what is kept of it in hand.
    fn times(&self, response: &AcquireResponse) -> (Duration, Duration) {
        let ttl = span(response.ttl);
        (ttl, self.margin.unwrap_or_else(|| margin(ttl)))
    }
}

impl IntoFuture for Acquire {
    type Output = Result<Lease, Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    /// # Errors
    /// [`Error::Held`] if someone else holds the key, also after the wait; [`Error::QueueFull`], [`Error::LimitExceeded`],
    /// [`Error::Invalid`]; [`Error::Unavailable`] if no daemon answers within the client's timeout beyond the wait;
    /// [`Error::DifferentStores`] if the endpoints do not belong together.
    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.run())
    }
}

/// A lease that may be held and is not wanted: given back in the background unless it is settled before. A release settles its id
/// for good, even if the acquire with it arrives later.
pub(crate) struct Unknown<'a> {
    pub(crate) client: &'a Client,
    pub(crate) lease: Option<LeaseRef>,
    /// How long it may stand in the way of others.
    pub(crate) lasts: Duration,
    /// How often it was asked for; `None` if it is known to have been granted.
    pub(crate) sends: Option<&'a AtomicUsize>,
}

impl Drop for Unknown<'_> {
    fn drop(&mut self) {
        let acquired = match self.sends.map(|sends| sends.load(Ordering::Relaxed)) {
            // No daemon has ever heard of it.
            Some(0) => return,
            Some(_) => Acquired::Unanswered,
            None => Acquired::Known,
        };
        if let Some(lease) = self.lease.take() {
            self.client.release_in_background(lease, self.lasts, acquired);
        }
    }
}

/// Labels as a map, for callers that have them so.
impl Extend<(String, String)> for Acquire {
    fn extend<T: IntoIterator<Item = (String, String)>>(&mut self, labels: T) {
        HashMap::extend(&mut self.request.metadata, labels);
    }
}

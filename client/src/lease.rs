//! The guard of a lease: a program keeps it while it acts on the key.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::acquire::Unknown;
use crate::belief::{Loss, State};
use crate::boot_instant::after;
use crate::client::{Acquired, Client};
use crate::error::Error;
use crate::holding::Holding;
use crate::id::LeaseId;
use crate::lock::lock;
use crate::token::FencingToken;

/// A lease that this process holds. The client keeps it alive in the background until it is
/// released or dropped.
///
/// Dropping this value releases the lease in the background. [`release`](Self::release) waits for
/// the outcome and returns it. A process that is about to exit waits for dropped leases with
/// [`Client::settle`]. A lease can be shared in an `Arc`: only [`detach`](Self::detach) takes it by
/// value.
///
/// ```no_run
/// # async fn example(client: leased_client::Client) -> Result<(), leased_client::Error> {
/// # async fn write_report(_: leased_client::FencingToken) {}
/// let lease = client.acquire("reports/daily").await?;
/// lease.run(write_report(lease.token())).await?;
/// lease.release().await
/// # }
/// ```
#[must_use = "a lease that is dropped is released"]
pub struct Lease {
    client: Client,
    holding: Arc<Holding>,
    /// Whether the lease has been detached, or a release has begun.
    is_over: AtomicBool,
    /// The permit that counts this lease among those of its client.
    slot: Mutex<Option<OwnedSemaphorePermit>>,
}

impl Lease {
    pub(crate) fn new(client: Client, holding: Arc<Holding>, slot: OwnedSemaphorePermit) -> Self {
        client.shared().holdings.insert(Arc::clone(&holding));
        Self { client, holding, is_over: AtomicBool::new(false), slot: Mutex::new(Some(slot)) }
    }

    /// The key.
    ///
    /// ```no_run
    /// # fn example(lease: leased_client::Lease) {
    /// println!("holding {}", lease.key());
    /// # }
    /// ```
    #[must_use]
    pub fn key(&self) -> &str {
        &self.holding.key
    }

    /// The fencing token. Send it along with every write under the lease.
    ///
    /// ```no_run
    /// # fn example(lease: leased_client::Lease) {
    /// println!("UPDATE .. WHERE token <= {}", lease.token());
    /// # }
    /// ```
    #[must_use]
    pub fn token(&self) -> FencingToken {
        self.holding.token
    }

    /// The secret that names this acquisition. Another process that has it can touch and release
    /// the lease.
    ///
    /// ```no_run
    /// # fn example(lease: leased_client::Lease) {
    /// let secret = lease.id().reveal();
    /// # }
    /// ```
    #[must_use]
    pub fn id(&self) -> LeaseId {
        LeaseId::from(self.holding.id)
    }

    /// How long the lease lasts without a touch, as granted.
    ///
    /// ```no_run
    /// # fn example(lease: leased_client::Lease) {
    /// println!("lasts {:?} without a touch", lease.ttl());
    /// # }
    /// ```
    #[must_use]
    pub fn ttl(&self) -> Duration {
        self.holding.ttl
    }

    /// Whether the key may be acted on at this instant.
    ///
    /// ```no_run
    /// # fn example(lease: leased_client::Lease) {
    /// # fn write(_: leased_client::FencingToken) {}
    /// while lease.is_held() {
    ///     write(lease.token());
    /// }
    /// # }
    /// ```
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.holding.state() == State::Held
    }

    /// How long the key may still be acted on without another confirmation; zero if it may not be
    /// acted on.
    ///
    /// While the lease is held, this is the TTL minus the time since the last confirmed touch was
    /// *sent*, minus the margin.
    ///
    /// ```no_run
    /// # fn example(lease: leased_client::Lease) {
    /// println!("safe for {:?} more", lease.remaining());
    /// # }
    /// ```
    #[must_use]
    pub fn remaining(&self) -> Duration {
        match self.holding.state() {
            State::Held => self.holding.deadline().remaining(),
            State::Jeopardy | State::Lost(_) => Duration::ZERO,
        }
    }

    /// When [`remaining`](Self::remaining) is over, for timers. Each confirmation moves the
    /// deadline ahead.
    ///
    /// ```no_run
    /// # async fn example(lease: leased_client::Lease) {
    /// tokio::time::sleep_until(lease.deadline()).await;
    /// # }
    /// ```
    #[must_use]
    pub fn deadline(&self) -> Instant {
        after(Instant::now(), self.remaining())
    }

    /// Returns a watch of the state, which shows the current state and waits for changes.
    ///
    /// ```no_run
    /// # async fn example(lease: leased_client::Lease) {
    /// use leased_client::State;
    ///
    /// let mut state = lease.state();
    /// loop {
    ///     match state.changed().await {
    ///         State::Held => println!("held again: going on"),
    ///         State::Jeopardy => println!("no daemon confirms it: pausing"),
    ///         State::Lost(loss) => break println!("gone: {loss}"),
    ///         _ => {}
    ///     }
    /// }
    /// # }
    /// ```
    #[must_use]
    pub fn state(&self) -> StateWatch {
        StateWatch::new(Arc::clone(&self.holding))
    }

    /// Waits until the key may no longer be acted on, and returns why: [`State::Jeopardy`] or
    /// [`State::Lost`].
    ///
    /// A lease in jeopardy may be confirmed again. To go on waiting for its loss, use
    /// [`lost_for_good`](Self::lost_for_good), and act on the key only while
    /// [`is_held`](Self::is_held) returns true.
    ///
    /// ```no_run
    /// # async fn example(lease: leased_client::Lease) {
    /// # async fn work() {}
    /// tokio::select! {
    ///     state = lease.lost() => println!("stopping: {state:?}"),
    ///     () = work() => println!("done"),
    /// }
    /// # }
    /// ```
    pub async fn lost(&self) -> State {
        loop {
            let state = self.holding.state();
            if state != State::Held {
                return state;
            }
            // Another task reports deadlines that have passed, and may be late. So this future has
            // its own timer, which it sets again when the deadline has moved.
            let deadline = self.holding.deadline();
            tokio::select! {
                state = self.holding.changed(State::Held) => return state,
                () = deadline.reached() => {}
            }
        }
    }

    /// Waits until the lease is lost for good. Jeopardy does not end the wait.
    ///
    /// ```no_run
    /// # async fn example(lease: leased_client::Lease) {
    /// let loss = lease.lost_for_good().await;
    /// println!("{} is {loss}", lease.key());
    /// # }
    /// ```
    pub async fn lost_for_good(&self) -> Loss {
        let mut state = self.holding.state();
        loop {
            match state {
                State::Lost(loss) => return loss,
                State::Held | State::Jeopardy => state = self.holding.changed(state).await,
            }
        }
    }

    /// Returns a token that is cancelled as soon as the key may no longer be acted on, and stays
    /// cancelled. For work that is spread over several tasks.
    ///
    /// ```no_run
    /// # fn example(lease: leased_client::Lease) {
    /// # async fn work() {}
    /// let stop = lease.stop_token();
    /// tokio::spawn(async move { stop.run_until_cancelled(work()).await });
    /// # }
    /// ```
    #[must_use]
    pub fn stop_token(&self) -> CancellationToken {
        self.holding.stop()
    }

    /// Why no daemon has confirmed the lease lately, for people; `None` if there is no problem.
    ///
    /// ```no_run
    /// # fn example(lease: leased_client::Lease) {
    /// if let Some(trouble) = lease.trouble() {
    ///     println!("{} is in danger: {trouble}", lease.key());
    /// }
    /// # }
    /// ```
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        self.holding.trouble().or_else(|| self.client.shared().holdings.trouble())
    }

    /// Runs `work`, and drops it as soon as the key may no longer be acted on.
    ///
    /// A future can be dropped only where it awaits. So code that blocks its thread continues, and
    /// so do spawned tasks, `spawn_blocking`, threads and processes. Have them check
    /// [`stop_token`](Self::stop_token) or [`is_held`](Self::is_held) between their steps, and
    /// wait for their end within `work`. Send [`token`](Self::token) with each of their writes, so
    /// that late writes are refused.
    ///
    /// # Errors
    /// [`Error::Jeopardy`] or [`Error::Lost`] if the work was stopped, or never started.
    /// [`Error::EndedLate`] if the work finished after the lease could no longer be relied on; its
    /// result is dropped.
    ///
    /// ```no_run
    /// # async fn example(lease: leased_client::Lease) -> Result<(), leased_client::Error> {
    /// let sum = lease.run(async { 1 + 1 }).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn run<T>(&self, work: impl Future<Output = T>) -> Result<T, Error> {
        let jeopardy = || {
            self.trouble()
                .unwrap_or_else(|| "no daemon has confirmed it; this process may have been paused".to_owned())
        };
        tokio::select! {
            // The loss first, so that no work is polled under a lease that is not held.
            biased;
            state = self.lost() => Err(match state {
                State::Lost(loss) => Error::Lost(loss),
                State::Held | State::Jeopardy => Error::Jeopardy { cause: jeopardy() },
            }),
            // The work may have blocked this task, and the deadline may have passed meanwhile.
            done = work => match self.holding.state() {
                State::Held => Ok(done),
                State::Jeopardy => Err(Error::EndedLate { cause: jeopardy() }),
                State::Lost(loss) => Err(Error::EndedLate { cause: loss.to_string() }),
            },
        }
    }

    /// Releases the lease. When this returns, the next waiter holds the key, unless a
    /// [`min_hold`](crate::Acquire::min_hold) still blocks it.
    ///
    /// From the call on, all who share this lease see it as lost. A second call does nothing, and
    /// does not wait for the first. If this future is dropped, the release continues in the
    /// background.
    ///
    /// # Errors
    /// [`Error::Lost`] if the lease was lost before: its work may have run at the same time as
    /// another holder's. [`Error::Unavailable`] if no daemon answers: the lease is then released in
    /// the background, or lapses at the end of its TTL.
    ///
    /// ```no_run
    /// # async fn example(lease: leased_client::Lease) -> Result<(), leased_client::Error> {
    /// let lease = std::sync::Arc::new(lease);
    /// let shared = std::sync::Arc::clone(&lease);
    /// lease.release().await?;
    /// assert!(!shared.is_held());
    /// # Ok(())
    /// # }
    /// ```
    pub async fn release(&self) -> Result<(), Error> {
        if self.is_over.swap(true, Ordering::Relaxed) {
            return Ok(());
        }
        if let State::Lost(loss) = self.holding.state() {
            return Err(Error::Lost(loss));
        }
        self.leave();
        let lease = self.holding.lease_ref();
        let (client, lasts) = (&self.client, self.holding.ttl);
        let mut unknown = Unknown { client, lease: Some(lease.clone()), lasts, sends: None };
        let released = self.client.shared().release(lease, Acquired::Granted).await;
        if !matches!(released, Err(Error::Unavailable { .. })) {
            unknown.lease = None;
        }
        released
    }

    /// Stops keeping the lease alive without releasing it, and returns its id. From now on another
    /// process must touch the lease, or it lapses.
    ///
    /// ```no_run
    /// # async fn example(client: leased_client::Client, lease: leased_client::Lease) -> Result<(), leased_client::Error> {
    /// let (key, id) = (lease.key().to_owned(), lease.detach());
    /// let remaining = client.touch(&key, id).await?;
    /// # Ok(())
    /// # }
    /// ```
    #[must_use = "without the id the lease cannot be touched or released"]
    pub fn detach(self) -> LeaseId {
        self.leave();
        self.is_over.store(true, Ordering::Relaxed);
        self.id()
    }

    /// Stops touching the lease, and reports it as released.
    fn leave(&self) {
        self.client.shared().holdings.remove(self.holding.id);
        self.holding.lose(Loss::Released);
        lock(&self.slot).take();
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let was_lost = matches!(self.holding.state(), State::Lost(_));
        self.leave();
        if !self.is_over.load(Ordering::Relaxed) && !was_lost {
            self.client.release_in_background(self.holding.lease_ref(), self.holding.ttl, Acquired::Granted);
        }
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Holding { key, token, .. } = &*self.holding;
        let state = self.holding.state();
        formatter
            .debug_struct("Lease")
            .field("key", key)
            .field("token", token)
            .field("state", &state)
            .finish_non_exhaustive()
    }
}

/// A watch of a lease's state. Keeps only the latest state, so there is no backlog to read.
#[derive(Debug, Clone)]
pub struct StateWatch {
    holding: Arc<Holding>,
    seen: State,
}

impl StateWatch {
    fn new(holding: Arc<Holding>) -> Self {
        let seen = holding.state();
        Self { holding, seen }
    }

    /// The state at this instant.
    ///
    /// ```no_run
    /// # fn example(lease: leased_client::Lease) {
    /// println!("{:?}", lease.state().current());
    /// # }
    /// ```
    #[must_use]
    pub fn current(&self) -> State {
        self.holding.state()
    }

    /// Waits for a state other than the one that this watch has seen last. Never returns after
    /// [`State::Lost`].
    ///
    /// ```no_run
    /// # async fn example(lease: leased_client::Lease) {
    /// println!("first {:?}", lease.state().changed().await);
    /// # }
    /// ```
    pub async fn changed(&mut self) -> State {
        self.seen = self.holding.changed(self.seen).await;
        self.seen
    }
}

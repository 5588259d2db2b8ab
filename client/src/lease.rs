//! The guard of a lease: what a program holds while it may act on a key.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::acquire::Unknown;
use crate::belief::{Loss, State};
use crate::client::{Acquired, Client};
use crate::error::Error;
use crate::holding::Holding;
use crate::id::LeaseId;
use crate::moment::after;
use crate::token::FencingToken;

/// A lease that this process holds, kept alive in the background until it is released or dropped.
///
/// Dropping it gives the lease back in the background; [`release`](Self::release) does so and tells how it went. A process that
/// is about to end waits with [`Client::settle`] for leases that were dropped. A lease may be shared in an
/// `Arc`, since nothing but [`detach`](Self::detach) needs it whole.
///
/// ```no_run
/// # async fn example(client: leased_client::Client) -> Result<(), leased_client::Error> {
/// # async fn write_report(_: leased_client::FencingToken) {}
/// let lease = client.acquire("reports/daily").await?;
/// lease.run(write_report(lease.token())).await?;
/// lease.release().await
/// # }
/// ```
#[must_use = "a lease that is dropped is given back"]
pub struct Lease {
    client: Client,
    holding: Arc<Holding>,
    /// Nothing is left to give back, or somebody is giving it back.
    is_over: AtomicBool,
    /// One of the leases that a client may hold, until it is given back.
    slot: Mutex<Option<OwnedSemaphorePermit>>,
}

impl Lease {
    pub(crate) fn new(client: Client, holding: Arc<Holding>, slot: OwnedSemaphorePermit) -> Self {
        client.shared().holdings.insert(Arc::clone(&holding));
        Self { client, holding, is_over: AtomicBool::new(false), slot: Mutex::new(Some(slot)) }
    }

    /// What is leased.
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

    /// The fencing token: send it along with whatever is done under the lease.
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

    /// The secret that names this acquisition, for handing it over.
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

    /// Whether the key may be acted on now, by the clock.
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

    /// How long the key may be acted on still if no daemon says a word more; nothing if it may not be.
    ///
    /// This is the TTL less the time since the last confirmed touch was *sent*, less the margin.
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

    /// When [`remaining`](Self::remaining) is over as things stand, for timers.
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

    /// How this process stands to the lease, now and as it changes.
    ///
    /// ```no_run
    /// # async fn example(lease: leased_client::Lease) {
    /// use leased_client::State;
    ///
    /// let mut state = lease.state();
    /// loop {
    ///     match state.changed().await {
    ///         State::Held => println!("on again"),
    ///         State::Jeopardy => println!("no word from a daemon: pausing"),
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

    /// Waits until the key may not be acted on any more, and tells why: [`State::Jeopardy`] or [`State::Lost`].
    ///
    /// A lease in jeopardy may come back. Who would rather wait for that uses [`lost_for_good`](Self::lost_for_good), and
    /// does not act on the key meanwhile.
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
            // The deadline moves unheard; whoever else tells of it may be late.
            let deadline = self.holding.deadline();
            tokio::select! {
                state = self.holding.changed(State::Held) => return state,
                () = deadline.reached() => {}
            }
        }
    }

    /// Waits until a daemon has said that the lease is gone, through any number of jeopardies.
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

    /// A token that is cancelled as soon as the key may not be acted on any more, and stays so: for work that is spread over
    /// tasks.
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

    /// Why no daemon has confirmed the lease lately, for people; nothing if all is well.
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

    /// Runs `work` for as long as the key may be acted on, and drops it when that is over.
    ///
    /// A future can be dropped only where it awaits. So what blocks its thread goes on, and so does what it has given to others:
    /// spawned tasks, `spawn_blocking`, threads, processes. Give such work [`stop_token`](Self::stop_token) or a look at
    /// [`is_held`](Self::is_held) between its steps, wait for its end within `work`, and send [`token`](Self::token) with each of
    /// its writes, so that what comes too late is refused.
    ///
    /// # Errors
    /// [`Error::Jeopardy`] or [`Error::Lost`] if the work was stopped, or not begun. [`Error::EndedLate`] if it ended by itself but
    /// only when the lease could not be relied on any more; what it returned is dropped.
    ///
    /// ```no_run
    /// # async fn example(lease: leased_client::Lease) -> Result<(), leased_client::Error> {
    /// let sum = lease.run(async { 1 + 1 }).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn run<T>(&self, work: impl Future<Output = T>) -> Result<T, Error> {
        let jeopardy = || self.trouble().unwrap_or_else(|| "no daemon has confirmed it".to_owned());
        tokio::select! {
            biased;
            state = self.lost() => Err(match state {
                State::Lost(loss) => Error::Lost(loss),
                State::Held | State::Jeopardy => Error::Jeopardy { cause: jeopardy() },
            }),
            // The work may have kept this task from looking at the clock.
            done = work => match self.holding.state() {
                State::Held => Ok(done),
                State::Jeopardy => Err(Error::EndedLate { cause: jeopardy() }),
                State::Lost(loss) => Err(Error::EndedLate { cause: loss.to_string() }),
            },
        }
    }

    /// Gives the lease back. When this returns, the next in line holds the key. The lease counts as lost from the call on, for all
    /// who share it; giving it back again does nothing, and does not wait for the first.
    ///
    /// # Errors
    /// [`Error::Lost`] if it was lost before: what was done under it may have met another holder.
    /// [`Error::Unavailable`] if no daemon answers; the lease then runs out by itself. Dropping the future leaves the rest
    /// to the background.
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
        let released = self.client.shared().release(lease, Acquired::Known).await;
        if !matches!(released, Err(Error::Unavailable { .. })) {
            unknown.lease = None;
        }
        released
    }

    /// Stops keeping the lease alive without giving it back, and returns its id: somebody else goes on touching it, or it
    /// runs out.
    ///
    /// ```no_run
    /// # async fn example(client: leased_client::Client, lease: leased_client::Lease) -> Result<(), leased_client::Error> {
    /// let (key, id) = (lease.key().to_owned(), lease.detach());
    /// let remaining = client.touch(&key, id).await?;
    /// # Ok(())
    /// # }
    /// ```
    #[must_use = "without the id nobody can touch or release the lease"]
    pub fn detach(self) -> LeaseId {
        self.leave();
        self.is_over.store(true, Ordering::Relaxed);
        self.id()
    }

    /// Not touched any more, and not believed in.
    fn leave(&self) {
        self.client.shared().holdings.remove(self.holding.id);
        self.holding.lose(Loss::Released);
        self.slot.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let was_lost = matches!(self.holding.state(), State::Lost(_));
        self.leave();
        if !self.is_over.load(Ordering::Relaxed) && !was_lost {
            self.client.release_in_background(self.holding.lease_ref(), self.holding.ttl, Acquired::Known);
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

/// How a process stands to its lease, as it changes. Nobody has to read it: only the latest state is kept.
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

    /// How things stand now, by the clock.
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

    /// Waits for a state other than the one that this watch has seen last. After [`State::Lost`] none comes.
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

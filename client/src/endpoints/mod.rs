//! The daemons of a client: which one it uses, when it switches to another, and when it returns.
//! Independent of leases.
//!
//! An endpoint is what the user names. A host name with several addresses stands for several
//! daemons. Each client orders all daemons at random, those of the likelier address family first.
//! It uses the first daemon, switches to the next when that one fails, and returns to the first
//! within minutes once that one serves again. So the clients of a fleet are spread over all daemons
//! again after any daemon has been down.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::{Notify, OnceCell, watch};
use tokio::time::{Instant, sleep};
use tonic::Status;
use tonic::transport::Uri;

use crate::daemon::{Daemon, Dial, IDLE, Slot};
use crate::error::{Error, Failure};
use crate::lock::lock;

/// Sends a call until a daemon answers it.
mod call;
/// Turns host names into daemons.
mod names;
/// Keeps daemons of different stores apart.
mod stores;

pub(crate) use call::{Answer, PREVIOUS_ATTEMPTS, Pauses};
use names::Resolving;
use stores::{PROBE_TIMEOUT, STORE};

/// The shortest pause between two probes of the daemons that come before the one in use. The
/// longest pause is three times this.
const RETURN: Duration = Duration::from_secs(60);

/// An endpoint as the user names it.
#[derive(Clone)]
pub(crate) struct Source {
    pub(crate) name: String,
    pub(crate) reach: Reach,
}

/// How to reach an endpoint.
#[derive(Clone)]
pub(crate) enum Reach {
    /// By a host name, which may have several addresses, and different ones later.
    Name { url: Uri, host: String, port: u16 },
    /// Over channels that this function makes.
    Dial(Dial),
}

/// All daemons of a client. One is preferred until it fails.
pub(crate) struct Endpoints {
    names: Vec<String>,
    resolving: Vec<Resolving>,
    state: Mutex<State>,
    /// How long a call may take, including retries but not the wait in a queue.
    timeout: Duration,
    /// Notified when the client has returned to a daemon that it prefers. The keepalive stream may
    /// be open at another daemon.
    pub(crate) returned: Notify,
    /// Notified of failures. After a failure names are looked up again, because their addresses may
    /// have changed.
    failures: watch::Sender<()>,
    /// Notified of look-ups that have ended.
    look_ups: watch::Sender<()>,
    /// Set once every daemon has been asked which store it serves.
    compared: OnceCell<()>,
    /// Whether two daemons serve different stores.
    is_mixed: AtomicBool,
}

#[derive(Default)]
struct State {
    /// All daemons, in the order in which the client tries them.
    daemons: Vec<Arc<Daemon>>,
    /// The position of the preferred daemon.
    preferred: usize,
    /// The store that the client's leases are in, and the name of a daemon that serves it.
    store: Option<(String, String)>,
    /// A host whose last look-up failed, and why.
    unknown_name: Option<(String, String)>,
}

impl Endpoints {
    /// Returns the daemons at `sources`, which must not be empty. [`maintain`](Self::maintain) must
    /// run in the background.
    pub(crate) fn new(sources: Vec<Source>, timeout: Duration) -> Self {
        let names = sources.iter().map(|source| source.name.clone()).collect();
        let (mut state, mut resolving) = (State::default(), Vec::new());
        for Source { name, reach } in sources {
            match reach {
                Reach::Dial(dial) => state.daemons.push(Arc::new(Daemon::new(name, 0, dial))),
                Reach::Name { url, host, port } => {
                    let (found, is_looked_up) = (Mutex::default(), AtomicBool::new(false));
                    resolving.push(Resolving { name, url, host, port, found, is_looked_up });
                }
            }
        }
        state.daemons.sort_by_key(|daemon| daemon.order);
        Self {
            names,
            resolving,
            state: Mutex::new(state),
            timeout,
            returned: Notify::new(),
            failures: watch::Sender::new(()),
            look_ups: watch::Sender::new(()),
            compared: OnceCell::new(),
            is_mixed: AtomicBool::new(false),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// The number of daemons, at least 1.
    pub(crate) fn len(&self) -> usize {
        self.state().daemons.len().max(1)
    }

    /// Returns the daemon to use. Waits for a look-up if no daemon is known yet.
    ///
    /// # Errors
    /// The reason why there is no daemon.
    pub(crate) async fn pick(&self) -> Result<Arc<Daemon>, String> {
        let mut look_ups = self.look_ups.subscribe();
        if let Some(daemon) = self.state().pick() {
            return Ok(daemon);
        }
        if self.state().unknown_name.is_some() {
            // The failed look-up may have been long ago. This starts another one.
            self.failures.send_replace(());
        }
        let _ = look_ups.changed().await;
        let found = self.state().pick();
        found.ok_or_else(|| self.silence())
    }

    /// Explains why no daemon has answered.
    fn silence(&self) -> String {
        let state = self.state();
        match &state.unknown_name {
            Some((host, error)) if state.daemons.is_empty() => format!("{host}: {error}"),
            _ => "no answer in time".to_owned(),
        }
    }

    /// Whether `daemon` is the one to use.
    pub(crate) fn is_preferred(&self, daemon: &Arc<Daemon>) -> bool {
        self.state().pick().is_none_or(|preferred| Arc::ptr_eq(&preferred, daemon))
    }

    /// Prefers the next daemon from now on, unless another call has already switched away from
    /// `daemon`.
    pub(crate) fn avoid(&self, daemon: &Arc<Daemon>) {
        let mut state = self.state();
        if let Some(position) = state.position(daemon)
            && state.pick().is_some_and(|preferred| Arc::ptr_eq(&preferred, daemon))
        {
            state.preferred = (position + 1) % state.daemons.len();
        }
        drop(state);
        self.failures.send_replace(());
    }

    /// Returns what a failed attempt over `slot` means. Switches to another daemon unless `status`
    /// is a daemon's answer.
    pub(crate) fn fail(&self, slot: &Slot, status: &Status) -> Failure {
        let noted = match status.metadata().contains_key(STORE) {
            true => self.note_store(&slot.daemon, status.metadata()),
            // No daemon answered, or one of an earlier version did.
            false => Ok(()),
        };
        let failure = noted.map_or_else(Failure::Useless, |()| Failure::of(status, &slot.daemon.name));
        self.switch(slot, &failure);
        failure
    }

    /// Switches to another daemon and another connection, unless `failure` is a daemon's answer.
    pub(crate) fn switch(&self, slot: &Slot, failure: &Failure) {
        if let Failure::Final(_) = failure {
            return;
        }
        // The connection may be at fault, so it is retired. A different daemon may answer at this
        // address next, so the address is probed again.
        slot.retire();
        slot.daemon.forget();
        if let Failure::Useless(error) = failure {
            tracing::warn!(endpoint = slot.daemon.name, %error, "an endpoint cannot be used");
            // Before `bar`, because `avoid` switches away only from the daemon in use, and a barred
            // daemon is not in use.
            self.avoid(&slot.daemon);
            slot.daemon.bar(error.clone());
        } else {
            slot.daemon.unbar();
            self.avoid(&slot.daemon);
        }
    }

    /// All daemons except those for which `is_excluded` is true.
    fn all_but(&self, is_excluded: impl Fn(&Daemon) -> bool) -> Vec<Arc<Daemon>> {
        self.state().daemons.iter().filter(|daemon| !is_excluded(daemon)).cloned().collect()
    }

    /// Why the daemon to use is barred. `None` while some daemon is not barred.
    pub(crate) fn useless(&self) -> Option<Error> {
        let daemon = self.state().pick()?;
        daemon.barred()
    }

    /// `cause` together with the reasons why barred daemons were not tried.
    fn with_barred(&self, cause: String) -> String {
        let state = self.state();
        let barred = state.daemons.iter().filter_map(|daemon| daemon.barred()).map(|error| error.to_string());
        std::iter::once(cause).chain(barred).collect::<Vec<_>>().join("; ")
    }

    /// Looks up names, closes idle connections, and returns to the first daemon, for as long as the
    /// future is polled.
    pub(crate) async fn maintain(&self) {
        let names = join_all(self.resolving.iter().map(|name| self.resolve(name)));
        tokio::join!(names, self.close_idle(), self.return_to_first());
    }

    async fn close_idle(&self) {
        loop {
            sleep(IDLE / 2).await;
            let now = Instant::now();
            let preferred = self.state().pick();
            for daemon in self.all_but(|_| false) {
                let is_first = preferred.as_ref().is_some_and(|preferred| Arc::ptr_eq(preferred, &daemon));
                daemon.close_idle(now, is_first);
            }
        }
    }

    /// Every one to three minutes, probes the daemons that come before the one in use, and returns
    /// to the first that serves.
    async fn return_to_first(&self) {
        loop {
            sleep(RETURN.mul_f64(1.0 + 2.0 * fastrand::f64())).await;
            let before = {
                let state = self.state();
                state.daemons[..state.preferred.min(state.daemons.len())].to_vec()
            };
            for daemon in before {
                if self.probe(&daemon, Instant::now() + PROBE_TIMEOUT).await.is_ok() {
                    let mut state = self.state();
                    if let Some(position) = state.position(&daemon) {
                        state.preferred = position;
                        tracing::debug!(daemon = daemon.name, "returned to a preferred daemon");
                        self.returned.notify_one();
                    }
                    break;
                }
            }
        }
    }
}

impl State {
    /// The daemon to use: the preferred daemon or the next one that is not barred. If all are
    /// barred, the preferred one.
    fn pick(&self) -> Option<Arc<Daemon>> {
        let count = self.daemons.len();
        let in_turn = || (0..count).map(|step| &self.daemons[(self.preferred + step) % count]);
        in_turn().find(|daemon| daemon.barred().is_none()).or_else(|| in_turn().next()).cloned()
    }

    fn position(&self, daemon: &Arc<Daemon>) -> Option<usize> {
        self.daemons.iter().position(|other| Arc::ptr_eq(other, daemon))
    }
}

impl std::fmt::Debug for Source {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("Source").field(&self.name).finish()
    }
}

impl std::fmt::Debug for Endpoints {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Endpoints").field("names", &self.names).finish_non_exhaustive()
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test that meets an unexpected failure should stop there")]
mod tests;

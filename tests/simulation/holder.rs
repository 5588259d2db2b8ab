//! Programs that use the client: they try, wait, give up, hold, release, drop and crash.

use std::time::Duration;

use leased_client::{Client, Error, Lease, State};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::history::{History, Mode, now};
use super::world::KEYS;
use crate::support::ms;

/// A program on its own host.
#[derive(Clone)]
pub(crate) struct Holder {
    pub(crate) name: String,
    pub(crate) client: Client,
    pub(crate) history: History,
    /// Cancelled when all programs must end, whatever they are doing.
    pub(crate) over: CancellationToken,
    /// Whether the run has no faults. Then no lease may be lost.
    pub(crate) is_faultless: bool,
}

impl Holder {
    /// Acquires and releases leases until `over` is cancelled. Then it waits until the client has
    /// released everything.
    pub(crate) async fn live(self) {
        let rounds = async {
            loop {
                self.round().await;
                sleep(between(0, 300)).await;
            }
        };
        self.over.run_until_cancelled(rounds).await;
        self.client.settle().await;
        std::future::pending::<()>().await;
    }

    async fn round(&self) {
        let key = KEYS[fastrand::usize(..KEYS.len())];
        let mut acquire = self.client.acquire(key).ttl(between(1000, 3000));
        let mode = if fastrand::u8(..5) == 0 { Mode::Shared(2) } else { Mode::Exclusive };
        if let Mode::Shared(limit) = mode {
            acquire = acquire.shared(limit);
        }
        if fastrand::u8(..3) > 0 {
            acquire = acquire.wait(between(100, 6000));
        }
        let patience = if fastrand::u8(..4) == 0 { between(1, 2000) } else { Duration::from_secs(60) };
        match timeout(patience, acquire.into_future()).await {
            Ok(Ok(lease)) => self.hold(key, lease, mode).await,
            Ok(Err(Error::Held(_))) | Err(_) => {}
            Ok(Err(Error::Unavailable { .. } | Error::Lost(_))) if !self.is_faultless => {}
            Ok(Err(error)) => self.history.fail(now(), format_args!("{} received: {error}", self.name)),
        }
    }

    async fn hold(&self, key: &'static str, lease: Lease, mode: Mode) {
        let until = Instant::now() + between(50, if fastrand::u8(..4) == 0 { 5000 } else { 1500 });
        loop {
            let belief = self.history.believe(&self.name, key, lease.token(), mode);
            let worked = lease.run(self.work(key, &lease, mode, until)).await;
            drop(belief);
            match worked {
                Ok(()) => break,
                // A lease in jeopardy may be confirmed again.
                Err(Error::Jeopardy { .. }) if self.is_confirmed_again(&lease, until).await => {}
                Err(error) if self.is_faultless => {
                    self.history.fail(now(), format_args!("{} lost {key}: {error}", self.name));
                }
                Err(_) => break,
            }
        }
        match fastrand::u8(..4) {
            0 => drop(lease),
            1 => drop(timeout(between(0, 20), lease.release()).await),
            _ => drop(lease.release().await),
        }
    }

    /// Waits until a lease in jeopardy is held again. Returns `false` if it is lost, or at `until`.
    async fn is_confirmed_again(&self, lease: &Lease, until: Instant) -> bool {
        let mut state = lease.state();
        let back = async {
            loop {
                match state.current() {
                    State::Held => return true,
                    State::Lost(_) => return false,
                    _ => drop(state.changed().await),
                }
            }
        };
        timeout_at(until, back).await.unwrap_or(false)
    }

    /// Writes to the resource from time to time. Some writes take up to 3 s to arrive.
    async fn work(&self, key: &'static str, lease: &Lease, mode: Mode, until: Instant) {
        let token = lease.token();
        while Instant::now() < until {
            sleep(between(10, 200)).await;
            if mode != Mode::Exclusive || !lease.is_held() {
                continue;
            }
            let late = if fastrand::u8(..8) == 0 { between(0, 3000) } else { Duration::ZERO };
            let history = self.history.clone();
            tokio::spawn(async move {
                sleep(late).await;
                history.write(key, token);
            });
        }
    }
}

/// Returns a random duration between two numbers of milliseconds.
pub(crate) fn between(least: u64, most: u64) -> Duration {
    ms(fastrand::u64(least..=most))
}

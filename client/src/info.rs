//! Keys as anyone may see them.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use leased_proto::v1;

use crate::token::FencingToken;

/// A key: who holds it and who waits for it.
///
/// ```no_run
/// # async fn example(client: leased_client::Client) -> Result<(), leased_client::Error> {
/// let key = client.get("reports/daily").await?;
/// println!("{} held, {} waiting", key.holders.len(), key.waiters.len());
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeyInfo {
    /// The key.
    pub key: String,
    /// How it stands.
    pub state: KeyState,
    /// The token of the latest grant.
    pub token: FencingToken,
    /// Who holds it: one, or several that share it.
    pub holders: Vec<HolderInfo>,
    /// Who waits for it, the next one first.
    pub waiters: Vec<WaiterInfo>,
    /// Nobody is admitted before this, by the store's clock.
    pub blocked_until: Option<SystemTime>,
}

/// How a key stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeyState {
    /// Nobody holds it.
    Free,
    /// It is held in time.
    Held,
    /// The holder's time is over, and nobody has taken the key.
    Lapsed,
}

/// Whether a holder is alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mode {
    /// Alone.
    Exclusive,
    /// With others.
    Shared,
}

/// A holder.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HolderInfo {
    /// Its label.
    pub owner: String,
    /// Its token.
    pub token: FencingToken,
    /// Whether it is alone.
    pub mode: Mode,
    /// If it shares the key: how many may hold it while this one does, itself included; 0 for any number.
    pub shared_limit: u32,
    /// How long a touch lasts.
    pub ttl: Duration,
    /// How long it holds unless it touches.
    pub remaining: Duration,
    /// Since when, by the store's clock.
    pub acquired_at: SystemTime,
    /// Until when unless it touches, by the store's clock: for people and logs, not for deadlines.
    pub expires_at: SystemTime,
    /// Its other labels.
    pub metadata: BTreeMap<String, String>,
}

/// A waiter.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct WaiterInfo {
    /// Its label.
    pub owner: String,
    /// Whether it wants the key alone.
    pub mode: Mode,
    /// If it would share the key: how many may hold it then, itself included; 0 for any number.
    pub shared_limit: u32,
    /// Since when it stands in line, by the store's clock.
    pub since: SystemTime,
}

impl From<v1::Lease> for KeyInfo {
    fn from(lease: v1::Lease) -> Self {
        Self {
            state: match lease.state() {
                v1::LeaseState::Held => KeyState::Held,
                v1::LeaseState::Lapsed => KeyState::Lapsed,
                v1::LeaseState::Free | v1::LeaseState::Unspecified => KeyState::Free,
            },
            token: FencingToken::new(lease.fencing_token),
            holders: lease.holders.into_iter().map(HolderInfo::from).collect(),
            waiters: lease.waiters.into_iter().map(WaiterInfo::from).collect(),
            blocked_until: lease.blocked_until.and_then(|until| until.try_into().ok()),
            key: lease.key,
        }
    }
}

impl From<v1::Holder> for HolderInfo {
    fn from(holder: v1::Holder) -> Self {
        Self {
            token: FencingToken::new(holder.fencing_token),
            mode: Mode::from(holder.mode()),
            shared_limit: holder.shared_limit,
            ttl: span(holder.ttl),
            remaining: span(holder.remaining),
            acquired_at: time(holder.acquire_time),
            expires_at: time(holder.expire_time),
            metadata: holder.metadata.into_iter().collect(),
            owner: holder.owner,
        }
    }
}

impl From<v1::Waiter> for WaiterInfo {
    fn from(waiter: v1::Waiter) -> Self {
        Self {
            mode: Mode::from(waiter.mode()),
            shared_limit: waiter.shared_limit,
            since: time(waiter.since),
            owner: waiter.owner,
        }
    }
}

impl From<v1::Mode> for Mode {
    fn from(mode: v1::Mode) -> Self {
        match mode {
            v1::Mode::Shared => Self::Shared,
            v1::Mode::Exclusive | v1::Mode::Unspecified => Self::Exclusive,
        }
    }
}

/// A duration of the API; nothing if there is none, or one below nothing.
pub(crate) fn span(duration: Option<prost_types::Duration>) -> Duration {
    // prost's own conversion negates, which overflows for the least number there is.
    let parts = duration.map(|duration| (u64::try_from(duration.seconds), u32::try_from(duration.nanos)));
    match parts {
        Some((Ok(seconds), Ok(nanos))) => Duration::new(seconds, nanos.min(999_999_999)),
        _ => Duration::ZERO,
    }
}

fn time(time: Option<prost_types::Timestamp>) -> SystemTime {
    time.and_then(|time| time.try_into().ok()).unwrap_or(SystemTime::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_time_that_is_told_overflows() {
        for seconds in [i64::MIN, -1, 0, 1, i64::MAX] {
            for nanos in [i32::MIN, -1, 0, 1, i32::MAX] {
                let told = time(Some(prost_types::Timestamp { seconds, nanos }));
                assert!(told >= SystemTime::UNIX_EPOCH || seconds < 0 || nanos < 0);
                let span = span(Some(prost_types::Duration { seconds, nanos }));
                assert!(span.is_zero() || (seconds >= 0 && nanos >= 0));
            }
        }
    }
}

//! Keys with their holders and waiters, as any client may see them.

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
    /// Whether the key is held.
    pub state: KeyState,
    /// The token of the latest grant.
    pub token: FencingToken,
    /// The holders: none, one, or several that share the key.
    pub holders: Vec<HolderInfo>,
    /// The queue, the next waiter first.
    pub waiters: Vec<WaiterInfo>,
    /// Until when a `min_hold` blocks the key, by the store's clock.
    pub blocked_until: Option<SystemTime>,
}

/// Whether a key is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeyState {
    /// The key has no holder.
    Free,
    /// The key is held.
    Held,
    /// The holder's lease has lapsed, and no other holder has taken the key.
    Lapsed,
}

/// Whether a lease admits other holders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mode {
    /// There is one holder.
    Exclusive,
    /// There may be other shared holders.
    Shared,
}

/// A holder.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HolderInfo {
    /// The holder's label.
    pub owner: String,
    /// The holder's fencing token.
    pub token: FencingToken,
    /// Whether the lease admits other holders.
    pub mode: Mode,
    /// For a shared lease: the most holders of the key while it is held, itself included; 0 for any
    /// number.
    pub shared_limit: u32,
    /// For how long a touch renews the lease.
    pub ttl: Duration,
    /// How long the lease lasts without a touch.
    pub remaining: Duration,
    /// When the lease was granted, by the store's clock.
    pub acquired_at: SystemTime,
    /// When the lease lapses without a touch, by the store's clock. For people and logs, not for
    /// deadlines.
    pub expires_at: SystemTime,
    /// The holder's other labels.
    pub metadata: BTreeMap<String, String>,
}

/// A waiter.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct WaiterInfo {
    /// The waiter's label.
    pub owner: String,
    /// Whether the lease that is waited for admits other holders.
    pub mode: Mode,
    /// For a shared lease: the most holders of the key while it is held, itself included; 0 for any
    /// number.
    pub shared_limit: u32,
    /// When the waiter joined the queue, by the store's clock.
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

/// Converts a duration of the API. A missing or negative one is zero.
pub(crate) fn span(duration: Option<prost_types::Duration>) -> Duration {
    // prost's own conversion negates, which overflows for the smallest number.
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
    fn no_time_in_an_answer_overflows() {
        for seconds in [i64::MIN, -1, 0, 1, i64::MAX] {
            for nanos in [i32::MIN, -1, 0, 1, i32::MAX] {
                let converted = time(Some(prost_types::Timestamp { seconds, nanos }));
                assert!(converted >= SystemTime::UNIX_EPOCH || seconds < 0 || nanos < 0);
                let span = span(Some(prost_types::Duration { seconds, nanos }));
                assert!(span.is_zero() || (seconds >= 0 && nanos >= 0));
            }
        }
    }
}

//! Answers as JSON: names in snake_case, times as RFC 3339, durations in milliseconds. Scripts rely
//! on every field name and every string in this file (docs/leasectl.md).

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use humantime::format_rfc3339_millis;
use leased_client::{ChangeKind, HolderInfo, KeyInfo, KeyState, Mode, WaiterInfo, WatchEvent};
use serde::Serialize;

/// The answer of `acquire`. No other answer has a lease id.
#[derive(Debug, Serialize)]
pub(crate) struct Acquired<'a> {
    pub(crate) key: &'a str,
    pub(crate) lease_id: String,
    pub(crate) token: i64,
    pub(crate) ttl_ms: u64,
}

/// The answer of `touch`.
#[derive(Debug, Serialize)]
pub(crate) struct Touched<'a> {
    pub(crate) key: &'a str,
    pub(crate) remaining_ms: u64,
}

/// The answer of `release`.
#[derive(Debug, Serialize)]
pub(crate) struct Released<'a> {
    pub(crate) key: &'a str,
    pub(crate) released: bool,
}

/// The answer of `revoke`.
#[derive(Debug, Serialize)]
pub(crate) struct Revoked<'a> {
    pub(crate) key: &'a str,
    pub(crate) revoked: u32,
}

/// A failure: the value of the field `error` in the object that is printed.
#[derive(Debug, Serialize)]
pub(crate) struct ErrorObject<'a> {
    pub(crate) reason: &'static str,
    pub(crate) message: &'a str,
    pub(crate) exit_code: u8,
    /// What blocks the key, as the daemon names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) blocked_by: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) holder: Option<HolderObject<'a>>,
}

/// The holder of a key that could not be acquired.
#[derive(Debug, Serialize)]
pub(crate) struct HolderObject<'a> {
    pub(crate) owner: &'a str,
    pub(crate) token: i64,
    pub(crate) remaining_ms: u64,
}

/// A key: the answer of `get`, an element of `ls`, and part of an event.
#[derive(Debug, Serialize)]
pub(crate) struct Key<'a> {
    key: &'a str,
    state: &'static str,
    token: i64,
    holders: Vec<Holder<'a>>,
    waiters: Vec<Waiter<'a>>,
    blocked_until: Option<String>,
}

#[derive(Debug, Serialize)]
struct Holder<'a> {
    owner: &'a str,
    token: i64,
    mode: &'static str,
    shared_limit: Option<u32>,
    ttl_ms: u64,
    remaining_ms: u64,
    acquired_at: String,
    expires_at: String,
    metadata: &'a BTreeMap<String, String>,
}

#[derive(Debug, Serialize)]
struct Waiter<'a> {
    owner: &'a str,
    mode: &'static str,
    shared_limit: Option<u32>,
    since: String,
}

/// An event of `watch`.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum Event<'a> {
    Snapshot { key: Key<'a> },
    SnapshotEnd,
    Change { kind: &'static str, key: Key<'a> },
    Interrupted { cause: &'a str },
}

impl<'a> From<&'a KeyInfo> for Key<'a> {
    fn from(info: &'a KeyInfo) -> Self {
        Self {
            key: &info.key,
            state: state(info.state),
            token: info.token.get(),
            holders: info.holders.iter().map(Holder::from).collect(),
            waiters: info.waiters.iter().map(Waiter::from).collect(),
            blocked_until: info.blocked_until.map(time),
        }
    }
}

impl<'a> From<&'a HolderInfo> for Holder<'a> {
    fn from(info: &'a HolderInfo) -> Self {
        Self {
            owner: &info.owner,
            token: info.token.get(),
            mode: mode(info.mode),
            shared_limit: shared_limit(info.mode, info.shared_limit),
            ttl_ms: milliseconds(info.ttl),
            remaining_ms: milliseconds(info.remaining),
            acquired_at: time(info.acquired_at),
            expires_at: time(info.expires_at),
            metadata: &info.metadata,
        }
    }
}

impl<'a> From<&'a WaiterInfo> for Waiter<'a> {
    fn from(info: &'a WaiterInfo) -> Self {
        Self {
            owner: &info.owner,
            mode: mode(info.mode),
            shared_limit: shared_limit(info.mode, info.shared_limit),
            since: time(info.since),
        }
    }
}

impl<'a> Event<'a> {
    /// Converts an event. `None` for an event of a later version.
    pub(crate) fn of(event: &'a WatchEvent) -> Option<Self> {
        Some(match event {
            WatchEvent::Snapshot(key) => Self::Snapshot { key: key.into() },
            WatchEvent::SnapshotEnd => Self::SnapshotEnd,
            WatchEvent::Change { kind, key } => Self::Change { kind: change(*kind), key: key.into() },
            WatchEvent::Interrupted { cause } => Self::Interrupted { cause },
            _ => return None,
        })
    }
}

/// The name of a state.
pub(crate) fn state(state: KeyState) -> &'static str {
    match state {
        KeyState::Held => "held",
        KeyState::Lapsed => "lapsed",
        _ => "free",
    }
}

/// The name of a mode.
pub(crate) fn mode(mode: Mode) -> &'static str {
    match mode {
        Mode::Shared => "shared",
        _ => "exclusive",
    }
}

/// The limit of a shared lease. An exclusive lease has none.
fn shared_limit(mode: Mode, limit: u32) -> Option<u32> {
    (mode == Mode::Shared).then_some(limit)
}

/// The name of a change.
pub(crate) fn change(kind: ChangeKind) -> &'static str {
    match kind {
        ChangeKind::Granted => "granted",
        ChangeKind::Released => "released",
        ChangeKind::Lapsed => "lapsed",
        ChangeKind::Revoked => "revoked",
        ChangeKind::Queued => "queued",
        ChangeKind::LeftQueue => "left_queue",
        _ => "other",
    }
}

pub(crate) fn milliseconds(duration: Duration) -> u64 {
    duration.as_millis().try_into().unwrap_or(u64::MAX)
}

/// Formats a time as RFC 3339, in UTC.
pub(crate) fn time(time: SystemTime) -> String {
    format_rfc3339_millis(time).to_string()
}

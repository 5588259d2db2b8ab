//! Encodes records as protocol buffers, so that a later version can add fields and still read the
//! records of this one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use prost::{Enumeration, Message};

use crate::lease::{
    Acquisition, Departure, FencingToken, Holder, Key, LeaseId, MAX_SHARED_HOLDERS, Mode, Reason, Record,
    Timestamp, Ttl, Waiter,
};

/// The stored bytes of `key` are not a record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the record of {key:?} cannot be read: {what}")]
pub(super) struct Unreadable {
    pub(super) key: Key,
    pub(super) what: String,
}

#[derive(Clone, PartialEq, Message)]
struct StoredRecord {
    #[prost(int64, tag = "1")]
    token: i64,
    #[prost(int64, tag = "2")]
    rev: i64,
    #[prost(int64, optional, tag = "3")]
    blocked_until: Option<i64>,
    #[prost(message, repeated, tag = "4")]
    holders: Vec<StoredHolder>,
    #[prost(message, repeated, tag = "5")]
    waiters: Vec<StoredWaiter>,
    #[prost(message, repeated, tag = "6")]
    departures: Vec<StoredDeparture>,
}

/// A lease id in two halves. Decoding integers allocates nothing, while a field of bytes would
/// allocate for each id.
#[derive(Clone, Copy, PartialEq, Message)]
struct StoredId {
    #[prost(fixed64, tag = "1")]
    high: u64,
    #[prost(fixed64, tag = "2")]
    low: u64,
}

#[derive(Clone, PartialEq, Message)]
struct StoredHolder {
    #[prost(message, required, tag = "1")]
    id: StoredId,
    #[prost(string, tag = "2")]
    owner: String,
    #[prost(btree_map = "string, string", tag = "3")]
    metadata: BTreeMap<String, String>,
    #[prost(enumeration = "StoredMode", tag = "4")]
    mode: i32,
    #[prost(uint64, tag = "5")]
    ttl_ms: u64,
    #[prost(int64, tag = "6")]
    token: i64,
    #[prost(int64, tag = "7")]
    acquired_at: i64,
    #[prost(int64, tag = "8")]
    expires_at: i64,
    #[prost(uint64, tag = "9")]
    min_hold_ms: u64,
    #[prost(uint32, tag = "10")]
    shared_limit: u32,
    #[prost(bool, tag = "11")]
    repeated: bool,
}

#[derive(Clone, PartialEq, Message)]
struct StoredWaiter {
    #[prost(message, required, tag = "1")]
    id: StoredId,
    #[prost(string, tag = "2")]
    owner: String,
    #[prost(btree_map = "string, string", tag = "3")]
    metadata: BTreeMap<String, String>,
    #[prost(enumeration = "StoredMode", tag = "4")]
    mode: i32,
    #[prost(uint64, tag = "5")]
    ttl_ms: u64,
    #[prost(uint32, tag = "6")]
    shared_limit: u32,
    #[prost(uint64, tag = "7")]
    min_hold_ms: u64,
    #[prost(bool, tag = "8")]
    wait: bool,
    #[prost(int64, tag = "9")]
    since: i64,
    #[prost(int64, tag = "10")]
    expires_at: i64,
    #[prost(bool, tag = "11")]
    repeated: bool,
}

#[derive(Clone, PartialEq, Message)]
struct StoredDeparture {
    #[prost(message, required, tag = "1")]
    id: StoredId,
    #[prost(enumeration = "StoredReason", tag = "2")]
    reason: i32,
    #[prost(int64, tag = "3")]
    at: i64,
    #[prost(bool, tag = "4")]
    lasting: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Enumeration)]
enum StoredMode {
    /// What an absent field decodes to.
    Unknown = 0,
    Exclusive = 1,
    Shared = 2,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Enumeration)]
enum StoredReason {
    /// What an absent field decodes to.
    Unknown = 0,
    Released = 1,
    Displaced = 2,
    Revoked = 3,
    Withdrawn = 4,
    Settled = 5,
}

/// Appends the encoded record to `bytes`, without its key: the table stores that.
pub(super) fn encode(record: &Record, bytes: &mut Vec<u8>) {
    let stored = StoredRecord {
        token: record.token.0,
        rev: record.rev,
        blocked_until: record.blocked_until.map(|at| at.0),
        holders: record.holders.iter().map(encode_holder).collect(),
        waiters: record.waiters.iter().map(encode_waiter).collect(),
        departures: record.departures.iter().map(encode_departure).collect(),
    };
    stored.encode(bytes).expect("a vector grows");
}

/// Decodes the record of `key`.
pub(super) fn decode(key: &Key, bytes: &[u8]) -> Result<Record, Unreadable> {
    let unreadable = |what: String| Unreadable { key: key.clone(), what };
    let stored = StoredRecord::decode(bytes).map_err(|error| unreadable(error.to_string()))?;
    let missing = |what: &str| unreadable(format!("{what} is missing or of another kind"));
    Ok(Record {
        key: key.clone(),
        token: FencingToken(stored.token),
        rev: stored.rev,
        blocked_until: stored.blocked_until.map(Timestamp),
        holders: decode_all(stored.holders, decode_holder).ok_or_else(|| missing("a holder"))?,
        waiters: decode_all(stored.waiters, decode_waiter).ok_or_else(|| missing("a waiter"))?,
        departures: decode_all(stored.departures, decode_departure).ok_or_else(|| missing("a departure"))?,
    })
}

fn decode_all<S, T>(stored: Vec<S>, decode: impl Fn(S) -> Option<T>) -> Option<Vec<T>> {
    // `collect` would not know the length behind the `Option`s and allocate room for four. Most
    // records have one holder.
    let mut all = Vec::with_capacity(stored.len());
    for one in stored {
        all.push(decode(one)?);
    }
    Some(all)
}

fn encode_holder(holder: &Holder) -> StoredHolder {
    StoredHolder {
        id: encode_id(holder.id),
        owner: holder.owner.clone(),
        metadata: holder.metadata.clone(),
        mode: encode_mode(holder.mode).into(),
        ttl_ms: millis(holder.ttl.get()),
        token: holder.token.0,
        acquired_at: holder.acquired_at.0,
        expires_at: holder.expires_at.0,
        min_hold_ms: millis(holder.min_hold),
        shared_limit: holder.shared_limit,
        repeated: holder.repeated,
    }
}

fn decode_holder(stored: StoredHolder) -> Option<Holder> {
    Some(Holder {
        id: decode_id(stored.id),
        mode: decode_mode(stored.mode())?,
        owner: stored.owner,
        metadata: stored.metadata,
        ttl: Ttl::new(Duration::from_millis(stored.ttl_ms))?,
        token: FencingToken(stored.token),
        acquired_at: Timestamp(stored.acquired_at),
        expires_at: Timestamp(stored.expires_at),
        min_hold: Duration::from_millis(stored.min_hold_ms),
        // Records of earlier versions lack the field.
        shared_limit: if stored.shared_limit == 0 { MAX_SHARED_HOLDERS } else { stored.shared_limit },
        repeated: stored.repeated,
    })
}

fn encode_waiter(waiter: &Waiter) -> StoredWaiter {
    let acquisition = &waiter.acquisition;
    StoredWaiter {
        id: encode_id(acquisition.id),
        owner: acquisition.owner.clone(),
        metadata: acquisition.metadata.clone(),
        mode: encode_mode(acquisition.mode).into(),
        ttl_ms: millis(acquisition.ttl.get()),
        shared_limit: acquisition.shared_limit,
        min_hold_ms: millis(acquisition.min_hold),
        wait: acquisition.wait,
        since: waiter.since.0,
        expires_at: waiter.expires_at.0,
        repeated: acquisition.repeated,
    }
}

fn decode_waiter(stored: StoredWaiter) -> Option<Waiter> {
    let acquisition = Acquisition {
        id: decode_id(stored.id),
        mode: decode_mode(stored.mode())?,
        owner: stored.owner,
        metadata: stored.metadata,
        shared_limit: stored.shared_limit,
        ttl: Ttl::new(Duration::from_millis(stored.ttl_ms))?,
        min_hold: Duration::from_millis(stored.min_hold_ms),
        wait: stored.wait,
        repeated: stored.repeated,
    };
    Some(Waiter {
        acquisition: Arc::new(acquisition),
        since: Timestamp(stored.since),
        expires_at: Timestamp(stored.expires_at),
    })
}

fn encode_departure(departure: &Departure) -> StoredDeparture {
    let reason = match departure.reason {
        Reason::Released => StoredReason::Released,
        Reason::Displaced => StoredReason::Displaced,
        Reason::Revoked => StoredReason::Revoked,
        Reason::Withdrawn => StoredReason::Withdrawn,
        Reason::Settled => StoredReason::Settled,
    };
    let Departure { id, at, lasting, .. } = *departure;
    StoredDeparture { id: encode_id(id), reason: reason.into(), at: at.0, lasting }
}

fn decode_departure(stored: StoredDeparture) -> Option<Departure> {
    let reason = match stored.reason() {
        StoredReason::Unknown => return None,
        StoredReason::Released => Reason::Released,
        StoredReason::Displaced => Reason::Displaced,
        StoredReason::Revoked => Reason::Revoked,
        StoredReason::Withdrawn => Reason::Withdrawn,
        StoredReason::Settled => Reason::Settled,
    };
    let StoredDeparture { id, at, lasting, .. } = stored;
    Some(Departure { id: decode_id(id), reason, at: Timestamp(at), lasting })
}

fn encode_mode(mode: Mode) -> StoredMode {
    match mode {
        Mode::Exclusive => StoredMode::Exclusive,
        Mode::Shared => StoredMode::Shared,
    }
}

fn decode_mode(mode: StoredMode) -> Option<Mode> {
    match mode {
        StoredMode::Unknown => None,
        StoredMode::Exclusive => Some(Mode::Exclusive),
        StoredMode::Shared => Some(Mode::Shared),
    }
}

fn encode_id(id: LeaseId) -> StoredId {
    let both = u128::from_be_bytes(id.to_bytes());
    StoredId { high: (both >> 64) as u64, low: both as u64 }
}

fn decode_id(stored: StoredId) -> LeaseId {
    LeaseId::from((u128::from(stored.high) << 64 | u128::from(stored.low)).to_be_bytes())
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

//! What callers are told: answers, refusals as statuses, records as anyone may see them.

use std::collections::BTreeMap;
use std::time::Duration;

use leased_proto::{Reason as Refused, v1};
use tonic::Status;

use crate::lease::{Holder, Key, LeaseId, Mode, Reason, Snapshot, State, Timestamp, Waiter};
use crate::lessor::{Acquired, CallError, ChangeKind, Grant, Refusal, Touched, WatchEvent};
use crate::store::StoreError;

/// The largest message that comes in: a keepalive message that names all the leases of a stream.
pub(crate) const MAX_MESSAGE_BYTES: usize = 1024 * 1024;
/// The status of a message past the limit on messages.
pub(crate) fn oversized() -> Status {
    limit_exceeded("message_bytes", MAX_MESSAGE_BYTES)
}

/// What is said of a key whose record is damaged.
const UNREADABLE: &str = "the record of this key cannot be read or written; an operator must mend or delete it, and the daemon's log says why";

pub(crate) fn limit_exceeded(limit: &str, value: usize) -> Status {
    let message = format!("past the limit {limit} of {value}");
    Refused::LimitExceeded.status(message, [("limit", limit.to_owned()), ("value", value.to_string())])
}

pub(crate) fn acquired(key: &Key, answer: Acquired) -> Result<v1::AcquireResponse, Status> {
    match answer {
        Acquired::Granted(grant) => Ok(granted(key, &grant)),
        Acquired::Held(refusal) => Err(held(&refusal)),
        Acquired::QueueFull => {
            Err(Refused::QueueFull.status("the line of this key is full; try again later", []))
        }
        Acquired::Lost(reason) => Err(lost(Some(reason))),
    }
}

fn granted(key: &Key, grant: &Grant) -> v1::AcquireResponse {
    v1::AcquireResponse {
        lease: Some(lease_ref(key, grant.id)),
        fencing_token: grant.token.0,
        ttl: Some(to_duration(grant.ttl.get())),
        acquire_time: Some(to_timestamp(grant.acquired_at)),
        expire_time: Some(to_timestamp(grant.expires_at)),
        waited: grant.waited,
        mode: v1::Mode::Unspecified.into(),
        remaining: None,
    }
}

fn held(refusal: &Refusal) -> Status {
    let Refusal { owner, token, remaining, position } = refusal;
    let message = match owner.as_str() {
        "" => "held by another".to_owned(),
        owner => format!("held by {owner:?}"),
    };
    let remaining = remaining.as_millis().to_string();
    let (owner, token) = (("owner", owner.clone()), ("token", token.to_string()));
    match position {
        Some(position) => Refused::LeaseHeld
            .status(message, [owner, token, ("remaining_ms", remaining), ("position", position.to_string())]),
        None => Refused::LeaseHeld.status(message, [owner, token, ("remaining_ms", remaining)]),
    }
}

/// The status of a lease that is not held.
pub(crate) fn lost(reason: Option<Reason>) -> Status {
    let loss = reason.map(|reason| match reason {
        Reason::Released => "released",
        Reason::Displaced => "displaced",
        Reason::Revoked => "revoked",
    });
    match loss {
        Some(loss) => Refused::LeaseLost.status(format!("the lease was {loss}"), [("loss", loss.to_owned())]),
        None => Refused::LeaseLost.status("the lease is not held", []),
    }
}

pub(crate) fn key_unknown() -> Status {
    Refused::KeyUnknown.status("this key was never leased, or was forgotten since", [])
}

/// The status of a call without an answer. What the store said stays in the log.
pub(crate) fn failed(error: CallError) -> Status {
    match error {
        CallError::Store(StoreError::Unavailable { outcome, .. }) => {
            let name = match outcome {
                crate::store::Outcome::NotApplied => "not_applied",
                crate::store::Outcome::Unknown => "unknown",
            };
            let message =
                format!("the store does not answer ({outcome}); repeat the call with the same lease id");
            Refused::StoreUnavailable.status(message, [("outcome", name.to_owned())])
        }
        CallError::Store(StoreError::Unreadable { .. }) => unreadable(),
        CallError::Store(StoreError::Refused { .. }) => Refused::StoreUnavailable
            .status("the store refused; the daemon's log says why", [("outcome", "not_applied".to_owned())]),
        CallError::TooManyWaiting { limit } => limit_exceeded("waiting_calls", limit),
        CallError::TooManyWatches { limit } => limit_exceeded("watches", limit),
        CallError::ShuttingDown => shutting_down(),
    }
}

/// The status of a call for a key whose record is damaged.
pub(crate) fn unreadable() -> Status {
    Refused::RecordUnreadable.status(UNREADABLE, [])
}

pub(crate) fn shutting_down() -> Status {
    Refused::ShuttingDown.status("the daemon is shutting down; go on at another with the same lease id", [])
}

pub(crate) fn lease_ref(key: &Key, id: LeaseId) -> v1::LeaseRef {
    v1::LeaseRef { key: key.as_str().to_owned(), lease_id: id.reveal() }
}

/// What a keepalive stream is told of one lease.
pub(crate) fn keepalive_result(lease: v1::LeaseRef, touched: Touched) -> v1::KeepAliveResult {
    use v1::keep_alive_result::Outcome;
    let outcome = match touched {
        Touched::Kept(remaining) => Outcome::Kept(v1::Kept { remaining: Some(to_duration(remaining)) }),
        Touched::Lost(reason) => {
            let reason = match reason {
                None => v1::LossReason::Gone,
                Some(Reason::Displaced) => v1::LossReason::Displaced,
                Some(Reason::Released) => v1::LossReason::Released,
                Some(Reason::Revoked) => v1::LossReason::Revoked,
            };
            Outcome::Lost(v1::Lost { reason: reason.into() })
        }
        Touched::Unreadable => Outcome::Refused(v1::Refused {
            reason: v1::RefusalReason::Unreadable.into(),
            message: UNREADABLE.to_owned(),
        }),
    };
    v1::KeepAliveResult { lease: Some(lease), outcome: Some(outcome) }
}

/// What a watch stream is told.
pub(crate) fn watch_response(event: &WatchEvent) -> v1::WatchResponse {
    use v1::watch_response::Event;
    let event = match event {
        WatchEvent::Snapshot(snapshot) => Event::Snapshot(to_lease(snapshot)),
        WatchEvent::SnapshotEnd => Event::SnapshotEnd(v1::SnapshotEnd {}),
        WatchEvent::Change(kind, snapshot) => {
            let kind = match kind {
                ChangeKind::Granted => v1::ChangeKind::Granted,
                ChangeKind::Released => v1::ChangeKind::Released,
                ChangeKind::Lapsed => v1::ChangeKind::Lapsed,
                ChangeKind::Revoked => v1::ChangeKind::Revoked,
                ChangeKind::Queued => v1::ChangeKind::Queued,
                ChangeKind::LeftQueue => v1::ChangeKind::LeftQueue,
            };
            Event::Change(v1::Change { kind: kind.into(), lease: Some(to_lease(snapshot)) })
        }
    };
    v1::WatchResponse { event: Some(event) }
}

/// A record as anyone may see it: no lease ids, no places that have lapsed.
pub(crate) fn to_lease(snapshot: &Snapshot) -> v1::Lease {
    let record = &snapshot.record;
    let state = match snapshot.state() {
        State::Free => v1::LeaseState::Free,
        State::Held => v1::LeaseState::Held,
        State::Lapsed => v1::LeaseState::Lapsed,
    };
    v1::Lease {
        key: record.key.as_str().to_owned(),
        state: state.into(),
        fencing_token: record.token.0,
        holders: record.holders.iter().map(|holder| to_holder(snapshot, holder)).collect(),
        waiters: snapshot.line().map(to_waiter).collect(),
        blocked_until: record.blocked_until.filter(|until| *until > snapshot.now).map(to_timestamp),
    }
}

fn to_holder(snapshot: &Snapshot, holder: &Holder) -> v1::Holder {
    v1::Holder {
        owner: holder.owner.clone(),
        fencing_token: holder.token.0,
        mode: to_mode(holder.mode).into(),
        ttl: Some(to_duration(holder.ttl.get())),
        remaining: Some(to_duration(snapshot.remaining(holder))),
        acquire_time: Some(to_timestamp(holder.acquired_at)),
        expire_time: Some(to_timestamp(holder.expires_at)),
        metadata: BTreeMap::clone(&holder.metadata).into_iter().collect(),
        shared_limit: 0,
    }
}

fn to_waiter(waiter: &Waiter) -> v1::Waiter {
    v1::Waiter {
        owner: waiter.acquisition.owner.clone(),
        mode: to_mode(waiter.acquisition.mode).into(),
        since: Some(to_timestamp(waiter.since)),
        shared_limit: 0,
    }
}

fn to_mode(mode: Mode) -> v1::Mode {
    match mode {
        Mode::Exclusive => v1::Mode::Exclusive,
        Mode::Shared => v1::Mode::Shared,
    }
}

pub(crate) fn to_duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).unwrap_or(0),
    }
}

fn to_timestamp(Timestamp(millis): Timestamp) -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: millis.div_euclid(1000),
        nanos: i32::try_from(millis.rem_euclid(1000) * 1_000_000).unwrap_or(0),
    }
}

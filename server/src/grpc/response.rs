//! Writes responses: results, refusals as statuses, and records without their secrets.

use std::collections::BTreeMap;
use std::time::Duration;

use leased_proto::{Reason as Refused, v1};
use prost::Message;
use prost::encoding::message::encoded_len;
use tokio::task::yield_now;
use tonic::Status;

use crate::engine::{Acquired, CallError, ChangeKind, Grant, Obstruction, Refusal, Touched, WatchEvent};
use crate::lease::{
    Holder, Key, LeaseId, MAX_KEY_BYTES, MAX_SHARED_HOLDERS, Mode, Reason, Snapshot, State, Timestamp, Waiter,
};
use crate::store::{Page, StoreError};

/// The largest message that is read, in bytes. A larger keepalive message ends its stream. In a
/// smaller one, the leases past `MESSAGE_BYTES` of `keepalive.rs` are refused one by one.
pub(crate) const MAX_MESSAGE_BYTES: usize = 4 * 1024 * 1024;
/// The largest part of an answer or page that is sent in one message, in bytes. Below the 4 MiB
/// that gRPC clients accept by default.
pub(crate) const PART_BYTES: usize = 3 * 1024 * 1024;
/// How many bytes of a page are encoded before other tasks may run.
const STEP_BYTES: usize = 64 * 1024;
/// How much of an invalid lease id is shown to its caller, in bytes.
const MAX_ECHOED_ID_BYTES: usize = 64;

/// Returns the status of a message larger than [`MAX_MESSAGE_BYTES`].
pub(crate) fn oversized() -> Status {
    limit_exceeded("message_bytes", MAX_MESSAGE_BYTES)
}

/// How to repeat a call. If an acquire left the choice of the id to the daemon, the caller has no
/// id to repeat, and the daemon releases what it may have granted.
pub(crate) const WITH_ITS_ID: &str = "with the same lease id if the call named one";

/// The message about a key whose record is damaged.
const UNREADABLE: &str = "the record of this key cannot be read or written; an operator must repair or delete it, and \
                          the daemon's log says what is wrong";

/// Returns the status of a call that exceeds a limit. The details have the limit's name and value.
pub(crate) fn limit_exceeded(limit: &str, value: usize) -> Status {
    let message = format!("exceeds the limit {limit} of {value}");
    Refused::LimitExceeded.status(message, [("limit", limit.to_owned()), ("value", value.to_string())])
}

/// Returns the response to an acquire.
pub(crate) fn acquired(key: &Key, acquired: Acquired) -> Result<v1::AcquireResponse, Status> {
    match acquired {
        Acquired::Granted(grant) => Ok(granted(key, &grant)),
        Acquired::Held(refusal) => Err(held(&refusal)),
        Acquired::QueueFull => {
            Err(Refused::QueueFull.status("the queue of this key is full; try again later", []))
        }
        Acquired::Lost(reason) => Err(lost(Some(reason))),
        Acquired::IdReused => Err(Refused::IdReused.status(
            "this lease id is in use on this key with another mode or shared_limit; choose a new id",
            [],
        )),
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
        mode: to_mode(grant.mode).into(),
        remaining: Some(to_duration(grant.remaining)),
    }
}

/// Returns the status of an acquire that was not granted, with what keeps it from being granted.
fn held(refusal: &Refusal) -> Status {
    let Refusal { owner, token, remaining, position, by } = refusal;
    // Quoted, because the owner's label is text that its caller chose.
    let label = |owner: &str| if owner.is_empty() { "another".to_owned() } else { format!("{owner:?}") };
    let (name, message) = match by {
        Some(Obstruction::MinHold) => {
            ("min_hold", format!("blocked by a min_hold for another {} ms", remaining.as_millis()))
        }
        Some(Obstruction::Limit { holders, limit }) => {
            ("limit", format!("shared by {holders} already, and at most {limit} may share it"))
        }
        Some(Obstruction::Waiter { owner }) => {
            ("waiter", format!("{} is ahead of this call in the queue", label(owner)))
        }
        Some(Obstruction::Holder) | None => ("holder", format!("held by {}", label(owner))),
    };
    let mut entries = vec![
        ("owner", owner.clone()),
        ("token", token.to_string()),
        ("remaining_ms", remaining.as_millis().to_string()),
        ("blocked_by", name.to_owned()),
    ];
    entries.extend(position.map(|position| ("position", position.to_string())));
    if let Some(Obstruction::Waiter { owner }) = by {
        entries.push(("waiter", owner.clone()));
    }
    Refused::LeaseHeld.status(message, entries)
}

/// Returns the status of a lease that is not held.
pub(crate) fn lost(reason: Option<Reason>) -> Status {
    let (loss, message) = match reason {
        None => return Refused::LeaseLost.status("the lease is not held", []),
        Some(Reason::Released | Reason::Withdrawn) => ("released", "the lease was released"),
        Some(Reason::Settled) => ("released", "this lease id has ended: it was released before, or refused"),
        Some(Reason::Displaced) => ("displaced", "the lease was displaced"),
        Some(Reason::Revoked) => ("revoked", "the lease was revoked"),
    };
    Refused::LeaseLost.status(message, [("loss", loss.to_owned())])
}

/// Returns the status of a key without a record.
pub(crate) fn key_unknown() -> Status {
    Refused::KeyUnknown.status("this key was never leased, or has been purged since", [])
}

/// Returns the status of a call that failed. What the store itself says is only in the log.
pub(crate) fn failed(error: CallError) -> Status {
    match error {
        CallError::Store(StoreError::Unavailable { outcome, .. }) => {
            let name = match outcome {
                crate::store::Outcome::NotApplied => "not_applied",
                crate::store::Outcome::Unknown => "unknown",
            };
            let message = format!("the store does not answer ({outcome}); repeat the call, {WITH_ITS_ID}");
            Refused::StoreUnavailable.status(message, [("outcome", name.to_owned())])
        }
        CallError::Store(StoreError::Unreadable { .. }) => unreadable(),
        CallError::Store(StoreError::Refused { .. }) => Refused::StoreUnavailable.status(
            "the store refused the call; the daemon's log says why",
            [("outcome", "not_applied".to_owned())],
        ),
        CallError::TooManyWaiting { limit } => limit_exceeded("waiting_calls", limit),
        CallError::TooManyWatches { limit } => limit_exceeded("watches", limit),
        CallError::ShuttingDown => shutting_down(),
    }
}

/// Returns the status of a call for a key whose record is damaged.
pub(crate) fn unreadable() -> Status {
    Refused::RecordUnreadable.status(UNREADABLE, [])
}

/// Returns the status of a call that a drain ends.
pub(crate) fn shutting_down() -> Status {
    let message = format!("the daemon is shutting down; repeat the call at another one, {WITH_ITS_ID}");
    Refused::ShuttingDown.status(message, [])
}

pub(crate) fn lease_ref(key: &Key, id: LeaseId) -> v1::LeaseRef {
    v1::LeaseRef { key: key.as_str().to_owned(), lease_id: id.reveal() }
}

/// Returns the result of a touch for the answer on a keepalive stream.
pub(crate) fn keepalive_result(lease: v1::LeaseRef, touched: Touched) -> v1::KeepAliveResult {
    use v1::keep_alive_result::Outcome;
    let outcome = match touched {
        Touched::Kept(remaining) => Outcome::Kept(v1::Kept { remaining: Some(to_duration(remaining)) }),
        Touched::Lost(reason) => {
            let reason = match reason {
                None => v1::LossReason::Gone,
                Some(Reason::Displaced) => v1::LossReason::Displaced,
                Some(Reason::Released | Reason::Withdrawn | Reason::Settled) => v1::LossReason::Released,
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

/// Returns the result for a lease that is not touched. Shows the key and the id as the caller sent
/// them, but cuts long ones.
pub(crate) fn refused(
    mut lease: v1::LeaseRef,
    reason: v1::RefusalReason,
    message: impl Into<String>,
) -> v1::KeepAliveResult {
    cut(&mut lease.key, MAX_KEY_BYTES);
    cut(&mut lease.lease_id, MAX_ECHOED_ID_BYTES);
    let refused = v1::Refused { reason: reason.into(), message: message.into() };
    v1::KeepAliveResult {
        lease: Some(lease),
        outcome: Some(v1::keep_alive_result::Outcome::Refused(refused)),
    }
}

/// Cuts a text to at most `most` bytes, between two characters.
fn cut(text: &mut String, most: usize) {
    let end = (0..=most.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    text.truncate(end.unwrap_or(0));
    // The text may have been megabytes long, and the answer stays in memory until the caller reads
    // it.
    text.shrink_to_fit();
}

/// Splits results into responses that each fit into a message. In an answer, all responses but the
/// last one say that more follow. Results that no message asked for (`sequence` 0) are no answer,
/// so none of their responses says so.
pub(crate) fn keepalive_responses(
    sequence: u64,
    results: Vec<v1::KeepAliveResult>,
) -> impl Iterator<Item = v1::KeepAliveResponse> {
    let mut rest = Some(results);
    std::iter::from_fn(move || {
        let mut results = rest.take()?;
        let mut bytes = 0;
        let past = results.iter().position(|result| {
            bytes += encoded_len(2, result);
            bytes > PART_BYTES
        });
        // Each response has at least one result, however large, so that this ends.
        rest = past.map(|past| results.split_off(past.max(1)));
        Some(v1::KeepAliveResponse { sequence, results, more: sequence > 0 && rest.is_some() })
    })
}

/// Encodes a page as a `ListResponse` with as many of the records as fit into `most` bytes, and at
/// least one.
pub(crate) async fn list_response(page: Page, most: usize) -> Vec<u8> {
    // The encodings of a message's parts, one after the other, are the encoding of the message.
    let mut message = Vec::new();
    let Page { snapshots, mut more } = page;
    let (mut last, mut step) = (None, 0);
    for snapshot in snapshots {
        let part =
            v1::ListResponse { leases: vec![to_lease(&snapshot)], ..Default::default() }.encode_to_vec();
        if last.is_some() && message.len() + part.len() > most {
            more = true;
            break;
        }
        step += part.len();
        message.extend(part);
        last = Some(snapshot.record.key);
        if step > STEP_BYTES {
            step = 0;
            // A page of large records takes long, and the runtime polls its sockets only from time
            // to time while tasks are ready.
            yield_now().await;
        }
    }
    if more && let Some(last) = last {
        let token = v1::ListResponse { next_page_token: last.as_str().to_owned(), ..Default::default() };
        message.extend(token.encode_to_vec());
    }
    message
}

/// Returns an event for a watch stream.
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

/// Returns a record as anyone may see it: without lease ids, and without waiters that have lapsed.
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
        waiters: snapshot.queue().map(to_waiter).collect(),
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
        shared_limit: shown_limit(holder.mode, holder.shared_limit),
    }
}

fn to_waiter(waiter: &Waiter) -> v1::Waiter {
    v1::Waiter {
        owner: waiter.acquisition.owner.clone(),
        mode: to_mode(waiter.acquisition.mode).into(),
        since: Some(to_timestamp(waiter.since)),
        shared_limit: shown_limit(waiter.acquisition.mode, waiter.acquisition.shared_limit),
    }
}

/// Returns a limit in the form of requests, in which 0 stands for any number.
fn shown_limit(mode: Mode, limit: u32) -> u32 {
    if mode == Mode::Shared && limit < MAX_SHARED_HOLDERS { limit } else { 0 }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::{Acquisition, Edit, Record, Rules, step};

    /// Returns results for kept leases on the longest keys.
    fn results(count: usize) -> Vec<v1::KeepAliveResult> {
        let key = Key::try_from("k".repeat(MAX_KEY_BYTES).as_str()).expect("a key");
        let kept = Touched::Kept(Duration::from_millis(86_399_999));
        (0..count).map(|_| keepalive_result(lease_ref(&key, LeaseId::random()), kept)).collect()
    }

    #[test]
    fn an_answer_is_split_into_messages_and_the_last_one_says_so() {
        for (count, sequence) in [(0, 7), (1, 7), (5000, 7), (10_000, 7), (10_000, 0)] {
            let all = results(count);
            let parts: Vec<_> = keepalive_responses(sequence, all.clone()).collect();
            assert!(
                parts.iter().all(|part| part.sequence == sequence && part.encoded_len() <= PART_BYTES + 64)
            );
            let more: Vec<bool> = parts.iter().map(|part| part.more).collect();
            assert!(!more[more.len() - 1] && more[1..].len() == count / 5_200, "{count}: {more:?}");
            assert!(more[..more.len() - 1].iter().all(|more| *more == (sequence > 0)), "{count}: {more:?}");
            assert!(
                parts.into_iter().flat_map(|part| part.results).eq(all),
                "{count}: all results in their order"
            );
        }
    }

    /// Returns a page of held keys with about 4 KiB each.
    fn page(count: usize) -> Page {
        let rules = Rules { grace: Duration::ZERO, waiter_ttl: Duration::from_secs(15) };
        let snapshot = |number| {
            let metadata = BTreeMap::from([("x".to_owned(), "y".repeat(4000))]);
            let acquisition = Acquisition { metadata, ..Acquisition::waiting(LeaseId::random()) };
            let key = Key::try_from(format!("{number:04}").as_str()).expect("a key");
            let (edit, now) = (Edit::default().enqueue(acquisition.into()), Timestamp(1_000_000));
            Snapshot { record: step(Record::vacant(key), &edit, now, &rules), now }
        };
        Page { snapshots: (0..count).map(snapshot).collect(), more: false }
    }

    fn response_of(message: &[u8]) -> v1::ListResponse {
        v1::ListResponse::decode(message).expect("a message")
    }

    #[tokio::test]
    async fn a_page_fits_into_a_message_and_its_encoding_yields_often() {
        let cases = [
            (0, PART_BYTES, false),
            (1, PART_BYTES, false),
            (200, PART_BYTES, false),
            (1000, PART_BYTES, true),
        ];
        for (count, most, is_cut) in cases.into_iter().chain([(200, STEP_BYTES, true), (2, 1, true)]) {
            let (mut encoding, mut polls) = (Box::pin(list_response(page(count), most)), 0);
            let message = std::future::poll_fn(|context| {
                polls += 1;
                encoding.as_mut().poll(context)
            });
            let message = message.await;
            assert!(message.len() <= most || response_of(&message).leases.len() == 1, "{count}");
            assert!(polls > message.len() / (STEP_BYTES + 8 * 1024), "{count}: {polls} polls");
            let response = response_of(&message);
            let keys = response.leases.iter().map(|lease| lease.key.clone());
            assert!(keys.eq((0..response.leases.len()).map(|number| format!("{number:04}"))));
            assert_eq!(response.leases.len() < count, is_cut, "{count}");
            let last = response.leases.last().filter(|_| is_cut).map(|lease| lease.key.clone());
            assert_eq!(response.next_page_token, last.unwrap_or_default());
        }
    }

    #[test]
    fn a_refused_lease_is_shown_as_it_was_sent_but_cut() {
        for (key, shown) in [("a\nb".to_owned(), "a\nb".to_owned()), ("é".repeat(400), "é".repeat(256))] {
            let lease = v1::LeaseRef { key, lease_id: "ééé".repeat(20) };
            let refused = refused(lease, v1::RefusalReason::Invalid, "no").lease.expect("a lease");
            assert_eq!((refused.key, refused.lease_id), (shown, "é".repeat(32)));
        }
    }
}

//! Requests, read into what they mean and checked whole: whatever is wrong is named, field by field.

use std::collections::HashMap;
use std::fmt::Display;
use std::time::Duration;

use leased_proto::{Reason, v1};
use prost::Message;
use tonic::Status;
use tonic::metadata::MetadataMap;

use super::response::limit_exceeded;
use crate::config::{DAY, Limits};
use crate::engine::{Begin, Call, Origin};
use crate::lease::{Acquisition, Key, LeaseId, MAX_SHARED_HOLDERS, Mode, Ttl};

/// The largest request but for keepalive messages, in bytes.
pub(crate) const MAX_REQUEST_BYTES: usize = 64 * 1024;
const MAX_OWNER_BYTES: usize = 256;
const MAX_METADATA_BYTES: usize = 4 * 1024;
const MAX_METADATA_ENTRIES: usize = 32;
const MAX_REASON_BYTES: usize = 1024;
const DEFAULT_PAGE: usize = 100;
const MAX_PAGE: usize = 1000;

/// What is wrong with a request, field by field.
#[derive(Debug, Default)]
pub(crate) struct Violations(Vec<(String, String)>);

impl Violations {
    pub(crate) fn add(&mut self, field: impl Display, what: impl Display) {
        self.0.push((field.to_string(), what.to_string()));
    }

    /// The value, or a note of why there is none.
    fn take<T, E: Display>(&mut self, field: impl Display, value: Result<T, E>) -> Option<T> {
        value.map_err(|error| self.add(field, error)).ok()
    }

    /// `INVALID_ARGUMENT` naming every wrong field, if there is any.
    pub(crate) fn into_result(self) -> Result<(), Status> {
        if self.0.is_empty() {
            return Ok(());
        }
        Err(Reason::invalid_request(self.sentence(), self.0))
    }

    /// What is wrong, for people.
    fn sentence(&self) -> String {
        let fields: Vec<String> = self.0.iter().map(|(field, what)| format!("{field} {what}")).collect();
        fields.join("; ")
    }

    /// The parts, all of which are there if nothing is wrong.
    fn finish<T>(self, value: Option<T>) -> Result<T, Status> {
        self.into_result()?;
        value.ok_or_else(|| Status::internal("a request was neither right nor wrong"))
    }
}

/// Checks the size of a request other than a keepalive message.
pub(crate) fn small(request: &impl Message) -> Result<(), Status> {
    let size = request.encoded_len();
    if size > MAX_REQUEST_BYTES {
        return Err(limit_exceeded("request_bytes", MAX_REQUEST_BYTES));
    }
    Ok(())
}

pub(crate) fn key(field: &str, text: &str) -> Result<Key, Status> {
    let mut wrong = Violations::default();
    let key = wrong.take(field, Key::try_from(text));
    wrong.finish(key)
}

/// Reads the lease named in the field `field`, which is spelled only if something is wrong: messages name many.
fn lease(
    wrong: &mut Violations,
    field: impl Display,
    lease: Option<&v1::LeaseRef>,
) -> Option<(Key, LeaseId)> {
    let Some(lease) = lease else {
        wrong.add(field, "must be set");
        return None;
    };
    let key = wrong.take(format_args!("{field}.key"), Key::try_from(lease.key.as_str()));
    let id = wrong.take(format_args!("{field}.lease_id"), LeaseId::try_from(lease.lease_id.as_str()));
    key.zip(id)
}

/// Reads a request that is about one lease.
pub(crate) fn one_lease(named: Option<&v1::LeaseRef>) -> Result<(Key, LeaseId), Status> {
    let mut wrong = Violations::default();
    let lease = lease(&mut wrong, "lease", named);
    wrong.finish(lease)
}

/// Reads one of the leases that a keepalive message names, or says in a sentence what is wrong with it.
pub(crate) fn one_of_many(named: &v1::LeaseRef) -> Result<(Key, LeaseId), String> {
    let mut wrong = Violations::default();
    lease(&mut wrong, "lease", Some(named)).ok_or_else(|| wrong.sentence())
}

/// Reads an acquire. `headers` may bound the wait: the answer is to come before the caller stops listening.
pub(crate) fn acquire(
    request: v1::AcquireRequest,
    headers: &MetadataMap,
    limits: &Limits,
) -> Result<Call, Status> {
    small(&request)?;
    let mut wrong = Violations::default();
    let key = wrong.take("key", Key::try_from(request.key.as_str()));
    let (id, origin) = if request.lease_id.is_empty() {
        (Some(LeaseId::random()), Origin::Daemon)
    } else {
        (wrong.take("lease_id", LeaseId::try_from(request.lease_id.as_str())), Origin::Caller)
    };
    if request.owner.len() > MAX_OWNER_BYTES {
        wrong.add("owner", format_args!("must be at most {MAX_OWNER_BYTES} bytes long"));
    }
    let ttl = wrong.take("ttl", ttl(request.ttl, limits));
    let wait = wrong.take("wait", within(request.wait, limits.max_wait));
    let min_hold = wrong.take("min_hold", within(request.min_hold, DAY));
    wrong.take("metadata", metadata(&request.metadata));
    let mode = wrong.take("mode", mode(request.mode));
    if request.shared_limit > 0 && mode == Some(Mode::Exclusive) {
        wrong.add("shared_limit", "is for shared leases; set mode to MODE_SHARED");
    }
    let parts = key.zip(id).zip(ttl).zip(wait).zip(min_hold).zip(mode);
    let (((((key, id), ttl), wait), min_hold), mode) = wrong.finish(parts)?;
    let wait = wait.min(patience(headers).unwrap_or(Duration::MAX));
    let acquisition = Acquisition {
        id,
        owner: request.owner,
        metadata: request.metadata.into_iter().collect(),
        mode,
        shared_limit: match request.shared_limit {
            0 => MAX_SHARED_HOLDERS,
            limit => limit.min(MAX_SHARED_HOLDERS),
        },
        ttl,
        min_hold: Duration::from_millis(u64::try_from(min_hold.as_millis()).unwrap_or(u64::MAX)),
        wait: !wait.is_zero(),
        repeated: is_repeated(headers),
    };
    Ok(Call { key, acquisition, origin, wait })
}

fn ttl(asked: Option<prost_types::Duration>, limits: &Limits) -> Result<Ttl, String> {
    let Some(asked) = asked else { return Ok(limits.default_ttl) };
    let (min, max) = (limits.min_ttl, limits.max_ttl);
    duration(asked)
        .ok()
        .and_then(Ttl::new)
        .filter(|ttl| (min..=max).contains(ttl))
        .ok_or_else(|| format!("must be between {:?} and {:?}", min.get(), max.get()))
}

fn within(asked: Option<prost_types::Duration>, most: Duration) -> Result<Duration, String> {
    let Some(asked) = asked else { return Ok(Duration::ZERO) };
    let asked = duration(asked).ok().filter(|asked| *asked <= most);
    asked.ok_or_else(|| format!("must be between 0s and {most:?}"))
}

/// A duration as its proto defines it: nanoseconds within a second, and none below zero.
fn duration(asked: prost_types::Duration) -> Result<Duration, ()> {
    let seconds = u64::try_from(asked.seconds).map_err(drop)?;
    match u32::try_from(asked.nanos) {
        Ok(nanos) if nanos < 1_000_000_000 => Ok(Duration::new(seconds, nanos)),
        _ => Err(()),
    }
}

fn metadata(entries: &HashMap<String, String>) -> Result<(), String> {
    let bytes: usize = entries.iter().map(|(name, value)| name.len() + value.len()).sum();
    if entries.len() > MAX_METADATA_ENTRIES {
        Err(format!("must have at most {MAX_METADATA_ENTRIES} entries"))
    } else if bytes > MAX_METADATA_BYTES {
        Err(format!("must be at most {MAX_METADATA_BYTES} bytes together"))
    } else if entries.contains_key("") {
        Err("must not have an empty name".to_owned())
    } else {
        Ok(())
    }
}

fn mode(number: i32) -> Result<Mode, &'static str> {
    match v1::Mode::try_from(number) {
        Ok(v1::Mode::Unspecified | v1::Mode::Exclusive) => Ok(Mode::Exclusive),
        Ok(v1::Mode::Shared) => Ok(Mode::Shared),
        Err(_) => Err("is no mode that this daemon knows"),
    }
}

/// How long a call with a deadline may stand in line: until just before the caller stops listening, for the status
/// that says who holds the key is worth more than a bare cancellation.
fn patience(headers: &MetadataMap) -> Option<Duration> {
    let timeout = grpc_timeout(headers.get("grpc-timeout")?.to_str().ok()?)?;
    Some(timeout - (timeout / 5).min(Duration::from_millis(100)))
}

/// Whether the caller has made this call before and does not know what came of it. gRPC sets the header when it repeats
/// a call itself; others may.
pub(crate) fn is_repeated(headers: &MetadataMap) -> bool {
    let attempts = headers.get("grpc-previous-rpc-attempts").and_then(|value| value.to_str().ok());
    attempts.is_some_and(|attempts| attempts.parse::<u32>().is_ok_and(|attempts| attempts > 0))
}

/// Reads the `grpc-timeout` header: up to eight digits and a unit (gRPC over HTTP/2, "Requests").
pub(crate) fn grpc_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(count * 3600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    })
}

/// Reads a page request: the prefix, the key the page begins after, and how many keys it holds.
pub(crate) fn page(request: &v1::ListRequest) -> Result<(Option<Key>, usize), Status> {
    small(request)?;
    let mut wrong = Violations::default();
    let size = match usize::try_from(request.page_size) {
        Ok(0) => DEFAULT_PAGE,
        Ok(size) => size.min(MAX_PAGE),
        Err(_) => {
            wrong.add("page_size", "must not be negative");
            0
        }
    };
    prefix(&mut wrong, &request.prefix);
    // A page token is the last key of the page before.
    let after = Key::try_from(request.page_token.as_str()).ok();
    let fits = after.as_ref().is_none_or(|key| key.as_str().starts_with(&request.prefix));
    if !fits || (after.is_none() && !request.page_token.is_empty()) {
        wrong.add("page_token", "is not one that a page of this listing ended with");
    }
    wrong.finish(Some((after, size)))
}

fn prefix(wrong: &mut Violations, prefix: &str) {
    if prefix.len() > crate::lease::MAX_KEY_BYTES {
        wrong.add("prefix", "is longer than any key");
    }
}

pub(crate) fn revoke(request: &v1::RevokeRequest) -> Result<Key, Status> {
    small(request)?;
    let mut wrong = Violations::default();
    let key = wrong.take("key", Key::try_from(request.key.as_str()));
    if request.fencing_token < 0 {
        wrong.add("fencing_token", "must not be negative");
    }
    if request.reason.len() > MAX_REASON_BYTES {
        wrong.add("reason", format_args!("must be at most {MAX_REASON_BYTES} bytes long"));
    }
    wrong.finish(key)
}

pub(crate) fn watch(request: &v1::WatchRequest) -> Result<Begin, Status> {
    small(request)?;
    let mut wrong = Violations::default();
    prefix(&mut wrong, &request.prefix);
    wrong.into_result()?;
    Ok(if request.changes_only { Begin::Here } else { Begin::WithSnapshot })
}

#[cfg(test)]
mod tests {
    use tonic_types::StatusExt;

    use super::*;

    #[test]
    fn of_many_wrong_fields_a_few_are_named_and_the_rest_is_counted() {
        for what in
            ["must not be empty", &"is wrong in a way that takes many words ".repeat(20), &"é ".repeat(150)]
        {
            let mut wrong = Violations::default();
            (0..200).for_each(|number| wrong.add(format_args!("leases[{number}].lease_id"), what));
            let status = wrong.into_result().expect_err("200 wrong fields");
            assert_eq!(Reason::of(&status), Some(Reason::InvalidRequest));
            let named = status.get_details_bad_request().expect("fields").field_violations;
            assert!((1..=20).contains(&named.len()), "{}", named.len());
            let counted = format!("200 fields are wrong, of which the details name {}", named.len());
            assert!(status.message().starts_with(&counted), "{}", status.message());
            assert!(status.details().len() <= 4096, "{} bytes", status.details().len());
            let mut headers = tonic::codegen::http::HeaderMap::new();
            status.add_header(&mut headers).expect("a header");
            let bytes: usize =
                headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum();
            assert!(bytes < 7 * 1024, "{bytes} bytes of headers");
        }
    }

    #[test]
    fn a_few_wrong_fields_are_all_named() {
        let mut wrong = Violations::default();
        wrong.add("key", "must not be empty");
        wrong.add("wait", "must be between 0s and 1h");
        let status = wrong.into_result().expect_err("wrong fields");
        assert_eq!(status.message(), "key must not be empty; wait must be between 0s and 1h");
        assert_eq!(status.get_details_bad_request().expect("fields").field_violations.len(), 2);
    }

    #[test]
    fn grpc_timeouts_are_read_as_the_protocol_spells_them() {
        assert_eq!(grpc_timeout("1S"), Some(Duration::from_secs(1)));
        assert_eq!(grpc_timeout("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        assert_eq!(grpc_timeout("250m"), Some(Duration::from_millis(250)));
        assert_eq!(grpc_timeout("0n"), Some(Duration::ZERO));
        for bad in ["", "S", "1", "1s", "-1S", "+1S", "123456789S", "1 S", "1é", "é"] {
            assert_eq!(grpc_timeout(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn durations_that_their_proto_forbids_are_refused() {
        let of = |seconds, nanos| duration(prost_types::Duration { seconds, nanos });
        assert_eq!(of(1, 500_000_000), Ok(Duration::from_millis(1500)));
        for (seconds, nanos) in [(-1, 0), (0, -1), (1, -1), (0, 1_000_000_000), (i64::MIN, i32::MIN)] {
            assert_eq!(of(seconds, nanos), Err(()), "{seconds}s {nanos}ns");
        }
        assert!(of(i64::MAX, 999_999_999).is_ok(), "enormous, but a duration; the bounds refuse it");
    }
}

//! Reads and checks requests. A refusal names every wrong field, and not only the first one.

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
use crate::lease::{Acquisition, Key, LeaseId, LeaseName, MAX_SHARED_HOLDERS, Mode, Ttl};

/// The largest request other than a keepalive message, in bytes.
pub(crate) const MAX_REQUEST_BYTES: usize = 64 * 1024;
const MAX_OWNER_BYTES: usize = 256;
const MAX_METADATA_BYTES: usize = 4 * 1024;
const MAX_METADATA_ENTRIES: usize = 32;
const MAX_REASON_BYTES: usize = 1024;
const DEFAULT_PAGE: usize = 100;
const MAX_PAGE: usize = 1000;

/// The wrong fields of a request, each with what is wrong.
#[derive(Debug, Default)]
pub(crate) struct Violations(Vec<(String, String)>);

impl Violations {
    pub(crate) fn add(&mut self, field: impl Display, what: impl Display) {
        self.0.push((field.to_string(), what.to_string()));
    }

    /// Returns the value, or notes a violation.
    fn check<T, E: Display>(&mut self, field: impl Display, value: Result<T, E>) -> Option<T> {
        value.map_err(|error| self.add(field, error)).ok()
    }

    /// Refuses the request if it has wrong fields.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` with the wrong fields, if there are any.
    pub(crate) fn into_result(self) -> Result<(), Status> {
        if self.0.is_empty() {
            return Ok(());
        }
        Err(Reason::invalid_request(self.sentence(), self.0))
    }

    /// Returns a sentence that says what is wrong.
    fn sentence(&self) -> String {
        let fields: Vec<String> = self.0.iter().map(|(field, what)| format!("{field} {what}")).collect();
        fields.join("; ")
    }

    /// Returns the value, unless there are violations.
    fn finish<T>(self, value: Option<T>) -> Result<T, Status> {
        self.into_result()?;
        value.ok_or_else(missing_value)
    }
}

/// Returns the status of a request with a field that has neither a value nor a violation. That
/// would be a defect of this file.
fn missing_value() -> Status {
    Status::internal("a field of the request was neither read nor refused")
}

/// Checks the size of a request other than a keepalive message.
pub(crate) fn check_size(request: &impl Message) -> Result<(), Status> {
    let size = request.encoded_len();
    if size > MAX_REQUEST_BYTES {
        return Err(limit_exceeded("request_bytes", MAX_REQUEST_BYTES));
    }
    Ok(())
}

pub(crate) fn key(field: &str, text: &str) -> Result<Key, Status> {
    let mut violations = Violations::default();
    let key = violations.check(field, Key::try_from(text));
    violations.finish(key)
}

/// Reads the lease in the field `field`. The name of the field is formatted only for a violation,
/// because a keepalive message has many leases.
fn lease(
    violations: &mut Violations,
    field: impl Display,
    lease: Option<&v1::LeaseRef>,
) -> Option<LeaseName> {
    let Some(lease) = lease else {
        violations.add(field, "must be set");
        return None;
    };
    let key = violations.check(format_args!("{field}.key"), Key::try_from(lease.key.as_str()));
    let id = violations.check(format_args!("{field}.lease_id"), LeaseId::try_from(lease.lease_id.as_str()));
    Some(LeaseName { key: key?, id: id? })
}

/// Reads the lease of a request about one lease.
pub(crate) fn one_lease(named: Option<&v1::LeaseRef>) -> Result<LeaseName, Status> {
    let mut violations = Violations::default();
    let lease = lease(&mut violations, "lease", named);
    violations.finish(lease)
}

/// Reads one of the leases of a keepalive message.
///
/// # Errors
/// A sentence that says what is wrong. The other leases of the message are still touched.
pub(crate) fn one_of_many(named: &v1::LeaseRef) -> Result<LeaseName, String> {
    let mut violations = Violations::default();
    lease(&mut violations, "lease", Some(named)).ok_or_else(|| violations.sentence())
}

/// Reads an acquire. A deadline in `headers` bounds the wait.
pub(crate) fn acquire(
    request: v1::AcquireRequest,
    headers: &MetadataMap,
    limits: &Limits,
) -> Result<Call, Status> {
    check_size(&request)?;
    let mut violations = Violations::default();
    let key = violations.check("key", Key::try_from(request.key.as_str()));
    let (id, origin) = if request.lease_id.is_empty() {
        (Some(LeaseId::random()), Origin::Daemon)
    } else {
        (violations.check("lease_id", LeaseId::try_from(request.lease_id.as_str())), Origin::Caller)
    };
    if request.owner.len() > MAX_OWNER_BYTES {
        violations.add("owner", format_args!("must be at most {MAX_OWNER_BYTES} bytes long"));
    }
    let ttl = violations.check("ttl", ttl(request.ttl, limits));
    let wait = violations.check("wait", within(request.wait, limits.max_wait));
    let min_hold = violations.check("min_hold", within(request.min_hold, DAY));
    violations.check("metadata", metadata(&request.metadata));
    let mode = violations.check("mode", mode(request.mode));
    if request.shared_limit > 0 && mode == Some(Mode::Exclusive) {
        violations.add("shared_limit", "is for shared leases; set mode to MODE_SHARED");
    }
    violations.into_result()?;
    let fields = (key, id, ttl, wait, min_hold, mode);
    let (Some(key), Some(id), Some(ttl), Some(wait), Some(min_hold), Some(mode)) = fields else {
        return Err(missing_value());
    };
    let wait = wait.min(longest_wait(headers).unwrap_or(Duration::MAX));
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
        // Whole milliseconds, because that is what both stores keep.
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

/// Converts a duration. Refuses what the proto forbids: nanoseconds of a second or more. Refuses
/// negative durations as well.
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
        Err(_) => Err("is not a mode that this daemon knows"),
    }
}

/// Returns how long a call with a deadline may wait in the queue: until shortly before the
/// deadline. So the caller gets the status that says who holds the key, and not only
/// DEADLINE_EXCEEDED.
fn longest_wait(headers: &MetadataMap) -> Option<Duration> {
    let timeout = grpc_timeout(headers.get("grpc-timeout")?.to_str().ok()?)?;
    Some(timeout - (timeout / 5).min(Duration::from_millis(100)))
}

/// Returns true if the caller has made this call before and does not know its outcome. gRPC sets
/// the header when it repeats a call itself, and callers that repeat calls may set it too.
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

/// Reads a listing request. Returns the key after which the page begins, and the most keys that it
/// may have.
pub(crate) fn page(request: &v1::ListRequest) -> Result<(Option<Key>, usize), Status> {
    check_size(request)?;
    let mut violations = Violations::default();
    let size = match usize::try_from(request.page_size) {
        Ok(0) => DEFAULT_PAGE,
        Ok(size) => size.min(MAX_PAGE),
        Err(_) => {
            violations.add("page_size", "must not be negative");
            0
        }
    };
    prefix(&mut violations, &request.prefix);
    // A page token is the last key of the previous page.
    let after = Key::try_from(request.page_token.as_str()).ok();
    let fits = after.as_ref().is_none_or(|key| key.as_str().starts_with(&request.prefix));
    if !fits || (after.is_none() && !request.page_token.is_empty()) {
        violations.add("page_token", "is not the next_page_token of a page with this prefix");
    }
    violations.finish(Some((after, size)))
}

fn prefix(violations: &mut Violations, prefix: &str) {
    if prefix.len() > crate::lease::MAX_KEY_BYTES {
        violations.add("prefix", "is longer than any key");
    }
}

pub(crate) fn revoke(request: &v1::RevokeRequest) -> Result<Key, Status> {
    check_size(request)?;
    let mut violations = Violations::default();
    let key = violations.check("key", Key::try_from(request.key.as_str()));
    if request.fencing_token < 0 {
        violations.add("fencing_token", "must not be negative");
    }
    if request.reason.len() > MAX_REASON_BYTES {
        violations.add("reason", format_args!("must be at most {MAX_REASON_BYTES} bytes long"));
    }
    violations.finish(key)
}

pub(crate) fn watch(request: &v1::WatchRequest) -> Result<Begin, Status> {
    check_size(request)?;
    let mut violations = Violations::default();
    prefix(&mut violations, &request.prefix);
    violations.into_result()?;
    Ok(if request.changes_only { Begin::Here } else { Begin::WithSnapshot })
}

#[cfg(test)]
mod tests {
    use tonic_types::StatusExt;

    use super::*;

    #[test]
    fn a_few_of_many_wrong_fields_are_named_and_the_rest_are_counted() {
        for what in
            ["must not be empty", &"is wrong in a way that takes many words ".repeat(20), &"é ".repeat(150)]
        {
            let mut violations = Violations::default();
            (0..200).for_each(|number| violations.add(format_args!("leases[{number}].lease_id"), what));
            let status = violations.into_result().expect_err("200 wrong fields");
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
        let mut violations = Violations::default();
        violations.add("key", "must not be empty");
        violations.add("wait", "must be between 0s and 1h");
        let status = violations.into_result().expect_err("wrong fields");
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
    fn durations_that_the_proto_forbids_are_refused() {
        let of = |seconds, nanos| duration(prost_types::Duration { seconds, nanos });
        assert_eq!(of(1, 500_000_000), Ok(Duration::from_millis(1500)));
        for (seconds, nanos) in [(-1, 0), (0, -1), (1, -1), (0, 1_000_000_000), (i64::MIN, i32::MIN)] {
            assert_eq!(of(seconds, nanos), Err(()), "{seconds}s {nanos}ns");
        }
        assert!(of(i64::MAX, 999_999_999).is_ok(), "enormous but valid; the limits refuse it");
    }
}

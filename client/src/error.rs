//! Errors, which differ in what a caller can do about them.

use std::time::Duration;

use leased_proto::Reason;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::belief::Loss;
use crate::token::FencingToken;

/// The `domain` of every `ErrorInfo` of this API.
const DOMAIN: &str = "leased";

/// Why a call failed or was refused.
///
/// ```no_run
/// # async fn example(client: leased_client::Client) {
/// use leased_client::Error;
///
/// match client.acquire("reports/daily").await {
///     Ok(lease) => println!("token {}", lease.token()),
///     Err(Error::Held(by)) => println!("{} has it for {:?} more", by.owner, by.remaining),
///     Err(Error::Unavailable { cause, .. }) => println!("try again later: {cause}"),
///     Err(error) => println!("{error}"),
/// }
/// # }
/// ```
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The key was not available, and still was not at the end of the wait.
    #[error("{0}")]
    Held(HeldBy),
    /// The lease is lost.
    #[error("the lease is lost: {0}")]
    Lost(Loss),
    /// No daemon confirmed the lease in time. The lease may be gone.
    #[error("the lease could not be confirmed in time ({cause}); stop acting on its key")]
    #[non_exhaustive]
    Jeopardy {
        /// Why no daemon confirmed it, if the reason is known.
        cause: String,
    },
    /// The work could not be stopped in time, and finished after its lease could no longer be
    /// relied on. Its last steps may have run at the same time as another holder's.
    #[error("the work ended too late: its lease could no longer be relied on ({cause})")]
    #[non_exhaustive]
    EndedLate {
        /// Why the lease could no longer be relied on, if the reason is known.
        cause: String,
    },
    /// The key was never leased, or its record has been deleted since.
    #[error("this key was never leased, or its record has been deleted since")]
    KeyUnknown,
    /// The queue of the key is full; try again later.
    #[error("the queue of this key is full; try again later")]
    QueueFull,
    /// A limit of the daemon or of this client was exceeded.
    #[error("{0}")]
    LimitExceeded(String),
    /// The request is invalid.
    #[error("invalid request: {0}")]
    Invalid(String),
    /// No daemon answered in time. The call may have taken effect. It is safe to retry.
    #[error("no daemon answers at {endpoints}: {cause}")]
    #[non_exhaustive]
    Unavailable {
        /// The endpoints of this client.
        endpoints: String,
        /// How the last attempt failed.
        cause: String,
        /// The last answer, if there was one.
        source: Option<Status>,
    },
    /// The server at an endpoint is not a leased daemon.
    #[error("{endpoint} is not a leased daemon: {cause}")]
    #[non_exhaustive]
    NotLeased {
        /// The endpoint.
        endpoint: String,
        /// What is wrong with the server's answer.
        cause: String,
        /// The server's answer.
        source: Status,
    },
    /// Two endpoints of this client serve different stores, so a lease of one does not exist at the
    /// other.
    #[error(
        "{endpoint} and {other} serve different stores ({store} and {other_store}); all endpoints of a client must be daemons \
         over the same store"
    )]
    #[non_exhaustive]
    DifferentStores {
        /// One endpoint.
        endpoint: String,
        /// The id of that endpoint's store.
        store: String,
        /// Another endpoint.
        other: String,
        /// The id of the other endpoint's store.
        other_store: String,
    },
    /// Any other error of the daemon, such as a damaged record, a lack of rights, or a bug.
    #[error("the daemon answered {}: {}", .0.code(), .0.message())]
    Status(#[source] Status),
}

impl Error {
    /// Whether a daemon has answered that the call had no effect.
    pub(crate) fn is_refusal(&self) -> bool {
        match self {
            Self::Held(_)
            | Self::Lost(_)
            | Self::KeyUnknown
            | Self::QueueFull
            | Self::LimitExceeded(_)
            | Self::Invalid(_) => true,
            Self::Jeopardy { .. }
            | Self::EndedLate { .. }
            | Self::Unavailable { .. }
            | Self::NotLeased { .. }
            | Self::DifferentStores { .. }
            | Self::Status(_) => false,
        }
    }
}

/// Why a key is not available.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HeldBy {
    /// The holder's label; empty if the holder has none, or if there is no holder.
    pub owner: String,
    /// The holder's token; the last one granted if there is no holder.
    pub token: FencingToken,
    /// How long the holder's lease lasts without a touch, or how long a `min_hold` still blocks the
    /// key.
    pub remaining: Duration,
    /// How many waiters were ahead of the caller, if it waited in the queue.
    pub position: Option<u64>,
    /// What blocks the key, as the daemon names it: `holder`, `limit`, `waiter` or `min_hold`;
    /// empty if the daemon is of an earlier version, which does not say.
    pub blocked_by: String,
    /// The label of the waiter that came before, if `blocked_by` is `waiter` and the waiter has
    /// one.
    pub waiter: String,
}

impl std::fmt::Display for HeldBy {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.blocked_by.as_str(), self.owner.as_str()) {
            ("min_hold", _) => formatter.write_str("the key is blocked by a min_hold"),
            ("waiter", _) if self.waiter.is_empty() => formatter.write_str("another waiter came before"),
            ("waiter", _) => write!(formatter, "{} came before", self.waiter),
            (_, "") => formatter.write_str("the key is held by another"),
            (_, owner) => write!(formatter, "the key is held by {owner}"),
        }
    }
}

/// What a failed attempt means for its call.
pub(crate) enum Failure {
    /// No daemon answered, or the daemon that did cannot serve the call now. Another attempt may
    /// succeed, at once or after the pause that the daemon asked for. The call may have taken
    /// effect.
    Passing(Option<Duration>),
    /// This endpoint will fail in the same way again. Other endpoints may serve the call.
    Useless(Error),
    /// A daemon's answer.
    Final(Error),
}

impl Failure {
    /// Classifies the status of an attempt at `endpoint`.
    ///
    /// Only a status with details of this API is a daemon's answer. Any other status comes from a
    /// broken connection or a proxy, and whatever its code, it does not say whether the call took
    /// effect. Every call of this API may be retried.
    pub(crate) fn of(status: &Status, endpoint: &str) -> Self {
        let details = status.get_error_details();
        let entry = |name: &str| {
            let value = details.error_info().and_then(|info| info.metadata.get(name));
            value.cloned().unwrap_or_default()
        };
        let number = |name: &str| entry(name).parse::<u64>().ok();
        let pause = details.retry_info().and_then(|info| info.retry_delay);
        let is_ours = details.error_info().is_some_and(|info| info.domain == DOMAIN);
        let not_leased = |cause: &str| {
            let (endpoint, cause) = (endpoint.to_owned(), cause.to_owned());
            Self::Useless(Error::NotLeased { endpoint, cause, source: status.clone() })
        };
        Self::Final(match Reason::of(status) {
            Some(Reason::LeaseHeld) => Error::Held(HeldBy {
                owner: entry("owner"),
                token: FencingToken::new(entry("token").parse().unwrap_or_default()),
                remaining: Duration::from_millis(number("remaining_ms").unwrap_or_default()),
                position: number("position"),
                blocked_by: entry("blocked_by"),
                waiter: entry("waiter"),
            }),
            Some(Reason::LeaseLost) => Error::Lost(Loss::named(&entry("loss"))),
            Some(Reason::KeyUnknown) => Error::KeyUnknown,
            Some(Reason::QueueFull) => Error::QueueFull,
            Some(Reason::LimitExceeded) => Error::LimitExceeded(status.message().to_owned()),
            Some(Reason::StoreUnavailable | Reason::ShuttingDown) => return Self::Passing(pause),
            Some(Reason::InvalidRequest) => Error::Invalid(status.message().to_owned()),
            _ if details.bad_request().is_some() => Error::Invalid(status.message().to_owned()),
            _ if is_ours => Error::Status(status.clone()),
            _ if lacks_http2(status) => return not_leased("it does not speak gRPC"),
            _ => match status.code() {
                Code::Unimplemented => return not_leased("it serves gRPC, but no leases"),
                Code::Unauthenticated | Code::PermissionDenied => {
                    return Self::Useless(Error::Status(status.clone()));
                }
                _ => return Self::Passing(pause),
            },
        })
    }
}

/// Describes a status for people: its innermost source if it has one, else its message.
pub(crate) fn cause(status: &Status) -> String {
    sources(status).last().map_or_else(|| status.message().to_owned(), ToString::to_string)
}

/// Whether the server does not speak HTTP/2, and so not gRPC. Read as HTTP/2, the first letters of
/// an HTTP/1 answer are a frame of five million bytes, which is too large.
fn lacks_http2(status: &Status) -> bool {
    sources(status)
        .filter_map(|source| source.downcast_ref::<h2::Error>())
        .any(|error| error.reason() == Some(h2::Reason::FRAME_SIZE_ERROR))
}

/// The errors that a status comes from, outermost first.
fn sources(status: &Status) -> impl Iterator<Item = &(dyn std::error::Error + 'static)> {
    std::iter::successors(std::error::Error::source(status), |error| error.source())
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use tonic_types::ErrorDetails;

    use super::*;

    #[test]
    fn only_a_status_with_details_of_this_api_is_an_answer() {
        for code in (1..=16).map(Code::from_i32) {
            let is_passing =
                matches!(Failure::of(&Status::new(code, "a proxy's"), "there"), Failure::Passing(_));
            let is_useless =
                [Code::Unimplemented, Code::Unauthenticated, Code::PermissionDenied].contains(&code);
            assert_eq!(is_passing, !is_useless, "{code:?}");
        }
        let of = |details| Failure::of(&Status::with_error_details(Code::Internal, "no", details), "there");
        let foreign = ErrorDetails::with_error_info("LEASE_LOST", "example.com", []);
        assert!(matches!(of(foreign), Failure::Passing(_)));
        let later = ErrorDetails::with_error_info("OF_A_LATER_VERSION", DOMAIN, []);
        assert!(matches!(of(later), Failure::Final(Error::Status(_))));
        let lost = Reason::LeaseLost.status("gone", [("loss", "revoked".to_owned())]);
        assert!(matches!(Failure::of(&lost, "there"), Failure::Final(Error::Lost(Loss::Revoked))));
        let wrong = ErrorDetails::with_bad_request_violation("key", "is empty");
        assert!(matches!(of(wrong), Failure::Final(Error::Invalid(_))));
    }

    #[test]
    fn the_waiter_that_came_before_is_named() {
        let said = |waiter: &str| {
            let entries = [("blocked_by", "waiter"), ("waiter", waiter), ("owner", "reader")];
            let status =
                Reason::LeaseHeld.status("held", entries.map(|(name, value)| (name, value.to_owned())));
            match Failure::of(&status, "there") {
                Failure::Final(Error::Held(by)) => by.to_string(),
                _ => panic!("it is held"),
            }
        };
        assert_eq!(said("writer"), "writer came before");
        assert_eq!(said(""), "another waiter came before");
    }

    #[test]
    fn an_error_has_the_status_it_comes_from_as_its_source() {
        let Failure::Useless(error) = Failure::of(&Status::unimplemented("what?"), "there") else {
            panic!("it is of no use")
        };
        let source = error.source().and_then(|source| source.downcast_ref::<Status>());
        assert_eq!(source.map(Status::message), Some("what?"));
    }
}

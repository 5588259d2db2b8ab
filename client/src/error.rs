//! What can go wrong, told apart by what to do about it.

use std::time::Duration;

use leased_proto::Reason;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::belief::Loss;
use crate::token::FencingToken;

/// Why a call gave no answer, or not the one that was hoped for.
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
    /// Someone else holds the key, also after the wait.
    #[error("{0}")]
    Held(HeldBy),
    /// The lease is gone.
    #[error("the lease is lost: {0}")]
    Lost(Loss),
    /// No daemon confirmed the lease in time. It may be gone.
    #[error("the lease could not be confirmed in time; stop acting on its key")]
    Jeopardy,
    /// The key was never leased, or was forgotten since.
    #[error("this key was never leased, or was forgotten since")]
    KeyUnknown,
    /// The line of the key takes no more; try again later.
    #[error("the line of this key is full; try again later")]
    QueueFull,
    /// A limit of the daemon, or of this client, was passed.
    #[error("{0}")]
    LimitExceeded(String),
    /// The request is wrong.
    #[error("wrong request: {0}")]
    Invalid(String),
    /// No daemon gave an answer in time. What was asked for may have happened; repeating it is safe.
    #[error("no daemon answers at {endpoints}: {cause}")]
    Unavailable {
        /// Whom this client can ask.
        endpoints: String,
        /// What the last try ended with.
        cause: String,
    },
    /// What answers there is no leased daemon.
    #[error("{endpoint} is not a leased daemon: {cause}")]
    NotLeased {
        /// Who was asked.
        endpoint: String,
        /// What it said.
        cause: String,
    },
    /// Another answer of the daemon: not allowed, or a defect.
    #[error("the daemon answered {}: {}", .0.code(), .0.message())]
    Status(Box<Status>),
}

/// Who stands in the way.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct HeldBy {
    /// The holder's label; empty if nobody holds the key and it is blocked for a while yet.
    pub owner: String,
    /// The holder's token, or the last one granted.
    pub token: FencingToken,
    /// Until the holder's lease runs out unless touched.
    pub remaining: Duration,
    /// How many stood before the caller, if it stood in line.
    pub position: Option<u64>,
}

impl std::fmt::Display for HeldBy {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.owner.as_str() {
            "" => formatter.write_str("held by another"),
            owner => write!(formatter, "held by {owner}"),
        }
    }
}

/// What a failed try means for the call it belongs to.
pub(crate) enum Failure {
    /// Nobody answered, or the one who did cannot; another try may help, at once or after the pause that was asked for.
    Passing(Option<Duration>),
    /// An answer.
    Final(Error),
}

impl Failure {
    /// Reads the status of a try at `endpoint`.
    ///
    /// Every call of this API may be repeated, so whatever says nothing of leases counts as passing: broken
    /// connections come as UNKNOWN, INTERNAL or CANCELLED.
    pub(crate) fn of(status: Status, endpoint: &str) -> Self {
        let details = status.get_error_details();
        let entry = |name: &str| {
            let value = details.error_info().and_then(|info| info.metadata.get(name));
            value.cloned().unwrap_or_default()
        };
        let number = |name: &str| entry(name).parse::<u64>().ok();
        let error = match Reason::of(&status) {
            Some(Reason::LeaseHeld) => Error::Held(HeldBy {
                owner: entry("owner"),
                token: FencingToken::new(entry("token").parse().unwrap_or_default()),
                remaining: Duration::from_millis(number("remaining_ms").unwrap_or_default()),
                position: number("position"),
            }),
            Some(Reason::LeaseLost) => Error::Lost(Loss::named(&entry("loss"))),
            Some(Reason::KeyUnknown) => Error::KeyUnknown,
            Some(Reason::QueueFull) => Error::QueueFull,
            Some(Reason::LimitExceeded) => Error::LimitExceeded(status.message().to_owned()),
            _ => match status.code() {
                Code::InvalidArgument => Error::Invalid(status.message().to_owned()),
                Code::Unimplemented => Error::NotLeased {
                    endpoint: endpoint.to_owned(),
                    cause: "it serves gRPC, but no leases".to_owned(),
                },
                _ if speaks_otherwise(&status) => Error::NotLeased {
                    endpoint: endpoint.to_owned(),
                    cause: "it does not speak gRPC".to_owned(),
                },
                Code::Unavailable
                | Code::DeadlineExceeded
                | Code::Cancelled
                | Code::Unknown
                | Code::Internal
                | Code::Aborted => {
                    return Self::Passing(details.retry_info().and_then(|info| info.retry_delay));
                }
                _ => Error::Status(Box::new(status)),
            },
        };
        Self::Final(error)
    }
}

/// What a status says to a person: its message, and the innermost cause if a connection failed.
pub(crate) fn cause(status: &Status) -> String {
    sources(status).last().map_or_else(|| status.message().to_owned(), ToString::to_string)
}

/// Whether the answer was no HTTP/2, and so no gRPC: the letters of an HTTP/1 answer make a frame of five million bytes.
fn speaks_otherwise(status: &Status) -> bool {
    sources(status)
        .filter_map(|source| source.downcast_ref::<h2::Error>())
        .any(|error| error.reason() == Some(h2::Reason::FRAME_SIZE_ERROR))
}

/// What a status comes from, outermost first.
fn sources(status: &Status) -> impl Iterator<Item = &(dyn std::error::Error + 'static)> {
    std::iter::successors(std::error::Error::source(status), |error| error.source())
}

//! The table of refusals: the reason in `google.rpc.ErrorInfo` and the status code that goes with it.

use std::collections::HashMap;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// The `domain` of every `ErrorInfo` of this API.
const DOMAIN: &str = "leased";

/// Why a call was refused, for programs. The `ErrorInfo.reason` of a status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// Someone else holds the key, also after the wait. Metadata: `owner`, `token`, `remaining_ms`, and `position`
    /// (callers ahead) if the call stood in line.
    LeaseHeld,
    /// The lease is not held, or not any more. Metadata: `loss` (`displaced`, `released`, `revoked`) where known.
    LeaseLost,
    /// The key was never leased, or was forgotten since.
    KeyUnknown,
    /// The line of the key takes no more.
    QueueFull,
    /// A limit was passed. Metadata: `limit` (its name) and `value`.
    LimitExceeded,
    /// The store does not answer. Metadata: `outcome` (`not_applied`, `unknown`).
    StoreUnavailable,
    /// The daemon is about to end; another one can be asked at once.
    ShuttingDown,
    /// The lease id is in use on this key with another mode or limit. Nothing changed.
    IdReused,
    /// The store cannot read or write the record of this key, and no other key is affected. Trying again does not help
    /// before an operator has mended or deleted the record. Whether the call took effect is not known.
    RecordUnreadable,
    /// The request is malformed. `google.rpc.BadRequest` beside this names the fields.
    InvalidRequest,
}

impl Reason {
    const ALL: [Self; 10] = [
        Self::LeaseHeld,
        Self::LeaseLost,
        Self::KeyUnknown,
        Self::QueueFull,
        Self::LimitExceeded,
        Self::StoreUnavailable,
        Self::ShuttingDown,
        Self::IdReused,
        Self::RecordUnreadable,
        Self::InvalidRequest,
    ];

    /// The reason as `ErrorInfo` spells it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::LeaseHeld => "LEASE_HELD",
            Self::LeaseLost => "LEASE_LOST",
            Self::KeyUnknown => "KEY_UNKNOWN",
            Self::QueueFull => "QUEUE_FULL",
            Self::LimitExceeded => "LIMIT_EXCEEDED",
            Self::StoreUnavailable => "STORE_UNAVAILABLE",
            Self::ShuttingDown => "SHUTTING_DOWN",
            Self::IdReused => "ID_REUSED",
            Self::RecordUnreadable => "RECORD_UNREADABLE",
            Self::InvalidRequest => "INVALID_REQUEST",
        }
    }

    /// The status code it comes with.
    #[must_use]
    pub fn code(self) -> Code {
        match self {
            Self::LeaseHeld => Code::AlreadyExists,
            Self::LeaseLost | Self::KeyUnknown => Code::NotFound,
            Self::QueueFull | Self::LimitExceeded => Code::ResourceExhausted,
            Self::StoreUnavailable | Self::ShuttingDown => Code::Unavailable,
            Self::IdReused => Code::FailedPrecondition,
            Self::RecordUnreadable => Code::DataLoss,
            Self::InvalidRequest => Code::InvalidArgument,
        }
    }

    /// How long to wait before trying again, where trying again makes sense.
    fn retry_after(self) -> Option<Duration> {
        match self {
            Self::QueueFull => Some(Duration::from_secs(1)),
            Self::StoreUnavailable => Some(Duration::from_millis(500)),
            Self::ShuttingDown => Some(Duration::ZERO),
            Self::LeaseHeld
            | Self::LeaseLost
            | Self::KeyUnknown
            | Self::LimitExceeded
            | Self::IdReused
            | Self::RecordUnreadable
            | Self::InvalidRequest => None,
        }
    }

    /// The status of this refusal: `message` for people, `metadata` for programs.
    #[must_use]
    pub fn status<const N: usize>(self, message: impl Into<String>, metadata: [(&str, String); N]) -> Status {
        let metadata: HashMap<String, String> =
            metadata.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let mut details = ErrorDetails::with_error_info(self.as_str(), DOMAIN, metadata);
        if let Some(pause) = self.retry_after() {
            details.set_retry_info(Some(pause));
        }
        Status::with_error_details(self.code(), message, details)
    }

    /// The reason that a status carries, if it is one of this API.
    #[must_use]
    pub fn of(status: &Status) -> Option<Self> {
        let info = status.get_details_error_info().filter(|info| info.domain == DOMAIN)?;
        Self::ALL.into_iter().find(|reason| reason.as_str() == info.reason)
    }
}

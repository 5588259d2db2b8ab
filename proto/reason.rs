//! The table of refusals: the reason in `google.rpc.ErrorInfo` and the status code that goes with it.

use std::collections::HashMap;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// The `domain` of every `ErrorInfo` of this API.
const DOMAIN: &str = "leased";

/// The most that a status message may take up in the `grpc-message` header, which spells it with percent signs. A status
/// travels in one block of headers, of which grpc-java reads 8 KiB in all.
const MESSAGE_BYTES: usize = 1024;
/// The fields that an `INVALID_ARGUMENT` names.
const VIOLATIONS: usize = 20;
/// The text of these fields. With the message, which stands in the details once more, it stays below 4 KiB.
const VIOLATION_BYTES: usize = 2560;

/// Why a call was refused, for programs. The `ErrorInfo.reason` of a status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// The key could not be had, also after the wait. Metadata: `blocked_by` says what stands in the way (`holder`,
    /// `waiter`, `min_hold`, `limit`); `owner`, `token` and `remaining_ms` are the holder's; `waiter` is the owner of the one
    /// that comes first, where that is the reason; `position` (callers ahead) if the call stood in line.
    LeaseHeld,
    /// The lease is not held any more, was never held, or its id was released before the grant. Metadata: `loss`
    /// (`displaced`, `released`, `revoked`) where known.
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
    pub fn status<'a>(
        self,
        message: impl Into<String>,
        metadata: impl IntoIterator<Item = (&'a str, String)>,
    ) -> Status {
        let metadata: HashMap<String, String> =
            metadata.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let mut details = ErrorDetails::with_error_info(self.as_str(), DOMAIN, metadata);
        if let Some(pause) = self.retry_after() {
            details.set_retry_info(Some(pause));
        }
        Status::with_error_details(self.code(), clip(message.into()), details)
    }

    /// The status of a malformed request: a sentence for people, and each wrong field with what is wrong about it. Of
    /// many fields it names the first few and says how many more there are.
    #[must_use]
    pub fn invalid_request(message: impl Into<String>, violations: Vec<(String, String)>) -> Status {
        let mut details =
            ErrorDetails::with_error_info(Self::InvalidRequest.as_str(), DOMAIN, HashMap::new());
        let (all, mut named, mut bytes) = (violations.len(), 0, 0);
        for (field, what) in violations.into_iter().take(VIOLATIONS) {
            bytes += field.len() + what.len();
            if bytes > VIOLATION_BYTES {
                break;
            }
            details.add_bad_request_violation(field, what);
            named += 1;
        }
        let mut message = message.into();
        if named < all {
            message = format!("{all} fields are wrong, of which the details name {named}: {message}");
        }
        Status::with_error_details(Self::InvalidRequest.code(), clip(message), details)
    }

    /// The reason that a status carries, if it is one of this API.
    #[must_use]
    pub fn of(status: &Status) -> Option<Self> {
        let info = status.get_details_error_info().filter(|info| info.domain == DOMAIN)?;
        Self::ALL.into_iter().find(|reason| reason.as_str() == info.reason)
    }
}

/// Cuts a message to what its header may have.
fn clip(mut message: String) -> String {
    const CUT: &str = "...";
    let mut bytes = 0;
    let mut end = 0;
    for (at, char) in message.char_indices() {
        let is_plain = char.is_ascii_graphic() && !"\"#%<>`?{}".contains(char);
        bytes += if is_plain { 1 } else { 3 * char.len_utf8() };
        if bytes > MESSAGE_BYTES {
            message.truncate(end);
            message.push_str(CUT);
            break;
        }
        if bytes <= MESSAGE_BYTES - CUT.len() {
            end = at + char.len_utf8();
        }
    }
    message
}

//! The reasons for which a call is refused, as `google.rpc.ErrorInfo` names them, and the status
//! code of each.

use std::collections::HashMap;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// The `domain` of every `ErrorInfo` of this API.
const DOMAIN: &str = "leased";

/// The most bytes of a status message in the `grpc-message` header, which is percent-encoded. A
/// status travels in one block of headers, and grpc-java reads at most 8 KiB of headers.
const MESSAGE_BYTES: usize = 1024;
/// The most fields that an `INVALID_ARGUMENT` names.
const VIOLATIONS: usize = 20;
/// The most bytes of text for these fields. Together with the message, which the details repeat,
/// the text stays below 4 KiB.
const VIOLATION_BYTES: usize = 2560;

/// Why a call was refused, for programs: the `ErrorInfo.reason` of a status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// The key was not available, at once or within the wait. Metadata:
    ///
    /// - `blocked_by`: what blocks the key (`holder`, `waiter`, `min_hold`, `limit`).
    /// - `owner`, `token` and `remaining_ms`: of the holder. Without a holder: empty, the last
    ///   token granted, and how long a `min_hold` still blocks the key.
    /// - `waiter`: if a waiter blocks the key, its owner.
    /// - `position`: if the call waited in the queue, how many waiters were ahead of it.
    LeaseHeld,
    /// The lease is not held any more, was never held, or its id was released before the grant.
    /// Metadata: `loss` (`displaced`, `released`, `revoked`), if the record remembers it.
    LeaseLost,
    /// The key was never leased, or its record has been deleted since.
    KeyUnknown,
    /// The queue of the key is full.
    QueueFull,
    /// A limit was exceeded. Metadata: `limit` (its name) and `value`.
    LimitExceeded,
    /// The store does not answer. Metadata: `outcome` (`not_applied`, `unknown`).
    StoreUnavailable,
    /// The daemon is shutting down. The call can be repeated at another daemon at once.
    ShuttingDown,
    /// The lease id is in use on this key with another mode or limit. Nothing changed.
    IdReused,
    /// The store cannot read or write the record of this key. No other key is affected. Trying
    /// again does not help until an operator has repaired or deleted the record. The call may have
    /// taken effect.
    RecordUnreadable,
    /// The request is malformed. A `google.rpc.BadRequest` in the same status names the fields.
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

    /// The name of the reason in `ErrorInfo`.
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

    /// The status code of the reason.
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

    /// Returns how long the status advises to wait before another attempt, if it does.
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

    /// Builds the status of this refusal. `message` is for people, and `metadata` for programs.
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

    /// Builds the status of a malformed request: a sentence for people, and each wrong field with
    /// what is wrong about it. If there are too many fields, it names the first ones and says how
    /// many there are in all.
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

    /// Returns the reason in a status, if that is a status of this API.
    #[must_use]
    pub fn of(status: &Status) -> Option<Self> {
        let info = status.get_details_error_info().filter(|info| info.domain == DOMAIN)?;
        Self::ALL.into_iter().find(|reason| reason.as_str() == info.reason)
    }
}

/// Cuts a message to [`MESSAGE_BYTES`], percent-encoded.
fn clip(mut message: String) -> String {
    const CUT: &str = "...";
    let mut bytes = 0;
    let mut end = 0;
    for (at, char) in message.char_indices() {
        // The characters that tonic does not percent-encode. It encodes each byte of the others in
        // three characters.
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

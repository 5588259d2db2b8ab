//! What became of an attempt that failed, and so whether to repeat it.

use super::{Outcome, StoreError};

/// A failed attempt, with its cause for logs.
#[derive(Debug, Clone)]
pub(super) enum Failure {
    /// Nothing was changed; repeat.
    NotApplied(String),
    /// Some or all may have been changed, or may yet be; repeat, for edits are idempotent.
    Unknown(String),
    /// It will not be done, however often it is asked.
    Refused(String),
    /// One of the records cannot be written, and the store does not say which. What was asked for the others may have
    /// been done.
    Record(String),
}

impl Failure {
    pub(super) fn not_applied(cause: impl ToString) -> Self {
        Self::NotApplied(cause.to_string())
    }

    pub(super) fn unknown(cause: impl ToString) -> Self {
        Self::Unknown(cause.to_string())
    }

    pub(super) fn refused(cause: impl ToString) -> Self {
        Self::Refused(cause.to_string())
    }

    pub(super) fn into_cause(self) -> String {
        match self {
            Self::NotApplied(cause) | Self::Unknown(cause) | Self::Refused(cause) | Self::Record(cause) => {
                cause
            }
        }
    }
}

impl From<Failure> for StoreError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::NotApplied(cause) => Self::Unavailable { outcome: Outcome::NotApplied, cause },
            Failure::Unknown(cause) | Failure::Record(cause) => {
                Self::Unavailable { outcome: Outcome::Unknown, cause }
            }
            Failure::Refused(cause) => Self::Refused { cause },
        }
    }
}

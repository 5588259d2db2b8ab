//! Classifies failed commands, and notes what all commands of an attempt may have changed.

use std::sync::atomic::{AtomicBool, Ordering};

use super::{Outcome, StoreError};

/// A failed command or attempt, with its cause for logs. A failure is about its own command;
/// [`Effects`] is about the whole attempt.
#[derive(Debug, Clone)]
pub(super) enum Failure {
    /// The command changed nothing. Repeat it.
    NotApplied(String),
    /// The command reached the store after its time limit and changed nothing. Repeat it with a
    /// later limit.
    Late(String),
    /// The command may have changed records, or may still do so. Repeat it, since edits are
    /// idempotent.
    Unknown(String),
    /// The command changed nothing and will be refused again. Do not repeat it.
    Refused(String),
    /// One of the records cannot be written, and the store does not say which. The others may have
    /// been written.
    Record(String),
}

impl Failure {
    pub(super) fn not_applied(cause: impl ToString) -> Self {
        Self::NotApplied(cause.to_string())
    }

    pub(super) fn unknown(cause: impl ToString) -> Self {
        Self::Unknown(cause.to_string())
    }

    #[cfg(test)]
    pub(super) fn refused(cause: impl ToString) -> Self {
        Self::Refused(cause.to_string())
    }

    pub(super) fn into_cause(self) -> String {
        match self {
            Self::NotApplied(cause)
            | Self::Late(cause)
            | Self::Unknown(cause)
            | Self::Refused(cause)
            | Self::Record(cause) => cause,
        }
    }
}

impl From<Failure> for StoreError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::NotApplied(cause) | Failure::Late(cause) => {
                Self::Unavailable { outcome: Outcome::NotApplied, cause }
            }
            Failure::Unknown(cause) | Failure::Record(cause) => {
                Self::Unavailable { outcome: Outcome::Unknown, cause }
            }
            Failure::Refused(cause) => Self::Refused { cause },
        }
    }
}

/// Whether any command of an attempt at a batch may have changed something. An attempt may take
/// several commands, so the failure of one does not prove that nothing was changed.
///
/// Atomic only because the future of an attempt must be `Send`.
#[derive(Debug, Default)]
pub(super) struct Effects(AtomicBool);

impl Effects {
    /// Notes the reply to a command. `is_change` returns whether a successful command changed
    /// something.
    pub(super) fn note<T>(
        &self,
        reply: Result<T, Failure>,
        is_change: impl FnOnce(&T) -> bool,
    ) -> Result<T, Failure> {
        let is_possible = match &reply {
            Ok(answer) => is_change(answer),
            // After `Record` the other records of the command may have been written.
            Err(Failure::Unknown(_) | Failure::Record(_)) => true,
            Err(Failure::NotApplied(_) | Failure::Late(_) | Failure::Refused(_)) => false,
        };
        self.0.fetch_or(is_possible, Ordering::Relaxed);
        reply
    }

    pub(super) fn outcome(&self) -> Outcome {
        if self.0.load(Ordering::Relaxed) { Outcome::Unknown } else { Outcome::NotApplied }
    }

    /// Returns the error of an attempt that ended with `failure`.
    pub(super) fn conclude(&self, failure: Failure) -> StoreError {
        StoreError::from(failure).after(self.outcome())
    }
}

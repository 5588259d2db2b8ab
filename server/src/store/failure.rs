//! Classifies failed attempts, and notes what all attempts at a batch may have changed.

use std::sync::atomic::{AtomicBool, Ordering};

use super::{Outcome, StoreError};

/// A failed command or attempt, with its cause for logs. A failure is about its own command;
/// [`Effects`] is about the whole batch.
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

/// Whether any command of any attempt at a batch may have changed something.
///
/// A batch may take several commands and several attempts, so no single failure can say that the
/// batch was not applied.
#[derive(Debug, Default)]
pub(super) struct Effects(AtomicBool);

impl Effects {
    /// Notes the reply to a command. `is_change` says of a successful reply whether the command
    /// changed something.
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

    /// The error of a batch whose last attempt ended with `failure`.
    pub(super) fn conclude(&self, failure: Failure) -> StoreError {
        match (self.outcome(), failure) {
            (Outcome::NotApplied, Failure::Refused(cause)) => StoreError::Refused { cause },
            (_, Failure::Unknown(cause)) => StoreError::Unavailable { outcome: Outcome::Unknown, cause },
            (outcome, failure) => StoreError::Unavailable { outcome, cause: failure.into_cause() },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::atomic::AtomicU64;
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use proptest::prelude::*;
    use proptest::test_runner::{Config, TestRunner};

    use super::*;
    use crate::store::repeat;

    /// The reply to one command.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Reply {
        Changed,
        FoundNothing,
        NotApplied,
        Late,
        Refused,
        Unknown,
        Record,
    }

    impl Reply {
        fn may_have_changed(self) -> bool {
            matches!(self, Self::Changed | Self::Unknown | Self::Record)
        }

        fn result(self) -> Result<bool, Failure> {
            match self {
                Self::Changed => Ok(true),
                Self::FoundNothing => Ok(false),
                Self::NotApplied => Err(Failure::not_applied("not applied")),
                Self::Late => Err(Failure::Late("late".to_owned())),
                Self::Refused => Err(Failure::refused("refused")),
                Self::Unknown => Err(Failure::unknown("unknown")),
                Self::Record => Err(Failure::Record("a record".to_owned())),
            }
        }
    }

    /// Attempts, each with the replies to its commands; an attempt ends with the first failure.
    fn attempts() -> impl Strategy<Value = Vec<Vec<Reply>>> {
        let reply = prop::sample::select(vec![
            Reply::Changed,
            Reply::FoundNothing,
            Reply::NotApplied,
            Reply::Late,
            Reply::Refused,
            Reply::Unknown,
            Reply::Record,
        ]);
        prop::collection::vec(prop::collection::vec(reply, 1..4), 1..5)
    }

    /// What is told of a batch with these attempts, after which nothing reaches the store any more:
    /// whether it was repeated. And the replies that came.
    async fn told(attempts: Vec<Vec<Reply>>, is_noted: bool) -> (Result<bool, StoreError>, Vec<Reply>) {
        let effects = Effects::default();
        let state = Mutex::new((VecDeque::from(attempts), Vec::new()));
        let attempt = async |_| {
            let mut state = state.lock().expect("one at a time");
            let (attempts, seen) = &mut *state;
            for reply in attempts.pop_front().unwrap_or_else(|| vec![Reply::NotApplied]) {
                seen.push(reply);
                if is_noted {
                    effects.note(reply.result(), |is_change| *is_change)?;
                } else {
                    reply.result()?;
                }
            }
            Ok(Vec::new())
        };
        let told =
            repeat(Arc::default(), Duration::from_secs(5), &AtomicU64::new(0), &effects, attempt).await;
        let (_, seen) = state.into_inner().expect("one at a time");
        (told.map(|committed| committed.is_repeated), seen)
    }

    fn search(is_noted: bool) -> Result<(), String> {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_time().start_paused(true).build().expect("a runtime");
        let config = Config { cases: 2000, failure_persistence: None, ..Config::default() };
        let search = TestRunner::new(config).run(&attempts(), |attempts| {
            let (told, seen) = runtime.block_on(told(attempts, is_noted));
            let is_possible = seen.iter().any(|reply| reply.may_have_changed());
            match told {
                Ok(is_repeated) => {
                    prop_assert_eq!(is_repeated, seen.iter().any(|reply| reply.result().is_err()))
                }
                Err(StoreError::Unavailable { outcome: Outcome::Unknown, .. }) => prop_assert!(is_possible),
                Err(error) => prop_assert!(!is_possible, "{error} after {seen:?}"),
            }
            Ok(())
        });
        search.map_err(|error| error.to_string())
    }

    #[test]
    fn not_applied_is_told_only_if_every_reply_proves_it() {
        search(true).expect("a proof");
        search(false).expect_err("it is noticed when the replies are not noted");
    }
}

//! Runs one command to the database in a separate task, bounds its time, and classifies its
//! failure.
//!
//! The driver's futures must not be dropped before they complete. So a caller that stops waiting
//! leaves the task to finish, and every timeout is around the handle of the task.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use mongodb::bson::{Document, Timestamp, doc};
use mongodb::error::{Error, ErrorKind, WriteFailure};
use mongodb::options::{Acknowledgment, WriteConcern};
use mongodb::{Client, Database};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;

use crate::store::failure::Failure;

/// How long one attempt at a command may take, on the server and on the way.
pub(super) const ATTEMPT: Duration = Duration::from_millis(2000);
/// How much longer than the server's own limit a caller waits for the answer.
const SLACK: Duration = Duration::from_millis(500);
/// How many commands run at once, including those whose caller has stopped waiting.
const TASKS: usize = 64;
/// How many commands run at once for background work, so that it never delays commits.
const BACKGROUND_TASKS: usize = 8;
/// `ConversionFailure`, which the server answers to a command that reaches it after its limit.
const LATE: i32 = 241;
/// `DuplicateKey`: another daemon inserted the record first.
const DUPLICATE_KEY: i32 = 11000;
/// Errors that the server raises before it looks at a document: not the primary, no rights, no such
/// command or namespace.
const BEFORE_ANY_DOCUMENT: [i32; 8] = [10107, 13435, 13436, 10058, 13, 18, 59, 73];

impl Failure {
    /// Classifies the error of one statement of a command. Earlier statements may have taken
    /// effect, and a statement about many documents may have failed half-way. The count `n` shows
    /// neither reliably.
    fn from_statement(code: i32, cause: String, index: Option<i32>, n: u64) -> Self {
        let is_first = index == Some(0) && n == 0;
        match Self::from_code(code, cause) {
            // The clock is read once for all statements, so all of them are late.
            failure @ Self::Late(_) => failure,
            // The other records may have been written or not.
            failure @ Self::Record(_) => failure,
            failure if is_first && BEFORE_ANY_DOCUMENT.contains(&code) => failure,
            other => Self::Unknown(other.into_cause()),
        }
    }

    /// Classifies a driver error. The driver shows its own classification only as `ErrorKind` and
    /// the server's code.
    pub(super) fn from_driver(error: &Error) -> Self {
        let cause = brief(error);
        match error.kind.as_ref() {
            ErrorKind::Command(command) => Self::from_code(command.code, cause),
            ErrorKind::Write(WriteFailure::WriteError(write)) => Self::from_code(write.code, cause),
            // The write took place on the primary; whether it lasts is not known.
            ErrorKind::Write(WriteFailure::WriteConcernError(_)) => Self::Unknown(cause),
            ErrorKind::ServerSelection { .. } | ErrorKind::DnsResolve { .. } => Self::NotApplied(cause),
            ErrorKind::Authentication { .. } | ErrorKind::InvalidArgument { .. } => Self::Refused(cause),
            // Among these is a reply that cannot be read, whose command may have taken effect.
            _ => Self::Unknown(cause),
        }
    }

    /// Classifies the error of a command that failed as a whole.
    fn from_code(code: i32, cause: String) -> Self {
        match code {
            // ConversionFailure, which nothing but the limit of a command raises.
            LATE => Self::Late(cause),
            // NotWritablePrimary, NotPrimaryNoSecondaryOk, NotPrimaryOrSecondary: refused before
            // any document was changed.
            10107 | 13435 | 13436 | 10058 => Self::NotApplied(cause),
            DUPLICATE_KEY => Self::NotApplied(cause),
            // Unauthorized, AuthenticationFailed, InvalidNamespace, CommandNotFound,
            // CannotCreateCollection, a document that validation rejects, CommandNotSupported,
            // CommandNotSupportedOnView, OptionNotSupportedOnView.
            13 | 18 | 73 | 59 | 662 | 121 | 115 | 166 | 167 => Self::Refused(cause),
            // ClientMarkedKilled, whose number is as high as those below.
            46841 => Self::Unknown(cause),
            // BadValue, FailedToParse, TypeMismatch, Overflow, InvalidBSON, BSONObjectTooLarge, and
            // the numbered locations in the server's code at which an expression fails: a field of
            // a document has a type that the pipeline cannot work with, or a document would become
            // too large.
            2 | 9 | 14 | 15 | 22 | 10334 | 15000.. => Self::Record(cause),
            // Everything else, such as MaxTimeMSExpired, Interrupted, PrimarySteppedDown and
            // WriteConflict, may have struck half-way through a batch.
            _ => Self::Unknown(cause),
        }
    }
}

/// Runs commands, a bounded number at once.
#[derive(Debug, Clone)]
pub(super) struct Runner {
    tasks: Arc<Semaphore>,
    most: usize,
}

impl Runner {
    pub(super) fn new() -> Self {
        Self::with_room_for(TASKS)
    }

    pub(super) fn in_background() -> Self {
        Self::with_room_for(BACKGROUND_TASKS)
    }

    pub(super) fn with_room_for(most: usize) -> Self {
        Self { tasks: Arc::new(Semaphore::new(most)), most }
    }

    /// Waits until all commands have ended, including those whose caller has stopped waiting. Gives
    /// up after the time that one command may take.
    pub(super) async fn settled(&self) {
        let _ = self.take_all().await;
    }

    /// Lets no further command begin, and waits as [`Self::settled`] does. Returns whether all
    /// commands have ended.
    pub(super) async fn end(&self) -> bool {
        let permits = self.take_all().await;
        // Closed before the permits are given back: otherwise a waiting command would begin.
        self.tasks.close();
        permits.is_some()
    }

    /// Takes all permits, and gives up after the time that one command may take.
    async fn take_all(&self) -> Option<SemaphorePermit<'_>> {
        let all = u32::try_from(self.most).unwrap_or(u32::MAX);
        timeout(ATTEMPT + SLACK, self.tasks.acquire_many(all)).await.ok()?.ok()
    }

    /// Takes all permits until the returned value is dropped.
    #[cfg(test)]
    pub(super) async fn occupy(&self) -> tokio::sync::OwnedSemaphorePermit {
        let all = u32::try_from(self.most).expect("few tasks");
        Arc::clone(&self.tasks).acquire_many_owned(all).await.expect("permits")
    }

    /// Runs `command` to its end, but waits no longer than an attempt may take.
    pub(super) async fn run<T, F>(&self, command: F) -> Result<T, Failure>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        let permit = match timeout(ATTEMPT, Arc::clone(&self.tasks).acquire_owned()).await {
            Ok(Ok(permit)) => permit,
            _ => return Err(Failure::NotApplied("too many commands without an answer".into())),
        };
        let task = tokio::spawn(async move {
            let result = command.await;
            drop(permit);
            result
        });
        match timeout(ATTEMPT + SLACK, task).await {
            Ok(Ok(result)) => result.map_err(|error| Failure::from_driver(&error)),
            Ok(Err(join)) => Err(Failure::unknown(join)),
            Err(_) => Err(Failure::Unknown(format!("no answer within {:?}", ATTEMPT + SLACK))),
        }
    }

    /// Runs a write command with a limit on the server's time and a majority's acknowledgement.
    ///
    /// `update`, `insert` and `delete` go this way because the driver's own methods for them cannot
    /// set `maxTimeMS`.
    pub(super) async fn write(
        &self,
        database: &Database,
        mut command: Document,
        concern: &WriteConcern,
    ) -> Result<Written, Failure> {
        command.insert("maxTimeMS", max_time());
        command.insert("writeConcern", concern_document(concern));
        let database = database.clone();
        Written::read(&self.run(async move { database.run_command(command).await }).await?)
    }
}

/// What a write command did.
#[derive(Debug)]
pub(super) struct Written {
    /// How many documents it matched, or inserted.
    pub(super) matched: u64,
    operation_time: Option<Timestamp>,
}

impl Written {
    /// Reads the reply to a write command, which says `ok` even if statements in it have failed. An
    /// insert of a document that exists is no failure.
    fn read(reply: &Document) -> Result<Self, Failure> {
        let n = reply.get_i32("n").map_err(Failure::unknown)?;
        let matched = u64::try_from(n).map_err(Failure::unknown)?;
        let errors = reply.get_array("writeErrors").into_iter().flatten();
        for error in errors.filter_map(|error| error.as_document()) {
            let code = error.get_i32("code").unwrap_or(0);
            if code != DUPLICATE_KEY {
                let cause = error.get_str("errmsg").unwrap_or("write error").to_owned();
                return Err(Failure::from_statement(code, cause, error.get_i32("index").ok(), matched));
            }
        }
        if let Ok(error) = reply.get_document("writeConcernError") {
            return Err(Failure::unknown(error.get_str("errmsg").unwrap_or("write concern error")));
        }
        Ok(Self { matched, operation_time: reply.get_timestamp("operationTime").ok() })
    }

    /// The database's logical time of the write.
    ///
    /// # Errors
    /// [`Failure::Unknown`] if the server did not say.
    pub(super) fn operation_time(&self) -> Result<Timestamp, Failure> {
        self.operation_time.ok_or_else(|| Failure::unknown("the reply has no operation time"))
    }
}

/// Waits for the commands of these runners to end and then shuts the client down.
///
/// Every client must end this way: a client that is dropped ends its sessions in a task of its own,
/// which panics if the runtime ends first.
pub(super) async fn shut_down(client: &Client, runners: &[&Runner]) {
    let ended = join_all(runners.iter().map(|runner| runner.end())).await;
    // A command panics inside the driver when it meets a client that has been shut down.
    if ended.into_iter().all(|ended| ended) {
        client.clone().shutdown().await;
    } else {
        tracing::debug!("commands to MongoDB did not end in time");
    }
}

/// The server's time limit for one command.
fn max_time() -> i64 {
    i64::try_from(ATTEMPT.as_millis()).unwrap_or(i64::MAX)
}

fn concern_document(concern: &WriteConcern) -> Document {
    let mut document = doc! { "wtimeout": max_time(), "j": true };
    match &concern.w {
        Some(Acknowledgment::Nodes(nodes)) => document.insert("w", i64::from(*nodes)),
        _ => document.insert("w", "majority"),
    };
    document
}

/// The error's own text, without the driver's context; for logs and for people.
pub(super) fn brief(error: &Error) -> String {
    error.kind.to_string()
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use tokio::sync::oneshot;

    use super::*;
    use crate::store::Outcome;
    use crate::store::failure::Effects;

    #[tokio::test]
    async fn a_command_that_waits_for_its_turn_does_not_begin_after_the_end() {
        let runner = Runner::with_room_for(1);
        let (finish, finished) = oneshot::channel::<()>();
        let mut first = Box::pin(runner.run(async move { Ok(finished.await.is_ok()) }));
        assert!(first.as_mut().now_or_never().is_none());
        let mut end = Box::pin(runner.end());
        assert!(end.as_mut().now_or_never().is_none());
        let mut second = Box::pin(runner.run(async { Ok(()) }));
        assert!(second.as_mut().now_or_never().is_none());
        finish.send(()).expect("a command");
        assert!(matches!(first.await, Ok(true)));
        assert!(end.await);
        assert!(matches!(second.await, Err(Failure::NotApplied(_))));
    }

    fn matched(reply: &Document) -> Result<u64, Failure> {
        Written::read(reply).map(|written| written.matched)
    }

    #[test]
    fn a_reply_that_says_ok_may_hold_a_failure() {
        assert!(matches!(matched(&doc! { "ok": 1, "n": 3 }), Ok(3)));
        let rolled_back =
            doc! { "ok": 1, "n": 3, "writeConcernError": { "code": 64, "errmsg": "timed out" } };
        assert!(matches!(matched(&rolled_back), Err(Failure::Unknown(_))));
        let duplicate = doc! { "ok": 1, "n": 1, "writeErrors": [{ "code": 11000, "errmsg": "duplicate" }] };
        assert!(matches!(matched(&duplicate), Ok(1)));
    }

    /// A reply with an error of one statement.
    fn failed(index: i32, n: i32, code: i32) -> Result<u64, Failure> {
        matched(&doc! { "ok": 1, "n": n, "writeErrors": [{ "index": index, "code": code, "errmsg": "no" }] })
    }

    #[test]
    fn unless_it_is_late_only_an_error_before_any_statement_proves_that_nothing_changed() {
        assert!(matches!(failed(0, 0, 13), Err(Failure::Refused(_))));
        assert!(matches!(failed(0, 0, 10107), Err(Failure::NotApplied(_))));
        for code in [13, 10107, 13435, 121, 189, 91] {
            assert!(matches!(failed(1, 0, code), Err(Failure::Unknown(_))), "{code} in a second statement");
            assert!(matches!(failed(0, 1, code), Err(Failure::Unknown(_))), "{code} after a change");
        }
        for code in [121, 189, 112, 50] {
            assert!(matches!(failed(0, 0, code), Err(Failure::Unknown(_))), "{code} may come half-way");
        }
        for (index, n) in [(0, 0), (0, 1), (1, 0)] {
            for code in [2, 10334, 17419] {
                let failure = failed(index, n, code);
                assert!(matches!(failure, Err(Failure::Record(_))), "{code} is one record's");
                let effects = Effects::default();
                let _ = effects.note(failure, |_| false);
                assert_eq!(effects.outcome(), Outcome::Unknown, "{code} says nothing of the other records");
            }
        }
        for (index, n) in [(0, 0), (1, 0)] {
            assert!(matches!(failed(index, n, 241), Err(Failure::Late(_))), "all statements have one time");
        }
        assert!(matches!(matched(&doc! { "ok": 1 }), Err(Failure::Unknown(_))), "a reply without a count");
    }
}

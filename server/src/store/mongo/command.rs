//! One command to the database: run in a task of its own, bounded in time, its failure classified.
//!
//! No driver future is ever dropped part-way, which the driver forbids: whoever stops waiting leaves the task to
//! finish by itself. A timeout therefore always stands around the handle of the task.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use mongodb::Database;
use mongodb::bson::{Document, Timestamp, doc};
use mongodb::error::{Error, ErrorKind, WriteFailure};
use mongodb::options::{Acknowledgment, WriteConcern};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::store::failure::Failure;

/// How long one attempt at a command may take, on the server and on the way.
pub(super) const ATTEMPT: Duration = Duration::from_millis(2000);
/// The answer's way back, beyond what the server is given.
const SLACK: Duration = Duration::from_millis(500);
/// Tasks at once, those that nobody waits for any more included.
const TASKS: usize = 64;
/// The same of what is done beside the commits and reads, so that it never stands in their way.
const ERRANDS: usize = 8;

impl Failure {
    /// Reads a driver error. `ErrorKind` and server codes are all the driver shows of its own judgement.
    pub(super) fn from_driver(error: &Error) -> Self {
        let cause = brief(error);
        match error.kind.as_ref() {
            ErrorKind::Command(command) => Self::from_code(command.code, cause),
            ErrorKind::Write(WriteFailure::WriteError(write)) => Self::from_code(write.code, cause),
            // The write took place on the primary; whether it lasts is not known.
            ErrorKind::Write(WriteFailure::WriteConcernError(_)) => Self::Unknown(cause),
            ErrorKind::ServerSelection { .. } | ErrorKind::DnsResolve { .. } => Self::NotApplied(cause),
            ErrorKind::Authentication { .. } | ErrorKind::InvalidArgument { .. } | ErrorKind::Bson(_) => {
                Self::Refused(cause)
            }
            _ => Self::Unknown(cause),
        }
    }

    /// Reads an error code of the server.
    fn from_code(code: i32, cause: String) -> Self {
        match code {
            // NotWritablePrimary, NotPrimaryNoSecondaryOk, NotPrimaryOrSecondary: refused at the door.
            10107 | 13435 | 13436 | 10058 => Self::NotApplied(cause),
            // DuplicateKey: someone else inserted the record first.
            11000 => Self::NotApplied(cause),
            // Unauthorized, AuthenticationFailed, InvalidNamespace, CommandNotFound, CannotCreateCollection, a document
            // that validation rejects.
            13 | 18 | 73 | 59 | 662 | 121 => Self::Refused(cause),
            // StaleConfig on a sharded cluster, whose number is as high as those below.
            46841 => Self::Unknown(cause),
            // BadValue, FailedToParse, TypeMismatch, Overflow, InvalidBSON, ConversionFailure, BSONObjectTooLarge, and the
            // numbered locations in the server's code at which an expression fails: a field of a document has a type
            // that the pipeline cannot work with, or a document would become too large.
            2 | 9 | 14 | 15 | 22 | 241 | 10334 | 15000.. => Self::Record(cause),
            // Anything else, MaxTimeMSExpired, Interrupted, PrimarySteppedDown and WriteConflict among them, may
            // have struck half-way through a batch.
            _ => Self::Unknown(cause),
        }
    }
}

/// Runs commands and bounds how many run.
#[derive(Debug, Clone)]
pub(super) struct Runner {
    tasks: Arc<Semaphore>,
}

impl Runner {
    pub(super) fn new() -> Self {
        Self { tasks: Arc::new(Semaphore::new(TASKS)) }
    }

    pub(super) fn for_errands() -> Self {
        Self { tasks: Arc::new(Semaphore::new(ERRANDS)) }
    }

    /// Runs `command` to its end, and waits for that no longer than an attempt may take.
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

    /// Runs a write command with a bound on the server's time and a majority's acknowledgement, and returns the
    /// number of documents it matched. Duplicates met by an insert are no failure.
    ///
    /// `update`, `insert` and `delete` go this way because the driver's own methods for them cannot set `maxTimeMS`.
    pub(super) async fn write(
        &self,
        database: &Database,
        command: Document,
        concern: &WriteConcern,
    ) -> Result<u64, Failure> {
        matched(&self.written(database, command, concern).await?)
    }

    /// The reply to a write command, which says `ok` also when it has failures inside.
    async fn written(
        &self,
        database: &Database,
        mut command: Document,
        concern: &WriteConcern,
    ) -> Result<Document, Failure> {
        command.insert("maxTimeMS", max_time());
        command.insert("writeConcern", concern_document(concern));
        let database = database.clone();
        self.run(async move { database.run_command(command).await }).await
    }

    /// As [`Self::write`], and returns the database's time at which the write was there.
    pub(super) async fn write_in_time(
        &self,
        database: &Database,
        command: Document,
        concern: &WriteConcern,
    ) -> Result<Timestamp, Failure> {
        let reply = self.written(database, command, concern).await?;
        matched(&reply)?;
        reply.get_timestamp("operationTime").map_err(Failure::unknown)
    }
}

/// The server's time for one command.
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

/// Reads the reply to a write command.
fn matched(reply: &Document) -> Result<u64, Failure> {
    let errors = reply.get_array("writeErrors").into_iter().flatten();
    for error in errors.filter_map(|error| error.as_document()) {
        let code = error.get_i32("code").unwrap_or(0);
        if code != 11000 {
            return Err(Failure::from_code(
                code,
                error.get_str("errmsg").unwrap_or("write error").to_owned(),
            ));
        }
    }
    if let Ok(error) = reply.get_document("writeConcernError") {
        return Err(Failure::unknown(error.get_str("errmsg").unwrap_or("write concern error")));
    }
    let n = reply.get_i32("n").map_err(Failure::unknown)?;
    u64::try_from(n).map_err(Failure::unknown)
}

/// The error without the driver's trappings, for logs and for people.
pub(super) fn brief(error: &Error) -> String {
    error.kind.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_that_says_ok_may_hold_a_failure() {
        assert!(matches!(matched(&doc! { "ok": 1, "n": 3 }), Ok(3)));
        let rolled_back =
            doc! { "ok": 1, "n": 3, "writeConcernError": { "code": 64, "errmsg": "timed out" } };
        assert!(matches!(matched(&rolled_back), Err(Failure::Unknown(_))));
        let forbidden = doc! { "ok": 1, "n": 0, "writeErrors": [{ "code": 13, "errmsg": "no" }] };
        assert!(matches!(matched(&forbidden), Err(Failure::Refused(_))));
        let half_way = doc! { "ok": 1, "n": 1, "writeErrors": [{ "code": 189, "errmsg": "stepped down" }] };
        assert!(matches!(matched(&half_way), Err(Failure::Unknown(_))));
        let duplicate = doc! { "ok": 1, "n": 1, "writeErrors": [{ "code": 11000, "errmsg": "duplicate" }] };
        assert!(matches!(matched(&duplicate), Ok(1)));
    }
}

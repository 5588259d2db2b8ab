//! The index over the keys in use: held, waited for or blocked. With it the cost of a listing does
//! not depend on the number of free keys.
//!
//! A record has the field `in_use` while its key is in use, and the index covers only records with
//! the field. Touches leave the field alone. A block ends by time alone, without a write, so the
//! field then stays until the next edit or purge.
//!
//! Everything works without the index, but listings then read the free records too. Such a listing
//! starts a build of the index in the background.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mongodb::bson::{Bson, Document, doc};
use tokio::time::Instant;

use super::MongoStore;
use super::command::Runner;
use super::purge::Pages;
use crate::store::failure::Failure;

/// The field, and the name of the index.
pub(super) const IN_USE: &str = "in_use";

/// The pause after a failed build. A later listing starts another one.
const PAUSE: Duration = Duration::from_secs(60);
/// The pause after MongoDB refused a build. An attempt reads the whole collection, and MongoDB
/// refuses again until an administrator changes the user's rights.
const LONG_PAUSE: Duration = Duration::from_secs(3600);

/// Whether the index exists, and when it may be built.
#[derive(Debug)]
pub(super) struct Index {
    is_there: AtomicBool,
    /// Runs the command that builds the index. On a large collection the command ends long after
    /// its caller stopped waiting. Only one runs at a time, on a runner of its own, so that builds
    /// neither pile up nor delay commits.
    pub(super) build_runner: Runner,
    /// When a listing may start the next build. `None`: at once.
    due_at: Mutex<Option<Instant>>,
    /// Whether a refusal has been logged.
    has_warned: AtomicBool,
}

impl Default for Index {
    fn default() -> Self {
        Self {
            is_there: AtomicBool::new(false),
            build_runner: Runner::with_room_for(1),
            due_at: Mutex::default(),
            has_warned: AtomicBool::new(false),
        }
    }
}

impl Index {
    pub(super) fn is_there(&self) -> bool {
        self.is_there.load(Ordering::Relaxed)
    }

    /// Notes that the index no longer exists.
    pub(super) fn note_missing(&self) {
        self.is_there.store(false, Ordering::Relaxed);
    }

    /// Returns true if the caller must start a build, and then false to all callers for [`PAUSE`].
    fn claim_build(&self) -> bool {
        let mut due_at = self.due_at.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let is_due = !self.is_there() && due_at.is_none_or(|due_at| due_at <= now);
        if is_due {
            *due_at = Some(now + PAUSE);
        }
        is_due
    }

    fn postpone(&self, pause: Duration) {
        *self.due_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now() + pause);
    }

    /// Logs why a build failed, and decides when a listing may start the next one.
    pub(super) fn note_failure(&self, failure: Failure) {
        if let Failure::Refused(cause) = failure {
            self.postpone(LONG_PAUSE);
            if !self.has_warned.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    cause,
                    "MongoDB refuses to make the index {IN_USE}: listings and watches slow down with the number of free keys; \
                     give the MongoDB user the right createIndex on the collection"
                );
            }
        } else {
            self.postpone(PAUSE);
            tracing::info!(
                cause = failure.into_cause(),
                "the index {IN_USE} is still being built, or could not be made yet: until it is there, listings and watches \
                 slow down with the number of free keys; the next listing after {PAUSE:?} looks again"
            );
        }
    }
}

impl MongoStore {
    /// Builds the index unless it exists. Waits no longer than for any other command: a build may
    /// take hours, and everything works without the index.
    pub(super) async fn make_index(&self) {
        if !self.index.is_there()
            && let Err(failure) = self.create_index().await
        {
            self.index.note_failure(failure);
        }
    }

    /// Starts a build in the background if the index is missing and no build was started recently.
    pub(super) fn restore_index(&self) {
        if self.index.claim_build() {
            let store = self.clone();
            tokio::spawn(async move { store.make_index().await });
        }
    }

    async fn create_index(&self) -> Result<(), Failure> {
        // MongoDB allows no partial index on `_id` alone.
        let index = doc! {
            "key": { "_id": 1, IN_USE: 1 },
            "name": IN_USE,
            "partialFilterExpression": { IN_USE: true },
        };
        let is_listed = self.is_listed().await?;
        if !is_listed {
            // Records of earlier versions lack the field. They must have it before listings use the
            // index.
            let mut pages = Pages::default();
            while let Some(range) = pages.next(self).await? {
                self.add_field(range).await?;
            }
        }
        let create = doc! { "createIndexes": self.collection.name(), "indexes": [index] };
        let (database, index) = (self.database.clone(), Arc::clone(&self.index));
        let create = async move {
            database.run_command(create).await?;
            // Set here, because the caller may have stopped waiting by the time the build ends.
            index.is_there.store(true, Ordering::Relaxed);
            Ok(())
        };
        match self.index.build_runner.run(create).await {
            // The index exists, and the user lacks the right to build it.
            Err(Failure::Refused(_)) if is_listed => {
                self.index.is_there.store(true, Ordering::Relaxed);
                Ok(())
            }
            done => done,
        }
    }

    async fn is_listed(&self) -> Result<bool, Failure> {
        let collection = self.collection.clone();
        let names = self.runner.run(async move { collection.list_index_names().await }).await?;
        Ok(names.iter().any(|name| name == IN_USE))
    }

    async fn add_field(&self, range: Document) -> Result<(), Failure> {
        let without_field = doc! { "_id": range, IN_USE: { "$exists": false } };
        self.change(without_field, doc! { "$set": { IN_USE: in_use(&self.clock) } }).await
    }

    /// Removes the field from records whose block has ended and that have no other use.
    pub(super) async fn unmark_unused(&self, range: Document) -> Result<(), Failure> {
        let over = doc! { "$not": [{ "$gt": ["$blocked_until", self.clock.clone()] }] };
        let unused = doc! { "_id": range, IN_USE: true, "holders": [], "waiters": [], "$expr": over };
        self.change(unused, doc! { "$unset": IN_USE }).await
    }

    async fn change(&self, which: Document, stage: Document) -> Result<(), Failure> {
        let statement = doc! { "q": which, "u": [stage], "multi": true };
        let update = doc! { "update": self.collection.name(), "updates": [statement] };
        self.feed.background.write(&self.database, update, &self.concern).await?;
        Ok(())
    }
}

/// The last stage of an edit that may take or free a key: sets or removes the field.
pub(super) fn in_use_stage(now: &Bson) -> Document {
    doc! { "$set": { IN_USE: in_use(now) } }
}

/// The value of the field. A damaged record, with something else in place of a list, counts as in
/// use. It must not fail the update of the other records.
fn in_use(now: &Bson) -> Document {
    let used = doc! { "$or": [
        { "$ne": [{ "$ifNull": ["$holders", []] }, []] },
        { "$ne": [{ "$ifNull": ["$waiters", []] }, []] },
        { "$gt": ["$blocked_until", now.clone()] },
    ] };
    doc! { "$cond": [used, true, "$$REMOVE"] }
}

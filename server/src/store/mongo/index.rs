//! The index over the keys that are held, waited for or blocked, so that a listing costs what it shows, however many keys
//! are free.
//!
//! A record has the field `in_use` while its key is held, waited for or blocked, and the index holds only records with the
//! field. Touches leave the field alone. A block ends by time alone, when nobody writes: the field then stays until the
//! next edit or the next purge.
//!
//! Records without the index are served all the same, but a listing reads the free ones too. Such a listing has the index
//! made in the background.

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

/// How soon a listing has the index made again after an attempt that failed.
const PAUSE: Duration = Duration::from_secs(60);
/// How soon a listing has the index made again after MongoDB refused to make it. An attempt reads the whole collection, and
/// MongoDB refuses again until an administrator changes something.
const LONG_PAUSE: Duration = Duration::from_secs(3600);

/// Whether the index is there, and who makes it.
#[derive(Debug)]
pub(super) struct Index {
    is_there: AtomicBool,
    /// Runs the command that makes it, which ends when the index is built: on a large collection long after its caller
    /// stopped waiting. One at a time, so that no more of them pile up, and none takes a turn from commits.
    pub(super) maker: Runner,
    /// When a listing may have it made; `None`: at once.
    due_at: Mutex<Option<Instant>>,
    has_warned: AtomicBool,
}

impl Default for Index {
    fn default() -> Self {
        Self {
            is_there: AtomicBool::new(false),
            maker: Runner::with_room_for(1),
            due_at: Mutex::default(),
            has_warned: AtomicBool::new(false),
        }
    }
}

impl Index {
    pub(super) fn is_there(&self) -> bool {
        self.is_there.load(Ordering::Relaxed)
    }

    /// Notes that MongoDB does not have the index.
    pub(super) fn lose(&self) {
        self.is_there.store(false, Ordering::Relaxed);
    }

    /// Whether the caller is to have the index made. Then no other caller is for a while.
    fn take_turn(&self) -> bool {
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

    /// Logs why there is no index, and decides when a listing has it made again.
    pub(super) fn failed(&self, failure: Failure) {
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
    /// Makes the index unless it is there. Waits for that no longer than for any command: MongoDB may build it for hours,
    /// and everything works without it.
    pub(super) async fn make_index(&self) {
        if !self.index.is_there()
            && let Err(failure) = self.create_index().await
        {
            self.index.failed(failure);
        }
    }

    /// Has the index made in the background if it is missing, unless that was tried a moment ago.
    pub(super) fn restore_index(&self) {
        if self.index.take_turn() {
            let store = self.clone();
            tokio::spawn(async move { store.make_index().await });
        }
    }

    async fn create_index(&self) -> Result<(), Failure> {
        let index = doc! {
            "key": { "_id": 1, IN_USE: 1 },
            "name": IN_USE,
            "partialFilterExpression": { IN_USE: true },
        };
        let is_listed = self.has_index().await?;
        if !is_listed {
            // Records of a version that did not keep the field, first: once the index is there listings go by it.
            let mut pages = Pages::default();
            while let Some(range) = pages.next(self).await? {
                self.mark_in_use(range).await?;
            }
        }
        let create = doc! { "createIndexes": self.collection.name(), "indexes": [index] };
        let (database, index) = (self.database.clone(), Arc::clone(&self.index));
        let create = async move {
            database.run_command(create).await?;
            // Noted here, where it is noted also if the build took longer than anybody waited.
            index.is_there.store(true, Ordering::Relaxed);
            Ok(())
        };
        match self.index.maker.run(create).await {
            // An administrator made it for a user who may not.
            Err(Failure::Refused(_)) if is_listed => {
                self.index.is_there.store(true, Ordering::Relaxed);
                Ok(())
            }
            done => done,
        }
    }

    async fn has_index(&self) -> Result<bool, Failure> {
        let collection = self.collection.clone();
        let names = self.runner.run(async move { collection.list_index_names().await }).await?;
        Ok(names.iter().any(|name| name == IN_USE))
    }

    async fn mark_in_use(&self, range: Document) -> Result<(), Failure> {
        let unmarked = doc! { "_id": range, IN_USE: { "$exists": false } };
        self.change(unmarked, doc! { "$set": { IN_USE: in_use(&self.clock) } }).await
    }

    /// Takes the field from records of which a block was the last use.
    pub(super) async fn unmark_unused(&self, range: Document) -> Result<(), Failure> {
        let over = doc! { "$not": [{ "$gt": ["$blocked_until", self.clock.clone()] }] };
        let unused = doc! { "_id": range, IN_USE: true, "holders": [], "waiters": [], "$expr": over };
        self.change(unused, doc! { "$unset": IN_USE }).await
    }

    async fn change(&self, which: Document, stage: Document) -> Result<(), Failure> {
        let statement = doc! { "q": which, "u": [stage], "multi": true };
        let update = doc! { "update": self.collection.name(), "updates": [statement] };
        self.feed.errands.write(&self.database, update, &self.concern).await?;
        Ok(())
    }
}

/// The last stage of an edit that may take or free a key.
pub(super) fn note_use(now: &Bson) -> Document {
    doc! { "$set": { IN_USE: in_use(now) } }
}

/// A record that has something else in place of a list counts as in use, and does not fail the marking of the others.
fn in_use(now: &Bson) -> Document {
    let used = doc! { "$or": [
        { "$ne": [{ "$ifNull": ["$holders", []] }, []] },
        { "$ne": [{ "$ifNull": ["$waiters", []] }, []] },
        { "$gt": ["$blocked_until", now.clone()] },
    ] };
    doc! { "$cond": [used, true, "$$REMOVE"] }
}

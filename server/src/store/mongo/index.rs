//! The index over the keys that are held, waited for or blocked, so that a listing costs what it shows, however many keys
//! are free.
//!
//! A record has the field `in_use` exactly then, and the index holds no other records. Touches leave the field alone. A
//! block ends by time alone, when nobody writes: the field then stays until the next edit or the next purge.
//!
//! Records without the index are served all the same, but a listing reads the free ones too.

use std::sync::atomic::{AtomicBool, Ordering};

use mongodb::bson::{Bson, Document, doc};

use super::MongoStore;
use super::purge::Pages;
use crate::store::failure::Failure;

/// The field, and the name of the index.
pub(super) const IN_USE: &str = "in_use";

/// Whether the index is there.
#[derive(Debug, Default)]
pub(super) struct Index {
    is_there: AtomicBool,
    has_warned: AtomicBool,
}

impl Index {
    pub(super) fn is_there(&self) -> bool {
        self.is_there.load(Ordering::Relaxed)
    }

    /// It was not found; [`MongoStore::make_index`] looks again.
    pub(super) fn lose(&self) {
        self.is_there.store(false, Ordering::Relaxed);
    }
}

impl MongoStore {
    /// Makes the index unless it is there. Without it everything works, so a failure is only a warning.
    pub(super) async fn make_index(&self) {
        if self.index.is_there() {
            return;
        }
        match self.create_index().await {
            Ok(()) => self.index.is_there.store(true, Ordering::Relaxed),
            Err(failure) if !self.index.has_warned.swap(true, Ordering::Relaxed) => {
                tracing::warn!(
                    cause = failure.into_cause(),
                    "no index on {IN_USE} could be made: listings and watches slow down with the number of free keys; give \
                     the MongoDB user the right createIndex on the collection"
                );
            }
            Err(_) => {}
        }
    }

    async fn create_index(&self) -> Result<(), Failure> {
        let index = doc! {
            "key": { "_id": 1, IN_USE: 1 },
            "name": IN_USE,
            "partialFilterExpression": { IN_USE: true },
        };
        if !self.has_index().await? {
            // Records of a version that did not keep the field, first: once the index is there listings go by it.
            let mut pages = Pages::default();
            while let Some(range) = pages.next(self).await? {
                self.mark_in_use(range).await?;
            }
        }
        let create = doc! { "createIndexes": self.collection.name(), "indexes": [index] };
        let database = self.database.clone();
        self.runner.run(async move { database.run_command(create).await }).await?;
        Ok(())
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

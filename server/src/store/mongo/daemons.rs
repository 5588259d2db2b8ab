//! Which daemons run on the same records: a small collection beside theirs, `<collection>.daemons`, with one document
//! for each. Operators may look at it; nothing but the change feed depends on it.
//!
//! ```text
//! { _id: uuid text, host, pid: long, version, started_at: date, seen_at: date }
//! ```
//!
//! Its instants are the database's, and so is the judgement who is alive.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use mongodb::Collection;
use mongodb::bson::{Document, Timestamp, doc};
use mongodb::options::{ReadConcern, ReadPreference, SelectionCriteria};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::MongoStore;
use super::command::ATTEMPT;
use super::document::long;
use crate::store::failure::Failure;

/// How the daemons keep up with each other.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    /// Between signs of life.
    pub(super) beat: Duration,
    /// Whose last sign is older does not count.
    pub(super) alive: Duration,
    /// So many looks in a row must find nobody before one is alone: daemons that restart one after the other are not.
    pub(super) patience: u32,
    /// A sign of life older than this is removed.
    pub(super) forget: Duration,
    /// A feed that stays this far behind is opened anew. More than the ten seconds after which a shard that is idle
    /// lets a change stream over all shards go on.
    pub(super) stale: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            beat: Duration::from_secs(1),
            alive: Duration::from_secs(10),
            patience: 60,
            forget: Duration::from_secs(3600),
            stale: Duration::from_secs(15),
        }
    }
}

/// This daemon among the others.
#[derive(Debug)]
pub(super) struct Daemons {
    store: MongoStore,
    collection: Collection<Document>,
    id: String,
    /// The database's time of the latest sign of life, and when it was confirmed.
    latest: Mutex<Option<(Timestamp, Instant)>>,
}

/// The name of the collection, so that records in two collections have daemons of their own.
pub(super) fn collection_name(records: &str) -> String {
    format!("{records}.daemons")
}

impl Daemons {
    pub(super) fn new(store: &MongoStore) -> Self {
        let collection = store.database.collection(&collection_name(store.collection.name()));
        Self { store: store.clone(), collection, id: Uuid::new_v4().to_string(), latest: Mutex::default() }
    }

    /// The database's time of this daemon's latest sign of life, unless that is long ago. A node that is not as far as
    /// this does not have all that a majority has.
    pub(super) fn latest(&self) -> Option<Timestamp> {
        let latest = *self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        latest.filter(|(_, confirmed)| confirmed.elapsed() < self.store.feed.pace.alive).map(|(time, _)| time)
    }

    /// Gives signs of life and says in `company` whether others do, until `ended`; then this daemon is gone at once.
    pub(super) async fn attend(&self, company: watch::Sender<bool>, ended: &CancellationToken) {
        let pace = self.store.feed.pace;
        let forget_every = u32::try_from(pace.forget.as_millis() / pace.beat.as_millis().max(1));
        let mut empty_looks = 0;
        for beat in 0_u32.. {
            // What a failure leaves unknown stays as it was: a database without a primary says nothing of daemons.
            match self.look(beat % forget_every.unwrap_or(u32::MAX).max(1) == 0).await {
                Ok(true) => {
                    empty_looks = 0;
                    company.send_if_modified(|others| !std::mem::replace(others, true));
                }
                Ok(false) => {
                    empty_looks += 1;
                    if empty_looks >= pace.patience {
                        company.send_if_modified(|others| std::mem::replace(others, false));
                    }
                }
                Err(failure) => {
                    tracing::debug!(cause = failure.into_cause(), "no sign of life could be given");
                }
            }
            // Spread, so that daemons that started together do not go on doing so.
            let next = sleep(pace.beat.mul_f64(0.8 + fastrand::f64() * 0.4));
            if ended.run_until_cancelled(next).await.is_none() {
                break;
            }
        }
        if let Err(failure) = self.remove(doc! { "_id": &self.id }).await {
            tracing::debug!(cause = failure.into_cause(), "others will miss this daemon later");
        }
    }

    /// A sign of life, and whether others give any.
    async fn look(&self, forget: bool) -> Result<bool, Failure> {
        self.beat().await?;
        if forget {
            let old = doc! { "$lt": ["$seen_at", ago(self.store.feed.pace.forget)] };
            self.remove(doc! { "seen_at": { "$type": "date" }, "$expr": old }).await?;
        }
        let alive = doc! { "$gt": ["$seen_at", ago(self.store.feed.pace.alive)] };
        let others = doc! { "_id": { "$ne": &self.id }, "$expr": alive };
        let collection = self.collection.clone();
        let find = async move {
            collection
                .find_one(others)
                .projection(doc! { "_id": 1 })
                .max_time(ATTEMPT)
                .read_concern(ReadConcern::majority())
                .selection_criteria(SelectionCriteria::ReadPreference(ReadPreference::Primary))
                .await
        };
        Ok(self.store.feed.errands.run(find).await?.is_some())
    }

    /// Gives a sign of life.
    pub(super) async fn beat(&self) -> Result<(), Failure> {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let set = doc! {
            "host": { "$literal": host },
            "pid": i64::from(std::process::id()),
            "version": { "$literal": env!("CARGO_PKG_VERSION") },
            "started_at": { "$ifNull": ["$started_at", "$$NOW"] },
            "seen_at": "$$NOW",
        };
        let statement = doc! { "q": { "_id": &self.id }, "u": [{ "$set": set }], "upsert": true };
        let update = doc! { "update": self.collection.name(), "updates": [statement] };
        let time = self.write(update).await?;
        *self.latest.lock().unwrap_or_else(PoisonError::into_inner) = Some((time, Instant::now()));
        Ok(())
    }

    async fn remove(&self, which: Document) -> Result<(), Failure> {
        let delete = doc! { "delete": self.collection.name(), "deletes": [{ "q": which, "limit": 0 }] };
        self.write(delete).await?;
        Ok(())
    }

    async fn write(&self, command: Document) -> Result<Timestamp, Failure> {
        let store = &self.store;
        store.feed.errands.write_in_time(&store.database, command, &store.concern).await
    }
}

fn ago(duration: Duration) -> Document {
    doc! { "$subtract": ["$$NOW", long(duration)] }
}

//! The store on MongoDB: one document per key, any number of daemons. The only files that know MongoDB.

mod check;
mod command;
mod commit;
#[cfg(test)]
mod commit_tests;
mod daemons;
mod document;
mod expression;
mod feed;
#[cfg(test)]
mod feed_tests;
mod pipeline;
mod reading;
#[cfg(test)]
mod wrong;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mongodb::bson::{Bson, RawDocumentBuf, doc};
use mongodb::options::WriteConcern;
use mongodb::{Client, Collection, Database};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

pub use check::Unusable;
use command::Runner;
use commit::Lines;
use daemons::{Daemons, Pace};
use feed::Feed;

use super::failure::Failure;
use super::{FeedEvent, FeedState, ForKey, ListQuery, Page, StartError, Store, StoreError, repeat};
use crate::lease::{Edit, Key, Rules};

/// Batches in flight; each is a command that writes and one that reads.
const BATCHES: usize = 2;

/// Where the records are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// The connection string; every option of the driver holds.
    pub uri: String,
    /// The database's name.
    pub database: String,
    /// The collection's name.
    pub collection: String,
}

/// Records in a MongoDB collection.
#[derive(Debug, Clone)]
pub struct MongoStore {
    rules: Rules,
    database: Database,
    collection: Collection<RawDocumentBuf>,
    concern: WriteConcern,
    runner: Runner,
    feed: Arc<Feed>,
    lines: Arc<Lines>,
    repetitions: Arc<AtomicU64>,
    clock: Bson,
    #[cfg(test)]
    pub(super) wrong: Option<super::conformance::wrongs::Wrong>,
}

impl MongoStore {
    /// Connects and makes sure that the database is one on which leases are safe.
    ///
    /// # Errors
    /// [`ConnectError::Unusable`] if the database can be reached and cannot be used, or the URI is wrong;
    /// [`ConnectError::Unreachable`] if it did not answer, so that trying again may help.
    pub async fn connect(location: &Location, rules: Rules) -> Result<Self, ConnectError> {
        let options = check::client_options(&location.uri).await?;
        let asked = options.write_concern.clone();
        let client = Client::with_options(options).map_err(|error| Unusable::Uri(command::brief(&error)))?;
        let database = client.database(&location.database);
        let mut store = Self {
            rules,
            collection: database.collection(&location.collection),
            database,
            concern: WriteConcern::majority(),
            runner: Runner::new(),
            feed: Arc::new(Feed::new(Pace::default())),
            lines: Arc::default(),
            repetitions: Arc::default(),
            clock: pipeline::CLOCK.into(),
            #[cfg(test)]
            wrong: None,
        };
        store.concern = check::database(&store, asked).await?;
        Ok(store)
    }

    /// Gives the document of `key` these fields, as somebody else may who writes to the collection.
    #[cfg(test)]
    pub(super) async fn damage(&self, key: &Key, fields: mongodb::bson::Document) {
        let update = doc! { "$set": fields };
        let damaged = self.collection.update_one(doc! { "_id": key.as_str() }, update).upsert(true).await;
        damaged.expect("an update");
    }

    /// Makes the document of `key` one that cannot grow any more, as MongoDB has no larger ones.
    #[cfg(test)]
    pub(super) async fn fill(&self, key: &Key) {
        let found = self.collection.find_one(doc! { "_id": key.as_str() }).await.expect("a read");
        let size = found.expect("a document").as_bytes().len();
        self.damage(key, doc! { "filler": "x".repeat(16 * 1024 * 1024 - size - 64) }).await;
    }

    /// Stops the clock at `now`, also if that is earlier.
    #[cfg(test)]
    pub(super) fn set_clock(&mut self, now: crate::lease::Timestamp) {
        self.clock = mongodb::bson::DateTime::from_millis(now.0).into();
    }
}

impl Store for MongoStore {
    async fn commit(
        &self,
        batch: Arc<Vec<(Key, Edit)>>,
        deadline: Duration,
    ) -> Result<Vec<ForKey>, StoreError> {
        repeat(deadline, &self.repetitions, async || Ok(self.attempt(&batch).await?)).await
    }

    fn batches(&self) -> usize {
        BATCHES
    }

    async fn read(&self, keys: Vec<Key>) -> Result<Vec<ForKey>, StoreError> {
        let names: Vec<&str> = keys.iter().map(Key::as_str).collect();
        let answers = self.find(&names).await?;
        self.lines.note(&answers);
        Ok(answers)
    }

    async fn list(&self, query: ListQuery) -> Result<Page, StoreError> {
        Ok(self.page(&query).await?)
    }

    async fn purge(&self, free_for: Duration) -> Result<u64, StoreError> {
        Ok(self.forget(free_for).await?)
    }

    async fn check(&self) -> Result<(), StoreError> {
        let database = self.database.clone();
        // Addressed to the primary: it answers when commits can go somewhere.
        let hello = async move { database.run_command(doc! { "hello": 1 }).await };
        self.runner.run(hello).await?;
        Ok(())
    }

    fn rules(&self) -> Rules {
        self.rules
    }

    fn name(&self) -> &'static str {
        "mongodb"
    }

    fn repetitions(&self) -> u64 {
        self.repetitions.load(Ordering::Relaxed)
    }

    async fn feed(&self, events: mpsc::Sender<FeedEvent>, draining: CancellationToken) {
        let ended = draining.child_token();
        let daemons = Daemons::new(self);
        let (company, others) = watch::channel(false);
        let tell = async {
            tokio::select! {
                () = feed::follow(self, &daemons, others, &events) => {}
                () = events.closed() => {}
                () = draining.cancelled() => {}
            }
            self.feed.progress.set_off();
            drop(events);
            ended.cancel();
        };
        tokio::join!(tell, daemons.attend(company, &ended));
    }

    fn feed_state(&self) -> FeedState {
        self.feed.progress.state()
    }

    fn is_shared(&self) -> bool {
        true
    }
}

/// Why there is no store.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// It can be reached, or need not be, and cannot be used.
    #[error(transparent)]
    Unusable(#[from] Unusable),
    /// It did not answer.
    #[error("{0}")]
    Unreachable(String),
}

impl From<ConnectError> for StartError {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::Unusable(why) => Self::Unusable(why.to_string()),
            ConnectError::Unreachable(why) => Self::Unreachable(why),
        }
    }
}

impl From<Failure> for ConnectError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::NotApplied(cause) | Failure::Unknown(cause) | Failure::Record(cause) => {
                Self::Unreachable(cause)
            }
            Failure::Refused(cause) => Self::Unusable(Unusable::Rights(cause)),
        }
    }
}

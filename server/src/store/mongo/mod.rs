//! The store on MongoDB: one document per key, any number of daemons. Only the files in here use
//! MongoDB's driver.

/// Commits: the commands that apply a batch.
mod commit;
/// The rules as an aggregation pipeline.
mod pipeline;
/// Helpers to write expressions of pipelines.
mod expression;
/// Documents: records as MongoDB stores them.
mod document;
/// One command: its task, its time limit, its failure.
mod command;
/// The limit of commands on the database's clock.
mod clock;
/// Reads of keys and pages.
mod reading;
/// Deletes records of keys that have long been free.
mod purge;
/// The index of keys in use.
mod index;
/// The change feed.
mod feed;
/// Heartbeats: this daemon and its peers.
mod daemons;
/// The store's identity.
mod identity;
/// Checks that leases are safe on the database.
mod check;
/// The connection string, and how its secrets stay out of messages.
mod uri;

#[cfg(test)]
mod commit_tests;
#[cfg(test)]
mod feed_tests;
#[cfg(test)]
mod index_tests;
#[cfg(test)]
mod ready_tests;
/// Deliberate faults in the pipeline.
#[cfg(test)]
mod mutants;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use mongodb::bson::{Bson, Document, RawDocumentBuf, doc};
use mongodb::options::WriteConcern;
use mongodb::{Client, Collection, Database};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub use check::Unusable;
use clock::StoreClock;
use command::{Runner, shut_down};
use commit::KeysWithWaiters;
use daemons::{Daemons, HeartbeatConfig};
use feed::Feed;
use index::Index;
use reading::Inspection;
use uri::Printer;

use super::failure::{Effects, Failure};
use super::{Committed, FeedEvent, FeedState, ForKey, ListQuery, Page, StartError, Store, StoreError};
use crate::boot_instant::BootInstant;
use crate::lease::{Edit, Key, Rules, Snapshot, Timestamp};

/// How many batches are in flight at once: while one of them reads its records, the other one
/// writes. More batches would be smaller, and most of the cost of a small batch is overhead.
const BATCHES: usize = 2;

/// If no majority has acknowledged a heartbeat for this long, commits cannot succeed either.
const SILENCE: Duration = Duration::from_secs(5);
/// How long `leave` may take.
const FAREWELL: Duration = Duration::from_secs(8);

/// Where the records are.
#[derive(Clone, PartialEq, Eq)]
pub struct Location {
    /// The connection string. Options that would make leases unsafe are refused.
    pub uri: String,
    /// The database's name.
    pub database: String,
    /// The collection's name.
    pub collection: String,
}

/// Leaves out the URI, which may contain a password.
impl fmt::Debug for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { uri: _, database, collection } = self;
        f.debug_struct("Location")
            .field("database", database)
            .field("collection", collection)
            .finish_non_exhaustive()
    }
}

/// Keeps records in a MongoDB collection.
#[derive(Debug, Clone)]
pub struct MongoStore {
    rules: Rules,
    id: Uuid,
    database: Database,
    collection: Collection<RawDocumentBuf>,
    concern: WriteConcern,
    runner: Runner,
    inspection: Inspection,
    index: Arc<Index>,
    feed: Arc<Feed>,
    keys_with_waiters: Arc<KeysWithWaiters>,
    store_clock: Arc<StoreClock>,
    /// The expression for the database's time. A constant in tests that stop the clock.
    clock: Bson,
    #[cfg(test)]
    pub(super) mutant: Option<super::conformance::mutants::Mutant>,
}

impl MongoStore {
    /// Connects, and checks that leases are safe on the database.
    ///
    /// # Errors
    /// [`ConnectError::Unusable`] if the database or the URI cannot be used;
    /// [`ConnectError::Unreachable`] if the database did not answer, so that trying again may help.
    pub async fn connect(location: &Location, rules: Rules) -> Result<Self, ConnectError> {
        let mut printer = Printer::new(&location.uri);
        let store = Self::open(location, rules, &mut printer).await;
        store.map_err(|error| printer.printable(error))
    }

    async fn open(location: &Location, rules: Rules, printer: &mut Printer) -> Result<Self, ConnectError> {
        let options = uri::client_options(&location.uri).await?;
        printer.with_options(&options);
        let inspection = Inspection::new(options.clone(), location)?;
        let client = Client::with_options(options.clone()).map_err(|error| uri::unusable(&error))?;
        let database = client.database(&location.database);
        let mut store = Self {
            rules,
            id: Uuid::nil(),
            collection: database.collection(&location.collection),
            database,
            concern: uri::write_concern(),
            runner: Runner::new(),
            inspection,
            index: Arc::default(),
            feed: Arc::new(Feed::new(HeartbeatConfig::default())),
            keys_with_waiters: Arc::default(),
            store_clock: Arc::default(),
            clock: pipeline::CLOCK.into(),
            #[cfg(test)]
            mutant: None,
        };
        let checked = async {
            check::database(&store, &options).await?;
            store.make_index().await;
            Ok(identity::settle(&store).await?)
        };
        match checked.await {
            Ok(id) => store.id = id,
            Err(error) => {
                // A client that is dropped without a shutdown may panic in a separate task.
                store.leave().await;
                return Err(error);
            }
        }
        Ok(store)
    }

    /// Asks the primary for its time.
    async fn read_clock(&self) -> Result<(), Failure> {
        self.hello(&self.runner).await?;
        Ok(())
    }

    /// Asks the primary, or a router, to describe itself. Notes the time in the answer.
    async fn hello(&self, runner: &Runner) -> Result<Document, Failure> {
        let database = self.database.clone();
        let sent = BootInstant::now();
        let hello = runner.run(async move { database.run_command(doc! { "hello": 1 }).await }).await?;
        let received = BootInstant::now();
        if hello.get_bool("isWritablePrimary").is_ok_and(|is_primary| !is_primary) {
            return Err(Failure::not_applied("the node that answers is not the primary"));
        }
        let time = hello.get_datetime("localTime").map_err(Failure::not_applied)?;
        self.learn_time(Timestamp(time.timestamp_millis()), sent, received);
        Ok(hello)
    }

    /// Sets fields of the document of `key`, as any program that can write to the collection may.
    #[cfg(test)]
    pub(super) async fn damage(&self, key: &Key, fields: Document) {
        let update = doc! { "$set": fields };
        let damaged = self.collection.update_one(doc! { "_id": key.as_str() }, update).upsert(true).await;
        damaged.expect("an update");
    }

    /// Fills the document of `key` up to the largest size that MongoDB allows.
    #[cfg(test)]
    pub(super) async fn fill(&self, key: &Key) {
        let found = self.collection.find_one(doc! { "_id": key.as_str() }).await.expect("a read");
        let size = found.expect("a document").as_bytes().len();
        self.damage(key, doc! { "filler": "x".repeat(16 * 1024 * 1024 - size - 64) }).await;
    }

    /// Stops the clock at `now`, which may be earlier than before.
    #[cfg(test)]
    pub(super) fn set_clock(&mut self, now: Timestamp) {
        self.clock = mongodb::bson::DateTime::from_millis(now.0).into();
    }
}

impl Store for MongoStore {
    async fn commit(
        &self,
        batch: Arc<Vec<(Key, Edit)>>,
        deadline: Duration,
    ) -> Result<Committed, StoreError> {
        let effects = Effects::default();
        let done = self.attempt(&batch, &effects, Instant::now() + deadline).await;
        Ok(Committed::at_once(done.map_err(|failure| effects.conclude(failure))?))
    }

    fn batches(&self) -> usize {
        BATCHES
    }

    async fn read(&self, keys: Vec<Key>) -> Result<Vec<ForKey>, StoreError> {
        let names: Vec<&str> = keys.iter().map(Key::as_str).collect();
        let answers = self.read_keys(&names).await?;
        self.keys_with_waiters.note(answers.iter().flatten());
        Ok(answers)
    }

    async fn inspect(&self, key: Key) -> Result<Option<Snapshot>, StoreError> {
        self.read_one(&key).await
    }

    async fn list(&self, query: ListQuery) -> Result<Page, StoreError> {
        Ok(self.list_page(&query).await?)
    }

    async fn purge(&self, free_for: Duration) -> Result<u64, StoreError> {
        Ok(self.purge_keys(free_for).await?)
    }

    async fn check(&self) -> Result<(), StoreError> {
        self.hello(&self.feed.background).await?;
        // A primary that has lost its majority does not say so.
        match self.feed.member.silence() {
            Some(silence) if silence > SILENCE => {
                let cause = format!("no majority has acknowledged a write for {} s", silence.as_secs());
                Err(Failure::not_applied(cause).into())
            }
            _ => Ok(()),
        }
    }

    fn id(&self) -> Uuid {
        self.id
    }

    async fn join(&self) -> Result<(), StartError> {
        Ok(Daemons::new(self).join().await?)
    }

    async fn objection(&self) -> String {
        self.feed.member.objection().await
    }

    async fn leave(&self) {
        let store = self.clone();
        // In a task, because the timeout must not drop a future of the driver.
        let farewell = tokio::spawn(async move {
            Daemons::new(&store).unregister().await;
            let runners = [&store.runner, &store.feed.background, &store.index.build_runner];
            tokio::join!(shut_down(store.database.client(), &runners), store.inspection.end());
        });
        if tokio::time::timeout(FAREWELL, farewell).await.is_err() {
            tracing::debug!("MongoDB's driver did not end in time");
        }
    }

    fn rules(&self) -> Rules {
        self.rules
    }

    fn name(&self) -> &'static str {
        "mongodb"
    }

    fn clock_steps(&self) -> u64 {
        self.store_clock.steps()
    }

    async fn feed(&self, events: mpsc::Sender<FeedEvent>, draining: CancellationToken) {
        let ended = draining.child_token();
        let daemons = Daemons::new(self);
        let (peers_present, others) = watch::channel(false);
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
        tokio::join!(tell, daemons.run_heartbeats(peers_present, &ended));
    }

    fn feed_state(&self) -> FeedState {
        self.feed.progress.state()
    }

    fn is_shared(&self) -> bool {
        true
    }
}

/// Why there is no connection.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The database, or the configuration, cannot be used.
    #[error(transparent)]
    Unusable(#[from] Unusable),
    /// The database did not answer.
    #[error("{0}")]
    Unreachable(String),
}

impl ConnectError {
    /// The text of the driver or the server, if there is any.
    fn cause_mut(&mut self) -> Option<&mut String> {
        match self {
            Self::Unreachable(cause)
            | Self::Unusable(
                Unusable::Uri(cause)
                | Unusable::Login(cause)
                | Unusable::Rights(cause)
                | Unusable::Refused(cause),
            ) => Some(cause),
            Self::Unusable(_) => None,
        }
    }
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
            Failure::NotApplied(cause)
            | Failure::Late(cause)
            | Failure::Unknown(cause)
            | Failure::Record(cause) => Self::Unreachable(cause),
            // `check` tells most refusals apart by the server's code. This is one of the others.
            Failure::Refused(cause) => Self::Unusable(Unusable::Rights(cause)),
        }
    }
}

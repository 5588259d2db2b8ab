//! The backends that apply the edits of a test: [`step`] alone, the embedded store, or a real
//! MongoDB. The test sets their clocks.

use std::collections::HashMap;
use std::panic::panic_any;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use mongodb::bson::spec::BinarySubtype;
use mongodb::bson::{Binary, DateTime, Document, doc};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::mutants::Mutant;
use super::reading::try_commit;
use crate::lease::{Edit, Key, LeaseId, Record, Rules, Snapshot, Timestamp, step};
use crate::store::embedded::EmbeddedStore;
use crate::store::mongo::{Location, MongoStore};
use crate::store::{
    Committed, FeedEvent, FeedState, ForKey, ListQuery, Page, Store, StoreError, makes_record,
};

/// What applies the edits of a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Backend {
    /// The specification.
    Step,
    Embedded,
    MongoDb,
    /// The specification with a mistake.
    MutantStep(Mutant),
    /// MongoDB with a mistake in its pipeline.
    MutantPipeline(Mutant),
}

/// The payload with which [`Applier::apply`] panics if the store gives no answer.
#[derive(Debug)]
pub(super) struct Unanswered(pub(super) StoreError);

impl Unanswered {
    /// Whether an edit left a record that cannot be read, as a mutant may do. Other failures do not
    /// show a mutant: the store may be unreachable, or the database may be unable to run the
    /// pipeline.
    pub(super) fn is_of_a_record(&self) -> bool {
        let Self(error) = self;
        matches!(error, StoreError::Unreadable { cause, .. } if cause.ends_with("is missing or of another type"))
    }
}

/// Either store, with a clock that the test sets.
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "a test has a few of them")]
pub(super) enum TestStore {
    Embedded(EmbeddedStore, #[expect(dead_code, reason = "removes the folder in the end")] Arc<TempDir>),
    MongoDb(MongoStore),
}

/// How a record is damaged. The embedded store has only one way: bytes that are no record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Damage {
    /// MongoDB cannot evaluate any expression about holders.
    HoldersAreText,
    HolderIsText,
    TokenIsText,
    BlockIsText,
    /// MongoDB can update the record, and the store cannot read it.
    UnknownReason,
}

impl Damage {
    fn fields(self) -> Document {
        match self {
            Self::HoldersAreText => doc! { "holders": "none" },
            Self::HolderIsText => doc! { "holders": ["somebody"] },
            Self::TokenIsText => doc! { "token": "7" },
            Self::BlockIsText => doc! { "blocked_until": "soon" },
            Self::UnknownReason => {
                let now = DateTime::from_millis(0);
                let id = Binary { subtype: BinarySubtype::Uuid, bytes: vec![7; 16] };
                doc! { "departures": [{ "id": id, "reason": "bored", "at": now }] }
            }
        }
    }
}

/// Applies batches of edits.
#[expect(clippy::large_enum_variant, reason = "there are few of them, in tests")]
#[derive(Debug)]
pub(super) enum Applier {
    Step { records: HashMap<Key, Record>, rules: Rules, mutant: Option<Mutant> },
    Store(TestStore),
}

/// Runs `work` on a runtime that all tests share. MongoDB's driver leaves tasks in its runtime,
/// which must outlive them.
pub(super) fn wait_for<T>(work: impl Future<Output = T>) -> T {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| Runtime::new().expect("a runtime")).block_on(work)
}

impl Backend {
    /// Creates an applier. On MongoDB all appliers share a collection, so each test must use keys
    /// of its own.
    pub(super) fn applier(self, rules: Rules) -> Applier {
        match self {
            Self::Step => Applier::Step { records: HashMap::new(), rules, mutant: None },
            Self::MutantStep(mutant) => {
                Applier::Step { records: HashMap::new(), rules, mutant: Some(mutant) }
            }
            Self::Embedded => Applier::Store(self.store(rules)),
            Self::MongoDb | Self::MutantPipeline(_) => {
                let mut store = wait_for(mongodb("conformance", rules));
                store.mutant = match self {
                    Self::MutantPipeline(mutant) => Some(mutant),
                    _ => None,
                };
                Applier::Store(TestStore::MongoDb(store))
            }
        }
    }

    /// Creates a store with a clock of its own. MongoDB stores share the collection of `store`. An
    /// embedded store needs its own file.
    pub(super) fn another(self, store: &TestStore) -> TestStore {
        match store {
            TestStore::Embedded(..) => self.store(store.rules()),
            TestStore::MongoDb(_) => store.clone(),
        }
    }

    /// Creates an empty store.
    pub(super) fn store(self, rules: Rules) -> TestStore {
        match self {
            Self::Embedded => {
                let folder = tempfile::tempdir().expect("a folder");
                let store = wait_for(EmbeddedStore::open(folder.path(), rules)).expect("a usable folder");
                TestStore::Embedded(store, Arc::new(folder))
            }
            _ => TestStore::MongoDb(wait_for(mongodb(&LeaseId::random().reveal(), rules))),
        }
    }
}

async fn mongodb(collection: &str, rules: Rules) -> MongoStore {
    let uri = throwaway_mongodb::shared().await.expect("a MongoDB for tests").to_owned();
    let location = Location { uri, database: "conformance".into(), collection: collection.into() };
    MongoStore::connect(&location, rules).await.expect("a usable store")
}

impl Applier {
    /// Applies the batch at `now` and returns the records after it.
    ///
    /// # Panics
    /// With [`Unanswered`] if the store gives no answer.
    pub(super) fn apply(&mut self, batch: Vec<(Key, Edit)>, now: Timestamp) -> Vec<Record> {
        self.try_apply(batch, now).unwrap_or_else(|unanswered| panic_any(unanswered))
    }

    /// Applies the batch at `now` and returns the records after it, or that the store gives no
    /// answer.
    pub(super) fn try_apply(
        &mut self,
        batch: Vec<(Key, Edit)>,
        now: Timestamp,
    ) -> Result<Vec<Record>, Unanswered> {
        match self {
            Self::Step { records, rules, mutant } => {
                let step = mutant.map_or(step as Step, Mutant::step);
                let record = |(key, edit)| specified(records, step, key, &edit, now, rules);
                Ok(batch.into_iter().map(record).collect())
            }
            Self::Store(store) => {
                store.set_clock(now);
                let answers = wait_for(try_commit(store, batch));
                let record = |answer: ForKey| answer.map(|snapshot| snapshot.record).map_err(Unanswered);
                answers.map_err(Unanswered)?.into_iter().map(record).collect()
            }
        }
    }
}

/// The type of the specification and of its mutants.
pub(super) type Step = fn(Record, &Edit, Timestamp, &Rules) -> Record;

fn specified(
    records: &mut HashMap<Key, Record>,
    step: Step,
    key: Key,
    edit: &Edit,
    now: Timestamp,
    rules: &Rules,
) -> Record {
    // Like the stores, keeps no record of a key for an edit that makes none.
    let before = records.remove(&key).or_else(|| makes_record(edit).then(|| Record::vacant(key.clone())));
    let Some(before) = before else { return Record::vacant(key) };
    let after = step(before, edit, now, rules);
    records.insert(key, after.clone());
    after
}

impl TestStore {
    /// Damages the record of `key`.
    pub(super) fn damage(&self, key: &Key, damage: Damage) {
        match self {
            Self::Embedded(store, _) => store.damage(key),
            Self::MongoDb(store) => wait_for(store.damage(key, damage.fields())),
        }
    }

    /// Stops the store's clock at `now`.
    pub(super) fn set_clock(&mut self, now: Timestamp) {
        match self {
            Self::Embedded(store, _) => store.set_clock(now),
            Self::MongoDb(store) => store.set_clock(now),
        }
    }
}

impl Store for TestStore {
    async fn commit(
        &self,
        batch: Arc<Vec<(Key, Edit)>>,
        deadline: Duration,
    ) -> Result<Committed, StoreError> {
        match self {
            Self::Embedded(store, _) => store.commit(batch, deadline).await,
            Self::MongoDb(store) => store.commit(batch, deadline).await,
        }
    }

    fn batches(&self) -> usize {
        match self {
            Self::Embedded(store, _) => store.batches(),
            Self::MongoDb(store) => store.batches(),
        }
    }

    async fn read(&self, keys: Vec<Key>) -> Result<Vec<ForKey>, StoreError> {
        match self {
            Self::Embedded(store, _) => store.read(keys).await,
            Self::MongoDb(store) => store.read(keys).await,
        }
    }

    async fn inspect(&self, key: Key) -> Result<Option<Snapshot>, StoreError> {
        match self {
            Self::Embedded(store, _) => store.inspect(key).await,
            Self::MongoDb(store) => store.inspect(key).await,
        }
    }

    async fn list(&self, query: ListQuery) -> Result<Page, StoreError> {
        match self {
            Self::Embedded(store, _) => store.list(query).await,
            Self::MongoDb(store) => store.list(query).await,
        }
    }

    async fn purge(&self, free_for: Duration) -> Result<u64, StoreError> {
        match self {
            Self::Embedded(store, _) => store.purge(free_for).await,
            Self::MongoDb(store) => store.purge(free_for).await,
        }
    }

    async fn check(&self) -> Result<(), StoreError> {
        match self {
            Self::Embedded(store, _) => store.check().await,
            Self::MongoDb(store) => store.check().await,
        }
    }

    fn id(&self) -> Uuid {
        match self {
            Self::Embedded(store, _) => store.id(),
            Self::MongoDb(store) => store.id(),
        }
    }

    fn rules(&self) -> Rules {
        match self {
            Self::Embedded(store, _) => store.rules(),
            Self::MongoDb(store) => store.rules(),
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Embedded(store, _) => store.name(),
            Self::MongoDb(store) => store.name(),
        }
    }

    async fn feed(&self, events: mpsc::Sender<FeedEvent>, draining: CancellationToken) {
        match self {
            Self::Embedded(store, _) => store.feed(events, draining).await,
            Self::MongoDb(store) => store.feed(events, draining).await,
        }
    }

    fn feed_state(&self) -> FeedState {
        match self {
            Self::Embedded(store, _) => store.feed_state(),
            Self::MongoDb(store) => store.feed_state(),
        }
    }

    fn is_shared(&self) -> bool {
        match self {
            Self::Embedded(store, _) => store.is_shared(),
            Self::MongoDb(store) => store.is_shared(),
        }
    }
}

//! Where edits are applied: by [`step`] alone, by the embedded store, or by a real MongoDB; at instants that the test
//! chooses.

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

use super::mutants::Wrong;
use crate::lease::{Edit, Key, LeaseId, Record, Rules, Snapshot, Timestamp, step};
use crate::store::embedded::EmbeddedStore;
use crate::store::mongo::{Location, MongoStore};
use crate::store::{
    Committed, FeedEvent, FeedState, ForKey, ListQuery, Page, Store, StoreError, makes_record,
};

/// Who applies the edits of a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Home {
    /// The specification.
    Step,
    Embedded,
    MongoDb,
    /// The specification with a deliberate wrong in it.
    WrongStep(Wrong),
    /// MongoDB with a deliberate wrong in its pipeline.
    WrongPipeline(Wrong),
}

/// What a desk panics with when the store gives no answer.
#[derive(Debug)]
pub(super) struct Unanswered(pub(super) StoreError);

impl Unanswered {
    /// Whether an edit left a record that cannot be read, which a wrong rule may do. Whatever else a store fails with says
    /// nothing of the rules: that it is away, or that the database cannot compute the pipeline.
    pub(super) fn is_of_a_record(&self) -> bool {
        let Self(error) = self;
        matches!(error, StoreError::Unreadable { cause, .. } if cause.ends_with("is missing or of another type"))
    }
}

/// Either store, at instants that the test chooses.
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "a test has a few of them")]
pub(super) enum TestStore {
    Embedded(EmbeddedStore, #[expect(dead_code, reason = "removes the folder in the end")] Arc<TempDir>),
    MongoDb(MongoStore),
}

/// What is wrong with a record. The embedded store has one way for all: bytes that are no record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Damage {
    /// No expression about holders can be computed.
    HoldersAreText,
    HolderIsText,
    TokenIsText,
    BlockIsText,
    /// It is written, and cannot be read after that.
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

/// Applies batches.
#[expect(clippy::large_enum_variant, reason = "there are few of them, in tests")]
#[derive(Debug)]
pub(super) enum Applier {
    Step { records: HashMap<Key, Record>, rules: Rules, wrong: Option<Wrong> },
    Store(TestStore),
}

/// The runtime of all stores in tests; MongoDB's driver leaves tasks in it.
pub(super) fn wait_for<T>(work: impl Future<Output = T>) -> T {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| Runtime::new().expect("a runtime")).block_on(work)
}

impl Home {
    /// An applier that knows no key yet. Its records are its own, but not its whole store, if that is MongoDB.
    pub(super) fn applier(self, rules: Rules) -> Applier {
        match self {
            Self::Step => Applier::Step { records: HashMap::new(), rules, wrong: None },
            Self::WrongStep(wrong) => Applier::Step { records: HashMap::new(), rules, wrong: Some(wrong) },
            Self::Embedded => Applier::Store(self.store(rules)),
            Self::MongoDb | Self::WrongPipeline(_) => {
                let mut store = wait_for(mongodb("conformance", rules));
                store.wrong = match self {
                    Self::WrongPipeline(wrong) => Some(wrong),
                    _ => None,
                };
                Applier::Store(TestStore::MongoDb(store))
            }
        }
    }

    /// A store with a clock of its own: MongoDB's stand beside each other, an embedded one needs a file of its own.
    pub(super) fn beside(self, store: &TestStore) -> TestStore {
        match store {
            TestStore::Embedded(..) => self.store(store.rules()),
            TestStore::MongoDb(_) => store.clone(),
        }
    }

    /// A store that is empty.
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
    /// Applies the batch at `now` and returns the records after it. Panics with [`Unanswered`] if there is none.
    pub(super) fn apply(&mut self, batch: Vec<(Key, Edit)>, now: Timestamp) -> Vec<Record> {
        self.try_apply(batch, now).unwrap_or_else(|unanswered| panic_any(unanswered))
    }

    /// Applies the batch at `now` and returns the records after it.
    pub(super) fn try_apply(
        &mut self,
        batch: Vec<(Key, Edit)>,
        now: Timestamp,
    ) -> Result<Vec<Record>, Unanswered> {
        match self {
            Self::Step { records, rules, wrong } => {
                let step = wrong.map_or(step as Step, Wrong::step);
                let record = |(key, edit)| specified(records, step, key, &edit, now, rules);
                Ok(batch.into_iter().map(record).collect())
            }
            Self::Store(store) => {
                store.set_clock(now);
                let answers = wait_for(store.commit(Arc::new(batch), Duration::from_secs(30)));
                let record = |answer: ForKey| answer.map(|snapshot| snapshot.record).map_err(Unanswered);
                answers.map_err(Unanswered)?.records.into_iter().map(record).collect()
            }
        }
    }
}

/// The specification, or what stands for it.
pub(super) type Step = fn(Record, &Edit, Timestamp, &Rules) -> Record;

fn specified(
    records: &mut HashMap<Key, Record>,
    step: Step,
    key: Key,
    edit: &Edit,
    now: Timestamp,
    rules: &Rules,
) -> Record {
    let before = records.remove(&key).or_else(|| makes_record(edit).then(|| Record::vacant(key.clone())));
    let Some(before) = before else { return Record::vacant(key) };
    let after = step(before, edit, now, rules);
    records.insert(key, after.clone());
    after
}

impl TestStore {
    /// Makes the record of `key` one that cannot be read or written, in one of several ways.
    pub(super) fn damage(&self, key: &Key, way: Damage) {
        match self {
            Self::Embedded(store, _) => store.damage(key),
            Self::MongoDb(store) => wait_for(store.damage(key, way.fields())),
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

    fn repetitions(&self) -> u64 {
        match self {
            Self::Embedded(store, _) => store.repetitions(),
            Self::MongoDb(store) => store.repetitions(),
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

//! An embedded store that is slow, or fails, or panics, or has an attempt stall on its way, when it is told to.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tempfile::TempDir;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::yield_now;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::{Bounds, Lessor};
use crate::lease::{Edit, Key, Rules};
use crate::metrics::registry::Meter;
use crate::store::embedded::EmbeddedStore;
use crate::store::{Committed, FeedEvent, FeedState, ForKey, ListQuery, Outcome, Page, Store, StoreError};

const RULES: Rules = Rules { grace: Duration::ZERO, place: Duration::from_secs(15) };
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// A batch as the store is given it.
type Edits = Arc<Vec<(Key, Edit)>>;
/// The keys of a batch, and how many leases each edit touched.
pub(super) type Batch = Vec<(Key, usize)>;

/// An embedded store, one batch at a time.
#[derive(Debug, Clone)]
pub(super) struct Gated {
    pub(super) store: EmbeddedStore,
    /// A batch needs a permit, and so does a page.
    gate: Arc<Semaphore>,
    pub(super) batches: Arc<Mutex<Vec<Batch>>>,
    /// The prefixes of the pages that were asked for.
    pub(super) pages: Arc<Mutex<Vec<String>>>,
    /// So many of the next batches fail and change nothing.
    pub(super) fails: Arc<AtomicUsize>,
    /// The next batch does.
    pub(super) panics: Arc<AtomicBool>,
    /// The first attempt at the next batch stalls on its way, and the batch is repeated.
    pub(super) stalls: Arc<AtomicBool>,
    /// What stalled or failed, and may come yet.
    stalled: Arc<Mutex<Vec<Edits>>>,
    _folder: Arc<TempDir>,
}

impl Gated {
    pub(super) async fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        Self {
            store: EmbeddedStore::open(folder.path(), RULES).await.expect("a usable folder"),
            gate: Arc::new(Semaphore::new(1)),
            batches: Arc::default(),
            pages: Arc::default(),
            fails: Arc::default(),
            panics: Arc::default(),
            stalls: Arc::default(),
            stalled: Arc::default(),
            _folder: Arc::new(folder),
        }
    }

    /// An engine over it, with room for so many commands.
    pub(super) fn engine(&self, queued_commands: usize) -> Lessor<Self> {
        self.engine_within(Bounds { call: PATIENCE, queued_commands, ..Bounds::default() })
    }

    pub(super) fn engine_within(&self, bounds: Bounds) -> Lessor<Self> {
        let (draining, tasks) = (CancellationToken::new(), TaskTracker::new());
        Lessor::start(self.clone(), bounds, draining, &mut Meter::default(), &tasks)
    }

    /// Lets no batch through until this is dropped.
    pub(super) async fn close(&self) -> OwnedSemaphorePermit {
        Arc::clone(&self.gate).acquire_owned().await.expect("a gate")
    }

    /// How many batches there have been, and in which of them the key was.
    pub(super) fn batches_of(&self, key: &Key) -> (usize, Vec<usize>) {
        let batches = self.batches.lock().expect("batches");
        let with_it =
            batches.iter().enumerate().filter(|(_, keys)| keys.iter().any(|(other, _)| other == key));
        (batches.len(), with_it.map(|(number, _)| number).collect())
    }

    /// Applies an edit at once, also while no batch is let through.
    pub(super) async fn apply(&self, key: Key, edit: Edit) {
        self.store.commit(Arc::new(vec![(key, edit)]), PATIENCE).await.expect("a commit");
    }

    /// Applies the attempts that stalled or failed.
    pub(super) async fn deliver_stalled(&self) {
        let stalled = std::mem::take(&mut *self.stalled.lock().expect("batches"));
        assert!(!stalled.is_empty(), "none stalled");
        for batch in stalled {
            self.store.commit(batch, PATIENCE).await.expect("a commit");
        }
    }
}

impl Store for Gated {
    async fn commit(&self, batch: Edits, deadline: Duration) -> Result<Committed, StoreError> {
        let touched = batch.iter().map(|(key, edit)| (key.clone(), edit.touched().len())).collect();
        self.batches.lock().expect("batches").push(touched);
        let fails = |left: usize| left.checked_sub(1);
        let fails = self.fails.fetch_update(Ordering::SeqCst, Ordering::SeqCst, fails).is_ok();
        let _permit = self.gate.acquire().await.expect("a gate");
        if fails {
            self.stalled.lock().expect("batches").push(batch);
            let cause = "it is to fail".to_owned();
            return Err(StoreError::Unavailable { outcome: Outcome::Unknown, cause });
        }
        assert!(!self.panics.swap(false, Ordering::SeqCst), "a batch is to panic");
        if !self.stalls.swap(false, Ordering::SeqCst) {
            return self.store.commit(batch, deadline).await;
        }
        self.stalled.lock().expect("batches").push(Arc::clone(&batch));
        let repeated = batch.iter().map(|(key, edit)| (key.clone(), edit.clone().repeated()));
        let committed = self.store.commit(Arc::new(repeated.collect()), deadline).await?;
        Ok(Committed { is_repeated: true, ..committed })
    }

    fn batches(&self) -> usize {
        1
    }

    async fn read(&self, keys: Vec<Key>) -> Result<Vec<ForKey>, StoreError> {
        self.store.read(keys).await
    }

    async fn list(&self, query: ListQuery) -> Result<Page, StoreError> {
        self.pages.lock().expect("pages").push(query.prefix.clone());
        let _permit = self.gate.acquire().await.expect("a gate");
        self.store.list(query).await
    }

    async fn purge(&self, free_for: Duration) -> Result<u64, StoreError> {
        self.store.purge(free_for).await
    }

    async fn check(&self) -> Result<(), StoreError> {
        self.store.check().await
    }

    fn id(&self) -> Uuid {
        self.store.id()
    }

    fn rules(&self) -> Rules {
        RULES
    }

    fn name(&self) -> &'static str {
        "gated"
    }

    fn repetitions(&self) -> u64 {
        self.store.repetitions()
    }

    async fn feed(&self, _: mpsc::Sender<FeedEvent>, _: CancellationToken) {}

    fn feed_state(&self) -> FeedState {
        FeedState::Off
    }

    fn is_shared(&self) -> bool {
        false
    }
}

pub(super) fn key(name: &str) -> Key {
    Key::try_from(name).expect("a key")
}

/// Waits until the condition holds.
pub(super) async fn until(condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            yield_now().await;
        }
    };
    timeout(PATIENCE, wait).await.expect("it holds in time");
}

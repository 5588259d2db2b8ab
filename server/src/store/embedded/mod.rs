//! The store of a single daemon: one file. Only the files in here use redb.
//!
//! A single thread applies the rules, in one write transaction for all waiting batches. A commit is
//! answered when it is on the disk. All threads start when the store opens, because the system may
//! refuse a thread later.

/// The thread that writes, and what writer and readers share.
mod writer;
/// The threads that read.
mod readers;
/// The file: opening it, checking it, and noticing that it was removed.
mod file;
/// Holds writes back until the file is known to be usable.
mod disk;
/// Facts about the file, beside the records.
mod facts;
/// Records as bytes.
mod document;
/// The keys in use, in memory.
mod in_use;
/// The store's clock.
mod clock;

#[cfg(test)]
mod faults;
#[cfg(test)]
mod machine;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use redb::{ReadOnlyTable, ReadableDatabase};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use clock::{Host, Readings};
use facts::RECORDS;
pub use file::OpenError;
use file::{DataFile, Medium};
use readers::Readers;
use writer::{OpenStore, Unstarted, Writer};

use super::failure::Failure;
use super::{
    Committed, FeedEvent, FeedState, ForKey, ListQuery, Page, StartError, Store, StoreError, report,
};
use crate::lease::{Edit, FencingToken, Key, Rules, Snapshot};

/// How many batches are in flight at once. The writer groups all waiting batches into one
/// transaction, so more batches in flight do not shrink its writes.
const BATCHES: usize = 4;
/// How many threads read keys, and how many read pages. A page may take long, and the engine must
/// not wait for that when it reads keys.
const KEY_READERS: usize = 4;
const PAGE_READERS: usize = 4;
/// A page ends when it has more bytes than this.
const PAGE_BYTES: usize = 4 * 1024 * 1024;

/// Keeps records in a file. The file is closed soon after the last clone is dropped.
#[derive(Debug, Clone)]
pub struct EmbeddedStore {
    writer: Writer,
    keys: Readers,
    pages: Readers,
}

impl EmbeddedStore {
    /// Opens the data in `folder`, or creates it, and checks that it is intact.
    ///
    /// # Errors
    /// [`OpenError`]: another daemon uses the data, it is damaged or another program's, or the
    /// system denies access.
    pub async fn open(folder: &Path, rules: Rules) -> Result<Self, OpenError> {
        Self::open_on(Box::new(DataFile::in_folder(folder)), rules, Arc::new(Host)).await
    }

    async fn open_on(
        medium: Box<dyn Medium>,
        rules: Rules,
        readings: Arc<dyn Readings>,
    ) -> Result<Self, OpenError> {
        let path = medium.path().to_owned();
        let failed = |why: String| OpenError::Failed(path.clone(), why);
        let thread = |error| failed(format!("the system refuses a thread ({error})"));
        let writer = Writer::start(move || OpenStore::open(medium, rules, readings)).await;
        let writer = writer.map_err(|unstarted| match unstarted {
            Unstarted::Thread(error) => thread(error),
            Unstarted::Store(error) => error,
            Unstarted::Panicked => failed("the store panicked while it was opened".to_owned()),
        })?;
        Ok(Self {
            writer,
            keys: Readers::start("store-keys", KEY_READERS).map_err(thread)?,
            pages: Readers::start("store-pages", PAGE_READERS).map_err(thread)?,
        })
    }

    fn store(&self) -> &Arc<OpenStore> {
        self.writer.store()
    }

    /// Stops the clock at `now`, which may be earlier than before.
    #[cfg(test)]
    pub(super) fn set_clock(&mut self, now: crate::lease::Timestamp) {
        self.store().set_clock(now);
    }

    /// Replaces the record of `key` by bytes that are no record.
    #[cfg(test)]
    pub(crate) fn damage(&self, key: &Key) {
        self.store().damage(key);
    }

    /// Reads committed records on a thread of `readers`.
    async fn read_on<T: Send + 'static>(
        &self,
        readers: &Readers,
        read: impl FnOnce(&OpenStore, &Records) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, StoreError> {
        let shared = Arc::clone(self.store());
        let work = move || {
            let records = shared.database()?.begin_read()?.open_table(RECORDS)?;
            read(&shared, &records)
        };
        Ok(readers.run(work).await?)
    }
}

/// The committed records, as of one commit.
type Records = ReadOnlyTable<&'static str, &'static [u8]>;

impl Store for EmbeddedStore {
    async fn commit(
        &self,
        batch: Arc<Vec<(Key, Edit)>>,
        deadline: Duration,
    ) -> Result<Committed, StoreError> {
        Ok(Committed::at_once(self.writer.commit(batch, deadline).await?))
    }

    fn batches(&self) -> usize {
        BATCHES
    }

    async fn read(&self, keys: Vec<Key>) -> Result<Vec<ForKey>, StoreError> {
        let read = move |shared: &OpenStore, records: &Records| {
            let mut found = Vec::with_capacity(keys.len());
            for key in keys {
                if let Some(bytes) = records.get(key.as_str())? {
                    found.push(shared.snapshot(&key, bytes.value()).map_err(StoreError::from));
                }
            }
            Ok(found)
        };
        self.read_on(&self.keys, read).await
    }

    async fn list(&self, query: ListQuery) -> Result<Page, StoreError> {
        self.read_on(&self.pages, move |shared, records| list(shared, records, &query)).await
    }

    async fn purge(&self, free_for: Duration) -> Result<u64, StoreError> {
        let mut purged = 0;
        let mut from = None;
        loop {
            let read =
                move |shared: &OpenStore, records: &Records| purgeable(shared, records, from, free_for);
            let (keys, next) = self.read_on(&self.pages, read).await?;
            // The writer checks again, because a key may have been leased since.
            purged += self.writer.purge(keys, free_for).await?;
            let Some(next) = next else { return Ok(purged) };
            from = Some(next);
        }
    }

    async fn check(&self) -> Result<(), StoreError> {
        Ok(self.writer.check().await?)
    }

    fn id(&self) -> Uuid {
        self.store().id()
    }

    fn rules(&self) -> Rules {
        self.store().rules()
    }

    fn name(&self) -> &'static str {
        "embedded"
    }

    async fn feed(&self, _: mpsc::Sender<FeedEvent>, _: CancellationToken) {}

    fn feed_state(&self) -> FeedState {
        FeedState::Off
    }

    fn is_shared(&self) -> bool {
        false
    }
}

impl From<OpenError> for StartError {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Failed(..) => Self::Unreachable(error.to_string()),
            _ => Self::Unusable(error.to_string()),
        }
    }
}

fn list(shared: &OpenStore, records: &Records, query: &ListQuery) -> Result<Page, Failure> {
    let start = query.after.as_ref().map_or("", Key::as_str).max(query.prefix.as_str());
    let mut page = PageBuilder { query, shared, page: Page::default(), bytes: 0 };
    if query.include_free {
        for entry in records.range(start..)? {
            let (name, value) = entry?;
            if !page.take(name.value(), value.value()) {
                break;
            }
        }
    } else {
        shared.in_use().walk(start, |key| {
            // A key enters the set before its commit, so its record may not be there yet.
            let Some(value) = records.get(key.as_str())? else { return Ok(true) };
            Ok(page.take(key.as_str(), value.value()))
        })?;
    }
    Ok(page.page)
}

/// A page that is being filled.
struct PageBuilder<'a> {
    query: &'a ListQuery,
    shared: &'a OpenStore,
    page: Page,
    bytes: usize,
}

impl PageBuilder<'_> {
    /// Adds the next record if it belongs on the page. Returns whether more records may belong on
    /// it.
    fn take(&mut self, name: &str, value: &[u8]) -> bool {
        let Self { query, page, .. } = self;
        if !name.starts_with(&query.prefix) {
            return false;
        }
        // A name that is not a valid key is left out: no call can ask for it.
        let Ok(key) = Key::try_from(name) else { return true };
        if query.after.as_ref() == Some(&key) {
            return true;
        }
        let Some(snapshot) = readable(self.shared, &key, value) else { return true };
        let record = &snapshot.record;
        // A key that was never granted has a record only to keep ids out. Listings do not show it.
        if record.token == FencingToken::default() || (!query.include_free && record.is_free(snapshot.now)) {
            return true;
        }
        page.more = page.snapshots.len() == query.limit || self.bytes > PAGE_BYTES;
        if page.more {
            return false;
        }
        self.bytes += value.len();
        page.snapshots.push(snapshot);
        true
    }
}

/// Decodes the record of `key`. A record that cannot be read is logged and left out.
fn readable(shared: &OpenStore, key: &Key, bytes: &[u8]) -> Option<Snapshot> {
    shared.snapshot(key, bytes).inspect_err(|unreadable| report(&unreadable.clone().into())).ok()
}

/// How many keys are read, and deleted, at once. So commits wait for one page of a purge at most.
const PURGE_PAGE: usize = 1000;

/// Returns the keys of a page whose records may be deleted or that are no longer in use, and the
/// key at which the next page begins.
fn purgeable(
    shared: &OpenStore,
    records: &Records,
    from: Option<Key>,
    free_for: Duration,
) -> Result<(Vec<Key>, Option<Key>), Failure> {
    let mut keys = Vec::new();
    for (seen, entry) in records.range(from.as_ref().map_or("", Key::as_str)..)?.enumerate() {
        let (name, value) = entry?;
        // A name that is not a valid key is left alone: no call can ask for it.
        let Ok(key) = Key::try_from(name.value()) else { continue };
        if seen >= PURGE_PAGE {
            return Ok((keys, Some(key)));
        }
        let Some(Snapshot { record, now }) = readable(shared, &key, value.value()) else { continue };
        let is_purgeable = record.is_purgeable(now, free_for, shared.rules().grace);
        if is_purgeable || (record.is_free(now) && shared.in_use().contains(&key)) {
            keys.push(key);
        }
    }
    Ok((keys, None))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::lease::{Acquisition, LeaseId, Timestamp};
    use crate::store::conformance::reading::{ask, asking, key};

    const RULES: Rules = Rules { grace: Duration::ZERO, waiter_ttl: Duration::from_secs(15) };
    const DAY: Duration = Duration::from_secs(24 * 3600);
    /// Keys leased, freed and purged in one round.
    const KEYS: usize = 20_000;
    const ROUNDS: usize = 5;

    /// Leases and frees new keys, and purges them an hour later.
    async fn round(store: &mut EmbeddedStore, number: usize, keys: usize) {
        let mut now = Timestamp(1_700_000_000_000) + DAY * u32::try_from(number).expect("a few rounds");
        store.set_clock(now);
        let names: Vec<_> =
            (0..keys).map(|name| (key(&format!("report/{number}/{name}")), LeaseId::random())).collect();
        for names in names.chunks(1000) {
            let batch = |edit: &dyn Fn(LeaseId) -> Edit| {
                Arc::new(names.iter().map(|(key, id)| (key.clone(), edit(*id))).collect())
            };
            store.commit(batch(&|id| ask(asking(id))), DAY).await.expect("a commit");
            store.commit(batch(&|id| Edit::default().release(id)), DAY).await.expect("a commit");
        }
        now = now + Duration::from_secs(3601);
        store.set_clock(now);
        let purged = store.purge(Duration::from_secs(3600)).await.expect("a purge");
        assert_eq!(purged, u64::try_from(keys).expect("a count"));
    }

    #[tokio::test]
    async fn keys_are_read_while_listings_have_all_their_threads_and_more_wait() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = EmbeddedStore::open(folder.path(), RULES).await.expect("a usable folder");
        let (go, gate) = std::sync::mpsc::channel::<()>();
        let gate = Arc::new(std::sync::Mutex::new(gate));
        let mut listings = Vec::new();
        for _ in 0..3 * PAGE_READERS {
            let (store, gate) = (store.clone(), Arc::clone(&gate));
            let work = move |_: &OpenStore, _: &Records| Ok(gate.lock().expect("no panic").recv().is_err());
            listings.push(tokio::spawn(async move { store.read_on(&store.pages, work).await }));
        }
        tokio::task::yield_now().await;
        assert!(store.read(vec![key("x")]).await.expect("a read").is_empty());
        let batch = vec![(key("x"), ask(asking(LeaseId::random())))];
        store.commit(Arc::new(batch), DAY).await.expect("a commit");
        assert!(store.inspect(key("x")).await.expect("a read").is_some());
        assert!(listings.iter().all(|listing| !listing.is_finished()));
        drop(go);
        for listing in listings {
            assert!(listing.await.expect("no panic").expect("a listing"));
        }
    }

    /// `LEASED_PURGED_KEYS` sets how many keys there are in all.
    #[tokio::test]
    async fn purged_keys_leave_a_file_that_does_not_grow() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut store = EmbeddedStore::open(folder.path(), RULES).await.expect("a usable folder");
        let asked = std::env::var("LEASED_PURGED_KEYS").ok().and_then(|keys| keys.parse::<usize>().ok());
        let keys = asked.map_or(KEYS, |keys| keys.div_ceil(ROUNDS));
        let mut sizes = Vec::new();
        for number in 0..ROUNDS {
            round(&mut store, number, keys).await;
            sizes.push(std::fs::metadata(folder.path().join(file::FILE)).expect("the file").len());
        }
        println!("{keys} keys a round; the file after each, in bytes: {sizes:?}");
        let most = sizes.iter().max().expect("rounds");
        assert!(*most <= sizes[0] * 2, "{sizes:?}");
    }

    /// All of the 20,000 keys are free except two.
    #[tokio::test]
    async fn a_listing_reads_no_more_than_the_keys_in_use() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = EmbeddedStore::open(folder.path(), RULES).await.expect("a usable folder");
        let names: Vec<_> =
            (0..KEYS).map(|name| (key(&format!("key/{name:05}")), LeaseId::random())).collect();
        for names in names.chunks(1000) {
            let batch = |edit: &dyn Fn(LeaseId) -> Edit| {
                Arc::new(names.iter().map(|(key, id)| (key.clone(), edit(*id))).collect())
            };
            store.commit(batch(&|id| ask(asking(id))), DAY).await.expect("a commit");
            store.commit(batch(&|id| Edit::default().release(id)), DAY).await.expect("a commit");
        }
        let held = vec![key("key/00003"), key("key/19999")];
        let batch = held.iter().map(|key| (key.clone(), ask(asking(LeaseId::random())))).collect();
        store.commit(Arc::new(batch), DAY).await.expect("a commit");
        let query =
            |include_free| ListQuery { prefix: String::new(), after: None, limit: KEYS, include_free };
        let listed = async |include_free| {
            let before = store.store().looked_at.load(Ordering::Relaxed);
            let page = store.list(query(include_free)).await.expect("a listing");
            let shown: Vec<_> = page.snapshots.into_iter().map(|one| one.record.key).collect();
            (shown, store.store().looked_at.load(Ordering::Relaxed) - before)
        };
        assert_eq!(listed(false).await, (held, 2));
        let (shown, looked_at) = listed(true).await;
        assert!(shown.len() > 2 && looked_at > 2, "what a listing looks at is counted");
    }

    fn in_use(store: &EmbeddedStore) -> Vec<Key> {
        let mut keys = Vec::new();
        let walked = store.store().in_use().walk("", |key| {
            keys.push(key.clone());
            Ok(true)
        });
        walked.expect("keys");
        keys
    }

    #[tokio::test]
    async fn a_key_whose_block_is_over_counts_as_in_use_until_the_next_purge() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut store = EmbeddedStore::open(folder.path(), RULES).await.expect("a usable folder");
        let now = Timestamp(1_700_000_000_000);
        store.set_clock(now);
        for name in ["again", "blocked"] {
            let id = LeaseId::random();
            let hold = Acquisition { min_hold: Duration::from_secs(5), ..asking(id) };
            store.commit(Arc::new(vec![(key(name), ask(hold))]), DAY).await.expect("a commit");
            let release = Edit::default().release(id);
            store.commit(Arc::new(vec![(key(name), release)]), DAY).await.expect("a commit");
        }
        assert_eq!(in_use(&store), [key("again"), key("blocked")]);
        store.set_clock(now + Duration::from_secs(6));
        assert_eq!(store.purge(DAY).await.expect("a purge"), 0);
        assert_eq!(in_use(&store), []);
        let batch = vec![(key("again"), ask(asking(LeaseId::random())))];
        store.commit(Arc::new(batch), DAY).await.expect("a commit");
        assert_eq!(in_use(&store), [key("again")]);
    }

    #[tokio::test]
    async fn a_file_that_is_opened_again_has_its_keys_in_use() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = EmbeddedStore::open(folder.path(), RULES).await.expect("a usable folder");
        let batch = vec![(key("held"), ask(asking(LeaseId::random())))];
        store.commit(Arc::new(batch), DAY).await.expect("a commit");
        let settled = vec![(key("free"), Edit::default().release(LeaseId::random()))];
        store.commit(Arc::new(settled), DAY).await.expect("a commit");
        drop(store);
        // The file is closed some time after the last clone is dropped.
        let store = loop {
            match EmbeddedStore::open(folder.path(), RULES).await {
                Ok(store) => break store,
                Err(OpenError::InUse(_)) => tokio::time::sleep(Duration::from_millis(10)).await,
                Err(error) => panic!("{error}"),
            }
        };
        assert_eq!(in_use(&store), [key("held")]);
    }
}

//! The store on one host: a file of its own, one daemon. The only files that know redb.
//!
//! It runs the rules themselves, in one write transaction a batch, on a thread of its own. A commit that has been
//! answered is on the disk. All its threads are made at the start: later the system may have none to give.

mod clock;
mod disk;
mod document;
mod facts;
#[cfg(test)]
mod faults;
mod file;
mod in_use;
#[cfg(test)]
mod machine;
mod readers;
mod writer;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
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
use writer::{Home, Unstarted, Writer};

use super::failure::{Effects, Failure};
use super::{
    Committed, FeedEvent, FeedState, ForKey, ListQuery, Page, StartError, Store, StoreError, repeat, report,
};
use crate::lease::{Edit, FencingToken, Key, Rules, Snapshot};

/// The writer groups all waiting batches into one transaction, so more batches in flight do not shrink its writes.
const BATCHES: usize = 4;
/// Threads that read some keys, and threads that read pages. The first never wait for the second: a page may take
/// as long as there are free keys to pass over, and the engine looks keys up to do its work.
const KEY_READERS: usize = 4;
const PAGE_READERS: usize = 4;
/// A page of a listing ends past this many bytes.
const PAGE_BYTES: usize = 4 * 1024 * 1024;

/// Records in a file. The file is closed some time after the last clone has gone.
#[derive(Debug, Clone)]
pub struct EmbeddedStore {
    writer: Writer,
    keys: Readers,
    pages: Readers,
    repetitions: Arc<AtomicU64>,
}

impl EmbeddedStore {
    /// Opens the data in `folder`, or begins with none, and makes sure that it is whole.
    ///
    /// # Errors
    /// [`OpenError`]: another daemon has it, it is damaged or not ours, or the system does not let us.
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
        let thread = |error| failed(format!("the system gives no thread ({error})"));
        let writer = Writer::start(move || Home::open(medium, rules, readings)).await;
        let writer = writer.map_err(|unstarted| match unstarted {
            Unstarted::Thread(error) => thread(error),
            Unstarted::Store(error) => error,
            Unstarted::Panicked => failed("the store panicked while it was opened".to_owned()),
        })?;
        Ok(Self {
            writer,
            keys: Readers::start("store-keys", KEY_READERS).map_err(thread)?,
            pages: Readers::start("store-pages", PAGE_READERS).map_err(thread)?,
            repetitions: Arc::default(),
        })
    }

    fn home(&self) -> &Arc<Home> {
        self.writer.home()
    }

    /// Stops the clock at `now`, also if that is earlier.
    #[cfg(test)]
    pub(super) fn set_clock(&mut self, now: crate::lease::Timestamp) {
        self.home().set_clock(now);
    }

    /// Leaves bytes that are no record where the record of `key` is.
    #[cfg(test)]
    pub(crate) fn damage(&self, key: &Key) {
        self.home().damage(key);
    }

    /// Reads what has been committed, on a thread of `readers`.
    async fn reading<T: Send + 'static>(
        &self,
        readers: &Readers,
        read: impl FnOnce(&Home, &Records) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, StoreError> {
        let home = Arc::clone(self.home());
        let work = move || {
            let records = home.database()?.begin_read()?.open_table(RECORDS)?;
            read(&home, &records)
        };
        Ok(readers.run(work).await?)
    }
}

/// What is committed, as of one commit.
type Records = ReadOnlyTable<&'static str, &'static [u8]>;

impl Store for EmbeddedStore {
    async fn commit(
        &self,
        batch: Arc<Vec<(Key, Edit)>>,
        deadline: Duration,
    ) -> Result<Committed, StoreError> {
        let effects = Effects::default();
        let attempt = async |batch| effects.note(self.writer.commit(&batch, deadline).await, |_| true);
        repeat(batch, deadline, &self.repetitions, &effects, attempt).await
    }

    fn batches(&self) -> usize {
        BATCHES
    }

    async fn read(&self, keys: Vec<Key>) -> Result<Vec<ForKey>, StoreError> {
        let read = move |home: &Home, records: &Records| {
            let mut found = Vec::with_capacity(keys.len());
            for key in keys {
                if let Some(bytes) = records.get(key.as_str())? {
                    found.push(home.snapshot(&key, bytes.value()).map_err(StoreError::from));
                }
            }
            Ok(found)
        };
        self.reading(&self.keys, read).await
    }

    async fn list(&self, query: ListQuery) -> Result<Page, StoreError> {
        self.reading(&self.pages, move |home, records| page(home, records, &query)).await
    }

    async fn purge(&self, free_for: Duration) -> Result<u64, StoreError> {
        let mut purged = 0;
        let mut from = None;
        loop {
            let read = move |home: &Home, records: &Records| forgettable(home, records, from, free_for);
            let (keys, next) = self.reading(&self.pages, read).await?;
            // The writer looks again: a key may have been leased since.
            purged += self.writer.forget(keys, free_for).await?;
            let Some(next) = next else { return Ok(purged) };
            from = Some(next);
        }
    }

    async fn check(&self) -> Result<(), StoreError> {
        Ok(self.writer.check().await?)
    }

    fn id(&self) -> Uuid {
        self.home().store()
    }

    fn rules(&self) -> Rules {
        self.home().rules()
    }

    fn name(&self) -> &'static str {
        "embedded"
    }

    fn repetitions(&self) -> u64 {
        self.repetitions.load(Ordering::Relaxed)
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

fn page(home: &Home, records: &Records, query: &ListQuery) -> Result<Page, Failure> {
    let start = query.after.as_ref().map_or("", Key::as_str).max(query.prefix.as_str());
    let mut page = Filling { query, home, page: Page::default(), bytes: 0 };
    if query.include_free {
        for entry in records.range(start..)? {
            let (name, value) = entry?;
            if !page.take(name.value(), value.value()) {
                break;
            }
        }
    } else {
        home.in_use().walk(start, |key| {
            let Some(value) = records.get(key.as_str())? else { return Ok(true) };
            Ok(page.take(key.as_str(), value.value()))
        })?;
    }
    Ok(page.page)
}

/// A page in the making.
struct Filling<'a> {
    query: &'a ListQuery,
    home: &'a Home,
    page: Page,
    bytes: usize,
}

impl Filling<'_> {
    /// Takes the next record if it belongs on the page, and says whether there can be more on it.
    fn take(&mut self, name: &str, value: &[u8]) -> bool {
        let Self { query, page, .. } = self;
        if !name.starts_with(&query.prefix) {
            return false;
        }
        // No call can name what is no key, so there is nobody to tell.
        let Ok(key) = Key::try_from(name) else { return true };
        if query.after.as_ref() == Some(&key) {
            return true;
        }
        let Some(snapshot) = readable(self.home, &key, value) else { return true };
        let record = &snapshot.record;
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

/// The record of `key`. One that cannot be read is reported and left out.
fn readable(home: &Home, key: &Key, bytes: &[u8]) -> Option<Snapshot> {
    home.snapshot(key, bytes).inspect_err(|unreadable| report(&unreadable.clone().into())).ok()
}

/// Keys looked at, and forgotten, in one go.
const PURGE_PAGE: usize = 1000;

/// Some keys that may be forgotten or are not in use any more, and where to look for more.
fn forgettable(
    home: &Home,
    records: &Records,
    from: Option<Key>,
    free_for: Duration,
) -> Result<(Vec<Key>, Option<Key>), Failure> {
    let mut keys = Vec::new();
    for (seen, entry) in records.range(from.as_ref().map_or("", Key::as_str)..)?.enumerate() {
        let (name, value) = entry?;
        // No call can name what is no key, so there is nobody to tell.
        let Ok(key) = Key::try_from(name.value()) else { continue };
        if seen >= PURGE_PAGE {
            return Ok((keys, Some(key)));
        }
        let Some(Snapshot { record, now }) = readable(home, &key, value.value()) else { continue };
        let may_go = record.is_forgettable(now, free_for, home.rules().grace);
        if may_go || (record.is_free(now) && home.in_use().contains(&key)) {
            keys.push(key);
        }
    }
    Ok((keys, None))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::lease::{Acquisition, LeaseId, Timestamp};
    use crate::store::conformance::reading::{ask, asking, key};

    const RULES: Rules = Rules { grace: Duration::ZERO, place: Duration::from_secs(15) };
    const DAY: Duration = Duration::from_secs(24 * 3600);
    /// Keys leased, freed and forgotten in one round.
    const KEYS: usize = 20_000;
    const ROUNDS: usize = 5;

    /// Leases and frees new keys, and forgets them a while later.
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
            let work = move |_: &Home, _: &Records| Ok(gate.lock().expect("no panic").recv().is_err());
            listings.push(tokio::spawn(async move { store.reading(&store.pages, work).await }));
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
    async fn keys_without_end_leave_a_file_that_does_not_grow() {
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

    /// Twenty thousand keys, all free but for two of them.
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
            let before = store.home().looked_at.load(Ordering::Relaxed);
            let page = store.list(query(include_free)).await.expect("a listing");
            let shown: Vec<_> = page.snapshots.into_iter().map(|one| one.record.key).collect();
            (shown, store.home().looked_at.load(Ordering::Relaxed) - before)
        };
        assert_eq!(listed(false).await, (held, 2));
        let (shown, looked_at) = listed(true).await;
        assert!(shown.len() > 2 && looked_at > 2, "what a listing looks at is counted");
    }

    fn in_use(store: &EmbeddedStore) -> Vec<Key> {
        let mut keys = Vec::new();
        let walked = store.home().in_use().walk("", |key| {
            keys.push(key.clone());
            Ok(true)
        });
        walked.expect("keys");
        keys
    }

    #[tokio::test]
    async fn a_block_that_is_over_leaves_the_keys_in_use_with_the_next_purge() {
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
        // The file is closed some time after the last clone has gone.
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

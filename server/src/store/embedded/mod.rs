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
#[cfg(test)]
mod machine;
mod readers;
mod writer;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use redb::ReadableDatabase;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use clock::{Host, Readings};
use facts::RECORDS;
pub use file::OpenError;
use file::{DataFile, Medium};
use readers::Readers;
use writer::{Home, Unstarted, Writer};

use super::failure::Failure;
use super::{FeedEvent, FeedState, ListQuery, Page, StartError, Store, StoreError, repeat};
use crate::lease::{Edit, FencingToken, Key, Rules, Snapshot};

/// The writer takes those that wait in one go, so more of them do not make it write smaller ones.
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

type Records = redb::ReadOnlyTable<&'static str, &'static [u8]>;

impl Store for EmbeddedStore {
    async fn commit(
        &self,
        batch: Arc<Vec<(Key, Edit)>>,
        deadline: Duration,
    ) -> Result<Vec<Snapshot>, StoreError> {
        let attempt = async |batch| Ok(self.writer.commit(&batch, deadline).await?);
        repeat(batch, deadline, &self.repetitions, attempt).await
    }

    fn batches(&self) -> usize {
        BATCHES
    }

    async fn read(&self, keys: Vec<Key>) -> Result<Vec<Snapshot>, StoreError> {
        let read = move |home: &Home, records: &Records| {
            let mut found = Vec::with_capacity(keys.len());
            for key in keys {
                if let Some(bytes) = records.get(key.as_str())? {
                    found.push(home.snapshot(&key, bytes.value())?);
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
    let mut page = Page::default();
    let mut bytes = 0;
    let start = query.after.as_ref().map_or("", Key::as_str).max(query.prefix.as_str());
    for entry in records.range(start..)? {
        let (name, value) = entry?;
        if !name.value().starts_with(&query.prefix) {
            break;
        }
        let key = Key::try_from(name.value()).map_err(Failure::refused)?;
        if query.after.as_ref() == Some(&key) {
            continue;
        }
        let snapshot = home.snapshot(&key, value.value())?;
        let record = &snapshot.record;
        if record.token == FencingToken::default() || (!query.include_free && record.is_free(snapshot.now)) {
            continue;
        }
        page.more = page.snapshots.len() == query.limit || bytes > PAGE_BYTES;
        if page.more {
            break;
        }
        bytes += value.value().len();
        page.snapshots.push(snapshot);
    }
    Ok(page)
}

/// Keys looked at, and forgotten, in one go.
const PURGE_PAGE: usize = 1000;

/// Some keys that may be forgotten, and where to look for more.
fn forgettable(
    home: &Home,
    records: &Records,
    from: Option<Key>,
    free_for: Duration,
) -> Result<(Vec<Key>, Option<Key>), Failure> {
    let mut keys = Vec::new();
    for entry in records.range(from.as_ref().map_or("", Key::as_str)..)? {
        let (name, value) = entry?;
        let key = Key::try_from(name.value()).map_err(Failure::refused)?;
        if keys.len() == PURGE_PAGE {
            return Ok((keys, Some(key)));
        }
        let snapshot = home.snapshot(&key, value.value())?;
        if snapshot.record.is_forgettable(snapshot.now, free_for) {
            keys.push(key);
        }
    }
    Ok((keys, None))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::lease::{LeaseId, Timestamp};
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
        assert_eq!(store.read(vec![key("x")]).await.expect("a read"), []);
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
}

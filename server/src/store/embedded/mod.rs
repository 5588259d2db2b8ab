//! The store on one host: a file of its own, one daemon. The only files that know redb.
//!
//! It runs the rules themselves, in one write transaction a batch, on a thread of its own. A commit that has been
//! answered is on the disk.

mod clock;
mod disk;
mod document;
#[cfg(test)]
mod faults;
mod file;
mod writer;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use redb::ReadableDatabase;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;

pub use file::OpenError;
use file::{DataFile, RECORDS};
use writer::{Home, Writer};

use super::failure::Failure;
use super::{FeedEvent, FeedState, ForKey, ListQuery, Page, StartError, Store, StoreError, repeat, report};
use crate::lease::{Edit, Key, Rules, Snapshot};

/// The writer takes those that wait in one go, so more of them do not make it write smaller ones.
const BATCHES: usize = 4;
/// Reads at once; each is a thread while it lasts.
const READS: usize = 16;
/// A page of a listing ends past this many bytes.
const PAGE_BYTES: usize = 4 * 1024 * 1024;

/// Records in a file. The file is closed some time after the last clone has gone.
#[derive(Debug, Clone)]
pub struct EmbeddedStore {
    home: Arc<Home>,
    writer: Writer,
    reads: Arc<Semaphore>,
    repetitions: Arc<AtomicU64>,
}

impl EmbeddedStore {
    /// Opens the data in `folder`, or begins with none, and makes sure that it is whole.
    ///
    /// # Errors
    /// [`OpenError`]: another daemon has it, it is damaged or not ours, or the system does not let us.
    pub async fn open(folder: &Path, rules: Rules) -> Result<Self, OpenError> {
        let file = Box::new(DataFile::in_folder(folder));
        let opened = spawn_blocking(move || Home::open(file, rules)).await;
        let home = Arc::new(opened.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?);
        let writer = Writer::start(Arc::clone(&home));
        Ok(Self { home, writer, reads: Arc::new(Semaphore::new(READS)), repetitions: Arc::default() })
    }

    /// Stops the clock at `now`, also if that is earlier.
    #[cfg(test)]
    pub(super) fn set_clock(&mut self, now: crate::lease::Timestamp) {
        self.home.set_clock(now);
    }

    /// Leaves bytes that are no record where the record of `key` is.
    #[cfg(test)]
    pub(crate) fn damage(&self, key: &Key) {
        self.home.damage(key);
    }

    /// Reads what has been committed, on a thread that may wait for the disk.
    async fn reading<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Home, &Records) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, StoreError> {
        let permit = Arc::clone(&self.reads).acquire_owned().await;
        let home = Arc::clone(&self.home);
        let done = spawn_blocking(move || {
            let _permit = permit;
            let records = home.database()?.begin_read()?.open_table(RECORDS)?;
            read(&home, &records)
        });
        Ok(done.await.map_err(Failure::not_applied)??)
    }
}

type Records = redb::ReadOnlyTable<&'static str, &'static [u8]>;

impl Store for EmbeddedStore {
    async fn commit(
        &self,
        batch: Arc<Vec<(Key, Edit)>>,
        deadline: Duration,
    ) -> Result<Vec<ForKey>, StoreError> {
        repeat(deadline, &self.repetitions, async || Ok(self.writer.commit(&batch, deadline).await?)).await
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
        self.reading(read).await
    }

    async fn list(&self, query: ListQuery) -> Result<Page, StoreError> {
        self.reading(move |home, records| page(home, records, &query)).await
    }

    async fn purge(&self, free_for: Duration) -> Result<u64, StoreError> {
        let mut purged = 0;
        let mut from = None;
        loop {
            let read = move |home: &Home, records: &Records| forgettable(home, records, from, free_for);
            let (keys, next) = self.reading(read).await?;
            // The writer looks again: a key may have been leased since.
            purged += self.writer.forget(keys, free_for).await?;
            let Some(next) = next else { return Ok(purged) };
            from = Some(next);
        }
    }

    async fn check(&self) -> Result<(), StoreError> {
        Ok(self.writer.check().await?)
    }

    fn rules(&self) -> Rules {
        self.home.rules()
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
        if query.after.as_ref().is_some_and(|after| after.as_str() == name.value()) {
            continue;
        }
        let Some(snapshot) = readable(home, name.value(), value.value()) else { continue };
        if !query.include_free && snapshot.record.is_free(snapshot.now) {
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

/// The record stored under `name`. One that cannot be read is reported and left out.
fn readable(home: &Home, name: &str, bytes: &[u8]) -> Option<Snapshot> {
    // No call can name what is no key, so there is nobody to tell.
    let key = Key::try_from(name).ok()?;
    home.snapshot(&key, bytes).inspect_err(|unreadable| report(&unreadable.clone().into())).ok()
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
        let Some(snapshot) = readable(home, name.value(), value.value()) else { continue };
        let key = snapshot.record.key.clone();
        if keys.len() == PURGE_PAGE {
            return Ok((keys, Some(key)));
        }
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

//! The file under the database, with two things that a plain file does not do.
//!
//! Nothing is written before [`Disk::accept`]: opening a database writes to it, and a file that turns out to be
//! damaged, foreign or newer than this program must stay as it is.
//!
//! What was written before a sync that failed is written again before the next one: the system may have dropped it
//! and still count it as kept, so that a later sync succeeds without it.
//! (<https://www.usenix.org/conference/atc20/presentation/rebello>)

use std::io::{ErrorKind, Result};
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use redb::{BackendError, StorageBackend};

/// A file that a database lives in. Clones are the same one.
#[derive(Debug, Clone)]
pub(super) struct Disk {
    file: Arc<dyn StorageBackend>,
    held: Arc<RwLock<Option<Held>>>,
    unsynced: Unsynced,
}

/// The ranges written since a sync last succeeded. Outlives the database: it is opened anew after a failure.
pub(super) type Unsynced = Arc<Mutex<Ranges>>;

#[derive(Debug, Default)]
pub(super) struct Ranges {
    /// Offset and length.
    written: Vec<(u64, usize)>,
    failed: bool,
}

/// What has not reached the file.
#[derive(Debug)]
struct Held {
    length: u64,
    /// What the file itself has is hidden from here on.
    cut: u64,
    changes: Vec<Change>,
}

#[derive(Debug)]
enum Change {
    Length(u64),
    Bytes(u64, Vec<u8>),
    Sync,
}

impl Disk {
    /// Takes `file`, and writes nothing to it for now.
    pub(super) fn new(file: Arc<dyn StorageBackend>, unsynced: &Unsynced) -> Result<Self> {
        let length = file.len()?;
        let held = Held { length, cut: length, changes: Vec::new() };
        unsynced.lock().unwrap_or_else(PoisonError::into_inner).tidy();
        Ok(Self { file, held: Arc::new(RwLock::new(Some(held))), unsynced: Arc::clone(unsynced) })
    }

    /// Does what was held back, in its order; from here on everything is done at once.
    pub(super) fn accept(&self) -> Result<()> {
        let Some(held) = self.held.write().unwrap_or_else(PoisonError::into_inner).take() else {
            return Ok(());
        };
        for change in held.changes {
            match change {
                Change::Length(length) => self.set_len(length)?,
                Change::Bytes(offset, data) => self.write(offset, &data)?,
                Change::Sync => self.sync_data()?,
            }
        }
        self.sync_data()
    }

    /// Writes all of it once more, out of what the file shows.
    fn rewrite(&self, ranges: &mut Ranges) -> Result<()> {
        ranges.tidy();
        let end = self.file.len()?;
        for &(offset, length) in &ranges.written {
            // The file may have been cut since.
            let rest = usize::try_from(end.saturating_sub(offset)).unwrap_or(usize::MAX);
            let mut data = vec![0; length.min(rest)];
            self.file.read(offset, &mut data)?;
            self.file.write(offset, &data)?;
        }
        Ok(())
    }

    /// Whether nothing reaches the file yet. Opening is done by one thread, which is also the one that accepts.
    fn is_held(&self) -> bool {
        self.held.read().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn unsynced(&self) -> MutexGuard<'_, Ranges> {
        self.unsynced.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ranges {
    /// A disk that is full is written to in the same places again and again.
    fn tidy(&mut self) {
        self.written.sort_unstable();
        self.written.dedup();
    }
}

impl Held {
    fn write(&mut self, offset: u64, data: &[u8]) {
        self.length = self.length.max(offset + size(data));
        self.changes.push(Change::Bytes(offset, data.to_vec()));
    }

    fn set_len(&mut self, length: u64) {
        self.length = length;
        self.cut = self.cut.min(length);
        self.changes.push(Change::Length(length));
    }

    fn read(&self, file: &dyn StorageBackend, offset: u64, out: &mut [u8]) -> Result<()> {
        if offset + size(out) > self.length {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let shown = usize::try_from(self.cut.saturating_sub(offset)).unwrap_or(usize::MAX).min(out.len());
        let (from_file, rest) = out.split_at_mut(shown);
        if shown > 0 {
            file.read(offset, from_file)?;
        }
        rest.fill(0);
        for change in &self.changes {
            match change {
                Change::Bytes(start, data) => {
                    let (begin, end) = (offset.max(*start), (offset + size(out)).min(start + size(data)));
                    if begin < end {
                        out[index(begin - offset)..index(end - offset)]
                            .copy_from_slice(&data[index(begin - start)..index(end - start)]);
                    }
                }
                Change::Length(length) => {
                    let kept = index(length.saturating_sub(offset).min(size(out)));
                    out[kept..].fill(0);
                }
                Change::Sync => {}
            }
        }
        Ok(())
    }
}

fn size(data: &[u8]) -> u64 {
    data.len() as u64
}

/// A distance within one slice.
fn index(distance: u64) -> usize {
    usize::try_from(distance).expect("no longer than the slice")
}

impl StorageBackend for Disk {
    fn len(&self) -> Result<u64> {
        match &*self.held.read().unwrap_or_else(PoisonError::into_inner) {
            Some(held) => Ok(held.length),
            None => self.file.len(),
        }
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        match &*self.held.read().unwrap_or_else(PoisonError::into_inner) {
            Some(held) => held.read(&*self.file, offset, out),
            None => self.file.read(offset, out),
        }
    }

    fn set_len(&self, length: u64) -> Result<()> {
        match &mut *self.held.write().unwrap_or_else(PoisonError::into_inner) {
            Some(held) => held.set_len(length),
            None => self.file.set_len(length)?,
        }
        Ok(())
    }

    fn sync_data(&self) -> Result<()> {
        if let Some(held) = &mut *self.held.write().unwrap_or_else(PoisonError::into_inner) {
            held.changes.push(Change::Sync);
            return Ok(());
        }
        let mut unsynced = self.unsynced();
        if unsynced.failed {
            self.rewrite(&mut unsynced)?;
        }
        // Until it has succeeded.
        unsynced.failed = true;
        self.file.sync_data()?;
        *unsynced = Ranges::default();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        if self.is_held() {
            if let Some(held) = &mut *self.held.write().unwrap_or_else(PoisonError::into_inner) {
                held.write(offset, data);
            }
            return Ok(());
        }
        self.unsynced().written.push((offset, data.len()));
        self.file.write(offset, data)
    }

    fn close(&self) -> Result<()> {
        self.file.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> std::result::Result<bool, BackendError> {
        self.file.try_lock_range(start, end)
    }

    fn try_lock_shared_range(
        &self,
        start: Bound<u64>,
        end: Bound<u64>,
    ) -> std::result::Result<bool, BackendError> {
        self.file.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> std::result::Result<(), BackendError> {
        self.file.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> std::result::Result<(), BackendError> {
        self.file.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> std::result::Result<(), BackendError> {
        self.file.unlock_range(start, end)
    }

    fn query_lock_range(
        &self,
        start: Bound<u64>,
        end: Bound<u64>,
    ) -> std::result::Result<bool, BackendError> {
        self.file.query_lock_range(start, end)
    }
}

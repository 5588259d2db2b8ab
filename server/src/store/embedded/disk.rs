//! The file under the database, with two guarantees that a plain file lacks:
//!
//! - No write reaches the file before [`Disk::accept`]. redb writes to a file as it opens it, and a
//!   file that turns out to be damaged, foreign or newer than this program must stay as it is.
//! - After a failed sync, everything written since the last successful sync is written again before
//!   the next one. The operating system may have dropped those pages and still count them as clean,
//!   so a later sync would succeed without them
//!   (<https://www.usenix.org/conference/atc20/presentation/rebello>).

use std::io::{ErrorKind, Result};
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use redb::{BackendError, StorageBackend};

/// The file of a database. All clones write to one file.
#[derive(Debug, Clone)]
pub(super) struct Disk {
    file: Arc<dyn StorageBackend>,
    /// `None` once the file is accepted.
    buffer: Arc<RwLock<Option<WriteBuffer>>>,
    unsynced: Unsynced,
}

/// The ranges written since the last successful sync. They outlive a [`Disk`]: after a failure the
/// database is opened again on a new `Disk`.
pub(super) type Unsynced = Arc<Mutex<Ranges>>;

#[derive(Debug, Default)]
pub(super) struct Ranges {
    /// The offset and length of each range.
    written: Vec<(u64, usize)>,
    /// Whether a sync has failed since the last successful one.
    failed: bool,
}

/// Operations that have not reached the file.
#[derive(Debug)]
struct WriteBuffer {
    /// The length that readers see.
    length: u64,
    /// The file's own bytes are visible up to this offset.
    visible_until: u64,
    /// The operations, in the order in which they were made.
    ops: Vec<BufferedOp>,
}

#[derive(Debug)]
enum BufferedOp {
    SetLen(u64),
    /// Writes at an offset.
    Write(u64, Vec<u8>),
    Sync,
}

impl Disk {
    /// Wraps `file`. Writes nothing to it before [`Self::accept`].
    pub(super) fn new(file: Arc<dyn StorageBackend>, unsynced: &Unsynced) -> Result<Self> {
        let length = file.len()?;
        let buffer = WriteBuffer { length, visible_until: length, ops: Vec::new() };
        unsynced.lock().unwrap_or_else(PoisonError::into_inner).tidy();
        Ok(Self { file, buffer: Arc::new(RwLock::new(Some(buffer))), unsynced: Arc::clone(unsynced) })
    }

    /// Performs the buffered operations in their order and syncs. Later operations go to the file
    /// at once.
    pub(super) fn accept(&self) -> Result<()> {
        let Some(buffer) = self.buffer.write().unwrap_or_else(PoisonError::into_inner).take() else {
            return Ok(());
        };
        for op in buffer.ops {
            match op {
                BufferedOp::SetLen(length) => self.set_len(length)?,
                BufferedOp::Write(offset, data) => self.write(offset, &data)?,
                BufferedOp::Sync => self.sync_data()?,
            }
        }
        self.sync_data()
    }

    /// Writes the ranges again, with the bytes that a read of the file returns.
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

    /// Whether operations are buffered. The thread that opens the database also accepts the file,
    /// so the result cannot change between this call and a write.
    fn is_buffering(&self) -> bool {
        self.buffer.read().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn unsynced(&self) -> MutexGuard<'_, Ranges> {
        self.unsynced.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ranges {
    /// Removes duplicates. While the disk is full the same ranges are written again and again, and
    /// the list would grow without a bound.
    fn tidy(&mut self) {
        self.written.sort_unstable();
        self.written.dedup();
    }
}

impl WriteBuffer {
    fn write(&mut self, offset: u64, data: &[u8]) {
        self.length = self.length.max(offset + size(data));
        self.ops.push(BufferedOp::Write(offset, data.to_vec()));
    }

    fn set_len(&mut self, length: u64) {
        self.length = length;
        self.visible_until = self.visible_until.min(length);
        self.ops.push(BufferedOp::SetLen(length));
    }

    fn read(&self, file: &dyn StorageBackend, offset: u64, out: &mut [u8]) -> Result<()> {
        if offset + size(out) > self.length {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let shown =
            usize::try_from(self.visible_until.saturating_sub(offset)).unwrap_or(usize::MAX).min(out.len());
        let (from_file, rest) = out.split_at_mut(shown);
        if shown > 0 {
            file.read(offset, from_file)?;
        }
        rest.fill(0);
        for op in &self.ops {
            match op {
                BufferedOp::Write(start, data) => {
                    let (begin, end) = (offset.max(*start), (offset + size(out)).min(start + size(data)));
                    if begin < end {
                        out[index(begin - offset)..index(end - offset)]
                            .copy_from_slice(&data[index(begin - start)..index(end - start)]);
                    }
                }
                BufferedOp::SetLen(length) => {
                    let kept = index(length.saturating_sub(offset).min(size(out)));
                    out[kept..].fill(0);
                }
                BufferedOp::Sync => {}
            }
        }
        Ok(())
    }
}

fn size(data: &[u8]) -> u64 {
    data.len() as u64
}

/// Converts a distance within one slice to an index.
fn index(distance: u64) -> usize {
    usize::try_from(distance).expect("no longer than the slice")
}

impl StorageBackend for Disk {
    fn len(&self) -> Result<u64> {
        match &*self.buffer.read().unwrap_or_else(PoisonError::into_inner) {
            Some(buffer) => Ok(buffer.length),
            None => self.file.len(),
        }
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        match &*self.buffer.read().unwrap_or_else(PoisonError::into_inner) {
            Some(buffer) => buffer.read(&*self.file, offset, out),
            None => self.file.read(offset, out),
        }
    }

    fn set_len(&self, length: u64) -> Result<()> {
        match &mut *self.buffer.write().unwrap_or_else(PoisonError::into_inner) {
            Some(buffer) => buffer.set_len(length),
            None => self.file.set_len(length)?,
        }
        Ok(())
    }

    fn sync_data(&self) -> Result<()> {
        if let Some(buffer) = &mut *self.buffer.write().unwrap_or_else(PoisonError::into_inner) {
            buffer.ops.push(BufferedOp::Sync);
            return Ok(());
        }
        let mut unsynced = self.unsynced();
        if unsynced.failed {
            self.rewrite(&mut unsynced)?;
        }
        // Stays true unless the sync succeeds.
        unsynced.failed = true;
        self.file.sync_data()?;
        *unsynced = Ranges::default();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        // Checked under the read lock, so that a write after the start does not block readers.
        if self.is_buffering() {
            if let Some(buffer) = &mut *self.buffer.write().unwrap_or_else(PoisonError::into_inner) {
                buffer.write(offset, data);
            }
            return Ok(());
        }
        // Listed even if the write fails, which may have written a part of the data.
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

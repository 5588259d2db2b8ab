//! Where the data is: its folder and file, whether they are ours and whole, and who may read them.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Error, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use redb::backends::FileBackend;
use redb::{
    Database, DatabaseError, ReadableDatabase, ReadableTable, StorageBackend, StorageError, TableDefinition,
    TableError, TableHandle,
};

use super::disk::{Disk, Unsynced};
use super::document::decode;
use crate::lease::{Key, Timestamp};

/// The file in the data folder.
pub(super) const FILE: &str = "leases.redb";
/// Records by key.
pub(super) const RECORDS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("records");
/// The keys that are held, waited for or blocked: a listing goes by these. A block ends by time alone, so a key may stay
/// here for a while after that.
pub(super) const IN_USE: TableDefinition<'_, &str, ()> = TableDefinition::new("in use");
/// Facts about the whole.
pub(super) const FACTS: TableDefinition<'_, &str, i64> = TableDefinition::new("leased");
/// The fact that says how the rest is to be read.
const FORMAT: &str = "format";
/// The fact that says what the clock showed at the latest commit.
pub(super) const LATEST: &str = "latest";
/// The only format there is so far.
const THIS_FORMAT: i64 = 1;
/// What redb may keep of the file in memory, in bytes; the system's own cache comes on top.
const CACHE: usize = 64 * 1024 * 1024;

/// Why a data folder cannot be used. The message says what to do.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Another process has it open.
    #[error("the data in {0} is in use by another daemon: stop that, or name another --data-dir")]
    InUse(PathBuf),
    /// The file is not whole any more.
    #[error(
        "{0} is damaged ({1}): put back a copy from before, or move the file away to begin with no leases; it was not \
         changed"
    )]
    Damaged(PathBuf, String),
    /// The file is something else.
    #[error("{0} holds something other than leases ({1}): name another --data-dir; it was not changed")]
    Foreign(PathBuf, String),
    /// The file is from the future.
    #[error(
        "{0} was written by a newer version of leased: run that version or a later one; it was not changed"
    )]
    Newer(PathBuf),
    /// The system does not let the daemon at it.
    #[error("{0} cannot be used: {1}; see that the daemon may write there, or name another --data-dir")]
    Forbidden(PathBuf, String),
    /// Something that may pass, such as a disk that is full.
    #[error("{0} cannot be opened: {1}")]
    Failed(PathBuf, String),
}

impl OpenError {
    fn io(path: &Path, error: &Error) -> Self {
        let what = error.to_string();
        match error.kind() {
            // What is missing is made, so a place where something is missing all the same takes nothing.
            ErrorKind::NotFound
            | ErrorKind::PermissionDenied
            | ErrorKind::NotADirectory
            | ErrorKind::IsADirectory
            | ErrorKind::AlreadyExists
            | ErrorKind::ReadOnlyFilesystem
            | ErrorKind::InvalidFilename => Self::Forbidden(path.to_owned(), what),
            _ => Self::Failed(path.to_owned(), what),
        }
    }

    fn storage(path: &Path, error: StorageError) -> Self {
        match error {
            StorageError::Io(error) if error.kind() == ErrorKind::InvalidData => {
                Self::Foreign(path.to_owned(), error.to_string())
            }
            StorageError::Io(error) if error.kind() == ErrorKind::UnexpectedEof => {
                Self::Damaged(path.to_owned(), "it ends too early".to_owned())
            }
            StorageError::Io(error) => Self::io(path, &error),
            StorageError::Corrupted(what) => Self::Damaged(path.to_owned(), what),
            other => Self::Failed(path.to_owned(), other.to_string()),
        }
    }

    fn database(path: &Path, error: DatabaseError) -> Self {
        match error {
            DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch => {
                Self::InUse(path.parent().unwrap_or(path).to_owned())
            }
            DatabaseError::UpgradeRequired(format) => {
                Self::Foreign(path.to_owned(), format!("an old redb file of format {format}"))
            }
            DatabaseError::Storage(error) => Self::storage(path, error),
            other => Self::Failed(path.to_owned(), other.to_string()),
        }
    }
}

/// What a database can be opened on, again and again.
pub(super) trait Medium: std::fmt::Debug + Send + Sync {
    /// What messages call it.
    fn path(&self) -> &Path;

    /// The bytes, none if there were none before.
    fn mount(&self) -> Result<Arc<dyn StorageBackend>, OpenError>;
}

/// The file in a data folder, which is made if it is missing.
#[derive(Debug)]
pub(super) struct DataFile {
    folder: PathBuf,
    path: PathBuf,
}

impl DataFile {
    pub(super) fn in_folder(folder: &Path) -> Self {
        Self { folder: folder.to_owned(), path: folder.join(FILE) }
    }
}

impl Medium for DataFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn mount(&self) -> Result<Arc<dyn StorageBackend>, OpenError> {
        make_folder(&self.folder).map_err(|error| OpenError::io(&self.folder, &error))?;
        // Lease ids are secrets.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&self.path);
        let file = file.and_then(|file| sync_folder(&self.folder).map(|()| file));
        let file = file.map_err(|error| OpenError::io(&self.path, &error))?;
        Ok(Arc::new(FileBackend::new(file).map_err(|error| OpenError::database(&self.path, error))?))
    }
}

/// Opens the database on `medium`, and returns it with the latest instant it knows. Reads all of it, and changes
/// nothing unless it is ours and whole.
pub(super) fn open(medium: &dyn Medium, unsynced: &Unsynced) -> Result<(Database, Timestamp), OpenError> {
    let path = medium.path();
    let disk = Disk::new(medium.mount()?, unsynced).map_err(|error| OpenError::io(path, &error))?;
    let database = Database::builder()
        .set_cache_size(CACHE)
        .set_check_integrity_on_open(true)
        .create_with_backend(disk.clone())
        .map_err(|error| OpenError::database(path, error))?;
    let latest = recognise(&database, path)?;
    disk.accept().map_err(|error| OpenError::io(path, &error))?;
    Ok((database, latest))
}

/// Makes sure that the database is ours, and makes a new one so.
fn recognise(database: &Database, path: &Path) -> Result<Timestamp, OpenError> {
    let fail = |error: redb::Error| OpenError::Failed(path.to_owned(), error.to_string());
    let foreign = |what: &str| OpenError::Foreign(path.to_owned(), what.to_owned());
    let reading = database.begin_read().map_err(|error| fail(error.into()))?;
    let tables: Vec<String> = reading
        .list_tables()
        .map_err(|error| fail(error.into()))?
        .map(|table| table.name().to_owned())
        .collect();
    if tables.is_empty() {
        return begin(database).map(|()| Timestamp(0)).map_err(fail);
    }
    let facts = match reading.open_table(FACTS) {
        Ok(facts) => facts,
        Err(TableError::Storage(error)) => return Err(fail(error.into())),
        Err(_) => return Err(foreign("a redb database of another program")),
    };
    let fact = |name| facts.get(name).map(|found| found.map(|found| found.value()));
    match fact(FORMAT).map_err(|error| fail(error.into()))? {
        Some(THIS_FORMAT) => {}
        Some(format) if format > THIS_FORMAT => return Err(OpenError::Newer(path.to_owned())),
        _ => return Err(foreign("a redb database of another program")),
    }
    if !tables.iter().any(|table| table == IN_USE.name()) {
        mark_in_use(database).map_err(fail)?;
    }
    Ok(Timestamp(fact(LATEST).map_err(|error| fail(error.into()))?.unwrap_or(0)))
}

/// Fills the table of the keys in use, which an earlier version did not keep.
fn mark_in_use(database: &Database) -> Result<(), redb::Error> {
    let writing = database.begin_write()?;
    {
        let mut in_use = writing.open_table(IN_USE)?;
        for entry in writing.open_table(RECORDS)?.iter()? {
            let (name, value) = entry?;
            let record = Key::try_from(name.value()).ok().and_then(|key| decode(&key, value.value()).ok());
            if record.is_some_and(|record| !record.is_free(Timestamp(i64::MIN))) {
                in_use.insert(name.value(), ())?;
            }
        }
    }
    writing.commit()?;
    Ok(())
}

/// Lays out an empty database.
fn begin(database: &Database) -> Result<(), redb::Error> {
    let writing = database.begin_write()?;
    writing.open_table(RECORDS)?;
    writing.open_table(IN_USE)?;
    writing.open_table(FACTS)?.insert(FORMAT, THIS_FORMAT)?;
    writing.commit()?;
    Ok(())
}

/// For the daemon's user alone, and known to last: the folder above it is synced.
fn make_folder(folder: &Path) -> std::io::Result<()> {
    if folder.is_dir() || folder.as_os_str().is_empty() {
        return Ok(());
    }
    let above = folder.parent().unwrap_or(Path::new(""));
    make_folder(above)?;
    DirBuilder::new().mode(0o700).create(folder)?;
    sync_folder(above)
}

fn sync_folder(folder: &Path) -> std::io::Result<()> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    File::open(folder)?.sync_all()
}

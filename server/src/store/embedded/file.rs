//! The data folder and its file: creates them, opens them, and checks that the file is ours and
//! intact.
//!
//! Only the start of a daemon creates files. A running daemon accepts no file but the one it
//! opened. With an empty file in its place, for example below the mount point of a volume that is
//! no longer mounted, the daemon would grant leases on keys that are still held.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions, TryLockError};
use std::io::{Error, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redb::backends::FileBackend;
use redb::{Database, DatabaseError, StorageBackend, StorageError};
use uuid::Uuid;

use super::disk::{Disk, Unsynced};
use super::facts::{Facts, FactsError, empty_database};
use crate::lease::Timestamp;

/// The file in the data folder.
pub(super) const FILE: &str = "leases.redb";
/// The name of a new file until it is complete.
const NEW_FILE: &str = "leases.redb.new";
/// How much of the file redb may cache, in bytes, besides the operating system's page cache.
const CACHE: usize = 64 * 1024 * 1024;

/// Why a data folder cannot be used. The message says what to do.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Another process has it open.
    #[error("the data in {0} is in use by another daemon: stop that, or name another --data-dir")]
    InUse(PathBuf),
    /// The file is damaged.
    #[error(
        "{0} is damaged ({1}): restore an earlier copy, or move the file away to begin with no leases; it was not changed"
    )]
    Damaged(PathBuf, String),
    /// The file holds something other than leases.
    #[error("{0} holds something other than leases ({1}): name another --data-dir; it was not changed")]
    Foreign(PathBuf, String),
    /// A newer version of this program wrote the file.
    #[error(
        "{0} was written by a newer version of leased: run that version or a later one; it was not changed"
    )]
    Newer(PathBuf),
    /// The operating system denies access to the path.
    #[error("{0} cannot be used: {1}; see that the daemon may write there, or name another --data-dir")]
    Forbidden(PathBuf, String),
    /// The file that a running daemon opened was removed, or another one is in its place.
    #[error(
        "{0} is not the file that this daemon opened ({1}): put that file back, or mount its volume again; to begin \
         with what is there now, restart the daemon"
    )]
    Gone(PathBuf, &'static str),
    /// A failure that may pass, such as a full disk.
    #[error("{0} cannot be opened: {1}")]
    Failed(PathBuf, String),
}

impl OpenError {
    fn io(path: &Path, error: &Error) -> Self {
        let what = error.to_string();
        match error.kind() {
            // The daemon creates missing folders and files. If it gets `NotFound` nevertheless,
            // nothing can be created there.
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

    /// Converts an error of redb about a file that is known to be ours.
    pub(super) fn redb(path: &Path, error: redb::Error) -> Self {
        match error {
            redb::Error::Io(error) => Self::storage(path, StorageError::Io(error)),
            redb::Error::Corrupted(what) => Self::Damaged(path.to_owned(), what),
            // A table is missing or of another type.
            redb::Error::TableDoesNotExist(_)
            | redb::Error::TableTypeMismatch { .. }
            | redb::Error::TableIsMultimap(_)
            | redb::Error::TypeDefinitionChanged { .. } => Self::Damaged(path.to_owned(), error.to_string()),
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

/// The bytes of a database. A store opens them at its start and again after each failure.
pub(super) trait Medium: std::fmt::Debug + Send + Sync {
    /// The path that messages show.
    fn path(&self) -> &Path;

    /// Creates an empty database if there is none. Called only at the start.
    fn prepare(&self) -> Result<(), OpenError>;

    /// Opens the existing bytes. Fails if they are not those that were mounted before.
    fn mount(&self) -> Result<Arc<dyn StorageBackend>, OpenError>;

    /// Fails if the path no longer leads to the mounted bytes.
    fn check_path(&self) -> Result<(), OpenError>;
}

/// The file in a data folder.
#[derive(Debug)]
pub(super) struct DataFile {
    folder: PathBuf,
    path: PathBuf,
    /// The path of a new file until it is complete.
    new: PathBuf,
    /// The file that was mounted last.
    mounted: Mutex<Option<Identity>>,
}

/// Identifies a file among those that exist at the same time. The numbers of a deleted file may be
/// used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    fn of(metadata: &Metadata) -> Self {
        Self { device: metadata.dev(), inode: metadata.ino() }
    }
}

const REMOVED: &str = "it was removed, or its volume is not mounted";
const REPLACED: &str = "another file is in its place";
const OLDER: &str = "it lacks commits that were acknowledged";

impl DataFile {
    pub(super) fn in_folder(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
            path: folder.join(FILE),
            new: folder.join(NEW_FILE),
            mounted: Mutex::default(),
        }
    }

    /// Creates an empty database under a temporary name, syncs it and renames it. So a start that
    /// is killed leaves no incomplete file under the real name. The next start overwrites or
    /// removes the temporary file.
    ///
    /// A lock on the temporary file makes sure that only one of two first starts creates it.
    fn create_file(&self) -> Result<(), OpenError> {
        let fail = |error: Error| OpenError::io(&self.path, &error);
        // Not truncated before the lock is held: another start may be writing the file.
        let mut file = open_options().create(true).truncate(false).open(&self.new).map_err(fail)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(OpenError::InUse(self.folder.clone())),
            Err(TryLockError::Error(error)) => return Err(fail(error)),
        }
        // Another start may have renamed or removed it before the lock was free.
        let ours = Identity::of(&file.metadata().map_err(fail)?);
        if identity_at(&self.new).map_err(fail)? != Some(ours) {
            return Ok(());
        }
        if identity_at(&self.path).map_err(fail)?.is_some() {
            return fs::remove_file(&self.new).map_err(fail);
        }
        let mut write = || {
            file.set_len(0)?;
            file.write_all(&empty_database())?;
            file.sync_all()?;
            fs::rename(&self.new, &self.path)
        };
        write().map_err(|error| {
            // An incomplete file would only take up space on a full disk.
            let _ = fs::remove_file(&self.new);
            fail(error)
        })
    }

    fn mounted(&self) -> MutexGuard<'_, Option<Identity>> {
        self.mounted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn gone(&self, why: &'static str) -> OpenError {
        OpenError::Gone(self.path.clone(), why)
    }

    /// Converts an error about a path that led to the mounted file before. If the path leads
    /// nowhere, the file was removed.
    fn missing(&self, error: &Error) -> OpenError {
        match error.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory => self.gone(REMOVED),
            _ => OpenError::io(&self.path, error),
        }
    }
}

impl Medium for DataFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn prepare(&self) -> Result<(), OpenError> {
        make_folder(&self.folder).map_err(|error| OpenError::io(&self.folder, &error))?;
        let exists = |path: &Path| match identity_at(path) {
            Ok(identity) => Ok(identity.is_some()),
            Err(error) => Err(OpenError::io(path, &error)),
        };
        // `create_file` may have lost a race to another start, so this looks again.
        while !exists(&self.path)? || exists(&self.new)? {
            self.create_file()?;
        }
        // An earlier start may have been killed between the rename and this sync.
        sync_folder(&self.folder).map_err(|error| OpenError::io(&self.path, &error))
    }

    fn mount(&self) -> Result<Arc<dyn StorageBackend>, OpenError> {
        let fail = |error: Error| OpenError::io(&self.path, &error);
        let mut mounted = self.mounted();
        let file = open_options().open(&self.path).map_err(|error| match *mounted {
            Some(_) => self.missing(&error),
            None => fail(error),
        })?;
        let metadata = file.metadata().map_err(fail)?;
        let identity = Identity::of(&metadata);
        // A volume that is mounted again may have another device number.
        if mounted.is_some_and(|before| before.inode != identity.inode) {
            return Err(self.gone(REPLACED));
        }
        // redb would initialize an empty file as a new database.
        if metadata.len() == 0 {
            return Err(OpenError::Damaged(self.path.clone(), "it is empty".to_owned()));
        }
        *mounted = Some(identity);
        Ok(Arc::new(FileBackend::new(file).map_err(|error| OpenError::database(&self.path, error))?))
    }

    /// Compares the device and inode numbers of the file at the path. While the mounted file is
    /// open no other file can have them.
    fn check_path(&self) -> Result<(), OpenError> {
        let there = fs::metadata(&self.path).map_err(|error| self.missing(&error))?;
        if *self.mounted() == Some(Identity::of(&there)) { Ok(()) } else { Err(self.gone(REPLACED)) }
    }
}

/// What a file that is opened again must contain.
#[derive(Debug, Clone, Copy)]
pub(super) struct Expected {
    /// The identity of the store.
    pub(super) store: Uuid,
    /// The time of the latest commit that was acknowledged.
    pub(super) latest: Timestamp,
}

/// Opens the database on `medium` and returns it with its facts. Reads all of it. Changes nothing
/// unless the database is ours, intact and, if given, as `expected`.
pub(super) fn open(
    medium: &dyn Medium,
    unsynced: &Unsynced,
    expected: Option<Expected>,
) -> Result<(Database, Facts), OpenError> {
    let path = medium.path();
    let disk = Disk::new(medium.mount()?, unsynced).map_err(|error| OpenError::io(path, &error))?;
    let database = Database::builder()
        .set_cache_size(CACHE)
        .set_check_integrity_on_open(true)
        .create_with_backend(disk.clone())
        .map_err(|error| OpenError::database(path, error))?;
    let facts = Facts::read(&database).map_err(|error| match error {
        FactsError::Foreign(what) => OpenError::Foreign(path.to_owned(), what.to_owned()),
        FactsError::Newer => OpenError::Newer(path.to_owned()),
        FactsError::Damaged(what) => OpenError::Damaged(path.to_owned(), what.to_owned()),
        FactsError::Failed(error) => OpenError::redb(path, error),
    })?;
    if let Some(expected) = expected {
        // The device and inode numbers do not suffice: they are used again, and a volume may have
        // been set back to a snapshot.
        if facts.store != Some(expected.store) {
            return Err(OpenError::Gone(path.to_owned(), REPLACED));
        }
        if facts.latest < expected.latest {
            return Err(OpenError::Gone(path.to_owned(), OLDER));
        }
    }
    disk.accept().map_err(|error| OpenError::io(path, &error))?;
    Ok((database, facts))
}

/// How files are opened: readable by the daemon's user alone, because lease ids are secrets.
fn open_options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    options
}

/// Returns the identity of what is at the path, without following links. A link that leads nowhere
/// counts as present, because its volume may not be mounted yet.
fn identity_at(path: &Path) -> std::io::Result<Option<Identity>> {
    match fs::symlink_metadata(path) {
        Ok(metadata) => Ok(Some(Identity::of(&metadata))),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Creates a folder, and those above it, for the daemon's user alone. Syncs the folder above each,
/// so that the new entry is durable.
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

#[cfg(test)]
mod tests {
    use redb::TableDefinition;
    use rstest::rstest;

    use super::super::facts::NAMES;
    use super::*;

    fn opens(folder: &Path) -> Result<(), OpenError> {
        let file = DataFile::in_folder(folder);
        file.prepare()?;
        open(&file, &Unsynced::default(), None).map(drop)
    }

    #[test]
    fn a_first_start_that_was_killed_is_done_again() {
        let whole = empty_database();
        for length in [0, 1, 4096, whole.len() / 2, whole.len()] {
            let folder = tempfile::tempdir().expect("a folder");
            fs::write(folder.path().join(NEW_FILE), &whole[..length]).expect("a file");
            opens(folder.path()).expect("a start");
            assert!(!folder.path().join(NEW_FILE).exists(), "it is cleaned up");
        }
    }

    #[test]
    fn a_temporary_file_beside_the_real_one_is_removed_and_the_real_one_is_kept() {
        let folder = tempfile::tempdir().expect("a folder");
        opens(folder.path()).expect("a start");
        let before = fs::metadata(folder.path().join(FILE)).expect("the file");
        fs::write(folder.path().join(NEW_FILE), "half").expect("a file");
        opens(folder.path()).expect("a start");
        assert!(!folder.path().join(NEW_FILE).exists(), "it is cleaned up");
        let after = fs::metadata(folder.path().join(FILE)).expect("the file");
        assert_eq!(Identity::of(&after), Identity::of(&before));
    }

    #[test]
    fn a_first_start_is_refused_while_another_one_is_under_way() {
        let folder = tempfile::tempdir().expect("a folder");
        let other = File::create(folder.path().join(NEW_FILE)).expect("a file");
        other.lock().expect("a lock");
        assert!(matches!(opens(folder.path()), Err(OpenError::InUse(_))));
        drop(other);
        opens(folder.path()).expect("a start");
    }

    #[test]
    fn an_empty_file_counts_as_damaged_and_a_dangling_link_is_left_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(FILE);
        fs::write(&path, "").expect("a file");
        assert!(matches!(opens(folder.path()), Err(OpenError::Damaged(..))));
        assert_eq!(fs::metadata(&path).expect("the file").len(), 0);
        fs::remove_file(&path).expect("a file");
        std::os::unix::fs::symlink(folder.path().join("volume/leases.redb"), &path).expect("a link");
        assert!(matches!(opens(folder.path()), Err(OpenError::Forbidden(..))));
        assert!(fs::symlink_metadata(&path).expect("the link").is_symlink());
    }

    /// Creates a database of ours in `folder` and changes it with `damage`.
    fn create_damaged(folder: &Path, damage: impl FnOnce(&redb::WriteTransaction)) {
        opens(folder).expect("a start");
        let database = Database::open(folder.join(FILE)).expect("a database");
        let writing = database.begin_write().expect("a transaction");
        damage(&writing);
        writing.commit().expect("a commit");
    }

    #[rstest]
    #[case::an_identity_that_is_no_uuid("its identity", |writing: &redb::WriteTransaction| {
        let mut names = writing.open_table(NAMES).expect("a table");
        names.insert("store", "nobody").expect("a name");
    })]
    #[case::names_that_are_numbers("names", |writing: &redb::WriteTransaction| {
        const NUMBERS: TableDefinition<'_, &str, i64> = TableDefinition::new("names");
        writing.delete_table(NAMES).expect("a table");
        writing.open_table(NUMBERS).expect("a table");
    })]
    fn a_file_of_ours_with_unexpected_contents_counts_as_damaged_and_is_not_changed(
        #[case] named: &str,
        #[case] damage: fn(&redb::WriteTransaction),
    ) {
        let folder = tempfile::tempdir().expect("a folder");
        create_damaged(folder.path(), damage);
        let before = fs::read(folder.path().join(FILE)).expect("the file");
        let error = opens(folder.path()).expect_err("a damaged file");
        assert!(matches!(&error, OpenError::Damaged(_, what) if what.contains(named)), "{error}");
        assert!(fs::read(folder.path().join(FILE)).expect("the file") == before, "it was written to");
    }

    #[test]
    fn corruption_that_redb_reports_counts_as_damage_in_every_error_type() {
        let path = Path::new("leases.redb");
        let storage = || StorageError::Corrupted("a page".to_owned());
        for error in [
            OpenError::storage(path, storage()),
            OpenError::redb(path, redb::Error::from(storage())),
            OpenError::redb(path, redb::Error::from(redb::TableError::Storage(storage()))),
            OpenError::redb(path, redb::Error::TableDoesNotExist("records".to_owned())),
            OpenError::redb(path, Error::from(ErrorKind::UnexpectedEof).into()),
        ] {
            assert!(matches!(error, OpenError::Damaged(..)), "{error}");
        }
        let full = Error::from(ErrorKind::StorageFull);
        assert!(matches!(OpenError::redb(path, full.into()), OpenError::Failed(..)), "a full disk may pass");
    }

    /// The file keeps its inode number, as when a file system uses that of a deleted file again.
    #[test]
    fn another_store_under_the_same_file_number_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = DataFile::in_folder(folder.path());
        file.prepare().expect("a first start");
        let (database, facts) = open(&file, &Unsynced::default(), None).expect("an open file");
        drop(database);
        let expected = Expected { store: facts.store.expect("an identity"), latest: facts.latest };
        open(&file, &Unsynced::default(), Some(expected)).expect("the same store");
        let other = empty_database();
        fs::write(file.path(), &other).expect("the same file");
        file.check_path().expect("the same file");
        let refused = open(&file, &Unsynced::default(), Some(expected)).expect_err("another store");
        assert!(matches!(refused, OpenError::Gone(_, REPLACED)), "{refused}");
        assert!(fs::read(file.path()).expect("the file") == other, "it was written to");
    }
}

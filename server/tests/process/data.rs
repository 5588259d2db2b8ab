//! The data file of the embedded store. If the file is in use, damaged, foreign or from a newer
//! version, the daemon prints one sentence, exits with code 2, and leaves the file unchanged.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use leased_proto::v1::{AcquireRequest, GetRequest};
use redb::{Database, TableDefinition};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::support::{Running, run_to_end_in};

/// Returns a folder in which a daemon has granted 100 leases.
fn folder_with_leases() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut running = Running::start_in(folder.path(), &[]);
    // The client's connection ends with this runtime, so the drain need not wait for it.
    Runtime::new().unwrap().block_on(async {
        let mut client = running.client().await;
        for number in 0..100 {
            let request = AcquireRequest { key: format!("key/{number}"), ..AcquireRequest::default() };
            client.acquire(request).await.unwrap();
        }
    });
    running.signal("TERM");
    assert_eq!(running.code(), Some(0));
    folder
}

fn file(folder: &Path) -> PathBuf {
    folder.join("leased-data/leases.redb")
}

/// Checks that a daemon in this folder exits with code 2 and one line that contains `sentence`, and
/// leaves the file unchanged.
fn assert_refused(folder: &Path, sentence: &str) {
    let before = fs::read(file(folder)).unwrap();
    let (code, stderr) = run_to_end_in(folder, &[]);
    assert_eq!(code, Some(2), "{stderr}");
    let said: Vec<&str> = stderr.lines().collect();
    assert!(said.len() == 1 && said[0].starts_with("leased: ") && said[0].contains(sentence), "{stderr}");
    assert!(fs::read(file(folder)).unwrap() == before, "the file was changed");
}

#[test]
fn a_first_start_creates_a_data_folder_that_only_its_user_can_read() {
    let folder = tempfile::tempdir().unwrap();
    let running = Running::start_in(folder.path(), &[]);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&folder.path().join("leased-data")), 0o700, "lease ids are secrets");
    assert_eq!(mode(&file(folder.path())), 0o600);
    running.kill();

    let deep = folder.path().join("a/b/c");
    let running = Running::start_in(folder.path(), &["--data-dir", deep.to_str().unwrap()]);
    assert!(deep.join("leases.redb").exists());
    running.kill();
}

#[test]
fn leases_survive_a_restart() {
    let folder = folder_with_leases();
    let running = Running::start_in(folder.path(), &[]);
    Runtime::new().unwrap().block_on(async {
        let mut client = running.client().await;
        for number in 0..100 {
            let seen = client.get(GetRequest { key: format!("key/{number}") }).await.unwrap().into_inner();
            assert_eq!(seen.lease.unwrap().holders.len(), 1);
        }
    });
}

#[tokio::test]
async fn a_second_daemon_on_the_same_data_is_refused_and_the_first_still_serves() {
    let folder = tempfile::tempdir().unwrap();
    let first = Running::start_in(folder.path(), &[]);
    let mut client = first.client().await;
    client.acquire(AcquireRequest { key: "job".to_owned(), ..AcquireRequest::default() }).await.unwrap();
    assert_refused(folder.path(), "is in use by another daemon");
    client.get(GetRequest { key: "job".to_owned() }).await.unwrap();
}

#[test]
fn a_damaged_file_is_refused() {
    let folder = folder_with_leases();
    let whole = fs::read(file(folder.path())).unwrap();
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = whole.clone();
        change(&mut bytes);
        fs::write(file(folder.path()), bytes).unwrap();
    };
    with(&|bytes| bytes.truncate(bytes.len() / 2));
    assert_refused(folder.path(), "is damaged");
    // One bit of a stored key is flipped.
    with(&|bytes| {
        let at = bytes.windows(6).position(|window| window == b"key/42").unwrap();
        bytes[at] ^= 1;
    });
    assert_refused(folder.path(), "is damaged");
    with(&|_| {});
    Running::start_in(folder.path(), &[]);
}

#[test]
fn a_foreign_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("leased-data")).unwrap();
    for text in ["hello, world\n".to_owned(), "x".repeat(100_000)] {
        fs::write(file(folder.path()), text).unwrap();
        assert_refused(folder.path(), "holds something other than leases");
    }
    fs::remove_file(file(folder.path())).unwrap();
    write_table(folder.path(), TableDefinition::new("somebody's"), "x", 1);
    assert_refused(folder.path(), "holds something other than leases");
}

#[test]
fn a_file_from_a_newer_version_is_refused() {
    let folder = folder_with_leases();
    write_table(folder.path(), TableDefinition::new("leased"), "format", 2);
    assert_refused(folder.path(), "was written by a newer version");
    write_table(folder.path(), TableDefinition::new("leased"), "format", 1);
    Running::start_in(folder.path(), &[]);
}

fn write_table(folder: &Path, table: TableDefinition<'_, &str, i64>, name: &str, value: i64) {
    let writing = Database::create(file(folder)).unwrap().begin_write().unwrap();
    writing.open_table(table).unwrap().insert(name, value).unwrap();
    writing.commit().unwrap();
}

#[test]
fn a_folder_that_cannot_be_used_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("file"), "a file").unwrap();
    for data_dir in ["file", "file/below", "/proc/leased"] {
        let (code, stderr) = run_to_end_in(folder.path(), &["--data-dir", data_dir]);
        assert_eq!(code, Some(2), "{stderr}");
        assert!(stderr.contains("cannot be used") && stderr.contains("--data-dir"), "{stderr}");
    }
    fs::create_dir_all(file(folder.path())).unwrap();
    let (code, stderr) = run_to_end_in(folder.path(), &[]);
    assert_eq!(code, Some(2), "{stderr}");
}

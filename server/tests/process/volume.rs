//! Failures of a data folder: the first start is killed or finds the disk full, the file is removed
//! or replaced, or the volume is unmounted. A daemon uses only the file that it opened, and never
//! creates a new one after its start.

use rustix::process::geteuid;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use leased_proto::v1::{AcquireRequest, AcquireResponse, GetRequest, ListRequest};
use tokio::task::JoinSet;
use tonic::{Code, Status};

use crate::support::{Running, daemon, eventually};

/// How many first starts are killed, each a little later than the one before.
const KILLS: u32 = 40;
/// A TTL longer than the tests.
const TTL: Duration = Duration::from_secs(3600);

#[test]
fn after_a_first_start_that_is_killed_at_any_moment_the_daemon_starts() {
    for number in 0..KILLS {
        let folder = tempfile::tempdir().unwrap();
        let mut command = daemon(&[]);
        command.current_dir(folder.path()).stderr(Stdio::null());
        let running = Running::spawn(command);
        while !folder.path().join("leased-data").exists() {
            std::thread::sleep(Duration::from_micros(50));
        }
        std::thread::sleep(Duration::from_micros(250) * number);
        running.kill();

        let running = Running::start_in(folder.path(), &[]);
        assert!(running.ready.starts_with("leased ready"), "killed at moment {number}: {:?}", running.ready);
        assert_eq!(
            names(&folder.path().join("leased-data")),
            ["leases.redb"],
            "a temporary file is left over"
        );
    }
}

#[tokio::test]
async fn of_two_simultaneous_first_starts_one_serves_and_one_is_refused() {
    for _ in 0..5 {
        let folder = tempfile::tempdir().unwrap();
        let mut both = [(); 2].map(|()| {
            let mut command = daemon(&[]);
            command.current_dir(folder.path());
            Running::spawn(command)
        });
        let ended = |one: &mut Running| one.child.try_wait().unwrap().is_some();
        let loser = eventually(async || both.iter_mut().position(ended)).await;
        let [first, second] = both;
        let (mut loser, winner) = if loser == 0 { (first, second) } else { (second, first) };
        let mut said = String::new();
        loser.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert_eq!(loser.code(), Some(2), "{said}");
        assert!(said.contains("is in use by another daemon"), "{said}");
        assert!(winner.ready().ready.starts_with("leased ready"));
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Returns `true` if the calling test can go on in this process, since root may mount. Otherwise
/// runs the test in a child process, with namespaces in which it may mount, and returns `false`.
fn may_mount() -> bool {
    if geteuid().is_root() {
        return true;
    }
    let this = std::thread::current().name().unwrap().to_owned();
    let mut inside = Command::new("unshare");
    inside.args(["--map-root-user", "--mount"]).arg(std::env::current_exe().unwrap());
    let output = inside.args(["--exact", &this, "--nocapture"]).output().unwrap();
    let said = String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned();
    assert!(output.status.success(), "this test mounts: run it as root, or allow user namespaces. {said}");
    assert!(said.contains("test result: ok. 1 passed"), "{this} has not been run: {said}");
    false
}

/// A mounted volume, such as a tmpfs. It is unmounted when this value is dropped.
struct Volume(PathBuf);

impl Volume {
    fn mount(at: &Path, size: &str) -> Self {
        let options = format!("size={size}");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &options, "leased-test"]).arg(at);
        assert!(mount.status().unwrap().success(), "this test mounts, which is not allowed here");
        Self(at.to_owned())
    }

    fn resize(&self, size: &str) {
        let options = format!("remount,size={size}");
        // Within a user namespace, remounting needs the source as well as the path.
        let mut mount = Command::new("mount");
        mount.args(["-o", &options, "leased-test"]).arg(&self.0);
        assert!(mount.status().unwrap().success());
    }

    /// Unmounts the volume, and returns whether that succeeded. It fails while a process has a file
    /// open on the volume.
    fn unmount(&self) -> bool {
        Command::new("umount").arg(&self.0).stderr(Stdio::null()).status().unwrap().success()
    }
}

/// Unmounts the volume even if a process has a file open on it.
impl Drop for Volume {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(&self.0).stderr(Stdio::null()).status());
    }
}

#[test]
fn a_first_start_without_disk_space_says_so_and_succeeds_once_there_is_some() {
    if !may_mount() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let volume = Volume::mount(folder.path(), "64k");
    let mut running = daemon(&["--store-timeout=10ms"]);
    let output = running.current_dir(folder.path()).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("No space left on device"), "{said}");

    let mut patient = daemon(&[]);
    patient.current_dir(folder.path()).stderr(Stdio::null());
    let patient = Running::spawn(patient);
    volume.resize("8m");
    assert!(patient.ready().ready.starts_with("leased ready"));
    assert_eq!(names(&folder.path().join("leased-data")), ["leases.redb"]);
}

async fn acquire(running: &Running, key: &str, bulk: usize) -> Result<AcquireResponse, Status> {
    let request = AcquireRequest {
        key: key.to_owned(),
        ttl: Some(TTL.try_into().unwrap()),
        metadata: [("x".to_owned(), "y".repeat(bulk))].into(),
        ..AcquireRequest::default()
    };
    Ok(running.client().await.acquire(request).await?.into_inner())
}

async fn holders(running: &Running, key: &str) -> Result<usize, Status> {
    let request = GetRequest { key: key.to_owned() };
    Ok(running.client().await.get(request).await?.into_inner().lease.unwrap().holders.len())
}

/// Checks that the daemon refuses every call and is not ready. In particular it must not grant the
/// held key again.
async fn assert_unavailable(running: &Running) {
    for key in ["held", "other"] {
        let refused = acquire(running, key, 0).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    }
    assert_eq!(holders(running, "held").await.unwrap_err().code(), Code::Unavailable);
    eventually(async || (!running.is_ready()).then_some(())).await;
}

/// Waits until the daemon is ready again, and checks that the held key is still held.
async fn until_served_again(running: &Running) {
    eventually(async || running.is_ready().then_some(())).await;
    assert_eq!(holders(running, "held").await.unwrap(), 1);
    acquire(running, "other", 0).await.unwrap();
}

#[tokio::test]
async fn after_an_unmount_the_daemon_writes_nothing_into_the_folder_below() {
    if !may_mount() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let below = folder.path().join("volume");
    fs::create_dir(&below).unwrap();
    let volume = Volume::mount(&below, "4m");
    let running = Running::start_in(folder.path(), &["--data-dir", "volume/data"]);
    acquire(&running, "held", 0).await.unwrap();
    let mut numbers = 0..;
    let mut fill = async || acquire(&running, &format!("key/{}", numbers.next().unwrap()), 4000).await;
    while fill().await.is_ok() {}
    // The volume is full. The daemon repeats the failed write for some seconds, and closes the file
    // after each failure. Only while the file is closed can the volume be unmounted.
    let unmounted = eventually(async || volume.unmount().then_some(()));
    let more = async {
        loop {
            let _ = fill().await;
        }
    };
    tokio::select! {
        () = unmounted => {}
        () = more => {}
    }
    drop(volume);
    assert_unavailable(&running).await;
    assert!(names(&below).is_empty(), "{:?}", names(&below));

    let another = Volume::mount(&below, "4m");
    assert_unavailable(&running).await;
    assert!(names(&below).is_empty(), "{:?}", names(&below));
    drop(another);
}

#[tokio::test]
async fn a_volume_that_is_mounted_again_is_served_again() {
    if !may_mount() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let [volume, mount] = ["volume", "mount"].map(|name| folder.path().join(name));
    fs::create_dir(&volume).unwrap();
    fs::create_dir(&mount).unwrap();
    let bind = || {
        let mut bind = Command::new("mount");
        bind.arg("--bind").args([&volume, &mount]);
        assert!(bind.status().unwrap().success(), "this test mounts, which is not allowed here");
        Volume(mount.clone())
    };
    let bound = bind();
    let running = Running::start_in(folder.path(), &["--data-dir", "mount/data"]);
    acquire(&running, "held", 0).await.unwrap();
    // Dropping unmounts the volume although the daemon has the file open.
    drop(bound);
    assert_unavailable(&running).await;
    assert!(names(&mount).is_empty(), "{:?}", names(&mount));

    let _bound = bind();
    until_served_again(&running).await;
}

#[tokio::test]
async fn a_data_folder_that_is_moved_away_is_not_replaced_by_a_new_one() {
    let folder = tempfile::tempdir().unwrap();
    let [data, away] = ["data", "away"].map(|name| folder.path().join(name));
    let running = Running::start_in(folder.path(), &["--data-dir", "data"]);
    acquire(&running, "held", 0).await.unwrap();
    fs::rename(&data, &away).unwrap();
    assert_unavailable(&running).await;
    assert!(!data.exists(), "the daemon has created a new folder");

    let second = Running::start_in(folder.path(), &["--data-dir", "data"]);
    acquire(&second, "held", 0).await.unwrap();
    assert_unavailable(&running).await;
    second.kill();
    assert_unavailable(&running).await;

    fs::remove_dir_all(&data).unwrap();
    fs::rename(&away, &data).unwrap();
    until_served_again(&running).await;
}

#[tokio::test]
async fn after_its_file_is_removed_or_replaced_by_a_copy_the_daemon_refuses_calls() {
    for copied in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("leased-data/leases.redb");
        let copy = folder.path().join("copy");
        let mut running = Running::start_in(folder.path(), &[]);
        acquire(&running, "held", 0).await.unwrap();
        fs::copy(&file, &copy).unwrap();
        if copied {
            fs::rename(&copy, &file).unwrap();
        } else {
            fs::remove_file(&file).unwrap();
        }
        assert_unavailable(&running).await;
        assert_eq!(file.exists(), copied, "the daemon has created a new file");
        running.signal("TERM");
        assert_eq!(running.code(), Some(0));
    }
}

/// Returns the ids of the daemon's threads.
fn threads(running: &Running) -> Vec<String> {
    let mut threads = names(Path::new(&format!("/proc/{}/task", running.child.id())));
    threads.sort_unstable();
    threads
}

/// Under a limit on threads, a call that needs a new thread would fail.
#[tokio::test]
async fn calls_start_no_new_threads() {
    let running = Running::start(&[]);
    acquire(&running, "held", 0).await.unwrap();
    let before = threads(&running);
    let client = running.client().await;
    let mut reading = JoinSet::new();
    for _ in 0..200 {
        let mut client = client.clone();
        reading.spawn(async move {
            client.list(ListRequest::default()).await.unwrap();
            client.get(GetRequest { key: "held".to_owned() }).await.unwrap();
        });
    }
    reading.join_all().await;
    acquire(&running, "other", 0).await.unwrap();
    assert_eq!(threads(&running), before);
}

//! What becomes of a data folder: its first start is killed or finds no room, its file is removed or replaced, its
//! volume is unmounted. A daemon stays with the file that it opened, and makes none after its start.

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

/// First starts that are killed, each a little later in its life than the one before.
const KILLS: u32 = 40;
/// Longer than the tests.
const TTL: Duration = Duration::from_secs(3600);

#[test]
fn a_first_start_that_is_killed_at_any_moment_leaves_a_folder_that_starts() {
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
        assert_eq!(names(&folder.path().join("leased-data")), ["leases.redb"], "and nothing is left over");
    }
}

#[tokio::test]
async fn of_two_first_starts_at_the_same_moment_one_serves_and_the_other_says_that_it_is_in_use() {
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

/// Whether the calling test goes on in this process, which may mount then. Unless the user is root, the test is run once
/// more, in namespaces where it may mount, and is done here.
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

/// Memory as a volume, until it is dropped.
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
        // By its source as well: in a namespace of users the path alone is not enough.
        let mut mount = Command::new("mount");
        mount.args(["-o", &options, "leased-test"]).arg(&self.0);
        assert!(mount.status().unwrap().success());
    }

    /// Unmounts it, unless somebody has a file open there.
    fn unmount(&self) -> bool {
        Command::new("umount").arg(&self.0).stderr(Stdio::null()).status().unwrap().success()
    }
}

/// Also if a file is open there.
impl Drop for Volume {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(&self.0).stderr(Stdio::null()).status());
    }
}

#[test]
fn a_first_start_without_room_says_so_and_goes_on_when_there_is_some() {
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

/// A held key is not granted again, nor anything else.
async fn refuses(running: &Running) {
    for key in ["held", "other"] {
        let refused = acquire(running, key, 0).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    }
    assert_eq!(holders(running, "held").await.unwrap_err().code(), Code::Unavailable);
    eventually(async || (!running.is_ready()).then_some(())).await;
}

/// Waits until the daemon serves again what was held.
async fn serves_again(running: &Running) {
    eventually(async || running.is_ready().then_some(())).await;
    assert_eq!(holders(running, "held").await.unwrap(), 1);
    acquire(running, "other", 0).await.unwrap();
}

#[tokio::test]
async fn a_volume_that_is_unmounted_is_not_replaced_by_what_is_below() {
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
    // It is full. What does not fit is tried again for some seconds, and after each failure the file is closed.
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
    refuses(&running).await;
    assert!(names(&below).is_empty(), "{:?}", names(&below));

    let another = Volume::mount(&below, "4m");
    refuses(&running).await;
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
    // Although the file is open.
    drop(bound);
    refuses(&running).await;
    assert!(names(&mount).is_empty(), "{:?}", names(&mount));

    let _bound = bind();
    serves_again(&running).await;
}

#[tokio::test]
async fn a_folder_that_is_moved_away_is_missed_and_another_in_its_place_is_not_taken_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let [place, away] = ["data", "away"].map(|name| folder.path().join(name));
    let running = Running::start_in(folder.path(), &["--data-dir", "data"]);
    acquire(&running, "held", 0).await.unwrap();
    fs::rename(&place, &away).unwrap();
    refuses(&running).await;
    assert!(!place.exists(), "nothing is made");

    let second = Running::start_in(folder.path(), &["--data-dir", "data"]);
    acquire(&second, "held", 0).await.unwrap();
    refuses(&running).await;
    second.kill();
    refuses(&running).await;

    fs::remove_dir_all(&place).unwrap();
    fs::rename(&away, &place).unwrap();
    serves_again(&running).await;
}

#[tokio::test]
async fn a_file_that_is_removed_or_replaced_by_a_copy_is_noticed() {
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
        refuses(&running).await;
        assert_eq!(file.exists(), copied, "nothing is made");
        running.signal("TERM");
        assert_eq!(running.code(), Some(0));
    }
}

/// The threads of the daemon, by the names that the system has for them.
fn threads(running: &Running) -> Vec<String> {
    let mut threads = names(Path::new(&format!("/proc/{}/task", running.child.id())));
    threads.sort_unstable();
    threads
}

/// Where a process may have no more threads, what needs a new one fails.
#[tokio::test]
async fn no_call_needs_a_thread_that_is_not_there_from_the_start() {
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

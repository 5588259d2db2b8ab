//! Signals that do not end the daemon, and the system's limits on open files and threads.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use leased_proto::v1::admin_service_client::AdminServiceClient;
use leased_proto::v1::lease_service_client::LeaseServiceClient;
use leased_proto::v1::{AcquireRequest, GetRequest, ListRequest, RevokeRequest};
use rstest::rstest;
use rustix::process::{Pid, Resource, Signal, geteuid, getrlimit, kill_process};
use tokio::task::JoinSet;
use tonic::transport::Channel;

use crate::support::{Running, daemon, eventually};

/// The id of a user that does not exist.
const NOBODY: u32 = 54_321;

async fn acquire(client: &mut LeaseServiceClient<Channel>, key: &str) {
    let request = AcquireRequest { key: key.to_owned(), ..AcquireRequest::default() };
    client.acquire(request).await.unwrap();
}

fn pid(running: &Running) -> Pid {
    Pid::from_raw(running.child.id().try_into().unwrap()).unwrap()
}

#[tokio::test]
async fn signals_such_as_hup_usr1_and_xcpu_do_not_end_the_daemon() {
    let mut running = Running::start(&[]);
    let mut client = running.client().await;
    for signal in [
        Signal::HUP,
        Signal::USR1,
        Signal::USR2,
        Signal::ALARM,
        Signal::VTALARM,
        Signal::PROF,
        Signal::IO,
        Signal::XCPU,
        Signal::XFSZ,
    ] {
        kill_process(pid(&running), signal).unwrap();
        acquire(&mut client, &format!("after {signal:?}")).await;
    }
    assert!(running.child.try_wait().unwrap().is_none());
}

/// Returns the daemon's command, run by a shell that first sets `limits`.
fn limited(folder: &Path, limits: &str, options: &[&str]) -> Command {
    let plain = daemon(options);
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!(r#"{limits}; exec "$@""#), "sh"]);
    shell.arg(plain.get_program()).args(plain.get_args()).env_remove("LEASED_MONGODB_URI");
    shell.current_dir(folder).stdout(Stdio::piped()).stderr(Stdio::piped());
    shell
}

#[test]
fn the_limit_on_open_files_is_raised_and_a_low_one_is_reported() {
    let folder = tempfile::tempdir().unwrap();
    let running = Running::spawn(limited(folder.path(), "ulimit -S -n 200", &[])).ready();
    assert_eq!(running.metric("process_max_fds"), getrlimit(Resource::Nofile).maximum.unwrap() as f64);
    running.kill();

    let mut running = Running::spawn(limited(folder.path(), "ulimit -n 200", &["--max-connections=300"]));
    let mut line = String::new();
    BufReader::new(running.child.stderr.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains("--max-connections 300 cannot be reached"), "{line}");
}

/// Makes a command run as an ordinary user. The limit on processes counts all processes of a user,
/// and does not bind root.
fn as_ordinary_user(command: &mut Command) -> &mut Command {
    if geteuid().is_root() { command.uid(NOBODY).gid(NOBODY) } else { command }
}

/// Limits the number of threads of the daemon's user, or sets the original limit again.
fn limit_threads(running: &Running, count: Option<u64>) {
    let count = count
        .or(getrlimit(Resource::Nproc).current)
        .map_or("unlimited".to_owned(), |count| count.to_string());
    // In a container, not even root may change the limits of another user's process.
    let mut prlimit = Command::new("prlimit");
    prlimit.args([format!("--pid={}", running.child.id()), format!("--nproc={count}:")]);
    assert!(as_ordinary_user(&mut prlimit).status().unwrap().success());
}

fn threads(running: &Running) -> usize {
    fs::read_dir(format!("/proc/{}/task", running.child.id())).unwrap().count()
}

/// Makes enough calls at the same time for the MongoDB driver to open more connections, and so to
/// resolve host names again.
async fn make_many_calls(running: &Running, name: &str) {
    let mut calls = JoinSet::new();
    for number in 0..40 {
        let (mut client, key) = (running.client().await, format!("{name}/{number}"));
        let mut admin =
            AdminServiceClient::connect(format!("http://{}", running.field("grpc="))).await.unwrap();
        calls.spawn(async move {
            acquire(&mut client, &key).await;
            client.get(GetRequest { key: key.clone() }).await.unwrap();
            client.list(ListRequest::default()).await.unwrap();
            admin.revoke(RevokeRequest { key, ..RevokeRequest::default() }).await.unwrap();
        });
    }
    calls.join_all().await;
}

#[rstest]
#[tokio::test]
async fn calls_are_served_while_no_new_thread_can_be_started(#[values("embedded", "mongodb")] store: &str) {
    let folder = tempfile::tempdir().unwrap();
    let uri = throwaway_mongodb::shared().await.unwrap();
    // A host name, unlike an address, has to be resolved for each connection.
    let uri = format!("{}&directConnection=true", uri.replace("127.0.0.1", "localhost"));
    let options = ["--mongodb-uri", &uri, "--mongodb-database=process-threads"];
    let mut command = daemon(if store == "mongodb" { &options } else { &[] });
    command.current_dir(folder.path()).stderr(Stdio::null());
    if geteuid().is_root() {
        chown(folder.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    }
    as_ordinary_user(&mut command);
    let mut running = Running::spawn(command).ready();
    let before = threads(&running);
    assert!(before > 16, "{before} threads: those for blocking work must exist from the start");
    limit_threads(&running, Some(1));
    make_many_calls(&running, "without").await;
    eventually(async || running.is_ready().then_some(())).await;
    limit_threads(&running, None);
    make_many_calls(&running, "with").await;
    running.signal("TERM");
    assert_eq!(running.code(), Some(0));
}

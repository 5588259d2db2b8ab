//! Standard error and standard output that nobody reads. The daemon keeps serving, and ends with
//! exit code 0.

use std::fs::File;
use std::io::{PipeReader, PipeWriter, Write, pipe};
use std::net::{SocketAddr, TcpListener};
use std::process::{Command, Stdio};

use leased_proto::v1::lease_service_client::LeaseServiceClient;
use leased_proto::v1::{AcquireRequest, ReleaseRequest};
use rstest::rstest;
use tonic::transport::Channel;

use crate::support::{Running, daemon, eventually};

/// The capacity of a pipe in bytes.
const PIPE: usize = 64 * 1024;

type Leases = LeaseServiceClient<Channel>;

/// Acquires and releases a lease.
async fn pair(client: &mut Leases) {
    let request = AcquireRequest { key: "job".to_owned(), ..AcquireRequest::default() };
    let granted = client.acquire(request).await.unwrap().into_inner();
    client.release(ReleaseRequest { lease: granted.lease }).await.unwrap();
}

/// Returns a pipe that is full, so that a write to it blocks.
fn full_pipe() -> (PipeReader, PipeWriter) {
    let (reader, mut writer) = pipe().unwrap();
    writer.write_all(&[b'\n'; PIPE]).unwrap();
    (reader, writer)
}

fn full_disk() -> File {
    File::options().write(true).open("/dev/full").unwrap()
}

#[rstest]
#[tokio::test]
async fn log_lines_that_nobody_reads_are_dropped_and_calls_are_served(
    #[values("closed", "broken", "full pipe", "full disk")] stderr: &str,
) {
    let folder = tempfile::tempdir().unwrap();
    // At this level the daemon logs dozens of lines for each call.
    let mut command = daemon(&["--log-level=trace", "--log-format=json"]);
    let mut reader = None;
    match stderr {
        "closed" => {
            let mut closing = Command::new("sh");
            closing.args(["-c", r#"exec "$@" 2>&-"#, "sh"]).arg(command.get_program());
            closing.args(command.get_args()).env_remove("LEASED_MONGODB_URI").stdout(Stdio::piped());
            command = closing;
        }
        "broken" => drop(command.stderr(pipe().unwrap().1)),
        "full pipe" => {
            let (unread, writer) = full_pipe();
            reader = Some(unread);
            command.stderr(writer);
        }
        _ => drop(command.stderr(full_disk())),
    }
    command.current_dir(folder.path());
    let mut running = Running::spawn(command).ready();
    let mut client = running.client().await;
    let mut pairs = 0;
    // A closed descriptor drops no lines, since Rust's runtime replaces it with `/dev/null`.
    while pairs < 50 || (stderr != "closed" && running.metric("leased_log_lines_dropped_total") == 0.0) {
        pair(&mut client).await;
        pairs += 1;
    }
    for _ in 0..50 {
        pair(&mut client).await;
    }
    running.signal("TERM");
    assert_eq!(running.code(), Some(0));
    drop(reader);
}

#[rstest]
#[tokio::test]
async fn a_ready_line_that_nobody_reads_does_not_stop_the_daemon(
    #[values("broken", "full pipe", "full disk")] stdout: &str,
) {
    let folder = tempfile::tempdir().unwrap();
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let address: SocketAddr = free.local_addr().unwrap();
    drop(free);
    let mut command = daemon(&["--listen", &address.to_string()]);
    let mut reader = None;
    match stdout {
        "broken" => drop(command.stdout(pipe().unwrap().1)),
        "full pipe" => {
            let (unread, writer) = full_pipe();
            reader = Some(unread);
            command.stderr(writer.try_clone().unwrap()).stdout(writer);
        }
        _ => drop(command.stdout(full_disk())),
    }
    let mut running = Running::silent(command.current_dir(folder.path()));
    let url = format!("http://{address}");
    let mut client = eventually(async || LeaseServiceClient::connect(url.clone()).await.ok()).await;
    pair(&mut client).await;
    running.signal("TERM");
    assert_eq!(running.code(), Some(0));
    drop(reader);
}

//! The server lives exactly as long as it should.

#![expect(clippy::unwrap_used, reason = "a test that meets an unexpected failure should stop there")]
#![expect(
    clippy::disallowed_methods,
    reason = "processes are watched from a plain thread, by the host's clock"
)]

use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use throwaway_mongodb::Mongod;

/// Waits until nothing listens at the URI's port.
fn gone(uri: &str) {
    let address = uri.trim_start_matches("mongodb://").split('/').next().unwrap();
    let start = Instant::now();
    while TcpStream::connect(address).is_ok() {
        assert!(start.elapsed() < Duration::from_secs(30), "{address} is still served");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn binary() -> Command {
    Command::new(env!("CARGO_BIN_EXE_throwaway-mongodb"))
}

#[tokio::test]
async fn a_dropped_server_ends_also_when_it_is_paused() {
    let mongod = Mongod::start().await.unwrap();
    let uri = mongod.uri().to_owned();
    mongod.pause().unwrap();
    drop(mongod);
    gone(&uri);
}

#[tokio::test]
async fn a_killed_server_can_be_restarted_on_its_port() {
    let mut mongod = Mongod::start().await.unwrap();
    let uri = mongod.uri().to_owned();
    mongod.kill().unwrap();
    gone(&uri);
    mongod.restart().await.unwrap();
    assert_eq!(mongod.uri(), uri);
}

#[test]
fn a_server_ends_with_its_parent_even_if_that_is_killed() {
    let mut parent = binary().stdout(Stdio::piped()).spawn().unwrap();
    let mut uri = String::new();
    BufReader::new(parent.stdout.take().unwrap()).read_line(&mut uri).unwrap();
    parent.kill().unwrap();
    parent.wait().unwrap();
    gone(uri.trim());
}

#[test]
fn a_command_gets_the_uri_and_its_exit_code_is_passed_on() {
    let script = r#"case "$LEASED_MONGODB_URI" in mongodb://127.0.0.1:*) exit 7;; *) exit 1;; esac"#;
    let status = binary().args(["--", "sh", "-c", script]).status().unwrap();
    assert_eq!(status.code(), Some(7));
    assert_eq!(binary().arg("--nonsense").output().unwrap().status.code(), Some(2));
}

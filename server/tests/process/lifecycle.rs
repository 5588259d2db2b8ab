//! The ready line, the exit codes, and the signals that drain or end the daemon.

use std::io::{BufRead, BufReader, Read};
use std::net::{TcpListener, TcpStream};
use std::process::Stdio;

use rstest::rstest;
use throwaway_mongodb::Mongod;
use tonic::transport::Channel;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;

use crate::support::{Running, daemon, run_to_end};

async fn uri() -> &'static str {
    throwaway_mongodb::shared().await.unwrap()
}

#[rstest]
#[tokio::test]
async fn the_ready_line_names_the_ports_and_a_signal_drains_the_daemon(
    #[values("embedded", "mongodb")] store: &str,
    #[values("TERM", "INT", "QUIT")] signal: &str,
) {
    let options = ["--mongodb-uri", uri().await, "--mongodb-database", "process"];
    let mut running = Running::start(if store == "mongodb" { &options } else { &[] });
    assert!(running.ready.starts_with("leased ready grpc=127.0.0.1:"), "{}", running.ready);
    assert!(running.ready.contains(&format!(" store={store} id=")), "{}", running.ready);
    assert_eq!(running.field("id=").len(), 36, "{}", running.ready);
    let answer = running.http("/livez");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    TcpStream::connect(running.field("grpc=")).unwrap();
    running.signal(signal);
    assert_eq!(running.code(), Some(0));
    let mut rest = String::new();
    running.stdout.as_mut().unwrap().read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "", "standard output has more than one line");
}

#[tokio::test]
async fn a_second_signal_ends_the_daemon_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = daemon(&["--drain-timeout=5m"]);
    command.current_dir(folder.path());
    let mut running = Running::spawn(command).ready();
    // An open stream keeps the drain from ending before the second signal.
    let url = format!("http://{}", running.field("grpc="));
    let channel = Channel::from_shared(url).unwrap().connect().await.unwrap();
    let mut client = ServerReflectionClient::new(channel);
    let _open = client.server_reflection_info(tokio_stream::pending()).await.unwrap();
    running.signal("TERM");
    let mut stderr = BufReader::new(running.child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("draining") {
        line.clear();
        assert!(stderr.read_line(&mut line).unwrap() > 0, "the daemon ended before it drained");
    }
    running.signal("TERM");
    assert_eq!(running.code(), Some(1));
}

#[test]
fn wrong_usage_ends_with_exit_code_2_and_names_the_option() {
    for (options, named) in [
        (&["--nonsense"][..], "--nonsense"),
        (&["--default-ttl=soon"], "--default-ttl"),
        (&["--default-ttl=1ms"], "--min-ttl"),
        (&["--purge-after=1s"], "--purge-after"),
        (&["--listen=0.0.0.0:0"], "--insecure"),
        (&["--log-level=a=b=c"], "--log-level"),
        (&["--mongodb-uri=nonsense"], "URI"),
    ] {
        let (code, stderr) = run_to_end(options);
        assert_eq!(code, Some(2), "{options:?}: {stderr}");
        assert!(stderr.contains(named) && !stderr.contains("panicked"), "{options:?}: {stderr}");
    }
}

#[tokio::test]
async fn an_unusable_store_ends_with_exit_code_2_and_advice() {
    let standalone = Mongod::standalone().await.unwrap();
    let (code, stderr) = run_to_end(&["--mongodb-uri", standalone.uri()]);
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("--replSet"), "{stderr}");
}

#[test]
fn a_port_in_use_ends_with_exit_code_2_and_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (code, stderr) = run_to_end(&["--listen", &address]);
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains(&address), "{stderr}");
}

#[test]
fn connecting_to_an_unreachable_store_is_retried_until_the_store_timeout() {
    let (code, stderr) = run_to_end(&[
        "--mongodb-uri=mongodb://user:secret@127.0.0.1:1/?replicaSet=rs0",
        "--store-timeout=4s",
    ]);
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains("trying again"), "{stderr}");
    assert!(!stderr.contains("secret"), "a password in the log: {stderr}");
}

#[test]
fn a_signal_ends_a_daemon_that_waits_for_its_store() {
    let mut running = Running::spawn(daemon(&["--mongodb-uri=mongodb://127.0.0.1:1/?replicaSet=rs0"]));
    let mut stderr = BufReader::new(running.child.stderr.take().unwrap());
    let mut line = String::new();
    stderr.read_line(&mut line).unwrap();
    assert!(line.contains("trying again"), "{line}");
    running.signal("TERM");
    assert_eq!(running.code(), Some(0));
}

#[test]
fn help_shows_defaults_and_environment_variables_and_no_secret() {
    let mut command = daemon(&["--help"]);
    let output = command.env("LEASED_MONGODB_URI", "mongodb://user:secret@db/").output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    let help = String::from_utf8(output.stdout).unwrap();
    for shown in
        ["127.0.0.1:5327", "LEASED_LISTEN", "--mongodb-uri", "30s", "--drain-timeout", "LEASED_PURGE_AFTER"]
    {
        assert!(help.contains(shown), "{shown}: {help}");
    }
    assert!(!help.contains("secret"));
}

/// Compose files and unit files often set a variable to nothing.
#[test]
fn an_empty_variable_counts_as_unset() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = daemon(&[]);
    command.env("LEASED_MONGODB_URI", "").env("LEASED_GRACE", "").env("LEASED_INSECURE", "0");
    command.current_dir(folder.path()).stderr(Stdio::null());
    let running = Running::spawn(command).ready();
    assert!(running.ready.contains(" store=embedded "), "{}", running.ready);
}

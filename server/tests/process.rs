//! The daemon as a process: its ready line, its exit codes, its signals.

#![expect(clippy::unwrap_used, reason = "a test that meets an unexpected failure should stop there")]
#![expect(
    clippy::disallowed_methods,
    reason = "processes are watched from a plain thread, by the host's clock"
)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use throwaway_mongodb::Mongod;

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(30);

fn daemon(options: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_leased"));
    // The last value of an option counts.
    command.args(["--listen=127.0.0.1:0", "--http-listen=127.0.0.1:0"]).args(options);
    command
        .env_remove("LEASED_MONGODB_URI")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// A daemon that is ready, and ends with the test.
struct Running {
    child: Child,
    stdout: BufReader<std::process::ChildStdout>,
    ready: String,
}

impl Running {
    fn start(options: &[&str]) -> Self {
        let mut child = daemon(options).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut ready = String::new();
        stdout.read_line(&mut ready).unwrap();
        Self { child, stdout, ready }
    }

    fn signal(&self, name: &str) {
        assert!(
            Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status().unwrap().success()
        );
    }

    /// The exit code, once it has ended.
    fn code(&mut self) -> Option<i32> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(start.elapsed() < PATIENCE, "it does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn address(&self, name: &str) -> &str {
        self.ready.split_whitespace().find_map(|word| word.strip_prefix(name)).unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Runs to the end, which must come by itself.
fn end(options: &[&str]) -> (Option<i32>, String) {
    let Output { status, stderr, .. } = daemon(options).output().unwrap();
    (status.code(), String::from_utf8(stderr).unwrap())
}

async fn uri() -> &'static str {
    throwaway_mongodb::shared().await.unwrap()
}

#[tokio::test]
async fn the_ready_line_names_the_ports_and_sigterm_drains() {
    for signal in ["TERM", "INT"] {
        let mut running = Running::start(&["--mongodb-uri", uri().await, "--mongodb-database", "process"]);
        assert!(running.ready.starts_with("leased ready grpc=127.0.0.1:"), "{}", running.ready);
        assert!(running.ready.ends_with(" store=mongodb\n"), "{}", running.ready);
        let mut http = TcpStream::connect(running.address("http=")).unwrap();
        http.write_all(b"GET /livez HTTP/1.1\r\nHost: l\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        http.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        TcpStream::connect(running.address("grpc=")).unwrap();
        running.signal(signal);
        assert_eq!(running.code(), Some(0));
        let mut rest = String::new();
        running.stdout.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "", "one line on standard output and no more");
    }
}

#[tokio::test]
async fn a_second_signal_ends_at_once() {
    let mut running = Running::start(&[
        "--mongodb-uri",
        uri().await,
        "--mongodb-database",
        "process",
        "--drain-timeout=5m",
    ]);
    // A peer that never speaks keeps the drain from ending by itself.
    let _silent = TcpStream::connect(running.address("grpc=")).unwrap();
    running.signal("TERM");
    let mut stderr = BufReader::new(running.child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("draining") {
        line.clear();
        assert!(stderr.read_line(&mut line).unwrap() > 0, "it ended before it drained");
    }
    running.signal("TERM");
    assert_eq!(running.code(), Some(1));
}

#[test]
fn wrong_usage_is_exit_code_2_and_a_sentence() {
    for (options, named) in [
        (&["--nonsense"][..], "--nonsense"),
        (&["--default-ttl=soon"], "--default-ttl"),
        (&["--default-ttl=1ms", "--mongodb-uri=mongodb://127.0.0.1"], "--min-ttl"),
        (&["--purge-after=1s", "--mongodb-uri=mongodb://127.0.0.1"], "--purge-after"),
        (&["--listen=0.0.0.0:0", "--mongodb-uri=mongodb://127.0.0.1"], "--insecure"),
        (&["--log-level=a=b=c", "--mongodb-uri=mongodb://127.0.0.1"], "--log-level"),
        (&["--mongodb-uri=nonsense"], "URI"),
        (&[], "--mongodb-uri"),
    ] {
        let (code, stderr) = end(options);
        assert_eq!(code, Some(2), "{options:?}: {stderr}");
        assert!(stderr.contains(named) && !stderr.contains("panicked"), "{options:?}: {stderr}");
    }
}

#[tokio::test]
async fn an_unusable_store_is_exit_code_2_and_says_what_to_do() {
    let standalone = Mongod::standalone().await.unwrap();
    let (code, stderr) = end(&["--mongodb-uri", standalone.uri()]);
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("--replSet"), "{stderr}");

    let (code, stderr) = end(&["--mongodb-uri", &format!("{}&w=1", uri().await)]);
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("w=majority"), "{stderr}");
}

#[tokio::test]
async fn a_port_that_is_taken_is_exit_code_2() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (code, stderr) = end(&["--listen", &address, "--mongodb-uri", uri().await]);
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains(&address), "{stderr}");
}

#[test]
fn a_store_that_cannot_be_reached_is_tried_for_as_long_as_asked() {
    let (code, stderr) =
        end(&["--mongodb-uri=mongodb://user:secret@127.0.0.1:1/?replicaSet=rs0", "--store-timeout=4s"]);
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains("trying again"), "{stderr}");
    assert!(!stderr.contains("secret"), "a password in the log: {stderr}");
}

#[test]
fn a_daemon_that_waits_for_its_store_can_be_stopped() {
    let mut child = daemon(&["--mongodb-uri=mongodb://127.0.0.1:1/?replicaSet=rs0"]).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    stderr.read_line(&mut line).unwrap();
    assert!(line.contains("trying again"), "{line}");
    let stdout = BufReader::new(child.stdout.take().unwrap());
    let mut running = Running { child, stdout, ready: String::new() };
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

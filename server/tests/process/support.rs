//! Daemons as processes, and calls to them.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

use leased_proto::v1::lease_service_client::LeaseServiceClient;
use tempfile::TempDir;
use tonic::transport::Channel;

/// How long a test waits for a condition before it fails. Far longer than any condition takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Returns the daemon's command with these options, in the current folder.
pub(crate) fn daemon(options: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_leased"));
    // The last value of an option counts, so `options` can replace these.
    command.args(["--listen=127.0.0.1:0", "--http-listen=127.0.0.1:0"]).args(options);
    command.env_remove("LEASED_MONGODB_URI");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A daemon that is killed when this value is dropped.
pub(crate) struct Running {
    pub(crate) child: Child,
    pub(crate) stdout: Option<BufReader<ChildStdout>>,
    pub(crate) ready: String,
    _folder: Option<TempDir>,
}

impl Running {
    /// Starts a daemon in an empty folder, and waits until it is ready.
    pub(crate) fn start(options: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut running = Self::start_in(folder.path(), options);
        running._folder = Some(folder);
        running
    }

    /// Starts a daemon in this folder, and waits until it is ready.
    pub(crate) fn start_in(folder: &Path, options: &[&str]) -> Self {
        let mut command = daemon(options);
        // A pipe that nobody reads would fill up.
        command.current_dir(folder).stderr(Stdio::null());
        Self::spawn(command).ready()
    }

    /// Starts a daemon, and does not wait for its ready line.
    pub(crate) fn spawn(mut command: Command) -> Self {
        let mut running = Self::silent(&mut command);
        running.stdout = running.child.stdout.take().map(BufReader::new);
        running
    }

    /// Starts a daemon whose standard output this process does not read.
    pub(crate) fn silent(command: &mut Command) -> Self {
        let child = command.spawn().unwrap();
        Self { child, stdout: None, ready: String::new(), _folder: None }
    }

    /// Waits for the ready line.
    pub(crate) fn ready(mut self) -> Self {
        self.stdout.as_mut().unwrap().read_line(&mut self.ready).unwrap();
        self
    }

    pub(crate) fn signal(&self, name: &str) {
        let sent = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    /// Kills the process.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for the end of the process, and returns its exit code.
    pub(crate) fn code(&mut self) -> Option<i32> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(start.elapsed() < PATIENCE, "the process does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Returns the value of a field of the ready line. `name` includes the `=`, as in `grpc=`.
    pub(crate) fn field(&self, name: &str) -> &str {
        self.ready.split_whitespace().find_map(|word| word.strip_prefix(name)).unwrap()
    }

    /// Sends a GET to the HTTP port, and returns the whole answer.
    pub(crate) fn http(&self, path: &str) -> String {
        let mut http = TcpStream::connect(self.field("http=")).unwrap();
        write!(http, "GET {path} HTTP/1.1\r\nHost: l\r\n\r\n").unwrap();
        let mut answer = String::new();
        http.read_to_string(&mut answer).unwrap();
        answer
    }

    /// Returns whether the daemon reports itself as ready.
    pub(crate) fn is_ready(&self) -> bool {
        self.http("/readyz").starts_with("HTTP/1.1 200")
    }

    /// Returns the value of a metric without labels.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = self.http("/metrics");
        let value = |line: &str| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok();
        text.lines().find_map(value).unwrap_or_else(|| panic!("no {name}: {text}"))
    }

    pub(crate) async fn client(&self) -> LeaseServiceClient<Channel> {
        LeaseServiceClient::connect(format!("http://{}", self.field("grpc="))).await.unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Calls `ask` again and again until it returns `Some`.
pub(crate) async fn eventually<T>(mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(start.elapsed() < PATIENCE, "it did not happen in time");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Runs a daemon that must end by itself, in an empty folder. Returns its exit code and its
/// standard error.
pub(crate) fn run_to_end(options: &[&str]) -> (Option<i32>, String) {
    run_to_end_in(tempfile::tempdir().unwrap().path(), options)
}

/// Runs a daemon as [`run_to_end`] does, in this folder.
pub(crate) fn run_to_end_in(folder: &Path, options: &[&str]) -> (Option<i32>, String) {
    let Output { status, stderr, .. } = daemon(options).current_dir(folder).output().unwrap();
    (status.code(), String::from_utf8(stderr).unwrap())
}

//! Processes, each in a folder of its own, and calls to them.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

use leased_proto::v1::lease_service_client::LeaseServiceClient;
use tempfile::TempDir;
use tonic::transport::Channel;

/// Longer than anything here takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// The daemon with these options, where the caller is.
pub(crate) fn daemon(options: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_leased"));
    // The last value of an option counts.
    command.args(["--listen=127.0.0.1:0", "--http-listen=127.0.0.1:0"]).args(options);
    command.env_remove("LEASED_MONGODB_URI");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A daemon that ends with the test.
pub(crate) struct Running {
    pub(crate) child: Child,
    pub(crate) stdout: Option<BufReader<ChildStdout>>,
    pub(crate) ready: String,
    _folder: Option<TempDir>,
}

impl Running {
    /// In an empty folder, and ready.
    pub(crate) fn start(options: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut running = Self::start_in(folder.path(), options);
        running._folder = Some(folder);
        running
    }

    /// In this folder, and ready.
    pub(crate) fn start_in(folder: &Path, options: &[&str]) -> Self {
        let mut command = daemon(options);
        // Nobody would read it.
        command.current_dir(folder).stderr(Stdio::null());
        Self::spawn(command).ready()
    }

    pub(crate) fn spawn(mut command: Command) -> Self {
        let mut running = Self::silent(&mut command);
        running.stdout = running.child.stdout.take().map(BufReader::new);
        running
    }

    /// Without a ready line.
    pub(crate) fn silent(command: &mut Command) -> Self {
        let child = command.spawn().unwrap();
        Self { child, stdout: None, ready: String::new(), _folder: None }
    }

    /// Waits for the line that says so.
    pub(crate) fn ready(mut self) -> Self {
        self.stdout.as_mut().unwrap().read_line(&mut self.ready).unwrap();
        self
    }

    pub(crate) fn signal(&self, name: &str) {
        let sent = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    /// Ends the process as a crash would.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// The exit code, once it has ended.
    pub(crate) fn code(&mut self) -> Option<i32> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(start.elapsed() < PATIENCE, "it does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn address(&self, name: &str) -> &str {
        self.ready.split_whitespace().find_map(|word| word.strip_prefix(name)).unwrap()
    }

    /// An answer of the side port.
    pub(crate) fn http(&self, path: &str) -> String {
        let mut http = TcpStream::connect(self.address("http=")).unwrap();
        write!(http, "GET {path} HTTP/1.1\r\nHost: l\r\n\r\n").unwrap();
        let mut answer = String::new();
        http.read_to_string(&mut answer).unwrap();
        answer
    }

    /// Whether it says that it should be asked.
    pub(crate) fn is_ready(&self) -> bool {
        self.http("/readyz").starts_with("HTTP/1.1 200")
    }

    /// What a metric without labels stands at.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = self.http("/metrics");
        let value = |line: &str| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok();
        text.lines().find_map(value).unwrap_or_else(|| panic!("no {name}: {text}"))
    }

    pub(crate) async fn client(&self) -> LeaseServiceClient<Channel> {
        LeaseServiceClient::connect(format!("http://{}", self.address("grpc="))).await.unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Asks again until the answer is `Some`.
pub(crate) async fn eventually<T>(mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(start.elapsed() < PATIENCE, "it does not come");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Runs to the end, which must come by itself, in an empty folder.
pub(crate) fn end(options: &[&str]) -> (Option<i32>, String) {
    end_in(tempfile::tempdir().unwrap().path(), options)
}

/// The same in this folder.
pub(crate) fn end_in(folder: &Path, options: &[&str]) -> (Option<i32>, String) {
    let Output { status, stderr, .. } = daemon(options).current_dir(folder).output().unwrap();
    (status.code(), String::from_utf8(stderr).unwrap())
}

//! The examples in other languages, each as a process, against a daemon: one key for all of them.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use leased_client::{Client, KeyState};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout};

use crate::support::tools::{self, project, succeeded};
use crate::support::{Daemon, Embedded, PATIENCE, eventually, secs};

/// In what a worker is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Language {
    Python,
    Node,
}

/// The worker of an example.
struct Worker {
    child: Child,
    output: Option<BufReader<ChildStdout>>,
}

impl Worker {
    /// One that asks for the key `shared/job`.
    async fn start(language: Language, daemon: &Daemon, options: &[&str]) -> Self {
        let (program, script) = spawn_blocking(move || match language {
            Language::Python => (python(), "examples/python/worker.py"),
            Language::Node => (tools::node("examples/node"), "examples/node/worker.mjs"),
        })
        .await
        .unwrap();
        let mut command = Command::new(program);
        command.arg(project().join(script)).arg("shared/job").args(["--endpoint", &daemon.grpc.to_string()]);
        command
            .args(["--ttl", "2", "--seconds", "600"])
            .args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let output = child.stdout.take().map(BufReader::new);
        Self { child, output }
    }

    /// What it prints next; nothing when it has ended.
    async fn line(&mut self) -> String {
        let mut output = self.output.take().unwrap();
        let read = spawn_blocking(move || {
            let mut line = String::new();
            output.read_line(&mut line).unwrap();
            (output, line.trim().to_owned())
        });
        let (output, line) = timeout(PATIENCE, read).await.expect("a line in time").unwrap();
        self.output = Some(output);
        line
    }

    /// The token that it prints once it holds the lease.
    async fn token(&mut self) -> i64 {
        let line = self.line().await;
        let token = line.strip_prefix("holding shared/job with fencing token ");
        token.unwrap_or_else(|| panic!("{line:?}")).parse().unwrap()
    }

    fn signal(&self, name: &str) {
        let sent = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    async fn code(&mut self) -> Option<i32> {
        eventually(async || self.child.try_wait().unwrap()).await.code()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A Python that has what the example needs, which has its stubs.
fn python() -> PathBuf {
    static PYTHON: OnceLock<PathBuf> = OnceLock::new();
    let made = PYTHON.get_or_init(|| {
        let python = tools::python("examples/python/requirements.txt");
        let build = project().join("examples/python/build");
        std::fs::create_dir_all(&build).unwrap();
        let mut generate = Command::new(&python);
        generate.args(["-m", "grpc_tools.protoc", "-I", "proto", "--python_out"]).arg(&build);
        generate.arg("--grpc_python_out").arg(&build).arg("leased/v1/lease.proto").current_dir(project());
        succeeded(generate.output().unwrap());
        python
    });
    made.clone()
}

async fn client(daemon: &Daemon) -> Client {
    Client::connect(daemon.urls()).await.unwrap()
}

/// What the README promises: kill any of them, and the next takes over.
#[tokio::test]
async fn workers_in_any_language_follow_each_other_on_one_key() {
    use Language::{Node, Python};
    let daemon = Daemon::start(Embedded).await;
    let client = client(&daemon).await;
    let mut last = 0;
    let mut holder = Worker::start(Python, &daemon, &[]).await;
    for next in [Node, Python, Python, Node, Node, Python] {
        let token = holder.token().await;
        assert!(token > last, "{token} comes after {last}");
        last = token;
        let mut waiter = Worker::start(next, &daemon, &[]).await;
        eventually(async || client.get("shared/job").await.ok().filter(|key| key.waiters.len() == 1)).await;
        holder.child.kill().unwrap();
        std::mem::swap(&mut holder, &mut waiter);
    }
    holder.token().await;
    // And a program in Rust after them, without waiting for a TTL: this one gives the lease back.
    let next = tokio::spawn(client.acquire("shared/job").wait(secs(60)).into_future());
    eventually(async || client.get("shared/job").await.ok().filter(|key| key.waiters.len() == 1)).await;
    holder.signal("TERM");
    assert_eq!((holder.line().await.as_str(), holder.code().await), ("released", Some(0)));
    assert!(next.await.unwrap().unwrap().token().get() > last);
}

async fn holds_and_stops(language: Language) {
    let daemon = Daemon::start(Embedded).await;
    let client = client(&daemon).await;

    // Held over several TTLs, and given back when the work is done.
    let mut worker = Worker::start(language, &daemon, &["--ttl", "1", "--seconds", "3"]).await;
    let token = worker.token().await;
    let mut refused = Worker::start(language, &daemon, &["--wait", "0"]).await;
    assert!(refused.line().await.starts_with("not granted: held by"), "someone else holds it");
    assert_eq!(refused.code().await, Some(75));
    assert_eq!((worker.line().await.as_str(), worker.code().await), ("released", Some(0)));
    let key = client.get("shared/job").await.unwrap();
    assert_eq!((key.state, key.token.get()), (KeyState::Free, token), "nobody has had it meanwhile");

    // Taken away.
    let mut worker = Worker::start(language, &daemon, &[]).await;
    worker.token().await;
    assert_eq!(client.revoke("shared/job", None, "a test").await.unwrap(), 1);
    assert_eq!((worker.line().await.as_str(), worker.code().await), ("lost: revoked", Some(73)));

    // No word from a daemon in time.
    let mut worker = Worker::start(language, &daemon, &[]).await;
    worker.token().await;
    let silent = Instant::now();
    daemon.stop().await;
    assert_eq!(worker.line().await, "lost: no word from a daemon in time");
    assert!(silent.elapsed() < secs(2), "within the TTL");
    assert_eq!(worker.code().await, Some(73));
}

#[tokio::test]
async fn a_worker_in_python_keeps_the_time_contract() {
    holds_and_stops(Language::Python).await;
}

#[tokio::test]
async fn a_worker_in_node_keeps_the_time_contract() {
    holds_and_stops(Language::Node).await;
}

#[tokio::test]
async fn the_service_config_repeats_what_found_no_daemon() {
    let tried = spawn_blocking(|| {
        let mut command = Command::new(python());
        command.args(["tests/languages/retry.py", "docs/service-config.json", "examples/python/build"]);
        succeeded(command.current_dir(project()).output().unwrap())
    });
    println!("{}", timeout(2 * PATIENCE, tried).await.expect("an end in time").unwrap());
}

/// Users of mongolock change an import: the same scenario through both, and what is meant to differ.
#[tokio::test]
async fn the_drop_in_for_mongolock_does_as_mongolock_does() {
    // As it comes: with one clock there is no grace.
    let daemon = Daemon::start_with(Embedded, |config| config.rules.grace = Duration::ZERO).await;
    let (uri, endpoint) = (throwaway_mongodb::shared().await.unwrap(), daemon.grpc.to_string());
    let compared = spawn_blocking(move || {
        let python = tools::python("tests/languages/mongolock.txt");
        let pip = [
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--force-reinstall",
        ];
        let mut install = Command::new(&python);
        install.args(pip).args(["--no-build-isolation", "./python/leased_mongolock"]).current_dir(project());
        succeeded(install.output().unwrap());
        let script = project().join("tests/languages/mongolock_comparison.py");
        succeeded(Command::new(&python).arg(script).args([uri, &endpoint]).output().unwrap())
    });
    println!("{}", timeout(2 * PATIENCE, compared).await.expect("an end in time").unwrap());
}

//! The examples in other languages, each as a process, against a daemon: one key for all of them.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::Result;
use leased_client::v1::lease_service_server::{LeaseService, LeaseServiceServer};
use leased_client::{Client, KeyState, v1};
use rstest::rstest;
use tokio::net::TcpListener;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

use crate::support::tools::{self, root, said};
use crate::support::{Daemon, Embedded, PATIENCE, eventually, secs};

/// In what a worker is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Language {
    Python,
    Node,
}

use Language::{Node, Python};

/// The worker of an example.
struct Worker {
    child: Child,
    output: Option<BufReader<ChildStdout>>,
}

impl Worker {
    /// One that asks for the key `shared/job`.
    async fn start(language: Language, daemon: &Daemon, options: &[&str]) -> Self {
        Self::start_at(language, daemon.grpc, options).await
    }

    async fn start_at(language: Language, endpoint: SocketAddr, options: &[&str]) -> Self {
        let mut command = spawn_blocking(move || language.worker().unwrap()).await.unwrap();
        command.arg("shared/job").args(["--endpoint", &endpoint.to_string()]);
        command.args(["--ttl", "2", "--seconds", "600"]).args(options);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
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

impl Language {
    /// The worker of its example, made ready as the example's page says.
    fn worker(self) -> Result<Command> {
        match self {
            Self::Python => {
                let mut python = python()?;
                python.arg(python_example()?.join("worker.py"));
                Ok(python)
            }
            Self::Node => {
                let example = tools::copy("examples/node", |folder| {
                    said(tools::npm()?.args(["ci", "--no-audit", "--no-fund"]).current_dir(folder))
                });
                let mut node = tools::node()?;
                node.arg(example?.join("worker.mjs"));
                Ok(node)
            }
        }
    }
}

/// A Python that has what the example needs.
fn python() -> Result<Command> {
    Ok(tools::python(&root().join("examples/python/requirements.txt"))?.into_std())
}

/// The example in Python with its stubs.
fn python_example() -> Result<PathBuf> {
    tools::copy("examples/python", |folder| {
        std::fs::create_dir(folder.join("build"))?;
        let generate =
            ["-m", "grpc_tools.protoc", "-I", "../../proto", "--python_out=build", "--grpc_python_out=build"];
        said(python()?.args(generate).arg("leased/v1/lease.proto").current_dir(folder))
    })
}

async fn client(daemon: &Daemon) -> Client {
    Client::connect(daemon.urls()).await.unwrap()
}

/// Waits until so many stand in line.
async fn in_line(client: &Client, count: usize) {
    let is_so = async || client.get("shared/job").await.ok().filter(|key| key.waiters.len() == count);
    eventually(is_so).await;
}

/// What the README promises: kill any of them, and the next takes over.
#[tokio::test]
async fn workers_in_any_language_follow_each_other_on_one_key() {
    let daemon = Daemon::start(Embedded).await;
    let client = client(&daemon).await;
    let mut last = 0;
    let mut holder = Worker::start(Python, &daemon, &[]).await;
    for next in [Node, Python, Python, Node, Node, Python] {
        let token = holder.token().await;
        assert!(token > last, "{token} comes after {last}");
        last = token;
        let mut waiter = Worker::start(next, &daemon, &[]).await;
        in_line(&client, 1).await;
        holder.child.kill().unwrap();
        std::mem::swap(&mut holder, &mut waiter);
    }
    holder.token().await;
    // And a program in Rust after them, without waiting for a TTL: this one gives the lease back.
    let next = tokio::spawn(client.acquire("shared/job").wait(secs(60)).into_future());
    in_line(&client, 1).await;
    holder.signal("TERM");
    assert_eq!((holder.line().await.as_str(), holder.code().await), ("released", Some(0)));
    assert!(next.await.unwrap().unwrap().token().get() > last);
}

#[rstest]
#[tokio::test]
async fn a_worker_keeps_the_time_contract(#[values(Python, Node)] language: Language) {
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

#[rstest]
#[tokio::test]
async fn a_signal_makes_a_worker_leave_the_line(#[values(Python, Node)] language: Language) {
    let daemon = Daemon::start(Embedded).await;
    let client = client(&daemon).await;
    let _lease = client.acquire("shared/job").await.unwrap();
    let mut worker = Worker::start(language, &daemon, &[]).await;
    in_line(&client, 1).await;
    worker.signal("TERM");
    assert_eq!(worker.code().await, Some(0));
    in_line(&client, 0).await;
}

#[rstest]
#[tokio::test]
async fn a_worker_that_finds_no_daemon_says_where(#[values(Python, Node)] language: Language) {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut worker = Worker::start_at(language, closed, &[]).await;
    assert_eq!(worker.line().await, format!("failed: no daemon answers at {closed}"));
    assert_eq!(worker.code().await, Some(69));
}

#[rstest]
#[tokio::test]
async fn a_worker_takes_the_url_that_leasectl_takes(#[values(Python, Node)] language: Language) {
    let daemon = Daemon::start(Embedded).await;
    let url = format!("http://{}/", daemon.grpc);
    Worker::start(language, &daemon, &["--endpoint", &url]).await.token().await;
}

/// A daemon that answers no acquire, and tells of each call how often it was sent before.
struct Silent(UnboundedSender<(&'static str, Option<String>)>);

impl Silent {
    fn note<T>(&self, call: &'static str, request: &Request<T>) {
        let before = request.metadata().get("grpc-previous-rpc-attempts");
        self.0.send((call, before.map(|before| before.to_str().unwrap().to_owned()))).unwrap();
    }
}

type Answer<T> = std::result::Result<Response<T>, Status>;

#[tonic::async_trait]
impl LeaseService for Silent {
    type KeepAliveStream = ReceiverStream<std::result::Result<v1::KeepAliveResponse, Status>>;
    type WatchStream = ReceiverStream<std::result::Result<v1::WatchResponse, Status>>;

    async fn acquire(&self, request: Request<v1::AcquireRequest>) -> Answer<v1::AcquireResponse> {
        self.note("acquire", &request);
        std::future::pending().await
    }

    async fn release(&self, request: Request<v1::ReleaseRequest>) -> Answer<v1::ReleaseResponse> {
        self.note("release", &request);
        Ok(Response::new(v1::ReleaseResponse {}))
    }

    async fn touch(&self, _: Request<v1::TouchRequest>) -> Answer<v1::TouchResponse> {
        Err(Status::unimplemented(""))
    }

    async fn keep_alive(&self, _: Request<Streaming<v1::KeepAliveRequest>>) -> Answer<Self::KeepAliveStream> {
        Err(Status::unimplemented(""))
    }

    async fn get(&self, _: Request<v1::GetRequest>) -> Answer<v1::GetResponse> {
        Err(Status::unimplemented(""))
    }

    async fn list(&self, _: Request<v1::ListRequest>) -> Answer<v1::ListResponse> {
        Err(Status::unimplemented(""))
    }

    async fn watch(&self, _: Request<v1::WatchRequest>) -> Answer<Self::WatchStream> {
        Err(Status::unimplemented(""))
    }
}

#[rstest]
#[tokio::test]
async fn a_worker_says_with_its_release_that_the_acquire_had_no_answer(
    #[values(Python, Node)] language: Language,
) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, (calls, mut noted)) = (listener.local_addr().unwrap(), unbounded_channel());
    let server = Server::builder().add_service(LeaseServiceServer::new(Silent(calls)));
    let served = server.serve_with_incoming(TcpListenerStream::new(listener));
    let _served = AbortOnDropHandle::new(tokio::spawn(served));
    let mut worker = Worker::start_at(language, address, &[]).await;
    let mut next = async || timeout(PATIENCE, noted.recv()).await.expect("a call in time").unwrap();
    assert_eq!(next().await, ("acquire", None));
    worker.signal("TERM");
    assert_eq!(next().await, ("release", Some("1".to_owned())));
    assert_eq!((worker.line().await.as_str(), worker.code().await), ("released", Some(0)));
}

/// The grant waits in the socket of a worker that is paused, until it is over.
#[rstest]
#[tokio::test]
async fn a_grant_that_comes_late_is_not_believed(#[values(Python, Node)] language: Language) {
    let daemon = Daemon::start(Embedded).await;
    let client = client(&daemon).await;
    let lease = client.acquire("shared/job").await.unwrap();
    let mut late = Worker::start(language, &daemon, &[]).await;
    in_line(&client, 1).await;
    late.signal("STOP");
    lease.release().await.unwrap();
    // Displaces the worker, as soon as its time is over.
    let _next = client.acquire("shared/job").wait(secs(60)).await.unwrap();
    late.signal("CONT");
    assert!(late.line().await.starts_with("lost: "));
    assert_eq!(late.code().await, Some(73));
}

#[rstest]
#[tokio::test]
async fn a_worker_keeps_its_lease_while_its_daemon_is_started_anew(
    #[values(Python, Node)] language: Language,
) {
    let daemon = Daemon::start(Embedded).await;
    // At the same address.
    let address = daemon.grpc;
    let mut worker = Worker::start(language, &daemon, &["--ttl", "15"]).await;
    let token = worker.token().await;
    let daemon = daemon.restart_at(address).await;
    let client = client(&daemon).await;
    let before = client.get("shared/job").await.unwrap().holders[0].expires_at;
    let is_touched = async || {
        let key = client.get("shared/job").await.ok()?;
        key.holders.first().filter(|holder| holder.expires_at > before).map(|holder| holder.token.get())
    };
    assert_eq!(eventually(is_touched).await, token);
    worker.signal("INT");
    assert_eq!((worker.line().await.as_str(), worker.code().await), ("released", Some(0)));
}

#[tokio::test]
async fn the_service_config_repeats_what_found_no_daemon() {
    let tried = spawn_blocking(|| {
        let stubs = python_example()?.join("build");
        let mut retry = python()?;
        retry.args(["tests/languages/retry.py", "docs/service-config.json"]).arg(stubs);
        said(retry.current_dir(root()))
    });
    println!("{}", tried.await.unwrap().unwrap());
}

/// Users of mongolock change an import: the same scenario through both, and what is meant to differ.
#[tokio::test]
async fn the_drop_in_for_mongolock_does_as_mongolock_does() {
    // As it comes: with one clock there is no grace.
    let daemon = Daemon::start_with(Embedded, |config| config.rules.grace = Duration::ZERO).await;
    let (uri, endpoint) = (throwaway_mongodb::shared().await.unwrap(), daemon.grpc.to_string());
    let compared = spawn_blocking(move || {
        let python = || anyhow::Ok(tools::python(&root().join("tests/languages/mongolock.txt"))?.into_std());
        let drop_in = tools::copy("python/leased_mongolock", |folder| {
            let install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"];
            let install = install.into_iter().chain(["--no-build-isolation", "--target", "installed", "."]);
            said(python()?.args(install).current_dir(folder))
        });
        let mut compare = python()?;
        let packages = compare.get_envs().find_map(|(name, value)| value.filter(|_| name == "PYTHONPATH"));
        let paths = [drop_in?.join("installed").into(), packages.unwrap_or_default().to_owned()];
        compare.env("PYTHONPATH", std::env::join_paths(paths)?);
        said(compare.arg(root().join("tests/languages/mongolock_comparison.py")).args([uri, &endpoint]))
    });
    println!("{}", compared.await.unwrap().unwrap());
}

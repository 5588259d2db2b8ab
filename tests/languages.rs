//! The example workers in other languages. Each runs as a process against a daemon, and all of them
//! acquire the same key.

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

use crate::support::tools::{self, output_of, root};
use crate::support::{Daemon, Embedded, PATIENCE, eventually, secs};

/// The language of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Language {
    Python,
    Node,
}

use Language::{Node, Python};

/// A worker as a process, which is killed when this value is dropped.
struct Worker {
    child: Child,
    output: Option<BufReader<ChildStdout>>,
}

impl Worker {
    /// Starts a worker that acquires the key `shared/job`.
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

    /// Returns the next line that the worker prints, or an empty string if it has ended.
    async fn line(&mut self) -> String {
        let mut output = self.output.take().unwrap();
        let read = spawn_blocking(move || {
            let mut line = String::new();
            output.read_line(&mut line).unwrap();
            (output, line.trim().to_owned())
        });
        let (output, line) = timeout(PATIENCE, read).await.expect("no line in time").unwrap();
        self.output = Some(output);
        line
    }

    /// Waits until the worker prints that it holds the lease, and returns the fencing token.
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
    /// Returns the command of the example worker, installed as the example's page says.
    fn worker(self) -> Result<Command> {
        match self {
            Self::Python => {
                let mut python = python()?;
                python.arg(python_example()?.join("worker.py"));
                Ok(python)
            }
            Self::Node => {
                let example = tools::copy("examples/node", |folder| {
                    output_of(tools::npm()?.args(["ci", "--no-audit", "--no-fund"]).current_dir(folder))
                });
                let mut node = tools::node()?;
                node.arg(example?.join("worker.mjs"));
                Ok(node)
            }
        }
    }
}

/// Returns a Python command with the packages that the example needs.
fn python() -> Result<Command> {
    Ok(tools::python(&root().join("examples/python/requirements.txt"))?.into_std())
}

/// Returns the folder of the Python example, with the generated stubs.
fn python_example() -> Result<PathBuf> {
    tools::copy("examples/python", |folder| {
        std::fs::create_dir(folder.join("build"))?;
        let generate =
            ["-m", "grpc_tools.protoc", "-I", "../../proto", "--python_out=build", "--grpc_python_out=build"];
        output_of(python()?.args(generate).arg("leased/v1/lease.proto").current_dir(folder))
    })
}

async fn client(daemon: &Daemon) -> Client {
    Client::connect(daemon.urls()).await.unwrap()
}

/// Waits until the key has exactly `waiters` waiters.
async fn until_queued(client: &Client, waiters: usize) {
    let queued = async || client.get("shared/job").await.ok().filter(|key| key.waiters.len() == waiters);
    eventually(queued).await;
}

/// The README promises this: kill the worker that holds the lease, and the next one takes over.
#[tokio::test]
async fn workers_in_any_language_take_over_one_key_from_each_other() {
    let daemon = Daemon::start(Embedded).await;
    let client = client(&daemon).await;
    let mut last = 0;
    let mut holder = Worker::start(Python, &daemon, &[]).await;
    for next in [Node, Python, Python, Node, Node, Python] {
        let token = holder.token().await;
        assert!(token > last, "the token {token} follows {last}");
        last = token;
        let mut waiter = Worker::start(next, &daemon, &[]).await;
        until_queued(&client, 1).await;
        holder.child.kill().unwrap();
        std::mem::swap(&mut holder, &mut waiter);
    }
    holder.token().await;
    // A program in Rust comes last. It does not wait for the TTL, since the worker before it
    // releases.
    let next = tokio::spawn(client.acquire("shared/job").wait(secs(60)).into_future());
    until_queued(&client, 1).await;
    holder.signal("TERM");
    assert_eq!((holder.line().await.as_str(), holder.code().await), ("released", Some(0)));
    assert!(next.await.unwrap().unwrap().token().get() > last);
}

#[rstest]
#[tokio::test]
async fn a_worker_keeps_the_time_contract(#[values(Python, Node)] language: Language) {
    let daemon = Daemon::start(Embedded).await;
    let client = client(&daemon).await;

    // The worker holds the lease for several TTLs, and releases it when its work is done.
    let mut worker = Worker::start(language, &daemon, &["--ttl", "1", "--seconds", "3"]).await;
    let token = worker.token().await;
    let mut refused = Worker::start(language, &daemon, &["--wait", "0"]).await;
    assert!(refused.line().await.starts_with("not granted: held by"), "another worker holds the lease");
    assert_eq!(refused.code().await, Some(75));
    assert_eq!((worker.line().await.as_str(), worker.code().await), ("released", Some(0)));
    let key = client.get("shared/job").await.unwrap();
    assert_eq!(
        (key.state, key.token.get()),
        (KeyState::Free, token),
        "nobody else was granted the key meanwhile"
    );

    // The lease is revoked.
    let mut worker = Worker::start(language, &daemon, &[]).await;
    worker.token().await;
    assert_eq!(client.revoke("shared/job", None, "a test").await.unwrap(), 1);
    assert_eq!((worker.line().await.as_str(), worker.code().await), ("lost: revoked", Some(73)));

    // The daemon stops answering.
    let mut worker = Worker::start(language, &daemon, &[]).await;
    worker.token().await;
    let silent = Instant::now();
    daemon.stop().await;
    assert_eq!(worker.line().await, "lost: no answer from a daemon in time");
    assert!(silent.elapsed() < secs(2), "within the TTL");
    assert_eq!(worker.code().await, Some(73));
}

#[rstest]
#[tokio::test]
async fn a_signal_makes_a_worker_leave_the_queue(#[values(Python, Node)] language: Language) {
    let daemon = Daemon::start(Embedded).await;
    let client = client(&daemon).await;
    let _lease = client.acquire("shared/job").await.unwrap();
    let mut worker = Worker::start(language, &daemon, &[]).await;
    until_queued(&client, 1).await;
    worker.signal("TERM");
    assert_eq!(worker.code().await, Some(0));
    until_queued(&client, 0).await;
}

#[rstest]
#[tokio::test]
async fn a_worker_that_reaches_no_daemon_names_the_endpoint(#[values(Python, Node)] language: Language) {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut worker = Worker::start_at(language, closed, &[]).await;
    assert_eq!(worker.line().await, format!("failed: no daemon answers at {closed}"));
    assert_eq!(worker.code().await, Some(69));
}

#[rstest]
#[tokio::test]
async fn a_worker_accepts_the_url_that_leasectl_accepts(#[values(Python, Node)] language: Language) {
    let daemon = Daemon::start(Embedded).await;
    let url = format!("http://{}/", daemon.grpc);
    Worker::start(language, &daemon, &["--endpoint", &url]).await.token().await;
}

/// A daemon that never answers Acquire. It reports each call, with the number of earlier attempts
/// in the call's metadata.
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
async fn a_worker_sends_its_release_as_a_retry_if_the_acquire_had_no_answer(
    #[values(Python, Node)] language: Language,
) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, (calls, mut noted)) = (listener.local_addr().unwrap(), unbounded_channel());
    let server = Server::builder().add_service(LeaseServiceServer::new(Silent(calls)));
    let served = server.serve_with_incoming(TcpListenerStream::new(listener));
    let _served = AbortOnDropHandle::new(tokio::spawn(served));
    let mut worker = Worker::start_at(language, address, &[]).await;
    let mut next = async || timeout(PATIENCE, noted.recv()).await.expect("no call in time").unwrap();
    assert_eq!(next().await, ("acquire", None));
    worker.signal("TERM");
    assert_eq!(next().await, ("release", Some("1".to_owned())));
    assert_eq!((worker.line().await.as_str(), worker.code().await), ("released", Some(0)));
}

/// The worker is paused while its grant arrives, and reads the grant only after the lease has
/// expired.
#[rstest]
#[tokio::test]
async fn a_worker_does_not_rely_on_a_late_grant(#[values(Python, Node)] language: Language) {
    let daemon = Daemon::start(Embedded).await;
    let client = client(&daemon).await;
    let lease = client.acquire("shared/job").await.unwrap();
    let mut late = Worker::start(language, &daemon, &[]).await;
    until_queued(&client, 1).await;
    late.signal("STOP");
    lease.release().await.unwrap();
    // This acquire displaces the worker as soon as its lease and the grace are over.
    let _next = client.acquire("shared/job").wait(secs(60)).await.unwrap();
    late.signal("CONT");
    assert!(late.line().await.starts_with("lost: "));
    assert_eq!(late.code().await, Some(73));
}

#[rstest]
#[tokio::test]
async fn a_worker_keeps_its_lease_while_its_daemon_restarts(#[values(Python, Node)] language: Language) {
    let daemon = Daemon::start(Embedded).await;
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
async fn the_service_config_retries_calls_that_are_unavailable() {
    let tried = spawn_blocking(|| {
        let stubs = python_example()?.join("build");
        let mut retry = python()?;
        retry.args(["tests/languages/retry.py", "docs/service-config.json"]).arg(stubs);
        output_of(retry.current_dir(root()))
    });
    println!("{}", tried.await.unwrap().unwrap());
}

/// Users of mongolock only change an import. One scenario runs with both libraries. A few others
/// show the intended differences.
#[tokio::test]
async fn the_drop_in_for_mongolock_behaves_like_mongolock() {
    // A daemon with the embedded store has no grace by default.
    let daemon = Daemon::start_with(Embedded, |config| config.rules.grace = Duration::ZERO).await;
    let (uri, endpoint) = (throwaway_mongodb::shared().await.unwrap(), daemon.grpc.to_string());
    let compared = spawn_blocking(move || {
        let python = || anyhow::Ok(tools::python(&root().join("tests/languages/mongolock.txt"))?.into_std());
        let drop_in = tools::copy("python/leased_mongolock", |folder| {
            let install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"];
            let install = install.into_iter().chain(["--no-build-isolation", "--target", "installed", "."]);
            output_of(python()?.args(install).current_dir(folder))
        });
        let mut compare = python()?;
        let packages = compare.get_envs().find_map(|(name, value)| value.filter(|_| name == "PYTHONPATH"));
        let paths = [drop_in?.join("installed").into(), packages.unwrap_or_default().to_owned()];
        compare.env("PYTHONPATH", std::env::join_paths(paths)?);
        output_of(compare.arg(root().join("tests/languages/mongolock_comparison.py")).args([uri, &endpoint]))
    });
    println!("{}", compared.await.unwrap().unwrap());
}

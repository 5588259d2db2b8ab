//! Runs daemons in this process, each daemon or fleet with its own store. Has short forms of
//! requests and calls.

/// Daemons that crash.
mod crash;
/// A strict parser of metrics.
pub(crate) mod exposition;
/// A relay that loses or delays what it forwards.
pub(crate) mod relay;
/// Programs of other ecosystems.
pub(crate) mod tools;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use leased::config::{Args, Config, StoreLocation};
use leased::server::{self, Listeners};
use leased::store::Store;
use leased::store::embedded::{EmbeddedStore, OpenError};
use leased::store::mongo::{Location, MongoStore};
use leased_client::v1::admin_service_client::AdminServiceClient;
use leased_client::v1::lease_service_client::LeaseServiceClient;
use leased_client::v1::{self, AcquireRequest, AcquireResponse, LeaseRef};
use leased_client::{Client, Reason};
use mongodb::bson::Document;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};
use tonic_types::StatusExt;
use uuid::Uuid;

pub(crate) type Leases = LeaseServiceClient<Channel>;

/// How long a test waits for a condition before it fails. Far longer than any condition takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
/// The grace of the daemons in tests.
pub(crate) const GRACE: Duration = Duration::from_millis(200);

/// The store that keeps the leases, and how many daemons use it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Backend {
    Embedded,
    MongoDb,
    /// Two daemons over one MongoDB, and a third that crashes and restarts all the time. Each
    /// client connects to one of the first two at random.
    Fleet,
}

pub(crate) use Backend::{Embedded, Fleet, MongoDb};
pub(crate) use crash::CrashingDaemon;
use crash::FlakyPeer;

/// A daemon in this process, with the rest of its fleet if it has one.
pub(crate) struct Daemon {
    pub config: Config,
    pub http: SocketAddr,
    pub grpc: SocketAddr,
    endpoint: Endpoint,
    shutdown: CancellationToken,
    task: JoinHandle<anyhow::Result<()>>,
    /// The data folder, which is removed with the last daemon that uses it.
    folder: Option<Arc<TempDir>>,
    fleet: Option<Box<Others>>,
}

/// The daemons of a fleet beside the first one.
struct Others {
    sibling: Daemon,
    _flaky_peer: FlakyPeer,
}

impl Daemon {
    /// Starts a daemon with a new data folder, or with a new database on the MongoDB that all tests
    /// share. Its calls have a deadline of [`PATIENCE`], since a busy machine may slow the store
    /// down. No test makes this store fail.
    pub(crate) async fn start(backend: Backend) -> Self {
        Self::start_with(backend, |_| {}).await
    }

    /// Starts as [`Self::start`] does, with a changed configuration.
    pub(crate) async fn start_with(backend: Backend, change: impl FnOnce(&mut Config)) -> Self {
        let change = |config: &mut Config| {
            config.limits.bounds.call = PATIENCE;
            change(config);
        };
        match backend {
            Embedded => {
                let folder = tempfile::tempdir().unwrap();
                let mut config = config(&["--data-dir", folder.path().to_str().unwrap()]);
                change(&mut config);
                Self::with(config, Some(Arc::new(folder))).await
            }
            MongoDb => Self::over(throwaway_mongodb::shared().await.unwrap(), change).await,
            Fleet => {
                let mut daemon = Self::over(throwaway_mongodb::shared().await.unwrap(), change).await;
                let sibling = daemon.sibling().await;
                daemon.until_following().await;
                sibling.until_following().await;
                let flaky_peer = FlakyPeer::beside(&daemon);
                daemon.fleet = Some(Box::new(Others { sibling, _flaky_peer: flaky_peer }));
                daemon
            }
        }
    }

    /// Starts a daemon with a new database on the MongoDB at `uri`.
    pub(crate) async fn over(uri: &str, change: impl FnOnce(&mut Config)) -> Self {
        let database = format!("leased-test-{}", Uuid::new_v4());
        let mut config = config(&["--mongodb-uri", uri, "--mongodb-database", &database]);
        change(&mut config);
        Self::with(config, None).await
    }

    /// Starts another daemon over the same database.
    pub(crate) async fn sibling(&self) -> Self {
        Self::with(self.config.clone(), None).await
    }

    /// Drains the daemon, waits for its end, and starts a new one with the same leases.
    pub(crate) async fn restart(self) -> Self {
        let (config, folder) = (self.config.clone(), self.folder.clone());
        self.stop().await;
        Self::with(config, folder).await
    }

    /// Restarts as [`Self::restart`] does; the new daemon listens at `address`.
    pub(crate) async fn restart_at(mut self, address: SocketAddr) -> Self {
        self.config.listen = address;
        self.restart().await
    }

    async fn with(config: Config, folder: Option<Arc<TempDir>>) -> Self {
        let listeners = Listeners::bind(&config).await.unwrap();
        let (grpc, http) = (listeners.grpc().unwrap(), listeners.http().unwrap().unwrap());
        let endpoint = Endpoint::from_shared(format!("http://{grpc}")).unwrap();
        let shutdown = CancellationToken::new();
        let task = match &config.location {
            StoreLocation::Folder(folder) => {
                // A daemon that has just ended may not have closed its file yet.
                let store = eventually(async || match EmbeddedStore::open(folder, config.rules).await {
                    Err(OpenError::InUse(_)) => None,
                    opened => Some(opened.unwrap()),
                });
                serve(listeners, store.await, &config, &shutdown)
            }
            StoreLocation::MongoDb(location) => {
                let store = MongoStore::connect(location, config.rules).await.unwrap();
                serve(listeners, store, &config, &shutdown)
            }
        };
        Self { config, http, grpc, endpoint, shutdown, task, folder, fleet: None }
    }

    /// Connects to this daemon, or to a random one of its fleet.
    pub(crate) async fn channel(&self) -> Channel {
        let sibling = self.fleet.as_ref().map(|others| &others.sibling).filter(|_| fastrand::bool());
        let daemon = sibling.unwrap_or(self);
        // If the test fails, its output shows which daemon of a fleet the client used.
        println!("a client at {}", daemon.grpc);
        daemon.endpoint.connect().await.unwrap()
    }

    /// Returns a client with its own connection.
    pub(crate) async fn client(&self) -> Leases {
        LeaseServiceClient::new(self.channel().await)
    }

    /// Returns this daemon, and its sibling if it has a fleet.
    pub(crate) fn members(&self) -> impl Iterator<Item = &Daemon> {
        std::iter::once(self).chain(self.fleet.as_ref().map(|others| &others.sibling))
    }

    /// Returns the URLs of all members.
    pub(crate) fn urls(&self) -> Vec<String> {
        self.members().map(|daemon| format!("http://{}", daemon.grpc)).collect()
    }

    /// Returns a client of the client crate with the URLs of all members.
    pub(crate) async fn holder(&self) -> Client {
        Client::connect(self.urls()).await.unwrap()
    }

    /// Returns a client of this daemon, never of its sibling.
    async fn own_client(&self) -> Leases {
        LeaseServiceClient::new(self.endpoint.connect().await.unwrap())
    }

    pub(crate) async fn admin(&self) -> AdminServiceClient<Channel> {
        AdminServiceClient::new(self.channel().await)
    }

    /// Waits until the daemon follows the change feed, which names the keys that other daemons
    /// change.
    pub(crate) async fn until_following(&self) {
        eventually(async || {
            http(self.http, "/readyz").await.filter(|answer| answer.1.contains("change feed"))
        })
        .await;
    }

    /// Tells the daemon to drain, and returns at once.
    pub(crate) fn drain(&self) {
        self.shutdown.cancel();
    }

    /// Drains the daemon and waits for its end.
    pub(crate) async fn stop(self) {
        self.drain();
        tokio::time::timeout(PATIENCE, self.task).await.unwrap().unwrap().unwrap();
    }

    /// Returns where a daemon over MongoDB keeps its records.
    pub(crate) fn location(&self) -> &Location {
        match &self.config.location {
            StoreLocation::MongoDb(location) => location,
            StoreLocation::Folder(folder) => panic!("the leases are in {}", folder.display()),
        }
    }

    /// Returns the daemon's collection, so that tests can read and damage records.
    pub(crate) async fn collection(&self) -> mongodb::Collection<Document> {
        self.database().await.collection(&self.location().collection)
    }

    pub(crate) async fn database(&self) -> mongodb::Database {
        let client = mongodb::Client::with_uri_str(&self.location().uri).await.unwrap();
        client.database(&self.location().database)
    }
}

fn config(store: &[&str]) -> Config {
    let grace = format!("{}ms", GRACE.as_millis());
    let options = ["leased", "--listen=127.0.0.1:0", "--http-listen=127.0.0.1:0", "--grace", &grace];
    Config::try_from(Args::try_parse_from(options.iter().chain(store)).unwrap()).unwrap()
}

fn serve<S: Store>(
    listeners: Listeners,
    store: S,
    config: &Config,
    shutdown: &CancellationToken,
) -> JoinHandle<anyhow::Result<()>> {
    let (config, shutdown) = (config.clone(), shutdown.clone());
    tokio::spawn(async move { server::run(listeners, store, &config, shutdown).await })
}

/// Builds a request for an exclusive lease on `key`, which does not wait.
pub(crate) fn acquire(key: &str) -> AcquireRequest {
    AcquireRequest { key: key.to_owned(), owner: "test".to_owned(), ..AcquireRequest::default() }
}

/// Sets the options of a request that [`acquire`] has built.
pub(crate) trait AcquireBuilder {
    fn id(self, id: Uuid) -> Self;
    fn owner(self, owner: &str) -> Self;
    fn ttl(self, ttl: Duration) -> Self;
    fn wait(self, wait: Duration) -> Self;
    fn shared(self, limit: u32) -> Self;
    fn min_hold(self, min_hold: Duration) -> Self;
}

impl AcquireBuilder for AcquireRequest {
    fn id(self, id: Uuid) -> Self {
        Self { lease_id: id.to_string(), ..self }
    }

    fn owner(self, owner: &str) -> Self {
        Self { owner: owner.to_owned(), ..self }
    }

    fn ttl(self, ttl: Duration) -> Self {
        Self { ttl: Some(ttl.try_into().unwrap()), ..self }
    }

    fn wait(self, wait: Duration) -> Self {
        Self { wait: Some(wait.try_into().unwrap()), ..self }
    }

    fn shared(self, limit: u32) -> Self {
        Self { mode: v1::Mode::Shared.into(), shared_limit: limit, ..self }
    }

    fn min_hold(self, min_hold: Duration) -> Self {
        Self { min_hold: Some(min_hold.try_into().unwrap()), ..self }
    }
}

/// Short forms of the calls, which return only the essential part of the answer. Their names differ
/// from those of the generated client, whose inherent methods would take precedence.
pub(crate) trait Calls {
    async fn get_lease(&mut self, request: AcquireRequest) -> Result<AcquireResponse, Status>;
    async fn give_back(&mut self, lease: &LeaseRef) -> Result<(), Status>;
    async fn renew(&mut self, lease: &LeaseRef) -> Result<Duration, Status>;
    async fn inspect(&mut self, key: &str) -> Result<v1::Lease, Status>;
}

impl Calls for Leases {
    async fn get_lease(&mut self, request: AcquireRequest) -> Result<AcquireResponse, Status> {
        self.acquire(request).await.map(Response::into_inner)
    }

    async fn give_back(&mut self, lease: &LeaseRef) -> Result<(), Status> {
        self.release(v1::ReleaseRequest { lease: Some(lease.clone()) }).await.map(drop)
    }

    async fn renew(&mut self, lease: &LeaseRef) -> Result<Duration, Status> {
        let answer = self.touch(v1::TouchRequest { lease: Some(lease.clone()) }).await?;
        Ok(answer.into_inner().remaining.unwrap().try_into().unwrap())
    }

    async fn inspect(&mut self, key: &str) -> Result<v1::Lease, Status> {
        Ok(self.get(v1::GetRequest { key: key.to_owned() }).await?.into_inner().lease.unwrap())
    }
}

/// Names a lease by its key and id.
pub(crate) fn named(key: &str, id: Uuid) -> LeaseRef {
    LeaseRef { key: key.to_owned(), lease_id: id.to_string() }
}

/// Returns the reason of a refusal, and the value of one entry of its metadata. The value is empty
/// if the entry is absent.
pub(crate) fn refusal(status: &Status, entry: &str) -> (Option<Reason>, String) {
    let info = status.get_details_error_info();
    (Reason::of(status), info.and_then(|info| info.metadata.get(entry).cloned()).unwrap_or_default())
}

/// Returns the fields that an `INVALID_ARGUMENT` status names, sorted.
pub(crate) fn invalid_fields(status: &Status) -> Vec<String> {
    assert_eq!(status.code(), tonic::Code::InvalidArgument, "{status:?}");
    let bad_request = status.get_details_bad_request().unwrap();
    let mut fields: Vec<String> =
        bad_request.field_violations.into_iter().map(|violation| violation.field).collect();
    fields.sort();
    fields
}

/// Calls `ask` again and again until it returns `Some`.
pub(crate) async fn eventually<T>(mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let asking = async {
        loop {
            if let Some(answer) = ask().await {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, asking).await.expect("it did not happen in time")
}

/// Sends an HTTP GET, and returns the status line and the body of the answer.
pub(crate) async fn http(address: SocketAddr, path: &str) -> Option<(String, String)> {
    let (head, body) = fetch(address, path).await?;
    Some((head.lines().next()?.to_owned(), body))
}

/// Sends an HTTP GET, and returns the head and the body of the answer.
pub(crate) async fn fetch(address: SocketAddr, path: &str) -> Option<(String, String)> {
    let mut stream = TcpStream::connect(address).await.ok()?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: leased\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    Some((format!("{head}\r\n"), body.to_owned()))
}

/// An acquire call that runs as a task.
pub(crate) type Acquiring = JoinHandle<Result<AcquireResponse, Status>>;

/// Starts a call that waits, and returns once the key has `waiters` waiters, this call included.
pub(crate) async fn enqueue(client: &mut Leases, request: AcquireRequest, waiters: usize) -> Acquiring {
    let (mut waiting, key) = (client.clone(), request.key.clone());
    let call = tokio::spawn(async move { waiting.get_lease(request).await });
    until_queued(client, &key, waiters).await;
    call
}

/// Waits until `key` has exactly `waiters` waiters.
pub(crate) async fn until_queued(client: &mut Leases, key: &str, waiters: usize) {
    eventually(async || client.inspect(key).await.ok().filter(|lease| lease.waiters.len() == waiters)).await;
}

pub(crate) const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

pub(crate) const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

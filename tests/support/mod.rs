//! Daemons in-process over a store of their own, and requests as tests write them.

mod crash;
pub(crate) mod exposition;
pub(crate) mod relay;
pub(crate) mod tools;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use leased::config::{Args, Config, Place};
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

/// Longer than anything in a test takes; what is waited for is a condition.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
/// The grace of daemons in tests.
pub(crate) const GRACE: Duration = Duration::from_millis(200);

/// Where leases are kept, and by how many daemons.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Home {
    Embedded,
    MongoDb,
    /// Two daemons over one MongoDB, of which each client meets any, beside a third that crashes and comes back.
    Fleet,
}

pub(crate) use Home::{Embedded, Fleet, MongoDb};
pub(crate) use crash::Doomed;
use crash::Restless;

/// A daemon in this process, or one of a fleet.
pub(crate) struct Daemon {
    pub config: Config,
    pub http: SocketAddr,
    pub grpc: SocketAddr,
    endpoint: Endpoint,
    shutdown: CancellationToken,
    task: JoinHandle<anyhow::Result<()>>,
    /// Removed with the last daemon that uses it.
    folder: Option<Arc<TempDir>>,
    fleet: Option<Box<Others>>,
}

/// The rest of a fleet.
struct Others {
    sibling: Daemon,
    _restless: Restless,
}

impl Daemon {
    /// Over a new folder, or over a new database of the MongoDB that all tests share. That store always answers, however
    /// slowly on a busy machine, so calls have a long time.
    pub(crate) async fn start(home: Home) -> Self {
        Self::start_with(home, |_| {}).await
    }

    pub(crate) async fn start_with(home: Home, change: impl FnOnce(&mut Config)) -> Self {
        let change = |config: &mut Config| {
            config.limits.bounds.call = PATIENCE;
            change(config);
        };
        match home {
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
                daemon.follows().await;
                sibling.follows().await;
                daemon.fleet = Some(Box::new(Others { sibling, _restless: Restless::beside(&daemon) }));
                daemon
            }
        }
    }

    /// Over a new database of the MongoDB at `uri`, for tests that make it fail.
    pub(crate) async fn over(uri: &str, change: impl FnOnce(&mut Config)) -> Self {
        let database = format!("leased-test-{}", Uuid::new_v4());
        let mut config = config(&["--mongodb-uri", uri, "--mongodb-database", &database]);
        change(&mut config);
        Self::with(config, None).await
    }

    /// Another daemon over the same database.
    pub(crate) async fn sibling(&self) -> Self {
        Self::with(self.config.clone(), None).await
    }

    /// Drains, waits for the end, and starts over the same leases.
    pub(crate) async fn restart(self) -> Self {
        let (config, folder) = (self.config.clone(), self.folder.clone());
        self.stop().await;
        Self::with(config, folder).await
    }

    /// The same at the address that it is known by.
    pub(crate) async fn restart_at(mut self, address: SocketAddr) -> Self {
        self.config.listen = address;
        self.restart().await
    }

    async fn with(config: Config, folder: Option<Arc<TempDir>>) -> Self {
        let listeners = Listeners::bind(&config).await.unwrap();
        let (grpc, http) = (listeners.grpc().unwrap(), listeners.http().unwrap().unwrap());
        let endpoint = Endpoint::from_shared(format!("http://{grpc}")).unwrap();
        let shutdown = CancellationToken::new();
        let task = match &config.place {
            Place::Folder(folder) => {
                // A daemon that has just ended may still be about to close its file.
                let store = eventually(async || match EmbeddedStore::open(folder, config.rules).await {
                    Err(OpenError::InUse(_)) => None,
                    opened => Some(opened.unwrap()),
                });
                serve(listeners, store.await, &config, &shutdown)
            }
            Place::MongoDb(location) => {
                let store = MongoStore::connect(location, config.rules).await.unwrap();
                serve(listeners, store, &config, &shutdown)
            }
        };
        Self { config, http, grpc, endpoint, shutdown, task, folder, fleet: None }
    }

    /// A connection; of a fleet, to any of its daemons.
    pub(crate) async fn channel(&self) -> Channel {
        let sibling = self.fleet.as_ref().map(|others| &others.sibling).filter(|_| fastrand::bool());
        let daemon = sibling.unwrap_or(self);
        println!("a client at {}", daemon.grpc);
        daemon.endpoint.connect().await.unwrap()
    }

    /// A client with a connection of its own.
    pub(crate) async fn client(&self) -> Leases {
        LeaseServiceClient::new(self.channel().await)
    }

    /// This daemon and the rest of its fleet that lives as long.
    pub(crate) fn members(&self) -> impl Iterator<Item = &Daemon> {
        std::iter::once(self).chain(self.fleet.as_ref().map(|others| &others.sibling))
    }

    /// The URLs of all members.
    pub(crate) fn urls(&self) -> Vec<String> {
        self.members().map(|daemon| format!("http://{}", daemon.grpc)).collect()
    }

    /// A holder that may turn to any daemon of a fleet.
    pub(crate) async fn holder(&self) -> Client {
        Client::connect(self.urls()).await.unwrap()
    }

    /// A client of this very daemon.
    async fn own_client(&self) -> Leases {
        LeaseServiceClient::new(self.endpoint.connect().await.unwrap())
    }

    pub(crate) async fn admin(&self) -> AdminServiceClient<Channel> {
        AdminServiceClient::new(self.channel().await)
    }

    /// Waits until the daemon hears of what others do.
    pub(crate) async fn follows(&self) {
        eventually(async || {
            http(self.http, "/readyz").await.filter(|answer| answer.1.contains("change feed"))
        })
        .await;
    }

    /// Tells the daemon to drain.
    pub(crate) fn drain(&self) {
        self.shutdown.cancel();
    }

    /// Drains and waits for the end.
    pub(crate) async fn stop(self) {
        self.drain();
        tokio::time::timeout(PATIENCE, self.task).await.unwrap().unwrap().unwrap();
    }

    /// Where a daemon over MongoDB has its records.
    pub(crate) fn location(&self) -> &Location {
        match &self.config.place {
            Place::MongoDb(location) => location,
            Place::Folder(folder) => panic!("the leases are in {}", folder.display()),
        }
    }

    /// The daemon's collection, to look at and to damage.
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

/// An exclusive try at `key`.
pub(crate) fn ask(key: &str) -> AcquireRequest {
    AcquireRequest { key: key.to_owned(), owner: "test".to_owned(), ..AcquireRequest::default() }
}

/// The same with more to it.
pub(crate) trait Asking {
    fn id(self, id: Uuid) -> Self;
    fn owner(self, owner: &str) -> Self;
    fn ttl(self, ttl: Duration) -> Self;
    fn wait(self, wait: Duration) -> Self;
    fn shared(self, limit: u32) -> Self;
    fn min_hold(self, min_hold: Duration) -> Self;
}

impl Asking for AcquireRequest {
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

/// Calls whose requests name a lease.
pub(crate) trait Calls {
    async fn get_lease(&mut self, request: AcquireRequest) -> Result<AcquireResponse, Status>;
    async fn give_back(&mut self, lease: &LeaseRef) -> Result<(), Status>;
    async fn renew(&mut self, lease: &LeaseRef) -> Result<Duration, Status>;
    async fn look(&mut self, key: &str) -> Result<v1::Lease, Status>;
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

    async fn look(&mut self, key: &str) -> Result<v1::Lease, Status> {
        Ok(self.get(v1::GetRequest { key: key.to_owned() }).await?.into_inner().lease.unwrap())
    }
}

/// A lease by key and id.
pub(crate) fn named(key: &str, id: Uuid) -> LeaseRef {
    LeaseRef { key: key.to_owned(), lease_id: id.to_string() }
}

/// The reason of a refusal, and one entry of its metadata.
pub(crate) fn refusal(status: &Status, entry: &str) -> (Option<Reason>, String) {
    let info = status.get_details_error_info();
    (Reason::of(status), info.and_then(|info| info.metadata.get(entry).cloned()).unwrap_or_default())
}

/// The fields that an `INVALID_ARGUMENT` names, in order.
pub(crate) fn wrong_fields(status: &Status) -> Vec<String> {
    assert_eq!(status.code(), tonic::Code::InvalidArgument, "{status:?}");
    let bad_request = status.get_details_bad_request().unwrap();
    let mut fields: Vec<String> = bad_request.field_violations.into_iter().map(|wrong| wrong.field).collect();
    fields.sort();
    fields
}

/// Asks again until the answer is `Some`.
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

/// The status line and the body of a GET.
pub(crate) async fn http(address: SocketAddr, path: &str) -> Option<(String, String)> {
    let (head, body) = fetch(address, path).await?;
    Some((head.lines().next()?.to_owned(), body))
}

/// The head and the body of a GET.
pub(crate) async fn fetch(address: SocketAddr, path: &str) -> Option<(String, String)> {
    let mut stream = TcpStream::connect(address).await.ok()?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: leased\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    Some((format!("{head}\r\n"), body.to_owned()))
}

/// Waits until so many stand in line for `key`.
pub(crate) async fn line_of(client: &mut Leases, key: &str, length: usize) {
    eventually(async || client.look(key).await.ok().filter(|lease| lease.waiters.len() == length)).await;
}

pub(crate) const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

pub(crate) const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

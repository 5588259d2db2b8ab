//! For tests: a daemon behind an in-memory network, whose answers the test chooses. Works on a
//! paused clock.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use leased_proto::v1::lease_service_server::{LeaseService, LeaseServiceServer};
use leased_proto::v1::{self, KeepAliveRequest, KeepAliveResponse, LeaseRef};
use tokio::io::DuplexStream;
use tokio::net::TcpListener;
use tokio::sync::mpsc::{self, UnboundedSender, unbounded_channel};
use tokio::time::{Instant, sleep};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream, UnboundedReceiverStream};
use tonic::transport::server::Router;
use tonic::transport::{Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_server::{Health, HealthServer};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use crate::client::Client;
use crate::daemon::Dial;
use crate::endpoints::{Reach, Source};
use crate::info::span;

/// A stream as the daemon sees it.
pub(crate) struct Opened {
    pub(crate) daemon: usize,
    pub(crate) at: Instant,
    pub(crate) messages: Streaming<KeepAliveRequest>,
    pub(crate) answers: mpsc::Sender<Result<KeepAliveResponse, Status>>,
}

/// How a peer answers calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Manner {
    /// Serves the call.
    Up,
    /// Refuses the call as unavailable.
    Down,
    /// Refuses the call because the queue of the key is full.
    Full,
    /// Never answers.
    Silent,
    /// Answers like a server without this API.
    Stranger,
    /// Panics when a client connects.
    Panicking,
}

/// What the test has set, and what the peer has seen.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) number: usize,
    manner: Mutex<Manner>,
    store: Mutex<Option<&'static str>>,
    /// How many connections were made.
    pub(crate) connections: AtomicUsize,
    /// How many acquires are waiting.
    pub(crate) waiting: AtomicUsize,
    /// The name of each call, and the previous attempts that its header states.
    pub(crate) calls: Mutex<Vec<(&'static str, Option<String>)>>,
}

/// A daemon that passes its streams to the test.
#[derive(Clone)]
pub(crate) struct Peer {
    pub(crate) shared: Arc<Shared>,
    opened: UnboundedSender<Opened>,
    refused: UnboundedSender<(usize, Instant)>,
}

impl Peer {
    pub(crate) fn new(
        number: usize,
        opened: UnboundedSender<Opened>,
        refused: UnboundedSender<(usize, Instant)>,
    ) -> Self {
        let shared = Shared {
            number,
            manner: Mutex::new(Manner::Up),
            store: Mutex::default(),
            connections: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            calls: Mutex::default(),
        };
        Self { shared: Arc::new(shared), opened, refused }
    }

    /// A client of these peers.
    pub(crate) fn client(peers: &[Self], timeout: Duration) -> Client {
        let peers = peers.iter().fold(Client::builder().timeout(timeout), |builder, peer| {
            let dial = peer.dial();
            builder.endpoint_with(peer.name(), move || dial())
        });
        peers.connect_lazily().unwrap()
    }

    pub(crate) fn name(&self) -> String {
        format!("daemon-{}", self.shared.number)
    }

    /// A peer for tests without streams.
    pub(crate) fn numbered(number: usize) -> Self {
        Self::new(number, unbounded_channel().0, unbounded_channel().0)
    }

    pub(crate) fn be(&self, manner: Manner) {
        *self.shared.manner.lock().unwrap() = manner;
    }

    pub(crate) fn serve_store(&self, store: &'static str) {
        *self.shared.store.lock().unwrap() = Some(store);
    }

    /// The previous attempts that the header of each call with this name states.
    pub(crate) fn attempts(&self, call: &str) -> Vec<Option<String>> {
        let calls = self.shared.calls.lock().unwrap();
        calls.iter().filter(|(name, _)| *name == call).map(|(_, attempts)| attempts.clone()).collect()
    }

    pub(crate) fn source(&self) -> Source {
        Source { name: self.name(), reach: Reach::Dial(self.dial()) }
    }

    fn router(&self) -> Router {
        Server::builder()
            .add_service(LeaseServiceServer::new(self.clone()))
            .add_service(HealthServer::new(self.clone()))
    }

    /// Also listens on an address of this machine, and returns the address.
    pub(crate) async fn listen(&self) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(self.router().serve_with_incoming(TcpListenerStream::new(listener)));
        address
    }

    /// Returns a function that connects to the peer over the in-memory network.
    fn dial(&self) -> Dial {
        let (connections, arriving) = unbounded_channel::<Result<DuplexStream, std::io::Error>>();
        tokio::spawn(self.router().serve_with_incoming(UnboundedReceiverStream::new(arriving)));
        let shared = Arc::clone(&self.shared);
        Arc::new(move || {
            let (connections, shared) = (connections.clone(), Arc::clone(&shared));
            Endpoint::from_static("http://daemon").connect_with_connector_lazy(tower::service_fn(move |_| {
                shared.connections.fetch_add(1, Ordering::Relaxed);
                let (near, far) = tokio::io::duplex(64 * 1024);
                let (sent, manner) = (connections.send(Ok(far)), *shared.manner.lock().unwrap());
                async move {
                    assert_ne!(manner, Manner::Panicking, "there are no threads");
                    sent.map(|()| TokioIo::new(near)).map_err(|_| std::io::Error::other("gone"))
                }
            }))
        })
    }

    /// Records a call, and answers it as the test has set.
    async fn answer<R, T>(&self, call: &'static str, request: &Request<R>, answer: T) -> Calling<T> {
        let attempts = request.metadata().get("grpc-previous-rpc-attempts");
        let attempts = attempts.map(|attempts| attempts.to_str().unwrap().to_owned());
        self.shared.calls.lock().unwrap().push((call, attempts));
        let manner = *self.shared.manner.lock().unwrap();
        match manner {
            Manner::Up | Manner::Panicking => Ok(self.response(answer)),
            Manner::Down => Err(Status::unavailable("down")),
            Manner::Full => Err(leased_proto::Reason::QueueFull.status("full", [])),
            Manner::Silent => std::future::pending().await,
            Manner::Stranger => Err(Status::unimplemented("what?")),
        }
    }

    /// Builds a response that names the store.
    fn response<T>(&self, answer: T) -> Response<T> {
        let mut response = Response::new(answer);
        if let Some(store) = *self.shared.store.lock().unwrap() {
            response.metadata_mut().insert("leased-store", store.parse().unwrap());
        }
        response
    }
}

type Calling<T> = Result<Response<T>, Status>;

/// Counts an acquire as waiting until it is dropped.
struct Waiting(Arc<Shared>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

#[tonic::async_trait]
impl LeaseService for Peer {
    type KeepAliveStream = ReceiverStream<Result<KeepAliveResponse, Status>>;
    type WatchStream = ReceiverStream<Result<v1::WatchResponse, Status>>;

    async fn keep_alive(
        &self,
        request: Request<Streaming<KeepAliveRequest>>,
    ) -> Calling<Self::KeepAliveStream> {
        let at = Instant::now();
        if let Err(status) = self.answer("keep_alive", &request, ()).await {
            let _ = self.refused.send((self.shared.number, at));
            return Err(status);
        }
        let (answers, receiver) = mpsc::channel(16);
        let opened = Opened { daemon: self.shared.number, at, messages: request.into_inner(), answers };
        let _ = self.opened.send(opened);
        Ok(self.response(ReceiverStream::new(receiver)))
    }

    async fn acquire(&self, request: Request<v1::AcquireRequest>) -> Calling<v1::AcquireResponse> {
        let body = request.get_ref();
        let lease = LeaseRef { key: body.key.clone(), lease_id: body.lease_id.clone() };
        let wait = span(body.wait);
        let response =
            v1::AcquireResponse { lease: Some(lease), fencing_token: 1, ttl: body.ttl, ..Default::default() };
        let answer = self.answer("acquire", &request, response).await?;
        if wait.is_zero() {
            return Ok(answer);
        }
        self.shared.waiting.fetch_add(1, Ordering::Relaxed);
        let _waiting = Waiting(Arc::clone(&self.shared));
        sleep(wait).await;
        Err(leased_proto::Reason::LeaseHeld.status("held", []))
    }

    async fn release(&self, request: Request<v1::ReleaseRequest>) -> Calling<v1::ReleaseResponse> {
        self.answer("release", &request, v1::ReleaseResponse {}).await
    }

    async fn touch(&self, request: Request<v1::TouchRequest>) -> Calling<v1::TouchResponse> {
        let remaining = Some(prost_types::Duration { seconds: 9, nanos: 0 });
        self.answer("touch", &request, v1::TouchResponse { remaining }).await
    }

    async fn get(&self, request: Request<v1::GetRequest>) -> Calling<v1::GetResponse> {
        self.answer("get", &request, v1::GetResponse::default()).await
    }

    async fn list(&self, request: Request<v1::ListRequest>) -> Calling<v1::ListResponse> {
        self.answer("list", &request, v1::ListResponse::default()).await
    }

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Calling<Self::WatchStream> {
        let (events, receiver) = mpsc::channel(1);
        let event = Some(v1::watch_response::Event::SnapshotEnd(v1::SnapshotEnd {}));
        events.send(Ok(v1::WatchResponse { event })).await.map_err(|_| Status::internal("nobody reads"))?;
        // Keeps the stream open for as long as it is read.
        tokio::spawn(async move { events.closed().await });
        self.answer("watch", &request, ReceiverStream::new(receiver)).await
    }
}

#[tonic::async_trait]
impl Health for Peer {
    type WatchStream = ReceiverStream<Result<HealthCheckResponse, Status>>;

    async fn check(&self, request: Request<HealthCheckRequest>) -> Calling<HealthCheckResponse> {
        let status = ServingStatus::Serving.into();
        self.answer("check", &request, HealthCheckResponse { status }).await
    }

    async fn watch(&self, _: Request<HealthCheckRequest>) -> Calling<Self::WatchStream> {
        Err(Status::unimplemented(""))
    }
}

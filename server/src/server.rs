//! Serves a store until told to stop: services, health, purge, drain.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context;
use futures_util::stream::Stream;
use leased_proto::v1::admin_service_server::AdminServiceServer;
use leased_proto::v1::lease_service_server::LeaseServiceServer;
use prometheus_client::metrics::counter::Counter;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::body::Body;
use tonic::codegen::http::Response;
use tonic::service::Routes;
use tonic::{Code, Status};
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::{HealthReporter, HealthService};
use tower::{Layer, ServiceBuilder};

use crate::config::Config;
use crate::engine::Lessor;
use crate::grpc::request::MAX_REQUEST_BYTES;
use crate::grpc::response::{MAX_MESSAGE_BYTES, limit_exceeded};
use crate::grpc::service::Service;
use crate::health::Health;
use crate::http;
use crate::metrics::daemon::Standing;
use crate::metrics::process::Process;
use crate::metrics::registry::Meter;
use crate::store::{Metered, StartError, Store};
use crate::transport::accept::connections;
use crate::transport::bounds::BoundCalls;
use crate::transport::direct_route::{Express, Fork};
use crate::transport::listener::{Grpc, serve_all};
use crate::transport::metrics_layer::CountCalls;
use crate::transport::receiving::Room;
use crate::transport::stamp::Stamp;

/// The largest message that goes out.
const MAX_ANSWER_BYTES: usize = 4 * 1024 * 1024;
/// Between purges; they are spread so that daemons do not purge at the same moment.
const PURGE_PERIOD: Duration = Duration::from_secs(3600);
/// How long watchers of the health service may take to hear of the drain.
const FAREWELL: Duration = Duration::from_millis(200);
/// How long the daemon's own tasks may take to end.
const FINISH: Duration = Duration::from_secs(5);

/// Where calls come in.
#[derive(Debug)]
pub struct Listeners {
    grpc: TcpListener,
    http: Option<TcpListener>,
}

impl Listeners {
    /// Binds both ports.
    ///
    /// # Errors
    /// A sentence that names the address that could not be bound.
    pub async fn bind(config: &Config) -> anyhow::Result<Self> {
        let grpc = bind(config.listen).await?;
        let http = match config.http_listen {
            Some(address) => Some(bind(address).await?),
            None => None,
        };
        Ok(Self { grpc, http })
    }

    /// The port that serves gRPC.
    ///
    /// # Errors
    /// If the system does not tell.
    pub fn grpc(&self) -> std::io::Result<SocketAddr> {
        self.grpc.local_addr()
    }

    /// The side port, if there is one.
    ///
    /// # Errors
    /// If the system does not tell.
    pub fn http(&self) -> std::io::Result<Option<SocketAddr>> {
        self.http.as_ref().map(TcpListener::local_addr).transpose()
    }
}

async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))
}

/// Serves `store` until `shutdown`, then drains: no new waits, streams end with a status that sends callers
/// elsewhere, open calls and commits complete. Returns when that is done or `drain_timeout` is over.
///
/// # Errors
/// If the gRPC server fails; [`StartError`] if the store says that this daemon must not go on.
pub async fn run<S: Store>(
    listeners: Listeners,
    store: S,
    config: &Config,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let Listeners { grpc, http } = listeners;
    serve(connections(grpc), http, store, config, shutdown).await
}

/// Serves connections that come from anywhere, as [`run`] does.
///
/// # Errors
/// As [`run`].
pub async fn serve<S: Store, T>(
    incoming: impl Stream<Item = T>,
    http: Option<TcpListener>,
    store: S,
    config: &Config,
    shutdown: CancellationToken,
) -> anyhow::Result<()>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (shutdown, ended) = (shutdown.child_token(), CancellationToken::new());
    let _end_all = (shutdown.clone().drop_guard(), ended.clone().drop_guard());
    let tasks = TaskTracker::new();
    let mut meter = Meter::default();
    let store = Metered::new(store, &mut meter);
    let stamp = Stamp::of(store.id());
    let lessor = Lessor::start(store, config.limits.bounds, shutdown.clone(), &mut meter, &tasks);
    let reporter = HealthReporter::new();
    let health = Health::new(reporter.clone()).await;

    let watched = (health.clone(), lessor.clone(), shutdown.clone());
    tasks.spawn(async move { watched.0.watch(watched.1.store(), watched.2).await });
    tasks.spawn(purge(lessor.clone(), config.purge_after, shutdown.clone()));
    let calls = CountCalls::new(&mut meter);
    let open = meter.gauge("leased_connections", "Connections that are open");
    let refused = ("leased_connections_refused", "Connections closed because as many as allowed were open");
    let [grpc_refused, http_refused] = meter.by(refused, "port", ["grpc", "http"], Counter::default);
    meter.ask(Standing { lessor: lessor.clone(), health: health.clone(), limits: config.limits });
    meter.ask(Process);
    if let Some(listener) = http {
        tasks.spawn(http::serve(
            listener,
            http_refused,
            health.clone(),
            lessor.clone(),
            meter,
            ended.clone(),
        ));
    }

    let service = Service::new(lessor.clone(), config.limits, shutdown.clone());
    let grpc = Grpc {
        service: ServiceBuilder::new()
            .layer(calls)
            .layer(stamp)
            .layer(BoundCalls(Room::new(config.limits.receiving_bytes)))
            .map_response(oversize as fn(_) -> _)
            .service(route(service, reporter)?),
        limits: config.limits,
        open,
        draining: shutdown.clone(),
    };
    let serve =
        serve_all(incoming, config.limits.connections, grpc_refused, shutdown.clone(), |stream, slot| {
            grpc.clone().serve(stream, slot)
        });
    let drain = async {
        shutdown.cancelled().await;
        tracing::info!("draining");
        sleep(FAREWELL).await;
        health.end().await;
        sleep(config.drain_timeout.saturating_sub(FAREWELL)).await;
    };
    let outcome = tokio::select! {
        biased;
        () = drain => {
            tracing::warn!("calls were still open at the end of the drain and are cut");
            Ok(())
        }
        // At once: to go on for the length of a drain may give a key to two holders.
        why = lessor.store().objection() => Err(StartError::Unusable(why).into()),
        () = serve => Ok(()),
    };
    shutdown.cancel();
    if timeout(config.drain_timeout, lessor.settle()).await.is_err() {
        tracing::warn!("the store did not take the last commits");
    }
    lessor.give_up();
    ended.cancel();
    tasks.close();
    if timeout(FINISH, tasks.wait()).await.is_err() {
        tracing::warn!("some of the daemon's tasks were still running at its end");
    }
    lessor.store().leave().await;
    outcome
}

/// All services, the lease service by the short way.
fn route<S: Store>(
    service: Service<S>,
    reporter: HealthReporter,
) -> anyhow::Result<Fork<LeaseServiceServer<Service<S>>>> {
    let lease = |most| {
        LeaseServiceServer::new(service.clone())
            .max_decoding_message_size(most)
            .max_encoding_message_size(MAX_ANSWER_BYTES)
    };
    let admin = AdminServiceServer::new(service.clone())
        .max_decoding_message_size(MAX_REQUEST_BYTES)
        .max_encoding_message_size(MAX_ANSWER_BYTES);
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(leased_proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            // What refusals carry; without it grpcurl shows their details as bytes.
            .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
    };
    let routes = Routes::new(admin)
        .add_service(HealthServer::new(HealthService::from_health_reporter(reporter)))
        .add_service(reflection().build_v1().context("reflection v1")?)
        .add_service(reflection().build_v1alpha().context("reflection v1alpha")?)
        .prepare();
    Ok(Express::to(lease(MAX_REQUEST_BYTES), lease(MAX_MESSAGE_BYTES)).layer(routes))
}

/// A request that is too large is past a limit. tonic says `OUT_OF_RANGE`, which nothing else here does.
fn oversize(response: Response<Body>) -> Response<Body> {
    match Status::from_header_map(response.headers()) {
        Some(status) if status.code() == Code::OutOfRange => {
            limit_exceeded("request_bytes", MAX_REQUEST_BYTES).into_http()
        }
        _ => response,
    }
}

/// Forgets keys that have been free for long, again and again.
async fn purge<S: Store>(lessor: Lessor<S>, free_for: Duration, draining: CancellationToken) {
    loop {
        let pause = PURGE_PERIOD.mul_f64(0.5 + fastrand::f64());
        tokio::select! {
            () = sleep(pause) => {}
            () = draining.cancelled() => return,
        }
        let purged = tokio::select! {
            purged = lessor.store().purge(free_for) => purged,
            () = draining.cancelled() => return,
        };
        match purged {
            Ok(0) => {}
            Ok(purged) => tracing::info!(purged, "forgot keys that have long been free"),
            Err(error) => tracing::warn!(%error, "could not purge; trying again later"),
        }
    }
}

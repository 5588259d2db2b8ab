//! Runs the daemon on a store: services, health, purge and drain.

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
use crate::metrics::daemon::DaemonCollector;
use crate::metrics::process::Process;
use crate::metrics::registry::MetricsRegistry;
use crate::store::{Retrying, StartError, Store};
use crate::transport::accept::connections;
use crate::transport::bounds::BoundsLayer;
use crate::transport::direct_route::{DirectRoute, DirectService};
use crate::transport::listener::{Grpc, serve_all};
use crate::transport::metrics_layer::MetricsLayer;
use crate::transport::receiving::ReceiveBudget;
use crate::transport::store_id_layer::StoreIdLayer;

/// The largest message that the daemon sends, in bytes. gRPC clients accept no more by default.
const MAX_RESPONSE_BYTES: usize = 4 * 1024 * 1024;
/// The mean pause between purges. Each pause is 0.5 to 1.5 times as long, so that daemons do not
/// purge at the same moment.
const PURGE_PERIOD: Duration = Duration::from_secs(3600);
/// How long health streams stay open in a drain, so that their callers read NOT_SERVING.
const HEALTH_NOTICE: Duration = Duration::from_millis(200);
/// How long the daemon's own tasks may take to end.
const TASKS_TIMEOUT: Duration = Duration::from_secs(5);

/// The ports of a daemon.
#[derive(Debug)]
pub struct Listeners {
    grpc: TcpListener,
    http: Option<TcpListener>,
}

impl Listeners {
    /// Binds both ports.
    ///
    /// # Errors
    /// If an address cannot be bound. The error names it.
    pub async fn bind(config: &Config) -> anyhow::Result<Self> {
        let grpc = bind(config.listen).await?;
        let http = match config.http_listen {
            Some(address) => Some(bind(address).await?),
            None => None,
        };
        Ok(Self { grpc, http })
    }

    /// Returns the address that serves gRPC.
    ///
    /// # Errors
    /// If the operating system does not report the address.
    pub fn grpc(&self) -> std::io::Result<SocketAddr> {
        self.grpc.local_addr()
    }

    /// Returns the address of the side port, if there is one.
    ///
    /// # Errors
    /// If the operating system does not report the address.
    pub fn http(&self) -> std::io::Result<Option<SocketAddr>> {
        self.http.as_ref().map(TcpListener::local_addr).transpose()
    }
}

async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))
}

/// Serves `store` until `shutdown` is cancelled, then drains.
///
/// In a drain no new wait begins, streams end with a status that sends callers to another daemon,
/// and open calls and commits complete. Returns when that is done or `drain_timeout` is over.
///
/// # Errors
/// If the gRPC services cannot be built. [`StartError`] if the store says that this daemon must
/// stop serving.
pub async fn run<S: Store>(
    listeners: Listeners,
    store: S,
    config: &Config,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let Listeners { grpc, http } = listeners;
    serve(connections(grpc), http, store, config, shutdown).await
}

/// Serves the connections of `incoming` like [`run`]. For callers without a listening socket.
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
    // A child, so that cancelling it below does not cancel the caller's token.
    let (shutdown, ended) = (shutdown.child_token(), CancellationToken::new());
    // If the caller drops this future, the guards end its tasks.
    let _end_all = (shutdown.clone().drop_guard(), ended.clone().drop_guard());
    let tasks = TaskTracker::new();
    let mut registry = MetricsRegistry::default();
    let store = Retrying::new(store, &mut registry);
    let store_id = StoreIdLayer::new(store.id());
    let lessor = Lessor::start(store, config.limits.bounds, shutdown.clone(), &mut registry, &tasks);
    let reporter = HealthReporter::new();
    let health = Health::new(reporter.clone()).await;

    let watched = (health.clone(), lessor.clone(), shutdown.clone());
    tasks.spawn(async move { watched.0.watch(watched.1.store(), watched.2).await });
    tasks.spawn(purge(lessor.clone(), config.purge_after, shutdown.clone()));
    let metrics = MetricsLayer::new(&mut registry);
    let open = registry.gauge("leased_connections", "Open gRPC connections");
    let refused = ("leased_connections_refused", "Connections closed because as many as allowed were open");
    let [grpc_refused, http_refused] = registry.by_label(refused, "port", ["grpc", "http"], Counter::default);
    registry.collect(DaemonCollector {
        lessor: lessor.clone(),
        health: health.clone(),
        limits: config.limits,
    });
    registry.collect(Process);
    if let Some(listener) = http {
        tasks.spawn(http::serve(
            listener,
            http_refused,
            health.clone(),
            lessor.clone(),
            registry,
            ended.clone(),
        ));
    }

    let service = Service::new(lessor.clone(), config.limits, shutdown.clone());
    let grpc = Grpc {
        service: ServiceBuilder::new()
            .layer(metrics)
            .layer(store_id)
            .layer(BoundsLayer(ReceiveBudget::new(config.limits.receiving_bytes)))
            .map_response(limit_exceeded_if_too_large as fn(_) -> _)
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
        sleep(HEALTH_NOTICE).await;
        health.end_streams().await;
        sleep(config.drain_timeout.saturating_sub(HEALTH_NOTICE)).await;
    };
    let outcome = tokio::select! {
        // In this order, so that an objection is returned even if the last connection closes at the
        // same moment.
        biased;
        () = drain => {
            tracing::warn!("calls were still open at the end of the drain and are cut");
            Ok(())
        }
        // Ends at once, without a drain: serving any longer could give a key to two holders.
        why = lessor.store().objection() => Err(StartError::Unusable(why).into()),
        () = serve => Ok(()),
    };
    shutdown.cancel();
    if timeout(config.drain_timeout, lessor.settle()).await.is_err() {
        tracing::warn!("the last commits did not complete in time");
    }
    lessor.give_up();
    ended.cancel();
    tasks.close();
    if timeout(TASKS_TIMEOUT, tasks.wait()).await.is_err() {
        tracing::warn!("some tasks of the daemon were still running when it ended");
    }
    // Last, because the store must not be used afterwards.
    lessor.store().leave().await;
    outcome
}

/// Returns all services: the lease service by the direct route, the others behind tonic's router.
fn route<S: Store>(
    service: Service<S>,
    reporter: HealthReporter,
) -> anyhow::Result<DirectService<LeaseServiceServer<Service<S>>>> {
    let lease = |most| {
        LeaseServiceServer::new(service.clone())
            .max_decoding_message_size(most)
            .max_encoding_message_size(MAX_RESPONSE_BYTES)
    };
    let admin = AdminServiceServer::new(service.clone())
        .max_decoding_message_size(MAX_REQUEST_BYTES)
        .max_encoding_message_size(MAX_RESPONSE_BYTES);
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(leased_proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            // The types of error details. Without them grpcurl shows the details as bytes.
            .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
    };
    let routes = Routes::new(admin)
        .add_service(HealthServer::new(HealthService::from_health_reporter(reporter)))
        .add_service(reflection().build_v1().context("reflection v1")?)
        .add_service(reflection().build_v1alpha().context("reflection v1alpha")?)
        .prepare();
    Ok(DirectRoute::to(lease(MAX_REQUEST_BYTES), lease(MAX_MESSAGE_BYTES)).layer(routes))
}

/// Turns tonic's status for a request that is too large into [`limit_exceeded`]. tonic answers
/// `OUT_OF_RANGE`, and the daemon itself never does.
fn limit_exceeded_if_too_large(response: Response<Body>) -> Response<Body> {
    match Status::from_header_map(response.headers()) {
        Some(status) if status.code() == Code::OutOfRange => {
            limit_exceeded("request_bytes", MAX_REQUEST_BYTES).into_http()
        }
        _ => response,
    }
}

/// Purges keys that have been unused for `unused_for`, about once an hour, until the daemon drains.
async fn purge<S: Store>(lessor: Lessor<S>, unused_for: Duration, draining: CancellationToken) {
    loop {
        let pause = PURGE_PERIOD.mul_f64(0.5 + fastrand::f64());
        tokio::select! {
            () = sleep(pause) => {}
            () = draining.cancelled() => return,
        }
        let purged = tokio::select! {
            purged = lessor.store().purge(unused_for) => purged,
            () = draining.cancelled() => return,
        };
        match purged {
            Ok(0) => {}
            Ok(purged) => tracing::info!(purged, "purged keys that have long been unused"),
            Err(error) => tracing::warn!(%error, "could not purge; trying again later"),
        }
    }
}

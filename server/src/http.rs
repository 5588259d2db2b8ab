//! The HTTP side port: whether this daemon should be asked, and its metrics.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::health::{Health, Readiness};
use crate::lessor::Lessor;
use crate::meter::Meter;
use crate::store::{FeedState, Store};

/// Serves `/livez`, `/readyz` and `/metrics` until `ended`.
pub(crate) async fn serve<S: Store>(
    listener: TcpListener,
    health: Health,
    lessor: Lessor<S>,
    meter: Meter,
    ended: CancellationToken,
) {
    let meter = Arc::new(meter);
    let ready = move || async move {
        let store = lessor.store();
        let (code, state) = match health.readiness() {
            Readiness::Ready => (StatusCode::OK, format!("ready{}", feed(store))),
            Readiness::StoreAway => (StatusCode::SERVICE_UNAVAILABLE, "the store does not answer".to_owned()),
            Readiness::Draining => (StatusCode::SERVICE_UNAVAILABLE, "draining".to_owned()),
        };
        (code, format!("{state}\nstore={} id={}\n", store.name(), store.id()))
    };
    let metrics = move || async move {
        let text = meter.text().map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
        Ok::<_, StatusCode>(([(CONTENT_TYPE, Meter::CONTENT_TYPE)], text))
    };
    let routes = Router::new()
        .route("/livez", get(async || "alive\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics));
    let address = listener.local_addr().map_or_else(|_| String::new(), |at: SocketAddr| at.to_string());
    let serve = axum::serve(listener, routes).with_graceful_shutdown(ended.cancelled_owned());
    if let Err(error) = serve.await {
        tracing::error!(%error, address, "the HTTP side port failed");
    }
}

/// How the change feed stands, for people. Without it the daemon looks for itself, later: it is ready all the same.
fn feed(store: &impl Store) -> String {
    match store.feed_state() {
        FeedState::Off => String::new(),
        FeedState::Behind(lag) => format!(", change feed {}ms behind", lag.as_millis()),
        FeedState::Broken => ", change feed broken: what other daemons do is noticed late".to_owned(),
    }
}

//! The HTTP side port: `/livez`, `/readyz` and `/metrics`.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use prometheus_client::metrics::counter::Counter;
use tokio::net::TcpListener;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::engine::Lessor;
use crate::health::{Health, Readiness};
use crate::metrics::registry::MetricsRegistry;
use crate::store::{FeedState, Store};
use crate::transport::accept::connections;
use crate::transport::listener::{ConnectionSlot, serve_all};

/// How many connections may be open at once.
const CONNECTIONS: usize = 128;
/// How long a request may take to arrive, and how long a connection may last in all.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How much of the cause of a failure is shown, in characters. The log has all of it.
const CAUSE_CHARS: usize = 200;

/// Serves `/livez`, `/readyz` and `/metrics` until `ended` is cancelled.
pub(crate) async fn serve<S: Store>(
    listener: TcpListener,
    refused: Counter,
    health: Health,
    lessor: Lessor<S>,
    registry: MetricsRegistry,
    ended: CancellationToken,
) {
    let registry = Arc::new(registry);
    let ready = move || async move {
        let store = lessor.store();
        let (code, state) = match health.readiness() {
            Readiness::Ready => (StatusCode::OK, format!("ready{}", feed_text(store))),
            Readiness::StoreUnavailable(cause) => {
                (StatusCode::SERVICE_UNAVAILABLE, format!("the store does not answer: {}", brief(&cause)))
            }
            Readiness::Draining => (StatusCode::SERVICE_UNAVAILABLE, "draining".to_owned()),
        };
        (code, format!("{state}\nstore={} id={}\n", store.name(), store.id()))
    };
    let metrics = move || async move {
        let text = registry.text().map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
        Ok::<_, StatusCode>(([(CONTENT_TYPE, MetricsRegistry::CONTENT_TYPE)], text))
    };
    let routes = Router::new()
        .route("/livez", get(async || "alive\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics));
    let mut http = auto::Builder::new(TokioExecutor::new()).http1_only();
    // One request for each connection, so that idle connections do not use up the few slots.
    http.http1().timer(TokioTimer::new()).header_read_timeout(TIMEOUT).keep_alive(false);
    let serve = |stream, slot| {
        let (http, routes, ended) = (http.clone(), routes.clone(), ended.clone());
        async move {
            let _slot: ConnectionSlot = slot;
            let response = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes));
            tokio::select! {
                _ = timeout(TIMEOUT, response) => {}
                () = ended.cancelled() => {}
            }
        }
    };
    serve_all(connections(listener), CONNECTIONS, refused, ended.clone(), serve).await;
}

/// Returns the beginning of a text, as one line.
fn brief(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").chars().take(CAUSE_CHARS).collect()
}

/// Describes the state of the change feed, which does not affect readiness. Without the feed the
/// daemon polls the store, and learns later what other daemons did.
fn feed_text(store: &impl Store) -> String {
    match store.feed_state() {
        FeedState::Off => String::new(),
        FeedState::Behind(lag) => format!(", change feed {}ms behind", lag.as_millis()),
        FeedState::Broken => ", change feed broken: what other daemons do is noticed late".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_a_short_line() {
        assert_eq!(brief("no space\n  left\ton device\n"), "no space left on device");
        assert_eq!(brief(&"é".repeat(1000)), "é".repeat(CAUSE_CHARS));
    }
}

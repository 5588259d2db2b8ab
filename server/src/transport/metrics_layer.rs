//! The layer that counts calls by method and status code, measures their duration, and counts open
//! streams.
//!
//! The layer reads the status code from headers or trailers, so it decodes no messages.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use http_body::{Frame, SizeHint};
use leased_proto::v1::admin_service_server::SERVICE_NAME as ADMIN_SERVICE;
use leased_proto::v1::lease_service_server::SERVICE_NAME as LEASE_SERVICE;
use pin_project_lite::pin_project;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use tokio::time::Instant;
use tonic::body::Body;
use tonic::codegen::Bytes;
use tonic::codegen::http::{HeaderMap, Request, Response};
use tonic::{Code, Status};
use tower::{Layer, Service};

use super::receiving::MessageCount;
use super::sending::{CHUNK_BYTES, next_chunk};
use crate::metrics::registry::{GaugeGuard, Histogram, MetricsRegistry};

/// The methods that are counted: first the unary ones, then the streams.
const METHODS: [(&str, &str); 8] = [
    (LEASE_SERVICE, "Acquire"),
    (LEASE_SERVICE, "Release"),
    (LEASE_SERVICE, "Touch"),
    (LEASE_SERVICE, "Get"),
    (LEASE_SERVICE, "List"),
    (ADMIN_SERVICE, "Revoke"),
    (LEASE_SERVICE, "KeepAlive"),
    (LEASE_SERVICE, "Watch"),
];
/// How many of [`METHODS`] are unary.
const UNARY: usize = 6;
const STREAMS: usize = METHODS.len() - UNARY;

/// Returns how many messages a request of a method has.
///
/// A reflection call may send many, but counts as one message, so that its time is bounded like
/// that of any other request.
pub(crate) fn request_messages(path: &str) -> MessageCount {
    match path.rsplit_once('/') {
        Some((_, "KeepAlive")) => MessageCount::Many,
        _ => MessageCount::One,
    }
}

/// Returns how many messages a response of a method has. Reflection counts as one message here too.
pub(crate) fn response_messages(path: &str) -> MessageCount {
    match path.rsplit_once('/') {
        // `Watch` is also a method of the health service, and a stream there too.
        Some((_, "KeepAlive" | "Watch")) => MessageCount::Many,
        _ => MessageCount::One,
    }
}

/// The status codes in the order of their numbers:
/// <https://grpc.github.io/grpc/core/md_doc_statuscodes.html>.
const CODES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

/// Buckets for durations, in microseconds: from a call that needs no store to one that waits in a
/// queue.
const DURATIONS: [u64; 15] = [
    250,
    500,
    1_000,
    2_500,
    5_000,
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    5_000_000,
    30_000_000,
    300_000_000,
];

/// The metrics of all methods.
#[derive(Debug)]
struct CallMetrics {
    calls: [[Counter; CODES.len()]; METHODS.len()],
    durations: [Histogram; UNARY],
    open: [Gauge; STREAMS],
}

/// Counts the calls that pass.
#[derive(Debug, Clone)]
pub(crate) struct MetricsLayer(Arc<CallMetrics>);

impl MetricsLayer {
    /// Registers the metrics, with all series at zero.
    pub(crate) fn new(registry: &mut MetricsRegistry) -> Self {
        let labels = METHODS.map(|(_, method)| CODES.map(|code| [("method", method), ("code", code)]));
        let unary: [&str; UNARY] = std::array::from_fn(|method| METHODS[method].1);
        let streams: [&str; STREAMS] = std::array::from_fn(|method| METHODS[UNARY + method].1);
        let durations = ("leased_call_duration_seconds", "How long unary calls took");
        Self(Arc::new(CallMetrics {
            calls: registry.by_labels(
                ("leased_calls", "Calls that have ended, by status code"),
                labels,
                Counter::default,
            ),
            durations: registry.by_label(durations, "method", unary, || Histogram::of_durations(&DURATIONS)),
            open: registry.by_label(
                ("leased_open_streams", "Streams that are open"),
                "method",
                streams,
                Gauge::default,
            ),
        }))
    }

    /// Notes that a call begins. `None` if its method is not counted.
    fn begin(&self, path: &str) -> Option<MeteredCall> {
        let (service, name) = path.strip_prefix('/')?.split_once('/')?;
        let method = METHODS.iter().position(|method| *method == (service, name))?;
        Some(MeteredCall {
            metrics: Arc::clone(&self.0),
            method,
            began_at: Instant::now(),
            // Kept by a call that is dropped without a status, because its caller has gone away.
            code: Code::Cancelled,
        })
    }
}

/// A call that has not ended. Dropping it counts the call with its code and duration.
#[derive(Debug)]
struct MeteredCall {
    metrics: Arc<CallMetrics>,
    method: usize,
    began_at: Instant,
    code: Code,
}

impl MeteredCall {
    /// Counts an open stream until the guard is dropped. `None` for unary methods.
    fn open(&self) -> Option<GaugeGuard> {
        let stream = self.method.checked_sub(UNARY)?;
        Some(GaugeGuard::one_more(&self.metrics.open[stream]))
    }
}

impl Drop for MeteredCall {
    fn drop(&mut self) {
        self.metrics.calls[self.method][self.code as usize].inc();
        if let Some(durations) = self.metrics.durations.get(self.method) {
            durations.observe_duration(self.began_at.elapsed());
        }
    }
}

/// Returns the status code in headers or trailers.
fn code(headers: &HeaderMap) -> Option<Code> {
    Some(Code::from_bytes(headers.get(Status::GRPC_STATUS)?.as_bytes()))
}

impl<S> Layer<S> for MetricsLayer {
    type Service = MeteredService<S>;

    fn layer(&self, inner: S) -> MeteredService<S> {
        MeteredService { inner, metrics: self.clone() }
    }
}

/// A service whose calls are counted.
#[derive(Debug, Clone)]
pub(crate) struct MeteredService<S> {
    inner: S,
    metrics: MetricsLayer,
}

impl<S, B> Service<Request<B>> for MeteredService<S>
where
    S: Service<Request<B>, Response = Response<Body>>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let call = self.metrics.begin(request.uri().path());
        ResponseFuture { inner: self.inner.call(request), call }
    }
}

pin_project! {
    /// The response of a [`MeteredService`]. For a stream, its headers.
    pub(crate) struct ResponseFuture<F> {
        #[pin]
        inner: F,
        call: Option<MeteredCall>,
    }
}

impl<F, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<Body>, E>>,
{
    type Output = Result<Response<Body>, E>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let response = ready!(this.inner.poll(context))?;
        let Some(mut call) = this.call.take() else { return Poll::Ready(Ok(response)) };
        // A code in the headers means that the response has no message and no trailers.
        let refused = code(response.headers());
        if let (None, Some(open)) = (refused, call.open()) {
            let stream =
                |messages| Body::new(MeteredStream { messages, rest: Bytes::new(), call, _open: open });
            return Poll::Ready(Ok(response.map(stream)));
        }
        call.code = refused.unwrap_or(Code::Ok);
        Poll::Ready(Ok(response))
    }
}

/// The body of a stream. Counts the call with the code in the trailers, or as cancelled when the
/// caller goes away.
///
/// The body hands out chunks of at most [`CHUNK_BYTES`]. A connection polls for the next chunk only
/// when its caller has read nearly all of the data before it, so a stream does not run far ahead of
/// its caller.
#[derive(Debug)]
struct MeteredStream {
    messages: Body,
    /// The part of the latest data that has not been handed out.
    rest: Bytes,
    call: MeteredCall,
    _open: GaugeGuard,
}

impl http_body::Body for MeteredStream {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if !self.rest.is_empty() {
            return Poll::Ready(Some(Ok(next_chunk(&mut self.rest))));
        }
        let Some(frame) = ready!(Pin::new(&mut self.messages).poll_frame(context)?) else {
            return Poll::Ready(None);
        };
        if let Some(code) = frame.trailers_ref().and_then(code) {
            self.call.code = code;
        }
        if frame.data_ref().is_none_or(|data| data.len() <= CHUNK_BYTES) {
            return Poll::Ready(Some(Ok(frame)));
        }
        self.rest = frame.into_data().unwrap_or_default();
        Poll::Ready(Some(Ok(next_chunk(&mut self.rest))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.messages.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.messages.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_in_the_order_of_their_numbers() {
        for (number, name) in CODES.iter().enumerate() {
            let code = Code::from(i32::try_from(number).expect("a code"));
            assert_eq!(code as usize, number);
            assert_eq!(format!("{code:?}").to_uppercase(), name.replace('_', ""));
        }
    }

    #[test]
    fn a_call_of_another_service_is_not_counted() {
        let calls = MetricsLayer::new(&mut MetricsRegistry::default());
        assert!(calls.begin("/leased.v1.LeaseService/Acquire").is_some());
        assert!(calls.begin("/leased.v1.AdminService/Acquire").is_none());
        assert!(calls.begin("/grpc.health.v1.Health/Check").is_none());
        assert!(calls.begin("*").is_none());
    }
}

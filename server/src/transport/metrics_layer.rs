//! Calls as they are counted: by method and code, with how long they took and how many streams are open. It sees heads and
//! trailers, and no messages.

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

use super::receiving::Expected;
use super::sending::{PIECE, piece};
use crate::metrics::registry::{Histogram, Meter, Present};

/// The methods that are counted: those that answer once, then the streams.
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
const UNARY: usize = 6;
const STREAMS: usize = METHODS.len() - UNARY;

/// What a method is sent. Methods of the health service take one message. Reflection takes many, but no caller needs it for
/// longer than a request may take, and each call of it should have an end.
pub(crate) fn expected(path: &str) -> Expected {
    match path.rsplit_once('/') {
        Some((_, "KeepAlive")) => Expected::Many,
        _ => Expected::One,
    }
}

/// What a method answers with; reflection as if it were one message.
pub(crate) fn answered(path: &str) -> Expected {
    match path.rsplit_once('/') {
        // The health service has a `Watch` as well.
        Some((_, "KeepAlive" | "Watch")) => Expected::Many,
        _ => Expected::One,
    }
}

/// In the order of their numbers: <https://grpc.github.io/grpc/core/md_doc_statuscodes.html>.
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

/// From a call that the store is not asked for to one that waits for long, in microseconds.
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

/// The counters of all methods.
#[derive(Debug)]
struct Counts {
    calls: [[Counter; CODES.len()]; METHODS.len()],
    durations: [Histogram; UNARY],
    open: [Gauge; STREAMS],
}

/// Counts the calls that pass.
#[derive(Debug, Clone)]
pub(crate) struct CountCalls(Arc<Counts>);

impl CountCalls {
    /// Nothing has been called yet.
    pub(crate) fn new(meter: &mut Meter) -> Self {
        let labels = METHODS.map(|(_, method)| CODES.map(|code| [("method", method), ("code", code)]));
        let unary: [&str; UNARY] = std::array::from_fn(|method| METHODS[method].1);
        let streams: [&str; STREAMS] = std::array::from_fn(|method| METHODS[UNARY + method].1);
        let durations = ("leased_call_duration_seconds", "How long calls took that are answered once");
        Self(Arc::new(Counts {
            calls: meter.table(
                ("leased_calls", "Calls that have ended, by status code"),
                labels,
                Counter::default,
            ),
            durations: meter.by(durations, "method", unary, || Histogram::of_durations(&DURATIONS)),
            open: meter.by(
                ("leased_open_streams", "Streams that are open"),
                "method",
                streams,
                Gauge::default,
            ),
        }))
    }

    /// A call begins, if it is one that counts.
    fn begin(&self, path: &str) -> Option<Call> {
        let (service, name) = path.strip_prefix('/')?.split_once('/')?;
        let method = METHODS.iter().position(|method| *method == (service, name))?;
        // A caller that goes away is told nothing.
        Some(Call { counts: Arc::clone(&self.0), method, began_at: Instant::now(), code: Code::Cancelled })
    }
}

/// A call that has not ended. Dropping it ends it.
#[derive(Debug)]
struct Call {
    counts: Arc<Counts>,
    method: usize,
    began_at: Instant,
    code: Code,
}

impl Call {
    /// A stream's share in the count of those that are open; `None` for methods that answer once.
    fn open(&self) -> Option<Present> {
        let stream = self.method.checked_sub(UNARY)?;
        Some(Present::of(&self.counts.open[stream]))
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.counts.calls[self.method][self.code as usize].inc();
        if let Some(durations) = self.counts.durations.get(self.method) {
            durations.took(self.began_at.elapsed());
        }
    }
}

/// The code in a head or in trailers.
fn code(headers: &HeaderMap) -> Option<Code> {
    Some(Code::from_bytes(headers.get(Status::GRPC_STATUS)?.as_bytes()))
}

impl<S> Layer<S> for CountCalls {
    type Service = Counted<S>;

    fn layer(&self, service: S) -> Counted<S> {
        Counted { service, counter: self.clone() }
    }
}

/// A service whose calls are counted.
#[derive(Debug, Clone)]
pub(crate) struct Counted<S> {
    service: S,
    counter: CountCalls,
}

impl<S, B> Service<Request<B>> for Counted<S>
where
    S: Service<Request<B>, Response = Response<Body>>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Answer<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let call = self.counter.begin(request.uri().path());
        Answer { answer: self.service.call(request), call }
    }
}

pin_project! {
    /// The answer to a call.
    pub(crate) struct Answer<F> {
        #[pin]
        answer: F,
        call: Option<Call>,
    }
}

impl<F, E> Future for Answer<F>
where
    F: Future<Output = Result<Response<Body>, E>>,
{
    type Output = Result<Response<Body>, E>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let response = ready!(this.answer.poll(context))?;
        let Some(mut call) = this.call.take() else { return Poll::Ready(Ok(response)) };
        let refused = code(response.headers());
        if let (None, Some(open)) = (refused, call.open()) {
            let stream = |messages| Body::new(Stream { messages, rest: Bytes::new(), call, _open: open });
            return Poll::Ready(Ok(response.map(stream)));
        }
        call.code = refused.unwrap_or(Code::Ok);
        Poll::Ready(Ok(response))
    }
}

/// A stream's messages, until its code has been told or the caller has gone. They are handed over in pieces, so that a stream is
/// asked for its next message only when its caller has taken nearly all of those before.
#[derive(Debug)]
struct Stream {
    messages: Body,
    /// What is still to be handed over of the latest messages.
    rest: Bytes,
    call: Call,
    _open: Present,
}

impl http_body::Body for Stream {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if !self.rest.is_empty() {
            return Poll::Ready(Some(Ok(piece(&mut self.rest))));
        }
        let Some(frame) = ready!(Pin::new(&mut self.messages).poll_frame(context)?) else {
            return Poll::Ready(None);
        };
        if let Some(code) = frame.trailers_ref().and_then(code) {
            self.call.code = code;
        }
        if frame.data_ref().is_none_or(|data| data.len() <= PIECE) {
            return Poll::Ready(Some(Ok(frame)));
        }
        self.rest = frame.into_data().unwrap_or_default();
        Poll::Ready(Some(Ok(piece(&mut self.rest))))
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
    fn codes_stand_in_the_order_of_their_numbers() {
        for (number, name) in CODES.iter().enumerate() {
            let code = Code::from(i32::try_from(number).expect("a code"));
            assert_eq!(code as usize, number);
            assert_eq!(format!("{code:?}").to_uppercase(), name.replace('_', ""));
        }
    }

    #[test]
    fn a_call_of_another_service_does_not_count() {
        let calls = CountCalls::new(&mut Meter::default());
        assert!(calls.begin("/leased.v1.LeaseService/Acquire").is_some());
        assert!(calls.begin("/leased.v1.AdminService/Acquire").is_none());
        assert!(calls.begin("/grpc.health.v1.Health/Check").is_none());
        assert!(calls.begin("*").is_none());
    }
}

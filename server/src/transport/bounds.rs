//! The layer that bounds every call: it enforces the deadline, bounds the request and the response,
//! and turns a panic into a status of the call.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use pin_project_lite::pin_project;
use tokio::time::{Sleep, sleep};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Bytes;
use tonic::codegen::http::{Request, Response};
use tower::{Layer, Service};

use super::metrics_layer::{request_messages, response_messages};
use super::receiving::{BytesInUse, MessageCount, ReceiveBudget, Receiving};
use super::sending::{self, LargeBody};
use crate::grpc::request::grpc_timeout;
use crate::grpc::response::WITH_ITS_ID;
use crate::panics::{Contained, contain};

/// Bounds the calls that pass.
#[derive(Debug, Clone)]
pub(crate) struct BoundsLayer(pub(crate) ReceiveBudget);

impl<S> Layer<S> for BoundsLayer {
    type Service = BoundedService<S>;

    fn layer(&self, inner: S) -> BoundedService<S> {
        BoundedService { inner, budget: self.0.clone() }
    }
}

/// A service whose calls are bounded.
#[derive(Debug, Clone)]
pub(crate) struct BoundedService<S> {
    inner: S,
    budget: ReceiveBudget,
}

impl<S, B> Service<Request<B>> for BoundedService<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let deadline = deadline(&request).map(sleep);
        let path = request.uri().path();
        let (expected, messages) = (request_messages(path), response_messages(path));
        let connection = request.extensions().get::<BytesInUse>().cloned().unwrap_or_default();
        let receiving = |body| Body::new(Receiving::new(body, expected, self.budget.clone(), connection));
        let request = request.map(receiving);
        ResponseFuture { inner: contain(self.inner.call(request)), messages, deadline }
    }
}

/// Returns how long the caller waits for a response.
fn deadline<B>(request: &Request<B>) -> Option<Duration> {
    grpc_timeout(request.headers().get("grpc-timeout")?.to_str().ok()?)
}

pin_project! {
    /// The response of a [`BoundedService`]. For a stream, its headers: the deadline does not cover
    /// the messages.
    pub(crate) struct ResponseFuture<F> {
        #[pin]
        inner: Contained<F>,
        messages: MessageCount,
        #[pin]
        deadline: Option<Sleep>,
    }
}

impl<F> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<Body>, Infallible>>,
{
    type Output = Result<Response<Body>, Infallible>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        if let Poll::Ready(response) = this.inner.poll(context) {
            let response = response.unwrap_or_else(|_| Ok(panicked().into_http()));
            return Poll::Ready(response.map(|response| bounded(response, *this.messages)));
        }
        // Enforced here, because tonic's server would answer CANCELLED.
        let late = this.deadline.as_pin_mut().map_or(Poll::Pending, |deadline| deadline.poll(context));
        late.map(|()| Ok(Status::deadline_exceeded("the call's deadline has passed").into_http()))
    }
}

/// Bounds a response: starts the deadline for reading a unary one, and gives a large one its
/// [`LargeBody`].
fn bounded(mut response: Response<Body>, messages: MessageCount) -> Response<Body> {
    if messages == MessageCount::One {
        sending::start_deadline();
    }
    match response.extensions_mut().remove::<LargeBody>() {
        Some(large) => response.map(|_| Body::new(large)),
        None => response,
    }
}

/// Returns the status of a call or stream that panicked. The status has no `ErrorInfo`, because
/// what the call did is unknown.
pub(crate) fn panicked() -> Status {
    Status::unavailable(format!(
        "the daemon failed in this call, and its log says where; repeat the call, {WITH_ITS_ID}"
    ))
}

#[cfg(test)]
mod tests {
    use tonic::Code;
    use tower::{ServiceExt, service_fn};

    use super::*;

    async fn code<F>(timeout: &str, handler: fn() -> F) -> Option<Code>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let service = service_fn(move |_| async move {
            handler().await;
            Ok::<_, Infallible>(Response::new(Body::empty()))
        });
        let request = Request::builder().header("grpc-timeout", timeout).body(Body::empty());
        let bounds = BoundsLayer(ReceiveBudget::new(1000));
        let response = bounds.layer(service).oneshot(request.expect("a request")).await;
        let response = response.expect("a response");
        Status::from_header_map(response.headers()).map(|status| status.code())
    }

    #[tokio::test(start_paused = true)]
    async fn a_passed_deadline_is_answered_deadline_exceeded() {
        assert_eq!(code("10m", || sleep(Duration::from_millis(11))).await, Some(Code::DeadlineExceeded));
        assert_eq!(code("0n", std::future::pending).await, Some(Code::DeadlineExceeded));
        assert_eq!(code("10m", || sleep(Duration::from_millis(9))).await, None);
        assert_eq!(code("nonsense", || sleep(Duration::from_secs(1))).await, None);
    }

    #[tokio::test]
    async fn a_call_whose_handler_panics_is_unavailable_and_the_next_one_is_served() {
        assert_eq!(code("1S", || async { panic!("in a test") }).await, Some(Code::Unavailable));
        assert_eq!(code("1S", || async {}).await, None);
    }
}

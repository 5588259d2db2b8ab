//! What every call is given before its handler sees it: its deadline, bounds on what comes in and goes out, and a panic that stays
//! its own.

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

use super::metrics_layer::{answered, expected};
use super::receiving::{Expected, Receiving, Room, Taken};
use super::sending::{self, Large};
use crate::grpc::request::grpc_timeout;
use crate::grpc::response::WITH_ITS_ID;
use crate::panics::{Contained, contain};

/// Bounds the calls that pass.
#[derive(Debug, Clone)]
pub(crate) struct BoundCalls(pub(crate) Room);

impl<S> Layer<S> for BoundCalls {
    type Service = Bounded<S>;

    fn layer(&self, service: S) -> Bounded<S> {
        Bounded { service, room: self.0.clone() }
    }
}

/// A service whose calls are bounded.
#[derive(Debug, Clone)]
pub(crate) struct Bounded<S> {
    service: S,
    room: Room,
}

impl<S, B> Service<Request<B>> for Bounded<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answer<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let deadline = deadline(&request).map(sleep);
        let path = request.uri().path();
        let (expected, answered) = (expected(path), answered(path));
        let connection = request.extensions().get::<Taken>().cloned().unwrap_or_default();
        let receiving = |body| Body::new(Receiving::new(body, expected, self.room.clone(), connection));
        let request = request.map(receiving);
        Answer { answer: contain(self.service.call(request)), answered, deadline }
    }
}

/// How long the caller will wait.
fn deadline<B>(request: &Request<B>) -> Option<Duration> {
    grpc_timeout(request.headers().get("grpc-timeout")?.to_str().ok()?)
}

pin_project! {
    /// The answer to a call; to a stream, its head.
    pub(crate) struct Answer<F> {
        #[pin]
        answer: Contained<F>,
        answered: Expected,
        #[pin]
        deadline: Option<Sleep>,
    }
}

impl<F> Future for Answer<F>
where
    F: Future<Output = Result<Response<Body>, Infallible>>,
{
    type Output = Result<Response<Body>, Infallible>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        if let Poll::Ready(answer) = this.answer.poll(context) {
            let answer = answer.unwrap_or_else(|_| Ok(panicked().into_http()));
            return Poll::Ready(answer.map(|answer| bounded(answer, *this.answered)));
        }
        // Not left to tonic's server: that calls it CANCELLED.
        let late = this.deadline.as_pin_mut().map_or(Poll::Pending, |deadline| deadline.poll(context));
        late.map(|()| Ok(Status::deadline_exceeded("the call's deadline has passed").into_http()))
    }
}

/// The answer as it goes out: one message is to be taken in time, and a large one has a body of its own.
fn bounded(mut answer: Response<Body>, answered: Expected) -> Response<Body> {
    if answered == Expected::One {
        sending::begin();
    }
    match answer.extensions_mut().remove::<Large>() {
        Some(large) => answer.map(|_| Body::new(large)),
        None => answer,
    }
}

/// The status of a call or stream that panicked. It carries no reason, since nobody knows what was done.
pub(crate) fn panicked() -> Status {
    Status::unavailable(format!(
        "the daemon failed in this call, and its log says where; repeat it, {WITH_ITS_ID}"
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
        let bounds = BoundCalls(Room::new(1000));
        let answer = bounds.layer(service).oneshot(request.expect("a request")).await;
        let answer = answer.expect("an answer");
        Status::from_header_map(answer.headers()).map(|status| status.code())
    }

    #[tokio::test(start_paused = true)]
    async fn a_passed_deadline_is_called_that() {
        assert_eq!(code("10m", || sleep(Duration::from_millis(11))).await, Some(Code::DeadlineExceeded));
        assert_eq!(code("0n", std::future::pending).await, Some(Code::DeadlineExceeded));
        assert_eq!(code("10m", || sleep(Duration::from_millis(9))).await, None);
        assert_eq!(code("nonsense", || sleep(Duration::from_secs(1))).await, None);
    }

    #[tokio::test]
    async fn a_handler_that_panics_is_unavailable_and_the_next_call_is_not() {
        assert_eq!(code("1S", || async { panic!("in a test") }).await, Some(Code::Unavailable));
        assert_eq!(code("1S", || async {}).await, None);
    }
}

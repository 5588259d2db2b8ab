//! Every answer says from which store it is.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use pin_project_lite::pin_project;
use tonic::codegen::http::{HeaderName, HeaderValue, Request, Response};
use tower::{Layer, Service};
use uuid::Uuid;

/// The initial metadata that names the store.
const STORE: HeaderName = HeaderName::from_static("leased-store");

/// Puts the identity of a store on all answers. The value is made once and shared.
#[derive(Debug, Clone)]
pub(crate) struct Stamp(HeaderValue);

impl Stamp {
    pub(crate) fn of(store: Uuid) -> Self {
        let text = store.to_string();
        Self(HeaderValue::from_maybe_shared(text).expect("a UUID is ASCII"))
    }
}

impl<S> Layer<S> for Stamp {
    type Service = Stamped<S>;

    fn layer(&self, service: S) -> Stamped<S> {
        Stamped { service, stamp: self.0.clone() }
    }
}

/// A service whose answers say from which store they are.
#[derive(Debug, Clone)]
pub(crate) struct Stamped<S> {
    service: S,
    stamp: HeaderValue,
}

impl<S, Q, A> Service<Request<Q>> for Stamped<S>
where
    S: Service<Request<Q>, Response = Response<A>>,
{
    type Response = Response<A>;
    type Error = S::Error;
    type Future = Answer<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, request: Request<Q>) -> Self::Future {
        Answer { answer: self.service.call(request), stamp: self.stamp.clone() }
    }
}

pin_project! {
    /// The answer to a call.
    pub(crate) struct Answer<F> {
        #[pin]
        answer: F,
        stamp: HeaderValue,
    }
}

impl<F, A, E> Future for Answer<F>
where
    F: Future<Output = Result<Response<A>, E>>,
{
    type Output = Result<Response<A>, E>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let mut answer = ready!(this.answer.poll(context))?;
        answer.headers_mut().insert(STORE, this.stamp.clone());
        Poll::Ready(Ok(answer))
    }
}

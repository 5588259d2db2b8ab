//! The layer that adds the store's identity to every response.
//!
//! Clients compare the identity over all their daemons. Two daemons with different stores would
//! both grant the same key.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use pin_project_lite::pin_project;
use tonic::codegen::http::{HeaderName, HeaderValue, Request, Response};
use tower::{Layer, Service};
use uuid::Uuid;

/// The initial metadata with the identity of the store.
const STORE: HeaderName = HeaderName::from_static("leased-store");

/// Adds the identity of a store to all responses.
#[derive(Debug, Clone)]
pub(crate) struct StoreIdLayer(HeaderValue);

impl StoreIdLayer {
    pub(crate) fn new(store: Uuid) -> Self {
        // Made once: clones of the value share its bytes.
        let text = store.to_string();
        Self(HeaderValue::from_maybe_shared(text).expect("a UUID is ASCII"))
    }
}

impl<S> Layer<S> for StoreIdLayer {
    type Service = StoreIdService<S>;

    fn layer(&self, inner: S) -> StoreIdService<S> {
        StoreIdService { inner, store_id: self.0.clone() }
    }
}

/// A service whose responses have the identity of a store.
#[derive(Debug, Clone)]
pub(crate) struct StoreIdService<S> {
    inner: S,
    store_id: HeaderValue,
}

impl<S, Q, A> Service<Request<Q>> for StoreIdService<S>
where
    S: Service<Request<Q>, Response = Response<A>>,
{
    type Response = Response<A>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Q>) -> Self::Future {
        ResponseFuture { inner: self.inner.call(request), store_id: self.store_id.clone() }
    }
}

pin_project! {
    /// The response of a [`StoreIdService`].
    pub(crate) struct ResponseFuture<F> {
        #[pin]
        inner: F,
        store_id: HeaderValue,
    }
}

impl<F, A, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<A>, E>>,
{
    type Output = Result<Response<A>, E>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let mut response = ready!(this.inner.poll(context))?;
        response.headers_mut().insert(STORE, this.store_id.clone());
        Poll::Ready(Ok(response))
    }
}

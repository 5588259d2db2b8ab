//! Calls the lease service without tonic's router.
//!
//! The router matches, boxes and copies each call once more. That costs one fifteenth of the
//! throughput of acquire and release pairs. All other services stay behind the router.

use std::convert::Infallible;
use std::task::{Context, Poll, ready};

use futures_util::future::Either;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tonic::server::NamedService;
use tonic::service::Routes;
use tower::{Layer, Service};

use super::metrics_layer::request_messages;
use super::receiving::MessageCount;

/// The layer that puts a direct route to one service in front of the router.
#[derive(Debug, Clone)]
pub(crate) struct DirectRoute<S> {
    /// Serves methods whose request is one message.
    single: S,
    /// Serves methods whose request is a stream, and accepts larger messages.
    streaming: S,
}

impl<S> DirectRoute<S> {
    /// `single` and `streaming` are the same service with different limits on messages.
    pub(crate) fn to(single: S, streaming: S) -> Self {
        Self { single, streaming }
    }
}

impl<S: Clone> Layer<Routes> for DirectRoute<S> {
    type Service = DirectService<S>;

    fn layer(&self, routes: Routes) -> DirectService<S> {
        DirectService { direct: self.clone(), routes }
    }
}

/// Hands each call to the directly routed service, or to the router.
#[derive(Debug, Clone)]
pub(crate) struct DirectService<S> {
    direct: DirectRoute<S>,
    routes: Routes,
}

impl<S> Service<Request<Body>> for DirectService<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + NamedService,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Either<S::Future, <Routes as Service<Request<Body>>>::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // All three, because only the path in `call` decides which of them serves the request.
        ready!(self.direct.single.poll_ready(context))?;
        ready!(self.direct.streaming.poll_ready(context))?;
        Service::<Request<Body>>::poll_ready(&mut self.routes, context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let path = request.uri().path();
        if !is_method_of(path, S::NAME) {
            return Either::Right(self.routes.call(request));
        }
        Either::Left(match request_messages(path) {
            MessageCount::One => self.direct.single.call(request),
            MessageCount::Many => self.direct.streaming.call(request),
        })
    }
}

/// Returns true if a path such as `/service/method` names a method of the service.
fn is_method_of(path: &str, service: &str) -> bool {
    let rest = path.strip_prefix('/').and_then(|path| path.strip_prefix(service));
    rest.is_some_and(|rest| rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::is_method_of;

    #[test]
    fn a_path_names_a_service_in_full() {
        assert!(is_method_of("/leased.v1.LeaseService/Acquire", "leased.v1.LeaseService"));
        assert!(!is_method_of("/leased.v1.LeaseServices/Acquire", "leased.v1.LeaseService"));
        assert!(!is_method_of("/leased.v1.LeaseService", "leased.v1.LeaseService"));
        assert!(!is_method_of("leased.v1.LeaseService/Acquire", "leased.v1.LeaseService"));
        assert!(!is_method_of("*", "leased.v1.LeaseService"));
    }
}

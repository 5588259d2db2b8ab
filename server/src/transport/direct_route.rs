//! The short way to the lease service: past the routes, on which each call is matched, boxed and copied once more. A method
//! that is sent a stream has a service of its own, which takes larger messages.

use std::convert::Infallible;
use std::task::{Context, Poll, ready};

use futures_util::future::Either;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tonic::server::NamedService;
use tonic::service::Routes;
use tower::{Layer, Service};

use super::metrics_layer::expected;
use super::receiving::Expected;

/// Lays the short way to a service beside the routes.
#[derive(Debug, Clone)]
pub(crate) struct Express<S> {
    /// For methods that are sent one message.
    calls: S,
    /// For methods that are sent a stream.
    streams: S,
}

impl<S> Express<S> {
    /// The short way to a service, of which `streams` serves the methods that are sent a stream.
    pub(crate) fn to(calls: S, streams: S) -> Self {
        Self { calls, streams }
    }
}

impl<S: Clone> Layer<Routes> for Express<S> {
    type Service = Fork<S>;

    fn layer(&self, routes: Routes) -> Fork<S> {
        Fork { express: self.clone(), routes }
    }
}

/// Hands each call to the service it names, or to the routes.
#[derive(Debug, Clone)]
pub(crate) struct Fork<S> {
    express: Express<S>,
    routes: Routes,
}

impl<S> Service<Request<Body>> for Fork<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + NamedService,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Either<S::Future, <Routes as Service<Request<Body>>>::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        ready!(self.express.calls.poll_ready(context))?;
        ready!(self.express.streams.poll_ready(context))?;
        Service::<Request<Body>>::poll_ready(&mut self.routes, context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let path = request.uri().path();
        if !names(path, S::NAME) {
            return Either::Right(self.routes.call(request));
        }
        Either::Left(match expected(path) {
            Expected::One => self.express.calls.call(request),
            Expected::Many => self.express.streams.call(request),
        })
    }
}

/// Whether a path, as in `/service/method`, is one of the service's.
fn names(path: &str, service: &str) -> bool {
    let rest = path.strip_prefix('/').and_then(|path| path.strip_prefix(service));
    rest.is_some_and(|rest| rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::names;

    #[test]
    fn a_service_is_named_whole() {
        assert!(names("/leased.v1.LeaseService/Acquire", "leased.v1.LeaseService"));
        assert!(!names("/leased.v1.LeaseServices/Acquire", "leased.v1.LeaseService"));
        assert!(!names("/leased.v1.LeaseService", "leased.v1.LeaseService"));
        assert!(!names("leased.v1.LeaseService/Acquire", "leased.v1.LeaseService"));
        assert!(!names("*", "leased.v1.LeaseService"));
    }
}

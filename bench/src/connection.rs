//! A connection of the load generator: HTTP/2 and nothing around it. What this program spends is taken from those under
//! load, who share the processors with it, so tonic's channel with its queue and its layers is too dear.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use anyhow::{Context as _, Result};
use hyper::body::Incoming;
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::codegen::http::{Request, Response, Uri};

/// A connection to a gRPC server. Clones are the same one.
#[derive(Debug, Clone)]
pub(crate) struct Connection(SendRequest<Body>);

impl Connection {
    /// Connects to `origin`, as in `http://127.0.0.1:1`, which calls over the connection have to name, too.
    pub(crate) async fn to(origin: &Uri) -> Result<Self> {
        let stream = TcpStream::connect(origin.authority().context("an address")?.as_str()).await?;
        stream.set_nodelay(true)?;
        let (requests, connection) = handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
        // It ends with the last clone.
        tokio::spawn(connection);
        Ok(Self(requests))
    }
}

impl Service<Request<Body>> for Connection {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = hyper::Result<Response<Incoming>>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<hyper::Result<()>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

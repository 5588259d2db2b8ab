//! Calls of any gRPC server by their paths, for servers of which this program has no stub; with the buffers of our own
//! stubs, so that the load costs the same.

use anyhow::{Context, Result};
use leased_proto::SmallBuffers;
use tonic::client::Grpc;
use tonic::codegen::http::Uri;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::{IntoStreamingRequest, Streaming};

use crate::connection::Connection;

/// A connection with what gRPC puts around it. Clones are the same one.
#[derive(Debug, Clone)]
pub(crate) struct Client(Grpc<Connection>);

impl Client {
    pub(crate) async fn connect(address: &str) -> Result<Self> {
        let origin: Uri = address.parse()?;
        Ok(Self(Grpc::with_origin(Connection::to(&origin).await?, origin)))
    }

    pub(crate) async fn call<Q, A>(&mut self, path: &'static str, request: Q) -> Result<A>
    where
        Q: prost::Message + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        self.0.ready().await.context("the connection is lost")?;
        let path = PathAndQuery::from_static(path);
        let answer =
            self.0.unary(tonic::Request::new(request), path, SmallBuffers::<Q, A>::default()).await?;
        Ok(answer.into_inner())
    }

    /// Opens a stream; some servers answer this only when they answer the first message.
    pub(crate) async fn stream<Q, A>(
        &mut self,
        path: &'static str,
        messages: impl IntoStreamingRequest<Message = Q>,
    ) -> Result<Streaming<A>>
    where
        Q: prost::Message + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        self.0.ready().await.context("the connection is lost")?;
        let path = PathAndQuery::from_static(path);
        let messages = messages.into_streaming_request();
        Ok(self.0.streaming(messages, path, SmallBuffers::<Q, A>::default()).await?.into_inner())
    }
}

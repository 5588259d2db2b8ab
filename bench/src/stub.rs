//! Calls leased with the generated stub over tonic's channels, as users of the stub do.

use anyhow::{Context, Result};
use leased_client::v1::lease_service_client::LeaseServiceClient;
use leased_client::v1::{
    AcquireRequest, AcquireResponse, KeepAliveRequest, KeepAliveResponse, ListRequest, ListResponse,
    ReleaseRequest, ReleaseResponse,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

use crate::leased::{Calls, KeepAlives};

pub(crate) type Stub = LeaseServiceClient<Channel>;

impl Calls for Stub {
    type KeepAlives = Messages;

    async fn connect(address: &str) -> Result<Self> {
        Ok(Self::connect(address.to_owned()).await?)
    }

    async fn acquire(&mut self, request: AcquireRequest) -> Result<AcquireResponse> {
        Ok(self.acquire(request).await?.into_inner())
    }

    async fn release(&mut self, request: ReleaseRequest) -> Result<ReleaseResponse> {
        Ok(self.release(request).await?.into_inner())
    }

    async fn list(&mut self, request: ListRequest) -> Result<ListResponse> {
        Ok(self.list(request).await?.into_inner())
    }

    async fn keep_alive(&mut self, first: KeepAliveRequest) -> Result<Messages> {
        let (messages, receiver) = mpsc::channel(1);
        // The first message is sent before the stream is opened, because a server may wait for it
        // before it sends the response head.
        messages.try_send(first)?;
        let answers = self.keep_alive(ReceiverStream::new(receiver)).await?.into_inner();
        Ok(Messages { messages, answers })
    }
}

/// A keepalive stream.
#[derive(Debug)]
pub(crate) struct Messages {
    messages: mpsc::Sender<KeepAliveRequest>,
    answers: Streaming<KeepAliveResponse>,
}

impl KeepAlives for Messages {
    async fn send(&mut self, message: KeepAliveRequest) -> Result<()> {
        Ok(self.messages.send(message).await?)
    }

    async fn next(&mut self) -> Result<KeepAliveResponse> {
        self.answers.message().await?.context("the stream has ended")
    }
}

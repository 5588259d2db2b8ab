//! leased as a peer, over the load generator's own connections or over tonic's channels, as users of the stub have them.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use leased_client::v1::keep_alive_result::Outcome;
use leased_client::v1::lease_service_client::LeaseServiceClient;
use leased_client::v1::{
    AcquireRequest, AcquireResponse, KeepAliveRequest, KeepAliveResponse, LeaseRef, ListRequest,
    ReleaseRequest,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::client::GrpcService;
use tonic::codegen::http::Uri;
use tonic::codegen::{Body, Bytes, StdError};
use tonic::transport::{Channel, Endpoint};
use uuid::{Builder, Uuid};

use crate::connection::Connection;
use crate::peer::{Peer, Turn};

/// The longest that anybody stands in line here.
const WAIT: Duration = Duration::from_secs(600);

/// What calls go through.
pub(crate) trait Transport:
    GrpcService<
        tonic::body::Body,
        Error: Into<StdError>,
        Future: Send,
        ResponseBody: Body<Data = Bytes, Error: Into<StdError> + Send> + Send + 'static,
    > + Clone
    + Send
    + Sync
    + 'static
{
    fn to(origin: &Uri) -> impl Future<Output = Result<Self>> + Send;
}

impl Transport for Connection {
    async fn to(origin: &Uri) -> Result<Self> {
        Self::to(origin).await
    }
}

impl Transport for Channel {
    async fn to(origin: &Uri) -> Result<Self> {
        Ok(Endpoint::from(origin.clone()).connect().await?)
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Leased<T>(LeaseServiceClient<T>);

/// A lease, and when it ends.
#[derive(Debug)]
pub(crate) struct Held {
    lease: LeaseRef,
    end: Duration,
}

impl<T: Transport> Peer for Leased<T> {
    type Held = Held;
    type Stream = Stream;

    async fn connect(address: &str) -> Result<Self> {
        let origin: Uri = address.parse()?;
        Ok(Self(LeaseServiceClient::with_origin(T::to(&origin).await?, origin)))
    }

    async fn acquire(&mut self, key: String, ttl: Duration) -> Result<Held> {
        held(self.0.acquire(request(key, ttl)?).await?.into_inner())
    }

    async fn release(&mut self, held: Held) -> Result<()> {
        self.0.release(ReleaseRequest { lease: Some(held.lease) }).await?;
        Ok(())
    }

    async fn keep(&mut self, held: Vec<Held>, _ttl: Duration) -> Result<Stream> {
        let (messages, receiver) = mpsc::channel(1);
        let leases = held.into_iter().map(|held| held.lease).collect();
        // Before the stream is open, for a server may answer only then.
        messages.send(KeepAliveRequest { leases, sequence: 1 }).await?;
        let answers = self.0.keep_alive(ReceiverStream::new(receiver)).await?.into_inner();
        let mut stream = Stream { messages, answers, sequence: 1 };
        stream.answer().await?;
        Ok(stream)
    }

    async fn stand(&mut self, key: String, ttl: Duration) -> Result<Held> {
        let request = AcquireRequest { wait: Some(WAIT.try_into()?), ..request(key, ttl)? };
        held(self.0.acquire(request).await?.into_inner())
    }

    async fn standing(&mut self, prefix: &str) -> Result<usize> {
        let (mut standing, mut page_token) = (0, String::new());
        loop {
            let request = ListRequest {
                prefix: prefix.to_owned(),
                page_size: 1000,
                page_token,
                ..ListRequest::default()
            };
            let page = self.0.list(request).await?.into_inner();
            standing +=
                page.leases.iter().map(|lease| lease.holders.len() + lease.waiters.len()).sum::<usize>();
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return Ok(standing);
            }
        }
    }

    fn end(held: &Held) -> Duration {
        held.end
    }
}

fn request(key: String, ttl: Duration) -> Result<AcquireRequest> {
    let (lease_id, owner) = (new_id().to_string(), "bench".to_owned());
    Ok(AcquireRequest { key, lease_id, owner, ttl: Some(ttl.try_into()?), ..AcquireRequest::default() })
}

fn held(granted: AcquireResponse) -> Result<Held> {
    let end = granted.expire_time.context("a grant without an end")?;
    let end = Duration::new(u64::try_from(end.seconds)?, u32::try_from(end.nanos)?);
    Ok(Held { lease: granted.lease.context("a grant without a lease")?, end })
}

/// An id without a system call: the system's random numbers would cost as much as a tenth of the call.
fn new_id() -> Uuid {
    Builder::from_random_bytes(fastrand::u128(..).to_ne_bytes()).into_uuid()
}

/// A keepalive stream with one message in flight, which after the first names no leases and so means all.
#[derive(Debug)]
pub(crate) struct Stream {
    messages: mpsc::Sender<KeepAliveRequest>,
    answers: Streaming<KeepAliveResponse>,
    sequence: u64,
}

impl Stream {
    /// How many leases the answer to the latest message says are kept.
    async fn answer(&mut self) -> Result<u64> {
        while let Some(answer) = self.answers.message().await? {
            // Else it tells of a loss unasked; the answer then says nothing of that lease.
            if answer.sequence == self.sequence {
                let kept =
                    answer.results.iter().filter(|result| matches!(result.outcome, Some(Outcome::Kept(_))));
                return Ok(kept.count() as u64);
            }
        }
        bail!("the stream has ended")
    }
}

impl Turn for Stream {
    async fn turn(&mut self) -> Result<u64> {
        self.sequence += 1;
        self.messages.send(KeepAliveRequest { leases: Vec::new(), sequence: self.sequence }).await?;
        self.answer().await
    }
}

//! leased as a contender, called with the load generator's own client or with the stub.

use std::time::Duration;

use anyhow::{Context, Result};
use leased_client::v1::keep_alive_result::Outcome;
use leased_client::v1::{
    AcquireRequest, AcquireResponse, KeepAliveRequest, KeepAliveResponse, LeaseRef, ListRequest,
    ListResponse, ReleaseRequest, ReleaseResponse,
};
use uuid::{Builder, Uuid};

use crate::connection::{Connection, Turn};
use crate::grpc::{self, Client};

/// How long a call waits at most.
const WAIT: Duration = Duration::from_secs(600);

/// A connection, with the calls of leased that the benchmark makes. Clones share the connection.
pub(crate) trait Calls: Clone + Send + Sync + 'static {
    type KeepAlives: KeepAlives;

    fn connect(address: &str) -> impl Future<Output = Result<Self>> + Send;

    fn acquire(&mut self, request: AcquireRequest) -> impl Future<Output = Result<AcquireResponse>> + Send;

    fn release(&mut self, request: ReleaseRequest) -> impl Future<Output = Result<ReleaseResponse>> + Send;

    fn list(&mut self, request: ListRequest) -> impl Future<Output = Result<ListResponse>> + Send;

    /// Opens a stream with its first message.
    fn keep_alive(
        &mut self,
        first: KeepAliveRequest,
    ) -> impl Future<Output = Result<Self::KeepAlives>> + Send;
}

/// A keepalive stream.
pub(crate) trait KeepAlives: Send + 'static {
    fn send(&mut self, message: KeepAliveRequest) -> impl Future<Output = Result<()>> + Send;

    /// Reads the next answer. Fails once the stream has ended.
    fn next(&mut self) -> impl Future<Output = Result<KeepAliveResponse>> + Send;
}

impl Calls for Client {
    type KeepAlives = grpc::Stream<KeepAliveRequest, KeepAliveResponse>;

    async fn connect(address: &str) -> Result<Self> {
        Self::connect(address).await
    }

    async fn acquire(&mut self, request: AcquireRequest) -> Result<AcquireResponse> {
        self.call("/leased.v1.LeaseService/Acquire", request).await
    }

    async fn release(&mut self, request: ReleaseRequest) -> Result<ReleaseResponse> {
        self.call("/leased.v1.LeaseService/Release", request).await
    }

    async fn list(&mut self, request: ListRequest) -> Result<ListResponse> {
        self.call("/leased.v1.LeaseService/List", request).await
    }

    async fn keep_alive(&mut self, first: KeepAliveRequest) -> Result<Self::KeepAlives> {
        let mut stream = self.stream("/leased.v1.LeaseService/KeepAlive").await?;
        stream.send([first])?;
        Ok(stream)
    }
}

impl KeepAlives for grpc::Stream<KeepAliveRequest, KeepAliveResponse> {
    async fn send(&mut self, message: KeepAliveRequest) -> Result<()> {
        self.send([message])
    }

    async fn next(&mut self) -> Result<KeepAliveResponse> {
        self.next().await
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Leased<C>(C);

/// A lease and when it ends.
#[derive(Debug)]
pub(crate) struct Held {
    lease: LeaseRef,
    end: Duration,
}

impl<C: Calls> Connection for Leased<C> {
    type Held = Held;
    type Stream = Stream<C::KeepAlives>;

    async fn connect(address: &str) -> Result<Self> {
        Ok(Self(C::connect(address).await?))
    }

    async fn acquire(&mut self, key: String, ttl: Duration) -> Result<Held> {
        held(self.0.acquire(request(key, ttl)?).await?)
    }

    async fn release(&mut self, held: Held) -> Result<()> {
        self.0.release(ReleaseRequest { lease: Some(held.lease) }).await?;
        Ok(())
    }

    async fn keep(&mut self, held: Vec<Held>, _ttl: Duration) -> Result<Self::Stream> {
        let leases = held.into_iter().map(|held| held.lease).collect();
        let messages = self.0.keep_alive(KeepAliveRequest { leases, sequence: 1 }).await?;
        let mut stream = Stream { messages, sequence: 1 };
        stream.answer().await?;
        Ok(stream)
    }

    async fn acquire_waiting(&mut self, key: String, ttl: Duration) -> Result<Held> {
        let request = AcquireRequest { wait: Some(WAIT.try_into()?), ..request(key, ttl)? };
        held(self.0.acquire(request).await?)
    }

    async fn holders_and_waiters(&mut self, prefix: &str) -> Result<usize> {
        let (mut count, mut page_token) = (0, String::new());
        loop {
            let request = ListRequest {
                prefix: prefix.to_owned(),
                page_size: 1000,
                page_token,
                ..ListRequest::default()
            };
            let page = self.0.list(request).await?;
            count += page.leases.iter().map(|lease| lease.holders.len() + lease.waiters.len()).sum::<usize>();
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return Ok(count);
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

/// Makes an id without a system call. The system's random numbers would cost 10 % of the call.
fn new_id() -> Uuid {
    Builder::from_random_bytes(fastrand::u128(..).to_ne_bytes()).into_uuid()
}

/// A keepalive stream with one message in flight. Its messages after the first name no leases,
/// which touches all leases of the stream.
#[derive(Debug)]
pub(crate) struct Stream<K> {
    messages: K,
    sequence: u64,
}

impl<K: KeepAlives> Stream<K> {
    /// Reads the answer to the last message, and returns how many leases are kept.
    async fn answer(&mut self) -> Result<u64> {
        loop {
            let answer = self.messages.next().await?;
            // Other answers are losses that the daemon pushes. A lease that was reported as lost is not in the
            // answer.
            if answer.sequence == self.sequence {
                let kept =
                    answer.results.iter().filter(|result| matches!(result.outcome, Some(Outcome::Kept(_))));
                return Ok(kept.count() as u64);
            }
        }
    }
}

impl<K: KeepAlives> Turn for Stream<K> {
    async fn turn(&mut self) -> Result<u64> {
        self.sequence += 1;
        self.messages.send(KeepAliveRequest { leases: Vec::new(), sequence: self.sequence }).await?;
        self.answer().await
    }
}

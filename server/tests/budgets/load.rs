//! The calls that the budgets limit. They are made one after the other, so that the counts do not
//! depend on which calls share a batch.

use leased_proto::v1::lease_service_client::LeaseServiceClient;
use leased_proto::v1::{
    AcquireRequest, KeepAliveRequest, KeepAliveResponse, LeaseRef, ReleaseRequest, keep_alive_result,
};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

/// How many pairs, or messages for one lease, are counted.
const TIMES: u32 = 500;
/// How many leases a large message names.
const CROWD: u32 = 1000;
const STREAMS: u32 = 1000;
const STREAMS_PER_CONNECTION: u32 = 100;

/// Calls to one daemon.
pub(crate) struct Load {
    runtime: Runtime,
    address: String,
    client: LeaseServiceClient<Channel>,
    /// The stream that keeps `leases` alive, once it is open.
    stream: Option<Stream>,
    leases: Vec<LeaseRef>,
    idle: Vec<Stream>,
}

struct Stream {
    messages: mpsc::Sender<KeepAliveRequest>,
    answers: Streaming<KeepAliveResponse>,
    sequence: u64,
}

impl Load {
    pub(crate) fn at(address: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let client = runtime.block_on(connect(address));
        let address = address.to_owned();
        Self { runtime, address, client, stream: None, leases: Vec::new(), idle: Vec::new() }
    }

    /// Acquires and releases one key, again and again.
    pub(crate) fn pairs(&mut self) -> u32 {
        for _ in 0..TIMES {
            let lease = Some(self.acquire("pair"));
            self.runtime.block_on(self.client.release(ReleaseRequest { lease })).unwrap();
        }
        TIMES
    }

    /// Touches one lease with many messages, one after the other.
    pub(crate) fn messages(&mut self) -> u32 {
        self.hold(1);
        self.open_stream();
        (0..TIMES).for_each(|_| self.touch());
        TIMES
    }

    /// Touches many leases with each message.
    pub(crate) fn crowds(&mut self) -> u32 {
        const MESSAGES: u32 = 10;
        self.hold(CROWD);
        self.open_stream();
        (0..MESSAGES).for_each(|_| self.touch());
        MESSAGES * CROWD
    }

    /// Acquires many leases.
    pub(crate) fn acquire_many(&mut self) -> u32 {
        self.hold(CROWD);
        CROWD
    }

    /// Makes one stream track all leases, 50 more with each message.
    pub(crate) fn track(&mut self) -> u32 {
        self.open_stream();
        let leases = std::mem::take(&mut self.leases);
        for some in leases.chunks(50) {
            some.clone_into(&mut self.leases);
            self.touch();
        }
        CROWD
    }

    /// Opens many streams that track no lease.
    pub(crate) fn open(&mut self) -> u32 {
        for _ in 0..STREAMS / STREAMS_PER_CONNECTION {
            let client = self.runtime.block_on(connect(&self.address));
            for _ in 0..STREAMS_PER_CONNECTION {
                let stream = self.runtime.block_on(Stream::open(client.clone()));
                self.idle.push(stream);
            }
        }
        STREAMS
    }

    fn acquire(&mut self, key: &str) -> LeaseRef {
        let key = key.to_owned();
        let ttl = Some(prost_types::Duration { seconds: 600, nanos: 0 });
        let request = AcquireRequest { key, owner: "load".to_owned(), ttl, ..AcquireRequest::default() };
        self.runtime.block_on(self.client.acquire(request)).unwrap().into_inner().lease.unwrap()
    }

    fn hold(&mut self, count: u32) {
        if self.leases.is_empty() {
            self.leases = (0..count).map(|number| self.acquire(&format!("tenant-7/job-{number}"))).collect();
        }
    }

    fn open_stream(&mut self) {
        if self.stream.is_none() {
            self.stream = Some(self.runtime.block_on(Stream::open(self.client.clone())));
        }
    }

    fn touch(&mut self) {
        let stream = self.stream.as_mut().unwrap();
        let answer = self.runtime.block_on(stream.touch(&self.leases));
        assert_eq!(answer.results.len(), self.leases.len());
        let kept = |outcome| matches!(outcome, Some(keep_alive_result::Outcome::Kept(_)));
        assert!(answer.results.into_iter().all(|result| kept(result.outcome)));
    }
}

impl Stream {
    async fn open(mut client: LeaseServiceClient<Channel>) -> Self {
        let (messages, receiver) = mpsc::channel(1);
        let answers = client.keep_alive(ReceiverStream::new(receiver)).await.unwrap().into_inner();
        Self { messages, answers, sequence: 0 }
    }

    async fn touch(&mut self, leases: &[LeaseRef]) -> KeepAliveResponse {
        self.sequence += 1;
        let message = KeepAliveRequest { sequence: self.sequence, leases: leases.to_vec() };
        self.messages.send(message).await.unwrap();
        self.answers.message().await.unwrap().unwrap()
    }
}

async fn connect(address: &str) -> LeaseServiceClient<Channel> {
    LeaseServiceClient::new(Endpoint::from_shared(address.to_owned()).unwrap().connect().await.unwrap())
}

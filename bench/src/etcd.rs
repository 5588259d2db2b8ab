//! etcd as a contender: its lock service, and the leases under which it locks.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::time::timeout;

use crate::clock;
use crate::connection::{Connection, Turn};
use crate::etcd_api::{
    LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse, LockRequest,
    LockResponse, PutRequest, PutResponse, RangeRequest, RangeResponse, StatusRequest, StatusResponse,
    UnlockRequest, UnlockResponse, WatchCreateRequest, WatchRequest, WatchResponse,
};
use crate::grpc::{self, Client};

#[derive(Debug, Clone)]
pub(crate) struct Etcd {
    client: Client,
    /// The lease of all locks of this caller. If `None`, each lock has its own lease.
    lease: Option<Lease>,
}

#[derive(Debug, Clone, Copy)]
struct Lease {
    id: i64,
    end: Duration,
}

/// A locked key and its lease. The key is empty if the lease is only kept alive.
#[derive(Debug)]
pub(crate) struct Held {
    key: Vec<u8>,
    lease: Lease,
}

impl Etcd {
    async fn grant(&mut self, ttl: Duration) -> Result<Lease> {
        let seconds = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
        let request = LeaseGrantRequest { ttl: i64::try_from(seconds)? };
        let granted: LeaseGrantResponse = self.client.call("/etcdserverpb.Lease/LeaseGrant", request).await?;
        Ok(Lease { id: granted.id, end: clock::now() + Duration::from_secs(u64::try_from(granted.ttl)?) })
    }

    /// Waits until a key is deleted.
    async fn until_deleted(&mut self, key: Vec<u8>, start_revision: i64) -> Result<()> {
        let mut watch = self.client.stream("/etcdserverpb.Watch/Watch").await?;
        watch.send([WatchRequest { create: Some(WatchCreateRequest { key, start_revision }) }])?;
        loop {
            let answer: WatchResponse = watch.next().await?;
            ensure!(!answer.canceled, "the watch was refused");
            if answer.events.iter().any(|event| event.kind == 1) {
                return Ok(());
            }
        }
    }
}

/// Builds a request for the keys that begin with `prefix`.
fn under(prefix: &str) -> Result<RangeRequest> {
    let key = prefix.as_bytes().to_vec();
    let mut range_end = key.clone();
    *range_end.last_mut().context("a prefix")? += 1;
    Ok(RangeRequest { key, range_end, ..RangeRequest::default() })
}

impl Connection for Etcd {
    type Held = Held;
    type Stream = Stream;

    async fn connect(address: &str) -> Result<Self> {
        Ok(Self { client: Client::connect(address).await?, lease: None })
    }

    async fn caller(&self, ttl: Duration) -> Result<Self> {
        let mut caller = self.clone();
        caller.lease = Some(caller.grant(ttl).await?);
        Ok(caller)
    }

    async fn acquire(&mut self, key: String, ttl: Duration) -> Result<Held> {
        let lease = match self.lease {
            Some(lease) => lease,
            None => self.grant(ttl).await?,
        };
        let request = LockRequest { name: key.into_bytes(), lease: lease.id };
        let locked: LockResponse = self.client.call("/v3lockpb.Lock/Lock", request).await?;
        Ok(Held { key: locked.key, lease })
    }

    async fn release(&mut self, held: Held) -> Result<()> {
        let _: UnlockResponse =
            self.client.call("/v3lockpb.Lock/Unlock", UnlockRequest { key: held.key }).await?;
        Ok(())
    }

    /// Grants a lease without a key, because only the lease has to be kept alive.
    async fn hold(&mut self, _key: String, ttl: Duration) -> Result<Held> {
        Ok(Held { key: Vec::new(), lease: self.grant(ttl).await? })
    }

    async fn keep(&mut self, held: Vec<Held>, _ttl: Duration) -> Result<Stream> {
        let ids = held.iter().map(|held| held.lease.id).collect();
        let stream = self.client.stream("/etcdserverpb.Lease/LeaseKeepAlive").await?;
        let mut stream = Stream { stream, ids };
        stream.turn().await?;
        Ok(stream)
    }

    /// Waits as etcd's own clients do: puts a key for this waiter, and watches the key before it.
    /// The lock service does the same inside the server, but begins its watches one after the
    /// other, and each takes up to 100 ms.
    async fn acquire_waiting(&mut self, key: String, ttl: Duration) -> Result<Held> {
        let lease = self.grant(ttl).await?;
        let own = format!("{key}/{:x}", lease.id).into_bytes();
        let put = PutRequest { key: own.clone(), lease: lease.id };
        let put: PutResponse = self.client.call("/etcdserverpb.KV/Put", put).await?;
        let revision = put.header.context("an answer without a header")?.revision;
        loop {
            let before = RangeRequest {
                limit: 1,
                sort_order: 2,
                sort_target: 2,
                max_create_revision: revision - 1,
                ..under(&format!("{key}/"))?
            };
            let before: RangeResponse = self.client.call("/etcdserverpb.KV/Range", before).await?;
            let Some(last) = before.kvs.into_iter().next() else { return Ok(Held { key: own, lease }) };
            let seen = before.header.context("an answer without a header")?.revision;
            self.until_deleted(last.key, seen + 1).await?;
        }
    }

    async fn holders_and_waiters(&mut self, prefix: &str) -> Result<usize> {
        let request = RangeRequest { count_only: true, ..under(prefix)? };
        let keys: RangeResponse = self.client.call("/etcdserverpb.KV/Range", request).await?;
        Ok(usize::try_from(keys.count)?)
    }

    fn end(held: &Held) -> Duration {
        held.lease.end
    }
}

/// A keepalive stream of etcd, on which each lease needs a separate message.
#[derive(Debug)]
pub(crate) struct Stream {
    stream: grpc::Stream<LeaseKeepAliveRequest, LeaseKeepAliveResponse>,
    ids: Vec<i64>,
}

impl Turn for Stream {
    async fn turn(&mut self) -> Result<u64> {
        self.stream.send(self.ids.iter().map(|&id| LeaseKeepAliveRequest { id }))?;
        let mut kept = 0;
        for _ in &self.ids {
            kept += u64::from(self.stream.next().await?.ttl > 0);
        }
        Ok(kept)
    }
}

/// Whether the node at `address` accepts writes, and is the leader.
pub(crate) async fn leads(address: &str) -> Result<bool> {
    let ask = async {
        let mut node = Etcd::connect(address).await?;
        node.grant(Duration::from_secs(1)).await?;
        let status: StatusResponse =
            node.client.call("/etcdserverpb.Maintenance/Status", StatusRequest {}).await?;
        let header = status.header.context("a status without a header")?;
        ensure!(status.leader != 0, "there is no leader");
        Ok(status.leader == header.member_id)
    };
    timeout(Duration::from_secs(2), ask).await?
}

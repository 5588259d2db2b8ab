//! The same pairs through etcd's own lock service, each caller under a lease of its own.
//!
//! The messages are those of etcd's `lock.proto` and `rpc.proto`, with the fields that matter here.

use std::time::Duration;

use anyhow::{Context, Result};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::client::Grpc;
use tonic::codegen::http::Uri;
use tonic::codegen::http::uri::PathAndQuery;
use tonic_prost::ProstCodec;

use crate::connection::Connection;
use crate::pairs::Round;
use crate::report::Pairs;

#[derive(Clone, PartialEq, prost::Message)]
struct LeaseGrantRequest {
    /// In seconds.
    #[prost(int64, tag = "1")]
    ttl: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct LeaseGrantResponse {
    #[prost(int64, tag = "2")]
    id: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct LockRequest {
    #[prost(bytes = "vec", tag = "1")]
    name: Vec<u8>,
    #[prost(int64, tag = "2")]
    lease: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct LockResponse {
    #[prost(bytes = "vec", tag = "2")]
    key: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct UnlockRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct UnlockResponse {}

type Client = Grpc<Connection>;

/// Runs every caller until the time is over.
pub(crate) async fn run(endpoint: &str, round: Round) -> Result<Pairs> {
    let mut connections = Vec::new();
    for _ in 0..round.connections {
        connections.push(connect(endpoint).await?);
    }
    let mut leases = Vec::new();
    for number in 0..round.callers {
        let mut client = connections[usize::try_from(number % round.connections)?].clone();
        let grant = LeaseGrantRequest { ttl: 600 };
        let granted: LeaseGrantResponse = call(&mut client, "/etcdserverpb.Lease/LeaseGrant", grant).await?;
        leases.push((number, client, granted.id));
    }
    let start = Instant::now();
    let mut callers = JoinSet::new();
    for (number, mut client, lease) in leases {
        callers.spawn(async move {
            let mut pairs = Pairs::new();
            while start.elapsed() < round.time {
                let begun = Instant::now();
                let name = format!("bench/{number}").into_bytes();
                let lock = LockRequest { name, lease };
                let locked: LockResponse = call(&mut client, "/v3lockpb.Lock/Lock", lock).await?;
                let unlock = UnlockRequest { key: locked.key };
                let _: UnlockResponse = call(&mut client, "/v3lockpb.Lock/Unlock", unlock).await?;
                pairs.add(begun.elapsed());
            }
            Ok(pairs)
        });
    }
    Pairs::join(callers, start).await
}

/// Whether etcd answers there.
pub(crate) async fn answers(endpoint: &str) -> bool {
    let ask = async {
        let mut client = connect(endpoint).await?;
        let grant = LeaseGrantRequest { ttl: 1 };
        call::<_, LeaseGrantResponse>(&mut client, "/etcdserverpb.Lease/LeaseGrant", grant).await
    };
    tokio::time::timeout(Duration::from_secs(2), ask).await.is_ok_and(|answer| answer.is_ok())
}

async fn connect(endpoint: &str) -> Result<Client> {
    let origin: Uri = endpoint.parse()?;
    Ok(Grpc::with_origin(Connection::to(&origin).await?, origin))
}

async fn call<Q, A>(client: &mut Client, path: &'static str, request: Q) -> Result<A>
where
    Q: prost::Message + Send + Sync + 'static,
    A: prost::Message + Default + Send + Sync + 'static,
{
    client.ready().await.context("the connection is lost")?;
    let path = PathAndQuery::from_static(path);
    let answer = client.unary(tonic::Request::new(request), path, ProstCodec::<Q, A>::default()).await?;
    Ok(answer.into_inner())
}

//! Calls of the daemon that need no store, as a contender. Their rate is the highest that the
//! daemon's gRPC stack and this load generator allow. Health checks take the place of unary calls.
//! A reflection stream, which answers each message, takes the place of keepalives.

use std::time::Duration;

use anyhow::Result;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use crate::connection::{Connection, Turn};
use crate::grpc::{Client, Stream};

#[derive(Debug, Clone)]
pub(crate) struct Ceiling(Client);

impl Ceiling {
    async fn call(&mut self) -> Result<()> {
        let _: HealthCheckResponse =
            self.0.call("/grpc.health.v1.Health/Check", HealthCheckRequest::default()).await?;
        Ok(())
    }
}

impl Connection for Ceiling {
    type Held = ();
    type Stream = Echo;

    async fn connect(address: &str) -> Result<Self> {
        Ok(Self(Client::connect(address).await?))
    }

    async fn acquire(&mut self, _key: String, _ttl: Duration) -> Result<()> {
        self.call().await
    }

    async fn release(&mut self, (): ()) -> Result<()> {
        self.call().await
    }

    async fn keep(&mut self, _held: Vec<()>, _ttl: Duration) -> Result<Echo> {
        let path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
        let mut echo = Echo(self.0.stream(path).await?);
        echo.turn().await?;
        Ok(echo)
    }
}

/// The request of `reflection.proto`, with the one field that is used.
#[derive(Clone, PartialEq, prost::Message)]
struct ServerReflectionRequest {
    #[prost(string, optional, tag = "7")]
    list_services: Option<String>,
}

/// The response of `reflection.proto`. None of its fields is used.
#[derive(Clone, PartialEq, prost::Message)]
struct ServerReflectionResponse {}

fn question() -> ServerReflectionRequest {
    ServerReflectionRequest { list_services: Some(String::new()) }
}

/// A stream with one message in flight.
#[derive(Debug)]
pub(crate) struct Echo(Stream<ServerReflectionRequest, ServerReflectionResponse>);

impl Turn for Echo {
    async fn turn(&mut self) -> Result<u64> {
        self.0.send([question()])?;
        self.0.next().await?;
        Ok(1)
    }
}

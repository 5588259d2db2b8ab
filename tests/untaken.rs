//! Callers who do not take what their streams are told, beside others who do.

use std::future::poll_fn;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use h2::client::{ResponseFuture, SendRequest};
use h2::{Reason, RecvStream, SendStream};
use http::Request;
use leased_client::v1::{KeepAliveRequest, KeepAliveResponse};
use prost::Message;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use uuid::Uuid;

use crate::keepalive::KeepAlive;
use crate::support::exposition::Exposition;
use crate::support::{Daemon, Embedded, PATIENCE, http, named};

/// Leases in a large message. The answers to three fit into what a connection may leave untaken, and to no more.
const LEASES: usize = 8000;
/// Streams that take nothing: more than may wait for their answers.
const STREAMS: usize = 30;

/// A connection whose caller takes the first 64 KiB of each answer, unless it wants more, and answers pings.
async fn connection(daemon: &Daemon) -> SendRequest<Bytes> {
    let stream = TcpStream::connect(daemon.grpc).await.unwrap();
    let (calls, connection) = h2::client::Builder::new()
        .initial_connection_window_size(64 << 20)
        .max_send_buffer_size(1 << 20)
        .handshake(stream)
        .await
        .unwrap();
    tokio::spawn(connection);
    calls
}

async fn open(calls: &SendRequest<Bytes>, method: &str) -> (ResponseFuture, SendStream<Bytes>) {
    let request = Request::post(format!("http://leased/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    calls.clone().ready().await.unwrap().send_request(request.body(()).unwrap(), false).unwrap()
}

fn framed(message: &impl Message) -> Bytes {
    let message = message.encode_to_vec();
    [&[0][..], &u32::try_from(message.len()).unwrap().to_be_bytes(), &message].concat().into()
}

/// Names leases that nobody holds.
fn naming(leases: usize) -> KeepAliveRequest {
    let leases = (0..leases).map(|number| named(&number.to_string(), Uuid::new_v4())).collect();
    KeepAliveRequest { leases, sequence: 1 }
}

/// How a stream ended.
#[derive(Debug, PartialEq)]
enum End {
    Reset,
    Status(String),
}

/// Waits for the end of a stream, and takes nothing.
async fn end(mut body: RecvStream) -> End {
    loop {
        match body.data().await {
            Some(Ok(_)) => {}
            Some(Err(error)) => {
                assert_eq!(error.reason(), Some(Reason::CANCEL));
                return End::Reset;
            }
            None => {
                let trailers = body.trailers().await.unwrap().unwrap();
                let message = trailers.get("grpc-message").map(|message| message.to_str().unwrap());
                return End::Status(message.unwrap_or_default().to_owned());
            }
        }
    }
}

/// Losses that were made into answers.
async fn losses(daemon: &Daemon) -> f64 {
    let (_, text) = http(daemon.http, "/metrics").await.unwrap();
    Exposition::parse(&text).unwrap().value("leased_losses_told_total", &[])
}

#[tokio::test]
async fn large_keepalive_answers_that_nobody_takes_are_few_and_end_while_others_are_answered() {
    let daemon = Daemon::start(Embedded).await;
    let calls = connection(&daemon).await;
    let mut ends = FuturesUnordered::new();
    let mut messages = Vec::new();
    for _ in 0..STREAMS {
        let (answer, mut message) = open(&calls, "leased.v1.LeaseService/KeepAlive").await;
        // One after the other, since messages that are not whole yet have a limit of their own.
        let named = framed(&naming(LEASES));
        message.reserve_capacity(named.len());
        while message.capacity() < named.len() {
            poll_fn(|context| message.poll_capacity(context)).await.unwrap().unwrap();
        }
        message.send_data(named, false).unwrap();
        messages.push(message);
        ends.push(async { end(answer.await.unwrap().into_body()).await });
    }
    // Too many wait for room.
    let first = timeout(PATIENCE, ends.next()).await.unwrap().unwrap();
    assert!(matches!(&first, End::Status(why) if why.contains("connection_waiting_bytes")), "{first:?}");

    // A small message on the same connection, and a large one on another.
    let (answer, mut message) = open(&calls, "leased.v1.LeaseService/KeepAlive").await;
    message.send_data(framed(&naming(3)), true).unwrap();
    let mut body = timeout(PATIENCE, answer).await.unwrap().unwrap().into_body();
    let answer = timeout(PATIENCE, body.data()).await.unwrap().unwrap().unwrap();
    assert_eq!(KeepAliveResponse::decode(&answer[5..]).unwrap().results.len(), 3);
    let mut other = KeepAlive::open(&mut daemon.client().await).await;
    assert_eq!(other.touch(&naming(LEASES).leases).await.len(), LEASES);
    let by_others = LEASES + 3;

    let mut resets = 0;
    while resets < 2 {
        resets += usize::from(timeout(PATIENCE, ends.next()).await.unwrap() == Some(End::Reset));
    }
    let told = losses(&daemon).await;
    while let Some(Some(ended)) = futures_util::FutureExt::now_or_never(ends.next()) {
        resets += usize::from(ended == End::Reset);
    }
    // Each that ends lets one more be answered.
    let most = by_others + (3 + resets) * LEASES;
    assert!(told <= f64::from(u32::try_from(most).unwrap()), "{told} after {resets} ends");
}

#[tokio::test]
async fn a_reflection_stream_ends_by_itself() {
    let daemon = Daemon::start(Embedded).await;
    let calls = connection(&daemon).await;
    let symbol = MessageRequest::FileContainingSymbol("leased.v1.LeaseService".to_owned());
    let request = framed(&ServerReflectionRequest { host: String::new(), message_request: Some(symbol) });
    // Both say no more; the answers to one of them fit into what is taken.
    for requests in [1, 8] {
        let (answer, mut message) =
            open(&calls, "grpc.reflection.v1.ServerReflection/ServerReflectionInfo").await;
        message.send_data(request.repeat(requests).into(), false).unwrap();
        timeout(PATIENCE, end(answer.await.unwrap().into_body())).await.unwrap();
    }
}

//! Streams whose callers do not read the answers, beside streams whose callers do.

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

/// How many leases a large message names. A connection may have at most three unread answers of
/// this size.
const LEASES: usize = 8000;
/// How many streams have callers that do not read. The daemon lets fewer messages of this size wait
/// to be answered.
const STREAMS: usize = 30;

/// Opens a connection that answers pings. It receives the first 64 KiB of each answer, and more
/// only if the test releases flow-control capacity.
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

/// Returns a message that names leases which nobody holds.
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

/// Waits for the end of a stream without releasing flow-control capacity.
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

/// Returns how many losses the daemon has put into answers so far.
async fn losses(daemon: &Daemon) -> f64 {
    let (_, text) = http(daemon.http, "/metrics").await.unwrap();
    Exposition::parse(&text).unwrap().value("leased_losses_told_total", &[])
}

#[tokio::test]
async fn unread_keepalive_answers_are_limited_and_reset_while_other_streams_are_answered() {
    let daemon = Daemon::start(Embedded).await;
    let calls = connection(&daemon).await;
    let mut ends = FuturesUnordered::new();
    let mut messages = Vec::new();
    for _ in 0..STREAMS {
        let (answer, mut message) = open(&calls, "leased.v1.LeaseService/KeepAlive").await;
        // The messages are sent one after the other, since incomplete messages have a separate
        // limit.
        let named = framed(&naming(LEASES));
        message.reserve_capacity(named.len());
        while message.capacity() < named.len() {
            poll_fn(|context| message.poll_capacity(context)).await.unwrap().unwrap();
        }
        message.send_data(named, false).unwrap();
        messages.push(message);
        ends.push(async { end(answer.await.unwrap().into_body()).await });
    }
    // The first stream ends because too many other streams wait until their answers may be sent.
    let first = timeout(PATIENCE, ends.next()).await.unwrap().unwrap();
    assert!(matches!(&first, End::Status(why) if why.contains("connection_waiting_bytes")), "{first:?}");

    // The daemon still answers a small message on this connection, and a large one on another.
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
    // Each reset lets the daemon answer one more stream.
    let most = by_others + (3 + resets) * LEASES;
    assert!(told <= f64::from(u32::try_from(most).unwrap()), "{told} after {resets} ends");
}

#[tokio::test]
async fn the_daemon_ends_an_idle_reflection_stream() {
    let daemon = Daemon::start(Embedded).await;
    let calls = connection(&daemon).await;
    let symbol = MessageRequest::FileContainingSymbol("leased.v1.LeaseService".to_owned());
    let request = framed(&ServerReflectionRequest { host: String::new(), message_request: Some(symbol) });
    // Neither stream sends a further request. One answer fits into 64 KiB. Eight answers do not.
    for requests in [1, 8] {
        let (answer, mut message) =
            open(&calls, "grpc.reflection.v1.ServerReflection/ServerReflectionInfo").await;
        message.send_data(request.repeat(requests).into(), false).unwrap();
        timeout(PATIENCE, end(answer.await.unwrap().into_body())).await.unwrap();
    }
}

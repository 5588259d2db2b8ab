//! Peers that are silent, slow, too fast, or too many. Other callers are served, and honest callers
//! are not taken for attackers.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use h2::RecvStream;
use h2::client::SendRequest;
use http::{HeaderMap, Request};
use leased_client::v1::lease_service_client::LeaseServiceClient;
use leased_client::v1::{KeepAliveRequest, KeepAliveResponse, KeepAliveResult, LeaseRef};
use prost::Message;
use rstest::rstest;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};
use uuid::Uuid;

use crate::keepalive::kept;
use crate::support::exposition::Exposition;
use crate::support::{
    AcquireBuilder, Backend, Calls, Daemon, Embedded, MongoDb, PATIENCE, acquire, eventually, http, ms,
    named, secs,
};

/// The connection preface of an HTTP/2 client.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Reads until the daemon closes the connection.
async fn until_closed(stream: &mut TcpStream) {
    let mut rest = Vec::new();
    // The result is ignored, since the daemon may close or reset the connection.
    let _ = timeout(PATIENCE, stream.read_to_end(&mut rest)).await.expect("the connection stays open");
}

/// Returns how many connections the daemon has refused on `port`.
async fn refused(daemon: &Daemon, port: &str) -> f64 {
    let (_, text) = http(daemon.http, "/metrics").await.unwrap();
    Exposition::parse(&text).unwrap().value("leased_connections_refused_total", &[("port", port)])
}

#[tokio::test]
async fn silent_connections_are_closed_in_time_and_surplus_ones_at_once() {
    let daemon = Daemon::start_with(Embedded, |config| config.limits.connections = 8).await;
    let mut silent = Vec::new();
    for _ in 0..8 {
        let mut stream = TcpStream::connect(daemon.grpc).await.unwrap();
        // Half of the connections send part of the preface. The daemon sends something on each
        // connection that it accepts.
        if silent.len() % 2 == 0 {
            stream.write_all(&PREFACE[..16]).await.unwrap();
        }
        stream.read_exact(&mut [0]).await.unwrap();
        silent.push(stream);
    }
    let mut one_too_many = TcpStream::connect(daemon.grpc).await.unwrap();
    until_closed(&mut one_too_many).await;
    assert!(refused(&daemon, "grpc").await >= 1.0);
    for stream in &mut silent {
        until_closed(stream).await;
    }
    eventually(async || {
        let client = LeaseServiceClient::connect(format!("http://{}", daemon.grpc));
        client.await.ok()?.get_lease(acquire("job")).await.ok()
    })
    .await;
}

#[tokio::test]
async fn connections_without_calls_do_not_delay_a_drain() {
    let daemon = Daemon::start_with(Embedded, |config| config.drain_timeout = secs(300)).await;
    let mut peers = Vec::new();
    for said in [&[][..], &PREFACE[..16], PREFACE, &[PREFACE, &frame(4, 0, 0, &[])].concat()] {
        let mut peer = TcpStream::connect(daemon.grpc).await.unwrap();
        peer.write_all(said).await.unwrap();
        peer.read_exact(&mut [0]).await.unwrap();
        peers.push(peer);
    }
    // The drain timeout is much longer than `stop` waits.
    daemon.stop().await;
}

#[tokio::test]
async fn the_http_port_closes_silent_connections_and_surplus_ones() {
    let daemon = Daemon::start(Embedded).await;
    let mut silent = Vec::new();
    for _ in 0..128 {
        let mut stream = TcpStream::connect(daemon.http).await.unwrap();
        stream.write_all(b"GET /livez HTTP/1.1\r\nHost:").await.unwrap();
        silent.push(stream);
    }
    // One more connection may fit until the daemon has accepted all of these.
    eventually(async || http(daemon.http, "/livez").await.is_none().then_some(())).await;
    for stream in &mut silent {
        until_closed(stream).await;
    }
    eventually(async || http(daemon.http, "/livez").await).await;
    assert!(refused(&daemon, "http").await >= 1.0);
}

/// Encodes an HTTP/2 frame (RFC 9113, 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const END_HEADERS: u8 = 4;
const CANCEL: u32 = 8;
const ENHANCE_YOUR_CALM: u32 = 11;

/// Encodes the headers of a call, as literal fields without indexing (RFC 7541, 6.2.2).
fn call(stream: u32) -> Vec<u8> {
    let mut headers = Vec::new();
    for (name, value) in [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/leased.v1.LeaseService/Get"),
        (":authority", "leased"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ] {
        headers.extend([0, u8::try_from(name.len()).unwrap()]);
        headers.extend(name.bytes());
        headers.push(u8::try_from(value.len()).unwrap());
        headers.extend(value.bytes());
    }
    frame(HEADERS, END_HEADERS, stream, &headers)
}

/// Encodes the headers of a call and its cancellation.
fn cancelled_call(stream: u32) -> Vec<u8> {
    [call(stream), frame(RST_STREAM, 0, stream, &CANCEL.to_be_bytes())].concat()
}

/// Reads frames up to the first one of this kind, and returns its payload.
async fn read_until(stream: &mut TcpStream, kind: u8) -> Vec<u8> {
    let read = async {
        loop {
            let mut head = [0; 9];
            stream.read_exact(&mut head).await.unwrap();
            let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
            stream.read_exact(&mut payload).await.unwrap();
            assert!(head[3] != GOAWAY, "{:?}", payload.escape_ascii().to_string());
            // Of pings, only an acknowledgement (flag 1) counts. The daemon also sends pings
            // itself.
            if head[3] == kind && (kind != PING || head[4] == 1) {
                return payload;
            }
        }
    };
    timeout(PATIENCE, read).await.unwrap()
}

#[tokio::test]
async fn a_burst_of_cancelled_calls_is_tolerated_and_a_flood_ends_the_connection() {
    let daemon = Daemon::start(Embedded).await;
    let mut stream = TcpStream::connect(daemon.grpc).await.unwrap();
    let mut said = [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat();
    // A client cancels all calls that may be open at once, as it may do after a network problem.
    let limit = daemon.config.limits.streams;
    said.extend((0..limit).flat_map(|number| cancelled_call(2 * number + 1)));
    said.extend(frame(PING, 0, 0, b"they are"));
    stream.write_all(&said).await.unwrap();
    assert_eq!(read_until(&mut stream, PING).await, b"they are");

    // The rapid reset attack, CVE-2023-44487.
    let mut number = limit;
    let (mut reader, mut writer) = stream.split();
    let flood = async {
        loop {
            let batch: Vec<u8> =
                (number..number + 10_000).flat_map(|number| cancelled_call(2 * number + 1)).collect();
            number += 10_000;
            if writer.write_all(&batch).await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    };
    let mut heard = Vec::new();
    tokio::select! {
        () = flood => {}
        read = timeout(PATIENCE, reader.read_to_end(&mut heard)) => drop(read.expect("the connection stays open")),
    }
    let calm = ENHANCE_YOUR_CALM.to_be_bytes();
    let goaway = |at: &[u8]| at[3] == GOAWAY && at[13..17] == calm;
    assert!(heard.windows(17).any(goaway), "no GOAWAY among {} bytes", heard.len());
    daemon.client().await.get_lease(acquire("job")).await.unwrap();
}

/// A client may send more of a request before it reads the refusal. Then h2 resets the stream, and
/// counts these resets against a limit.
#[tokio::test]
async fn requests_that_are_too_large_do_not_end_their_connection() {
    let daemon = Daemon::start(Embedded).await;
    let mut stream = TcpStream::connect(daemon.grpc).await.unwrap();
    stream.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()).await.unwrap();
    let streams = || (1..500).step_by(2);
    let begin = |id| [call(id), frame(DATA, 0, id, &message(100 * 1024)[..100])].concat();
    stream.write_all(&streams().flat_map(begin).collect::<Vec<u8>>()).await.unwrap();
    for _ in streams() {
        read_until(&mut stream, HEADERS).await;
    }
    // The daemon refuses all of these, and h2 remembers only 50 streams that it has reset. Together
    // they are smaller than a flow-control window.
    let go_on = |id| frame(DATA, 0, id, &[0; 100]);
    stream.write_all(&streams().flat_map(go_on).collect::<Vec<u8>>()).await.unwrap();
    stream.write_all(&frame(PING, 0, 0, b"go on :)")).await.unwrap();
    assert_eq!(read_until(&mut stream, PING).await, b"go on :)");
}

#[rstest]
#[tokio::test]
async fn a_stream_of_a_thousand_messages_a_second_is_answered_completely(
    #[values(Embedded, MongoDb)] backend: Backend,
    #[values(true, false)] coalesces: bool,
) {
    const MESSAGES: u64 = 5000;
    let daemon = Daemon::start_with(backend, |config| config.limits.coalesce_touches = coalesces).await;
    let mut client = daemon.client().await;
    let mut leases = Vec::new();
    for key in ["a", "b", "c"] {
        leases.push(client.get_lease(acquire(key).ttl(secs(5))).await.unwrap().lease.unwrap());
    }
    let mut calls = connection(&daemon).await.ready().await.unwrap();
    let (answers, mut messages) = calls.send_request(request("KeepAlive").body(()).unwrap(), false).unwrap();
    let named = leases.clone();
    tokio::spawn(async move {
        let mut ticks = interval(ms(20));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for sequence in 1..=MESSAGES {
            if sequence % 20 == 0 {
                ticks.tick().await;
            }
            // A message names 1, 2, 3 or no leases, in turn. Each message is sent in a separate
            // frame, as if a client sent them one by one.
            let leases = named.iter().take((sequence % 4) as usize).cloned().collect();
            let message = framed(&KeepAliveRequest { leases, sequence }.encode_to_vec());
            messages.send_data(message.into(), false).unwrap();
        }
        messages
    });
    let mut answers = Answers { body: answers.await.unwrap().into_body(), unread: Vec::new() };
    let mut due: BTreeSet<u64> = (1..=MESSAGES).collect();
    while !due.is_empty() {
        let answer = timeout(PATIENCE, answers.next()).await.unwrap();
        assert!(due.remove(&answer.sequence), "{} is answered twice", answer.sequence);
        let expected: Vec<LeaseRef> = leases.iter().take((answer.sequence % 4) as usize).cloned().collect();
        let told = |result: &KeepAliveResult| result.lease.clone().unwrap();
        if !expected.is_empty() {
            assert_eq!(answer.results.iter().map(told).collect::<Vec<_>>(), expected);
        }
        for result in answer.results {
            assert!(kept(&result.outcome.unwrap()) > Duration::ZERO);
        }
    }
}

/// The answers on a keepalive stream.
struct Answers {
    body: RecvStream,
    unread: Vec<u8>,
}

impl Answers {
    async fn next(&mut self) -> KeepAliveResponse {
        loop {
            if let Some((prefix, rest)) = self.unread.split_first_chunk::<5>() {
                let [_, length @ ..] = *prefix;
                if let Some(message) = rest.get(..u32::from_be_bytes(length) as usize) {
                    let answer = KeepAliveResponse::decode(message).unwrap();
                    self.unread.drain(..5 + message.len());
                    return answer;
                }
            }
            let data = self.body.data().await.expect("the stream has ended").unwrap();
            self.body.flow_control().release_capacity(data.len()).unwrap();
            self.unread.extend(data);
        }
    }
}

/// Opens a connection for calls that the test encodes itself.
async fn connection(daemon: &Daemon) -> SendRequest<Bytes> {
    let stream = TcpStream::connect(daemon.grpc).await.unwrap();
    let (calls, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    calls
}

fn request(method: &str) -> http::request::Builder {
    Request::post(format!("http://leased/leased.v1.LeaseService/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
}

/// Sends `message`, which may be incomplete, and returns the status with which the daemon answers.
async fn status(
    calls: &SendRequest<Bytes>,
    method: &str,
    grpc_timeout: Option<&str>,
    message: Vec<u8>,
    ends: bool,
) -> HeaderMap {
    let mut request = request(method);
    if let Some(grpc_timeout) = grpc_timeout {
        request = request.header("grpc-timeout", grpc_timeout);
    }
    let mut calls = calls.clone().ready().await.unwrap();
    let (answer, mut body) = calls.send_request(request.body(()).unwrap(), false).unwrap();
    body.send_data(message.into(), ends).unwrap();
    let (head, mut answer) = answer.await.unwrap().into_parts();
    if head.headers.contains_key("grpc-status") {
        return head.headers;
    }
    while let Some(data) = answer.data().await {
        answer.flow_control().release_capacity(data.unwrap().len()).unwrap();
    }
    answer.trailers().await.unwrap().unwrap()
}

/// Frames a message as gRPC does.
fn framed(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    [&[0][..], &length, message].concat()
}

/// Returns a framed message of this many zero bytes.
fn message(bytes: usize) -> Vec<u8> {
    framed(&vec![0; bytes])
}

#[tokio::test]
async fn messages_that_stay_incomplete_are_refused() {
    let daemon = Daemon::start(Embedded).await;
    let calls = connection(&daemon).await;
    for (method, said) in [("Get", &message(0)[..]), ("Get", &[]), ("KeepAlive", &message(1000)[..500])] {
        let status = timeout(PATIENCE, status(&calls, method, None, said.to_vec(), false)).await.unwrap();
        assert_eq!(status["grpc-status"], "8", "{method} {}: {status:?}", said.len());
        assert!(status["grpc-message"].to_str().unwrap().contains("receiving_seconds"), "{status:?}");
    }
}

/// Returns the largest message that is allowed, without its last byte.
fn unfinished() -> Vec<u8> {
    let mut message = message(4 << 20);
    message.pop();
    message
}

/// Begins a message on a stream of each connection, and returns the status message of the first
/// stream that ends.
async fn begin_messages<const N: usize>(
    connections: [&SendRequest<Bytes>; N],
) -> (JoinSet<HeaderMap>, String) {
    let mut holding = JoinSet::new();
    for calls in connections.map(SendRequest::clone) {
        holding.spawn(async move { status(&calls, "KeepAlive", None, unfinished(), false).await });
    }
    let first = timeout(PATIENCE, holding.join_next()).await.unwrap().unwrap().unwrap();
    assert_eq!(first["grpc-status"], "8", "{first:?}");
    (holding, first["grpc-message"].to_str().unwrap().to_owned())
}

/// Checks that the daemon answers a message that does not fit into one frame.
async fn assert_served(daemon: &Daemon) {
    let leases = (0..1000).map(|number| named(&number.to_string(), Uuid::new_v4())).collect();
    let message = framed(&KeepAliveRequest { leases, sequence: 1 }.encode_to_vec());
    let status = status(&connection(daemon).await, "KeepAlive", None, message, true).await;
    assert_eq!(status["grpc-status"], "0", "{status:?}");
}

#[tokio::test]
async fn incomplete_messages_on_one_connection_leave_room_for_other_connections() {
    let daemon = Daemon::start_with(Embedded, |config| config.limits.receiving_bytes = 6 << 20).await;
    let calls = connection(&daemon).await;
    let (_holding, refused) = begin_messages([&calls; 3]).await;
    assert!(refused.contains("connection_receiving_bytes"), "{refused}");
    assert_served(&daemon).await;
    // The same connection can still make small calls.
    assert_eq!(status(&calls, "Get", None, message(0), true).await["grpc-status"], "3");
}

#[tokio::test]
async fn incomplete_messages_on_many_connections_have_a_common_limit() {
    let daemon = Daemon::start_with(Embedded, |config| config.limits.receiving_bytes = 6 << 20).await;
    let (one, other) = (connection(&daemon).await, connection(&daemon).await);
    let (_holding, refused) = begin_messages([&one, &other]).await;
    assert!(refused.contains("receiving_bytes") && !refused.contains("connection"), "{refused}");
    assert_served(&daemon).await;
}

#[tokio::test]
async fn a_missed_deadline_is_never_reported_as_another_failure() {
    let daemon = Daemon::start(Embedded).await;
    let calls = connection(&daemon).await;
    for number in 0..200 {
        let timeout = format!("{}u", 1 + 50 * number);
        // Every second message is incomplete, so only the deadline can end its call in time.
        let is_complete = number % 2 == 0;
        let status = status(&calls, "Get", Some(&timeout), message(0), is_complete).await;
        match status["grpc-status"].to_str().unwrap() {
            "4" => {}
            // The empty message lacks a key, so it may also be refused as invalid.
            "3" if is_complete => {}
            other => panic!("{timeout}: {other}, {status:?}"),
        }
    }
    let in_time = status(&calls, "Get", Some("60S"), message(0), true).await;
    assert_eq!(in_time["grpc-status"], "3", "the empty key is refused long before the deadline: {in_time:?}");
}

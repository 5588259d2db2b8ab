//! Serves connections: no more than are allowed, and none that is silent for long.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::pending;
use futures_util::stream::{Stream, StreamExt};
use hyper::body::Incoming;
use hyper::rt::Executor;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tower::{Service, ServiceExt};

use super::accept::Batched;
use super::receiving::Taken;
use super::sending::{PIECE, in_time};
use crate::config::Limits;
use crate::engine::Caller;
use crate::grpc::untaken::Untaken;
use crate::metrics::registry::Present;
use crate::panics::contain;

/// How long a peer may take to say that it speaks HTTP/2.
const GREETING: Duration = Duration::from_secs(5);
/// A peer that says nothing is asked for a sign of life after this, and has as long to give one. Without pings a half-open
/// connection looks alive for minutes. In the middle of a block of headers no peer can answer (RFC 9113, 6.10), so twice this
/// bounds how long headers may take to come in.
const PING: Duration = Duration::from_secs(5);
/// How long a connection without calls may take to close in a drain.
const FAREWELL: Duration = Duration::from_secs(1);
/// What an HTTP/2 client says first (RFC 9113, 3.4), in bytes.
const PREFACE: usize = 24;
/// Between two log lines about connections that were closed for being too many.
const SPARSELY: Duration = Duration::from_secs(10);
/// How often a peer may make h2 reset a stream, in the life of a connection. h2 counts for life, so this is far beyond what
/// mistakes of an honest client come to; each reset takes some hundred bytes until the peer has read it.
const LOCAL_RESETS: usize = 16 * 1024;

/// A connection's share of those that are allowed at once.
pub(crate) type Slot = OwnedSemaphorePermit;

/// Serves what comes in, each connection in a task, at most `most` at once, until `ended` or nothing more comes; then waits for
/// those that are open. Further ones are closed at once and counted in `refused`. Dropping this cuts all connections.
pub(crate) async fn serve_all<T, F>(
    incoming: impl Stream<Item = T>,
    most: usize,
    refused: Counter,
    ended: CancellationToken,
    serve: impl Fn(T, Slot) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let room = Arc::new(Semaphore::new(most.min(Semaphore::MAX_PERMITS)));
    let cut = CancellationToken::new();
    let _cut_all = cut.clone().drop_guard();
    let connections = TaskTracker::new();
    {
        let mut incoming = pin!(incoming.take_until(ended.cancelled()));
        let mut complaint = Complaint::default();
        while let Some(stream) = incoming.next().await {
            let Ok(slot) = Arc::clone(&room).try_acquire_owned() else {
                refused.inc();
                complaint.refused(most);
                continue;
            };
            let (connection, cut) = (serve(stream, slot), cut.clone());
            connections.spawn(contain(async move {
                tokio::select! {
                    () = connection => {}
                    () = cut.cancelled() => {}
                }
            }));
        }
        // The port is closed here: a peer that comes now should go elsewhere, and not wait.
    }
    connections.close();
    connections.wait().await;
}

/// Says now and then how many connections were closed for being too many.
#[derive(Debug, Default)]
struct Complaint {
    last: Option<Instant>,
    unsaid: u64,
}

impl Complaint {
    fn refused(&mut self, most: usize) {
        self.unsaid += 1;
        if self.last.is_none_or(|last| last.elapsed() >= SPARSELY) {
            tracing::warn!(closed = self.unsaid, limit = most, "as many connections are open as are allowed");
            *self = Self { last: Some(Instant::now()), unsaid: 0 };
        }
    }
}

/// What is known of the other side of a connection.
#[derive(Debug, Default)]
pub(crate) struct Peer {
    /// It has said that it speaks HTTP/2.
    has_greeted: AtomicBool,
    /// Calls that are open.
    calls: AtomicUsize,
}

impl Peer {
    /// `bytes` have come from it in all.
    pub(crate) fn heard(&self, bytes: usize) {
        if bytes >= PREFACE {
            self.has_greeted.store(true, Ordering::Relaxed);
        }
    }

    fn has_greeted(&self) -> bool {
        self.has_greeted.load(Ordering::Relaxed)
    }

    /// Ready if it has not greeted in time.
    async fn is_silent(&self) {
        sleep(GREETING).await;
        if self.has_greeted() {
            pending().await
        }
    }

    /// Ready once it has had time to close the connection and has no calls open.
    async fn is_done(&self) {
        sleep(FAREWELL).await;
        while self.calls.load(Ordering::Relaxed) > 0 {
            sleep(FAREWELL / 10).await;
        }
    }
}

/// Runs the calls of one connection, and knows how many there are.
#[derive(Debug, Clone)]
struct Calls(Arc<Peer>);

/// A call that is open.
struct Open(Arc<Peer>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.calls.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<F> Executor<F> for Calls
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    fn execute(&self, call: F) {
        self.0.calls.fetch_add(1, Ordering::Relaxed);
        let open = Open(Arc::clone(&self.0));
        // An async block would have room for the call twice: where it is captured, and where it is awaited.
        tokio::spawn(contain(in_time(call)).map(|_| drop(open)));
    }
}

/// Serves gRPC on connections.
#[derive(Debug, Clone)]
pub(crate) struct Grpc<S> {
    pub(crate) service: S,
    pub(crate) limits: Limits,
    /// Connections that are open.
    pub(crate) open: Gauge,
    pub(crate) draining: CancellationToken,
}

impl<S, E> Grpc<S>
where
    S: Service<Request<Incoming>, Response = Response<Body>, Error = E> + Clone + Send + 'static,
    S::Future: Send,
    E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
{
    /// Serves one connection until either side ends it; in a drain, for as long as it has calls. The unary calls of a
    /// connection take turns as one caller, and its messages share what they may take while they come in and their answers go
    /// out.
    pub(crate) async fn serve<T>(self, stream: T, slot: Slot)
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let _held = (slot, Present::of(&self.open));
        let peer = Arc::new(Peer::default());
        let stream = TokioIo::new(Batched::new(stream, Arc::clone(&peer)));
        let http = http2(&self.limits, Calls(Arc::clone(&peer)));
        let (caller, receiving, untaken) = (Caller::new(), Taken::default(), Untaken::default());
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(caller.clone());
            request.extensions_mut().insert(receiving.clone());
            request.extensions_mut().insert(untaken.clone());
            // In a box, which goes when the answer begins: a stream's task would keep the room for it as long as it lives.
            Box::pin(self.service.clone().oneshot(request))
        });
        let mut connection = pin!(http.serve_connection(stream, service));
        tokio::select! {
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(error, "a connection failed");
                }
                return;
            }
            () = peer.is_silent() => {
                tracing::debug!("closed a connection that was silent");
                return;
            }
            () = self.draining.cancelled() => {}
        }
        if !peer.has_greeted() {
            return;
        }
        connection.as_mut().graceful_shutdown();
        tokio::select! {
            _ = connection => {}
            () = peer.is_done() => {}
        }
    }
}

fn http2(limits: &Limits, calls: Calls) -> auto::Builder<Calls> {
    let mut builder = auto::Builder::new(calls).http2_only();
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.streams)
        // Calls that were cancelled before this side has seen them: after a hitch in the network all that a client has open
        // may come together with their ends, and those that it opened in their place. More is an attack (CVE-2023-44487).
        .max_pending_accept_reset_streams(Some(2 * limits.streams as usize))
        .max_local_error_reset_streams(Some(LOCAL_RESETS))
        // What is sent into the window of a peer that does not read its socket is in memory until it does. A body that has
        // ended has no deadline any more.
        .max_send_buf_size(2 * PIECE)
        .max_header_list_size(16 * 1024)
        .keep_alive_interval(Some(PING))
        .keep_alive_timeout(PING);
    builder
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use clap::Parser;
    use futures_util::stream::repeat_with;
    use http_body::Frame;
    use http_body_util::StreamBody;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tonic::codegen::Bytes;
    use tower::{Layer, service_fn};

    use super::*;
    use crate::config::{Args, Config};
    use crate::transport::bounds::BoundCalls;
    use crate::transport::receiving::Room;

    /// How a client begins: the preface and an empty SETTINGS frame.
    const HELLO: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

    /// When the call is reset whose caller takes nothing of its answer and answers pings; within a minute.
    async fn reset(path: &str) -> Option<Duration> {
        let limits = Config::try_from(Args::parse_from(["leased"])).expect("the defaults").limits;
        let answer = |_: Request<Body>| async {
            let body = http_body_util::Full::new(Bytes::from_static(b"an answer"));
            Ok::<_, Infallible>(Response::new(Body::new(body)))
        };
        let service = BoundCalls(Room::new(1000)).layer(service_fn(answer));
        let grpc = Grpc { service, limits, open: Gauge::default(), draining: CancellationToken::new() };
        let slot = Arc::new(Semaphore::new(1)).acquire_owned().await.expect("a slot");
        let (mut peer, stream) = duplex(64 * 1024);
        tokio::spawn(grpc.serve(stream, slot));
        // A window of 0, and POST, http, the path and an authority.
        let windows = b"\0\0\x06\x04\0\0\0\0\0\0\x04\0\0\0\0";
        let length = |text: &str| u8::try_from(text.len()).expect("a short text");
        let headers = [&b"\x83\x86\x04"[..], &[length(path)], path.as_bytes(), b"\x01\x06leased"].concat();
        let size = u8::try_from(headers.len()).expect("short headers");
        let hello = [HELLO, windows, &[0, 0, size], b"\x01\x05\0\0\0\x01", &headers].concat();
        peer.write_all(&hello).await.expect("a connection");
        let began = Instant::now();
        let reset = async {
            loop {
                let mut head = [0; 9];
                peer.read_exact(&mut head).await.expect("a frame");
                let mut payload = vec![0; usize::from(head[1]) * 256 + usize::from(head[2])];
                peer.read_exact(&mut payload).await.expect("a payload");
                match (head[3], head[4]) {
                    (3, _) => return began.elapsed(),
                    (6, 0) => {
                        let pong = [&b"\0\0\x08\x06\x01\0\0\0\0"[..], &payload].concat();
                        peer.write_all(&pong).await.expect("a connection");
                    }
                    _ => {}
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(60), reset).await.ok()
    }

    #[tokio::test(start_paused = true)]
    async fn a_unary_call_whose_answer_is_not_taken_is_reset_after_ten_seconds_and_a_stream_is_not() {
        let took = reset("/leased.v1.LeaseService/Get").await.expect("an end").as_millis();
        assert!((10_000..10_100).contains(&took), "{took} ms");
        assert_eq!(reset("/leased.v1.LeaseService/Watch").await, None);
    }

    /// Windows do not bound what is sent to a peer: it may give as much as it likes, and not read its socket.
    #[tokio::test(start_paused = true)]
    async fn little_is_made_ready_for_a_peer_that_does_not_read_its_socket() {
        const FRAME: usize = 16 * 1024;
        let limits = Config::try_from(Args::parse_from(["leased"])).expect("the defaults").limits;
        let made = Arc::new(AtomicUsize::new(0));
        let frames = Arc::clone(&made);
        let answer = move |_: Request<Incoming>| {
            let frames = Arc::clone(&frames);
            async move {
                let frame = move || {
                    frames.fetch_add(1, Ordering::Relaxed);
                    Ok::<_, Infallible>(Frame::data(Bytes::from_static(&[0; FRAME])))
                };
                Ok::<_, Infallible>(Response::new(Body::new(StreamBody::new(repeat_with(frame)))))
            }
        };
        let draining = CancellationToken::new();
        let grpc = Grpc { service: service_fn(answer), limits, open: Gauge::default(), draining };
        let slot = Arc::new(Semaphore::new(1)).acquire_owned().await.expect("a slot");
        let socket = 64 * 1024;
        let (mut peer, stream) = duplex(socket);
        tokio::spawn(grpc.serve(stream, slot));
        let windows = b"\0\0\x06\x04\0\0\0\0\0\0\x04\x7f\xff\xff\xff\0\0\x04\x08\0\0\0\0\0\x7f\0\0\0";
        let headers = b"\x83\x86\x84\x01\x06leased";
        let size = u8::try_from(headers.len()).expect("short headers");
        let hello = [HELLO, windows, &[0, 0, size], b"\x01\x05\0\0\0\x01", headers].concat();
        peer.write_all(&hello).await.expect("a connection");
        sleep(Duration::from_secs(1)).await;
        let made = made.load(Ordering::Relaxed) * FRAME;
        assert!((socket..2 * socket).contains(&made), "{made} bytes");
    }

    #[tokio::test(start_paused = true)]
    async fn headers_that_do_not_come_whole_end_their_connection_within_ten_seconds() {
        let limits = Config::try_from(Args::parse_from(["leased"])).expect("the defaults").limits;
        // Half of a HEADERS frame, and a whole one that another is to follow.
        for begun in [&b"\0\0\x01\x01\0"[..], b"\0\0\x01\x01\0\0\0\0\x01\x83"] {
            let service = service_fn(|_: Request<Incoming>| async {
                Ok::<_, Infallible>(Response::new(Body::empty()))
            });
            let grpc = Grpc { service, limits, open: Gauge::default(), draining: CancellationToken::new() };
            let slot = Arc::new(Semaphore::new(1)).acquire_owned().await.expect("a slot");
            let (mut peer, stream) = duplex(64 * 1024);
            let began = Instant::now();
            tokio::spawn(grpc.serve(stream, slot));
            peer.write_all(&[HELLO, begun].concat()).await.expect("a connection");
            peer.read_to_end(&mut Vec::new()).await.expect("an end");
            let took = began.elapsed();
            assert!(took <= Duration::from_millis(10_100), "{took:?}");
        }
    }
}

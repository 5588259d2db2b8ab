//! Serves connections: at most a given number, and none that is silent for long.
//!
//! hyper serves the connections, because tonic's server leaves silent connections open, waits for
//! them in a drain, and answers a passed deadline with CANCELLED.

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
use super::receiving::BytesInUse;
use super::sending::{CHUNK_BYTES, in_time};
use crate::config::Limits;
use crate::engine::Caller;
use crate::grpc::unread::UnreadAnswers;
use crate::metrics::registry::GaugeGuard;
use crate::panics::contain;

/// How long a peer may take to send the HTTP/2 preface.
const PREFACE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a peer may be silent before it is sent a ping, and how long it may take to answer the
/// ping. Without pings a half-open connection looks alive for minutes. A peer cannot answer in the
/// middle of a header block (RFC 9113, 6.10), so headers must arrive within twice this.
const PING: Duration = Duration::from_secs(5);
/// How long a connection without calls may take to close in a drain.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// The length of the HTTP/2 preface (RFC 9113, 3.4), in bytes.
const PREFACE_BYTES: usize = 24;
/// The least time between two log lines about refused connections.
const WARNING_INTERVAL: Duration = Duration::from_secs(10);
/// How many times a peer may make h2 reset a stream before h2 closes the connection. h2 counts over
/// the whole life of a connection, so this is far more than an honest client causes by mistake.
/// Each reset takes a few hundred bytes until the peer has read it.
const MAX_LOCAL_RESETS: usize = 16 * 1024;

/// Permits one connection. Dropping it permits another connection.
pub(crate) type ConnectionSlot = OwnedSemaphorePermit;

/// Serves the connections of `incoming`, each in a task, until `ended` is cancelled or `incoming`
/// ends. Then waits until all connections are closed.
///
/// At most `most` connections are open at once. Further ones are closed and counted in `refused`.
/// Dropping the future cuts all connections.
pub(crate) async fn serve_all<T, F>(
    incoming: impl Stream<Item = T>,
    most: usize,
    refused: Counter,
    ended: CancellationToken,
    serve: impl Fn(T, ConnectionSlot) -> F,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let slots = Arc::new(Semaphore::new(most.min(Semaphore::MAX_PERMITS)));
    let cut = CancellationToken::new();
    let _cut_all = cut.clone().drop_guard();
    let connections = TaskTracker::new();
    {
        let mut incoming = pin!(incoming.take_until(ended.cancelled()));
        let mut warning = RefusalWarning::default();
        while let Some(stream) = incoming.next().await {
            let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
                refused.inc();
                warning.refused(most);
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
        // `incoming` is dropped here, which closes the port: a peer that connects now is refused
        // and can go to another daemon at once.
    }
    connections.close();
    connections.wait().await;
}

/// Logs from time to time how many connections were refused.
#[derive(Debug, Default)]
struct RefusalWarning {
    last: Option<Instant>,
    unlogged: u64,
}

impl RefusalWarning {
    fn refused(&mut self, most: usize) {
        self.unlogged += 1;
        if self.last.is_none_or(|last| last.elapsed() >= WARNING_INTERVAL) {
            tracing::warn!(
                closed = self.unlogged,
                limit = most,
                "as many connections are open as are allowed"
            );
            *self = Self { last: Some(Instant::now()), unlogged: 0 };
        }
    }
}

/// What is known of the other side of a connection.
#[derive(Debug, Default)]
pub(crate) struct Peer {
    /// Whether the peer has sent as many bytes as the HTTP/2 preface has.
    has_sent_preface: AtomicBool,
    /// How many calls are open.
    calls: AtomicUsize,
}

impl Peer {
    /// Notes that the peer has sent `bytes` in all.
    pub(crate) fn received(&self, bytes: usize) {
        if bytes >= PREFACE_BYTES {
            self.has_sent_preface.store(true, Ordering::Relaxed);
        }
    }

    fn has_sent_preface(&self) -> bool {
        self.has_sent_preface.load(Ordering::Relaxed)
    }

    /// Completes if the peer has not sent the preface in time.
    async fn preface_timed_out(&self) {
        sleep(PREFACE_TIMEOUT).await;
        if self.has_sent_preface() {
            pending().await
        }
    }

    /// Completes once the peer has had time to close the connection and has no open calls.
    async fn calls_are_done(&self) {
        sleep(CLOSE_TIMEOUT).await;
        while self.calls.load(Ordering::Relaxed) > 0 {
            sleep(CLOSE_TIMEOUT / 10).await;
        }
    }
}

/// Runs the calls of one connection in tasks, and counts them.
#[derive(Debug, Clone)]
struct CallExecutor(Arc<Peer>);

/// Counts an open call until it is dropped.
struct OpenCall(Arc<Peer>);

impl Drop for OpenCall {
    fn drop(&mut self) {
        self.0.calls.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<F> Executor<F> for CallExecutor
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    fn execute(&self, call: F) {
        self.0.calls.fetch_add(1, Ordering::Relaxed);
        let open = OpenCall(Arc::clone(&self.0));
        // Combinators, because an async block would have space for the call twice: where the call
        // is captured, and where it is awaited.
        tokio::spawn(contain(in_time(call)).map(|_| drop(open)));
    }
}

/// Serves gRPC on connections.
#[derive(Debug, Clone)]
pub(crate) struct Grpc<S> {
    pub(crate) service: S,
    pub(crate) limits: Limits,
    /// Counts open connections.
    pub(crate) open: Gauge,
    pub(crate) draining: CancellationToken,
}

impl<S, E> Grpc<S>
where
    S: Service<Request<Incoming>, Response = Response<Body>, Error = E> + Clone + Send + 'static,
    S::Future: Send,
    E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
{
    /// Serves one connection until either side closes it. In a drain, the connection is closed once
    /// it has no calls.
    ///
    /// All calls of the connection share one [`BytesInUse`] for requests and one [`UnreadAnswers`]
    /// for answers on keepalive streams. All but the keepalive streams share one [`Caller`] for
    /// their turns.
    pub(crate) async fn serve<T>(self, stream: T, slot: ConnectionSlot)
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let _held = (slot, GaugeGuard::one_more(&self.open));
        let peer = Arc::new(Peer::default());
        let stream = TokioIo::new(Batched::new(stream, Arc::clone(&peer)));
        let http = http2(&self.limits, CallExecutor(Arc::clone(&peer)));
        let (caller, in_use, unread) = (Caller::new(), BytesInUse::default(), UnreadAnswers::default());
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(caller.clone());
            request.extensions_mut().insert(in_use.clone());
            request.extensions_mut().insert(unread.clone());
            // Boxed, and dropped when the response begins. A task keeps the space of the largest
            // state that it is ever in, so a stream would keep the space of this future for its
            // whole life.
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
            () = peer.preface_timed_out() => {
                tracing::debug!("closed a connection that was silent");
                return;
            }
            () = self.draining.cancelled() => {}
        }
        // A peer that has not even sent the preface has no calls to wait for.
        if !peer.has_sent_preface() {
            return;
        }
        connection.as_mut().graceful_shutdown();
        tokio::select! {
            _ = connection => {}
            () = peer.calls_are_done() => {}
        }
    }
}

fn http2(limits: &Limits, executor: CallExecutor) -> auto::Builder<CallExecutor> {
    let mut builder = auto::Builder::new(executor).http2_only();
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.streams)
        // How many calls may be cancelled before this side accepts them. After a hitch in the
        // network, the open calls of a client may arrive together with their cancellations and with
        // the calls that replace them. More is an attack (CVE-2023-44487).
        .max_pending_accept_reset_streams(Some(2 * limits.streams as usize))
        .max_local_error_reset_streams(Some(MAX_LOCAL_RESETS))
        // A peer can open a large window and not read its socket, and the data for it stays in
        // memory. No deadline frees the data once the whole body has been handed out.
        .max_send_buf_size(2 * CHUNK_BYTES)
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
    use crate::transport::bounds::BoundsLayer;
    use crate::transport::receiving::ReceiveBudget;

    /// What a client sends first: the preface and an empty SETTINGS frame.
    const HELLO: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

    /// Returns after how long a call is reset whose caller reads nothing of the response but
    /// answers pings. `None` if it is not reset within a minute.
    async fn reset(path: &str) -> Option<Duration> {
        let limits = Config::try_from(Args::parse_from(["leased"])).expect("the defaults").limits;
        let handler = |_: Request<Body>| async {
            let body = http_body_util::Full::new(Bytes::from_static(b"a response"));
            Ok::<_, Infallible>(Response::new(Body::new(body)))
        };
        let service = BoundsLayer(ReceiveBudget::new(1000)).layer(service_fn(handler));
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
    async fn a_unary_call_whose_response_is_not_read_is_reset_after_ten_seconds_and_a_stream_is_not() {
        let elapsed = reset("/leased.v1.LeaseService/Get").await.expect("an end").as_millis();
        assert!((10_000..10_100).contains(&elapsed), "{elapsed} ms");
        assert_eq!(reset("/leased.v1.LeaseService/Watch").await, None);
    }

    /// Windows do not bound the memory for a peer: it may open a large window and not read its
    /// socket.
    #[tokio::test(start_paused = true)]
    async fn little_is_buffered_for_a_peer_that_does_not_read_its_socket() {
        const FRAME: usize = 16 * 1024;
        let limits = Config::try_from(Args::parse_from(["leased"])).expect("the defaults").limits;
        let made = Arc::new(AtomicUsize::new(0));
        let frames = Arc::clone(&made);
        let handler = move |_: Request<Incoming>| {
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
        let grpc = Grpc { service: service_fn(handler), limits, open: Gauge::default(), draining };
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
    async fn incomplete_headers_end_their_connection_within_ten_seconds() {
        let limits = Config::try_from(Args::parse_from(["leased"])).expect("the defaults").limits;
        // A part of a HEADERS frame, and a complete frame without END_HEADERS, which a CONTINUATION
        // must follow.
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
            let elapsed = began.elapsed();
            assert!(elapsed <= Duration::from_millis(10_100), "{elapsed:?}");
        }
    }
}

//! Accepts connections, also after file descriptors have run out, and sends responses that are
//! ready together in one write.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::stream::{self, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;

use super::listener::Peer;

/// The pause after an accept failed, most likely because file descriptors ran out.
const BACK_OFF: Duration = Duration::from_millis(100);

/// A connection that yields once before each write, so that all responses of a batch leave in one
/// system call.
///
/// A batch makes many responses ready at once. Without the yield the runtime would poll the
/// connection after each of them, and each response would cost a system call and a packet, here and
/// at the client. That would cost a quarter of the throughput of acquire and release pairs. If no
/// other task is ready, the write takes place at once.
#[derive(Debug)]
pub(crate) struct Batched<T> {
    stream: T,
    /// Whether the connection has yielded before the next write.
    has_yielded: bool,
    /// How many bytes have arrived.
    received: usize,
    peer: Arc<Peer>,
}

impl<T> Batched<T> {
    pub(crate) fn new(stream: T, peer: Arc<Peer>) -> Self {
        Self { stream, has_yielded: false, received: 0, peer }
    }

    /// Yields once, and then is ready for one write.
    fn poll_yielded(&mut self, context: &Context<'_>) -> Poll<()> {
        self.has_yielded = !self.has_yielded;
        if self.has_yielded {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(())
    }
}

/// Returns the connections of `listener`. A connection is accepted when the stream is polled. Until
/// then it waits in the system's backlog.
pub(crate) fn connections(listener: TcpListener) -> impl Stream<Item = TcpStream> {
    stream::unfold(listener, async |listener| Some((accept(&listener).await, listener)))
}

async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // With Nagle's algorithm a small message may wait until the peer acknowledges the
                // one before.
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%error, "a connection without TCP_NODELAY");
                }
                return stream;
            }
            Err(error) => {
                tracing::warn!(%error, "could not accept a connection");
                sleep(BACK_OFF).await;
            }
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Batched<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        self.received = self.received.saturating_add(buffer.filled().len() - before);
        self.peer.received(self.received);
        read
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Batched<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_yielded(context));
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_yielded(context));
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

//! Accepting connections: at most so many at once, and none lost when file descriptors run out; and writing to them
//! once for all answers that are ready together.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::stream::{self, Stream, StreamExt};
use prometheus_client::metrics::gauge::Gauge;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::sleep;
use tonic::transport::server::Connected;

use crate::lessor::Caller;
use crate::meter::Present;

/// The pause after an accept failed, most likely for want of file descriptors.
const BACK_OFF: Duration = Duration::from_millis(100);

/// A connection that counts as long as it lives.
///
/// Each write first lets those run who are ready: a batch makes many answers at once, and without this the runtime
/// would turn to the connection after each of them, and each would cost a system call and a packet. When nobody else
/// is ready the write takes place at once.
#[derive(Debug)]
pub(crate) struct Counted<T> {
    stream: T,
    /// Others have been let run before the write that is due.
    has_yielded: bool,
    caller: Caller,
    _permit: OwnedSemaphorePermit,
    _open: Present,
}

impl<T> Counted<T> {
    /// Ready when the write may take place.
    fn poll_turn(&mut self, context: &Context<'_>) -> Poll<()> {
        self.has_yielded = !self.has_yielded;
        if self.has_yielded {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(())
    }
}

/// At most `most` of the connections at once, counted in `open`; others wait where they come from.
pub(crate) fn counted<T>(
    connections: impl Stream<Item = T>,
    most: usize,
    open: Gauge,
) -> impl Stream<Item = io::Result<Counted<T>>> {
    let room = Arc::new(Semaphore::new(most.min(Semaphore::MAX_PERMITS)));
    stream::unfold((Box::pin(connections), room, open), async |(mut connections, room, open)| {
        let permit = Arc::clone(&room).acquire_owned().await.ok()?;
        let stream = connections.next().await?;
        let caller = Caller::new();
        let counted =
            Counted { stream, has_yielded: false, caller, _permit: permit, _open: Present::of(&open) };
        Some((Ok(counted), (connections, room, open)))
    })
}

/// Connections of `listener`; those that nobody asks for wait in the system's backlog.
pub(crate) fn connections(listener: TcpListener) -> impl Stream<Item = TcpStream> {
    stream::unfold(listener, async |listener| Some((accept(&listener).await, listener)))
}

async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // Without it a small message may wait for the answer to the one before.
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

/// Calls of one connection take turns with those of others.
impl<T> Connected for Counted<T> {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Counted<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Counted<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_turn(context));
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_turn(context));
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

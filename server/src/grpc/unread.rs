//! Bounds the memory of keepalive answers that callers have not read.
//!
//! A stream whose caller does not read an answer in time is reset. The large answers of one
//! connection share an allowance: a message waits for its share before its leases are touched, and
//! gives it back when the answer has been read. No connection waits for another one.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use futures_util::future::{BoxFuture, Either, Ready, ready};
use futures_util::stream::Stream;
use leased_proto::v1::{KeepAliveRequest, KeepAliveResponse, KeepAliveResult};
use prost::Message;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::error::Elapsed;
use tokio::time::{Instant, timeout};
use tonic::Status;

use super::response;
use crate::transport::sending::{SEND_TIMEOUT, reset_handle};

/// How many leases of one connection may be in messages that are unanswered or whose answers are
/// unread: twice as many as one message may name. Each takes some 300 bytes.
const LEASES: usize = 25_000;
/// How many bytes the messages of one connection that wait for their shares may have, encoded. A
/// message past this ends its stream.
const WAITING_BYTES: usize = 8 * 1024 * 1024;

/// A message's share of its connection's allowance. Dropping the share gives it back.
pub(crate) type Share = OwnedSemaphorePermit;

/// One connection's allowance for unread answers. Clones share the allowance.
#[derive(Debug, Clone)]
pub(crate) struct UnreadAnswers {
    leases: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
}

impl Default for UnreadAnswers {
    fn default() -> Self {
        Self { leases: Arc::new(Semaphore::new(LEASES)), waiting: Arc::new(Semaphore::new(WAITING_BYTES)) }
    }
}

/// A message that has its share, or needs none.
#[derive(Debug)]
pub(crate) struct Admitted {
    pub(crate) message: KeepAliveRequest,
    pub(crate) received_at: Instant,
    /// `None` for a message that is small enough to need no share.
    pub(crate) share: Option<Share>,
}

impl UnreadAnswers {
    /// Takes a share for `leases` leases if the allowance has room now. A message without names
    /// touches all leases of its stream. If they are more than the allowance, it takes all of it.
    pub(crate) fn try_share(&self, leases: usize) -> Option<Share> {
        Arc::clone(&self.leases).try_acquire_many_owned(permits(leases.min(LEASES))).ok()
    }

    /// Waits for a share for `leases` leases. The message waits in encoded form, which takes a
    /// third of the memory.
    ///
    /// # Errors
    /// `RESOURCE_EXHAUSTED` if too many bytes of messages wait on the connection.
    pub(crate) fn wait_for_share(
        &self,
        leases: usize,
        message: &KeepAliveRequest,
        received_at: Instant,
    ) -> Result<BoxFuture<'static, Admitted>, Status> {
        let encoded = message.encode_to_vec();
        let waiting = Arc::clone(&self.waiting)
            .try_acquire_many_owned(permits(encoded.len()))
            .map_err(|_| response::limit_exceeded("connection_waiting_bytes", WAITING_BYTES))?;
        let all = Arc::clone(&self.leases);
        Ok(Box::pin(async move {
            // The semaphore is never closed.
            let share = all.acquire_many_owned(permits(leases.min(LEASES))).await.ok();
            drop(waiting);
            let message = KeepAliveRequest::decode(&*encoded).unwrap_or_default();
            Admitted { message, received_at, share }
        }))
    }
}

fn permits(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// How many responses the caller has read.
#[derive(Debug, Default)]
struct Progress {
    read: AtomicUsize,
    more: Notify,
}

/// The sending side of a stream's responses.
#[derive(Debug)]
pub(crate) struct ResponseSender {
    responses: mpsc::Sender<Result<KeepAliveResponse, Status>>,
    /// How many responses have been handed to the connection.
    sent: usize,
    progress: Arc<Progress>,
    reset: Option<oneshot::Sender<()>>,
}

/// The responses of a stream, for its connection.
#[derive(Debug)]
pub(crate) struct Responses {
    responses: mpsc::Receiver<Result<KeepAliveResponse, Status>>,
    /// The connection has the latest response, and the caller has not read all of it.
    is_being_sent: bool,
    progress: Arc<Progress>,
}

/// Makes both sides of a stream's responses, for the call that this thread polls.
pub(crate) fn channel() -> (ResponseSender, Responses) {
    let (queue, receiver) = mpsc::channel(1);
    let progress = Arc::new(Progress::default());
    let sender = ResponseSender {
        responses: queue,
        sent: 0,
        progress: Arc::clone(&progress),
        reset: Some(reset_handle()),
    };
    (sender, Responses { responses: receiver, is_being_sent: false, progress })
}

impl ResponseSender {
    /// Ready when the caller has gone away.
    pub(crate) fn closed(&self) -> impl Future<Output = ()> + use<> {
        let responses = self.responses.clone();
        async move { responses.closed().await }
    }

    /// Sends results in as many responses as they need, and keeps the share until the caller has
    /// read the responses. Results without a share must fit into one response. Returns false if the
    /// caller has gone away or reads too slowly.
    pub(crate) fn send(
        &mut self,
        sequence: u64,
        results: Vec<KeepAliveResult>,
        share: Option<Share>,
    ) -> Either<Ready<bool>, BoxFuture<'_, bool>> {
        if share.is_none()
            && let Ok(permit) = self.responses.try_reserve()
        {
            permit.send(Ok(KeepAliveResponse { sequence, results, more: false }));
            self.sent += 1;
            return Either::Left(ready(true));
        }
        // Boxed, so that the future of an idle stream has no space for this one.
        Either::Right(Box::pin(async move {
            self.send_all(sequence, results, share).await.unwrap_or_else(|_| {
                self.reset();
                false
            })
        }))
    }

    /// Sends the responses one by one. Each has its own time limit.
    async fn send_all(
        &mut self,
        sequence: u64,
        results: Vec<KeepAliveResult>,
        share: Option<Share>,
    ) -> Result<bool, Elapsed> {
        for response in response::keepalive_responses(sequence, results) {
            if timeout(SEND_TIMEOUT, self.responses.send(Ok(response))).await?.is_err() {
                return Ok(false);
            }
            self.sent += 1;
        }
        while share.is_some() && self.progress.read.load(Ordering::Acquire) < self.sent {
            timeout(SEND_TIMEOUT, self.progress.more.notified()).await?;
        }
        Ok(true)
    }

    /// Sends the status with which the stream ends.
    pub(crate) async fn end(mut self, status: Status) {
        if timeout(SEND_TIMEOUT, self.responses.send(Err(status))).await.is_err() {
            self.reset();
        }
    }

    /// Ends the call at once. Responses that the connection has not sent are dropped.
    fn reset(&mut self) {
        if let Some(reset) = self.reset.take() {
            // The call may have ended by itself.
            let _ = reset.send(());
        }
    }
}

impl Stream for Responses {
    type Item = Result<KeepAliveResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        // A connection polls for more only when its peer has read all that was sent before, except
        // for the last chunks.
        if std::mem::take(&mut self.is_being_sent) {
            self.progress.read.fetch_add(1, Ordering::Release);
            self.progress.more.notify_one();
        }
        let response = std::task::ready!(self.responses.poll_recv(context));
        self.is_being_sent = response.is_some();
        Poll::Ready(response)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn a_message_for_more_leases_than_the_allowance_has_all_of_it_and_others_wait() {
        let unread = UnreadAnswers::default();
        let all = unread.try_share(10 * LEASES).expect("nobody has a share");
        assert!(unread.try_share(1).is_none());
        let message = KeepAliveRequest { sequence: 7, ..KeepAliveRequest::default() };
        let mut later = unread.wait_for_share(10 * LEASES, &message, Instant::now()).expect("nobody waits");
        assert!(later.as_mut().now_or_never().is_none());
        drop(all);
        let Admitted { message, share, .. } = later.await;
        assert_eq!((message.sequence, share.map(|share| share.num_permits())), (7, Some(LEASES)));
    }
}

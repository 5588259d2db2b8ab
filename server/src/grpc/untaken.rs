//! What the answers on keepalive streams take until their callers have taken them. A caller takes an answer in time or its stream
//! is reset, and the large answers of one connection share an allowance.
//!
//! A message waits for its share of the allowance before its leases are touched, and its answer gives the share back when it has
//! been taken. No connection waits for another one.

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
use crate::transport::sending::{TIME, resettable};

/// Leases of one connection in messages that are not answered, or whose answers are not taken: twice as many as one message
/// may have. Each takes some 300 bytes.
const LEASES: usize = 25_000;
/// Messages of one connection that wait for their share, in bytes as they are encoded. More end their streams.
const WAITING_BYTES: usize = 8 * 1024 * 1024;

/// A message's share of what its connection allows. Dropping it gives it back.
pub(crate) type Share = OwnedSemaphorePermit;

/// What the answers on the keepalive streams of one connection may take. Clones are the same connection's.
#[derive(Debug, Clone)]
pub(crate) struct Untaken {
    leases: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
}

impl Default for Untaken {
    fn default() -> Self {
        Self { leases: Arc::new(Semaphore::new(LEASES)), waiting: Arc::new(Semaphore::new(WAITING_BYTES)) }
    }
}

/// A message with its share.
#[derive(Debug)]
pub(crate) struct Entered {
    pub(crate) message: KeepAliveRequest,
    pub(crate) came_at: Instant,
    /// `None` for a message that needs none.
    pub(crate) share: Option<Share>,
}

impl Untaken {
    /// A share for so many leases, if there is one at once. A message for more than there are shares for has all of them: a
    /// stream may be allowed to carry as many.
    pub(crate) fn share(&self, leases: usize) -> Option<Share> {
        Arc::clone(&self.leases).try_acquire_many_owned(permits(leases.min(LEASES))).ok()
    }

    /// Waits for a share for so many leases. Meanwhile the message is kept encoded, which takes a third.
    ///
    /// # Errors
    /// Past a limit if too many messages of the connection wait.
    pub(crate) fn later(
        &self,
        leases: usize,
        message: &KeepAliveRequest,
        came_at: Instant,
    ) -> Result<BoxFuture<'static, Entered>, Status> {
        let encoded = message.encode_to_vec();
        let waiting = Arc::clone(&self.waiting)
            .try_acquire_many_owned(permits(encoded.len()))
            .map_err(|_| response::limit_exceeded("connection_waiting_bytes", WAITING_BYTES))?;
        let all = Arc::clone(&self.leases);
        Ok(Box::pin(async move {
            // Nobody closes it.
            let share = all.acquire_many_owned(permits(leases.min(LEASES))).await.ok();
            drop(waiting);
            let message = KeepAliveRequest::decode(&*encoded).unwrap_or_default();
            Entered { message, came_at, share }
        }))
    }
}

fn permits(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// How far the caller has come with what it is told.
#[derive(Debug, Default)]
struct Progress {
    taken: AtomicUsize,
    more: Notify,
}

/// Where a stream puts its answers.
#[derive(Debug)]
pub(crate) struct Outlet {
    responses: mpsc::Sender<Result<KeepAliveResponse, Status>>,
    put: usize,
    progress: Arc<Progress>,
    reset: Option<oneshot::Sender<()>>,
}

/// What a stream is answered.
#[derive(Debug)]
pub(crate) struct Answers {
    responses: mpsc::Receiver<Result<KeepAliveResponse, Status>>,
    /// The latest response is with the connection.
    is_going: bool,
    progress: Arc<Progress>,
}

/// Both sides of a stream's answers, for the call that this thread polls.
pub(crate) fn outlet() -> (Outlet, Answers) {
    let (sender, receiver) = mpsc::channel(1);
    let progress = Arc::new(Progress::default());
    let outlet =
        Outlet { responses: sender, put: 0, progress: Arc::clone(&progress), reset: Some(resettable()) };
    (outlet, Answers { responses: receiver, is_going: false, progress })
}

impl Outlet {
    /// Ready when the caller has gone away.
    pub(crate) fn closed(&self) -> impl Future<Output = ()> + use<> {
        let responses = self.responses.clone();
        async move { responses.closed().await }
    }

    /// Tells results in as many responses as that takes, and keeps the share until they have been taken. Returns whether the
    /// caller is still there; one that takes them too slowly is not. Results without a share fit into one response.
    pub(crate) fn tell(
        &mut self,
        sequence: u64,
        results: Vec<KeepAliveResult>,
        share: Option<Share>,
    ) -> Either<Ready<bool>, BoxFuture<'_, bool>> {
        if share.is_none()
            && let Ok(place) = self.responses.try_reserve()
        {
            place.send(Ok(KeepAliveResponse { sequence, results, more: false }));
            self.put += 1;
            return Either::Left(ready(true));
        }
        // In a box, which an idle stream has no room for.
        Either::Right(Box::pin(async move {
            self.put(sequence, results, share).await.unwrap_or_else(|_| {
                self.reset();
                false
            })
        }))
    }

    /// Each response has its time.
    async fn put(
        &mut self,
        sequence: u64,
        results: Vec<KeepAliveResult>,
        share: Option<Share>,
    ) -> Result<bool, Elapsed> {
        for response in response::keepalive_responses(sequence, results) {
            if timeout(TIME, self.responses.send(Ok(response))).await?.is_err() {
                return Ok(false);
            }
            self.put += 1;
        }
        while share.is_some() && self.progress.taken.load(Ordering::Acquire) < self.put {
            timeout(TIME, self.progress.more.notified()).await?;
        }
        Ok(true)
    }

    /// Tells how the stream ended.
    pub(crate) async fn end(mut self, status: Status) {
        if timeout(TIME, self.responses.send(Err(status))).await.is_err() {
            self.reset();
        }
    }

    /// Ends the call at once. What the connection has of its answers is forgotten.
    fn reset(&mut self) {
        if let Some(reset) = self.reset.take() {
            let _ = reset.send(());
        }
    }
}

impl Stream for Answers {
    type Item = Result<KeepAliveResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        // A connection asks for more only when its peer has taken what it was given before, but for the last pieces.
        if std::mem::take(&mut self.is_going) {
            self.progress.taken.fetch_add(1, Ordering::Release);
            self.progress.more.notify_one();
        }
        let response = std::task::ready!(self.responses.poll_recv(context));
        self.is_going = response.is_some();
        Poll::Ready(response)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn a_message_for_more_leases_than_the_allowance_has_all_of_it_and_others_wait() {
        let untaken = Untaken::default();
        let all = untaken.share(10 * LEASES).expect("nobody has a share");
        assert!(untaken.share(1).is_none());
        let message = KeepAliveRequest { sequence: 7, ..KeepAliveRequest::default() };
        let mut later = untaken.later(10 * LEASES, &message, Instant::now()).expect("nobody waits");
        assert!(later.as_mut().now_or_never().is_none());
        drop(all);
        let Entered { message, share, .. } = later.await;
        assert_eq!((message.sequence, share.map(|share| share.num_permits())), (7, Some(LEASES)));
    }
}

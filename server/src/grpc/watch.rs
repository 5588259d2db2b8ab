//! The watch stream: changes of keys, as messages. A slow reader delays only its own stream.

use leased_proto::v1::WatchResponse;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::response;
use crate::engine::Watch;
use crate::panics::contain;
use crate::store::Store;
use crate::transport::bounds::panicked;

/// How many messages may wait for the caller to read them.
const READY: usize = 16;

/// The messages of a watch stream.
pub(crate) type Events = ReceiverStream<Result<WatchResponse, Status>>;

/// Serves one watch until the caller goes away or the daemon drains.
pub(crate) fn serve<S: Store>(mut watch: Watch<S>, draining: CancellationToken) -> Events {
    let (events, receiver) = mpsc::channel(READY);
    // In a task, so that the watch ends at once when the caller goes away or the daemon drains. The
    // body of the response is not polled while the caller reads nothing.
    tokio::spawn(async move {
        let forward = async {
            loop {
                let response = response::watch_response(&watch.next().await);
                if events.send(Ok(response)).await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            ended = contain(forward) => if ended.is_err() {
                let _ = events.send(Err(panicked())).await;
            },
            () = events.closed() => {}
            () = draining.cancelled() => {
                let _ = events.send(Err(response::shutting_down())).await;
            }
        }
    });
    ReceiverStream::new(receiver)
}

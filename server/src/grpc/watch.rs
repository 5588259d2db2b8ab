//! The watch stream: what happens to keys, as messages. A slow reader slows its own stream and nobody else.

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

/// Messages that are ready before the caller has taken them.
const READY: usize = 16;

/// What a watch stream is sent.
pub(crate) type Events = ReceiverStream<Result<WatchResponse, Status>>;

/// Serves one watch until the caller goes away or the daemon drains.
pub(crate) fn serve<S: Store>(mut watch: Watch<S>, draining: CancellationToken) -> Events {
    let (events, receiver) = mpsc::channel(READY);
    tokio::spawn(async move {
        let show = async {
            loop {
                let response = response::watch_response(&watch.next().await);
                if events.send(Ok(response)).await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            shown = contain(show) => if shown.is_err() {
                let _ = events.send(Err(panicked())).await;
            },
            () = events.closed() => {}
            () = draining.cancelled() => drop(events.send(Err(response::shutting_down())).await),
        }
    });
    ReceiverStream::new(receiver)
}

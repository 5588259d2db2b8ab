//! The background tasks of the queue: they nudge keys, read records and refresh waiters' entries
//! when these are due. The tasks keep no state.
//!
//! Polls go one chunk at a time, so they never delay a call by more than one chunk. Nudges do not
//! wait for polls. They take turns with calls.

use std::sync::Arc;

use tokio::task::yield_now;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::engine::committer::Committer;
use crate::engine::notify::{self, Subscribers};
use crate::engine::op::Op;
use crate::engine::queue::{DuePolls, WaitQueue};
use crate::lease::{Key, LeaseId, Snapshot, Standing};
use crate::store::Store;

/// Runs the tasks until the daemon drains. Waiters' entries outlast the drain for a while, so their
/// callers can go on waiting at another daemon.
pub(crate) async fn run<S: Store>(
    subscribers: Arc<Subscribers>,
    committer: Arc<Committer<S>>,
    draining: CancellationToken,
) {
    tokio::select! {
        () = draining.cancelled() => {}
        () = nudge(&subscribers.queue, &committer) => {}
        () = poll(&subscribers, &committer) => {}
    }
}

async fn nudge<S: Store>(queue: &WaitQueue, committer: &Arc<Committer<S>>) {
    loop {
        queue.nudge_due().await;
        committer.submit_nudges(queue.take_nudges(Instant::now()));
        // More chunks may be due. The committer can begin with the first one meanwhile.
        yield_now().await;
    }
}

async fn poll<S: Store>(subscribers: &Subscribers, committer: &Arc<Committer<S>>) {
    loop {
        subscribers.queue.poll_due().await;
        let DuePolls { reads, refreshes } = subscribers.queue.take_polls(Instant::now());
        // Failures are ignored: the next poll repeats the work, and an entry outlasts several
        // polls.
        let read = async {
            let _ = notify::read_and_notify(subscribers, committer, &reads).await;
        };
        tokio::join!(read, refresh(&subscribers.queue, committer, refreshes));
    }
}

/// Refreshes waiters' entries, and makes new ones for calls whose entries are gone. A call for
/// which the record has no room ends with [`WaitQueue::give_up`].
async fn refresh<S: Store>(
    queue: &WaitQueue,
    committer: &Arc<Committer<S>>,
    refreshes: Vec<(LeaseId, (Key, Op))>,
) {
    // A refresh never makes an entry, because a late one would make it for a call that has ended.
    // So a missing entry takes a second operation.
    let gone = commit_entries(committer, refreshes).await;
    let rejoin = |(id, snapshot): (LeaseId, Arc<Snapshot>)| {
        let key = snapshot.record.key.clone();
        queue.rejoin(&key, id).map(|op| (id, (key, op)))
    };
    for (id, snapshot) in commit_entries(committer, gone.into_iter().filter_map(rejoin).collect()).await {
        queue.give_up(id, &snapshot);
    }
}

/// Commits operations that keep or make waiters' entries. Returns the ids that have no entry
/// afterwards, with the records that show it.
async fn commit_entries<S: Store>(
    committer: &Arc<Committer<S>>,
    entries: Vec<(LeaseId, (Key, Op))>,
) -> Vec<(LeaseId, Arc<Snapshot>)> {
    let (ids, ops): (Vec<LeaseId>, Vec<(Key, Op)>) = entries.into_iter().unzip();
    let answers = committer.submit_own(ops).await;
    let records = ids.into_iter().zip(answers).filter_map(|(id, answer)| Some((id, answer?.ok()?.snapshot)));
    records.filter(|(id, snapshot)| snapshot.standing(*id) == Standing::Unknown).collect()
}

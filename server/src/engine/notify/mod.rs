//! Passes records on to the parts of the engine that act on them: the queue, the keepalive streams
//! and the watches.
//!
//! Records come from two sides:
//!
//! - A *local commit* returned the record. Records from local commits are passed on in the order of
//!   the commits of their key, each of them once.
//! - A *remote read* returned the record, because another daemon may have changed it. The record
//!   may be older than one that was passed on before. Each subscriber ignores records older than
//!   what it has seen.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::committer::Committer;
use super::metrics::EngineMetrics;
use super::op::Op;
use super::queue::WaitQueue;
use super::streams::StreamIndex;
use super::watch::WatchHub;
use crate::boot_instant::BootInstant;
use crate::lease::{Edit, Key, Snapshot};
use crate::store::{FeedEvent, Store, StoreError};

/// The most keys read with one command.
const READ_KEYS: usize = 1000;
/// The pause before a failed read is repeated.
const RETRY: Duration = Duration::from_millis(500);
/// The most feed events that wait to be handled. The store waits while there is no room for more.
const EVENTS: usize = 4096;

/// The subscribers to all records that this daemon commits or reads.
#[derive(Debug)]
pub(crate) struct Subscribers {
    pub(crate) queue: Arc<WaitQueue>,
    pub(crate) streams: Arc<StreamIndex>,
    pub(crate) watches: Arc<WatchHub>,
    pub(crate) metrics: Arc<EngineMetrics>,
}

impl Subscribers {
    /// Passes on the record after a commit of this daemon, which applied `edit`. The commit was
    /// sent after `sent_at`.
    pub(crate) fn local_commit(&self, snapshot: &Arc<Snapshot>, edit: &Edit, sent_at: BootInstant) {
        self.streams.local_commit(snapshot, edit, sent_at);
        self.watches.observe(snapshot);
        self.queue.local_commit(snapshot);
    }

    /// Passes on a record that another daemon may have written. Returns what to commit.
    pub(crate) fn remote_read(&self, snapshot: &Arc<Snapshot>) -> Vec<(Key, Op)> {
        self.streams.remote_read(snapshot);
        self.watches.observe(snapshot);
        self.queue.remote_read(snapshot)
    }

    /// Tells the subscribers that a read which began at `asked_at` found no record of the key.
    /// Returns what to commit.
    fn remote_missing(&self, key: &Key, asked_at: Instant) -> Vec<(Key, Op)> {
        self.watches.remote_missing(key, asked_at);
        let mut ops = self.streams.remote_missing(key);
        ops.extend(self.queue.remote_missing(key));
        ops
    }

    /// Returns true if a subscriber needs the key's record and has not seen revision `rev` of it.
    /// Without `rev`: if a subscriber needs the record.
    fn needs_read(&self, key: &Key, rev: Option<i64>) -> bool {
        self.queue.needs_read(key, rev)
            || self.streams.needs_read(key, rev)
            || self.watches.needs_read(key, rev)
    }

    /// Returns the keys of waiting calls and of leases on streams. Watched keys are not among them.
    fn keys(&self) -> HashSet<Key> {
        self.queue.keys().into_iter().chain(self.streams.keys()).collect()
    }
}

/// Reads records that other daemons may have changed, and passes them on to the subscribers.
///
/// # Errors
/// [`StoreError`] if the store does not answer in time. Some records may have been passed on by
/// then.
pub(crate) async fn read_and_notify<S: Store>(
    subscribers: &Subscribers,
    committer: &Arc<Committer<S>>,
    keys: &[Key],
) -> Result<(), StoreError> {
    for keys in keys.chunks(READ_KEYS) {
        // Before the read, so that a record seen during the read counts as newer than its answer.
        let asked_at = Instant::now();
        let found = committer.store().read(keys.to_vec()).await?;
        let mut not_found: HashSet<&Key> = keys.iter().collect();
        for answer in found {
            match answer {
                Ok(snapshot) => {
                    not_found.remove(&snapshot.record.key);
                    committer
                        .submit_unanswered(committer.daemon(), subscribers.remote_read(&Arc::new(snapshot)));
                }
                // A record that cannot be read is not missing.
                Err(StoreError::Unreadable { key, .. }) => {
                    not_found.remove(&key);
                }
                Err(error) => return Err(error),
            }
        }
        for key in not_found {
            committer.submit_unanswered(committer.daemon(), subscribers.remote_missing(key, asked_at));
        }
    }
    Ok(())
}

/// Follows the store's feed of changes until the store ends it.
///
/// The feed names keys and carries no records. Events that arrive during a read are handled
/// together afterwards, so many changes cost few reads, and only of keys that a subscriber needs.
pub(crate) async fn follow_feed<S: Store>(
    subscribers: Arc<Subscribers>,
    committer: Arc<Committer<S>>,
    draining: CancellationToken,
) {
    let (sender, mut receiver) = mpsc::channel(EVENTS);
    let feed = committer.store().feed(sender, draining);
    let handle_events = async {
        let mut events = Vec::new();
        while receiver.recv_many(&mut events, EVENTS).await > 0 {
            let mut keys = HashSet::new();
            for event in events.drain(..) {
                match event {
                    FeedEvent::Changed { key, rev } if subscribers.needs_read(&key, rev) => {
                        keys.insert(key);
                    }
                    FeedEvent::Changed { .. } => {}
                    FeedEvent::Gap => {
                        subscribers.metrics.gaps.inc();
                        keys.extend(subscribers.keys());
                        subscribers.watches.rebuild();
                    }
                }
            }
            let keys: Vec<Key> = keys.into_iter().collect();
            // Repeated until it succeeds, because the feed reports a change only once.
            while read_and_notify(&subscribers, &committer, &keys).await.is_err() && !receiver.is_closed() {
                sleep(RETRY).await;
            }
        }
    };
    tokio::join!(feed, handle_events);
}

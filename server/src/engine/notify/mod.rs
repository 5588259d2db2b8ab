//! Who hears of records: the calls in line, the streams that carry leases, the watchers.
//!
//! Records come from two sides. What a commit of this daemon returned is *own*, and comes once for each commit, in the
//! order of the commits of its key. What was read because others may have changed it is *foreign*: it may be older than
//! what is known already, and each of those who hear knows to tell.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::committer::Committer;
use super::metrics::Counts;
use super::op::Part;
use super::queue::Line;
use super::streams::Carried;
use super::watch::Watchers;
use crate::boot_instant::BootInstant;
use crate::lease::{Edit, Key, Snapshot};
use crate::store::{FeedEvent, Store, StoreError};

/// Keys read with one command.
const READ_KEYS: usize = 1000;
/// The pause before records are read again after the store has failed.
const RETRY: Duration = Duration::from_millis(500);
/// Events of the feed that await their reading; the store's side waits when there is no room.
const EVENTS: usize = 4096;

/// Everyone who hears of records.
#[derive(Debug)]
pub(crate) struct Audience {
    pub(crate) line: Arc<Line>,
    pub(crate) carried: Arc<Carried>,
    pub(crate) watchers: Arc<Watchers>,
    pub(crate) counts: Arc<Counts>,
}

impl Audience {
    /// A record as a commit of this daemon left it, which applied `edit`. The commit was sent after `sent_at`.
    pub(crate) fn own(&self, snapshot: &Arc<Snapshot>, edit: &Edit, sent_at: BootInstant) {
        self.carried.own(snapshot, edit, sent_at);
        self.watchers.observe(snapshot);
        self.line.observe(snapshot);
    }

    /// A record as others may have left it. Returns what to commit.
    pub(crate) fn foreign(&self, snapshot: &Arc<Snapshot>) -> Vec<(Key, Part)> {
        self.carried.foreign(snapshot);
        self.watchers.observe(snapshot);
        self.line.observe_foreign(snapshot)
    }

    /// A key that has no record any more, or had none yet when it was asked for after `asked_at`.
    fn missing(&self, key: &Key, asked_at: Instant) -> Vec<(Key, Part)> {
        self.watchers.missing(key, asked_at);
        let mut parts = self.carried.missing(key);
        parts.extend(self.line.missing(key));
        parts
    }

    /// Whether anyone wants to see the key's record, unless they have seen it as of `rev` or later.
    fn wants(&self, key: &Key, rev: Option<i64>) -> bool {
        self.line.wants(key, rev) || self.carried.wants(key, rev) || self.watchers.wants(key, rev)
    }

    /// Every key that anyone but the watchers wants to see.
    fn keys(&self) -> HashSet<Key> {
        self.line.keys().into_iter().chain(self.carried.keys()).collect()
    }
}

/// Reads records that others may have changed, and passes them on.
///
/// # Errors
/// [`StoreError`] if the store does not answer in time; some may have been passed on by then.
pub(crate) async fn read<S: Store>(
    audience: &Audience,
    committer: &Arc<Committer<S>>,
    keys: &[Key],
) -> Result<(), StoreError> {
    for keys in keys.chunks(READ_KEYS) {
        let asked_at = Instant::now();
        let found = committer.store().read(keys.to_vec()).await?;
        let mut missing: HashSet<&Key> = keys.iter().collect();
        for answer in found {
            match answer {
                Ok(snapshot) => {
                    missing.remove(&snapshot.record.key);
                    committer.submit_unanswered(committer.daemon(), audience.foreign(&Arc::new(snapshot)));
                }
                // It is there, and says nothing.
                Err(StoreError::Unreadable { key, .. }) => drop(missing.remove(&key)),
                Err(error) => return Err(error),
            }
        }
        for key in missing {
            committer.submit_unanswered(committer.daemon(), audience.missing(key, asked_at));
        }
    }
    Ok(())
}

/// Follows the store's feed until the store ends it. While records are read the next events gather, so that a crowd
/// of changes costs few reads.
pub(crate) async fn follow<S: Store>(
    audience: Arc<Audience>,
    committer: Arc<Committer<S>>,
    draining: CancellationToken,
) {
    let (events, mut heard) = mpsc::channel(EVENTS);
    let feed = committer.store().feed(events, draining);
    let listen = async {
        let mut some = Vec::new();
        while heard.recv_many(&mut some, EVENTS).await > 0 {
            let mut keys = HashSet::new();
            for event in some.drain(..) {
                match event {
                    FeedEvent::Changed { key, rev } if audience.wants(&key, rev) => drop(keys.insert(key)),
                    FeedEvent::Changed { .. } => {}
                    FeedEvent::Gap => {
                        audience.counts.gaps.inc();
                        keys.extend(audience.keys());
                        audience.watchers.rebuild();
                    }
                }
            }
            let keys: Vec<Key> = keys.into_iter().collect();
            // Nobody tells of these a second time.
            while read(&audience, &committer, &keys).await.is_err() && !heard.is_closed() {
                sleep(RETRY).await;
            }
        }
    };
    tokio::join!(feed, listen);
}

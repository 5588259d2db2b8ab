//! Watches: each shows a snapshot of its keys and then their changes. A background task polls the
//! watched keys on which time alone may change something.

/// The changes between two states of a record.
mod diff;
/// The latest records that were seen of the watched keys.
mod seen;
/// All watches, and the changes that each has yet to report.
mod hub;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::yield_now;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use super::committer::Committer;
use super::notify::{self, Subscribers};
use super::{CallError, Lessor};
use crate::lease::{Key, Snapshot};
use crate::store::{ListQuery, Page, Store, StoreError};
pub use diff::ChangeKind;
pub(crate) use hub::WatchHub;
use hub::{Subscription, WatcherEvent};

/// How many keys a page of a listing has.
const PAGE: usize = 500;
/// The pause before a failed read is repeated.
const RETRY: Duration = Duration::from_millis(500);
/// How long the background task sleeps while no key is due.
const FAR: Duration = Duration::from_secs(3600);

/// Where a watch begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    /// With a snapshot of every key that is held, waited for or blocked.
    WithSnapshot,
    /// With the next change.
    Here,
}

/// An event of a watch.
#[derive(Debug, Clone)]
pub enum WatchEvent {
    /// A key as it is when the watch begins. A later snapshot means that changes were lost, and
    /// that the watch begins again.
    Snapshot(Arc<Snapshot>),
    /// The snapshot is complete.
    SnapshotEnd,
    /// A change of a key, and the state of the key after it.
    Change(ChangeKind, Arc<Snapshot>),
}

/// A watch of all keys with a prefix. Dropping it ends the watch.
#[derive(Debug)]
pub struct Watch<S> {
    lessor: Lessor<S>,
    prefix: String,
    subscription: Subscription,
    /// The snapshot that is under way.
    listing: Option<Listing>,
}

#[derive(Debug, Default)]
struct Listing {
    /// The last key that has been read.
    after: Option<Key>,
    /// Records that have been read and not yet shown.
    ready: VecDeque<Arc<Snapshot>>,
    is_complete: bool,
}

impl<S: Store> Lessor<S> {
    /// Watches the keys that begin with `prefix`. The watch reports every change after this
    /// returns.
    ///
    /// # Errors
    /// [`CallError::TooManyWatches`]. [`CallError::Store`] if the watch begins with the next
    /// change, and the keys cannot be read.
    pub async fn watch(&self, prefix: String, begin: Begin) -> Result<Watch<S>, CallError> {
        let watches = &self.subscribers.watches;
        let limit = watches.limit();
        let subscription = watches.begin(prefix.clone()).ok_or(CallError::TooManyWatches { limit })?;
        let mut watch =
            Watch { lessor: self.clone(), prefix, subscription, listing: Some(Listing::default()) };
        // A change is a difference to the present state, so the watch must read that state first.
        if begin == Begin::Here {
            while watch.listing.as_ref().is_some_and(|listing| !listing.is_complete) {
                watch.read_page().await?;
            }
            watch.listing = None;
            watch.subscription.begin_here();
        }
        Ok(watch)
    }
}

impl<S: Store> Watch<S> {
    /// Waits for the next event. Repeats reads that fail.
    ///
    /// Cancel safe.
    pub async fn next(&mut self) -> WatchEvent {
        loop {
            let Some(listing) = &mut self.listing else {
                match self.subscription.next().await {
                    WatcherEvent::Change(kind, snapshot) => return WatchEvent::Change(kind, snapshot),
                    WatcherEvent::FellBehind => self.listing = Some(Listing::default()),
                }
                continue;
            };
            if let Some(snapshot) = listing.ready.pop_front() {
                return WatchEvent::Snapshot(snapshot);
            }
            if listing.is_complete {
                self.listing = None;
                return WatchEvent::SnapshotEnd;
            }
            if self.read_page().await.is_err() {
                sleep(RETRY).await;
            }
        }
    }

    async fn read_page(&mut self) -> Result<(), CallError> {
        let Some(listing) = &mut self.listing else { return Ok(()) };
        let page = self.lessor.list(query(&self.prefix, listing.after.clone())).await?;
        listing.after = last_key(&page).or(listing.after.take());
        listing.is_complete = !page.more;
        listing.ready.extend(self.subscription.page(page.snapshots));
        Ok(())
    }
}

fn query(prefix: &str, after: Option<Key>) -> ListQuery {
    ListQuery { prefix: prefix.to_owned(), after, limit: PAGE, include_free: false }
}

fn last_key(page: &Page) -> Option<Key> {
    page.snapshots.last().map(|snapshot| snapshot.record.key.clone())
}

/// Reads watched keys in the background until the daemon drains: keys whose leases have run out,
/// and all keys when changes may have been missed. Also forgets keys that are not watched any more.
///
/// No commit shows that a lease has run out. The read finds out whether another daemon has renewed
/// the lease before.
pub(crate) async fn run<S: Store>(
    subscribers: Arc<Subscribers>,
    committer: Arc<Committer<S>>,
    draining: CancellationToken,
) {
    let watches = &subscribers.watches;
    loop {
        let due = watches.next_due().unwrap_or_else(|| Instant::now() + FAR);
        tokio::select! {
            () = draining.cancelled() => return,
            () = watches.earlier() => {}
            () = sleep_until(due) => {}
        }
        // In chunks, because commits need the lock that this takes.
        while watches.forget_unwatched() {
            yield_now().await;
        }
        if let Some((prefixes, keys)) = watches.take_stale()
            && rebuild(&subscribers, &committer, prefixes, &keys).await.is_err()
        {
            watches.rebuild();
            sleep(RETRY).await;
        }
        let due = watches.take_due(Instant::now());
        // Keys that could not be read are due again soon.
        let _ = notify::read_and_notify(&subscribers, &committer, &due).await;
    }
}

/// Lists all keys with `prefixes`, reads `keys`, and passes all records on to the subscribers.
async fn rebuild<S: Store>(
    subscribers: &Subscribers,
    committer: &Arc<Committer<S>>,
    prefixes: Vec<String>,
    keys: &[Key],
) -> Result<(), StoreError> {
    for prefix in prefixes {
        let mut after = None;
        loop {
            let page = committer.store().list(query(&prefix, after.take())).await?;
            after = last_key(&page);
            for snapshot in page.snapshots {
                committer.submit_unanswered(committer.daemon(), subscribers.remote_read(&Arc::new(snapshot)));
            }
            if !page.more {
                break;
            }
        }
    }
    notify::read_and_notify(subscribers, committer, keys).await
}

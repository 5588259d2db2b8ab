//! A watch from its snapshot to its changes, and the look at keys on which time alone changes something.

/// What happened between two records of a key.
mod diff;
/// What is known of the watched keys.
mod seen;
/// All watches: what each has still to be told.
mod hub;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::yield_now;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use super::committer::Committer;
use super::notify::{self, Audience};
use super::{CallError, Lessor};
use crate::lease::{Key, Snapshot};
use crate::store::{ListQuery, Page, Store, StoreError};
pub use diff::ChangeKind;
pub(crate) use hub::Watchers;
use hub::{Told, Watching};

/// Keys in a page of a listing.
const PAGE: usize = 500;
/// The pause after the store has failed.
const RETRY: Duration = Duration::from_millis(500);
/// Longer than any timer is set for.
const FAR: Duration = Duration::from_secs(3600);

/// Where a watch begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    /// With every key that is held, waited for or blocked.
    WithSnapshot,
    /// With the next change.
    Here,
}

/// What a watch shows.
#[derive(Debug, Clone)]
pub enum WatchEvent {
    /// A key as it is; before any change. After the first changes it means that some were lost: it all begins anew.
    Snapshot(Arc<Snapshot>),
    /// Every key has been shown.
    SnapshotEnd,
    /// What happened to a key, and how it is after that.
    Change(ChangeKind, Arc<Snapshot>),
}

/// The keys with a prefix, watched. Dropping it ends the watch.
#[derive(Debug)]
pub struct Watch<S> {
    lessor: Lessor<S>,
    prefix: String,
    watching: Watching,
    /// The listing that is under way.
    listing: Option<Listing>,
}

#[derive(Debug, Default)]
struct Listing {
    after: Option<Key>,
    ready: VecDeque<Arc<Snapshot>>,
    is_complete: bool,
}

impl<S: Store> Lessor<S> {
    /// Watches the keys that begin with `prefix`. When this returns, no later change is missed.
    ///
    /// # Errors
    /// [`CallError::TooManyWatches`]; [`CallError::Store`] if a watch that begins here cannot learn what there is.
    pub async fn watch(&self, prefix: String, begin: Begin) -> Result<Watch<S>, CallError> {
        let watchers = &self.audience.watchers;
        let limit = watchers.limit();
        let watching = watchers.begin(prefix.clone()).ok_or(CallError::TooManyWatches { limit })?;
        let mut watch = Watch { lessor: self.clone(), prefix, watching, listing: Some(Listing::default()) };
        if begin == Begin::Here {
            while watch.listing.as_ref().is_some_and(|listing| !listing.is_complete) {
                watch.turn_page().await?;
            }
            watch.listing = None;
            watch.watching.begin_here();
        }
        Ok(watch)
    }
}

impl<S: Store> Watch<S> {
    /// Waits for what is to be shown next. While the store is away nothing is.
    ///
    /// Dropping the future loses nothing.
    pub async fn next(&mut self) -> WatchEvent {
        loop {
            let Some(listing) = &mut self.listing else {
                match self.watching.next().await {
                    Told::Change(kind, snapshot) => return WatchEvent::Change(kind, snapshot),
                    Told::FellBehind => self.listing = Some(Listing::default()),
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
            if self.turn_page().await.is_err() {
                sleep(RETRY).await;
            }
        }
    }

    async fn turn_page(&mut self) -> Result<(), CallError> {
        let Some(listing) = &mut self.listing else { return Ok(()) };
        let page = self.lessor.list(query(&self.prefix, listing.after.clone())).await?;
        listing.after = last(&page).or(listing.after.take());
        listing.is_complete = !page.more;
        listing.ready.extend(self.watching.page(page.snapshots));
        Ok(())
    }
}

fn query(prefix: &str, after: Option<Key>) -> ListQuery {
    ListQuery { prefix: prefix.to_owned(), after, limit: PAGE, include_free: false }
}

fn last(page: &Page) -> Option<Key> {
    page.snapshots.last().map(|snapshot| snapshot.record.key.clone())
}

/// Looks at keys whose holders' time is over, until the daemon drains: another daemon may have had them touched, and if
/// not it is a change that nobody commits. And looks at all when changes may have been missed.
pub(crate) async fn keep<S: Store>(
    audience: Arc<Audience>,
    committer: Arc<Committer<S>>,
    draining: CancellationToken,
) {
    let watchers = &audience.watchers;
    loop {
        let due = watchers.next_due().unwrap_or_else(|| Instant::now() + FAR);
        tokio::select! {
            () = draining.cancelled() => return,
            () = watchers.sooner() => {}
            () = sleep_until(due) => {}
        }
        while watchers.tidy() {
            yield_now().await;
        }
        if let Some((prefixes, keys)) = watchers.take_stale()
            && rebuild(&audience, &committer, prefixes, &keys).await.is_err()
        {
            watchers.rebuild();
            sleep(RETRY).await;
        }
        let due = watchers.take_due(Instant::now());
        // What could not be read is due again soon.
        drop(notify::read(&audience, &committer, &due).await);
    }
}

/// Looks at everything under these prefixes, and at these keys, which may be free now and in no listing.
async fn rebuild<S: Store>(
    audience: &Audience,
    committer: &Arc<Committer<S>>,
    prefixes: Vec<String>,
    keys: &[Key],
) -> Result<(), StoreError> {
    for prefix in prefixes {
        let mut after = None;
        loop {
            let page = committer.store().list(query(&prefix, after.take())).await?;
            after = last(&page);
            for snapshot in page.snapshots {
                committer.submit_unanswered(committer.daemon(), audience.foreign(&Arc::new(snapshot)));
            }
            if !page.more {
                break;
            }
        }
    }
    notify::read(audience, committer, keys).await
}

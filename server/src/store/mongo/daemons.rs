//! The list of the daemons on the same records: a small collection beside the records,
//! `<collection>.daemons`, with a document for each daemon. Operators may read it.
//!
//! The change feed is open while the list has other daemons. A daemon whose `--grace` differs from
//! that of the others is refused.
//!
//! ```text
//! { _id: uuid text, host, pid: long, version, grace_ms: long, started_at: date, seen_at: date }
//! ```
//!
//! All instants are of the database's clock, which also decides whether a daemon counts as alive.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures_util::TryStreamExt;
use humantime::format_duration;
use mongodb::Collection;
use mongodb::bson::{Document, Timestamp, doc};
use mongodb::options::{ReadConcern, ReadPreference, SelectionCriteria};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::check::Unusable;
use super::command::ATTEMPT;
use super::{ConnectError, MongoStore, identity};
use crate::lease::millis;
use crate::store::failure::Failure;

/// How many daemons are read from the list. A daemon compares itself only with these.
const MOST: i64 = 1000;

/// The timing of heartbeats and of what depends on them.
#[derive(Debug, Clone, Copy)]
pub(super) struct HeartbeatConfig {
    /// The time between two heartbeats.
    pub(super) interval: Duration,
    /// A daemon counts as alive while its latest heartbeat is younger than this.
    pub(super) timeout: Duration,
    /// A daemon counts as alone only after it has found no other this many times in a row, so that
    /// a rolling restart does not close the feed.
    pub(super) empty_polls: u32,
    /// A daemon is removed from the list when its latest heartbeat is older than this.
    pub(super) remove_after: Duration,
    /// A feed that lags by more than this is opened again. It must exceed 10 s, because a change
    /// stream over all shards waits that long for an idle shard.
    pub(super) max_lag: Duration,
}

impl Default for HeartbeatConfig {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(1),
            timeout: Duration::from_secs(10),
            empty_polls: 60,
            remove_after: Duration::from_secs(3600),
            max_lag: Duration::from_secs(15),
        }
    }
}

/// This daemon's entry in the list, and its state.
#[derive(Debug)]
pub(super) struct Member {
    id: String,
    /// The database's time of the latest heartbeat, and when its acknowledgement arrived.
    latest: Mutex<Option<(Timestamp, Instant)>>,
    /// Whether the list may contain this daemon.
    may_be_listed: AtomicBool,
    /// Why this daemon must end. `None` while it may go on.
    objection: watch::Sender<Option<String>>,
}

impl Default for Member {
    fn default() -> Self {
        Self {
            id: Uuid::new_v4().to_string(),
            latest: Mutex::default(),
            may_be_listed: AtomicBool::new(false),
            objection: watch::Sender::default(),
        }
    }
}

impl Member {
    /// Waits until this daemon must end, and returns why.
    pub(super) async fn objection(&self) -> String {
        let mut objection = self.objection.subscribe();
        match objection.wait_for(Option::is_some).await.map(|why| why.clone()) {
            Ok(Some(why)) => why,
            // Unreachable: `self` owns the sender.
            _ => std::future::pending().await,
        }
    }

    /// How long ago a majority acknowledged a heartbeat. `None` before the first heartbeat.
    pub(super) fn silence(&self) -> Option<Duration> {
        let latest = *self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        latest.map(|(_, confirmed)| confirmed.elapsed())
    }
}

/// The list of daemons, for reading and writing.
#[derive(Debug)]
pub(super) struct Daemons {
    store: MongoStore,
    collection: Collection<Document>,
}

/// The name of the list's collection. It contains the name of the records' collection, so each has
/// a list of its own.
pub(super) fn collection_name(records: &str) -> String {
    format!("{records}.daemons")
}

impl Daemons {
    pub(super) fn new(store: &MongoStore) -> Self {
        let collection = store.database.collection(&collection_name(store.collection.name()));
        Self { store: store.clone(), collection }
    }

    fn member(&self) -> &Member {
        &self.store.feed.member
    }

    /// The database's time of this daemon's latest heartbeat. `None` if that was too long ago. A
    /// node whose time is earlier lacks writes that a majority has.
    pub(super) fn latest_heartbeat(&self) -> Option<Timestamp> {
        let latest = *self.member().latest.lock().unwrap_or_else(PoisonError::into_inner);
        latest
            .filter(|(_, confirmed)| confirmed.elapsed() < self.store.feed.heartbeat.timeout)
            .map(|(time, _)| time)
    }

    /// Writes the first heartbeat. If this daemon must not run beside the others, removes it again
    /// and fails with [`Unusable::Conflict`].
    pub(super) async fn join(&self) -> Result<(), ConnectError> {
        self.send_heartbeat().await?;
        // The write comes first: of two daemons that join at once, at least one then sees the
        // other.
        match self.objection(&self.read_list().await?) {
            None => Ok(()),
            Some(why) => {
                self.unregister().await;
                Err(Unusable::Conflict(why).into())
            }
        }
    }

    /// Writes heartbeats until `ended` is cancelled, and then removes this daemon from the list.
    /// Sends to `peers_present` whether there are other daemons, each time that changes.
    pub(super) async fn run_heartbeats(&self, peers_present: watch::Sender<bool>, ended: &CancellationToken) {
        let heartbeat = self.store.feed.heartbeat;
        let remove_every =
            u32::try_from(heartbeat.remove_after.as_millis() / heartbeat.interval.as_millis().max(1));
        let mut empty_polls = 0;
        for beat in 0_u32.. {
            // A failure changes nothing: a database without a primary does not show which daemons
            // are alive.
            match self.beat_and_read(beat % remove_every.unwrap_or(u32::MAX).max(1) == 0).await {
                Ok(true) => {
                    empty_polls = 0;
                    peers_present.send_if_modified(|others| !std::mem::replace(others, true));
                }
                Ok(false) => {
                    empty_polls += 1;
                    if empty_polls >= heartbeat.empty_polls {
                        peers_present.send_if_modified(|others| std::mem::replace(others, false));
                    }
                }
                Err(failure) => {
                    tracing::debug!(cause = failure.into_cause(), "a heartbeat failed");
                }
            }
            // Jitter, so that daemons that started together do not stay in step.
            let next = sleep(heartbeat.interval.mul_f64(0.8 + fastrand::f64() * 0.4));
            if ended.run_until_cancelled(next).await.is_none() {
                break;
            }
        }
        self.unregister().await;
    }

    /// Removes this daemon from the list at once.
    pub(super) async fn unregister(&self) {
        if !self.member().may_be_listed.swap(false, Ordering::Relaxed) {
            return;
        }
        // Waits for heartbeats that are still under way: one that arrives after the removal would
        // add the daemon again.
        self.store.feed.background.settled().await;
        if let Err(failure) = self.remove(doc! { "_id": &self.member().id }).await {
            tracing::debug!(
                cause = failure.into_cause(),
                "this daemon stays on the list until its heartbeat is too old"
            );
        }
    }

    /// Writes a heartbeat and reads the list. Returns whether there are other daemons. With
    /// `remove_old` also removes daemons that have been silent for long.
    async fn beat_and_read(&self, remove_old: bool) -> Result<bool, Failure> {
        self.send_heartbeat().await?;
        if remove_old {
            let old = doc! { "$lt": ["$seen_at", ago(self.store.feed.heartbeat.remove_after)] };
            self.remove(doc! { "seen_at": { "$type": "date" }, "$expr": old }).await?;
        }
        let found = self.read_list().await?;
        if !found.iter().any(|document| is_named(document, identity::DOCUMENT)) {
            // The collection was dropped. A daemon that starts now must not create another
            // identity.
            identity::keep(&self.store, self.store.id).await?;
        }
        if let Some(why) = self.objection(&found) {
            self.member().objection.send_replace(Some(why));
        }
        Ok(found.iter().any(|document| is_daemon(document) && !self.is_this(document)))
    }

    /// Reads the daemons that are alive, including this one, and the identity of the records.
    async fn read_list(&self) -> Result<Vec<Document>, Failure> {
        let alive = doc! { "$gt": ["$seen_at", ago(self.store.feed.heartbeat.timeout)] };
        let which = doc! { "$or": [{ "_id": identity::DOCUMENT }, { "$expr": alive }] };
        let collection = self.collection.clone();
        let find = async move {
            let cursor = collection
                .find(which)
                .limit(MOST)
                .max_time(ATTEMPT)
                .read_concern(ReadConcern::majority())
                .selection_criteria(SelectionCriteria::ReadPreference(ReadPreference::Primary))
                .await?;
            cursor.try_collect().await
        };
        self.store.feed.background.run(find).await
    }

    /// Returns why this daemon must end, if it must: a daemon that started earlier has another
    /// grace, or the records have another identity. A daemon with a shorter grace would take over
    /// leases that the others still protect.
    fn objection(&self, found: &[Document]) -> Option<String> {
        let id = found.iter().find(|document| is_named(document, identity::DOCUMENT));
        if let Some(id) = id.and_then(identity::read).filter(|id| *id != self.store.id) {
            let started_with = self.store.id;
            return Some(format!(
                "the identity of the records is {id}, and was {started_with} when this daemon started: they \
                 were replaced; restart this daemon"
            ));
        }
        let grace = self.store.rules.grace;
        let other = earlier_with_other_grace(found, &self.member().id, grace)?;
        let millis = other.get_i64("grace_ms").ok().and_then(|millis| u64::try_from(millis).ok())?;
        let (host, pid) = (other.get_str("host").unwrap_or("?"), other.get_i64("pid").unwrap_or_default());
        let (theirs, alive) = (Duration::from_millis(millis), self.store.feed.heartbeat.timeout);
        Some(format!(
            "--grace is {} here and {} at the daemon with pid {pid} on {host}, which started earlier on the same \
             records: all daemons must have the same grace; give this one --grace {}, or stop the other one first (a \
             daemon that was killed counts as running for {})",
            format_duration(grace),
            format_duration(theirs),
            format_duration(theirs),
            format_duration(alive),
        ))
    }

    fn is_this(&self, document: &Document) -> bool {
        is_named(document, &self.member().id)
    }

    /// Writes a heartbeat.
    pub(super) async fn send_heartbeat(&self) -> Result<(), Failure> {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let set = doc! {
            "host": { "$literal": host },
            "pid": i64::from(std::process::id()),
            "version": { "$literal": env!("CARGO_PKG_VERSION") },
            "grace_ms": millis(self.store.rules.grace),
            "started_at": { "$ifNull": ["$started_at", "$$NOW"] },
            "seen_at": "$$NOW",
        };
        let statement = doc! { "q": { "_id": &self.member().id }, "u": [{ "$set": set }], "upsert": true };
        let update = doc! { "update": self.collection.name(), "updates": [statement] };
        // Before the write, which may take effect even if it fails.
        self.member().may_be_listed.store(true, Ordering::Relaxed);
        let time = self.write(update).await?;
        *self.member().latest.lock().unwrap_or_else(PoisonError::into_inner) = Some((time, Instant::now()));
        Ok(())
    }

    async fn remove(&self, which: Document) -> Result<(), Failure> {
        let delete = doc! { "delete": self.collection.name(), "deletes": [{ "q": which, "limit": 0 }] };
        self.write(delete).await?;
        Ok(())
    }

    async fn write(&self, command: Document) -> Result<Timestamp, Failure> {
        let store = &self.store;
        store.feed.background.write(&store.database, command, &store.concern).await?.operation_time()
    }
}

/// Returns a daemon with another grace that started before the daemon with this id. Instants are of
/// the database's clock, and at the same instant the lower id counts as earlier. So of two daemons
/// that differ and see each other exactly one stays.
fn earlier_with_other_grace<'a>(found: &'a [Document], id: &str, grace: Duration) -> Option<&'a Document> {
    let began = |document: &'a Document| {
        let began = document.get_datetime("started_at").ok()?;
        Some((began.timestamp_millis(), document.get_str("_id").ok()?))
    };
    let this_began = found.iter().find(|document| is_named(document, id)).and_then(began)?;
    found.iter().filter(|document| is_daemon(document)).find(|document| {
        let differs = document.get_i64("grace_ms").is_ok_and(|other| other != millis(grace));
        differs && began(document).is_some_and(|other| other < this_began)
    })
}

fn is_named(document: &Document, id: &str) -> bool {
    document.get_str("_id").is_ok_and(|found| found == id)
}

fn is_daemon(document: &Document) -> bool {
    document.contains_key("seen_at")
}

fn ago(duration: Duration) -> Document {
    doc! { "$subtract": ["$$NOW", millis(duration)] }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use mongodb::bson::DateTime;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn only_daemons_with_one_grace_go_on_when_all_see_each_other(
            daemons in prop::collection::vec((0..4_i64, 1..4_u64), 1..8),
        ) {
            let document = |(number, (began, grace)): (usize, &(i64, u64))| {
                let now = DateTime::from_millis(*began);
                let grace_ms = millis(Duration::from_secs(*grace));
                doc! { "_id": number.to_string(), "grace_ms": grace_ms, "started_at": now, "seen_at": now }
            };
            let found: Vec<Document> = daemons.iter().enumerate().map(document).collect();
            let goes_on = |(number, (_, grace)): &(usize, &(i64, u64))| {
                earlier_with_other_grace(&found, &number.to_string(), Duration::from_secs(*grace)).is_none()
            };
            let graces: HashSet<u64> =
                daemons.iter().enumerate().filter(goes_on).map(|(_, (_, grace))| *grace).collect();
            prop_assert_eq!(graces.len(), 1);
        }
    }
}

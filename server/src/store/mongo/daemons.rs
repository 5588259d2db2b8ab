//! Which daemons run on the same records: a small collection beside theirs, `<collection>.daemons`, with one document
//! for each. Operators may look at it; the change feed depends on it, and so does the refusal of daemons that obey
//! other rules.
//!
//! ```text
//! { _id: uuid text, host, pid: long, version, grace_ms: long, started_at: date, seen_at: date }
//! ```
//!
//! Its instants are the database's, and so is the judgement who is alive.

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

/// Daemons looked at; more are not compared with.
const MOST: i64 = 1000;

/// How the daemons keep up with each other.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    /// Between signs of life.
    pub(super) beat: Duration,
    /// Whose last sign is older does not count.
    pub(super) alive: Duration,
    /// So many looks in a row must find nobody before one is alone: daemons that restart one after the other are not.
    pub(super) patience: u32,
    /// A sign of life older than this is removed.
    pub(super) forget: Duration,
    /// A feed that stays this far behind is opened anew. More than the ten seconds after which a shard that is idle
    /// lets a change stream over all shards go on.
    pub(super) stale: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            beat: Duration::from_secs(1),
            alive: Duration::from_secs(10),
            patience: 60,
            forget: Duration::from_secs(3600),
            stale: Duration::from_secs(15),
        }
    }
}

/// What a store knows of itself as one of several.
#[derive(Debug)]
pub(super) struct Member {
    id: String,
    /// The database's time of the latest sign of life, and when it was confirmed.
    latest: Mutex<Option<(Timestamp, Instant)>>,
    /// Whether a sign of life may be in the database.
    is_listed: AtomicBool,
    /// Why this daemon must end, once it must.
    objection: watch::Sender<Option<String>>,
}

impl Default for Member {
    fn default() -> Self {
        Self {
            id: Uuid::new_v4().to_string(),
            latest: Mutex::default(),
            is_listed: AtomicBool::new(false),
            objection: watch::Sender::default(),
        }
    }
}

impl Member {
    /// Waits until this daemon must end, and says why.
    pub(super) async fn objection(&self) -> String {
        let mut objection = self.objection.subscribe();
        match objection.wait_for(Option::is_some).await.map(|why| why.clone()) {
            Ok(Some(why)) => why,
            // The sender is here.
            _ => std::future::pending().await,
        }
    }

    /// How long ago a majority acknowledged a sign of life; `None` if none was given.
    pub(super) fn silence(&self) -> Option<Duration> {
        let latest = *self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        latest.map(|(_, confirmed)| confirmed.elapsed())
    }
}

/// The daemons on the same records, as one of them sees them.
#[derive(Debug)]
pub(super) struct Daemons {
    store: MongoStore,
    collection: Collection<Document>,
}

/// The name of the collection, so that records in two collections have daemons of their own.
pub(super) fn collection_name(records: &str) -> String {
    format!("{records}.daemons")
}

impl Daemons {
    pub(super) fn new(store: &MongoStore) -> Self {
        let collection = store.database.collection(&collection_name(store.collection.name()));
        Self { store: store.clone(), collection }
    }

    fn me(&self) -> &Member {
        &self.store.feed.member
    }

    /// The database's time of this daemon's latest sign of life, unless that is long ago. A node that is not as far as
    /// this does not have all that a majority has.
    pub(super) fn latest(&self) -> Option<Timestamp> {
        let latest = *self.me().latest.lock().unwrap_or_else(PoisonError::into_inner);
        latest.filter(|(_, confirmed)| confirmed.elapsed() < self.store.feed.pace.alive).map(|(time, _)| time)
    }

    /// Gives the first sign of life, unless this daemon must not run beside those that are there.
    pub(super) async fn join(&self) -> Result<(), ConnectError> {
        self.beat().await?;
        // Written first, and looked for after that: of two that join at once, at least one sees the other.
        match self.objection(&self.found().await?) {
            None => Ok(()),
            Some(why) => {
                self.depart().await;
                Err(Unusable::Company(why).into())
            }
        }
    }

    /// Gives signs of life and says in `company` whether others do, until `ended`; then this daemon is gone at once.
    pub(super) async fn attend(&self, company: watch::Sender<bool>, ended: &CancellationToken) {
        let pace = self.store.feed.pace;
        let forget_every = u32::try_from(pace.forget.as_millis() / pace.beat.as_millis().max(1));
        let mut empty_looks = 0;
        for beat in 0_u32.. {
            // What a failure leaves unknown stays as it was: a database without a primary says nothing of daemons.
            match self.look(beat % forget_every.unwrap_or(u32::MAX).max(1) == 0).await {
                Ok(true) => {
                    empty_looks = 0;
                    company.send_if_modified(|others| !std::mem::replace(others, true));
                }
                Ok(false) => {
                    empty_looks += 1;
                    if empty_looks >= pace.patience {
                        company.send_if_modified(|others| std::mem::replace(others, false));
                    }
                }
                Err(failure) => {
                    tracing::debug!(cause = failure.into_cause(), "no sign of life could be given");
                }
            }
            // Spread, so that daemons that started together do not go on doing so.
            let next = sleep(pace.beat.mul_f64(0.8 + fastrand::f64() * 0.4));
            if ended.run_until_cancelled(next).await.is_none() {
                break;
            }
        }
        self.depart().await;
    }

    /// Takes this daemon off the list at once.
    pub(super) async fn depart(&self) {
        if !self.me().is_listed.swap(false, Ordering::Relaxed) {
            return;
        }
        // A sign of life that nobody waits for any more must not arrive after the removal.
        self.store.feed.errands.settled().await;
        if let Err(failure) = self.remove(doc! { "_id": &self.me().id }).await {
            tracing::debug!(cause = failure.into_cause(), "others will miss this daemon later");
        }
    }

    /// A sign of life, and whether others give any.
    async fn look(&self, forget: bool) -> Result<bool, Failure> {
        self.beat().await?;
        if forget {
            let old = doc! { "$lt": ["$seen_at", ago(self.store.feed.pace.forget)] };
            self.remove(doc! { "seen_at": { "$type": "date" }, "$expr": old }).await?;
        }
        let found = self.found().await?;
        if !found.iter().any(|document| is_named(document, identity::DOCUMENT)) {
            // Somebody dropped the collection: whoever starts now must not make another identity.
            identity::keep(&self.store, self.store.id).await?;
        }
        if let Some(why) = self.objection(&found) {
            self.me().objection.send_replace(Some(why));
        }
        Ok(found.iter().any(|document| is_daemon(document) && !self.is_this(document)))
    }

    /// The daemons that give signs of life, this one among them, and the identity of the records.
    async fn found(&self) -> Result<Vec<Document>, Failure> {
        let alive = doc! { "$gt": ["$seen_at", ago(self.store.feed.pace.alive)] };
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
        self.store.feed.errands.run(find).await
    }

    /// Why this daemon must not go on: another one has another grace and began earlier, or the records have another
    /// identity. A daemon with a shorter grace takes keys from holders that the others still wait for.
    fn objection(&self, found: &[Document]) -> Option<String> {
        let id = found.iter().find(|document| is_named(document, identity::DOCUMENT));
        if let Some(id) = id.and_then(identity::read).filter(|id| *id != self.store.id) {
            let started_with = self.store.id;
            return Some(format!(
                "the records have another identity, {id}, than when this daemon started, {started_with}: somebody \
                 replaced them; start it again"
            ));
        }
        let grace = self.store.rules.grace;
        let other = obeyed(found, &self.me().id, grace)?;
        let millis = other.get_i64("grace_ms").ok().and_then(|millis| u64::try_from(millis).ok())?;
        let (host, pid) = (other.get_str("host").unwrap_or("?"), other.get_i64("pid").unwrap_or_default());
        let (theirs, alive) = (Duration::from_millis(millis), self.store.feed.pace.alive);
        Some(format!(
            "--grace is {} here and {} at the daemon with pid {pid} on {host}, which started earlier on the same \
             records: all of them must have the same; give this one --grace {}, or stop the other one first (one \
             that was killed counts for {})",
            format_duration(grace),
            format_duration(theirs),
            format_duration(theirs),
            format_duration(alive),
        ))
    }

    fn is_this(&self, document: &Document) -> bool {
        is_named(document, &self.me().id)
    }

    /// Gives a sign of life.
    pub(super) async fn beat(&self) -> Result<(), Failure> {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let set = doc! {
            "host": { "$literal": host },
            "pid": i64::from(std::process::id()),
            "version": { "$literal": env!("CARGO_PKG_VERSION") },
            "grace_ms": millis(self.store.rules.grace),
            "started_at": { "$ifNull": ["$started_at", "$$NOW"] },
            "seen_at": "$$NOW",
        };
        let statement = doc! { "q": { "_id": &self.me().id }, "u": [{ "$set": set }], "upsert": true };
        let update = doc! { "update": self.collection.name(), "updates": [statement] };
        self.me().is_listed.store(true, Ordering::Relaxed);
        let time = self.write(update).await?;
        *self.me().latest.lock().unwrap_or_else(PoisonError::into_inner) = Some((time, Instant::now()));
        Ok(())
    }

    async fn remove(&self, which: Document) -> Result<(), Failure> {
        let delete = doc! { "delete": self.collection.name(), "deletes": [{ "q": which, "limit": 0 }] };
        self.write(delete).await?;
        Ok(())
    }

    async fn write(&self, command: Document) -> Result<Timestamp, Failure> {
        let store = &self.store;
        store.feed.errands.write_in_time(&store.database, command, &store.concern).await
    }
}

/// The daemon to which the one with this id has to yield: it has another grace and began earlier, by the database's
/// clock, or by its id at the same instant. So of two that differ and see each other one goes on.
fn obeyed<'a>(found: &'a [Document], id: &str, grace: Duration) -> Option<&'a Document> {
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
        fn of_daemons_that_see_each_other_those_go_on_that_have_the_grace_of_the_first(
            daemons in prop::collection::vec((0..4_i64, 1..4_u64), 1..8),
        ) {
            let document = |(number, (began, grace)): (usize, &(i64, u64))| {
                let now = DateTime::from_millis(*began);
                let grace_ms = millis(Duration::from_secs(*grace));
                doc! { "_id": number.to_string(), "grace_ms": grace_ms, "started_at": now, "seen_at": now }
            };
            let found: Vec<Document> = daemons.iter().enumerate().map(document).collect();
            let goes_on = |(number, (_, grace)): &(usize, &(i64, u64))| {
                obeyed(&found, &number.to_string(), Duration::from_secs(*grace)).is_none()
            };
            let graces: HashSet<u64> =
                daemons.iter().enumerate().filter(goes_on).map(|(_, (_, grace))| *grace).collect();
            prop_assert_eq!(graces.len(), 1);
        }
    }
}

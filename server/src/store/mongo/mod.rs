//! The store on MongoDB: one document per key, any number of daemons. The only files that know MongoDB.

mod check;
mod command;
mod daemons;
mod document;
mod expression;
mod feed;
#[cfg(test)]
mod feed_tests;
mod pipeline;
#[cfg(test)]
mod wrong;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::TryStreamExt;
use mongodb::bson::{Bson, Document, RawDocumentBuf, doc};
use mongodb::options::{ReadConcern, ReturnDocument, WriteConcern};
use mongodb::{Client, Collection, Database};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

pub use check::Unusable;
use command::{ATTEMPT, Runner};
use daemons::{Daemons, Pace};
use feed::Feed;

use super::failure::Failure;
use super::{
    FeedEvent, FeedState, ListQuery, Page, StartError, Store, StoreError, makes_record, repeat, vacant,
};
use crate::lease::{Edit, Key, Rules, Snapshot};

/// Keys forgotten with one command.
const PURGE_PAGE: usize = 1000;
/// Batches in flight; each is a command that writes and one that reads.
const BATCHES: usize = 2;
/// A page of a listing ends past this many bytes.
const PAGE_BYTES: usize = 4 * 1024 * 1024;

/// Where the records are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// The connection string; every option of the driver holds.
    pub uri: String,
    /// The database's name.
    pub database: String,
    /// The collection's name.
    pub collection: String,
}

/// Records in a MongoDB collection.
#[derive(Debug, Clone)]
pub struct MongoStore {
    rules: Rules,
    database: Database,
    collection: Collection<RawDocumentBuf>,
    concern: WriteConcern,
    runner: Runner,
    feed: Arc<Feed>,
    repetitions: Arc<AtomicU64>,
    clock: Bson,
    #[cfg(test)]
    pub(super) wrong: Option<super::conformance::wrongs::Wrong>,
}

impl MongoStore {
    /// Connects and makes sure that the database is one on which leases are safe.
    ///
    /// # Errors
    /// [`ConnectError::Unusable`] if the database can be reached and cannot be used, or the URI is wrong;
    /// [`ConnectError::Unreachable`] if it did not answer, so that trying again may help.
    pub async fn connect(location: &Location, rules: Rules) -> Result<Self, ConnectError> {
        let options = check::client_options(&location.uri).await?;
        let asked = options.write_concern.clone();
        let client = Client::with_options(options).map_err(|error| Unusable::Uri(command::brief(&error)))?;
        let database = client.database(&location.database);
        let mut store = Self {
            rules,
            collection: database.collection(&location.collection),
            database,
            concern: WriteConcern::majority(),
            runner: Runner::new(),
            feed: Arc::new(Feed::new(Pace::default())),
            repetitions: Arc::default(),
            clock: pipeline::CLOCK.into(),
            #[cfg(test)]
            wrong: None,
        };
        store.concern = check::database(&store, asked).await?;
        Ok(store)
    }

    /// Stops the clock at `now`, also if that is earlier.
    #[cfg(test)]
    pub(super) fn set_clock(&mut self, now: crate::lease::Timestamp) {
        self.clock = mongodb::bson::DateTime::from_millis(now.0).into();
    }

    fn stages(&self, batch: &[(Key, Edit)]) -> Vec<Document> {
        let stages = pipeline::pipeline(batch, &self.rules, &self.clock);
        #[cfg(test)]
        let stages = match self.wrong {
            Some(wrong) => wrong::put_into(stages, wrong),
            None => stages,
        };
        stages
    }

    /// One try at a batch.
    async fn attempt(&self, batch: &[(Key, Edit)]) -> Result<Vec<Snapshot>, Failure> {
        match batch {
            [] => Ok(Vec::new()),
            [(key, edit)] => Ok(vec![self.alone(key, edit).await?]),
            _ => self.together(batch).await,
        }
    }

    /// A single edit: one round trip.
    async fn alone(&self, key: &Key, edit: &Edit) -> Result<Snapshot, Failure> {
        let batch = [(key.clone(), edit.clone())];
        let stages = self.stages(&batch);
        let collection = self.collection.clone();
        let filter = doc! { "_id": key.as_str() };
        let mut concern = self.concern.clone();
        concern.w_timeout = Some(ATTEMPT);
        let projection = document::projection(&self.clock);
        let upsert = makes_record(edit);
        let found = self
            .runner
            .run(async move {
                collection
                    .find_one_and_update(filter, stages)
                    .upsert(upsert)
                    .return_document(ReturnDocument::After)
                    .projection(projection)
                    .max_time(ATTEMPT)
                    .write_concern(concern)
                    .await
            })
            .await?;
        match found {
            Some(found) => document::snapshot(&found).map_err(Failure::refused),
            None => Ok(vacant(key)),
        }
    }

    /// Many edits: one command that writes and one that reads.
    async fn together(&self, batch: &[(Key, Edit)]) -> Result<Vec<Snapshot>, Failure> {
        let matched = self.update(batch).await?;
        if matched < batch.len() {
            self.complete(batch, matched).await?;
        }
        let found = self.find(doc! { "_id": { "$in": names(batch) } }, batch.len()).await?;
        let mut found: HashMap<Key, Snapshot> =
            found.into_iter().map(|snapshot| (snapshot.record.key.clone(), snapshot)).collect();
        Ok(batch.iter().map(|(key, _)| found.remove(key).unwrap_or_else(|| vacant(key))).collect())
    }

    /// Creates the records that the batch needs and did not find, and applies their edits.
    async fn complete(&self, batch: &[(Key, Edit)], matched: usize) -> Result<(), Failure> {
        let present = self.find_names(names(batch)).await?;
        // Did someone else create records in between, it cannot be known which of those present had been edited:
        // then all are edited again, which changes no answer.
        let edited = |key: &Key| present.len() == matched && present.contains(key.as_str());
        let rest: Vec<(Key, Edit)> =
            batch.iter().filter(|(key, edit)| makes_record(edit) && !edited(key)).cloned().collect();
        let blanks: Vec<Bson> = rest
            .iter()
            .filter(|(key, _)| !present.contains(key.as_str()))
            .map(|(key, _)| doc! { "_id": key.as_str() }.into())
            .collect();
        if !blanks.is_empty() {
            let insert = doc! { "insert": self.collection.name(), "documents": blanks, "ordered": false };
            self.runner.write(&self.database, insert, &self.concern).await?;
        }
        if !rest.is_empty() {
            self.update(&rest).await?;
        }
        Ok(())
    }

    async fn update(&self, batch: &[(Key, Edit)]) -> Result<usize, Failure> {
        let stages = self.stages(batch);
        let statement = doc! { "q": { "_id": { "$in": names(batch) } }, "u": stages, "multi": true };
        let update = doc! { "update": self.collection.name(), "updates": [statement] };
        let matched = self.runner.write(&self.database, update, &self.concern).await?;
        usize::try_from(matched).map_err(Failure::unknown)
    }

    /// Records as a majority has them: what is shown here is never rolled back.
    async fn find(&self, filter: Document, limit: usize) -> Result<Vec<Snapshot>, Failure> {
        let read = Read { projection: document::projection(&self.clock), limit, bytes: usize::MAX };
        read_all(&self.find_raw(filter, read).await?.documents)
    }

    async fn find_names(&self, names: Vec<&str>) -> Result<HashSet<String>, Failure> {
        let read = Read { projection: doc! { "_id": 1 }, limit: names.len(), bytes: usize::MAX };
        let found = self.find_raw(doc! { "_id": { "$in": names } }, read).await?;
        found
            .documents
            .iter()
            .map(|found| Ok(found.get_str("_id").map_err(Failure::refused)?.to_owned()))
            .collect()
    }

    async fn find_raw(&self, filter: Document, read: Read) -> Result<Found, Failure> {
        let collection = self.collection.clone();
        let Read { projection, limit, bytes } = read;
        // Large records come in several rounds, so that few are read in vain.
        let round = if bytes == usize::MAX { limit } else { limit.min(100) };
        self.runner
            .run(async move {
                let mut cursor = collection
                    .find(filter)
                    .projection(projection)
                    .sort(doc! { "_id": 1 })
                    .limit(i64::try_from(limit).unwrap_or(i64::MAX))
                    .batch_size(u32::try_from(round).unwrap_or(u32::MAX).saturating_add(1))
                    .max_time(ATTEMPT)
                    .read_concern(ReadConcern::majority())
                    .await?;
                let mut found = Found::default();
                let mut size = 0;
                while let Some(document) = cursor.try_next().await? {
                    size += document.as_bytes().len();
                    found.documents.push(document);
                    if size > bytes {
                        found.cut = true;
                        break;
                    }
                }
                Ok(found)
            })
            .await
    }
}

/// What to read of the documents found, and how much: so many, and no more once past so many bytes.
struct Read {
    projection: Document,
    limit: usize,
    bytes: usize,
}

#[derive(Default)]
struct Found {
    documents: Vec<RawDocumentBuf>,
    /// There may be more, past the bytes.
    cut: bool,
}

fn read_all(documents: &[RawDocumentBuf]) -> Result<Vec<Snapshot>, Failure> {
    documents.iter().map(|document| document::snapshot(document).map_err(Failure::refused)).collect()
}

impl Store for MongoStore {
    async fn commit(
        &self,
        batch: Arc<Vec<(Key, Edit)>>,
        deadline: Duration,
    ) -> Result<Vec<Snapshot>, StoreError> {
        repeat(deadline, &self.repetitions, async || Ok(self.attempt(&batch).await?)).await
    }

    fn batches(&self) -> usize {
        BATCHES
    }

    async fn read(&self, keys: Vec<Key>) -> Result<Vec<Snapshot>, StoreError> {
        let names: Vec<&str> = keys.iter().map(Key::as_str).collect();
        Ok(self.find(doc! { "_id": { "$in": names } }, keys.len()).await?)
    }

    async fn list(&self, query: ListQuery) -> Result<Page, StoreError> {
        let mut range = doc! { "$gte": &query.prefix };
        if let Some(end) = after_prefix(&query.prefix) {
            range.insert("$lt", end);
        }
        if let Some(after) = &query.after {
            range.insert("$gt", after.as_str());
        }
        let mut filter = doc! { "_id": range };
        if !query.include_free {
            let blocked = doc! { "$gt": ["$blocked_until", self.clock.clone()] };
            filter.insert(
                "$or",
                [
                    doc! { "holders.0": { "$exists": true } },
                    doc! { "waiters.0": { "$exists": true } },
                    doc! { "$expr": blocked },
                ],
            );
        }
        let read =
            Read { projection: document::projection(&self.clock), limit: query.limit + 1, bytes: PAGE_BYTES };
        let found = self.find_raw(filter, read).await?;
        let mut snapshots = read_all(&found.documents)?;
        let more = found.cut || snapshots.len() > query.limit;
        snapshots.truncate(query.limit);
        Ok(Page { snapshots, more })
    }

    async fn purge(&self, free_for: Duration) -> Result<u64, StoreError> {
        let mut purged = 0;
        loop {
            let read = Read { projection: doc! { "_id": 1 }, limit: PURGE_PAGE, bytes: usize::MAX };
            let found = self.find_raw(free_since(free_for, &self.clock), read).await?;
            let names: Vec<Bson> = found
                .documents
                .iter()
                .filter_map(|found| found.get_str("_id").ok().map(Bson::from))
                .collect();
            if names.is_empty() {
                return Ok(purged);
            }
            // The condition stands in the deletion too: a key may have been leased since it was found.
            let mut which = free_since(free_for, &self.clock);
            which.insert("_id", doc! { "$in": names });
            let delete = doc! { "delete": self.collection.name(), "deletes": [{ "q": which, "limit": 0 }] };
            purged += self.runner.write(&self.database, delete, &self.concern).await?;
        }
    }

    async fn check(&self) -> Result<(), StoreError> {
        let database = self.database.clone();
        // Addressed to the primary: it answers when commits can go somewhere.
        let hello = async move { database.run_command(doc! { "hello": 1 }).await };
        self.runner.run(hello).await?;
        Ok(())
    }

    fn rules(&self) -> Rules {
        self.rules
    }

    fn name(&self) -> &'static str {
        "mongodb"
    }

    fn repetitions(&self) -> u64 {
        self.repetitions.load(Ordering::Relaxed)
    }

    async fn feed(&self, events: mpsc::Sender<FeedEvent>, draining: CancellationToken) {
        let ended = draining.child_token();
        let daemons = Daemons::new(self);
        let (company, others) = watch::channel(false);
        let tell = async {
            tokio::select! {
                () = feed::follow(self, &daemons, others, &events) => {}
                () = events.closed() => {}
                () = draining.cancelled() => {}
            }
            self.feed.progress.set_off();
            drop(events);
            ended.cancel();
        };
        tokio::join!(tell, daemons.attend(company, &ended));
    }

    fn feed_state(&self) -> FeedState {
        self.feed.progress.state()
    }

    fn is_shared(&self) -> bool {
        true
    }
}

/// Why there is no store.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// It can be reached, or need not be, and cannot be used.
    #[error(transparent)]
    Unusable(#[from] Unusable),
    /// It did not answer.
    #[error("{0}")]
    Unreachable(String),
}

impl From<ConnectError> for StartError {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::Unusable(why) => Self::Unusable(why.to_string()),
            ConnectError::Unreachable(why) => Self::Unreachable(why),
        }
    }
}

impl From<Failure> for ConnectError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::NotApplied(cause) | Failure::Unknown(cause) => Self::Unreachable(cause),
            Failure::Refused(cause) => Self::Unusable(Unusable::Rights(cause)),
        }
    }
}

fn names(batch: &[(Key, Edit)]) -> Vec<&str> {
    batch.iter().map(|(key, _)| key.as_str()).collect()
}

/// The least string above all that begin with `prefix`; `None` if there is none, or every string begins so.
fn after_prefix(prefix: &str) -> Option<String> {
    let mut characters: Vec<char> = prefix.chars().collect();
    while let Some(last) = characters.pop() {
        // The next character in the order of UTF-8 bytes, which is the order of code points.
        if let Some(next) = (last..=char::MAX).nth(1) {
            characters.push(next);
            return Some(characters.into_iter().collect());
        }
    }
    None
}

/// Records that nobody has held, waited for or kept blocked for `free_for`, by the database's clock. The last token
/// is the time of a grant or later than it, so a record goes only when the clock alone gives a higher one.
fn free_since(free_for: Duration, clock: &Bson) -> Document {
    let before = doc! { "$subtract": [clock.clone(), document::long(free_for)] };
    let older = |instant: Document| doc! { "$lt": [instant, before.clone()] };
    doc! {
        "holders.0": { "$exists": false },
        "waiters.0": { "$exists": false },
        "$expr": { "$and": [
            older(doc! { "$max": ["$blocked_until", { "$max": "$departures.at" }] }),
            older(doc! { "$toDate": { "$ifNull": ["$token", 0_i64] } }),
        ] },
    }
}

#[cfg(test)]
mod tests {
    use super::after_prefix;

    #[test]
    fn the_end_of_a_prefix_is_the_next_string_that_does_not_begin_with_it() {
        assert_eq!(after_prefix(""), None);
        assert_eq!(after_prefix("job/").as_deref(), Some("job0"));
        assert_eq!(after_prefix("a\u{10ffff}").as_deref(), Some("b"));
        assert_eq!(after_prefix("\u{d7ff}").as_deref(), Some("\u{e000}"));
        assert_eq!(after_prefix("\u{10ffff}"), None);
    }
}

//! Commits: the commands that apply the edits of a batch and read the records afterwards.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, PoisonError};

use futures_util::{StreamExt, stream};
use mongodb::bson::{Bson, Document, doc};
use mongodb::options::ReturnDocument;
use tokio::time::Instant;

use super::clock::Limit;
use super::command::ATTEMPT;
use super::document::Edited;
use super::{MongoStore, document, index, pipeline};
use crate::boot_instant::BootInstant;
use crate::lease::{Edit, Key, Snapshot, Timestamp};
use crate::store::failure::{Effects, Failure};
use crate::store::{ForKey, StoreError, makes_record, vacant};

/// How many keys with waiters are remembered.
const KEYS_WITH_WAITERS: usize = 10_000;

/// If a round leaves out at most this many edits, they are applied one by one, because another
/// round would take two commands.
const ALONE: usize = 2;

/// How many parts of a batch are tried at once when one of its edits cannot be applied.
const PARTS: usize = 8;

type Edits = Vec<(Key, Edit)>;

/// Keys that had waiters when their records were last read. A hint: it saves a command whose filter
/// would not match them.
#[derive(Debug, Default)]
pub(super) struct KeysWithWaiters(Mutex<HashSet<Key>>);

impl KeysWithWaiters {
    pub(super) fn note<'a>(&self, snapshots: impl IntoIterator<Item = &'a Snapshot>) {
        let mut keys = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for Snapshot { record, .. } in snapshots {
            if record.waiters.is_empty() {
                keys.remove(&record.key);
            } else if keys.len() < KEYS_WITH_WAITERS {
                keys.insert(record.key.clone());
            }
        }
    }

    /// Returns false if the key is known to have waiters.
    pub(super) fn has_no_known_waiters(&self, key: &Key) -> bool {
        !self.0.lock().unwrap_or_else(PoisonError::into_inner).contains(key)
    }

    /// Splits a batch in two: edits that enqueue no acquisition, on keys without known waiters, and
    /// the other edits.
    fn split(&self, batch: &[(Key, Edit)]) -> (Edits, Edits) {
        let keys = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        batch.iter().cloned().partition(|(key, edit)| edit.enqueued().is_empty() && !keys.contains(key))
    }
}

impl MongoStore {
    /// Tries once to commit a batch, and notes in `effects` what each command may have changed.
    /// After `until`, no longer searches for an edit that cannot be applied.
    pub(super) async fn attempt(
        &self,
        batch: &[(Key, Edit)],
        effects: &Effects,
        until: Instant,
    ) -> Result<Vec<ForKey>, Failure> {
        let done = match self.apply(batch, effects).await {
            Err(Failure::Late(cause)) => {
                // Either the command was late, or the estimate of the database's clock is wrong.
                tracing::debug!(cause, "reading the database's clock again");
                self.read_clock().await?;
                self.apply(batch, effects).await
            }
            done => done,
        };
        let answers = match done {
            Err(Failure::Record(cause)) => self.apply_in_parts(batch, cause, effects, until).await?,
            answers => answers?,
        };
        self.keys_with_waiters.note(answers.iter().flatten());
        Ok(answers)
    }

    pub(super) async fn apply(
        &self,
        batch: &[(Key, Edit)],
        effects: &Effects,
    ) -> Result<Vec<ForKey>, Failure> {
        Ok(match batch {
            [] => Vec::new(),
            [(key, edit)] => vec![self.apply_one(key, edit, effects).await?],
            _ => self.apply_many(batch, effects).await?,
        })
    }

    /// Applies a batch in which at least one edit cannot be applied: finds each such edit, and
    /// applies the others.
    ///
    /// Most often the record of such an edit cannot be read either, and one command finds all of
    /// these. Otherwise the batch is halved again and again, because MongoDB does not say which
    /// record it could not write. Parts of one size are tried together. No part is tried after
    /// `until`, because other batches wait for these keys.
    async fn apply_in_parts(
        &self,
        batch: &[(Key, Edit)],
        cause: String,
        effects: &Effects,
        until: Instant,
    ) -> Result<Vec<ForKey>, Failure> {
        if let [(key, _)] = batch {
            return Ok(vec![Err(StoreError::Unreadable { key: key.clone(), cause })]);
        }
        let found = self.read_edited(&names(batch)).await?;
        let unreadable = found.into_iter().filter_map(|(key, edited)| Some((key, Err(edited.err()?))));
        let mut answers: HashMap<Key, ForKey> = unreadable.collect();
        let mut parts = if answers.is_empty() {
            halves(batch)
        } else {
            vec![batch.iter().filter(|(key, _)| !answers.contains_key(key)).cloned().collect()]
        };
        while !parts.is_empty() {
            let tries = parts.into_iter().map(|part| async move {
                if Instant::now() >= until {
                    return Err(Failure::unknown(
                        "one of the records cannot be written, and the time is over",
                    ));
                }
                Ok((self.apply(&part, effects).await, part))
            });
            let tried: Vec<_> = stream::iter(tries).buffer_unordered(PARTS).collect().await;
            parts = Vec::new();
            for tried in tried {
                match tried? {
                    (Ok(done), part) => answers.extend(part.into_iter().map(|(key, _)| key).zip(done)),
                    (Err(Failure::Record(cause)), part) => match &part[..] {
                        [(key, _)] => {
                            let error = StoreError::Unreadable { key: key.clone(), cause };
                            answers.insert(key.clone(), Err(error));
                        }
                        _ => parts.extend(halves(&part)),
                    },
                    (Err(failure), _) => return Err(failure),
                }
            }
        }
        let missing = || Failure::unknown("an answer is missing");
        batch.iter().map(|(key, _)| answers.remove(key).ok_or_else(missing)).collect()
    }

    /// Applies a single edit in one round trip. A touch takes a second one if the key has no
    /// record, or waiters unknown to this daemon. Other edits risk no second one: they may free
    /// what a waiter waits for.
    async fn apply_one(&self, key: &Key, edit: &Edit, effects: &Effects) -> Result<ForKey, Failure> {
        let batch = [(key.clone(), edit.clone())];
        if edit.only_touches() && self.keys_with_waiters.has_no_known_waiters(key) {
            let commands = self.commands().await?;
            let stages = commands.quick_stages(&batch);
            if let Some(found) =
                self.find_and_modify(filter_without_waiters(&batch), stages, false, effects).await?
            {
                return Ok(found);
            }
        }
        let commands = self.commands().await?;
        let (filter, stages) = (doc! { "_id": key.as_str() }, commands.stages(&batch));
        let found = self.find_and_modify(filter, stages, makes_record(edit), effects).await?;
        Ok(found.unwrap_or_else(|| Ok(vacant(key))))
    }

    async fn find_and_modify(
        &self,
        filter: Document,
        stages: Vec<Document>,
        upsert: bool,
        effects: &Effects,
    ) -> Result<Option<ForKey>, Failure> {
        let collection = self.collection.clone();
        let mut concern = self.concern.clone();
        concern.w_timeout = Some(ATTEMPT);
        let sent = BootInstant::now();
        let command = async move {
            collection
                .find_one_and_update(filter, stages)
                .upsert(upsert)
                .return_document(ReturnDocument::After)
                .max_time(ATTEMPT)
                .write_concern(concern)
                .await
        };
        let reply = effects.note(self.runner.run(command).await, Option::is_some);
        let Some(document) = reply? else { return Ok(None) };
        match document::edited(&document) {
            Ok(Edited { snapshot, .. }) => {
                self.learn_time(snapshot.now, sent, BootInstant::now());
                Ok(Some(Ok(snapshot)))
            }
            Err(foreign) => Ok(foreign.into_unreadable().map(Err)),
        }
    }

    /// Applies many edits with one command that writes and one that reads. Edits that this leaves
    /// out follow in another round: their keys have waiters this daemon did not know of, or no
    /// record yet.
    ///
    /// Each command leaves a tag in the records that it edits, and only the tag proves that an edit
    /// was made. The number of matched records proves nothing, since a sharded cluster may count a
    /// record twice.
    async fn apply_many(&self, batch: &[(Key, Edit)], effects: &Effects) -> Result<Vec<ForKey>, Failure> {
        let (quick, others) = self.keys_with_waiters.split(batch);
        let mut found = self.round(&quick, &others, effects).await?;
        let mut left = unapplied(batch, &found);
        let blanks = blanks(&left, &found);
        if !blanks.is_empty() {
            // Unordered, because a record that another daemon inserted first must not stop the
            // others.
            let insert = doc! { "insert": self.collection.name(), "documents": blanks, "ordered": false };
            effects.note(self.runner.write(&self.database, insert, &self.concern).await, |written| {
                written.matched > 0
            })?;
        }
        if left.len() > ALONE {
            found.extend(self.round(&[], &left, effects).await?);
            left.retain(|(key, edit)| is_unapplied(key, edit, &found));
        }
        // Another daemon may write to these records between the two commands of a round. A single
        // command that edits and returns a record leaves no doubt.
        for (key, edit) in left {
            let answer = match self.apply_one(&key, &edit, effects).await {
                Err(Failure::Record(cause)) => Err(StoreError::Unreadable { key: key.clone(), cause }),
                answer => answer?,
            };
            found.insert(key, answer.map(|snapshot| Found { snapshot, is_ours: true }));
        }
        let answer = |key| match found.remove(key) {
            Some(found) => found.map(|found| found.snapshot),
            None => Ok(vacant(key)),
        };
        Ok(batch.iter().map(|(key, _)| key).map(answer).collect())
    }

    /// Applies `quick` edits, which enqueue no acquisition, to records without waiters, and
    /// `others` to any record. Then reads the records.
    async fn round(
        &self,
        quick: &[(Key, Edit)],
        others: &[(Key, Edit)],
        effects: &Effects,
    ) -> Result<HashMap<Key, Result<Found, StoreError>>, Failure> {
        let commands = self.commands().await?;
        let mut statements = Vec::new();
        if !quick.is_empty() {
            statements.push(
                doc! { "q": filter_without_waiters(quick), "u": commands.quick_stages(quick), "multi": true },
            );
        }
        if !others.is_empty() {
            let which = doc! { "_id": { "$in": names(others) } };
            statements.push(doc! { "q": which, "u": commands.stages(others), "multi": true });
        }
        let update = doc! { "update": self.collection.name(), "updates": statements };
        let sent = BootInstant::now();
        effects.note(self.runner.write(&self.database, update, &self.concern).await, |written| {
            written.matched > 0
        })?;
        let received = BootInstant::now();
        let edited = self.read_edited(&names(quick.iter().chain(others))).await?;
        let found = |edited: Result<Edited, StoreError>| Ok(Found::of(edited?, commands.tag));
        let found: HashMap<Key, Result<Found, StoreError>> =
            edited.into_iter().map(|(key, edited)| (key, found(edited))).collect();
        if let Some(ours) = found.values().flatten().find(|found| found.is_ours) {
            self.learn_time(ours.snapshot.now, sent, received);
        }
        self.keys_with_waiters.note(found.values().flatten().map(|found| &found.snapshot));
        Ok(found)
    }

    /// Prepares a command that is sent now.
    async fn commands(&self) -> Result<Commands<'_>, Failure> {
        let limit = if self.clock_runs() {
            if self.store_clock.limit().is_none() {
                self.read_clock().await?;
            }
            self.store_clock.limit()
        } else {
            None
        };
        // The tag is random, so that commands of different daemons have different ones.
        Ok(Commands { store: self, tag: fastrand::i64(..), limit })
    }

    /// Notes that the database's clock showed `time` at some instant between `sent` and `received`.
    pub(super) fn learn_time(&self, time: Timestamp, sent: BootInstant, received: BootInstant) {
        if self.clock_runs() {
            self.store_clock.observe(time, sent, received, self.rules.grace);
        }
    }

    /// Whether the database's clock runs. Tests stop it.
    fn clock_runs(&self) -> bool {
        self.clock.as_str() == Some(pipeline::CLOCK)
    }
}

/// A record, and whether it has the tag of the latest command.
pub(super) struct Found {
    snapshot: Snapshot,
    is_ours: bool,
}

impl Found {
    pub(super) fn of(Edited { snapshot, tag }: Edited, ours: i64) -> Self {
        Self { snapshot, is_ours: tag == Some(ours) }
    }
}

/// Returns the edits that are not known to have been applied, of keys whose records can be read.
pub(super) fn unapplied(batch: &[(Key, Edit)], found: &HashMap<Key, Result<Found, StoreError>>) -> Edits {
    batch.iter().filter(|(key, edit)| is_unapplied(key, edit, found)).cloned().collect()
}

fn is_unapplied(key: &Key, edit: &Edit, found: &HashMap<Key, Result<Found, StoreError>>) -> bool {
    match found.get(key) {
        Some(Ok(found)) => !found.is_ours,
        // Another attempt could not read the record either.
        Some(Err(_)) => false,
        // Without a record, no other edit changes anything.
        None => makes_record(edit),
    }
}

/// Empty documents for edits that make records, because an update of many documents inserts none.
fn blanks(left: &[(Key, Edit)], found: &HashMap<Key, Result<Found, StoreError>>) -> Vec<Bson> {
    let missing = left.iter().map(|(key, _)| key).filter(|key| !found.contains_key(*key));
    missing.map(|key| doc! { "_id": key.as_str() }.into()).collect()
}

/// What the stages of one command are made of: its tag, and its limit on the database's clock.
struct Commands<'a> {
    store: &'a MongoStore,
    tag: i64,
    limit: Option<Limit>,
}

impl Commands<'_> {
    fn stages(&self, batch: &[(Key, Edit)]) -> Vec<Document> {
        let MongoStore { rules, clock, .. } = self.store;
        let mut stages = self.store.with_mutant(pipeline::pipeline(batch, rules, clock, self.tag));
        stages.push(index::in_use_stage(clock));
        self.with_limit(stages)
    }

    fn quick_stages(&self, batch: &[(Key, Edit)]) -> Vec<Document> {
        let clock = &self.store.clock;
        let mut stages = self.store.with_mutant(pipeline::without_waiters(batch, clock, self.tag));
        // A touch neither takes nor frees a key, so the hot path need not maintain the index.
        if !batch.iter().all(|(_, edit)| edit.only_touches()) {
            stages.push(index::in_use_stage(clock));
        }
        self.with_limit(stages)
    }

    fn with_limit(&self, mut stages: Vec<Document>) -> Vec<Document> {
        stages.splice(0..0, self.limit.map(Limit::stage));
        stages
    }
}

impl MongoStore {
    /// Returns the stages, with the mutant in them that a test may have set.
    #[cfg_attr(not(test), expect(clippy::unused_self, reason = "only tests set one"))]
    fn with_mutant(&self, stages: Vec<Document>) -> Vec<Document> {
        #[cfg(test)]
        if let Some(mutant) = self.mutant {
            return super::mutants::put_into(stages, mutant);
        }
        stages
    }
}

fn halves(batch: &[(Key, Edit)]) -> Vec<Edits> {
    let (first, second) = batch.split_at(batch.len() / 2);
    vec![first.to_vec(), second.to_vec()]
}

/// A filter for the records of a batch that have no waiters.
fn filter_without_waiters(batch: &[(Key, Edit)]) -> Document {
    doc! { "_id": { "$in": names(batch) }, "waiters": [] }
}

fn names<'a>(batch: impl IntoIterator<Item = &'a (Key, Edit)>) -> Vec<&'a str> {
    batch.into_iter().map(|(key, _)| key.as_str()).collect()
}

//! Batches: the commands that apply many edits, or a single one, and read the records after.

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
const LINES: usize = 10_000;

/// Edits left over that are made one by one: another round takes two commands.
const ALONE: usize = 2;

/// Parts of a batch tried at once when one of its edits cannot be applied.
const PARTS: usize = 8;

type Edits = Vec<(Key, Edit)>;

/// Keys at which someone waited when they were seen last. A hint: it saves a command that would not find them.
#[derive(Debug, Default)]
pub(super) struct Lines(Mutex<HashSet<Key>>);

impl Lines {
    pub(super) fn note<'a>(&self, snapshots: impl IntoIterator<Item = &'a Snapshot>) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for Snapshot { record, .. } in snapshots {
            if record.waiters.is_empty() {
                known.remove(&record.key);
            } else if known.len() < LINES {
                known.insert(record.key.clone());
            }
        }
    }

    /// Whether nobody is known to wait at the key.
    pub(super) fn has_none_at(&self, key: &Key) -> bool {
        !self.0.lock().unwrap_or_else(PoisonError::into_inner).contains(key)
    }

    /// The edits with which nobody comes, where nobody is known to wait; and the others.
    fn split(&self, batch: &[(Key, Edit)]) -> (Edits, Edits) {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        batch.iter().cloned().partition(|(key, edit)| edit.enqueued().is_empty() && !known.contains(key))
    }
}

impl MongoStore {
    /// One try at a batch. The `effects` learn what each command may have changed. No search for an edit that cannot be
    /// applied goes on after `until`.
    pub(super) async fn attempt(
        &self,
        batch: &[(Key, Edit)],
        effects: &Effects,
        until: Instant,
    ) -> Result<Vec<ForKey>, Failure> {
        let done = match self.once(batch, effects).await {
            Err(Failure::Late(cause)) => {
                // If that is true, the limit of the next command is a later one. If not, the clock was misjudged.
                tracing::debug!(cause, "looking at the database's clock anew");
                self.look_at_clock().await?;
                self.once(batch, effects).await
            }
            done => done,
        };
        let answers = match done {
            Err(Failure::Record(cause)) => self.apart(batch, cause, effects, until).await?,
            answers => answers?,
        };
        self.lines.note(answers.iter().flatten());
        Ok(answers)
    }

    pub(super) async fn once(
        &self,
        batch: &[(Key, Edit)],
        effects: &Effects,
    ) -> Result<Vec<ForKey>, Failure> {
        Ok(match batch {
            [] => Vec::new(),
            [(key, edit)] => vec![self.alone(key, edit, effects).await?],
            _ => self.together(batch, effects).await?,
        })
    }

    /// Applies a batch in which one edit at least cannot be applied: finds out which, and applies the others.
    ///
    /// Most often the record of such an edit cannot be read either, and one command finds all of those. For the rest the
    /// batch is halved, since MongoDB does not say which record it could not write. The parts of one size are tried
    /// together, and none once `until` has passed: other batches wait for these keys.
    async fn apart(
        &self,
        batch: &[(Key, Edit)],
        cause: String,
        effects: &Effects,
        until: Instant,
    ) -> Result<Vec<ForKey>, Failure> {
        if let [(key, _)] = batch {
            return Ok(vec![Err(StoreError::Unreadable { key: key.clone(), cause })]);
        }
        let found = self.find_edited(&names(batch)).await?;
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
                Ok((self.once(&part, effects).await, part))
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

    /// A single edit: one round trip. A touch takes a second if the key has waiters that this daemon did not know of. Other
    /// edits never risk the second: a waiter may be waiting for that very release.
    async fn alone(&self, key: &Key, edit: &Edit, effects: &Effects) -> Result<ForKey, Failure> {
        let batch = [(key.clone(), edit.clone())];
        if edit.only_touches() && self.lines.has_none_at(key) {
            let commands = self.commands().await?;
            let stages = commands.quick_stages(&batch);
            if let Some(found) = self.find_and_modify(quickly(&batch), stages, false, effects).await? {
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

    /// Many edits: one command that writes and one that reads. Edits that those did not reach follow in another round:
    /// the key has waiters that this daemon did not know of, or there is no record yet.
    ///
    /// Each command leaves a mark of its own in the records, and only the mark says that an edit was made: how many
    /// records a command matched is no proof, since a sharded cluster may count one twice.
    async fn together(&self, batch: &[(Key, Edit)], effects: &Effects) -> Result<Vec<ForKey>, Failure> {
        let (quick, others) = self.lines.split(batch);
        let mut found = self.round(&quick, &others, effects).await?;
        let mut left = left(batch, &found);
        let blanks = blanks(&left, &found);
        if !blanks.is_empty() {
            let insert = doc! { "insert": self.collection.name(), "documents": blanks, "ordered": false };
            effects.note(self.runner.write(&self.database, insert, &self.concern).await, |n| *n > 0)?;
        }
        if left.len() > ALONE {
            found.extend(self.round(&[], &left, effects).await?);
            left.retain(|(key, edit)| is_left(key, edit, &found));
        }
        // Another daemon writes to these, and may have done so between the two commands. One that returns the record it
        // has made leaves no such doubt.
        for (key, edit) in left {
            let answer = match self.alone(&key, &edit, effects).await {
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

    /// Applies edits with which nobody comes, at keys where nobody waits, and others of any kind; then reads the records.
    async fn round(
        &self,
        quick: &[(Key, Edit)],
        others: &[(Key, Edit)],
        effects: &Effects,
    ) -> Result<HashMap<Key, Result<Found, StoreError>>, Failure> {
        let commands = self.commands().await?;
        let mut statements = Vec::new();
        if !quick.is_empty() {
            statements.push(doc! { "q": quickly(quick), "u": commands.quick_stages(quick), "multi": true });
        }
        if !others.is_empty() {
            let which = doc! { "_id": { "$in": names(others) } };
            statements.push(doc! { "q": which, "u": commands.stages(others), "multi": true });
        }
        let update = doc! { "update": self.collection.name(), "updates": statements };
        let sent = BootInstant::now();
        effects.note(self.runner.write(&self.database, update, &self.concern).await, |n| *n > 0)?;
        let received = BootInstant::now();
        let edited = self.find_edited(&names(quick.iter().chain(others))).await?;
        let found = |edited: Result<Edited, StoreError>| Ok(Found::of(edited?, commands.mark));
        let found: HashMap<Key, Result<Found, StoreError>> =
            edited.into_iter().map(|(key, edited)| (key, found(edited))).collect();
        if let Some(ours) = found.values().flatten().find(|found| found.is_ours) {
            self.learn_time(ours.snapshot.now, sent, received);
        }
        self.lines.note(found.values().flatten().map(|found| &found.snapshot));
        Ok(found)
    }

    /// What a command that is sent now consists of.
    async fn commands(&self) -> Result<Commands<'_>, Failure> {
        let limit = if self.clock_runs() {
            if self.store_clock.limit().is_none() {
                self.look_at_clock().await?;
            }
            self.store_clock.limit()
        } else {
            None
        };
        Ok(Commands { store: self, mark: fastrand::i64(..), limit })
    }

    /// Learns that the database's clock showed `time` between two instants of this host.
    pub(super) fn learn_time(&self, time: Timestamp, sent: BootInstant, received: BootInstant) {
        if self.clock_runs() {
            self.store_clock.observe(time, sent, received, self.rules.grace);
        }
    }

    /// Tests stop it.
    fn clock_runs(&self) -> bool {
        self.clock.as_str() == Some(pipeline::CLOCK)
    }
}

/// A record, and whether it shows the mark of the command before.
pub(super) struct Found {
    snapshot: Snapshot,
    is_ours: bool,
}

impl Found {
    pub(super) fn of(Edited { snapshot, mark }: Edited, ours: i64) -> Self {
        Self { snapshot, is_ours: mark == Some(ours) }
    }
}

/// Which edits are not known to have been made, at keys whose records can be read.
pub(super) fn left(batch: &[(Key, Edit)], found: &HashMap<Key, Result<Found, StoreError>>) -> Edits {
    batch.iter().filter(|(key, edit)| is_left(key, edit, found)).cloned().collect()
}

fn is_left(key: &Key, edit: &Edit, found: &HashMap<Key, Result<Found, StoreError>>) -> bool {
    match found.get(key) {
        Some(Ok(found)) => !found.is_ours,
        Some(Err(_)) => false,
        None => makes_record(edit),
    }
}

/// Empty documents for edits that make records: an update of many makes none.
fn blanks(left: &[(Key, Edit)], found: &HashMap<Key, Result<Found, StoreError>>) -> Vec<Bson> {
    let missing = left.iter().map(|(key, _)| key).filter(|key| !found.contains_key(*key));
    missing.map(|key| doc! { "_id": key.as_str() }.into()).collect()
}

/// The stages of a command, its mark, and until when it may act.
struct Commands<'a> {
    store: &'a MongoStore,
    mark: i64,
    limit: Option<Limit>,
}

impl Commands<'_> {
    fn stages(&self, batch: &[(Key, Edit)]) -> Vec<Document> {
        let MongoStore { rules, clock, .. } = self.store;
        let mut stages = self.store.tampered(pipeline::pipeline(batch, rules, clock, self.mark));
        stages.push(index::note_use(clock));
        self.limited(stages)
    }

    fn quick_stages(&self, batch: &[(Key, Edit)]) -> Vec<Document> {
        let clock = &self.store.clock;
        let mut stages = self.store.tampered(pipeline::without_line(batch, clock, self.mark));
        // A touch, the hot path, neither takes nor frees a key.
        if !batch.iter().all(|(_, edit)| edit.only_touches()) {
            stages.push(index::note_use(clock));
        }
        self.limited(stages)
    }

    fn limited(&self, mut stages: Vec<Document>) -> Vec<Document> {
        stages.splice(0..0, self.limit.map(Limit::stage));
        stages
    }
}

impl MongoStore {
    /// With the deliberate wrong in it that a test asks for.
    #[cfg_attr(not(test), expect(clippy::unused_self, reason = "only tests ask"))]
    fn tampered(&self, stages: Vec<Document>) -> Vec<Document> {
        #[cfg(test)]
        if let Some(wrong) = self.wrong {
            return super::mutants::put_into(stages, wrong);
        }
        stages
    }
}

fn halves(batch: &[(Key, Edit)]) -> Vec<Edits> {
    let (first, second) = batch.split_at(batch.len() / 2);
    vec![first.to_vec(), second.to_vec()]
}

/// Records at which nobody waits.
fn quickly(batch: &[(Key, Edit)]) -> Document {
    doc! { "_id": { "$in": names(batch) }, "waiters": [] }
}

fn names<'a>(batch: impl IntoIterator<Item = &'a (Key, Edit)>) -> Vec<&'a str> {
    batch.into_iter().map(|(key, _)| key.as_str()).collect()
}

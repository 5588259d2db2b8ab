//! Batches: the commands that apply many edits, or a single one, and read the records after.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, PoisonError};

use mongodb::bson::{Bson, Document, doc};
use mongodb::options::ReturnDocument;

use super::command::ATTEMPT;
use super::{MongoStore, document, pipeline};
use crate::lease::{Edit, Key, Snapshot};
use crate::store::failure::Failure;
use crate::store::{ForKey, StoreError, makes_record, vacant};

/// Keys of which more are not remembered to have a line.
const LINES: usize = 10_000;

type Edits = Vec<(Key, Edit)>;

/// Keys at which someone waited when they were seen last. A hint: it saves a command that would not find them.
#[derive(Debug, Default)]
pub(super) struct Lines(Mutex<HashSet<Key>>);

impl Lines {
    pub(super) fn note(&self, answers: &[ForKey]) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for Snapshot { record, .. } in answers.iter().flatten() {
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
    /// One try at a batch.
    pub(super) async fn attempt(&self, batch: &[(Key, Edit)]) -> Result<Vec<ForKey>, Failure> {
        let answers = match self.whole(batch).await {
            Err(Failure::Record(cause)) => self.apart(batch, cause).await?,
            answers => answers?,
        };
        self.lines.note(&answers);
        Ok(answers)
    }

    async fn whole(&self, batch: &[(Key, Edit)]) -> Result<Vec<ForKey>, Failure> {
        Ok(match batch {
            [] => Vec::new(),
            [(key, edit)] => vec![self.alone(key, edit).await?],
            _ => self.together(batch).await?,
        })
    }

    /// Applies a batch in which one edit at least cannot be applied: finds out which, and applies the others.
    ///
    /// Such a record can most often not be read either, which one command tells of all. Otherwise the batch is halved
    /// until the edit stands alone.
    async fn apart(&self, batch: &[(Key, Edit)], cause: String) -> Result<Vec<ForKey>, Failure> {
        if let [(key, _)] = batch {
            return Ok(vec![Err(StoreError::Unreadable { key: key.clone(), cause })]);
        }
        let found = self.find_edited(&names(batch)).await?;
        let mut unreadable: HashMap<Key, StoreError> =
            found.into_iter().filter_map(|(key, edited)| Some((key, edited.err()?))).collect();
        if unreadable.is_empty() {
            let (first, second) = batch.split_at(batch.len() / 2);
            let mut answers = Box::pin(self.attempt(first)).await?;
            answers.extend(Box::pin(self.attempt(second)).await?);
            return Ok(answers);
        }
        let rest: Vec<_> = batch.iter().filter(|(key, _)| !unreadable.contains_key(key)).cloned().collect();
        let mut answers = Box::pin(self.attempt(&rest)).await?.into_iter();
        let missing = || Failure::unknown("an answer is missing");
        let answer = |(key, _): &(Key, Edit)| match unreadable.remove(key) {
            Some(error) => Ok(Err(error)),
            None => answers.next().ok_or_else(missing),
        };
        batch.iter().map(answer).collect()
    }

    /// A single edit: one round trip, or two for a touch where someone waits of whom nothing is known here. Other edits are not
    /// to take two: a release is what those wait for.
    async fn alone(&self, key: &Key, edit: &Edit) -> Result<ForKey, Failure> {
        let (batch, mark) = ([(key.clone(), edit.clone())], fastrand::i64(..));
        if edit.only_touches() && self.lines.has_none_at(key) {
            let stages = self.quick_stages(&batch, mark);
            if let Some(found) = self.find_and_modify(quickly(&batch), stages, false).await? {
                return Ok(found);
            }
        }
        let filter = doc! { "_id": key.as_str() };
        let found = self.find_and_modify(filter, self.stages(&batch, mark), makes_record(edit)).await?;
        Ok(found.unwrap_or_else(|| Ok(vacant(key))))
    }

    async fn find_and_modify(
        &self,
        filter: Document,
        stages: Vec<Document>,
        upsert: bool,
    ) -> Result<Option<ForKey>, Failure> {
        let collection = self.collection.clone();
        let mut concern = self.concern.clone();
        concern.w_timeout = Some(ATTEMPT);
        let found = self
            .runner
            .run(async move {
                collection
                    .find_one_and_update(filter, stages)
                    .upsert(upsert)
                    .return_document(ReturnDocument::After)
                    .max_time(ATTEMPT)
                    .write_concern(concern)
                    .await
            })
            .await?;
        Ok(found.and_then(|found| match document::edited(&found) {
            Ok(edited) => Some(Ok(edited.snapshot)),
            Err(foreign) => foreign.into_unreadable().map(Err),
        }))
    }

    /// Many edits: one command that writes and one that reads, and the same again for what that leaves to be done.
    async fn together(&self, batch: &[(Key, Edit)]) -> Result<Vec<ForKey>, Failure> {
        let mark = fastrand::i64(..);
        let (quick, others) = self.lines.split(batch);
        let matched = self.update(&quick, &others, mark).await?;
        let mut found = self.find_edited(&names(batch)).await?;
        if matched < batch.len() {
            // Someone waits of whom nothing is known here, or there is no record.
            let is_left = |(key, edit): &&(Key, Edit)| match found.get(key) {
                Some(Ok(edited)) => edited.mark != Some(mark),
                Some(Err(_)) => false,
                None => makes_record(edit),
            };
            let rest: Vec<(Key, Edit)> = batch.iter().filter(is_left).cloned().collect();
            let blanks: Vec<Bson> = rest
                .iter()
                .filter(|(key, _)| !found.contains_key(key))
                .map(|(key, _)| doc! { "_id": key.as_str() }.into())
                .collect();
            if !blanks.is_empty() {
                let insert = doc! { "insert": self.collection.name(), "documents": blanks, "ordered": false };
                self.runner.write(&self.database, insert, &self.concern).await?;
            }
            if !rest.is_empty() {
                if self.update(&[], &rest, mark).await? < rest.len() {
                    return Err(Failure::unknown("a record was forgotten in the same moment"));
                }
                found.extend(self.find_edited(&names(&rest)).await?);
            }
        }
        let answer = |key| match found.remove(key) {
            Some(edited) => edited.map(|edited| edited.snapshot),
            None => Ok(vacant(key)),
        };
        Ok(batch.iter().map(|(key, _)| key).map(answer).collect())
    }

    /// Applies edits with which nobody comes, at keys where nobody waits, and others of any kind; returns how many records
    /// there were for them. Each gets the `mark`.
    async fn update(
        &self,
        quick: &[(Key, Edit)],
        others: &[(Key, Edit)],
        mark: i64,
    ) -> Result<usize, Failure> {
        let mut statements = Vec::new();
        if !quick.is_empty() {
            statements.push(doc! { "q": quickly(quick), "u": self.quick_stages(quick, mark), "multi": true });
        }
        if !others.is_empty() {
            let which = doc! { "_id": { "$in": names(others) } };
            statements.push(doc! { "q": which, "u": self.stages(others, mark), "multi": true });
        }
        let update = doc! { "update": self.collection.name(), "updates": statements };
        let matched = self.runner.write(&self.database, update, &self.concern).await?;
        usize::try_from(matched).map_err(Failure::unknown)
    }

    fn stages(&self, batch: &[(Key, Edit)], mark: i64) -> Vec<Document> {
        self.tampered(pipeline::pipeline(batch, &self.rules, &self.clock, mark))
    }

    fn quick_stages(&self, batch: &[(Key, Edit)], mark: i64) -> Vec<Document> {
        self.tampered(pipeline::without_line(batch, &self.clock, mark))
    }

    /// With the deliberate wrong in it that a test asks for.
    #[cfg_attr(not(test), expect(clippy::unused_self, reason = "only tests ask"))]
    fn tampered(&self, stages: Vec<Document>) -> Vec<Document> {
        #[cfg(test)]
        if let Some(wrong) = self.wrong {
            return super::wrong::put_into(stages, wrong);
        }
        stages
    }
}

/// Records at which nobody waits.
fn quickly(batch: &[(Key, Edit)]) -> Document {
    doc! { "_id": { "$in": names(batch) }, "waiters": [] }
}

fn names(batch: &[(Key, Edit)]) -> Vec<&str> {
    batch.iter().map(|(key, _)| key.as_str()).collect()
}

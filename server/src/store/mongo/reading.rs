//! Records found: by their keys, page after page, and those long free, which are forgotten.

use std::collections::HashMap;
use std::time::Duration;

use futures_util::TryStreamExt;
use mongodb::action::Action;
use mongodb::bson::{Bson, Document, RawDocumentBuf, doc};
use mongodb::options::ReadConcern;

use super::command::ATTEMPT;
use super::document::Edited;
use super::{MongoStore, document};
use crate::lease::Key;
use crate::store::failure::Failure;
use crate::store::{ForKey, ListQuery, Page, StoreError, report};

/// Keys forgotten with one command.
const PURGE_PAGE: usize = 1000;
/// A page of a listing ends past this many bytes.
const PAGE_BYTES: usize = 4 * 1024 * 1024;

impl MongoStore {
    /// The records of those of the keys that have one, in any order.
    pub(super) async fn find(&self, names: &[&str]) -> Result<Vec<ForKey>, Failure> {
        let read = Read { projection: Some(document::projection(&self.clock)), ..Read::of(names.len()) };
        Ok(read_each(&self.found(by_name(names), read).await?.documents))
    }

    /// The same of records that have just been edited: as they were right after, or after a later edit.
    pub(super) async fn find_edited(
        &self,
        names: &[&str],
    ) -> Result<HashMap<Key, Result<Edited, StoreError>>, Failure> {
        let found = self.found(by_name(names), Read::of(names.len())).await?;
        let edited = |document: &RawDocumentBuf| match document::edited(document) {
            Ok(edited) => Some((edited.snapshot.record.key.clone(), Ok(edited))),
            Err(foreign) => {
                let unreadable = foreign.into_unreadable()?;
                Some((Key::try_from(document.get_str("_id").ok()?).ok()?, Err(unreadable)))
            }
        };
        Ok(found.documents.iter().filter_map(edited).collect())
    }

    /// Documents as a majority has them: what is shown here is never rolled back.
    async fn found(&self, filter: Document, read: Read) -> Result<Found, Failure> {
        let collection = self.collection.clone();
        let Read { projection, limit, page } = read;
        // Large records come in several rounds, so that few are read in vain.
        let round = if page.is_some() { limit.min(100) } else { limit };
        self.runner
            .run(async move {
                let mut cursor = collection
                    .find(filter)
                    .optional(projection, |find, projection| find.projection(projection))
                    .optional(page, |find, _| find.sort(doc! { "_id": 1 }))
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
                    if page.is_some_and(|bytes| size > bytes) {
                        found.cut = true;
                        break;
                    }
                }
                Ok(found)
            })
            .await
    }

    /// One page of records in the order of their keys.
    pub(super) async fn page(&self, query: &ListQuery) -> Result<Page, Failure> {
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
        let projection = Some(document::projection(&self.clock));
        let read = Read { projection, page: Some(PAGE_BYTES), ..Read::of(query.limit + 1) };
        let found = self.found(filter, read).await?;
        let more = found.cut || found.documents.len() > query.limit;
        let shown = &found.documents[..found.documents.len().min(query.limit)];
        let answers = read_each(shown).into_iter();
        let snapshots: Vec<_> = answers.filter_map(|answer| answer.inspect_err(report).ok()).collect();
        if more && snapshots.is_empty() {
            // Nothing in this page can be read, so there is no key that the next one could begin after.
            let last = shown.last().and_then(|last| last.get_str("_id").ok()?.try_into().ok());
            let after = last.ok_or_else(|| Failure::refused("a page of documents that are no records"))?;
            return Box::pin(self.page(&ListQuery { after: Some(after), ..query.clone() })).await;
        }
        Ok(Page { snapshots, more })
    }

    /// Forgets keys that have been free for `free_for` and returns how many.
    pub(super) async fn forget(&self, free_for: Duration) -> Result<u64, Failure> {
        let mut purged = 0;
        loop {
            let read = Read { projection: Some(doc! { "_id": 1 }), ..Read::of(PURGE_PAGE) };
            let found = self.found(free_since(free_for, &self.clock), read).await?;
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
}

/// What to read of the documents found.
struct Read {
    /// Else the whole documents.
    projection: Option<Document>,
    /// At most so many.
    limit: usize,
    /// In the order of the keys, and no more once past so many bytes.
    page: Option<usize>,
}

impl Read {
    fn of(limit: usize) -> Self {
        Self { projection: None, limit, page: None }
    }
}

#[derive(Default)]
struct Found {
    documents: Vec<RawDocumentBuf>,
    /// There may be more, past the bytes.
    cut: bool,
}

fn read_each(documents: &[RawDocumentBuf]) -> Vec<ForKey> {
    let read = |document: &RawDocumentBuf| match document::snapshot(document) {
        Ok(snapshot) => Some(Ok(snapshot)),
        Err(foreign) => foreign.into_unreadable().map(Err),
    };
    documents.iter().filter_map(read).collect()
}

fn by_name(names: &[&str]) -> Document {
    doc! { "_id": { "$in": names } }
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
/// is the time of a grant or later than it, so a record goes only when the clock alone gives a higher one. A token that is
/// no number keeps its record, and does not fail the search for the others.
fn free_since(free_for: Duration, clock: &Bson) -> Document {
    let before = doc! { "$subtract": [clock.clone(), document::long(free_for)] };
    let older = |instant: Document| doc! { "$lt": [instant, before.clone()] };
    doc! {
        "holders": { "$in": [[], Bson::Null] },
        "waiters": { "$in": [[], Bson::Null] },
        "$expr": { "$and": [
            older(doc! { "$max": ["$blocked_until", { "$max": "$departures.at" }] }),
            older(doc! { "$convert": { "input": { "$ifNull": ["$token", 0_i64] }, "to": "date", "onError": clock.clone() } }),
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

//! Records found: by their keys, and page after page.

use std::collections::HashMap;

use futures_util::TryStreamExt;
use mongodb::action::Action;
use mongodb::bson::{Document, RawDocumentBuf, doc};
use mongodb::error::{Error, ErrorKind};
use mongodb::options::{ClientOptions, Hint, ReadConcern};
use mongodb::{Client, Collection};
use tokio::task::yield_now;

use super::command::{ATTEMPT, Runner, brief, shut_down};
use super::document::Edited;
use super::index::IN_USE;
use super::{Location, MongoStore, Unusable, document};
use crate::lease::{Key, Snapshot};
use crate::store::failure::Failure;
use crate::store::{ForKey, ListQuery, Page, StoreError, report};

/// Callers that look at a key at once; more wait for their turn, in the order in which they came.
const GETS: usize = 16;
/// Callers that list keys at once. A few keep one core of the database busy.
const LISTS: usize = 8;
/// A page of a listing ends past this many bytes.
const PAGE_BYTES: usize = 4 * 1024 * 1024;
/// Records of a page that are read in one go, before others get their turn.
const STEP: usize = 32;
/// The server's codes for a hint that names no index: `BadValue`, which has other meanings as well, and
/// `NoQueryExecutionPlans`.
const BAD_VALUE: i32 = 2;
const NO_QUERY_EXECUTION_PLANS: i32 = 291;

/// How callers look at keys: over connections of their own and so many at once, so that commits wait for none of them, and
/// those who look at one key do not wait for those who list many.
#[derive(Debug, Clone)]
pub(super) struct Inspection {
    pub(super) collection: Collection<RawDocumentBuf>,
    gets: Runner,
    lists: Runner,
}

impl Inspection {
    /// `options` are those of the connections for commits.
    pub(super) fn new(mut options: ClientOptions, location: &Location) -> Result<Self, Unusable> {
        options.max_pool_size = Some(u32::try_from(GETS + LISTS).unwrap_or(u32::MAX));
        // The URI's may be more than that.
        options.min_pool_size = None;
        let client = Client::with_options(options).map_err(|error| Unusable::Uri(brief(&error)))?;
        Ok(Self {
            collection: client.database(&location.database).collection(&location.collection),
            gets: Runner::with_room_for(GETS),
            lists: Runner::with_room_for(LISTS),
        })
    }

    /// Lets nobody look any more, and ends the connections.
    pub(super) async fn end(&self) {
        shut_down(self.collection.client(), &[&self.gets, &self.lists]).await;
    }

    /// Takes all turns of those who list, until what is returned is dropped.
    #[cfg(test)]
    pub(super) async fn occupy_lists(&self) -> impl Sized {
        self.lists.occupy().await
    }
}

impl MongoStore {
    /// The key's record, for a caller who looks at it.
    pub(super) async fn find_one(&self, key: &Key) -> Result<Option<Snapshot>, StoreError> {
        let Inspection { collection, gets, .. } = &self.inspection;
        let read = Read { projection: Some(document::projection(&self.clock)), ..Read::of(1) };
        let found = found(collection, gets, by_name(&[key.as_str()]), read).await?;
        read_each(&found.documents).into_iter().next().transpose()
    }

    /// The records of those of the keys that have one, in any order.
    pub(super) async fn find(&self, names: &[&str]) -> Result<Vec<ForKey>, Failure> {
        let read = Read { projection: Some(document::projection(&self.clock)), ..Read::of(names.len()) };
        let found = found(&self.collection, &self.runner, by_name(names), read).await?;
        Ok(read_each(&found.documents))
    }

    /// Records that have just been edited: as they were right after, or after a later edit.
    pub(super) async fn find_edited(
        &self,
        names: &[&str],
    ) -> Result<HashMap<Key, Result<Edited, StoreError>>, Failure> {
        let found = found(&self.collection, &self.runner, by_name(names), Read::of(names.len())).await?;
        let edited = |document: &RawDocumentBuf| match document::edited(document) {
            Ok(edited) => Some((edited.snapshot.record.key.clone(), Ok(edited))),
            Err(foreign) => {
                let unreadable = foreign.into_unreadable()?;
                Some((Key::try_from(document.get_str("_id").ok()?).ok()?, Err(unreadable)))
            }
        };
        Ok(found.documents.iter().filter_map(edited).collect())
    }

    /// One page of records in the order of their keys. Those that cannot be read are reported and left out.
    pub(super) async fn page(&self, query: &ListQuery) -> Result<Page, Failure> {
        let mut after = query.after.as_ref().map(|key| key.as_str().to_owned());
        loop {
            let found = self.found_for_page(query, after.as_deref()).await?;
            let more = found.cut || found.documents.len() > query.limit;
            let shown = &found.documents[..found.documents.len().min(query.limit)];
            let mut snapshots = Vec::with_capacity(shown.len());
            for step in shown.chunks(STEP) {
                let answers = read_each(step).into_iter();
                snapshots.extend(answers.filter_map(|answer| answer.inspect_err(report).ok()));
                yield_now().await;
            }
            if !more || !snapshots.is_empty() {
                return Ok(Page { snapshots, more });
            }
            // Nothing here can be read, so the caller would have no key that the next page could begin after. The name of
            // the last document need not be a key: somebody else may have written it.
            let last = shown.last().and_then(|last| last.get_str("_id").ok());
            after = Some(last.ok_or_else(|| Failure::unknown("a document has no name"))?.to_owned());
        }
    }

    /// The documents after `after` for one page. Goes by the index if it is there, and else has it made.
    async fn found_for_page(&self, query: &ListQuery, after: Option<&str>) -> Result<Found, Failure> {
        if !query.include_free {
            if self.index.is_there() {
                let found = self.find_page(query, after, true).await?;
                if !found.lacks_index {
                    return Ok(found);
                }
                tracing::debug!("somebody dropped the index {IN_USE}: listing without it");
                self.index.lose();
            }
            // First: without the index, reading may take longer than it may.
            self.restore_index();
        }
        self.find_page(query, after, false).await
    }

    async fn find_page(
        &self,
        query: &ListQuery,
        after: Option<&str>,
        by_index: bool,
    ) -> Result<Found, Failure> {
        let Inspection { collection, lists, .. } = &self.inspection;
        let read = Read {
            projection: Some(document::projection(&self.clock)),
            page: Some(PAGE_BYTES),
            hint: by_index.then(|| Hint::Name(IN_USE.to_owned())),
            ..Read::of(query.limit + 1)
        };
        found(collection, lists, self.of_page(query, after, by_index), read).await
    }

    /// Which records a listing shows.
    fn of_page(&self, query: &ListQuery, after: Option<&str>, by_index: bool) -> Document {
        let mut range = doc! { "$gte": &query.prefix };
        if let Some(end) = after_prefix(&query.prefix) {
            range.insert("$lt", end);
        }
        if let Some(after) = after {
            range.insert("$gt", after);
        }
        let mut filter = doc! { "_id": range };
        if by_index {
            filter.insert(IN_USE, true);
        }
        if query.include_free {
            // A key that was never granted is one of which only a settled id is remembered.
            filter.insert("token", doc! { "$gt": 0_i64 });
        } else {
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
        filter
    }
}

/// Documents as a majority has them: what is shown here is never rolled back.
async fn found(
    collection: &Collection<RawDocumentBuf>,
    runner: &Runner,
    filter: Document,
    read: Read,
) -> Result<Found, Failure> {
    let collection = collection.clone();
    let Read { projection, limit, page, hint } = read;
    // Large records come in several rounds, so that few are read in vain.
    let round = if page.is_some() { limit.min(100) } else { limit };
    let find = async move {
        let is_hinted = hint.is_some();
        let cursor = collection
            .find(filter)
            .optional(projection, |find, projection| find.projection(projection))
            .optional(page, |find, _| find.sort(doc! { "_id": 1 }))
            .optional(hint, |find, hint| find.hint(hint))
            .limit(i64::try_from(limit).unwrap_or(i64::MAX))
            .batch_size(u32::try_from(round).unwrap_or(u32::MAX).saturating_add(1))
            .max_time(ATTEMPT)
            .read_concern(ReadConcern::majority())
            .await;
        let mut cursor = match cursor {
            Err(error) if is_hinted && names_no_index(&error) => {
                return Ok(Found { lacks_index: true, ..Found::default() });
            }
            cursor => cursor?,
        };
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
    };
    runner.run(find).await
}

/// What to read of the documents found.
struct Read {
    /// Else the whole documents.
    projection: Option<Document>,
    /// At most so many.
    limit: usize,
    /// In the order of the keys, and no more once past so many bytes.
    page: Option<usize>,
    /// By this index.
    hint: Option<Hint>,
}

impl Read {
    fn of(limit: usize) -> Self {
        Self { projection: None, limit, page: None, hint: None }
    }
}

#[derive(Default)]
struct Found {
    documents: Vec<RawDocumentBuf>,
    /// There may be more, past the bytes.
    cut: bool,
    /// Nothing was looked for: the index to go by is not there.
    lacks_index: bool,
}

/// Whether the server says that the hint of a query names no index. Any other failure says nothing of the index.
fn names_no_index(error: &Error) -> bool {
    match error.kind.as_ref() {
        ErrorKind::Command(command) => match command.code {
            // The message repeats the query, and so what the caller asked for.
            BAD_VALUE => command.message.contains("hint provided does not correspond to an existing index"),
            code => code == NO_QUERY_EXECUTION_PLANS,
        },
        _ => false,
    }
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

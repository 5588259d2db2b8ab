//! Reads records, by their keys and in pages.

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

/// How many callers may inspect a key at once. Further ones wait in the order of arrival.
const GETS: usize = 16;
/// How many callers may list keys at once. A few of them keep one core of the database busy.
const LISTS: usize = 8;
/// A page of a listing ends once its records have this many bytes.
const PAGE_BYTES: usize = 4 * 1024 * 1024;
/// How many records of a page are decoded before other tasks run.
const CHUNK: usize = 32;
/// The server's codes for a hint that names no index: `BadValue`, which has other meanings as well,
/// and `NoQueryExecutionPlans`.
const BAD_VALUE: i32 = 2;
const NO_QUERY_EXECUTION_PLANS: i32 = 291;

/// Reads for callers that inspect or list keys. They have their own connections, so that commits
/// never wait for them. Inspections and listings have separate limits, so that an inspection never
/// waits for a listing.
#[derive(Debug, Clone)]
pub(super) struct Inspection {
    pub(super) collection: Collection<RawDocumentBuf>,
    gets: Runner,
    lists: Runner,
}

impl Inspection {
    /// `options` are the options of the connections for commits.
    pub(super) fn new(mut options: ClientOptions, location: &Location) -> Result<Self, Unusable> {
        options.max_pool_size = Some(u32::try_from(GETS + LISTS).unwrap_or(u32::MAX));
        // The minimum in the URI may exceed this maximum.
        options.min_pool_size = None;
        let client = Client::with_options(options).map_err(|error| Unusable::Uri(brief(&error)))?;
        Ok(Self {
            collection: client.database(&location.database).collection(&location.collection),
            gets: Runner::with_room_for(GETS),
            lists: Runner::with_room_for(LISTS),
        })
    }

    /// Refuses further reads and closes the connections.
    pub(super) async fn end(&self) {
        shut_down(self.collection.client(), &[&self.gets, &self.lists]).await;
    }

    /// Blocks all listings until the returned guard is dropped.
    #[cfg(test)]
    pub(super) async fn block_lists(&self) -> impl Sized {
        self.lists.occupy().await
    }
}

impl MongoStore {
    /// Reads the record of `key` for a caller that inspects it.
    pub(super) async fn read_one(&self, key: &Key) -> Result<Option<Snapshot>, StoreError> {
        let Inspection { collection, gets, .. } = &self.inspection;
        let options =
            ReadOptions { projection: Some(document::projection(&self.clock)), ..ReadOptions::of(1) };
        let found = fetch(collection, gets, by_name(&[key.as_str()]), options).await?;
        read_each(&found.documents).into_iter().next().transpose()
    }

    /// Reads the records of the keys that have one, in any order.
    pub(super) async fn read_keys(&self, names: &[&str]) -> Result<Vec<ForKey>, Failure> {
        let options = ReadOptions {
            projection: Some(document::projection(&self.clock)),
            ..ReadOptions::of(names.len())
        };
        let found = fetch(&self.collection, &self.runner, by_name(names), options).await?;
        Ok(read_each(&found.documents))
    }

    /// Reads records that have just been edited, as of that edit or a later one.
    pub(super) async fn read_edited(
        &self,
        names: &[&str],
    ) -> Result<HashMap<Key, Result<Edited, StoreError>>, Failure> {
        let found =
            fetch(&self.collection, &self.runner, by_name(names), ReadOptions::of(names.len())).await?;
        let edited = |document: &RawDocumentBuf| match document::edited(document) {
            Ok(edited) => Some((edited.snapshot.record.key.clone(), Ok(edited))),
            Err(invalid) => {
                let unreadable = invalid.into_unreadable()?;
                Some((Key::try_from(document.get_str("_id").ok()?).ok()?, Err(unreadable)))
            }
        };
        Ok(found.documents.iter().filter_map(edited).collect())
    }

    /// Reads a page of records in the order of their keys. Records that cannot be read are logged
    /// and left out.
    pub(super) async fn list_page(&self, query: &ListQuery) -> Result<Page, Failure> {
        let mut after = query.after.as_ref().map(|key| key.as_str().to_owned());
        loop {
            let found = self.fetch_page(query, after.as_deref()).await?;
            let more = found.cut || found.documents.len() > query.limit;
            let shown = &found.documents[..found.documents.len().min(query.limit)];
            let mut snapshots = Vec::with_capacity(shown.len());
            for chunk in shown.chunks(CHUNK) {
                let answers = read_each(chunk).into_iter();
                snapshots.extend(answers.filter_map(|answer| answer.inspect_err(report).ok()));
                yield_now().await;
            }
            if !more || !snapshots.is_empty() {
                return Ok(Page { snapshots, more });
            }
            // No record of this page can be read, so the caller would have no key after which the
            // next page begins. The loop continues after the last document, whose name need not be
            // a key: another program may have written it.
            let last = shown.last().and_then(|last| last.get_str("_id").ok());
            after = Some(last.ok_or_else(|| Failure::unknown("a document has no name"))?.to_owned());
        }
    }

    /// Reads the documents of a page after `after`. Uses the index if it is there, else starts its
    /// build.
    async fn fetch_page(&self, query: &ListQuery, after: Option<&str>) -> Result<Documents, Failure> {
        if !query.include_free {
            if self.index.is_there() {
                let found = self.query_page(query, after, true).await?;
                if !found.lacks_index {
                    return Ok(found);
                }
                tracing::debug!("the index {IN_USE} was dropped: listing without it");
                self.index.note_missing();
            }
            // Starts before the read below, which may run out of time without the index.
            self.restore_index();
        }
        self.query_page(query, after, false).await
    }

    async fn query_page(
        &self,
        query: &ListQuery,
        after: Option<&str>,
        by_index: bool,
    ) -> Result<Documents, Failure> {
        let Inspection { collection, lists, .. } = &self.inspection;
        let options = ReadOptions {
            projection: Some(document::projection(&self.clock)),
            page: Some(PAGE_BYTES),
            hint: by_index.then(|| Hint::Name(IN_USE.to_owned())),
            ..ReadOptions::of(query.limit + 1)
        };
        fetch(collection, lists, self.page_filter(query, after, by_index), options).await
    }

    /// The filter for the records that a listing shows.
    fn page_filter(&self, query: &ListQuery, after: Option<&str>, by_index: bool) -> Document {
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
            // A key that was never granted has a record only to keep ids out. Listings do not show
            // it.
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

/// Reads documents with read concern majority, so that no answer relies on a write that a failover
/// undoes.
async fn fetch(
    collection: &Collection<RawDocumentBuf>,
    runner: &Runner,
    filter: Document,
    options: ReadOptions,
) -> Result<Documents, Failure> {
    let collection = collection.clone();
    let ReadOptions { projection, limit, page, hint } = options;
    // A page is fetched in several round trips. A page of large records ends early, and then few
    // records were fetched in vain.
    let round = if page.is_some() { limit.min(100) } else { limit };
    let find = async move {
        let is_hinted = hint.is_some();
        let cursor = collection
            .find(filter)
            .optional(projection, |find, projection| find.projection(projection))
            .optional(page, |find, _| find.sort(doc! { "_id": 1 }))
            .optional(hint, |find, hint| find.hint(hint))
            .limit(i64::try_from(limit).unwrap_or(i64::MAX))
            // One more than the limit, so that the server closes the cursor with its first reply.
            .batch_size(u32::try_from(round).unwrap_or(u32::MAX).saturating_add(1))
            .max_time(ATTEMPT)
            .read_concern(ReadConcern::majority())
            .await;
        let mut cursor = match cursor {
            Err(error) if is_hinted && names_no_index(&error) => {
                return Ok(Documents { lacks_index: true, ..Documents::default() });
            }
            cursor => cursor?,
        };
        let mut found = Documents::default();
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

/// What to read of the documents that match a filter.
struct ReadOptions {
    /// `None`: whole documents.
    projection: Option<Document>,
    /// The maximum number of documents.
    limit: usize,
    /// Reads in the order of the keys and stops once the documents have this many bytes.
    page: Option<usize>,
    /// The index to use.
    hint: Option<Hint>,
}

impl ReadOptions {
    fn of(limit: usize) -> Self {
        Self { projection: None, limit, page: None, hint: None }
    }
}

#[derive(Default)]
struct Documents {
    documents: Vec<RawDocumentBuf>,
    /// Whether the read stopped at the limit on bytes, so that there may be more documents.
    cut: bool,
    /// Whether the index to use is missing, so that nothing was read.
    lacks_index: bool,
}

/// Whether a query failed because its hint names no index.
fn names_no_index(error: &Error) -> bool {
    match error.kind.as_ref() {
        ErrorKind::Command(command) => match command.code {
            // The code has other meanings, so the message decides. The message repeats the caller's
            // query, so a short text would not do.
            BAD_VALUE => command.message.contains("hint provided does not correspond to an existing index"),
            code => code == NO_QUERY_EXECUTION_PLANS,
        },
        _ => false,
    }
}

fn read_each(documents: &[RawDocumentBuf]) -> Vec<ForKey> {
    let read = |document: &RawDocumentBuf| match document::snapshot(document) {
        Ok(snapshot) => Some(Ok(snapshot)),
        Err(invalid) => invalid.into_unreadable().map(Err),
    };
    documents.iter().filter_map(read).collect()
}

fn by_name(names: &[&str]) -> Document {
    doc! { "_id": { "$in": names } }
}

/// Returns the least string that is greater than every string with this prefix. `None` if there is
/// none.
fn after_prefix(prefix: &str) -> Option<String> {
    let mut characters: Vec<char> = prefix.chars().collect();
    while let Some(last) = characters.pop() {
        // The order of code points is the order of UTF-8 bytes.
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

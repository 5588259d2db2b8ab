//! Purges keys that have been free for long. It walks all keys in pages of 1,000, so that no
//! command exceeds its time limit, however many keys there are.

use std::time::Duration;

use futures_util::TryStreamExt;
use mongodb::bson::{Bson, Document, RawDocumentBuf, doc};
use mongodb::options::ReadConcern;

use super::MongoStore;
use super::command::ATTEMPT;
use crate::lease::{NEVER_GRANTED, millis};
use crate::store::failure::Failure;

/// The number of keys in a page.
const PAGE: u64 = 1000;

/// Divides all keys into pages, in ascending order.
#[derive(Debug)]
pub(super) struct Pages {
    /// The next page begins after this key. `None` after the last page.
    after: Option<String>,
}

impl Default for Pages {
    fn default() -> Self {
        // The empty string is less than every key. A document whose `_id` is no string is on no
        // page.
        Self { after: Some(String::new()) }
    }
}

impl Pages {
    /// Returns the next page as a condition on `_id`.
    pub(super) async fn next(&mut self, store: &MongoStore) -> Result<Option<Document>, Failure> {
        let Some(after) = self.after.take() else { return Ok(None) };
        self.after = store.end_of_page(&after).await?;
        let mut range = doc! { "$gt": after };
        range.extend(self.after.as_ref().map(|last| ("$lte".to_owned(), last.into())));
        Ok(Some(range))
    }
}

impl MongoStore {
    /// Deletes the records of keys that have been free for `unused_for`, and returns how many.
    pub(super) async fn purge_keys(&self, unused_for: Duration) -> Result<u64, Failure> {
        self.make_index().await;
        let (mut purged, mut pages) = (0, Pages::default());
        while let Some(range) = pages.next(self).await? {
            let which = self.purgeable(range.clone(), unused_for);
            let delete = doc! { "delete": self.collection.name(), "deletes": [{ "q": which, "limit": 0 }] };
            purged += self.feed.background.write(&self.database, delete, &self.concern).await?.matched;
            self.unmark_unused(range).await?;
        }
        Ok(purged)
    }

    /// Returns the last key of the page after `after`. `None` if fewer keys than a page are left.
    async fn end_of_page(&self, after: &str) -> Result<Option<String>, Failure> {
        let (collection, beyond) = (self.collection.clone(), doc! { "_id": { "$gt": after } });
        // MongoDB answers this from the index on `_id` alone, without reading documents.
        let find = async move {
            let cursor = collection
                .find(beyond)
                .projection(doc! { "_id": 1 })
                .sort(doc! { "_id": 1 })
                .skip(PAGE - 1)
                .limit(1)
                .max_time(ATTEMPT)
                .read_concern(ReadConcern::majority())
                .await?;
            cursor.try_collect::<Vec<RawDocumentBuf>>().await
        };
        let found = self.feed.background.run(find).await?;
        let name =
            |found: &RawDocumentBuf| found.get_str("_id").map(ToOwned::to_owned).map_err(Failure::unknown);
        found.first().map(name).transpose()
    }

    /// The filter that matches the records for which
    /// [`Record::is_purgeable`](crate::lease::Record::is_purgeable) is true. A damaged record
    /// does not match, so it stays.
    pub(super) fn purgeable(&self, range: Document, unused_for: Duration) -> Document {
        // Fields are compared and never used in arithmetic: on a field of another type that would
        // fail the whole purge.
        let ago = |duration| doc! { "$subtract": [self.clock.clone(), millis(duration)] };
        let before = |instant: Bson, duration| doc! { "$lt": [instant, ago(duration)] };
        let never_granted = doc! { "$lte": [{ "$ifNull": ["$token", 0_i64] }, 0_i64] };
        let last = Bson::from(doc! { "$max": [
            "$blocked_until",
            { "$max": "$departures.at" },
            { "$max": "$waiters.expires_at" },
        ] });
        // A token is at least the time of its grant. Before the clock has passed the latest token,
        // a new record could be granted the same token again.
        let granted_at = doc! { "$convert": {
            "input": { "$ifNull": ["$token", 0_i64] }, "to": "date", "onError": self.clock.clone(),
        } };
        let is_blocked_until = doc! { "$in": [{ "$type": "$blocked_until" }, ["missing", "null", "date"]] };
        let all = doc! { "$and": [
            all_with_dates("holders", "expires_at"),
            all_with_dates("waiters", "expires_at"),
            all_with_dates("departures", "at"),
            is_blocked_until,
            { "$cond": [
                never_granted,
                before(last.clone(), unused_for.min(NEVER_GRANTED)),
                before(last, unused_for),
            ] },
            before(doc! { "$max": "$holders.expires_at" }.into(), unused_for.saturating_add(self.rules.grace)),
            before(granted_at.into(), unused_for),
        ] };
        doc! { "_id": range, "$expr": all }
    }
}

/// An expression that is true if the list is absent, or is an array in which every entry has a date
/// in the field `instant`.
fn all_with_dates(list: &str, instant: &str) -> Document {
    let list = doc! { "$ifNull": [format!("${list}"), []] };
    let has_date = doc! { "$eq": [{ "$type": format!("$$this.{instant}") }, "date"] };
    let have_dates = doc! { "$allElementsTrue": [{ "$map": { "input": list.clone(), "in": has_date } }] };
    doc! { "$cond": [{ "$isArray": [list] }, have_dates, false] }
}

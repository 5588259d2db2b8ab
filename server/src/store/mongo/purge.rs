//! Forgetting what nobody needs, page after page: in the order of the keys and so many at a time, so that no command takes
//! longer than it may however many keys there are.

use std::time::Duration;

use futures_util::TryStreamExt;
use mongodb::bson::{Bson, Document, RawDocumentBuf, doc};
use mongodb::options::ReadConcern;

use super::MongoStore;
use super::command::ATTEMPT;
use crate::lease::{NEVER_GRANTED, millis};
use crate::store::failure::Failure;

/// Keys in one page.
const PAGE: u64 = 1000;

/// All keys in their order, so many at a time.
#[derive(Debug)]
pub(super) struct Pages {
    /// Where the next page begins; `None` after the last.
    after: Option<String>,
}

impl Default for Pages {
    fn default() -> Self {
        // Less than every key. Whatever is no string, and so no key, is on no page.
        Self { after: Some(String::new()) }
    }
}

impl Pages {
    /// The next page, as a range of `_id`.
    pub(super) async fn next(&mut self, store: &MongoStore) -> Result<Option<Document>, Failure> {
        let Some(after) = self.after.take() else { return Ok(None) };
        self.after = store.end_of_page(&after).await?;
        let mut range = doc! { "$gt": after };
        range.extend(self.after.as_ref().map(|last| ("$lte".to_owned(), last.into())));
        Ok(Some(range))
    }
}

impl MongoStore {
    /// Forgets what has been of no use for `unused_for`, and returns how many.
    pub(super) async fn forget(&self, unused_for: Duration) -> Result<u64, Failure> {
        self.make_index().await;
        let (mut purged, mut pages) = (0, Pages::default());
        while let Some(range) = pages.next(self).await? {
            let which = self.forgettable(range.clone(), unused_for);
            let delete = doc! { "delete": self.collection.name(), "deletes": [{ "q": which, "limit": 0 }] };
            purged += self.feed.errands.write(&self.database, delete, &self.concern).await?;
            self.unmark_unused(range).await?;
        }
        Ok(purged)
    }

    /// The last key of a full page; `None` if fewer are left.
    async fn end_of_page(&self, after: &str) -> Result<Option<String>, Failure> {
        let (collection, beyond) = (self.collection.clone(), doc! { "_id": { "$gt": after } });
        // The index of `_id` alone answers this.
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
        let found = self.feed.errands.run(find).await?;
        let name =
            |found: &RawDocumentBuf| found.get_str("_id").map(ToOwned::to_owned).map_err(Failure::unknown);
        found.first().map(name).transpose()
    }

    /// What [`Record::is_forgettable`](crate::lease::Record::is_forgettable) says, as a filter. The instants are compared
    /// and not added to, so that one record with fields of another kind does not stop the purge; and such a record stays.
    pub(super) fn forgettable(&self, range: Document, unused_for: Duration) -> Document {
        let ago = |duration| doc! { "$subtract": [self.clock.clone(), millis(duration)] };
        let before = |instant: Bson, duration| doc! { "$lt": [instant, ago(duration)] };
        let never_granted = doc! { "$lte": [{ "$ifNull": ["$token", 0_i64] }, 0_i64] };
        let last = Bson::from(doc! { "$max": [
            "$blocked_until",
            { "$max": "$departures.at" },
            { "$max": "$waiters.expires_at" },
        ] });
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

/// Whether this is a list, or absent, in which no entry is without the instant that it should have.
fn all_with_dates(list: &str, instant: &str) -> Document {
    let list = doc! { "$ifNull": [format!("${list}"), []] };
    let has_date = doc! { "$eq": [{ "$type": format!("$$this.{instant}") }, "date"] };
    let have_dates = doc! { "$allElementsTrue": [{ "$map": { "input": list.clone(), "in": has_date } }] };
    doc! { "$cond": [{ "$isArray": [list] }, have_dates, false] }
}

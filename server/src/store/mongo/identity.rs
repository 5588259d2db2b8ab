//! The identity of the store: a UUID that is made once. It is kept in the collection of the
//! daemons.
//!
//! ```text
//! { _id: "store", store_id: uuid text, created_at: date }
//! ```

use mongodb::bson::{Document, doc};
use mongodb::options::{ReadConcern, ReadPreference, SelectionCriteria};
use uuid::Uuid;

use super::command::ATTEMPT;
use super::{MongoStore, daemons};
use crate::store::failure::Failure;

/// The `_id` of the document. The ids of daemons are UUIDs, so they cannot collide with it.
pub(super) const DOCUMENT: &str = "store";

/// Returns the identity, and creates it if there is none. If several daemons create one at the same
/// time, the first write wins.
pub(super) async fn settle(store: &MongoStore) -> Result<Uuid, Failure> {
    keep(store, Uuid::new_v4()).await?;
    let collection =
        store.database.collection::<Document>(&daemons::collection_name(store.collection.name()));
    // Read back, because another daemon may have written first.
    let find = async move {
        collection
            .find_one(doc! { "_id": DOCUMENT })
            .max_time(ATTEMPT)
            .read_concern(ReadConcern::majority())
            .selection_criteria(SelectionCriteria::ReadPreference(ReadPreference::Primary))
            .await
    };
    let found = store.runner.run(find).await?;
    found.as_ref().and_then(read).ok_or_else(|| Failure::unknown("the store's identity is not there yet"))
}

/// Writes `id` as the identity if there is none.
pub(super) async fn keep(store: &MongoStore, id: Uuid) -> Result<(), Failure> {
    let set = doc! {
        "store_id": { "$ifNull": ["$store_id", id.to_string()] },
        "created_at": { "$ifNull": ["$created_at", "$$NOW"] },
    };
    let statement = doc! { "q": { "_id": DOCUMENT }, "u": [{ "$set": set }], "upsert": true };
    let update = doc! { "update": daemons::collection_name(store.collection.name()), "updates": [statement] };
    store.runner.write(&store.database, update, &store.concern).await?;
    Ok(())
}

/// Reads the identity from its document.
pub(super) fn read(document: &Document) -> Option<Uuid> {
    document.get_str("store_id").ok()?.parse().ok()
}

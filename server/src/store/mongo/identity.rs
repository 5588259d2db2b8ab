//! The identity of the records: a UUID that is made once, in the collection of the daemons, which is beside them.
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

/// The id of the document; those of daemons are UUIDs.
pub(super) const DOCUMENT: &str = "store";

/// The identity, which is made if there is none. Of several daemons that make one at the same time the first to write wins.
pub(super) async fn settle(store: &MongoStore) -> Result<Uuid, Failure> {
    keep(store, Uuid::new_v4()).await?;
    let collection =
        store.database.collection::<Document>(&daemons::collection_name(store.collection.name()));
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

/// Writes the identity down if there is none.
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

/// The identity in its document.
pub(super) fn read(document: &Document) -> Option<Uuid> {
    document.get_str("store_id").ok()?.parse().ok()
}

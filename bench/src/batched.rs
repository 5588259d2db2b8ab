//! What MongoDB alone allows of any service that writes a record for each change and puts the changes of many keys into one
//! command: the cheapest such write there is, `$inc` of one field of many documents, and a read of them, from this program
//! and without calls or rules. Two commands are in flight at once, as leased has them.

use anyhow::{Result, ensure};
use futures_util::TryStreamExt;
use mongodb::bson::{Document, RawDocumentBuf, doc};
use mongodb::options::{ClientOptions, ReadConcern, WriteConcern};
use mongodb::{Client, Collection};

use crate::closed;
use crate::peer::Turn;
use crate::sample::Sample;
use crate::trial::Trial;
use crate::workload::Workload;

/// Commands in flight.
const AT_ONCE: usize = 2;
/// Bytes of a record beside its key and what is changed: about those of a lease.
const RECORD_BYTES: usize = 300;

pub(crate) async fn run(trial: &Trial<'_>) -> Result<Sample> {
    let mut options = ClientOptions::parse(trial.stage.address()?).await?;
    options.retry_writes = Some(false);
    options.write_concern = Some(WriteConcern::majority());
    let database = Client::with_options(options)?.database("leased-bench");
    let records: Collection<RawDocumentBuf> = database.collection("batched");
    let prefix = Trial::prefix();
    let keys: Vec<String> = (0..trial.scale).map(|number| format!("{prefix}/{number:06}")).collect();
    let blank = |key: &String| doc! { "_id": key, "rev": 0_i64, "record": "x".repeat(RECORD_BYTES) };
    database.collection::<Document>(records.name()).insert_many(keys.iter().map(blank)).await?;
    // A pair is two changes.
    let (changes, rate) = match trial.workload {
        Workload::Pairs => (2, "pairs/s"),
        _ => (1, "acks/s"),
    };
    let a_batch = keys.len().div_ceil(AT_ONCE);
    let batches =
        keys.chunks(a_batch).map(|keys| Batch { records: records.clone(), keys: keys.to_vec(), changes });
    closed::run(batches.collect(), trial.time, &trial.stage.processes(), rate).await
}

struct Batch {
    records: Collection<RawDocumentBuf>,
    keys: Vec<String>,
    /// Of each record in a turn.
    changes: usize,
}

impl Turn for Batch {
    async fn turn(&mut self) -> Result<u64> {
        let ours = doc! { "_id": { "$in": &self.keys } };
        for _ in 0..self.changes {
            let changed = self.records.update_many(ours.clone(), doc! { "$inc": { "rev": 1_i64 } }).await?;
            ensure!(changed.matched_count == self.keys.len() as u64, "records are missing");
            let size = u32::try_from(self.keys.len())? + 1;
            let read = self.records.find(ours.clone()).batch_size(size).read_concern(ReadConcern::majority());
            let found: Vec<_> = read.await?.try_collect().await?;
            ensure!(found.len() == self.keys.len(), "records are missing");
        }
        Ok(self.keys.len() as u64)
    }
}

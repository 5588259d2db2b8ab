//! The highest rate that MongoDB allows to a service that writes a record for each change, and
//! writes the records of many keys with one command.
//!
//! Each command is the cheapest write of this kind, `$inc` of one field of many documents, followed
//! by a read of these documents. This program sends the commands itself, without calls or lease
//! rules. Two commands are in flight at once, as in leased.

use anyhow::{Result, ensure};
use futures_util::TryStreamExt;
use mongodb::bson::{Document, RawDocumentBuf, doc};
use mongodb::options::{ClientOptions, ReadConcern, WriteConcern};
use mongodb::{Client, Collection};

use crate::closed_loop;
use crate::connection::Turn;
use crate::sample::Sample;
use crate::trial::Trial;
use crate::workload::Workload;

/// The number of commands in flight.
const IN_FLIGHT: usize = 2;
/// The size of a record in bytes, without its key and the field that changes. A lease's record has
/// about the same size.
const RECORD_BYTES: usize = 300;

pub(crate) async fn run(trial: &Trial<'_>) -> Result<Sample> {
    let mut options = ClientOptions::parse(trial.deployment.address()?).await?;
    options.retry_writes = Some(false);
    options.write_concern = Some(WriteConcern::majority());
    let database = Client::with_options(options)?.database("leased-bench");
    let records: Collection<RawDocumentBuf> = database.collection("batched");
    let prefix = Trial::prefix();
    let keys: Vec<String> = (0..trial.scale).map(|number| format!("{prefix}/{number:06}")).collect();
    let blank = |key: &String| doc! { "_id": key, "rev": 0_i64, "record": "x".repeat(RECORD_BYTES) };
    database.collection::<Document>(records.name()).insert_many(keys.iter().map(blank)).await?;
    // An acquire and a release are one change each.
    let (changes, rate) = match trial.workload {
        Workload::Pairs => (2, "pairs/s"),
        _ => (1, "acks/s"),
    };
    let batch_size = keys.len().div_ceil(IN_FLIGHT);
    let batches =
        keys.chunks(batch_size).map(|keys| Batch { records: records.clone(), keys: keys.to_vec(), changes });
    closed_loop::run(batches.collect(), trial.time, &trial.deployment.processes(), rate).await
}

struct Batch {
    records: Collection<RawDocumentBuf>,
    keys: Vec<String>,
    /// How often a turn changes each record.
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

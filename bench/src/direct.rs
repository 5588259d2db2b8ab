//! The same pairs with one conditional `findOneAndUpdate` for each call, as a lock library would do them.

use std::time::Duration;

use anyhow::{Result, ensure};
use mongodb::bson::{Bson, DateTime, Document, doc};
use mongodb::options::{ClientOptions, ReturnDocument, WriteConcern};
use mongodb::{Client, Collection};
use tokio::task::JoinSet;
use tokio::time::Instant;
use uuid::Uuid;

use crate::pairs::Round;
use crate::report::Pairs;

const TTL: Duration = Duration::from_secs(30);

/// Runs every caller until the time is over.
pub(crate) async fn run(uri: &str, round: Round) -> Result<Pairs> {
    let mut options = ClientOptions::parse(uri).await?;
    options.max_pool_size = Some(64);
    options.max_connecting = Some(8);
    options.retry_writes = Some(false);
    options.write_concern = Some(WriteConcern::majority());
    let locks: Collection<Document> =
        Client::with_options(options)?.database("leased-bench").collection("locks");
    let start = Instant::now();
    let mut callers = JoinSet::new();
    for number in 0..round.callers {
        let locks = locks.clone();
        callers.spawn(async move {
            let mut pairs = Pairs::new();
            while start.elapsed() < round.time {
                let begun = Instant::now();
                lock_and_unlock(&locks, &format!("bench/{number}")).await?;
                pairs.add(begun.elapsed());
            }
            Ok(pairs)
        });
    }
    Pairs::join(callers, start).await
}

async fn lock_and_unlock(locks: &Collection<Document>, key: &str) -> Result<()> {
    #[expect(clippy::disallowed_methods, reason = "a lock library without a daemon has no other clock")]
    let now = DateTime::now();
    let until = DateTime::from_millis(now.timestamp_millis() + i64::try_from(TTL.as_millis())?);
    let owner = Uuid::new_v4().to_string();
    let free = doc! { "_id": key, "$or": [{ "owner": Bson::Null }, { "expires_at": { "$lt": now } }] };
    let lock = doc! { "$set": { "owner": &owner, "expires_at": until }, "$inc": { "token": 1_i64 } };
    let locked =
        locks.find_one_and_update(free, lock).upsert(true).return_document(ReturnDocument::After).await?;
    ensure!(locked.is_some(), "the lock was not granted");
    let unlock = doc! { "$set": { "owner": Bson::Null } };
    let unlocked = locks.find_one_and_update(doc! { "_id": key, "owner": owner }, unlock).await?;
    ensure!(unlocked.is_some(), "the lock was lost");
    Ok(())
}

//! MongoDB as a contender, used as a lock library does: one conditional `findOneAndUpdate` for each
//! call, sent by the driver in this program.

use std::time::Duration;

use anyhow::{Result, ensure};
use mongodb::bson::{Bson, DateTime, Document, doc};
use mongodb::options::{ClientOptions, ReturnDocument, WriteConcern};
use mongodb::{Client, Collection};
use uuid::Uuid;

use crate::clock;
use crate::connection::{Connection, Turn};

#[derive(Debug, Clone)]
pub(crate) struct Direct(Collection<Document>);

/// The key and its owner.
pub(crate) type Held = (String, String);

impl Connection for Direct {
    type Held = Held;
    type Stream = Touches;

    async fn connect(address: &str) -> Result<Self> {
        let mut options = ClientOptions::parse(address).await?;
        options.max_pool_size = Some(16);
        options.max_connecting = Some(4);
        options.retry_writes = Some(false);
        options.write_concern = Some(WriteConcern::majority());
        Ok(Self(Client::with_options(options)?.database("leased-bench").collection("locks")))
    }

    async fn acquire(&mut self, key: String, ttl: Duration) -> Result<Held> {
        let owner = Uuid::from_u128(fastrand::u128(..)).to_string();
        let free = doc! { "_id": &key, "$or": [{ "owner": Bson::Null }, { "expires_at": { "$lt": after(Duration::ZERO)? } }] };
        let lock =
            doc! { "$set": { "owner": &owner, "expires_at": after(ttl)? }, "$inc": { "token": 1_i64 } };
        let locked =
            self.0.find_one_and_update(free, lock).upsert(true).return_document(ReturnDocument::After);
        ensure!(locked.await?.is_some(), "the lock was not granted");
        Ok((key, owner))
    }

    async fn release(&mut self, (key, owner): Held) -> Result<()> {
        let unlock = doc! { "$set": { "owner": Bson::Null } };
        let unlocked = self.0.find_one_and_update(doc! { "_id": key, "owner": owner }, unlock).await?;
        ensure!(unlocked.is_some(), "the lock was lost");
        Ok(())
    }

    async fn keep(&mut self, held: Vec<Held>, ttl: Duration) -> Result<Touches> {
        let mut touches = Touches { locks: self.0.clone(), held, ttl };
        touches.turn().await?;
        Ok(touches)
    }
}

/// Returns the instant that is `time` from now by this host's clock, which lock libraries like
/// mongolock use.
fn after(time: Duration) -> Result<DateTime> {
    Ok(DateTime::from_millis(i64::try_from((clock::now() + time).as_millis())?))
}

/// The locks of one caller, which are touched one after the other.
#[derive(Debug)]
pub(crate) struct Touches {
    locks: Collection<Document>,
    held: Vec<Held>,
    ttl: Duration,
}

impl Turn for Touches {
    async fn turn(&mut self) -> Result<u64> {
        let mut kept = 0;
        for (key, owner) in &self.held {
            let touch = doc! { "$set": { "expires_at": after(self.ttl)? } };
            let touched = self.locks.find_one_and_update(doc! { "_id": key, "owner": owner }, touch).await?;
            kept += u64::from(touched.is_some());
        }
        Ok(kept)
    }
}

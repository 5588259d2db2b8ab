//! What must hold before the first lease is granted: the connection's settings and the start-up checks.

use std::time::Duration;

use futures_util::TryStreamExt;
use mongodb::bson::{Bson, Document, doc};
use mongodb::error::{Error, ErrorKind};
use mongodb::options::{Acknowledgment, ClientOptions, WriteConcern};

use super::command::brief;
use super::{ConnectError, MongoStore, daemons, feed};
use crate::store::failure::Failure;

/// The wire version of MongoDB 6.0, the oldest that is tested.
const MIN_WIRE_VERSION: i32 = 17;
/// The server's codes for a missing namespace, one that exists already, and a lack of rights.
const NAMESPACE_NOT_FOUND: i32 = 26;
const NAMESPACE_EXISTS: i32 = 48;
const UNAUTHORIZED: i32 = 13;

/// A database on which leases would not be safe, or could not be kept. Each message says what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unusable {
    /// The connection string cannot be read.
    #[error("the MongoDB URI cannot be used: {0}")]
    Uri(String),
    /// No replica set, so no majority and no failover.
    #[error(
        "this MongoDB is a standalone server, and leases need a replica set; one node will do: restart mongod with \
         --replSet rs0 and run rs.initiate() once in mongosh"
    )]
    Standalone,
    /// Too old.
    #[error("this MongoDB is older than 6.0; upgrade it")]
    TooOld,
    /// Writes that a failover may undo.
    #[error(
        "the MongoDB URI asks for {0}, and a lease granted so could be lost in a failover; use w=majority or leave it out"
    )]
    WeakWrites(String),
    /// The user may not do what a daemon must.
    #[error(
        "the MongoDB user lacks a right that the daemon needs (find, insert, update, remove, listIndexes and \
         listCollections on its database, and changeStream on its collection): {0}"
    )]
    Rights(String),
    /// MongoDB would delete records by itself.
    #[error(
        "the collection has a TTL index, {0:?}, which deletes records of leases that are held; drop that index"
    )]
    TtlIndex(String),
    /// Keys that differ could be taken for the same.
    #[error("the collection has a collation, under which different keys may count as equal; use one without")]
    Collation,
}

/// Reads the URI; what it leaves open is set to notice a lost primary within seconds.
pub(super) async fn client_options(uri: &str) -> Result<ClientOptions, ConnectError> {
    let mut options = ClientOptions::parse(uri).await.map_err(|error| match error.kind.as_ref() {
        ErrorKind::DnsResolve { .. } => ConnectError::Unreachable(brief(&error)),
        _ => Unusable::Uri(brief(&error)).into(),
    })?;
    options.app_name.get_or_insert_with(|| "leased".to_owned());
    options.max_pool_size.get_or_insert(64);
    options.max_connecting.get_or_insert(8);
    options.connect_timeout.get_or_insert(Duration::from_secs(2));
    // Shorter than an attempt at a command: a primary that cannot be found is then known not to have done anything.
    options.server_selection_timeout.get_or_insert(Duration::from_millis(1800));
    options.heartbeat_freq.get_or_insert(Duration::from_secs(1));
    // Edits are idempotent and the daemon repeats them; the server need not keep an image of each for the driver.
    options.retry_writes = Some(false);
    Ok(options)
}

/// Looks at the database and returns the write concern to use: the one asked for if it is no weaker than a majority.
pub(super) async fn database(
    store: &MongoStore,
    asked: Option<WriteConcern>,
) -> Result<WriteConcern, ConnectError> {
    let hello = command(store, doc! { "hello": 1 }).await?;
    let sharded = hello.get_str("msg").is_ok_and(|kind| kind == "isdbgrid");
    if !sharded && !hello.contains_key("setName") {
        return Err(Unusable::Standalone.into());
    }
    if hello.get_i32("maxWireVersion").is_ok_and(|version| version < MIN_WIRE_VERSION) {
        return Err(Unusable::TooOld.into());
    }
    let members = hello.get_array("hosts").map_or(0, Vec::len);
    let concern = write_concern(asked, if sharded { None } else { Some(members) })?;
    collection(store).await?;
    indexes(store).await?;
    rights(store, &concern).await?;
    Ok(concern)
}

/// `members`: electable members of the set, where they are known.
fn write_concern(asked: Option<WriteConcern>, members: Option<usize>) -> Result<WriteConcern, Unusable> {
    let asked = asked.unwrap_or_else(WriteConcern::majority);
    if asked.journal == Some(false) {
        return Err(Unusable::WeakWrites("journal=false".to_owned()));
    }
    let mut concern = match asked.w {
        None | Some(Acknowledgment::Majority) => WriteConcern::majority(),
        Some(Acknowledgment::Nodes(nodes))
            if members.is_some_and(|members| nodes as usize > members / 2 && nodes > 1) =>
        {
            WriteConcern::nodes(nodes)
        }
        Some(Acknowledgment::Nodes(nodes)) => return Err(Unusable::WeakWrites(format!("w={nodes}"))),
        Some(other) => {
            return Err(Unusable::WeakWrites(format!("w={other:?}, which may be less than a majority")));
        }
    };
    concern.journal = Some(true);
    Ok(concern)
}

/// Creates the collection if need be, and refuses one with a collation.
async fn collection(store: &MongoStore) -> Result<(), ConnectError> {
    let create = doc! { "create": store.collection.name() };
    match raw(store, create).await? {
        Ok(_) => return Ok(()),
        Err(error) if code(&error) == Some(NAMESPACE_EXISTS) => {}
        // A user who may not create collections may still use one that somebody created.
        Err(error) if code(&error) == Some(UNAUTHORIZED) => {}
        Err(error) => return Err(failed(&error)),
    }
    let list = doc! { "listCollections": 1, "filter": { "name": store.collection.name() } };
    let found = command(store, list).await?;
    let cursor = found.get_document("cursor").and_then(|cursor| cursor.get_array("firstBatch"));
    let entries = cursor.into_iter().flatten().filter_map(Bson::as_document);
    let collated = |entry: &Document| {
        entry.get_document("options").is_ok_and(|options| options.contains_key("collation"))
    };
    if entries.into_iter().any(collated) {
        return Err(Unusable::Collation.into());
    }
    Ok(())
}

async fn indexes(store: &MongoStore) -> Result<(), ConnectError> {
    let collection = store.collection.clone();
    let list = async move {
        let indexes: Vec<_> = match collection.list_indexes().await {
            Ok(cursor) => cursor.try_collect().await?,
            Err(error) if code(&error) == Some(NAMESPACE_NOT_FOUND) => Vec::new(),
            Err(error) => return Err(error),
        };
        Ok(indexes)
    };
    for index in store.runner.run(list).await? {
        let options = index.options.unwrap_or_default();
        if options.expire_after.is_some() {
            return Err(Unusable::TtlIndex(options.name.unwrap_or_default()).into());
        }
    }
    Ok(())
}

/// Tries each kind of command in a form that changes nothing.
async fn rights(store: &MongoStore, concern: &WriteConcern) -> Result<(), ConnectError> {
    let nothing = doc! { "_id": { "$in": [] } };
    store.find(&[]).await?;
    feed::open(store).await?;
    let daemons = daemons::collection_name(store.collection.name());
    command(store, doc! { "find": &daemons, "filter": nothing, "limit": 1 }).await?;
    may_write(store, store.collection.name(), concern).await?;
    may_write(store, &daemons, concern).await
}

async fn may_write(store: &MongoStore, name: &str, concern: &WriteConcern) -> Result<(), ConnectError> {
    let nothing = doc! { "_id": { "$in": [] } };
    let update = doc! { "update": name, "updates": [{ "q": nothing.clone(), "u": [{ "$set": { "rev": 0 } }], "multi": true }] };
    let delete = doc! { "delete": name, "deletes": [{ "q": nothing, "limit": 0 }] };
    store.runner.write(&store.database, update, concern).await?;
    store.runner.write(&store.database, delete, concern).await?;
    // No insert can succeed with an array for an id; a lack of rights is found before that.
    let insert = doc! { "insert": name, "documents": [{ "_id": [] }] };
    match store.runner.write(&store.database, insert, concern).await {
        Err(Failure::Refused(cause)) => Err(Unusable::Rights(cause).into()),
        _ => Ok(()),
    }
}

/// Runs a command that must succeed.
async fn command(store: &MongoStore, command: Document) -> Result<Document, ConnectError> {
    raw(store, command).await?.map_err(|error| failed(&error))
}

/// Runs a command and gives back the server's own error, if that is what came.
async fn raw(store: &MongoStore, command: Document) -> Result<Result<Document, Error>, ConnectError> {
    let database = store.database.clone();
    let run = async move {
        match database.run_command(command).await {
            Err(error) if code(&error).is_some() => Ok(Err(error)),
            Err(error) => Err(error),
            Ok(reply) => Ok(Ok(reply)),
        }
    };
    Ok(store.runner.run(run).await?)
}

fn code(error: &Error) -> Option<i32> {
    match error.kind.as_ref() {
        ErrorKind::Command(command) => Some(command.code),
        _ => None,
    }
}

fn failed(error: &Error) -> ConnectError {
    Failure::from_driver(error).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(uri_w: Option<Acknowledgment>, journal: Option<bool>) -> Option<WriteConcern> {
        let mut concern = WriteConcern::majority();
        concern.w = uri_w;
        concern.journal = journal;
        Some(concern)
    }

    #[test]
    fn writes_are_never_weaker_than_a_majority() {
        let majority = write_concern(None, Some(1)).expect("the default");
        assert_eq!(majority.w, Some(Acknowledgment::Majority));
        assert_eq!(majority.journal, Some(true));
        assert!(write_concern(asked(Some(Acknowledgment::Nodes(3)), None), Some(3)).is_ok());
        for (weak, members) in [
            (asked(Some(Acknowledgment::Nodes(0)), None), Some(1)),
            (asked(Some(Acknowledgment::Nodes(1)), None), Some(1)),
            (asked(Some(Acknowledgment::Nodes(2)), None), Some(5)),
            (asked(Some(Acknowledgment::Nodes(2)), None), None),
            (asked(Some(Acknowledgment::Majority), Some(false)), Some(1)),
            (asked(Some(Acknowledgment::Custom("near".into())), None), Some(1)),
        ] {
            assert!(write_concern(weak.clone(), members).is_err(), "{weak:?} on {members:?}");
        }
    }
}

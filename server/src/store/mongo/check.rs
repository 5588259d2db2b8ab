//! The checks at start: whether the database and the collection are safe for leases.

use futures_util::TryStreamExt;
use mongodb::bson::{Bson, Document, doc};
use mongodb::error::{Error, ErrorKind};
use mongodb::options::ClientOptions;

use super::command::brief;
use super::{ConnectError, MongoStore, daemons, feed};
use crate::store::failure::Failure;

/// The wire version of MongoDB 6.0, the oldest that is tested.
const MIN_WIRE_VERSION: i32 = 17;
/// The server's codes for a missing namespace, one that exists already, and a lack of rights.
const NAMESPACE_NOT_FOUND: i32 = 26;
const NAMESPACE_EXISTS: i32 = 48;
const UNAUTHORIZED: i32 = 13;
/// The server's codes for an unknown user or password: `UserNotFound`, `AuthenticationFailed` and
/// the code of Atlas.
const NO_LOGIN: [i32; 3] = [11, 18, 8000];
/// The server's codes for a refusal that does not pass with time: `BadValue`, `FailedToParse`,
/// `TypeMismatch`, `IllegalOperation`, `CommandNotFound`, `InvalidOptions`, `InvalidNamespace`,
/// `NoReplicationEnabled`, `UnknownReplWriteConcern`, `CommandNotSupported`,
/// `DocumentValidationFailure`, `NotAReplicaSet`, `ReadConcernMajorityNotEnabled`,
/// `CommandNotSupportedOnView`, `OptionNotSupportedOnView`, `InvalidPipelineOperator`,
/// `NotImplemented`, `NoQueryExecutionPlans`, `DatabaseDifferCase` and an unknown pipeline
/// stage.
const NEVER: [i32; 20] =
    [2, 9, 14, 20, 59, 72, 73, 76, 79, 115, 121, 123, 148, 166, 167, 168, 238, 291, 13297, 40324];
/// Databases that belong to MongoDB itself. `local` is not even replicated.
const ITS_OWN: [&str; 3] = ["admin", "config", "local"];

/// Why leases would not be safe in a database, or could not be kept there. Each message says what
/// to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unusable {
    /// The connection string cannot be read.
    #[error("the MongoDB URI cannot be used: {0}")]
    Uri(String),
    /// The server is no replica set, so there is no majority and no failover.
    #[error(
        "this MongoDB is a standalone server, and leases need a replica set; one node will do: restart mongod with \
         --replSet rs0 and run rs.initiate() once in mongosh"
    )]
    Standalone,
    /// The server is too old.
    #[error("this MongoDB is older than 6.0; upgrade it")]
    TooOld,
    /// The URI connects to one node of several, whether or not that is the primary.
    #[error(
        "the MongoDB URI says directConnection=true, but the set has other members, and after a failover this one may no \
         longer be the primary; name the set with replicaSet instead, or leave directConnection out"
    )]
    Direct,
    /// The URI asks for reads that may be old or may be undone.
    #[error(
        "the MongoDB URI sets {0}, but records must be read from the primary, with read concern majority; {1}"
    )]
    WeakReads(&'static str, &'static str),
    /// The URI asks for writes that a failover may undo.
    #[error(
        "the MongoDB URI asks for {0}, with which a failover could lose a lease that was granted; {1} or leave it out"
    )]
    WeakWrites(String, &'static str),
    /// The URI has an option of the driver that this build lacks.
    #[error("the MongoDB URI sets {0}, and compression is not built in; leave it out")]
    Compression(&'static str),
    /// The URI allows so few connections that commits would wait for other work.
    #[error(
        "the MongoDB URI sets maxPoolSize={0}, with which commits would wait for the change stream or for \
         background work; say {1} or more, or leave it out"
    )]
    Pool(u32, u32),
    /// The database belongs to MongoDB itself.
    #[error("the database {0:?} is MongoDB's own; name another with --mongodb-database")]
    Database(String),
    /// MongoDB refuses the user or the password.
    #[error("MongoDB refused the user or the password in the URI: {0}; see also its authSource")]
    Login(String),
    /// The user lacks a right that a daemon needs.
    #[error(
        "MongoDB refuses what the daemon needs to do; its user must have the rights find, insert, update, remove, \
         listIndexes and listCollections on its database, and changeStream on its collection: {0}"
    )]
    Rights(String),
    /// The server, which may not be MongoDB, refuses a command and would refuse it again.
    #[error("MongoDB refuses what the daemon needs to do, and would do so again: {0}")]
    Refused(String),
    /// The collection is of a kind that does not keep records as written.
    #[error("the collection {0}; use a plain one, with another --mongodb-collection if need be")]
    Collection(&'static str),
    /// MongoDB would delete records.
    #[error(
        "the collection has a TTL index, {0:?}, which deletes records of leases that are held; drop that index"
    )]
    TtlIndex(String),
    /// MongoDB would refuse records that are equal to others in the indexed fields.
    #[error(
        "the collection has a unique index, {0:?}, which would refuse records that equal others in its fields; drop that index"
    )]
    UniqueIndex(String),
    /// Different keys could count as equal.
    #[error("the collection has a collation, under which different keys may count as equal; use one without")]
    Collation,
    /// Another daemon on the same records has another grace, or the records were replaced since
    /// this daemon started.
    #[error("{0}")]
    Conflict(String),
}

/// Checks the database and the collection. Creates the collection if there is none.
pub(super) async fn database(store: &MongoStore, options: &ClientOptions) -> Result<(), ConnectError> {
    let name = store.database.name();
    if ITS_OWN.contains(&name) {
        return Err(Unusable::Database(name.to_owned()).into());
    }
    let hello = command(store, doc! { "hello": 1 }).await?;
    // Only a router of a sharded cluster answers with this text.
    let sharded = hello.get_str("msg").is_ok_and(|kind| kind == "isdbgrid");
    if !sharded && !hello.contains_key("setName") {
        return Err(Unusable::Standalone.into());
    }
    if hello.get_i32("maxWireVersion").is_ok_and(|version| version < MIN_WIRE_VERSION) {
        return Err(Unusable::TooOld.into());
    }
    if !sharded && options.direct_connection == Some(true) && members(&hello) != 1 {
        return Err(Unusable::Direct.into());
    }
    collection(store).await?;
    indexes(store).await?;
    rights(store).await
}

/// The number of members, not counting hidden ones, which cannot become the primary.
fn members(hello: &Document) -> usize {
    let some = |kind| hello.get_array(kind).map_or(0, Vec::len);
    ["hosts", "passives", "arbiters"].map(some).iter().sum()
}

/// Creates the collection if there is none, and refuses one that is not plain.
async fn collection(store: &MongoStore) -> Result<(), ConnectError> {
    let create = doc! { "create": store.collection.name() };
    match raw(store, create).await? {
        Ok(_) => return Ok(()),
        Err(error) if code(&error) == Some(NAMESPACE_EXISTS) => {}
        // A user without the right to create collections may use one that an administrator created.
        Err(error) if code(&error) == Some(UNAUTHORIZED) => {}
        Err(error) => return Err(classify(&error)),
    }
    let list = doc! { "listCollections": 1, "filter": { "name": store.collection.name() } };
    let found = command(store, list).await?;
    let cursor = found.get_document("cursor").and_then(|cursor| cursor.get_array("firstBatch"));
    match cursor.into_iter().flatten().filter_map(Bson::as_document).find_map(unfit) {
        Some(why) => Err(why.into()),
        None => Ok(()),
    }
}

/// Returns why leases cannot be kept in the collection that `entry` describes. Clustered
/// collections and collections with pre- and post-images are fine.
fn unfit(entry: &Document) -> Option<Unusable> {
    match entry.get_str("type") {
        Ok("view") => return Some(Unusable::Collection("is a view, which cannot be written")),
        Ok("timeseries") => {
            return Some(Unusable::Collection(
                "is a time series, whose records cannot be changed one by one",
            ));
        }
        _ => {}
    }
    let options = entry.get_document("options").ok()?;
    let is_empty = |option| options.get_document(option).is_ok_and(Document::is_empty);
    for (option, what) in [
        ("capped", "is capped, so MongoDB deletes the oldest records, even those of leases that are held"),
        ("validator", "has a validator, which may refuse records"),
        (
            "expireAfterSeconds",
            "has documents that expire, so MongoDB may delete records of leases that are held",
        ),
        ("encryptedFields", "has encrypted fields, which a daemon cannot write"),
    ] {
        let is_off = options.get_bool(option).is_ok_and(|is_on| !is_on) || is_empty(option);
        if options.contains_key(option) && !is_off {
            return Some(Unusable::Collection(what));
        }
    }
    options.contains_key("collation").then_some(Unusable::Collation)
}

async fn indexes(store: &MongoStore) -> Result<(), ConnectError> {
    let collection = store.collection.clone();
    let list = async move {
        let indexes: Vec<_> = match collection.list_indexes().await {
            Ok(cursor) => cursor.try_collect().await?,
            Err(error) if code(&error) == Some(NAMESPACE_NOT_FOUND) => Vec::new(),
            Err(error) => return Ok(Err(error)),
        };
        Ok(Ok(indexes))
    };
    for index in store.runner.run(list).await?.map_err(|error| classify(&error))? {
        let options = index.options.unwrap_or_default();
        let name = options.name.unwrap_or_default();
        if options.expire_after.is_some() {
            return Err(Unusable::TtlIndex(name).into());
        }
        let is_of_ids = index.keys.len() == 1 && index.keys.contains_key("_id");
        if options.unique == Some(true) && !is_of_ids {
            return Err(Unusable::UniqueIndex(name).into());
        }
    }
    Ok(())
}

/// Checks the user's rights: runs each kind of command in a form that changes nothing.
async fn rights(store: &MongoStore) -> Result<(), ConnectError> {
    let nothing = doc! { "_id": { "$in": [] } };
    store.read_keys(&[]).await?;
    feed::open(store).await?;
    let daemons = daemons::collection_name(store.collection.name());
    command(store, doc! { "find": &daemons, "filter": nothing, "limit": 1 }).await?;
    may_write(store, store.collection.name()).await?;
    may_write(store, &daemons).await
}

async fn may_write(store: &MongoStore, name: &str) -> Result<(), ConnectError> {
    let nothing = doc! { "_id": { "$in": [] } };
    let update = doc! { "update": name, "updates": [{ "q": nothing.clone(), "u": [{ "$set": { "rev": 0 } }], "multi": true }] };
    let delete = doc! { "delete": name, "deletes": [{ "q": nothing, "limit": 0 }] };
    store.runner.write(&store.database, update, &store.concern).await?;
    store.runner.write(&store.database, delete, &store.concern).await?;
    // An insert with an array as `_id` always fails. The server checks the rights before that.
    let insert = doc! { "insert": name, "documents": [{ "_id": [] }] };
    match store.runner.write(&store.database, insert, &store.concern).await {
        Err(Failure::Refused(cause)) => Err(Unusable::Rights(cause).into()),
        _ => Ok(()),
    }
}

/// Runs a command that must succeed.
async fn command(store: &MongoStore, command: Document) -> Result<Document, ConnectError> {
    raw(store, command).await?.map_err(|error| classify(&error))
}

/// Runs a command and returns its result. The outer error means that there was no answer.
async fn raw(store: &MongoStore, command: Document) -> Result<Result<Document, Error>, ConnectError> {
    let database = store.database.clone();
    Ok(store.runner.run(async move { Ok(database.run_command(command).await) }).await?)
}

fn code(error: &Error) -> Option<i32> {
    match error.kind.as_ref() {
        ErrorKind::Command(command) => Some(command.code),
        _ => None,
    }
}

/// Converts an error of the driver, by whether trying again may help.
fn classify(error: &Error) -> ConnectError {
    let cause = brief(error);
    let is_login = matches!(error.kind.as_ref(), ErrorKind::Authentication { .. });
    match code(error) {
        Some(UNAUTHORIZED) => Unusable::Rights(cause).into(),
        Some(code) if NEVER.contains(&code) => Unusable::Refused(cause).into(),
        code if is_login || code.is_some_and(|code| NO_LOGIN.contains(&code)) => {
            Unusable::Login(cause).into()
        }
        _ => Failure::from_driver(error).into(),
    }
}

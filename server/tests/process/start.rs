//! Settings and stores that the daemon refuses at its start. It exits with code 2 and one sentence
//! that says what to do. The tests use a real MongoDB.

use std::fs;
use std::io::Read;
use std::time::Duration;

use mongodb::bson::{Document, doc};
use mongodb::{Client, Database};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rstest::rstest;
use tempfile::TempDir;
use throwaway_mongodb::{Mongod, ReplicaSet};
use uuid::Uuid;

use crate::support::{Running, daemon, eventually, run_to_end};

/// A database for one test.
struct TestDatabase {
    uri: String,
    name: String,
    handle: Database,
}

impl TestDatabase {
    async fn new() -> Self {
        Self::at(throwaway_mongodb::shared().await.unwrap()).await
    }

    async fn at(uri: &str) -> Self {
        let name = format!("leased-test-{}", Uuid::new_v4());
        let handle = Client::with_uri_str(uri).await.unwrap().database(&name);
        Self { uri: uri.to_owned(), name, handle }
    }

    async fn run(&self, command: Document) {
        self.handle.run_command(command).await.unwrap();
    }

    /// Returns the daemon's options for this database, and `more` options.
    fn options<'a>(&'a self, more: &[&'a str]) -> Vec<&'a str> {
        [&["--mongodb-uri", &self.uri, "--mongodb-database", &self.name][..], more].concat()
    }

    /// Returns how many daemons have a heartbeat document.
    async fn heartbeats(&self) -> u64 {
        let daemons = self.handle.collection::<Document>("leases.daemons");
        daemons.count_documents(doc! { "seen_at": { "$exists": true } }).await.unwrap()
    }

    /// Writes the heartbeat of a daemon that does not exist, as if that daemon had started a day
    /// ago and had last written it `seconds` ago.
    async fn insert_heartbeat(&self, grace_ms: i64, seconds: i64) {
        let ago = |seconds: i64| doc! { "$subtract": ["$$NOW", seconds * 1000] };
        let set = doc! {
            "host": "elsewhere", "pid": 4711_i64, "grace_ms": grace_ms, "started_at": ago(86_400), "seen_at": ago(seconds),
        };
        let statement = doc! { "q": { "_id": "another" }, "u": [{ "$set": set }], "upsert": true };
        self.run(doc! { "update": "leases.daemons", "updates": [statement] }).await;
    }
}

/// Checks that a daemon exits with code 2 and one sentence that contains all of `said`.
fn assert_refused(options: &[&str], said: &[&str]) {
    let (code, stderr) = run_to_end(options);
    assert_eq!(code, Some(2), "{options:?}: {stderr}");
    let sentence = stderr.lines().find(|line| line.starts_with("leased: ")).unwrap_or_default();
    for said in said {
        assert!(sentence.contains(said), "{options:?}: no {said:?} in {stderr}");
    }
    assert!(!stderr.contains("panicked"), "{stderr}");
}

#[rstest]
#[case::secondary("readPreference=secondary", "say readPreference=primary")]
#[case::preferred("readPreference=secondaryPreferred", "say readPreference=primary")]
#[case::nearest("readPreference=nearest", "say readPreference=primary")]
#[case::tags("readPreferenceTags=dc:east", "leave it out")]
#[case::stale("maxStalenessSeconds=90", "leave it out")]
#[case::local("readConcernLevel=local", "say readConcernLevel=majority")]
#[case::one("w=1", "say w=majority")]
#[case::many("w=3", "say w=majority")]
#[case::tagged("w=nearby", "say w=majority")]
#[case::unjournaled("journal=false", "say journal=true")]
#[tokio::test]
async fn a_uri_option_that_weakens_reads_or_writes_is_refused_and_named(
    #[case] option: &str,
    #[case] advice: &str,
) {
    let database = TestDatabase::new().await;
    let uri = format!("{}&{option}", database.uri);
    let name = option.split('=').next().unwrap();
    assert_refused(&database.options(&["--mongodb-uri", &uri]), &[name, advice]);
}

#[tokio::test]
async fn a_uri_may_name_primary_and_majority() {
    let database = TestDatabase::new().await;
    let said = "readPreference=primary&readConcernLevel=majority&w=majority&journal=true";
    let uri = format!("{}&{said}", database.uri);
    let running = Running::start(&database.options(&["--mongodb-uri", &uri]));
    assert!(running.ready.contains("store=mongodb"), "{}", running.ready);
}

#[rstest]
#[case::capped(doc! { "create": "odd", "capped": true, "size": 65_536 }, "is capped")]
#[case::validated(doc! { "create": "odd", "validator": { "colour": { "$exists": true } } }, "has a validator")]
#[case::view(doc! { "create": "odd", "viewOn": "leases", "pipeline": [] }, "is a view")]
#[case::series(doc! { "create": "odd", "timeseries": { "timeField": "at" } }, "is a time series")]
#[case::collated(doc! { "create": "odd", "collation": { "locale": "en" } }, "has a collation")]
#[case::expiring(
    doc! { "createIndexes": "odd", "indexes": [{ "key": { "at": 1 }, "name": "at_1", "expireAfterSeconds": 60 }] },
    "has a TTL index, \"at_1\""
)]
#[case::unique(
    doc! { "createIndexes": "odd", "indexes": [{ "key": { "token": 1 }, "name": "token_1", "unique": true }] },
    "has a unique index, \"token_1\""
)]
#[case::expiring_by_id(
    doc! { "create": "odd", "clusteredIndex": { "key": { "_id": 1 }, "unique": true }, "expireAfterSeconds": 60 },
    "has documents that expire"
)]
#[tokio::test]
async fn a_collection_on_which_leases_are_not_safe_is_refused(#[case] made: Document, #[case] said: &str) {
    let database = TestDatabase::new().await;
    database.run(made).await;
    assert_refused(&database.options(&["--mongodb-collection=odd"]), &["the collection", said]);
}

#[rstest]
#[case::plain(doc! { "create": "fine" })]
#[case::clustered(doc! { "create": "fine", "clusteredIndex": { "key": { "_id": 1 }, "unique": true } })]
#[case::with_images(doc! { "create": "fine", "changeStreamPreAndPostImages": { "enabled": true } })]
#[case::validated_by_nothing(doc! { "create": "fine", "validator": {} })]
#[case::indexed(doc! { "createIndexes": "fine", "indexes": [{ "key": { "token": 1 }, "name": "token_1" }] })]
#[tokio::test]
async fn a_collection_on_which_leases_are_safe_is_used(#[case] made: Document) {
    let database = TestDatabase::new().await;
    database.run(made).await;
    let running = Running::start(&database.options(&["--mongodb-collection=fine"]));
    assert!(running.ready.contains("store=mongodb"), "{}", running.ready);
}

#[tokio::test]
async fn a_system_database_and_an_invalid_collection_name_are_refused() {
    let database = TestDatabase::new().await;
    assert_refused(&database.options(&["--mongodb-database=local"]), &["\"local\"", "--mongodb-database"]);
    assert_refused(&database.options(&["--mongodb-collection=a$b"]), &["a$b", "would do so again"]);
}

#[tokio::test]
async fn a_wrong_password_is_named_as_the_cause_and_not_shown() {
    let database = TestDatabase::new().await;
    let uri = database.uri.replace("mongodb://", "mongodb://app:S3cretWord@");
    let (code, stderr) = run_to_end(&database.options(&["--mongodb-uri", &uri]));
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("MongoDB refused the user or the password"), "{stderr}");
    assert!(!stderr.contains("S3cretWord"), "{stderr}");
}

#[test]
fn no_part_of_the_password_of_a_malformed_uri_is_printed() {
    for uri in ["mongodb://app:S3cret?x@127.0.0.1/", "mongodb://app:27017?S3cret@127.0.0.1/"] {
        let (code, stderr) = run_to_end(&["--mongodb-uri", uri, "--log-level=trace"]);
        assert_eq!(code, Some(2), "{stderr}");
        assert!(stderr.contains("%3F") && !stderr.to_lowercase().contains("s3cret"), "{stderr}");
    }
}

#[tokio::test]
async fn a_direct_connection_is_refused_unless_the_set_has_one_member() {
    let alone = TestDatabase::new().await;
    let direct = format!("{}&directConnection=true", alone.uri);
    let running = Running::start(&alone.options(&["--mongodb-uri", &direct]));
    assert!(running.ready.contains("store=mongodb"), "{}", running.ready);

    let set = ReplicaSet::start().await.unwrap();
    for node in 0..3 {
        let uri = set.node_uri(node).unwrap();
        assert_refused(&["--mongodb-uri", &uri], &["directConnection=true", "replicaSet"]);
    }
}

#[tokio::test]
async fn a_wrong_replica_set_name_is_suggested_as_the_cause() {
    let database = TestDatabase::new().await;
    let uri = database.uri.replace("replicaSet=rs0", "replicaSet=rs7");
    let (code, stderr) = run_to_end(&database.options(&["--mongodb-uri", &uri, "--store-timeout=1s"]));
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains("belongs to the set that its replicaSet names"), "{stderr}");
}

#[tokio::test]
async fn a_daemon_with_another_grace_is_refused_and_the_first_still_serves() {
    let database = TestDatabase::new().await;
    let mut first = Running::start(&database.options(&["--grace=1s"]));
    let pid = format!("pid {}", first.child.id());
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    assert_refused(
        &database.options(&["--grace=2500ms"]),
        &["--grace is 2s 500ms here and 1s at", &pid, &host],
    );
    let same = Running::start(&database.options(&["--grace=1s"]));
    assert!(same.ready.contains("store=mongodb"), "{}", same.ready);
    assert_eq!(database.heartbeats().await, 2, "the refused daemon leaves no heartbeat");
    drop(same);
    first.signal("TERM");
    assert_eq!(first.code(), Some(0));
}

#[tokio::test]
async fn the_grace_of_a_daemon_that_died_long_ago_does_not_count() {
    let database = TestDatabase::new().await;
    database.insert_heartbeat(9_000, 11).await;
    let running = Running::start(&database.options(&["--grace=1s"]));
    assert!(running.ready.contains("store=mongodb"), "{}", running.ready);
}

/// When two daemons start at the same time, one may see the other's heartbeat only after it is
/// ready.
#[tokio::test]
async fn a_ready_daemon_that_finds_an_earlier_one_with_another_grace_ends() {
    let database = TestDatabase::new().await;
    let mut command = daemon(&database.options(&["--grace=1s"]));
    let folder = tempfile::tempdir().unwrap();
    command.current_dir(folder.path());
    let mut running = Running::spawn(command).ready();
    database.insert_heartbeat(9_000, 0).await;
    assert_eq!(running.code(), Some(2));
    let mut stderr = String::new();
    running.child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert!(
        stderr.contains("--grace is 1s here and 9s at the daemon with pid 4711 on elsewhere"),
        "{stderr}"
    );
}

#[tokio::test]
async fn a_daemon_ends_when_the_identity_of_its_store_changes() {
    let database = TestDatabase::new().await;
    let mut running = Running::start(&database.options(&[]));
    let daemons = database.handle.collection::<Document>("leases.daemons");
    let identity = daemons.find_one(doc! { "_id": "store" }).await.unwrap().unwrap();
    assert_eq!(identity.get_str("store_id").unwrap(), running.field("id="));
    // If the collection is dropped, the daemon writes the identity again.
    daemons.drop().await.unwrap();
    eventually(async || daemons.find_one(doc! { "_id": "store" }).await.unwrap()).await;
    let again = Running::start(&database.options(&[]));
    assert_eq!(again.field("id="), running.field("id="));
    drop(again);
    // A changed identity means that the records belong to another store.
    let other = doc! { "$set": { "store_id": Uuid::new_v4().to_string() } };
    daemons.update_one(doc! { "_id": "store" }, other).await.unwrap();
    assert_eq!(running.code(), Some(2));
}

/// Four daemons at a time are stopped at different moments after their start.
#[tokio::test]
async fn daemons_that_start_and_stop_quickly_leave_no_heartbeat_and_no_panic() {
    let database = TestDatabase::new().await;
    let options = database.options(&[]);
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let options = &options;
            scope.spawn(move || {
                for round in 0..10 {
                    let folder = tempfile::tempdir().unwrap();
                    let mut command = daemon(options);
                    command.current_dir(folder.path());
                    let mut running = Running::spawn(command).ready();
                    // The sleep chooses the moment of the stop, which is what this test varies.
                    std::thread::sleep(Duration::from_millis((thread * 10 + round) * 37 % 400));
                    running.signal("TERM");
                    assert_eq!(running.code(), Some(0));
                    let mut stderr = String::new();
                    running.child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
                    assert!(!stderr.contains("panicked"), "{stderr}");
                }
            });
        }
    });
    assert_eq!(database.heartbeats().await, 0);
}

/// A CA, and a server certificate for this host that it has signed, as files for `mongod` and the
/// URI.
struct Certificates {
    folder: TempDir,
}

impl Certificates {
    fn new() -> Self {
        let (ca_key, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let mut ca = CertificateParams::default();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca_pem = ca.self_signed(&ca_key).unwrap().pem();
        let server = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        let certificate = server.signed_by(&key, &Issuer::new(ca, ca_key)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("ca.pem"), ca_pem).unwrap();
        fs::write(folder.path().join("server.pem"), key.serialize_pem() + &certificate.pem()).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }
}

#[tokio::test]
async fn a_tls_mismatch_with_mongodb_is_named_as_the_cause() {
    let certificates = Certificates::new();
    let (ca, server) = (certificates.path("ca.pem"), certificates.path("server.pem"));
    let options = [
        "--tlsMode=allowTLS",
        "--tlsCertificateKeyFile",
        &server,
        "--tlsCAFile",
        &ca,
        "--tlsAllowConnectionsWithoutCertificates",
    ];
    let mongod = Mongod::start_with(&options).await.unwrap();
    // `Mongod` needs plain connections to start. MongoDB raises the mode one step at a time.
    let admin = Client::with_uri_str(mongod.uri()).await.unwrap().database("admin");
    for mode in ["preferTLS", "requireTLS"] {
        admin.run_command(doc! { "setParameter": 1, "tlsMode": mode }).await.unwrap();
    }
    let plain = throwaway_mongodb::shared().await.unwrap();
    for (uri, said) in [
        (mongod.uri().to_owned(), "MongoDB may speak only TLS: say tls=true"),
        (format!("{plain}&tls=true&tlsCAFile={ca}"), "MongoDB may not speak TLS there"),
        (format!("{}&tls=true", mongod.uri()), "see the host's name and tlsCAFile"),
    ] {
        let (code, stderr) = run_to_end(&["--mongodb-uri", &uri, "--store-timeout=1s"]);
        assert_eq!(code, Some(1), "{uri}: {stderr}");
        assert!(stderr.contains(said), "{uri}: {stderr}");
    }
    let uri = format!("{}&tls=true&tlsCAFile={ca}", mongod.uri());
    let running = Running::start(&["--mongodb-uri", &uri]);
    assert!(running.ready.contains("store=mongodb"), "{}", running.ready);
    let missing = format!("{}&tls=true&tlsCAFile=/nowhere/ca.pem", mongod.uri());
    assert_refused(&["--mongodb-uri", &missing], &["/nowhere/ca.pem"]);
}

//! What is refused before anyone is served: exit code 2 and one sentence that says what to do, on a real MongoDB.

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

use crate::support::{Running, daemon, end, eventually};

/// A database of the test's own.
struct Place {
    uri: String,
    name: String,
    database: Database,
}

impl Place {
    async fn new() -> Self {
        Self::at(throwaway_mongodb::shared().await.unwrap()).await
    }

    async fn at(uri: &str) -> Self {
        let name = format!("leased-test-{}", Uuid::new_v4());
        let database = Client::with_uri_str(uri).await.unwrap().database(&name);
        Self { uri: uri.to_owned(), name, database }
    }

    async fn run(&self, command: Document) {
        self.database.run_command(command).await.unwrap();
    }

    fn options<'a>(&'a self, more: &[&'a str]) -> Vec<&'a str> {
        [&["--mongodb-uri", &self.uri, "--mongodb-database", &self.name][..], more].concat()
    }

    /// The documents of daemons.
    async fn signs_of_life(&self) -> u64 {
        let daemons = self.database.collection::<Document>("leases.daemons");
        daemons.count_documents(doc! { "seen_at": { "$exists": true } }).await.unwrap()
    }

    /// A sign of life of a daemon that is not there: it began a day ago and was seen so many seconds ago.
    async fn remembers(&self, grace_ms: i64, seconds: i64) {
        let ago = |seconds: i64| doc! { "$subtract": ["$$NOW", seconds * 1000] };
        let set = doc! {
            "host": "elsewhere", "pid": 4711_i64, "grace_ms": grace_ms, "started_at": ago(86_400), "seen_at": ago(seconds),
        };
        let statement = doc! { "q": { "_id": "another" }, "u": [{ "$set": set }], "upsert": true };
        self.run(doc! { "update": "leases.daemons", "updates": [statement] }).await;
    }
}

/// Ends with exit code 2 and one sentence with all of these in it.
fn is_refused(options: &[&str], said: &[&str]) {
    let (code, stderr) = end(options);
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
async fn a_uri_that_asks_for_less_than_a_majority_is_refused_by_name(
    #[case] option: &str,
    #[case] advice: &str,
) {
    let place = Place::new().await;
    let uri = format!("{}&{option}", place.uri);
    let name = option.split('=').next().unwrap();
    is_refused(&place.options(&["--mongodb-uri", &uri]), &[name, advice]);
}

#[tokio::test]
async fn a_uri_may_say_primary_and_majority() {
    let place = Place::new().await;
    let said = "readPreference=primary&readConcernLevel=majority&w=majority&journal=true";
    let uri = format!("{}&{said}", place.uri);
    let running = Running::start(&place.options(&["--mongodb-uri", &uri]));
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
    let place = Place::new().await;
    place.run(made).await;
    is_refused(&place.options(&["--mongodb-collection=odd"]), &["the collection", said]);
}

#[rstest]
#[case::plain(doc! { "create": "fine" })]
#[case::clustered(doc! { "create": "fine", "clusteredIndex": { "key": { "_id": 1 }, "unique": true } })]
#[case::with_images(doc! { "create": "fine", "changeStreamPreAndPostImages": { "enabled": true } })]
#[case::validated_by_nothing(doc! { "create": "fine", "validator": {} })]
#[case::indexed(doc! { "createIndexes": "fine", "indexes": [{ "key": { "token": 1 }, "name": "token_1" }] })]
#[tokio::test]
async fn a_collection_that_is_fine_is_used(#[case] made: Document) {
    let place = Place::new().await;
    place.run(made).await;
    let running = Running::start(&place.options(&["--mongodb-collection=fine"]));
    assert!(running.ready.contains("store=mongodb"), "{}", running.ready);
}

#[tokio::test]
async fn a_database_of_mongodb_itself_and_a_name_that_it_does_not_take_are_refused() {
    let place = Place::new().await;
    is_refused(&place.options(&["--mongodb-database=local"]), &["\"local\"", "--mongodb-database"]);
    is_refused(&place.options(&["--mongodb-collection=a$b"]), &["a$b", "would do so again"]);
}

#[tokio::test]
async fn a_wrong_password_is_called_that_and_not_shown() {
    let place = Place::new().await;
    let uri = place.uri.replace("mongodb://", "mongodb://app:S3cretWord@");
    let (code, stderr) = end(&place.options(&["--mongodb-uri", &uri]));
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("MongoDB refused the user or the password"), "{stderr}");
    assert!(!stderr.contains("S3cretWord"), "{stderr}");
}

#[test]
fn no_part_of_the_password_of_a_malformed_uri_is_printed() {
    for uri in ["mongodb://app:S3cret?x@127.0.0.1/", "mongodb://app:27017?S3cret@127.0.0.1/"] {
        let (code, stderr) = end(&["--mongodb-uri", uri, "--log-level=trace"]);
        assert_eq!(code, Some(2), "{stderr}");
        assert!(stderr.contains("%3F") && !stderr.to_lowercase().contains("s3cret"), "{stderr}");
    }
}

#[tokio::test]
async fn a_direct_connection_is_refused_unless_the_set_has_one_member() {
    let alone = Place::new().await;
    let direct = format!("{}&directConnection=true", alone.uri);
    let running = Running::start(&alone.options(&["--mongodb-uri", &direct]));
    assert!(running.ready.contains("store=mongodb"), "{}", running.ready);

    let set = ReplicaSet::start().await.unwrap();
    for node in 0..3 {
        let uri = set.node_uri(node).unwrap();
        is_refused(&["--mongodb-uri", &uri], &["directConnection=true", "replicaSet"]);
    }
}

#[tokio::test]
async fn a_set_of_another_name_is_told_from_one_that_is_away() {
    let place = Place::new().await;
    let uri = place.uri.replace("replicaSet=rs0", "replicaSet=rs7");
    let (code, stderr) = end(&place.options(&["--mongodb-uri", &uri, "--store-timeout=1s"]));
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains("belongs to the set that its replicaSet names"), "{stderr}");
}

#[tokio::test]
async fn a_daemon_with_another_grace_is_refused_and_the_first_goes_on() {
    let place = Place::new().await;
    let mut first = Running::start(&place.options(&["--grace=1s"]));
    let pid = format!("pid {}", first.child.id());
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    is_refused(&place.options(&["--grace=2500ms"]), &["--grace is 2s 500ms here and 1s at", &pid, &host]);
    let same = Running::start(&place.options(&["--grace=1s"]));
    assert!(same.ready.contains("store=mongodb"), "{}", same.ready);
    assert_eq!(place.signs_of_life().await, 2, "who was refused leaves nothing behind");
    drop(same);
    first.signal("TERM");
    assert_eq!(first.code(), Some(0));
}

#[tokio::test]
async fn a_daemon_that_died_long_ago_has_no_say_in_the_grace() {
    let place = Place::new().await;
    place.remembers(9_000, 11).await;
    let running = Running::start(&place.options(&["--grace=1s"]));
    assert!(running.ready.contains("store=mongodb"), "{}", running.ready);
}

/// Of two that start at once, as seen by the one that has not seen the other in time.
#[tokio::test]
async fn a_daemon_that_finds_an_earlier_one_with_another_grace_later_ends_all_the_same() {
    let place = Place::new().await;
    let mut command = daemon(&place.options(&["--grace=1s"]));
    let folder = tempfile::tempdir().unwrap();
    command.current_dir(folder.path());
    let mut running = Running::spawn(command).ready();
    place.remembers(9_000, 0).await;
    assert_eq!(running.code(), Some(2));
    let mut stderr = String::new();
    running.child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert!(
        stderr.contains("--grace is 1s here and 9s at the daemon with pid 4711 on elsewhere"),
        "{stderr}"
    );
}

#[tokio::test]
async fn records_that_are_replaced_by_others_end_the_daemon() {
    let place = Place::new().await;
    let mut running = Running::start(&place.options(&[]));
    let daemons = place.database.collection::<Document>("leases.daemons");
    let known = daemons.find_one(doc! { "_id": "store" }).await.unwrap().unwrap();
    assert_eq!(known.get_str("store_id").unwrap(), running.address("id="));
    // The daemon writes the identity again if somebody drops the collection.
    daemons.drop().await.unwrap();
    eventually(async || daemons.find_one(doc! { "_id": "store" }).await.unwrap()).await;
    let again = Running::start(&place.options(&[]));
    assert_eq!(again.address("id="), running.address("id="));
    drop(again);
    // Another identity is another store.
    let other = doc! { "$set": { "store_id": Uuid::new_v4().to_string() } };
    daemons.update_one(doc! { "_id": "store" }, other).await.unwrap();
    assert_eq!(running.code(), Some(2));
}

/// Starts and ends at moments that differ; a few at a time.
#[tokio::test]
async fn daemons_that_start_and_stop_quickly_leave_no_sign_of_life_and_no_panic() {
    let place = Place::new().await;
    let options = place.options(&[]);
    std::thread::scope(|scope| {
        for lane in 0..4_u64 {
            let options = &options;
            scope.spawn(move || {
                for round in 0..10 {
                    let folder = tempfile::tempdir().unwrap();
                    let mut command = daemon(options);
                    command.current_dir(folder.path());
                    let mut running = Running::spawn(command).ready();
                    // The moment itself is what is tried.
                    std::thread::sleep(Duration::from_millis((lane * 10 + round) * 37 % 400));
                    running.signal("TERM");
                    assert_eq!(running.code(), Some(0));
                    let mut stderr = String::new();
                    running.child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
                    assert!(!stderr.contains("panicked"), "{stderr}");
                }
            });
        }
    });
    assert_eq!(place.signs_of_life().await, 0);
}

/// A CA, and a certificate of it for a server on this host, as `mongod` and the URI want them.
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
async fn one_side_that_speaks_tls_and_one_that_does_not_are_named() {
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
        let (code, stderr) = end(&["--mongodb-uri", &uri, "--store-timeout=1s"]);
        assert_eq!(code, Some(1), "{uri}: {stderr}");
        assert!(stderr.contains(said), "{uri}: {stderr}");
    }
    let uri = format!("{}&tls=true&tlsCAFile={ca}", mongod.uri());
    let running = Running::start(&["--mongodb-uri", &uri]);
    assert!(running.ready.contains("store=mongodb"), "{}", running.ready);
    let missing = format!("{}&tls=true&tlsCAFile=/nowhere/ca.pem", mongod.uri());
    is_refused(&["--mongodb-uri", &missing], &["/nowhere/ca.pem"]);
}

//! What a daemon says of itself in numbers: in the right format, as the documents have it, and true.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use leased_client::v1::{LossReason, RevokeRequest};
use mongodb::bson::doc;
use rstest::rstest;
use throwaway_mongodb::Mongod;
use tonic::Code;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;

use crate::keepalive::{KeepAlive, kept};
use crate::support::exposition::Exposition;
use crate::support::{
    Asking, Calls, Daemon, Embedded, Home, MongoDb, ask, eventually, fetch, http, line_of, ms, secs, tools,
};
use crate::watch::Watch;

/// A tenth of it is longer than any test.
const LONG: u64 = 3600;

/// What a daemon counts.
pub(crate) async fn scrape(daemon: &Daemon) -> Exposition {
    let (head, body) = fetch(daemon.http, "/metrics").await.unwrap();
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    let head = head.to_lowercase();
    assert!(head.contains("\r\ncontent-type: text/plain; version=0.0.4; charset=utf-8\r\n"), "{head}");
    Exposition::parse(&body).unwrap_or_else(|why| panic!("{why}\n{body}"))
}

/// A sample's name, its labels, and by how much it is to have moved.
type Move<'a> = (&'a str, &'a [(&'a str, &'a str)], f64);

/// Waits until all have moved so, at the same time: what is counted may be counted after the answer.
async fn moved(daemon: &Daemon, before: &Exposition, moves: &[Move<'_>]) {
    let mut last = String::new();
    eventually(async || {
        let now = scrape(daemon).await;
        let mut wrong = String::new();
        for (name, labels, by) in moves {
            let moved = now.value(name, labels) - before.value(name, labels);
            if moved != *by {
                wrong += &format!("{name} {labels:?} moved by {moved}, not by {by}; ");
            }
        }
        if wrong != last {
            println!("{wrong}");
            last = wrong;
        }
        last.is_empty().then_some(())
    })
    .await;
}

/// Waits until a gauge stands at `value`.
async fn stands_at(daemon: &Daemon, name: &str, labels: &[(&str, &str)], value: f64) {
    eventually(async || (scrape(daemon).await.value(name, labels) == value).then_some(())).await;
}

/// Type and labels of each metric.
type Table = BTreeMap<String, (String, BTreeSet<String>)>;

/// The rows of the table in the document.
fn documented() -> Table {
    let page = fs::read_to_string(tools::root().join("docs/metrics.md")).unwrap();
    let rows = page.lines().filter(|line| line.starts_with("| `"));
    let mut table = Table::new();
    for row in rows {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [name, kind, labels, says, _] = cells[..] else { panic!("not five cells: {row}") };
        assert!(!says.is_empty(), "{row}");
        let labels =
            labels.split_ascii_whitespace().map(|label| label.trim_matches('`').to_owned()).collect();
        let name = name.trim_matches('`').to_owned();
        assert!(table.insert(name, (kind.to_owned(), labels)).is_none(), "twice: {row}");
    }
    if cfg!(not(target_os = "linux")) {
        table.retain(|name, _| !name.starts_with("process_"));
    }
    table
}

#[rstest]
#[tokio::test]
async fn the_table_in_the_documents_is_what_a_daemon_exports(#[values(Embedded, MongoDb)] home: Home) {
    let daemon = Daemon::start(home).await;
    let exported = scrape(&daemon).await.0.into_iter();
    let exported: Table = exported.map(|(name, family)| (name, (family.kind, family.labels))).collect();
    assert_eq!(exported, documented());
}

#[rstest]
#[tokio::test]
async fn what_the_examples_of_alarms_name_is_exported(#[values(Embedded)] home: Home) {
    let exported = scrape(&Daemon::start(home).await).await;
    let page = fs::read_to_string(tools::root().join("docs/metrics.md")).unwrap();
    let (_, alarms) = page.split_once("\n## Alarms\n").unwrap();
    let words = alarms.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
    let names: BTreeSet<&str> =
        words.filter(|word| word.starts_with("leased_") || word.starts_with("process_")).collect();
    assert!(names.len() >= 8, "{names:?}");
    for name in names.into_iter().filter(|name| cfg!(target_os = "linux") || !name.starts_with("process_")) {
        exported.value(name, &[]);
    }
}

#[rstest]
#[tokio::test]
async fn calls_that_are_granted_and_refused_are_counted(#[values(Embedded, MongoDb)] home: Home) {
    let daemon = Daemon::start(home).await;
    let mut client = daemon.client().await;
    let before = scrape(&daemon).await;

    let lease = client.get_lease(ask("job").ttl(secs(LONG))).await.unwrap().lease.unwrap();
    assert_eq!(client.get_lease(ask("job")).await.unwrap_err().code(), Code::AlreadyExists);
    assert_eq!(client.get_lease(ask("")).await.unwrap_err().code(), Code::InvalidArgument);
    client.renew(&lease).await.unwrap();
    client.give_back(&lease).await.unwrap();
    assert_eq!(client.renew(&lease).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(client.look("nobody's").await.unwrap_err().code(), Code::NotFound);
    let revoke = RevokeRequest { key: "nobody's".to_owned(), ..RevokeRequest::default() };
    daemon.admin().await.revoke(revoke).await.unwrap();

    moved(
        &daemon,
        &before,
        &[
            ("leased_calls_total", &[("method", "Acquire"), ("code", "OK")], 1.0),
            ("leased_calls_total", &[("method", "Acquire"), ("code", "ALREADY_EXISTS")], 1.0),
            ("leased_calls_total", &[("method", "Acquire"), ("code", "INVALID_ARGUMENT")], 1.0),
            ("leased_calls_total", &[("method", "Touch"), ("code", "OK")], 1.0),
            ("leased_calls_total", &[("method", "Touch"), ("code", "NOT_FOUND")], 1.0),
            ("leased_calls_total", &[("method", "Get"), ("code", "NOT_FOUND")], 1.0),
            ("leased_calls_total", &[("method", "Revoke"), ("code", "OK")], 1.0),
            ("leased_calls_total", &[], 8.0),
            ("leased_call_duration_seconds_count", &[("method", "Acquire")], 3.0),
            ("leased_call_duration_seconds_count", &[], 8.0),
            ("leased_grants_total", &[("waited", "false")], 1.0),
            ("leased_grants_total", &[], 1.0),
            ("leased_takeovers_total", &[], 0.0),
            ("leased_touches_total", &[("source", "store")], 1.0),
            ("leased_touches_total", &[], 1.0),
            ("leased_losses_told_total", &[("reason", "released")], 1.0),
            ("leased_losses_told_total", &[], 1.0),
            ("leased_releases_total", &[], 1.0),
            ("leased_revocations_total", &[], 0.0),
            ("leased_waits_total", &[], 0.0),
            // Two acquires, two touches and the release, one after the other.
            ("leased_batch_keys_count", &[], 5.0),
            ("leased_batch_keys_sum", &[], 5.0),
            ("leased_batch_keys_bucket", &[("le", "1")], 5.0),
            ("leased_batch_duration_seconds_count", &[], 5.0),
            ("leased_batches_in_flight", &[], 0.0),
            ("leased_store_errors_total", &[], 0.0),
        ],
    )
    .await;
    let now = scrape(&daemon).await;
    assert!(now.value("leased_call_duration_seconds_sum", &[]) > 0.0);
    let store = if home == Embedded { "embedded" } else { "mongodb" };
    assert_eq!(now.value("leased_build_info", &[("store", store)]), 1.0);
    stands_at(&daemon, "leased_connections", &[], 1.0).await;
}

#[rstest]
#[tokio::test]
async fn waits_are_counted_by_how_they_end(#[values(Embedded, MongoDb)] home: Home) {
    let daemon = Daemon::start(home).await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(ask("job").ttl(secs(LONG))).await.unwrap().lease.unwrap();
    let before = scrape(&daemon).await;

    assert_eq!(
        client.get_lease(ask("job").wait(ms(1))).await.unwrap_err().code(),
        Code::AlreadyExists,
        "it is held for longer than that"
    );
    let (mut gone, mut next) = (client.clone(), client.clone());
    let gone = tokio::spawn(async move { gone.get_lease(ask("job").wait(secs(LONG))).await });
    line_of(&mut client, "job", 1).await;
    stands_at(&daemon, "leased_waiting_calls", &[], 1.0).await;
    gone.abort();
    line_of(&mut client, "job", 0).await;
    let next = tokio::spawn(async move { next.get_lease(ask("job").wait(secs(LONG))).await });
    line_of(&mut client, "job", 1).await;
    client.give_back(&lease).await.unwrap();
    assert!(next.await.unwrap().unwrap().waited);

    moved(
        &daemon,
        &before,
        &[
            ("leased_waits_total", &[("outcome", "expired")], 1.0),
            ("leased_waits_total", &[("outcome", "abandoned")], 1.0),
            ("leased_waits_total", &[("outcome", "granted")], 1.0),
            ("leased_waits_total", &[], 3.0),
            ("leased_wait_duration_seconds_count", &[], 1.0),
            ("leased_waiting_calls", &[], 0.0),
            ("leased_grants_total", &[("waited", "true")], 1.0),
            ("leased_grants_total", &[], 1.0),
            ("leased_releases_total", &[], 1.0),
            ("leased_takeovers_total", &[], 0.0),
            ("leased_calls_total", &[("method", "Acquire"), ("code", "CANCELLED")], 1.0),
            ("leased_calls_total", &[("method", "Acquire")], 3.0),
        ],
    )
    .await;
}

#[rstest]
#[tokio::test]
async fn touches_and_losses_on_streams_are_counted(#[values(Embedded, MongoDb)] home: Home) {
    let daemon = Daemon::start(home).await;
    let mut client = daemon.client().await;
    let mut leases = Vec::new();
    for key in ["revoked", "released", "kept"] {
        leases.push(client.get_lease(ask(key).ttl(secs(LONG))).await.unwrap().lease.unwrap());
    }
    let mut stream = KeepAlive::open(&mut client).await;
    let before = scrape(&daemon).await;
    stands_at(&daemon, "leased_open_streams", &[("method", "KeepAlive")], 1.0).await;

    for _ in 0..3 {
        for (_, outcome) in stream.touch(&leases).await {
            kept(&outcome);
        }
    }
    stands_at(&daemon, "leased_carried_leases", &[], 3.0).await;
    let revoke = RevokeRequest { key: "revoked".to_owned(), ..RevokeRequest::default() };
    assert_eq!(daemon.admin().await.revoke(revoke).await.unwrap().into_inner().revoked, 1);
    assert_eq!(stream.told().await[0].1, LossReason::Revoked);
    client.give_back(&leases[1]).await.unwrap();
    assert_eq!(stream.told().await[0].1, LossReason::Released);
    // Asked about a lease that is over, the stream is told again.
    stream.touch(&leases[..1]).await;
    stands_at(&daemon, "leased_carried_leases", &[], 1.0).await;
    drop(stream);

    moved(
        &daemon,
        &before,
        &[
            ("leased_touches_total", &[("source", "store")], 3.0),
            ("leased_touches_total", &[("source", "memory")], 6.0),
            ("leased_keepalive_ack_duration_seconds_count", &[("source", "store")], 2.0),
            ("leased_keepalive_ack_duration_seconds_count", &[("source", "memory")], 2.0),
            ("leased_losses_told_total", &[("reason", "revoked")], 2.0),
            ("leased_losses_told_total", &[("reason", "released")], 1.0),
            ("leased_losses_told_total", &[], 3.0),
            ("leased_revocations_total", &[], 1.0),
            ("leased_carried_leases", &[], 0.0),
            ("leased_orphaned_leases_total", &[], 1.0),
            ("leased_calls_total", &[("method", "KeepAlive")], 1.0),
        ],
    )
    .await;
    stands_at(&daemon, "leased_open_streams", &[], 0.0).await;
}

#[rstest]
#[tokio::test]
async fn a_holder_that_fell_silent_makes_a_takeover_and_a_loss(#[values(Embedded, MongoDb)] home: Home) {
    let daemon = Daemon::start(home).await;
    let mut client = daemon.client().await;
    let mut stream = KeepAlive::open(&mut client).await;
    let before = scrape(&daemon).await;
    let lease = client.get_lease(ask("job").ttl(ms(300))).await.unwrap().lease.unwrap();
    kept(&stream.touch(std::slice::from_ref(&lease)).await[0].1);
    client.get_lease(ask("job").ttl(secs(LONG)).wait(secs(LONG))).await.unwrap();
    assert_eq!(stream.told().await, [(lease, LossReason::Displaced)]);
    moved(
        &daemon,
        &before,
        &[
            ("leased_takeovers_total", &[], 1.0),
            ("leased_grants_total", &[], 2.0),
            ("leased_losses_told_total", &[("reason", "displaced")], 1.0),
            ("leased_losses_told_total", &[], 1.0),
            ("leased_carried_leases", &[], 0.0),
            ("leased_orphaned_leases_total", &[], 0.0),
        ],
    )
    .await;
}

#[rstest]
#[tokio::test]
async fn watches_are_counted_while_they_are_open_and_when_they_end(#[values(Embedded, MongoDb)] home: Home) {
    let daemon = Daemon::start(home).await;
    let before = scrape(&daemon).await;
    let (watch, _) = Watch::open(&mut daemon.client().await, "").await;
    stands_at(&daemon, "leased_open_streams", &[("method", "Watch")], 1.0).await;
    moved(&daemon, &before, &[("leased_calls_total", &[], 0.0)]).await;
    drop(watch);
    let ended: Move<'_> = ("leased_calls_total", &[("method", "Watch"), ("code", "CANCELLED")], 1.0);
    moved(&daemon, &before, &[ended, ("leased_open_streams", &[], 0.0)]).await;
}

/// What was told in trailers, as all codes of streams that have begun are.
#[rstest]
#[tokio::test]
async fn a_stream_that_is_refused_half_way_counts_with_its_code(#[values(Embedded, MongoDb)] home: Home) {
    let daemon = Daemon::start(home).await;
    let before = scrape(&daemon).await;
    let mut stream = KeepAlive::open(&mut daemon.client().await).await;
    // More than a stream bears.
    stream.send(&vec![leased_client::v1::LeaseRef::default(); 12_501]).await;
    assert_eq!(stream.next().await.unwrap_err().code(), Code::ResourceExhausted);
    let refused: Move<'_> = ("leased_calls_total", &[("code", "RESOURCE_EXHAUSTED")], 1.0);
    moved(&daemon, &before, &[refused, ("leased_calls_total", &[], 1.0)]).await;
}

#[tokio::test]
async fn two_daemons_in_one_process_count_for_themselves_and_tell_how_the_feed_stands() {
    let daemon = Daemon::start(MongoDb).await;
    let alone = scrape(&daemon).await;
    assert!(alone.value("leased_feed_lag_seconds", &[]).is_nan());
    assert_eq!(alone.value("leased_feed_state", &[("state", "off")]), 1.0);
    let other = daemon.sibling().await;
    for daemon in [&daemon, &other] {
        daemon.follows().await;
        stands_at(daemon, "leased_feed_state", &[("state", "following")], 1.0).await;
        let now = scrape(daemon).await;
        assert_eq!(now.value("leased_feed_state", &[]), 1.0);
        assert!(now.value("leased_feed_lag_seconds", &[]) >= 0.0);
        assert!(now.value("leased_feed_gaps_total", &[]) >= 1.0);
    }
    let before = scrape(&other).await;
    daemon.client().await.get_lease(ask("job")).await.unwrap();
    moved(&daemon, &alone, &[("leased_grants_total", &[], 1.0)]).await;
    moved(&other, &before, &[("leased_grants_total", &[], 0.0), ("leased_calls_total", &[], 0.0)]).await;
}

/// Fail points are the whole server's, so it is the test's own.
#[tokio::test]
async fn what_the_store_fails_at_is_counted_by_what_is_known_of_it() {
    let mongod = Mongod::start().await.unwrap();
    let daemon = Daemon::over(mongod.uri(), |_| {}).await;
    let mut client = daemon.client().await;
    let before = scrape(&daemon).await;
    let admin = mongodb::Client::with_uri_str(mongod.uri()).await.unwrap().database("admin");
    // MaxTimeMSExpired, which may pass, and Unauthorized, which will not.
    for (code, times) in [(50, 2), (13, 1)] {
        let data = doc! { "failCommands": ["findAndModify"], "errorCode": code };
        let fail = doc! { "configureFailPoint": "failCommand", "mode": { "times": times }, "data": data };
        admin.run_command(fail).await.unwrap();
        assert_eq!(client.get_lease(ask("job")).await.is_ok(), code == 50);
    }
    let commit = |kind| [("operation", "commit"), ("kind", kind)];
    moved(
        &daemon,
        &before,
        &[
            ("leased_batch_repetitions_total", &[], 2.0),
            ("leased_store_errors_total", &commit("refused"), 1.0),
            ("leased_store_errors_total", &[], 1.0),
            ("leased_calls_total", &[("code", "UNAVAILABLE")], 1.0),
        ],
    )
    .await;
}

#[rstest]
#[tokio::test]
async fn readiness_is_a_number_too(#[values(Embedded, MongoDb)] home: Home) {
    let daemon = Daemon::start_with(home, |config| config.drain_timeout = secs(LONG)).await;
    stands_at(&daemon, "leased_ready", &[], 1.0).await;
    // A stream that its caller keeps open keeps the daemon from ending before it has been asked again.
    let mut client = ServerReflectionClient::new(daemon.channel().await);
    let _open = client.server_reflection_info(tokio_stream::pending()).await.unwrap();
    daemon.drain();
    eventually(async || http(daemon.http, "/readyz").await.filter(|answer| answer.0.contains("503"))).await;
    assert_eq!(scrape(&daemon).await.value("leased_ready", &[]), 0.0);
}

#[tokio::test]
async fn limits_are_numbers_too() {
    let daemon = Daemon::start_with(Embedded, |config| {
        config.limits.connections = 11;
        config.limits.bounds.waiting_calls = 12;
        config.limits.bounds.watches = 13;
        config.limits.bounds.leases = 14;
    })
    .await;
    let now = scrape(&daemon).await;
    for (limit, most) in [("connections", 11.0), ("waiting_calls", 12.0), ("watches", 13.0), ("leases", 14.0)]
    {
        assert_eq!(now.value("leased_limit", &[("limit", limit)]), most, "{limit}");
    }
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn the_process_is_this_one() {
    let daemon = Daemon::start(Embedded).await;
    let now = scrape(&daemon).await;
    let megabyte = 1024.0 * 1024.0;
    assert!(now.value("process_resident_memory_bytes", &[]) > megabyte);
    assert!(
        now.value("process_virtual_memory_bytes", &[]) >= now.value("process_resident_memory_bytes", &[])
    );
    assert!(now.value("process_open_fds", &[]) > 3.0);
    assert!(now.value("process_max_fds", &[]) >= now.value("process_open_fds", &[]));
    // After this was written, in seconds since the epoch.
    assert!(now.value("process_start_time_seconds", &[]) > 1_700_000_000.0);
    let later = eventually(async || {
        let later = scrape(&daemon).await.value("process_cpu_seconds_total", &[]);
        (later > now.value("process_cpu_seconds_total", &[])).then_some(later)
    });
    assert!(later.await > 0.0);
}

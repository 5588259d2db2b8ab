//! The daemon's metrics: their format, their agreement with the documentation, and their values.

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
    AcquireBuilder, Backend, Calls, Daemon, Embedded, MongoDb, acquire, enqueue, eventually, fetch, http, ms,
    secs, tools, until_queued,
};
use crate::watch::Watch;

/// A TTL in seconds. Touches coalesce for a tenth of it, which is longer than any test.
const LONG: u64 = 3600;

/// Fetches and parses the daemon's metrics.
pub(crate) async fn scrape(daemon: &Daemon) -> Exposition {
    let (head, body) = fetch(daemon.http, "/metrics").await.unwrap();
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    let head = head.to_lowercase();
    assert!(head.contains("\r\ncontent-type: text/plain; version=0.0.4; charset=utf-8\r\n"), "{head}");
    Exposition::parse(&body).unwrap_or_else(|why| panic!("{why}\n{body}"))
}

/// A metric's name, labels, and the expected change of its value.
type Change<'a> = (&'a str, &'a [(&'a str, &'a str)], f64);

/// Waits until one scrape shows all of these changes. The daemon may count a call only after it has
/// answered.
async fn until_changed(daemon: &Daemon, before: &Exposition, changes: &[Change<'_>]) {
    let mut last = String::new();
    eventually(async || {
        let now = scrape(daemon).await;
        let mut unexpected = String::new();
        for (name, labels, by) in changes {
            let changed = now.value(name, labels) - before.value(name, labels);
            if changed != *by {
                unexpected += &format!("{name} {labels:?} changed by {changed}, not by {by}; ");
            }
        }
        if unexpected != last {
            println!("{unexpected}");
            last = unexpected;
        }
        last.is_empty().then_some(())
    })
    .await;
}

/// Waits until a gauge has this value.
async fn until_value(daemon: &Daemon, name: &str, labels: &[(&str, &str)], value: f64) {
    eventually(async || (scrape(daemon).await.value(name, labels) == value).then_some(())).await;
}

/// The type and the labels of each metric, by name.
type Table = BTreeMap<String, (String, BTreeSet<String>)>;

/// Reads the table of metrics in the documentation.
fn documented() -> Table {
    let page = fs::read_to_string(tools::root().join("docs/metrics.md")).unwrap();
    let rows = page.lines().filter(|line| line.starts_with("| `"));
    let mut table = Table::new();
    for row in rows {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [name, kind, labels, meaning, _] = cells[..] else { panic!("not five cells: {row}") };
        assert!(!meaning.is_empty(), "{row}");
        let labels =
            labels.split_ascii_whitespace().map(|label| label.trim_matches('`').to_owned()).collect();
        let name = name.trim_matches('`').to_owned();
        assert!(table.insert(name, (kind.to_owned(), labels)).is_none(), "listed twice: {row}");
    }
    if cfg!(not(target_os = "linux")) {
        table.retain(|name, _| !name.starts_with("process_"));
    }
    table
}

#[rstest]
#[tokio::test]
async fn the_documentation_lists_exactly_the_exported_metrics(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let exported = scrape(&daemon).await.0.into_iter();
    let exported: Table = exported.map(|(name, family)| (name, (family.kind, family.labels))).collect();
    assert_eq!(exported, documented());
}

#[rstest]
#[tokio::test]
async fn every_metric_in_the_example_alarms_is_exported(#[values(Embedded)] backend: Backend) {
    let exported = scrape(&Daemon::start(backend).await).await;
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
async fn calls_that_are_granted_and_refused_are_counted(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let before = scrape(&daemon).await;

    let lease = client.get_lease(acquire("job").ttl(secs(LONG))).await.unwrap().lease.unwrap();
    assert_eq!(client.get_lease(acquire("job")).await.unwrap_err().code(), Code::AlreadyExists);
    assert_eq!(client.get_lease(acquire("")).await.unwrap_err().code(), Code::InvalidArgument);
    client.renew(&lease).await.unwrap();
    client.give_back(&lease).await.unwrap();
    assert_eq!(client.renew(&lease).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(client.inspect("nobody's").await.unwrap_err().code(), Code::NotFound);
    let revoke = RevokeRequest { key: "nobody's".to_owned(), ..RevokeRequest::default() };
    daemon.admin().await.revoke(revoke).await.unwrap();

    until_changed(
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
    let store = if backend == Embedded { "embedded" } else { "mongodb" };
    assert_eq!(now.value("leased_build_info", &[("store", store)]), 1.0);
    until_value(&daemon, "leased_connections", &[], 1.0).await;
}

#[rstest]
#[tokio::test]
async fn waits_are_counted_by_outcome(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(acquire("job").ttl(secs(LONG))).await.unwrap().lease.unwrap();
    let before = scrape(&daemon).await;

    assert_eq!(
        client.get_lease(acquire("job").wait(ms(1))).await.unwrap_err().code(),
        Code::AlreadyExists,
        "the key is still held when the wait is over"
    );
    let gone = enqueue(&mut client, acquire("job").wait(secs(LONG)), 1).await;
    until_value(&daemon, "leased_waiting_calls", &[], 1.0).await;
    gone.abort();
    until_queued(&mut client, "job", 0).await;
    let next = enqueue(&mut client, acquire("job").wait(secs(LONG)), 1).await;
    client.give_back(&lease).await.unwrap();
    assert!(next.await.unwrap().unwrap().waited);

    until_changed(
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
async fn touches_and_losses_on_streams_are_counted(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let mut leases = Vec::new();
    for key in ["revoked", "released", "kept"] {
        leases.push(client.get_lease(acquire(key).ttl(secs(LONG))).await.unwrap().lease.unwrap());
    }
    let mut stream = KeepAlive::open(&mut client).await;
    let before = scrape(&daemon).await;
    until_value(&daemon, "leased_open_streams", &[("method", "KeepAlive")], 1.0).await;

    for _ in 0..3 {
        for (_, outcome) in stream.touch(&leases).await {
            kept(&outcome);
        }
    }
    until_value(&daemon, "leased_carried_leases", &[], 3.0).await;
    let revoke = RevokeRequest { key: "revoked".to_owned(), ..RevokeRequest::default() };
    assert_eq!(daemon.admin().await.revoke(revoke).await.unwrap().into_inner().revoked, 1);
    assert_eq!(stream.reported().await[0].1, LossReason::Revoked);
    client.give_back(&leases[1]).await.unwrap();
    assert_eq!(stream.reported().await[0].1, LossReason::Released);
    // A message that names the revoked lease is answered with the loss once more.
    stream.touch(&leases[..1]).await;
    until_value(&daemon, "leased_carried_leases", &[], 1.0).await;
    drop(stream);

    until_changed(
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
    until_value(&daemon, "leased_open_streams", &[], 0.0).await;
}

#[rstest]
#[tokio::test]
async fn displacing_a_silent_holder_is_counted_as_a_takeover_and_a_loss(
    #[values(Embedded, MongoDb)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let mut stream = KeepAlive::open(&mut client).await;
    let before = scrape(&daemon).await;
    let lease = client.get_lease(acquire("job").ttl(ms(300))).await.unwrap().lease.unwrap();
    kept(&stream.touch(std::slice::from_ref(&lease)).await[0].1);
    client.get_lease(acquire("job").ttl(secs(LONG)).wait(secs(LONG))).await.unwrap();
    assert_eq!(stream.reported().await, [(lease, LossReason::Displaced)]);
    until_changed(
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
async fn watches_are_counted_while_they_are_open_and_when_they_end(
    #[values(Embedded, MongoDb)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let before = scrape(&daemon).await;
    let (watch, _) = Watch::open(&mut daemon.client().await, "").await;
    until_value(&daemon, "leased_open_streams", &[("method", "Watch")], 1.0).await;
    until_changed(&daemon, &before, &[("leased_calls_total", &[], 0.0)]).await;
    drop(watch);
    let ended: Change<'_> = ("leased_calls_total", &[("method", "Watch"), ("code", "CANCELLED")], 1.0);
    until_changed(&daemon, &before, &[ended, ("leased_open_streams", &[], 0.0)]).await;
}

/// The status of a stream that has begun is sent in trailers, so it must be counted from there.
#[rstest]
#[tokio::test]
async fn a_stream_that_fails_after_it_began_is_counted_with_its_code(
    #[values(Embedded, MongoDb)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let before = scrape(&daemon).await;
    let mut stream = KeepAlive::open(&mut daemon.client().await).await;
    // A message may name at most 12,500 leases.
    stream.send(&vec![leased_client::v1::LeaseRef::default(); 12_501]).await;
    assert_eq!(stream.next().await.unwrap_err().code(), Code::ResourceExhausted);
    let refused: Change<'_> = ("leased_calls_total", &[("code", "RESOURCE_EXHAUSTED")], 1.0);
    until_changed(&daemon, &before, &[refused, ("leased_calls_total", &[], 1.0)]).await;
}

#[tokio::test]
async fn two_daemons_in_one_process_have_their_own_counts_and_feed_states() {
    let daemon = Daemon::start(MongoDb).await;
    let alone = scrape(&daemon).await;
    assert!(alone.value("leased_feed_lag_seconds", &[]).is_nan());
    assert_eq!(alone.value("leased_feed_state", &[("state", "off")]), 1.0);
    let other = daemon.sibling().await;
    for daemon in [&daemon, &other] {
        daemon.until_following().await;
        until_value(daemon, "leased_feed_state", &[("state", "following")], 1.0).await;
        let now = scrape(daemon).await;
        assert_eq!(now.value("leased_feed_state", &[]), 1.0);
        assert!(now.value("leased_feed_lag_seconds", &[]) >= 0.0);
        assert!(now.value("leased_feed_gaps_total", &[]) >= 1.0);
    }
    let before = scrape(&other).await;
    daemon.client().await.get_lease(acquire("job")).await.unwrap();
    until_changed(&daemon, &alone, &[("leased_grants_total", &[], 1.0)]).await;
    until_changed(&other, &before, &[("leased_grants_total", &[], 0.0), ("leased_calls_total", &[], 0.0)])
        .await;
}

/// The test starts its own MongoDB, since fail points affect the whole server.
#[tokio::test]
async fn failures_of_the_store_are_counted_by_kind() {
    let mongod = Mongod::start().await.unwrap();
    let daemon = Daemon::over(mongod.uri(), |_| {}).await;
    let mut client = daemon.client().await;
    let before = scrape(&daemon).await;
    let admin = mongodb::Client::with_uri_str(mongod.uri()).await.unwrap().database("admin");
    // The daemon repeats a commit after MaxTimeMSExpired (50), and not after Unauthorized (13).
    for (code, times) in [(50, 2), (13, 1)] {
        let data = doc! { "failCommands": ["findAndModify"], "errorCode": code };
        let fail = doc! { "configureFailPoint": "failCommand", "mode": { "times": times }, "data": data };
        admin.run_command(fail).await.unwrap();
        assert_eq!(client.get_lease(acquire("job")).await.is_ok(), code == 50);
    }
    let commit = |kind| [("operation", "commit"), ("kind", kind)];
    until_changed(
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
async fn a_draining_daemon_exports_that_it_is_not_ready(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start_with(backend, |config| config.drain_timeout = secs(LONG)).await;
    until_value(&daemon, "leased_ready", &[], 1.0).await;
    // An open stream keeps the draining daemon running until its metrics have been read.
    let mut client = ServerReflectionClient::new(daemon.channel().await);
    let _open = client.server_reflection_info(tokio_stream::pending()).await.unwrap();
    daemon.drain();
    eventually(async || http(daemon.http, "/readyz").await.filter(|answer| answer.0.contains("503"))).await;
    assert_eq!(scrape(&daemon).await.value("leased_ready", &[]), 0.0);
}

#[tokio::test]
async fn the_configured_limits_are_exported() {
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
async fn the_process_metrics_describe_this_process() {
    let daemon = Daemon::start(Embedded).await;
    let now = scrape(&daemon).await;
    let megabyte = 1024.0 * 1024.0;
    assert!(now.value("process_resident_memory_bytes", &[]) > megabyte);
    assert!(
        now.value("process_virtual_memory_bytes", &[]) >= now.value("process_resident_memory_bytes", &[])
    );
    assert!(now.value("process_open_fds", &[]) > 3.0);
    assert!(now.value("process_max_fds", &[]) >= now.value("process_open_fds", &[]));
    // In seconds since 1970. This bound is in 2023, before this test was written.
    assert!(now.value("process_start_time_seconds", &[]) > 1_700_000_000.0);
    let later = eventually(async || {
        let later = scrape(&daemon).await.value("process_cpu_seconds_total", &[]);
        (later > now.value("process_cpu_seconds_total", &[])).then_some(later)
    });
    assert!(later.await > 0.0);
}

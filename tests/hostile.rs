//! Invalid requests, and valid ones that look dangerous.

use std::collections::HashMap;
use std::time::Duration;

use leased_client::Reason;
use leased_client::v1::{
    AcquireRequest, GetRequest, KeepAliveRequest, LeaseRef, ListRequest, ReleaseRequest, RevokeRequest,
    TouchRequest,
};
use prost_types::Duration as Proto;
use tonic::Code;

use rstest::rstest;

use crate::support::{
    AcquireBuilder, Backend, Calls, Daemon, Embedded, MongoDb, acquire, enqueue, invalid_fields, named,
    refusal, secs,
};

/// Returns texts that a careless daemon would execute or mangle.
fn hostile() -> Vec<String> {
    let mut texts: Vec<String> = [
        "$holders",
        "$$NOW",
        "$$ROOT",
        "$$value.token",
        "$",
        "$$",
        "a.b",
        "a.$.b",
        "$a.b",
        "__proto__",
        "constructor",
        "_id",
        "$where",
        "{\"$gt\":\"\"}",
        "'; DROP TABLE leases; --",
        "\"quoted\"",
        "'",
        "\\",
        "`",
        "%s%n",
        "../../etc",
        "null",
        "true",
        "0",
        "NaN",
        " ",
        "  leading and trailing  ",
        "ünïcödé",
        "Ελληνικά",
        "кириллица",
        "עברית",
        "العربية",
        "日本語",
        "中文",
        "한국어",
        "ไทย",
        "हिन्दी",
        "🔑👩‍👩‍👧‍👦",
        "e\u{301}",
        "\u{202e}rtl",
        "\u{feff}bom",
        "\u{10ffff}",
    ]
    .map(str::to_owned)
    .to_vec();
    texts.push("$".repeat(100));
    texts.push("k".repeat(512));
    texts
}

#[rstest]
#[tokio::test]
async fn hostile_keys_owners_and_metadata_are_returned_unchanged(
    #[values(Embedded, MongoDb)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let texts = hostile();
    let mut callers = tokio::task::JoinSet::new();
    for text in texts.clone() {
        let mut client = client.clone();
        callers.spawn(async move {
            let owner = text.chars().take(60).collect::<String>();
            let metadata =
                HashMap::from([(owner.clone(), text.clone()), ("$set".to_owned(), "$$REMOVE".to_owned())]);
            let request =
                AcquireRequest { metadata: metadata.clone(), ..acquire(&text).owner(&owner).ttl(secs(60)) };
            let granted = client.get_lease(request).await.unwrap();
            let seen = client.inspect(&text).await.unwrap();
            assert_eq!(seen.key, text);
            assert_eq!((&seen.holders[0].owner, &seen.holders[0].metadata), (&owner, &metadata), "{text:?}");
            let refused = client.get_lease(acquire(&text)).await.unwrap_err();
            assert_eq!(refusal(&refused, "owner"), (Some(Reason::LeaseHeld), owner));
            client.renew(&granted.lease.clone().unwrap()).await.unwrap();
            granted.lease.unwrap()
        });
    }
    let leases = callers.join_all().await;
    // No call changed the record of another key, although many of them shared a batch.
    let all =
        client.list(ListRequest { page_size: 1000, ..ListRequest::default() }).await.unwrap().into_inner();
    let mut keys: Vec<String> = all.leases.into_iter().map(|lease| lease.key).collect();
    let mut expected = texts;
    keys.sort();
    expected.sort();
    assert_eq!(keys, expected);
    for lease in leases {
        client.give_back(&lease).await.unwrap();
    }
}

#[rstest]
#[tokio::test]
async fn a_waiter_keeps_its_hostile_owner_name_when_it_is_granted_the_key(
    #[values(Embedded, MongoDb)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let lease =
        client.get_lease(acquire("$waiters").owner("$$this").ttl(secs(60))).await.unwrap().lease.unwrap();
    let waiter = enqueue(&mut client, acquire("$waiters").owner("$$value").wait(secs(60)), 1).await;
    client.give_back(&lease).await.unwrap();
    waiter.await.unwrap().unwrap();
    assert_eq!(client.inspect("$waiters").await.unwrap().holders[0].owner, "$$value");
}

#[rstest]
#[tokio::test]
async fn all_invalid_fields_are_named_at_once_and_nothing_is_changed(
    #[values(Embedded, MongoDb)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let request = AcquireRequest {
        key: "a\nb".to_owned(),
        lease_id: "not a uuid".to_owned(),
        owner: "o".repeat(257),
        ttl: Some(Proto { seconds: -1, nanos: 0 }),
        wait: Some(Proto { seconds: 0, nanos: -1 }),
        metadata: (0..33).map(|n| (n.to_string(), String::new())).collect(),
        mode: 9,
        shared_limit: 1,
        min_hold: Some(Proto { seconds: 1, nanos: 1_000_000_000 }),
    };
    let status = client.get_lease(request).await.unwrap_err();
    let all = ["key", "lease_id", "metadata", "min_hold", "mode", "owner", "ttl", "wait"];
    assert_eq!(invalid_fields(&status), all);
    let kept =
        client.list(ListRequest { include_free: true, ..ListRequest::default() }).await.unwrap().into_inner();
    assert!(kept.leases.is_empty());
}

#[rstest]
#[tokio::test]
async fn invalid_durations_are_refused(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let invalid = [
        Proto { seconds: -1, nanos: 0 },
        Proto { seconds: 1, nanos: -1 },
        Proto { seconds: 0, nanos: 1_000_000_000 },
        Proto { seconds: i64::MAX, nanos: 999_999_999 },
        Proto { seconds: i64::MIN, nanos: i32::MIN },
        Proto { seconds: 0, nanos: i32::MAX },
        Proto { seconds: 24 * 3600, nanos: 1_000_000 },
    ];
    for duration in invalid {
        let request = AcquireRequest {
            ttl: Some(duration),
            wait: Some(duration),
            min_hold: Some(duration),
            ..acquire("job")
        };
        let status = client.get_lease(request).await.unwrap_err();
        assert_eq!(invalid_fields(&status), ["min_hold", "ttl", "wait"], "{duration:?}");
    }
    for ttl in [Duration::ZERO, Duration::from_millis(99), Duration::from_nanos(1)] {
        assert_eq!(
            invalid_fields(&client.get_lease(acquire("job").ttl(ttl)).await.unwrap_err()),
            ["ttl"],
            "{ttl:?}"
        );
    }
    let longest = acquire("job").ttl(secs(24 * 3600)).min_hold(secs(24 * 3600));
    client.get_lease(longest).await.unwrap();
}

#[rstest]
#[tokio::test]
async fn invalid_keys_and_ids_are_refused_by_every_call(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let malformed_lease = Some(LeaseRef { key: "x".repeat(513), lease_id: "123".to_owned() });
    let fields = ["lease.key", "lease.lease_id"];
    let touch = client.touch(TouchRequest { lease: malformed_lease.clone() }).await.unwrap_err();
    assert_eq!(invalid_fields(&touch), fields);
    let release = client.release(ReleaseRequest { lease: malformed_lease }).await.unwrap_err();
    assert_eq!(invalid_fields(&release), fields);
    assert_eq!(invalid_fields(&client.touch(TouchRequest { lease: None }).await.unwrap_err()), ["lease"]);
    assert_eq!(invalid_fields(&client.get(GetRequest { key: String::new() }).await.unwrap_err()), ["key"]);
    let request = RevokeRequest { key: "\0".to_owned(), fencing_token: -1, reason: "r".repeat(2000) };
    let revoke = daemon.admin().await.revoke(request).await.unwrap_err();
    assert_eq!(invalid_fields(&revoke), ["fencing_token", "key", "reason"]);
    for id in ["", "0", "zzzzzzzz-zzzz-4zzz-zzzz-zzzzzzzzzzzz", "$oid", "00000000-0000-0000-0000-00000000000"]
    {
        let lease = LeaseRef { key: "job".to_owned(), lease_id: id.to_owned() };
        assert_eq!(invalid_fields(&client.renew(&lease).await.unwrap_err()), ["lease.lease_id"], "{id:?}");
    }
}

#[rstest]
#[tokio::test]
async fn oversized_requests_are_refused_and_the_connection_still_serves(
    #[values(Embedded, MongoDb)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    for bytes in [65 * 1024, 5 * 1024 * 1024] {
        let status = client.get_lease(acquire(&"x".repeat(bytes))).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted, "{bytes}");
        assert_eq!(refusal(&status, "limit"), (Some(Reason::LimitExceeded), "request_bytes".to_owned()));
    }
    let huge = KeepAliveRequest {
        sequence: 1,
        leases: vec![LeaseRef { key: "x".repeat(5 << 20), lease_id: String::new() }],
    };
    let mut answers = client.keep_alive(tokio_stream::iter([huge])).await.unwrap().into_inner();
    let status = answers.message().await.unwrap_err();
    assert_eq!(refusal(&status, "limit"), (Some(Reason::LimitExceeded), "message_bytes".to_owned()));
    client.get_lease(acquire("job")).await.unwrap();
}

#[rstest]
#[tokio::test]
async fn headers_beyond_the_limit_are_refused_and_other_connections_still_serve(
    #[values(Embedded, MongoDb)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let mut request = tonic::Request::new(acquire("job"));
    request.metadata_mut().insert("x-padding", "p".repeat(17 * 1024).parse().unwrap());
    client.acquire(request).await.unwrap_err();
    daemon.client().await.get_lease(acquire("job")).await.unwrap();
}

#[rstest]
#[tokio::test]
async fn a_lease_id_is_valid_for_its_own_key_only(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(acquire("a")).await.unwrap().lease.unwrap();
    client.get_lease(acquire("b")).await.unwrap();
    let id = lease.lease_id.parse().unwrap();
    assert_eq!(refusal(&client.give_back(&named("b", id)).await.unwrap_err(), "").0, Some(Reason::LeaseLost));
    client.renew(&lease).await.unwrap();
}

//! Limits of messages: the spelling of ids, sizes in both directions, and single leases that a
//! stream refuses.

use std::collections::{HashMap, HashSet};

use leased_client::Reason;
use leased_client::v1::keep_alive_result::Outcome;
use leased_client::v1::watch_response::Event;
use leased_client::v1::{
    AcquireRequest, KeepAliveRequest, LeaseRef, ListRequest, LossReason, RefusalReason, ReleaseRequest,
    TouchRequest, WatchRequest,
};
use prost::Message;
use rstest::rstest;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::codegen::http::HeaderMap;
use tonic::{Code, Status};
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_types::StatusExt;
use uuid::Uuid;

use crate::keepalive::{KeepAlive, kept, lost, refused};
use crate::support::{
    AcquireBuilder, Backend, Calls, Daemon, Embedded, Leases, MongoDb, PATIENCE, acquire, invalid_fields,
    named, refusal, secs,
};

/// Acquires a lease on each of `keys`.
async fn held(client: &mut Leases, keys: &[&str]) -> Vec<LeaseRef> {
    let mut leases = Vec::new();
    for key in keys {
        leases.push(client.get_lease(acquire(key).ttl(secs(60))).await.unwrap().lease.unwrap());
    }
    leases
}

/// Acquires one of very many leases that are requested at once. On a busy machine the call may
/// exceed its deadline, and is repeated.
async fn granted(mut client: Leases, request: AcquireRequest) -> LeaseRef {
    for _ in 0..10 {
        match client.get_lease(request.clone()).await {
            Ok(answer) => return answer.lease.unwrap(),
            Err(status) => assert_eq!(status.code(), Code::Unavailable, "{status:?}"),
        }
    }
    panic!("not granted");
}

/// Returns spellings of `id` that the API does not accept, a text that is no UUID, and the nil
/// UUID.
fn invalid_ids(id: Uuid) -> [String; 6] {
    [
        id.hyphenated().to_string().to_uppercase(),
        id.simple().to_string(),
        id.braced().to_string(),
        id.urn().to_string(),
        "42".to_owned(),
        Uuid::nil().to_string(),
    ]
}

#[rstest]
#[tokio::test]
async fn ids_in_another_spelling_and_the_nil_id_are_refused(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let lease = held(&mut client, &["job"]).await.remove(0);
    let mut stream = KeepAlive::open(&mut client).await;
    for lease_id in invalid_ids(lease.lease_id.parse().unwrap()) {
        let malformed = LeaseRef { lease_id: lease_id.clone(), ..lease.clone() };
        let request = AcquireRequest { lease_id: lease_id.clone(), ..acquire("other") };
        let status = client.get_lease(request).await.unwrap_err();
        assert_eq!(invalid_fields(&status), ["lease_id"], "{lease_id}");
        assert_eq!(refusal(&status, "").0, Some(Reason::InvalidRequest));
        let what = if lease_id == Uuid::nil().to_string() { "nil UUID" } else { "lower case with hyphens" };
        assert!(status.message().contains(what), "{}", status.message());
        let touch = client.touch(TouchRequest { lease: Some(malformed.clone()) }).await.unwrap_err();
        assert_eq!(invalid_fields(&touch), ["lease.lease_id"], "{lease_id}");
        let release = client.release(ReleaseRequest { lease: Some(malformed.clone()) }).await.unwrap_err();
        assert_eq!(invalid_fields(&release), ["lease.lease_id"], "{lease_id}");
        let results = stream.touch(std::slice::from_ref(&malformed)).await;
        assert_eq!((&results[0].0, refused(&results[0].1)), (&malformed, RefusalReason::Invalid));
    }
    client.renew(&lease).await.unwrap();
}

#[rstest]
#[tokio::test]
async fn malformed_leases_are_refused_and_others_in_the_message_are_kept(
    #[values(Embedded, MongoDb)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let good = held(&mut client, &["a", "b"]).await;
    let not_a_uuid = LeaseRef { key: "job".to_owned(), lease_id: "42".to_owned() };
    let no_key = named("", Uuid::new_v4());
    let huge = LeaseRef { key: "é".repeat(10_000), lease_id: "0".repeat(10_000) };

    let mut stream = KeepAlive::open(&mut client).await;
    // The first message is written to the store; the second one coalesces.
    for _ in 0..2 {
        let message = [not_a_uuid.clone(), good[0].clone(), huge.clone(), no_key.clone(), good[1].clone()];
        let results = stream.touch(&message).await;
        let outcomes: HashMap<&str, &Outcome> =
            results.iter().map(|(lease, outcome)| (lease.key.as_str(), outcome)).collect();
        assert_eq!(outcomes.len(), message.len());
        kept(outcomes["a"]);
        kept(outcomes["b"]);
        for key in ["job", "", &"é".repeat(256)] {
            assert_eq!(refused(outcomes[key]), RefusalReason::Invalid, "{key:?}");
        }
        let Outcome::Refused(refused) = outcomes[""] else { unreachable!() };
        assert_eq!(refused.message, "lease.key must not be empty");
    }
    assert_eq!(stream.touch(&[]).await.len(), 2, "the stream does not track refused leases");
    assert_eq!(stream.touch(std::slice::from_ref(&no_key)).await.len(), 1, "only a malformed lease");
}

#[rstest]
#[tokio::test]
async fn of_too_many_leases_the_first_are_kept_and_the_rest_is_refused(
    #[values(Embedded, MongoDb)] backend: Backend,
) {
    let daemon = Daemon::start_with(backend, |config| config.limits.stream_leases = 3).await;
    let mut client = daemon.client().await;
    let leases = held(&mut client, &["a", "b", "c", "d", "e"]).await;
    // A caller that sends the same message on another stream keeps the same leases.
    for _ in 0..2 {
        let mut stream = KeepAlive::open(&mut client).await;
        for _ in 0..2 {
            let results = stream.touch(&leases).await;
            assert_eq!(
                results.iter().map(|(lease, _)| lease).collect::<Vec<_>>(),
                leases.iter().collect::<Vec<_>>()
            );
            for (_, outcome) in &results[..3] {
                kept(outcome);
            }
            for (_, outcome) in &results[3..] {
                assert_eq!(refused(outcome), RefusalReason::LimitExceeded);
            }
        }
        assert_eq!(stream.touch(&[]).await.len(), 3);
    }
    let mut stream = KeepAlive::open(&mut client).await;
    stream.touch(&leases[..3]).await;
    client.give_back(&leases[1]).await.unwrap();
    assert_eq!(stream.reported().await, [(leases[1].clone(), LossReason::Released)]);
    let results = stream.touch(&leases[2..4]).await;
    for (_, outcome) in results {
        kept(&outcome);
    }
}

#[rstest]
#[tokio::test]
async fn leases_beyond_the_size_limit_of_a_message_are_refused(
    #[values(Embedded, MongoDb)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let held = held(&mut client, &["first", "last"]).await;
    let strangers: Vec<LeaseRef> =
        (0..4000).map(|number| named(&format!("{number:0>500}"), Uuid::new_v4())).collect();
    let message = [&held[..1], &strangers[..], &held[1..]].concat();
    let size = KeepAliveRequest { leases: message.clone(), sequence: 1 }.encoded_len();
    assert!(size > 2 * 1024 * 1024, "{size}");

    let mut stream = KeepAlive::open(&mut client).await;
    let results: HashMap<LeaseRef, Outcome> = stream.touch(&message).await.into_iter().collect();
    assert_eq!(results.len(), message.len());
    kept(&results[&held[0]]);
    assert_eq!(lost(&results[&strangers[0]]), LossReason::Gone, "within the limit, so it is looked up");
    assert_eq!(refused(&results[&strangers[3999]]), RefusalReason::LimitExceeded);
    assert_eq!(refused(&results[&held[1]]), RefusalReason::LimitExceeded);
    let looked_up: Vec<LeaseRef> =
        message.iter().filter(|lease| !matches!(results[*lease], Outcome::Refused(_))).cloned().collect();
    let size = KeepAliveRequest { leases: looked_up, sequence: 0 }.encoded_len();
    assert!((511 * 1024..=512 * 1024).contains(&size), "{size}");
    // In a separate message on the same stream, the refused lease is kept.
    kept(&stream.touch(&held[1..]).await[0].1);

    // The touches of both leases could be coalesced now, and the limit applies all the same.
    let repeated = [&vec![held[0].clone(); 12_000][..], &held[1..]].concat();
    let results: HashMap<LeaseRef, Outcome> = stream.touch(&repeated).await.into_iter().collect();
    assert_eq!(refused(&results[&held[1]]), RefusalReason::LimitExceeded);
}

#[rstest]
#[tokio::test]
async fn a_message_too_large_to_be_read_ends_its_stream_with_the_limit(
    #[values(Embedded, MongoDb)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let large = LeaseRef { key: "x".repeat(4 * 1024 * 1024), lease_id: String::new() };
    for (leases, limit) in
        [(vec![large], "message_bytes"), (vec![LeaseRef::default(); 12_501], "message_leases")]
    {
        let mut stream = KeepAlive::open(&mut client).await;
        stream.send_raw(KeepAliveRequest { leases, sequence: 1 }).await;
        let status = stream.next().await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(refusal(&status, "limit"), (Some(Reason::LimitExceeded), limit.to_owned()));
    }
}

#[rstest]
#[tokio::test]
async fn a_message_without_a_sequence_is_refused_and_touches_nothing(
    #[values(Embedded, MongoDb)] backend: Backend,
) {
    let daemon = Daemon::start_with(backend, |config| config.limits.coalesce_touches = false).await;
    let mut client = daemon.client().await;
    let leases = held(&mut client, &["job"]).await;
    let mut stream = KeepAlive::open(&mut client).await;
    for sequence in [1, 2] {
        let before = client.inspect("job").await.unwrap().holders[0].expire_time;
        // The second time, the stream tracks the lease and the message names none.
        let named = if sequence == 1 { leases.clone() } else { Vec::new() };
        stream.send_raw(KeepAliveRequest { leases: named, sequence: 0 }).await;
        let answer = stream.next().await.unwrap();
        assert_eq!((answer.sequence, answer.results.len(), answer.more), (0, 1, false));
        assert_eq!(answer.results[0].lease.as_ref(), Some(&leases[0]));
        assert_eq!(refused(answer.results[0].outcome.as_ref().unwrap()), RefusalReason::Invalid);
        assert_eq!(client.inspect("job").await.unwrap().holders[0].expire_time, before);
        kept(&stream.touch(&leases).await[0].1);
    }
}

/// The stream tracks so many leases on the longest keys that their results do not fit into one
/// message.
#[tokio::test]
async fn an_answer_that_does_not_fit_into_one_message_is_split() {
    let daemon = Daemon::start(Embedded).await;
    let mut client = daemon.client().await;
    let mut calls = JoinSet::new();
    for number in 0..8000 {
        let request = acquire(&format!("{number:0>512}")).id(Uuid::new_v4()).ttl(secs(3600));
        calls.spawn(granted(client.clone(), request));
    }
    let leases = calls.join_all().await;
    let mut stream = KeepAlive::open(&mut client).await;
    for some in leases.chunks(800) {
        let parts = stream.touch_in_parts(some).await;
        assert_eq!(parts.len(), 1, "the answer to one message that names its leases is not split");
    }
    let parts = stream.touch_in_parts(&[]).await;
    assert!(parts.len() > 1);
    let mut reported = HashSet::new();
    for result in parts.into_iter().flatten() {
        kept(result.outcome.as_ref().unwrap());
        reported.insert(result.lease.unwrap());
    }
    assert_eq!(reported, leases.into_iter().collect());
    stream.touch(&[]).await;
}

/// A record may contain 1 MiB of metadata.
#[tokio::test]
async fn listings_and_watches_of_the_largest_records_fit_into_messages() {
    let daemon = Daemon::start(Embedded).await;
    let mut client = daemon.client().await;
    let keys = ["pool/1", "pool/2", "pool/3", "pool/4", "pool/5"];
    let mut calls = JoinSet::new();
    for key in keys {
        for _ in 0..230 {
            let metadata = HashMap::from([("label".to_owned(), "é".repeat(2000))]);
            let request = AcquireRequest {
                metadata,
                ..acquire(key).id(Uuid::new_v4()).shared(0).owner(&"é".repeat(128)).ttl(secs(3600))
            };
            calls.spawn(granted(client.clone(), request));
        }
    }
    calls.join_all().await;

    let (mut request, mut listed) = (ListRequest { page_size: 1000, ..ListRequest::default() }, Vec::new());
    loop {
        let page = client.list(request.clone()).await.unwrap().into_inner();
        listed.extend(page.leases.iter().map(|lease| (lease.key.clone(), lease.holders.len())));
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    let all: Vec<_> = keys.iter().map(|key| ((*key).to_owned(), 230)).collect();
    assert_eq!(listed, all);

    let mut watch = client.watch(WatchRequest::default()).await.unwrap().into_inner();
    let mut shown = Vec::new();
    loop {
        let event = timeout(PATIENCE, watch.message()).await.unwrap().unwrap().unwrap().event.unwrap();
        match event {
            Event::Snapshot(lease) => {
                assert!(lease.encoded_len() > 1024 * 1024 * 9 / 10, "{}", lease.encoded_len());
                shown.push((lease.key, lease.holders.len()));
            }
            other => {
                assert!(matches!(other, Event::SnapshotEnd(_)));
                break;
            }
        }
    }
    assert_eq!(shown, all);
}

/// Returns the size of a status within a header block, as clients count it (RFC 9113, 6.5.2).
fn header_bytes(status: &Status) -> usize {
    let mut headers = HeaderMap::new();
    status.add_header(&mut headers).unwrap();
    headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum()
}

#[rstest]
#[tokio::test]
async fn no_status_is_larger_than_clients_accept(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let mut statuses = Vec::new();
    for (number, owner) in
        ["é".repeat(128), "\u{1}".repeat(256), "{".repeat(256), "🔑".repeat(64)].iter().enumerate()
    {
        let key = format!("job/{number}");
        client.get_lease(acquire(&key).owner(owner).ttl(secs(60))).await.unwrap();
        let status = client.get_lease(acquire(&key)).await.unwrap_err();
        assert_eq!(refusal(&status, "owner"), (Some(Reason::LeaseHeld), owner.clone()));
        statuses.push(status);
    }
    let invalid = AcquireRequest {
        key: "é".repeat(1000),
        lease_id: "é".repeat(1000),
        owner: "é".repeat(1000),
        ttl: Some(prost_types::Duration { seconds: -1, nanos: -1 }),
        wait: Some(prost_types::Duration { seconds: -1, nanos: -1 }),
        min_hold: Some(prost_types::Duration { seconds: -1, nanos: -1 }),
        metadata: (0..100).map(|number| (number.to_string(), String::new())).collect(),
        mode: 99,
        shared_limit: 0,
    };
    let status = client.get_lease(invalid).await.unwrap_err();
    assert_eq!(invalid_fields(&status).len(), 8);
    assert_eq!(refusal(&status, "").0, Some(Reason::InvalidRequest));
    statuses.push(status);
    statuses.push(client.get_lease(acquire(&"x".repeat(65 * 1024))).await.unwrap_err());
    for status in statuses {
        assert!(status.details().len() <= 4096, "{} bytes: {status:?}", status.details().len());
        assert!(header_bytes(&status) < 7 * 1024, "{} bytes: {status:?}", header_bytes(&status));
        assert!(status.get_details_error_info().is_some(), "{status:?}");
    }
}

#[tokio::test]
async fn reflection_describes_the_details_of_a_status() {
    let daemon = Daemon::start(Embedded).await;
    let mut client = ServerReflectionClient::new(daemon.channel().await);
    let mut describe = async |request: MessageRequest| {
        let request = ServerReflectionRequest { host: String::new(), message_request: Some(request) };
        let answers = client.server_reflection_info(tokio_stream::iter([request])).await;
        let answer = answers.unwrap().into_inner().message().await.unwrap().unwrap();
        match answer.message_response {
            Some(MessageResponse::FileDescriptorResponse(files)) => {
                let file = files.file_descriptor_proto.into_iter().next().unwrap();
                prost_types::FileDescriptorProto::decode(file.as_slice()).unwrap()
            }
            other => panic!("{other:?}"),
        }
    };
    for symbol in ["Status", "ErrorInfo", "BadRequest", "RetryInfo"] {
        let file = describe(MessageRequest::FileContainingSymbol(format!("google.rpc.{symbol}"))).await;
        assert!(file.message_type.iter().any(|message| message.name() == symbol), "{symbol}");
        for import in file.dependency {
            let imported = describe(MessageRequest::FileByFilename(import.clone())).await;
            assert_eq!(imported.name(), import);
        }
    }
}

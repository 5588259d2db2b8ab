//! Get and List.

use std::collections::HashMap;

use leased_client::Reason;
use leased_client::v1::{AcquireRequest, LeaseState, ListRequest, ListResponse};
use tonic::Code;

use rstest::rstest;

use crate::support::{
    AcquireBuilder, Backend, Calls, Daemon, Embedded, Fleet, Leases, MongoDb, acquire, refusal, secs,
};

async fn list(client: &mut Leases, request: ListRequest) -> ListResponse {
    client.list(request).await.unwrap().into_inner()
}

fn keys(page: &ListResponse) -> Vec<&str> {
    page.leases.iter().map(|lease| lease.key.as_str()).collect()
}

#[rstest]
#[tokio::test]
async fn get_shows_the_holder_and_never_a_lease_id(#[values(Embedded, MongoDb, Fleet)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let metadata = HashMap::from([("host".to_owned(), "a1".to_owned()), ("pid".to_owned(), "7".to_owned())]);
    let request = AcquireRequest { metadata: metadata.clone(), ..acquire("job").owner("me").ttl(secs(20)) };
    let granted = client.get_lease(request).await.unwrap();
    let seen = client.inspect("job").await.unwrap();
    let holder = &seen.holders[0];
    assert_eq!((holder.owner.as_str(), &holder.metadata), ("me", &metadata));
    assert_eq!(holder.ttl, Some(secs(20).try_into().unwrap()));
    assert_eq!((holder.acquire_time, holder.expire_time), (granted.acquire_time, granted.expire_time));
    assert!(!format!("{seen:?}").contains(&granted.lease.unwrap().lease_id));
}

#[rstest]
#[tokio::test]
async fn a_key_that_was_never_leased_is_unknown(#[values(Embedded, MongoDb, Fleet)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let status = daemon.client().await.inspect("nothing").await.unwrap_err();
    assert_eq!((status.code(), refusal(&status, "").0), (Code::NotFound, Some(Reason::KeyUnknown)));
}

#[rstest]
#[tokio::test]
async fn list_filters_by_prefix_and_returns_pages_in_order(
    #[values(Embedded, MongoDb, Fleet)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    for key in ["b/2", "a/1", "b/1", "b/10", "b", "c/1", "b/é", "b/\u{10ffff}"] {
        client.get_lease(acquire(key)).await.unwrap();
    }
    let request = ListRequest { prefix: "b/".to_owned(), page_size: 2, ..ListRequest::default() };
    let first = list(&mut client, request.clone()).await;
    assert_eq!(keys(&first), ["b/1", "b/10"]);
    let request = ListRequest { page_token: first.next_page_token, ..request };
    let second = list(&mut client, request.clone()).await;
    assert_eq!(keys(&second), ["b/2", "b/é"]);
    let request = ListRequest { page_token: second.next_page_token, ..request };
    let third = list(&mut client, request).await;
    assert_eq!(keys(&third), ["b/\u{10ffff}"]);
    assert_eq!(third.next_page_token, "");
    assert_eq!(list(&mut client, ListRequest::default()).await.leases.len(), 8);
    let none = ListRequest { prefix: "nothing".to_owned(), ..ListRequest::default() };
    assert!(list(&mut client, none).await.leases.is_empty());
}

#[rstest]
#[tokio::test]
async fn free_keys_are_listed_only_on_request(#[values(Embedded, MongoDb, Fleet)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(acquire("free")).await.unwrap().lease.unwrap();
    client.give_back(&lease).await.unwrap();
    client.get_lease(acquire("held")).await.unwrap();
    assert_eq!(keys(&list(&mut client, ListRequest::default()).await), ["held"]);
    let all = list(&mut client, ListRequest { include_free: true, ..ListRequest::default() }).await;
    assert_eq!(keys(&all), ["free", "held"]);
    assert_eq!(all.leases[0].state(), LeaseState::Free);
}

#[rstest]
#[tokio::test]
async fn a_page_of_large_records_fits_into_a_message(#[values(Embedded, MongoDb, Fleet)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    let metadata = HashMap::from([("x".to_owned(), "y".repeat(4000))]);
    let mut callers = tokio::task::JoinSet::new();
    for number in 0..1200 {
        let mut client = client.clone();
        let request = AcquireRequest { metadata: metadata.clone(), ..acquire(&format!("{number:04}")) };
        callers.spawn(async move { client.get_lease(request).await.unwrap() });
    }
    callers.join_all().await;
    let mut request = ListRequest { page_size: 1000, ..ListRequest::default() };
    let mut seen = 0;
    loop {
        let page = list(&mut client, request.clone()).await;
        seen += page.leases.len();
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    assert_eq!(seen, 1200);
}

#[rstest]
#[tokio::test]
async fn a_page_token_of_another_listing_is_refused(#[values(Embedded, MongoDb, Fleet)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let mut client = daemon.client().await;
    for (prefix, page_token) in [("b/", "a/1"), ("", "a\0b"), ("a", &"x".repeat(600))] {
        let request = ListRequest {
            prefix: prefix.to_owned(),
            page_token: page_token.to_owned(),
            page_size: -1,
            ..ListRequest::default()
        };
        let status = client.list(request).await.unwrap_err();
        assert_eq!(crate::support::invalid_fields(&status), ["page_size", "page_token"]);
    }
}

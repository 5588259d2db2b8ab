//! Large answers, and callers that do not read them.

use std::collections::HashMap;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::join_all;
use futures_util::stream::{FuturesUnordered, StreamExt};
use h2::client::SendRequest;
use h2::{Reason, RecvStream};
use http::Request;
use leased_client::KeyInfo;
use leased_client::v1::{AcquireRequest, ListRequest};
use prost::Message;
use rstest::rstest;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::{AcquireBuilder, Backend, Calls, Daemon, Embedded, MongoDb, PATIENCE, acquire, secs};

/// How many records of 4 KiB the tests list. All of them fit into one page of a list.
const KEYS: usize = 40;

fn large(key: &str) -> AcquireRequest {
    let metadata = HashMap::from([("x".to_owned(), "y".repeat(4000))]);
    AcquireRequest { metadata, ..acquire(key).ttl(secs(600)) }
}

fn list_request(prefix: &str) -> ListRequest {
    ListRequest { prefix: prefix.to_owned(), page_size: 1000, ..ListRequest::default() }
}

/// Opens a connection whose client answers pings, but reads no part of any answer.
async fn connect_without_reading(daemon: &Daemon) -> SendRequest<Bytes> {
    let stream = TcpStream::connect(daemon.grpc).await.unwrap();
    let (calls, connection) =
        h2::client::Builder::new().initial_window_size(0).handshake(stream).await.unwrap();
    tokio::spawn(connection);
    calls
}

async fn list(calls: &SendRequest<Bytes>, prefix: &str) -> h2::client::ResponseFuture {
    let request = Request::post("http://leased/leased.v1.LeaseService/List")
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    let mut calls = calls.clone().ready().await.unwrap();
    let (answer, mut body) = calls.send_request(request.body(()).unwrap(), false).unwrap();
    let message = list_request(prefix).encode_to_vec();
    let prefix = [&[0][..], &u32::try_from(message.len()).unwrap().to_be_bytes()].concat();
    body.send_data([prefix, message].concat().into(), true).unwrap();
    answer
}

/// Starts lists on eight connections, and reads none of the answers. These are as many lists as may
/// be answered at once: four on each connection, 32 in the whole daemon.
async fn unread_lists(daemon: &Daemon, prefix: &str) -> Vec<RecvStream> {
    let on_one_connection = async || {
        let calls = connect_without_reading(daemon).await;
        join_all((0..4).map(async |_| list(&calls, prefix).await.await.unwrap().into_body())).await
    };
    join_all((0..8).map(|_| on_one_connection())).await.into_iter().flatten().collect()
}

fn was_reset(body: &mut RecvStream) -> bool {
    let end = body.data().now_or_never().flatten();
    end.is_some_and(|end| end.is_err_and(|error| error.reason() == Some(Reason::CANCEL)))
}

#[rstest]
#[tokio::test]
async fn a_connection_has_at_most_four_unread_answers_and_each_is_reset_in_time(
    #[values(Embedded, MongoDb)] backend: Backend,
) {
    let daemon = Daemon::start(backend).await;
    let client = daemon.client().await;
    let held = (0..KEYS).map(async |key| client.clone().get_lease(large(&key.to_string())).await);
    join_all(held).await.into_iter().for_each(|held| drop(held.unwrap()));

    let calls = connect_without_reading(&daemon).await;
    let mut heads = FuturesUnordered::new();
    for _ in 0..6 {
        heads.push(list(&calls, "").await);
    }
    let mut unread: Vec<RecvStream> = Vec::new();
    for _ in 0..4 {
        unread.push(heads.next().await.unwrap().unwrap().into_body());
    }
    // The lists of another connection do not wait for the unread ones, only for each other.
    let lists = (0..12).map(async |_| client.clone().list(list_request("")).await);
    for page in join_all(lists).await {
        assert_eq!(page.unwrap().into_inner().leases.len(), KEYS);
    }

    // The fifth list is answered once the daemon has reset one of the first four.
    timeout(PATIENCE, heads.next()).await.unwrap().unwrap().unwrap();
    assert!(unread.iter_mut().any(was_reset));
}

#[rstest]
#[tokio::test]
async fn a_list_does_not_wait_for_callers_that_read_nothing(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let (client, holder) = (daemon.client().await, daemon.holder().await);
    let many = (0..KEYS).map(async |key| client.clone().get_lease(large(&format!("many/{key:02}"))).await);
    let one = (0..KEYS).map(async |_| client.clone().get_lease(large("one").shared(0)).await);
    for held in [join_all(many).await, join_all(one).await] {
        held.into_iter().for_each(|held| drop(held.unwrap()));
    }

    let list = async |prefix| client.clone().list(list_request(prefix)).await.unwrap().into_inner();
    // Small answers do not count against the daemon's limit of unread answers.
    let small = unread_lists(&daemon, "many/00").await;
    assert_eq!(list("many/").await.leases.len(), KEYS);
    drop(small);

    let mut rounds = 0;
    loop {
        let mut unread = unread_lists(&daemon, "").await;
        let first = list("many/").await;
        let keys: Vec<KeyInfo> = holder.list("many/").stream().map(Result::unwrap).collect().await;
        assert!(keys.into_iter().map(|info| info.key).eq((0..KEYS).map(|key| format!("many/{key:02}"))));
        let pages = [first, list("many/").await];
        // On a busy machine the daemon may have reset some of the unread lists before these two.
        let are_short = pages.iter().all(|page| page.leases.len() < KEYS);
        if are_short && !unread.iter_mut().any(was_reset) {
            for page in pages {
                assert!(!page.leases.is_empty() && page.encoded_len() <= 64 * 1024);
                assert_eq!(page.next_page_token, page.leases[page.leases.len() - 1].key);
            }
            // A record that is too large for a short page waits until an unread list is reset.
            assert_eq!(list("one").await.leases[0].holders.len(), KEYS);
            assert!(unread.iter_mut().any(was_reset));
            break;
        }
        rounds += 1;
        assert!(rounds < 5, "a list waits until unread ones are reset");
    }
}

#[rstest]
#[tokio::test]
async fn get_shows_all_holders_of_a_large_record(#[values(Embedded, MongoDb)] backend: Backend) {
    let daemon = Daemon::start(backend).await;
    let client = daemon.client().await;
    let holds = (0..KEYS).map(async |_| client.clone().get_lease(large("crowded").shared(0)).await);
    join_all(holds).await.into_iter().for_each(|held| drop(held.unwrap()));
    // These are more calls than a connection may have answered at once.
    for lease in join_all((0..12).map(async |_| client.clone().inspect("crowded").await)).await {
        let holders = lease.unwrap().holders;
        assert_eq!(holders.len(), KEYS);
        assert!(holders.iter().all(|holder| holder.metadata["x"].len() == 4000));
    }
}

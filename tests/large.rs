//! Large answers, and callers who do not take them.

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

use crate::support::{Asking, Calls, Daemon, Embedded, Home, MongoDb, PATIENCE, ask, secs};

/// What `List` answers is larger than this many records of 4 KiB.
const KEYS: usize = 40;

fn large(key: &str) -> AcquireRequest {
    let metadata = HashMap::from([("x".to_owned(), "y".repeat(4000))]);
    AcquireRequest { metadata, ..ask(key).ttl(secs(600)) }
}

fn asking(prefix: &str) -> ListRequest {
    ListRequest { prefix: prefix.to_owned(), page_size: 1000, ..ListRequest::default() }
}

/// A connection whose peer takes nothing of what it is answered, and answers pings.
async fn taking_nothing(daemon: &Daemon) -> SendRequest<Bytes> {
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
    let message = asking(prefix).encode_to_vec();
    let prefix = [&[0][..], &u32::try_from(message.len()).unwrap().to_be_bytes()].concat();
    body.send_data([prefix, message].concat().into(), true).unwrap();
    answer
}

/// Lists that nobody takes, as many as have their turn on a few connections and in the whole daemon.
async fn untaken(daemon: &Daemon, prefix: &str) -> Vec<RecvStream> {
    let on_one = async || {
        let calls = taking_nothing(daemon).await;
        join_all((0..4).map(async |_| list(&calls, prefix).await.await.unwrap().into_body())).await
    };
    join_all((0..8).map(|_| on_one())).await.into_iter().flatten().collect()
}

fn was_reset(body: &mut RecvStream) -> bool {
    let end = body.data().now_or_never().flatten();
    end.is_some_and(|end| end.is_err_and(|error| error.reason() == Some(Reason::CANCEL)))
}

#[rstest]
#[tokio::test]
async fn of_answers_that_nobody_takes_there_are_few_at_once_and_each_ends(
    #[values(Embedded, MongoDb)] home: Home,
) {
    let daemon = Daemon::start(home).await;
    let client = daemon.client().await;
    let held = (0..KEYS).map(async |key| client.clone().get_lease(large(&key.to_string())).await);
    join_all(held).await.into_iter().for_each(|held| drop(held.unwrap()));

    let calls = taking_nothing(&daemon).await;
    let mut heads = FuturesUnordered::new();
    for _ in 0..6 {
        heads.push(list(&calls, "").await);
    }
    let mut untaken: Vec<RecvStream> = Vec::new();
    for _ in 0..4 {
        untaken.push(heads.next().await.unwrap().unwrap().into_body());
    }
    // The lists of another connection do not wait for these, and take turns among themselves.
    let lists = (0..12).map(async |_| client.clone().list(asking("")).await);
    for page in join_all(lists).await {
        assert_eq!(page.unwrap().into_inner().leases.len(), KEYS);
    }

    // The fifth has its turn when one of the first four was given up.
    timeout(PATIENCE, heads.next()).await.unwrap().unwrap().unwrap();
    assert!(untaken.iter_mut().any(was_reset));
}

#[rstest]
#[tokio::test]
async fn a_listing_does_not_wait_for_those_who_take_nothing(#[values(Embedded, MongoDb)] home: Home) {
    let daemon = Daemon::start(home).await;
    let (client, holder) = (daemon.client().await, daemon.holder().await);
    let many = (0..KEYS).map(async |key| client.clone().get_lease(large(&format!("many/{key:02}"))).await);
    let one = (0..KEYS).map(async |_| client.clone().get_lease(large("one").shared(0)).await);
    for held in [join_all(many).await, join_all(one).await] {
        held.into_iter().for_each(|held| drop(held.unwrap()));
    }

    let list = async |prefix| client.clone().list(asking(prefix)).await.unwrap().into_inner();
    // Small answers leave the turns of the daemon to others.
    let small = untaken(&daemon, "many/00").await;
    assert_eq!(list("many/").await.leases.len(), KEYS);
    drop(small);

    let mut rounds = 0;
    loop {
        let mut untaken = untaken(&daemon, "").await;
        let first = list("many/").await;
        let keys: Vec<KeyInfo> = holder.list("many/").stream().map(Result::unwrap).collect().await;
        assert!(keys.into_iter().map(|info| info.key).eq((0..KEYS).map(|key| format!("many/{key:02}"))));
        let pages = [first, list("many/").await];
        // On a busy machine some turns may have been given up before.
        let had_none = pages.iter().all(|page| page.leases.len() < KEYS);
        if had_none && !untaken.iter_mut().any(was_reset) {
            for page in pages {
                assert!(!page.leases.is_empty() && page.encoded_len() <= 64 * 1024);
                assert_eq!(page.next_page_token, page.leases[page.leases.len() - 1].key);
            }
            // A record that is too large for a short page waits for a turn.
            assert_eq!(list("one").await.leases[0].holders.len(), KEYS);
            assert!(untaken.iter_mut().any(was_reset));
            break;
        }
        rounds += 1;
        assert!(rounds < 5, "a listing waits until others are given up");
    }
}

#[rstest]
#[tokio::test]
async fn a_key_with_many_holders_is_shown_whole(#[values(Embedded, MongoDb)] home: Home) {
    let daemon = Daemon::start(home).await;
    let client = daemon.client().await;
    let holds = (0..KEYS).map(async |_| client.clone().get_lease(large("crowded").shared(0)).await);
    join_all(holds).await.into_iter().for_each(|held| drop(held.unwrap()));
    // More at once than have their turn.
    for lease in join_all((0..12).map(async |_| client.clone().look("crowded").await)).await {
        let holders = lease.unwrap().holders;
        assert_eq!(holders.len(), KEYS);
        assert!(holders.iter().all(|holder| holder.metadata["x"].len() == 4000));
    }
}

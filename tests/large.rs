//! Large answers, and callers who do not take them.

use std::collections::HashMap;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::join_all;
use futures_util::stream::{FuturesUnordered, StreamExt};
use h2::client::SendRequest;
use h2::{Reason, RecvStream};
use http::Request;
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

/// A connection whose peer takes nothing of what it is answered, and answers pings.
async fn taking_nothing(daemon: &Daemon) -> SendRequest<Bytes> {
    let stream = TcpStream::connect(daemon.grpc).await.unwrap();
    let (calls, connection) =
        h2::client::Builder::new().initial_window_size(0).handshake(stream).await.unwrap();
    tokio::spawn(connection);
    calls
}

async fn list(calls: &SendRequest<Bytes>) -> h2::client::ResponseFuture {
    let request = Request::post("http://leased/leased.v1.LeaseService/List")
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    let mut calls = calls.clone().ready().await.unwrap();
    let (answer, mut body) = calls.send_request(request.body(()).unwrap(), false).unwrap();
    let message = ListRequest { page_size: 1000, ..ListRequest::default() }.encode_to_vec();
    let prefix = [&[0][..], &u32::try_from(message.len()).unwrap().to_be_bytes()].concat();
    body.send_data([prefix, message].concat().into(), true).unwrap();
    answer
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
        heads.push(list(&calls).await);
    }
    let mut untaken: Vec<RecvStream> = Vec::new();
    for _ in 0..4 {
        untaken.push(heads.next().await.unwrap().unwrap().into_body());
    }
    // The lists of another connection do not wait for these, and take turns among themselves.
    let request = ListRequest { page_size: 1000, ..ListRequest::default() };
    let lists = (0..12).map(async |_| client.clone().list(request.clone()).await);
    for page in join_all(lists).await {
        assert_eq!(page.unwrap().into_inner().leases.len(), KEYS);
    }

    // The fifth has its turn when one of the first four was given up.
    timeout(PATIENCE, heads.next()).await.unwrap().unwrap().unwrap();
    assert!(untaken.iter_mut().any(was_reset));
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

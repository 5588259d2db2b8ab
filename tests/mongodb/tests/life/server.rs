//! The single server: started, paused, killed, restarted, stopped, dropped, shared.

use std::process::Command;
use std::time::Duration;

use mongodb::Client;
use mongodb::bson::{Document, doc};
use throwaway_mongodb::{Mongod, shared};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::traces::{Traces, address, hello, until_refused};

#[tokio::test]
async fn a_set_of_one_node_has_a_primary_and_a_standalone_has_no_set_name() {
    let (set, standalone) = tokio::try_join!(Mongod::start(), Mongod::standalone()).unwrap();
    assert_eq!(address(set.uri()), format!("127.0.0.1:{}", set.port()));
    let set = hello(set.uri()).await;
    assert_eq!(set.get_str("setName").unwrap(), "rs0");
    assert!(set.get_bool("isWritablePrimary").unwrap());
    assert!(!hello(standalone.uri()).await.contains_key("setName"));
}

#[tokio::test]
async fn a_paused_server_answers_only_when_it_is_resumed() {
    let mongod = Mongod::start().await.unwrap();
    mongod.pause().unwrap();
    let mut answer = Box::pin(hello(mongod.uri()));
    assert!(timeout(Duration::from_millis(300), &mut answer).await.is_err());
    mongod.resume().unwrap();
    answer.await;
}

#[tokio::test]
async fn a_stopped_server_leaves_no_process_and_no_folder() {
    let mongod = Mongod::start().await.unwrap();
    let traces = Traces::of(mongod.uri()).await;
    mongod.stop().await.unwrap();
    assert!(!traces.folder.exists());
    traces.until_gone().await;
}

#[tokio::test]
async fn a_server_that_is_dropped_while_paused_leaves_no_process_and_no_folder() {
    let mongod = Mongod::start().await.unwrap();
    let traces = Traces::of(mongod.uri()).await;
    mongod.pause().unwrap();
    drop(mongod);
    traces.until_gone().await;
}

#[tokio::test]
async fn a_server_that_is_dropped_after_it_was_killed_leaves_no_folder() {
    let mut mongod = Mongod::start().await.unwrap();
    let traces = Traces::of(mongod.uri()).await;
    mongod.kill().unwrap();
    assert!(mongod.pid().is_none() && traces.folder.exists());
    drop(mongod);
    traces.until_gone().await;
}

#[tokio::test]
async fn a_killed_server_can_be_restarted_on_its_port_with_its_data() {
    let mut mongod = Mongod::start().await.unwrap();
    let (uri, first) = (mongod.uri().to_owned(), mongod.pid());
    let things = Client::with_uri_str(&uri).await.unwrap().database("test").collection::<Document>("things");
    things.insert_one(doc! { "_id": 1 }).await.unwrap();
    mongod.kill().unwrap();
    assert!(TcpStream::connect(address(&uri)).await.is_err());
    mongod.restart().await.unwrap();
    assert!(mongod.uri() == uri && mongod.pid() != first);
    assert_eq!(things.count_documents(doc! {}).await.unwrap(), 1);
}

#[test]
fn a_shared_server_outlives_the_runtimes_that_ask_for_it() {
    let ask = || tokio::runtime::Runtime::new().unwrap().block_on(shared()).unwrap();
    let uris: Vec<&str> = std::thread::scope(|scope| {
        let asking: Vec<_> = (0..8).map(|_| scope.spawn(ask)).collect();
        asking.into_iter().map(|one| one.join().unwrap()).collect()
    });
    assert!(uris.iter().all(|uri| *uri == uris[0]), "{uris:?}");
    tokio::runtime::Runtime::new().unwrap().block_on(hello(uris[0]));
    println!("shared {}", uris[0]);
}

/// Runs the test of a shared server in another process, and returns the URI that the test prints.
fn shared_elsewhere(named: Option<&str>) -> String {
    let mut tests = Command::new(std::env::current_exe().unwrap());
    tests.args(["--exact", "server::a_shared_server_outlives_the_runtimes_that_ask_for_it", "--nocapture"]);
    tests.env_remove("LEASED_TEST_MONGODB_URI");
    tests.envs(named.map(|uri| ("LEASED_TEST_MONGODB_URI", uri)));
    let said = String::from_utf8(tests.output().unwrap().stdout).unwrap();
    said.split_whitespace().skip_while(|word| *word != "shared").nth(1).unwrap().to_owned()
}

#[tokio::test]
async fn a_shared_server_ends_with_its_process_although_nothing_drops_it() {
    until_refused(&shared_elsewhere(None)).await;
}

#[tokio::test]
async fn a_server_named_in_the_environment_is_shared_instead() {
    let mongod = Mongod::standalone().await.unwrap();
    assert_eq!(shared_elsewhere(Some(mongod.uri())), mongod.uri());
    hello(mongod.uri()).await;
}

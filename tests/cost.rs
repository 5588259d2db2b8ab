//! How many database commands an operation takes, as MongoDB's profiler counts them.

use leased_client::v1::LeaseRef;
use mongodb::bson::{Document, doc};
use tokio::task::JoinSet;

use crate::keepalive::{KeepAlive, kept};
use crate::support::{AcquireBuilder, Calls, Daemon, MongoDb, acquire, secs, until_queued};

/// Records the commands on a daemon's collection.
pub(crate) struct Profile(mongodb::Database);

impl Profile {
    pub(crate) async fn start(daemon: &Daemon) -> Self {
        let database = daemon.database().await;
        database.run_command(doc! { "profile": 2 }).await.unwrap();
        Self(database)
    }

    pub(crate) async fn stop(self, daemon: &Daemon) -> Vec<Document> {
        self.0.run_command(doc! { "profile": 0 }).await.unwrap();
        let namespace = format!("{}.{}", self.0.name(), daemon.location().collection);
        let mut found =
            self.0.collection::<Document>("system.profile").find(doc! { "ns": namespace }).await.unwrap();
        let mut commands = Vec::new();
        while found.advance().await.unwrap() {
            let command = found.deserialize_current().unwrap();
            // MongoDB profiles an update twice: as a statement, and as the command around it.
            if command.get_str("op").unwrap() != "update" {
                commands.push(command);
            }
        }
        commands
    }
}

#[tokio::test]
async fn a_single_acquire_takes_one_round_trip() {
    let daemon = Daemon::start(MongoDb).await;
    let mut client = daemon.client().await;
    let profile = Profile::start(&daemon).await;
    client.get_lease(acquire("new")).await.unwrap();
    let commands = profile.stop(&daemon).await;
    assert_eq!(commands.len(), 1, "{commands:?}");
    assert!(commands[0].get_document("command").unwrap().contains_key("findAndModify"));
}

#[tokio::test]
async fn a_keepalive_message_that_names_200_leases_takes_one_batch() {
    let daemon = Daemon::start(MongoDb).await;
    let mut client = daemon.client().await;
    let mut callers = JoinSet::new();
    for number in 0..200 {
        let mut client = client.clone();
        callers.spawn(async move {
            client.get_lease(acquire(&format!("key/{number}")).ttl(secs(60))).await.unwrap()
        });
    }
    let leases: Vec<LeaseRef> =
        callers.join_all().await.into_iter().filter_map(|granted| granted.lease).collect();
    let mut stream = KeepAlive::open(&mut client).await;
    let profile = Profile::start(&daemon).await;
    let results = stream.touch(&leases).await;
    let commands = profile.stop(&daemon).await;
    assert_eq!(results.len(), 200);
    for (_, outcome) in &results {
        kept(outcome);
    }
    assert!(commands.len() <= 2, "an update and a find, not {}", commands.len());
}

#[tokio::test]
async fn refusing_256_calls_for_one_key_takes_fewer_than_40_commands() {
    let daemon = Daemon::start(MongoDb).await;
    let client = daemon.client().await;
    client.clone().get_lease(acquire("job").ttl(secs(60))).await.unwrap();
    let profile = Profile::start(&daemon).await;
    let mut crowd = JoinSet::new();
    for _ in 0..256 {
        let mut client = client.clone();
        crowd.spawn(async move { client.get_lease(acquire("job")).await.is_ok() });
    }
    assert!(crowd.join_all().await.into_iter().all(|granted| !granted));
    let commands = profile.stop(&daemon).await;
    assert!((1..40).contains(&commands.len()), "{} commands", commands.len());
}

#[tokio::test]
async fn ten_releases_with_a_long_queue_take_at_most_20_commands() {
    let daemon = Daemon::start(MongoDb).await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(acquire("job").ttl(secs(600))).await.unwrap().lease.unwrap();
    let mut queue = JoinSet::new();
    for _ in 0..5 {
        // A connection may have 256 open calls.
        let client = daemon.client().await;
        for _ in 0..200 {
            let mut client = client.clone();
            queue.spawn(async move {
                client.get_lease(acquire("job").ttl(secs(600)).wait(secs(600))).await.unwrap()
            });
        }
    }
    until_queued(&mut client, "job", 1000).await;
    let profile = Profile::start(&daemon).await;
    client.give_back(&lease).await.unwrap();
    let mut last = queue.join_next().await.unwrap().unwrap();
    for _ in 0..9 {
        client.give_back(&last.lease.unwrap()).await.unwrap();
        last = queue.join_next().await.unwrap().unwrap();
    }
    let commands = profile.stop(&daemon).await;
    // Ten releases, and an occasional command that refreshes all waiter entries.
    assert!(commands.len() <= 20, "{} commands", commands.len());
}

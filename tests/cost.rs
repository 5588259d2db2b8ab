//! What things cost in commands to the database, counted by its own profiler.

use leased_client::v1::LeaseRef;
use mongodb::bson::{Document, doc};
use tokio::task::JoinSet;

use crate::keepalive::{KeepAlive, kept};
use crate::support::{Asking, Calls, Daemon, MongoDb, ask, line_of, secs};

/// Counts the commands on a daemon's collection from here on.
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
            // An update is profiled twice: as a statement and as the command around it.
            if command.get_str("op").unwrap() != "update" {
                commands.push(command);
            }
        }
        commands
    }
}

#[tokio::test]
async fn a_lone_acquire_takes_one_round_trip() {
    let daemon = Daemon::start(MongoDb).await;
    let mut client = daemon.client().await;
    let profile = Profile::start(&daemon).await;
    client.get_lease(ask("new")).await.unwrap();
    let commands = profile.stop(&daemon).await;
    assert_eq!(commands.len(), 1, "{commands:?}");
    assert!(commands[0].get_document("command").unwrap().contains_key("findAndModify"));
}

#[tokio::test]
async fn a_keepalive_message_naming_200_leases_costs_one_batch() {
    let daemon = Daemon::start(MongoDb).await;
    let mut client = daemon.client().await;
    let mut callers = JoinSet::new();
    for number in 0..200 {
        let mut client = client.clone();
        callers.spawn(
            async move { client.get_lease(ask(&format!("key/{number}")).ttl(secs(60))).await.unwrap() },
        );
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
async fn a_crowd_of_256_costs_a_handful_of_commands() {
    let daemon = Daemon::start(MongoDb).await;
    let client = daemon.client().await;
    client.clone().get_lease(ask("job").ttl(secs(60))).await.unwrap();
    let profile = Profile::start(&daemon).await;
    let mut crowd = JoinSet::new();
    for _ in 0..256 {
        let mut client = client.clone();
        crowd.spawn(async move { client.get_lease(ask("job")).await.is_ok() });
    }
    assert!(crowd.join_all().await.into_iter().all(|granted| !granted));
    let commands = profile.stop(&daemon).await;
    assert!((1..40).contains(&commands.len()), "{} commands", commands.len());
}

#[tokio::test]
async fn a_release_in_front_of_a_long_line_costs_as_much_as_in_front_of_one() {
    let daemon = Daemon::start(MongoDb).await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(ask("job").ttl(secs(600))).await.unwrap().lease.unwrap();
    let mut line = JoinSet::new();
    for _ in 0..5 {
        // A connection takes 256 calls.
        let client = daemon.client().await;
        for _ in 0..200 {
            let mut client = client.clone();
            line.spawn(
                async move { client.get_lease(ask("job").ttl(secs(600)).wait(secs(600))).await.unwrap() },
            );
        }
    }
    line_of(&mut client, "job", 1000).await;
    let profile = Profile::start(&daemon).await;
    client.give_back(&lease).await.unwrap();
    let mut last = line.join_next().await.unwrap().unwrap();
    for _ in 0..9 {
        client.give_back(&last.lease.unwrap()).await.unwrap();
        last = line.join_next().await.unwrap().unwrap();
    }
    let commands = profile.stop(&daemon).await;
    // Ten releases, and now and then a refresh of all places in one edit.
    assert!(commands.len() <= 20, "{} commands", commands.len());
}

//! How a daemon on MongoDB and its MongoDB driver end.

use std::io::Read;

use leased_proto::v1::{GetRequest, ListRequest};
use mongodb::Client;
use mongodb::bson::doc;
use throwaway_mongodb::Mongod;

use crate::support::{Running, daemon};

const ROUNDS: i64 = 5;

/// Returns how often clients of the driver have ended their sessions. A client does so once, when it
/// is shut down.
async fn ended_sessions(admin: &mongodb::Database) -> i64 {
    let status = admin.run_command(doc! { "serverStatus": 1 }).await.unwrap();
    let commands = status.get_document("metrics").unwrap().get_document("commands").unwrap();
    commands.get_document("endSessions").unwrap().get_i64("total").unwrap()
}

#[tokio::test]
async fn every_client_of_the_driver_is_shut_down_before_the_process_ends() {
    let mongod = Mongod::start().await.unwrap();
    let admin = Client::with_uri_str(mongod.uri()).await.unwrap().database("admin");
    let before = ended_sessions(&admin).await;
    for _ in 0..ROUNDS {
        let folder = tempfile::tempdir().unwrap();
        let mut command = daemon(&["--mongodb-uri", mongod.uri()]);
        command.current_dir(folder.path());
        let mut running = Running::spawn(command).ready();
        let mut client = running.client().await;
        client.get(GetRequest { key: "unknown".to_owned() }).await.unwrap_err();
        client.list(ListRequest::default()).await.unwrap();
        running.signal("TERM");
        assert_eq!(running.code(), Some(0));
        let mut stderr = String::new();
        running.child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        assert!(!stderr.contains("panic"), "{stderr}");
    }
    // The daemon has two clients: one for commits, and one for Get and List.
    assert_eq!(ended_sessions(&admin).await - before, 2 * ROUNDS);
}

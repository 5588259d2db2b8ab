//! The process, the port and the folder of a server. They exist while it runs, and none of them may
//! outlive it.

use std::path::PathBuf;
use std::time::Duration;

use mongodb::Client;
use mongodb::bson::{Document, doc};
use rustix::process::{Pid, Signal, getpgid, kill_process, kill_process_group, test_kill_process};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

/// The traces of one server.
pub(crate) struct Traces {
    pub(crate) address: String,
    process: Pid,
    pub(crate) folder: PathBuf,
}

impl Traces {
    /// Asks the server at `uri` for its traces.
    pub(crate) async fn of(uri: &str) -> Self {
        let admin = Client::with_uri_str(uri).await.unwrap().database("admin");
        let status = admin.run_command(doc! { "serverStatus": 1 }).await.unwrap();
        let process = Pid::from_raw(i32::try_from(status.get_i64("pid").unwrap()).unwrap()).unwrap();
        let options = admin.run_command(doc! { "getCmdLineOpts": 1 }).await.unwrap();
        let storage = options.get_document("parsed").unwrap().get_document("storage").unwrap();
        let data = PathBuf::from(storage.get_str("dbPath").unwrap());
        Self { address: address(uri), process, folder: data.parent().unwrap().to_owned() }
    }

    /// Stops the process, and sends HUP to its process group, as the system does when the parent of
    /// a stopped process ends.
    pub(crate) fn pause_and_hang_up(&self) {
        kill_process(self.process, Signal::STOP).unwrap();
        kill_process_group(getpgid(Some(self.process)).unwrap(), Signal::HUP).unwrap();
    }

    /// Waits until no trace is left.
    pub(crate) async fn until_gone(&self) {
        until_refused(&format!("mongodb://{}/", self.address)).await;
        until(&self.folder.display().to_string(), async || {
            test_kill_process(self.process).is_err() && !self.folder.exists()
        })
        .await;
    }
}

/// Waits until no server listens at the URI.
pub(crate) async fn until_refused(uri: &str) {
    until(uri, async || TcpStream::connect(address(uri)).await.is_err()).await;
}

async fn until(what: &str, holds: impl AsyncFn() -> bool) {
    let wait = async {
        while !holds().await {
            sleep(Duration::from_millis(20)).await;
        }
    };
    assert!(timeout(Duration::from_secs(30), wait).await.is_ok(), "{what} is still there");
}

/// Returns the host and port of a URI.
pub(crate) fn address(uri: &str) -> String {
    uri.trim_start_matches("mongodb://").split('/').next().unwrap().to_owned()
}

pub(crate) async fn hello(uri: &str) -> Document {
    let admin = Client::with_uri_str(uri).await.unwrap().database("admin");
    admin.run_command(doc! { "hello": 1 }).await.unwrap()
}

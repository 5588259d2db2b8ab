//! One server that a whole process shares: all tests of a binary use it, each with its own
//! database.

use std::env;
use std::sync::OnceLock;
use std::thread;

use anyhow::{Result, anyhow};
use tokio::sync::oneshot;

use crate::Mongod;

static SHARED: OnceLock<Result<String, String>> = OnceLock::new();

/// Returns the URI of a server that this process shares and that ends with the process.
/// `LEASED_TEST_MONGODB_URI` names another server to use instead.
///
/// # Errors
/// As [`Mongod::start`]. If the first call fails, all later calls fail with the same error.
pub async fn shared() -> Result<&'static str> {
    let shared = match SHARED.get() {
        Some(shared) => shared,
        None => start_on_thread().await?,
    };
    shared.as_deref().map_err(|error| anyhow!("{error}"))
}

/// Starts the server on its own thread and runtime, since the first caller's runtime may end long
/// before those of other callers.
async fn start_on_thread() -> Result<&'static Result<String, String>> {
    let (sender, receiver) = oneshot::channel();
    thread::spawn(move || sender.send(SHARED.get_or_init(start)));
    Ok(receiver.await?)
}

fn start() -> Result<String, String> {
    if let Ok(uri) = env::var("LEASED_TEST_MONGODB_URI") {
        return Ok(uri);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let start = runtime.map_err(anyhow::Error::from).and_then(|runtime| runtime.block_on(Mongod::start()));
    let mongod = start.map_err(|error| format!("{error:#}"))?;
    let uri = mongod.uri().to_owned();
    // The server must outlive every caller. Its guardian ends it together with this process.
    std::mem::forget(mongod);
    Ok(uri)
}

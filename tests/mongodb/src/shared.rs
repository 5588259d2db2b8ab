//! One server for all of a process: the tests of a binary share it and each use a database of their own.

use std::env;
use std::sync::OnceLock;
use std::thread;

use anyhow::{Result, anyhow};
use tokio::sync::oneshot;

use crate::Mongod;

static SHARED: OnceLock<Result<String, String>> = OnceLock::new();

/// The URI of a server that all of this process shares and that ends with it, or of the one that
/// `LEASED_TEST_MONGODB_URI` names.
///
/// # Errors
/// As [`Mongod::start`]; the first caller's failure is everyone's.
pub async fn shared() -> Result<&'static str> {
    let shared = match SHARED.get() {
        Some(shared) => shared,
        None => first().await?,
    };
    shared.as_deref().map_err(|error| anyhow!("{error}"))
}

/// On a thread of its own: whoever comes first may belong to a runtime that ends long before the others do.
async fn first() -> Result<&'static Result<String, String>> {
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
    // Never dropped: its guardian ends it together with this process.
    std::mem::forget(mongod);
    Ok(uri)
}

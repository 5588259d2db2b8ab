//! Waits for a lease, works under it for a while, and releases it. Stops at once when the lease is
//! lost.
//!
//! `cargo run -p leased-client --example hold -- KEY [SECONDS]`

use std::time::Duration;

use anyhow::Context;
use leased_client::{Client, DEFAULT_ENDPOINT, Error, FencingToken};
use tokio::time::sleep;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let key = arguments.next().context("usage: hold KEY [SECONDS]")?;
    let seconds = arguments.next().map_or(Ok(15), |text| text.parse())?;

    let client = Client::connect([DEFAULT_ENDPOINT]).await?;
    println!("waiting for {key}");
    let lease = client.acquire(key).ttl(Duration::from_secs(10)).wait(Duration::from_secs(600)).await?;
    println!("holding {} with fencing token {}", lease.key(), lease.token());

    let done = tokio::select! {
        done = lease.run(work(seconds, lease.token())) => done,
        interrupted = tokio::signal::ctrl_c() => Ok(interrupted?),
    };
    match done {
        Ok(()) => {
            lease.release().await?;
            println!("released");
            Ok(())
        }
        Err(error @ (Error::Lost(_) | Error::Jeopardy { .. } | Error::EndedLate { .. })) => {
            Err(error).context("stopped before the end")
        }
        Err(error) => Err(error.into()),
    }
}

/// Work that only one process may do at a time. Every resource that the work writes to should check
/// the token, and refuse a token that is older than one it has seen.
async fn work(seconds: u64, token: FencingToken) {
    for second in 1..=seconds {
        sleep(Duration::from_secs(1)).await;
        println!("{second} s of work under token {token}");
    }
}

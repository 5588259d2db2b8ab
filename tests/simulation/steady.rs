//! Programs with a single aim: to keep a lease, to have one revoked, or to get one soon.

use std::time::Duration;

use leased_client::{Client, FencingToken};
use tokio::time::sleep;

use super::history::{History, Mode, now};
use super::world::KEYS;
use crate::support::secs;

/// Holds the first key for as long as it can. Fails if it loses the lease.
pub(crate) async fn keep(client: Client, history: History, ttl: Duration) {
    let lease = client.acquire(KEYS[0]).ttl(ttl).wait(secs(10)).await.unwrap();
    let belief = history.believe("holder", KEYS[0], lease.token(), Mode::Exclusive);
    let end = lease.run(std::future::pending::<()>()).await;
    drop(belief);
    if let Err(error) = end {
        history.fail(now(), format_args!("the holder had to stop: {error}"));
    }
    std::future::pending::<()>().await;
}

/// Holds the first key until another client revokes the lease, after the time `at`. Fails if the
/// holder receives the loss later than `within` after the revocation.
pub(crate) async fn be_revoked(
    holder: Client,
    operator: Client,
    history: History,
    at: Duration,
    within: Duration,
) {
    let lease = holder.acquire(KEYS[0]).ttl(secs(30)).await.unwrap();
    sleep(at).await;
    let token: FencingToken = lease.token();
    let (revoked, told) = tokio::join!(
        async { (operator.revoke(KEYS[0], Some(token), "a test").await.unwrap(), now()) },
        async { (lease.lost_for_good().await, now()) }
    );
    assert_eq!(revoked.0, 1);
    assert_eq!(told.0, leased_client::Loss::Revoked);
    let elapsed = told.1.saturating_sub(revoked.1);
    if elapsed > within {
        history.fail(now(), format_args!("the revocation was reported after {elapsed:?}"));
    }
    history.done();
    std::future::pending::<()>().await;
}

/// Acquires `key`. Fails if that takes longer than `within`.
pub(crate) async fn probe(client: Client, history: History, key: &'static str, within: Duration) {
    let start = now();
    let lease = client.acquire(key).ttl(secs(1)).wait(secs(600)).await.unwrap();
    let elapsed = now() - start;
    if elapsed > within {
        history.fail(now(), format_args!("{key} was granted only after {elapsed:?}"));
    }
    lease.release().await.unwrap();
    history.done();
    std::future::pending::<()>().await;
}

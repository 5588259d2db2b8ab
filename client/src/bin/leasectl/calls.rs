//! The commands that print one answer and end.

use leased_client::{Client, FencingToken, KeyInfo};
use tokio_stream::StreamExt;

use crate::args::{AcquireArgs, LeaseArgs};
use crate::failure::Failure;
use crate::json::{Acquired, Key, Released, Revoked, Touched, milliseconds};
use crate::output::{Output, json};
use crate::signals::{ENDING, Signals};
use crate::{table, wait};

/// Acquires a lease that outlives leasectl, for another process to touch.
pub(crate) async fn acquire(client: &Client, args: AcquireArgs, output: &mut Output) -> Result<u8, Failure> {
    let mut signals = Signals::new(ENDING)?;
    let lease = wait::for_lease(client, args, &mut signals).await?;
    let (key, token, ttl) = (lease.key().to_owned(), lease.token(), lease.ttl());
    let id = lease.id().reveal();
    let acquired =
        Acquired { key: &key, lease_id: id.clone(), token: token.get(), ttl_ms: milliseconds(ttl) };
    let printed = output.answer(&acquired, || {
        let row = [table::plain(&key), token.to_string(), table::duration(ttl), id];
        table::rows(["KEY", "TOKEN", "TTL", "LEASE ID"], [row])
    });
    match printed {
        Ok(()) => {
            let _ = lease.detach();
            Ok(0)
        }
        // Without the id the lease cannot be released later, so it is released now.
        Err(failure) => {
            drop(lease);
            wait::settle(client, &mut signals).await?;
            Err(match failure {
                // Other commands do not fail when nobody reads their output. Here a script would go
                // on as if it had the lease.
                Failure::NobodyReads => Failure::Other(
                    "nothing reads standard output, so nobody has the lease id; the lease was released"
                        .to_owned(),
                ),
                failure => failure,
            })
        }
    }
}

/// Touches a lease.
pub(crate) async fn touch(client: &Client, lease: LeaseArgs, output: &mut Output) -> Result<u8, Failure> {
    let remaining = client.touch(&lease.key, lease.id()?).await?;
    let touched = Touched { key: &lease.key, remaining_ms: milliseconds(remaining) };
    output.answer(&touched, || {
        format!("{} lasts {} more", table::plain(&lease.key), table::duration(remaining))
    })?;
    Ok(0)
}

/// Releases a lease.
pub(crate) async fn release(client: &Client, lease: LeaseArgs, output: &mut Output) -> Result<u8, Failure> {
    client.release(&lease.key, lease.id()?).await?;
    let released = Released { key: &lease.key, released: true };
    output.answer(&released, || format!("{} is released", table::plain(&lease.key)))?;
    Ok(0)
}

/// Shows a key.
pub(crate) async fn get(client: &Client, key: &str, output: &mut Output) -> Result<u8, Failure> {
    let info = client.get(key).await?;
    output.answer(&Key::from(&info), || table::key(&info))?;
    Ok(0)
}

/// Lists keys.
pub(crate) async fn list(
    client: &Client,
    prefix: String,
    all: bool,
    output: &mut Output,
) -> Result<u8, Failure> {
    let mut list = client.list(prefix).page_size(1000);
    if all {
        list = list.include_free();
    }
    let mut keys = list.stream();
    if !output.is_json() {
        let keys: Vec<KeyInfo> = keys.collect::<Result<_, _>>().await?;
        output.line(&table::keys(&keys))?;
        return Ok(0);
    }
    let mut separator = "[";
    while let Some(info) = keys.try_next().await? {
        output.part(separator)?;
        output.part(&json(&Key::from(&info))?)?;
        separator = ",\n ";
    }
    output.line(if separator == "[" { "[]" } else { "]" })?;
    Ok(0)
}

/// Revokes leases.
pub(crate) async fn revoke(
    client: &Client,
    key: &str,
    token: Option<i64>,
    reason: &str,
    output: &mut Output,
) -> Result<u8, Failure> {
    let revoked = client.revoke(key, token.map(FencingToken::new), reason).await?;
    if revoked == 0 {
        return Err(Failure::Other(
            "nothing to revoke: no such lease is held; see `leasectl get`".to_owned(),
        ));
    }
    output.answer(&Revoked { key, revoked }, || match revoked {
        1 => "1 lease revoked".to_owned(),
        number => format!("{number} leases revoked"),
    })?;
    Ok(0)
}

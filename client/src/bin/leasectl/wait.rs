//! Acquires a lease, and shows the wait on a terminal. When a signal ends the wait, leasectl leaves
//! the queue, or releases the lease that it has just been granted.

use std::convert::Infallible;
use std::io::{IsTerminal, stderr};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};
use leased_client::{Client, Error, KeyInfo, Lease};
use tokio::time::{Instant, sleep};

use crate::args::{AcquireArgs, Wait};
use crate::failure::Failure;
use crate::owner;
use crate::signals::Signals;
use crate::table;
use crate::times::Times;

/// The wait of an acquire that tries once.
const TRY_ONCE: Wait = Wait::UpTo(Duration::ZERO);
/// Waits shorter than this are not shown.
const QUIET: Duration = Duration::from_millis(400);
/// How often the queue is read to show the wait.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Acquires the lease. Waits for it as long as `args` say.
pub(crate) async fn for_lease(
    client: &Client,
    args: AcquireArgs,
    signals: &mut Signals,
) -> Result<Lease, Failure> {
    refuse_deadlock(&args)?;
    let owner = args.owner.unwrap_or_else(owner::label);
    let until = match args.wait {
        Wait::UpTo(wait) => Some(Instant::now() + wait),
        Wait::Forever => None,
    };
    let mut acquire = client
        .acquire(&args.key)
        .ttl(args.ttl)
        .owner(&owner)
        .min_hold(args.min_hold)
        .margin(Times::of(args.ttl).margin);
    acquire.extend(args.metadata.into_iter().flatten());
    acquire = match args.wait {
        Wait::UpTo(wait) => acquire.wait(wait),
        Wait::Forever => acquire.wait_forever(),
    };
    if let Some(limit) = args.shared {
        acquire = acquire.shared(limit);
    }
    let granted = async {
        // Reports an outage at the start. The acquire itself waits through outages, and would not
        // report one before the end of the wait.
        if args.wait != TRY_ONCE
            && let Err(error @ (Error::Unavailable { .. } | Error::NotLeased { .. })) =
                client.get(&args.key).await
        {
            return Err(error);
        }
        acquire.await
    };
    let signal = tokio::select! {
        biased;
        lease = granted => return Ok(lease?),
        signal = signals.next() => signal,
        never = show(client, &args.key, &owner, until) => match never {},
    };
    // Leaves the queue, or releases the lease if it has just been granted.
    let second = settle(client, signals).await.err();
    Err(second.unwrap_or(Failure::Signal(signal)))
}

/// Waits until the dropped lease has been released. If a signal arrives before, the lease lapses at
/// the end of its TTL.
pub(crate) async fn settle(client: &Client, signals: &mut Signals) -> Result<(), Failure> {
    tokio::select! {
        biased;
        () = client.settle() => Ok(()),
        signal = signals.next() => Err(Failure::Signal(signal)),
    }
}

/// Refuses to wait for the key whose lease this process runs under: a command of `run` would wait
/// for itself.
fn refuse_deadlock(args: &AcquireArgs) -> Result<(), Failure> {
    let is_exclusive = args.shared.is_none();
    if is_exclusive
        && args.wait != TRY_ONCE
        && std::env::var_os("LEASED_KEY").is_some_and(|key| *key == *args.key)
    {
        let key = table::plain(&args.key);
        return Err(Failure::Usage(format!(
            "this command already runs under the lease of {key} (LEASED_KEY) and would wait for itself; \
             choose another key, or unset LEASED_KEY if that lease is in another store"
        )));
    }
    Ok(())
}

/// Shows the wait on a status line, if standard error is a terminal.
async fn show(client: &Client, key: &str, owner: &str, until: Option<Instant>) -> Infallible {
    if !stderr().is_terminal() {
        return std::future::pending().await;
    }
    sleep(QUIET).await;
    // `wide_msg` cuts the line to the width of the terminal, because a line that wraps is hard to
    // erase.
    let style = ProgressStyle::with_template("{spinner} {wide_msg}")
        .unwrap_or_else(|_| ProgressStyle::default_spinner());
    let line = ProgressBar::new_spinner().with_style(style).with_finish(ProgressFinish::AndClear);
    loop {
        let info = client.get(key).await.ok();
        let left = until.map(|until| until.saturating_duration_since(Instant::now()).as_secs());
        let left = left.map(|left| format!("; giving up in {}", table::duration(Duration::from_secs(left))));
        line.set_message(format!("{}{}", describe(key, owner, info.as_ref()), left.unwrap_or_default()));
        line.tick();
        sleep(POLL_INTERVAL).await;
    }
}

/// Describes who holds the key, and the position of `owner` in the queue.
fn describe(key: &str, owner: &str, info: Option<&KeyInfo>) -> String {
    let key = table::plain(key);
    let Some(info) = info else {
        return format!("waiting for {key}: no daemon answers");
    };
    let holders = match info.holders.as_slice() {
        [] => "blocked".to_owned(),
        holders => format!("held by {}", table::holders(holders)),
    };
    // Several waiters may have the same label. The last of them is the best guess for this process.
    let position = info.waiters.iter().rposition(|waiter| waiter.owner == owner);
    let position =
        position.map(|before| format!(", position {} of {} in the queue", before + 1, info.waiters.len()));
    format!("waiting for {key}: {holders}{}", position.unwrap_or_default())
}

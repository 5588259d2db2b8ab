//! A lease, waited for: with a line about the wait on a terminal, and without leaving anything behind when a signal ends it.

use std::convert::Infallible;
use std::io::{IsTerminal, stderr};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};
use leased_client::{Client, Error, KeyInfo, Lease};
use tokio::time::{Instant, sleep};

use crate::args::{Wait, Wish};
use crate::failure::Failure;
use crate::owner;
use crate::signals::Signals;
use crate::table;
use crate::times::Times;

/// Without a wait.
const TRY_ONCE: Wait = Wait::UpTo(Duration::ZERO);
/// A wait shorter than this needs no words.
const QUIET: Duration = Duration::from_millis(400);
/// Between looks at the line.
const LOOK: Duration = Duration::from_secs(1);

/// Waits for the lease.
pub(crate) async fn lease(client: &Client, wish: Wish, signals: &mut Signals) -> Result<Lease, Failure> {
    refuse_deadlock(&wish)?;
    let owner = wish.owner.unwrap_or_else(owner::label);
    let until = match wish.wait {
        Wait::UpTo(wait) => Some(Instant::now() + wait),
        Wait::Forever => None,
    };
    let mut acquire = client
        .acquire(&wish.key)
        .ttl(wish.ttl)
        .owner(&owner)
        .min_hold(wish.min_hold)
        .margin(Times::of(wish.ttl).margin);
    acquire.extend(wish.metadata.into_iter().flatten());
    acquire = match wish.wait {
        Wait::UpTo(wait) => acquire.wait(wait),
        Wait::Forever => acquire.wait_forever(),
    };
    if let Some(limit) = wish.shared {
        acquire = acquire.shared(limit);
    }
    let granted = async {
        // Whoever waits in line waits for daemons as well, for they come back. That there is none to begin with is told now.
        if wish.wait != TRY_ONCE
            && let Err(error @ (Error::Unavailable { .. } | Error::NotLeased { .. })) =
                client.get(&wish.key).await
        {
            return Err(error);
        }
        acquire.await
    };
    let signal = tokio::select! {
        biased;
        lease = granted => return Ok(lease?),
        signal = signals.next() => signal,
        never = show(client, &wish.key, &owner, until) => match never {},
    };
    // The place in line, or the lease that was granted just now.
    let second = settle(client, signals).await.err();
    Err(second.unwrap_or(Failure::Signal(signal)))
}

/// Waits until what was dropped has been given back, unless a signal ends that: then it runs out by itself.
pub(crate) async fn settle(client: &Client, signals: &mut Signals) -> Result<(), Failure> {
    tokio::select! {
        biased;
        () = client.settle() => Ok(()),
        signal = signals.next() => Err(Failure::Signal(signal)),
    }
}

/// A command that `run` has started would wait for the lease that it runs under.
fn refuse_deadlock(wish: &Wish) -> Result<(), Failure> {
    let is_exclusive = wish.shared.is_none();
    if is_exclusive
        && wish.wait != TRY_ONCE
        && std::env::var_os("LEASED_KEY").is_some_and(|key| *key == *wish.key)
    {
        let key = table::plain(&wish.key);
        return Err(Failure::Usage(format!(
            "this command already runs under the lease of {key} (LEASED_KEY) and would wait for itself; \
             take another key, or unset LEASED_KEY if it is another daemon's"
        )));
    }
    Ok(())
}

/// Shows how the wait goes, if anybody looks.
async fn show(client: &Client, key: &str, owner: &str, until: Option<Instant>) -> Infallible {
    if !stderr().is_terminal() {
        return std::future::pending().await;
    }
    sleep(QUIET).await;
    // Cut to the width of the terminal: what wraps is hard to erase.
    let style = ProgressStyle::with_template("{spinner} {wide_msg}")
        .unwrap_or_else(|_| ProgressStyle::default_spinner());
    let line = ProgressBar::new_spinner().with_style(style).with_finish(ProgressFinish::AndClear);
    loop {
        let info = client.get(key).await.ok();
        let left = until.map(|until| until.saturating_duration_since(Instant::now()).as_secs());
        let left = left.map(|left| format!("; giving up in {}", table::duration(Duration::from_secs(left))));
        line.set_message(format!("{}{}", standing(key, owner, info.as_ref()), left.unwrap_or_default()));
        line.tick();
        sleep(LOOK).await;
    }
}

/// Who holds the key, and how many come before `owner`.
fn standing(key: &str, owner: &str, info: Option<&KeyInfo>) -> String {
    let key = table::plain(key);
    let Some(info) = info else {
        return format!("waiting for {key}: no daemon answers");
    };
    let holders = match info.holders.as_slice() {
        [] => "blocked".to_owned(),
        holders => format!("held by {}", table::holders(holders)),
    };
    // Labels prove nothing: of several with the same, the last one may be this.
    let place = info.waiters.iter().rposition(|waiter| waiter.owner == owner);
    let place = place.map(|place| format!(", place {} of {} in line", place + 1, info.waiters.len()));
    format!("waiting for {key}: {holders}{}", place.unwrap_or_default())
}

//! The client of [leased](https://crates.io/crates/leased): acquire a lease, act on its key while
//! the lease is held, and stop when it is not.
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use leased_client::{Client, DEFAULT_ENDPOINT};
//!
//! # async fn write_report(_: leased_client::FencingToken) {}
//! #[tokio::main]
//! async fn main() -> Result<(), leased_client::Error> {
//!     let client = Client::connect([DEFAULT_ENDPOINT]).await?;
//!     let lease = client.acquire("reports/daily").wait(Duration::from_secs(60)).await?;
//!     // Drops the future as soon as the lease can no longer be relied on.
//!     lease.run(write_report(lease.token())).await?;
//!     lease.release().await
//! }
//! ```
//!
//! # The time contract
//!
//! The store's clock decides when a lease lapses. The holder's clock decides when the holder
//! stops relying on the lease. Where the platform allows it, the holder's clock includes the
//! time for which the machine was suspended. The daemon's clock decides nothing.
//!
//! A holder may rely on its lease until
//!
//! > `sent_at + remaining - margin`
//!
//! Here `sent_at` is the time on the holder's clock just *before* it sent the acquire or touch that
//! a daemon then confirmed. It is never the time at which the answer arrived. If the acquire waited
//! in a queue, the client first touches the lease, and counts from that touch. [`Lease`] keeps this
//! contract. [`Lease::is_held`], [`Lease::lost`], [`Lease::stop_token`] and [`Lease::run`] report
//! when the deadline has passed:
//!
//! ```text
//!        deadline passes            a daemon says so
//!  HELD ────────────────► JEOPARDY ────────────────► LOST (displaced, revoked, released, gone)
//!    ▲                        │                        ▲
//!    └────────────────────────┘                        │
//!     a touch is confirmed after all                    └── also straight from HELD
//! ```
//!
//! # What is promised, and what is not
//!
//! Promised, as long as the clocks of the store's machines differ by no more than the grace period:
//!
//! - While a holder relies on an exclusive lease, no other holder relies on a lease of the same
//!   key.
//! - A holder keeps its lease through an outage of all daemons that is shorter than half of the
//!   TTL.
//! - A [`Lease`] or the future of an acquire that is dropped blocks its key for no longer than the
//!   TTL, or its [`min_hold`](Acquire::min_hold) if that is longer. If the future was waiting and
//!   no daemon can be reached, its entry in the queue lasts for about 15 s, and may be granted the
//!   lease in that time.
//!
//! No lease service can promise that a paused process does nothing when it resumes. Minutes may
//! pass between a call of [`Lease::is_held`] and the write that follows it. So send
//! [`Lease::token`] along with each write, and let the resource refuse stale tokens.
//! [`FencingGuard`] does that in memory, and `docs/fencing.md` shows it for databases and object
//! stores.
//!
//! # What a client does in the background
//!
//! A [`Client`] keeps all its leases alive with one task and one stream. It names a new lease on
//! the stream at once, so that the daemon can report its loss at once. It touches each lease every
//! third of its TTL, and leases that are due at about the same time share a message. When the
//! stream breaks or falls silent, the client opens the next one over a new connection, to whichever
//! daemon answers. The leases stay valid meanwhile. The program has no channel of events to drain
//! and no callback that must return in time.
//!
//! A client has one connection for its leases, one for other calls, and one for every 200 acquires
//! that wait. It uses one of several daemons at a time. When that daemon fails, the client switches
//! to another. It returns within a few minutes after the first daemon serves again.
//!
//! # What is not stopped
//!
//! [`Lease::run`] drops its future when the lease can no longer be relied on. That stops only what
//! the future awaits. Code that blocks the thread, spawned tasks, `spawn_blocking`, threads and
//! processes continue. Have them check [`Lease::stop_token`] or [`Lease::is_held`] between their
//! steps, and send the token with every write.

#![warn(missing_debug_implementations)]

// The public API.

/// The client: all calls start here.
mod client;
/// Configures a client and its daemons.
mod builder;
/// Acquires a lease: options, waiting, retries.
mod acquire;
/// The guard of a lease: runs work under it, and reports its loss.
mod lease;
/// Fencing tokens, and the check that a resource makes.
mod token;
/// Lease ids: secrets that name one acquisition.
mod id;
/// Keys with their holders and waiters.
mod info;
/// Lists keys.
mod list;
/// Watches keys.
mod watch;
/// Errors, and what a failed attempt means for its call.
mod error;

// How leases are kept alive.

/// The time contract as arithmetic. Pure.
mod belief;
/// The clock of the time contract.
mod boot_instant;
/// One lease that the client holds.
mod holding;
/// All leases of a client, and when each is due.
mod holdings;
/// Keeps all leases alive on one stream.
mod keeper;
/// The daemons of a client: chooses one for each call, and retries calls that fail.
mod endpoints;
/// One daemon and the connections to it.
mod daemon;
/// Locks a mutex.
mod lock;
/// For tests: a daemon behind an in-memory network.
#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test that meets an unexpected failure should stop there")]
mod peer;

use std::time::Duration;

pub use acquire::Acquire;
pub use belief::{Loss, State};
#[doc(hidden)]
pub use boot_instant::run_on_timers_alone;
pub use builder::Builder;
pub use client::Client;
pub use error::{Error, HeldBy};
pub use id::{InvalidLeaseId, LeaseId};
pub use info::{HolderInfo, KeyInfo, KeyState, Mode, WaiterInfo};
pub use lease::{Lease, StateWatch};
pub use leased_proto::{Reason, v1};
pub use list::List;
pub use token::{FencingGuard, FencingToken, StaleToken};
pub use watch::{ChangeKind, Watch, WatchEvent};

/// Where a daemon listens by default.
pub const DEFAULT_ENDPOINT: &str = "http://127.0.0.1:5327";

/// How long a lease lasts without a touch by default.
const DEFAULT_TTL: Duration = Duration::from_secs(30);

//! The holder's side of [leased](https://crates.io/crates/leased): acquire a lease, act on its key while it is held, stop when
//! it is not.
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
//!     // Stopped at once when the lease cannot be relied on any more.
//!     lease.run(write_report(lease.token())).await?;
//!     lease.release().await
//! }
//! ```
//!
//! # The time contract
//!
//! Three clocks have one job each. The store's decides when a lease runs out. The holder's monotonic clock, which goes on while
//! the machine is suspended where the platform can tell, decides when the holder stops believing. The daemon's decides
//! nothing.
//!
//! A lease may be believed in until
//!
//! > `sent_at + remaining - margin`
//!
//! where `sent_at` is this process's clock just *before* it sent the acquire or touch that was then confirmed, never the time
//! of the answer. A grant after waiting starts no belief: it is confirmed by a touch first. [`Lease`] keeps this contract, and
//! tells by [`Lease::is_held`], [`Lease::lost`], [`Lease::stop_token`] and [`Lease::run`] when the deadline has passed:
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
//! Promised, while the clocks of the store's machines differ by no more than its grace: two holders of an exclusive lease never
//! believe in it at the same time. A holder keeps its lease through an outage of all daemons that is shorter than half of
//! the TTL. Whoever drops a [`Lease`], or the future that would have acquired one, leaves nothing behind that
//! outlasts the TTL; or, if that future waited in line and no daemon can be told, the TTL and some 15 s before it, for which
//! the place in line lasts.
//!
//! Not promised, here or by any other lease service: that a process which is paused at the wrong moment does nothing when it
//! goes on. Between a look at [`Lease::is_held`] and the write that follows there may lie a pause of minutes. So send
//! [`Lease::token`] along with each write, and let the resource refuse what is stale: [`FencingGuard`], and
//! `docs/fencing.md` for databases and object stores.
//!
//! # What a client does in the background
//!
//! One task and one stream for all leases of a [`Client`]. A new lease is named on the stream at once, so that its loss is told
//! at once, and touched every third of its TTL; those that are due at about the same time share a message. When the stream breaks
//! or falls silent, the next one is opened over a new connection at whichever daemon answers, and the leases live on meanwhile.
//! There is no channel to drain and no callback to return from.
//!
//! A client has a connection for its leases, one for other calls, and one for every 200 acquires that wait. Of several daemons it
//! asks one; when that fails it turns to another, and it comes back to the first within some minutes.
//!
//! # What is not stopped
//!
//! [`Lease::run`] drops its future when the lease cannot be relied on any more. That stops what the future awaits, and nothing
//! else: code that blocks the thread, spawned tasks, `spawn_blocking`, threads and processes go on. Such work looks at
//! [`Lease::stop_token`] or [`Lease::is_held`] between its steps, and sends the token with what it writes.

#![warn(missing_debug_implementations)]

// What a program deals with.

/// Asking for a lease.
mod acquire;
/// Making a client.
mod builder;
/// Whom to ask, and about what.
mod client;
/// What can go wrong.
mod error;
/// Names of acquisitions.
mod id;
/// Keys as anyone may see them.
mod info;
/// Holding a lease.
mod lease;
/// Listing keys.
mod list;
/// Fencing.
mod token;
/// Watching keys.
mod watch;

// What goes on behind it.

/// The time contract, as arithmetic.
mod belief;
/// One daemon, and the connections to it.
mod daemon;
/// The daemons to ask.
mod endpoints;
/// One lease.
mod holding;
/// All leases, and when each is due.
mod holdings;
/// The stream that keeps them alive.
mod keeper;
/// The holder's clock.
mod moment;
/// Looking up names.
mod names;
/// For tests: the other end.
#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test that meets an unexpected failure should stop there")]
mod peer;

use std::time::Duration;

pub use acquire::Acquire;
pub use belief::{Loss, State};
pub use builder::Builder;
pub use client::Client;
pub use error::{Error, HeldBy};
pub use id::{InvalidLeaseId, LeaseId};
pub use info::{HolderInfo, KeyInfo, KeyState, Mode, WaiterInfo};
pub use lease::{Lease, StateWatch};
pub use leased_proto::{Reason, v1};
pub use list::List;
#[doc(hidden)]
pub use moment::run_on_timers_alone;
pub use token::{FencingGuard, FencingToken, StaleToken};
pub use watch::{ChangeKind, Watch, WatchEvent};

/// Where a daemon with default settings listens.
pub const DEFAULT_ENDPOINT: &str = "http://127.0.0.1:5327";

/// How long a lease lasts without a touch if nobody says otherwise.
const DEFAULT_TTL: Duration = Duration::from_secs(30);

//! The holder's side of leased: for now the generated client, and where to find the daemon.
//!
//! [`v1::lease_service_client::LeaseServiceClient`] speaks the API as it is. `examples/hold.rs` shows how a program
//! holds a lease with it and keeps the time contract: it stops acting on the key at `sent_at + remaining - margin`,
//! where `sent_at` is its own monotonic clock just before it sent the request that was then confirmed.

pub use leased_proto::{Reason, v1};

/// Where a daemon with default settings listens.
pub const DEFAULT_ENDPOINT: &str = "http://127.0.0.1:5327";

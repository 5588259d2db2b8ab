//! A real MongoDB replica set that lives exactly as long as the process that started it. Tests and
//! the benchmark use it, and people who try leased without an installed MongoDB.
//!
//! This crate does not depend on leased.

/// A guardian that ends a server with the process that started it.
mod guardian;
/// Finds or fetches a `mongod`.
mod locate;
/// One `mongod` process with its port and its data.
mod node;

/// A single server: a replica set of one node, or a standalone.
mod mongod;
/// Three servers that replicate each other.
mod replica_set;
/// One server that a whole process shares.
mod shared;

pub use guardian::Guardian;
pub use mongod::Mongod;
pub use replica_set::ReplicaSet;
pub use shared::shared;

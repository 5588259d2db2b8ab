//! A real MongoDB replica set that lives exactly as long as the process that started it. It serves
//! tests, the benchmark, and a first try without an installed MongoDB.
//!
//! This crate does not know what a lease is.

/// A guardian that ends a server with the process that started it.
mod guardian;
/// Finding a `mongod`, or fetching one.
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

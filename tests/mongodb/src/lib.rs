//! A real MongoDB replica set that lives exactly as long as the process that started it: for tests, for the
//! benchmark, and for a first try without installing anything.
//!
//! Knows nothing of leases.

/// The process and its end, whatever ends its parent.
mod guardian;
/// Finding a `mongod`, or fetching one.
mod locate;
/// One server, on its port and data.
mod node;

/// A server alone.
mod mongod;
/// Three servers that replicate each other.
mod replica_set;
/// One server for all of a process.
mod shared;

pub use guardian::Guardian;
pub use mongod::Mongod;
pub use replica_set::ReplicaSet;
pub use shared::shared;

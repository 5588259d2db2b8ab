//! What leased promises, tried over real gRPC against a real MongoDB. One binary; a module for each behaviour, a
//! database for each test.

#![expect(clippy::unwrap_used, reason = "a test that meets an unexpected failure should stop there")]

mod support;

/// Grants: one holder, rising tokens, repeatable calls.
mod acquire;
/// Giving back, and who is next.
mod release;
/// Renewing one lease.
mod touch;
/// Renewing leases on a stream.
mod keepalive;
/// Waiting in line, over one daemon and two.
mod queue;
/// Shared leases.
mod shared;
/// Looking at keys.
mod inspect;
/// Taking leases away.
mod revoke;
/// Requests that are wrong, and requests that only look so.
mod hostile;
/// Health, reflection, drain.
mod serving;
/// A store that fails, a document that vanishes, a daemon that ends.
mod faults;
/// What things cost in commands to the database.
mod cost;
/// Keys that nobody needs any more.
mod purge;

//! The server lives exactly as long as it should. Needs a `mongod`, and fetches one if there is none.

#![expect(clippy::unwrap_used, reason = "a test that meets an unexpected failure should stop there")]

/// The server as its owner sees it.
mod server;

/// Three servers and their failovers.
mod replica_set;

/// The command that gives another one a server.
mod command;
/// What must be gone when a server is.
mod traces;

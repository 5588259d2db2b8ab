//! Tests that a throwaway server lives exactly as long as the process that started it. They need a
//! `mongod`, and fetch one if there is none.

#![expect(clippy::unwrap_used, reason = "a test that meets an unexpected failure should stop there")]

/// The single server: started, paused, killed, restarted, stopped, dropped, shared.
mod server;

/// Three servers and their failovers.
mod replica_set;

/// The command that runs another command with a server.
mod command;
/// The process, the port and the folder of a server, none of which may outlive it.
mod traces;

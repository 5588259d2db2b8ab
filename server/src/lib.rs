//! The lease daemon, as a library for its binary and for tests that run it in-process.
//!
//! In reading order: the rules, where records live, the engine, what callers see, and what runs it all.
//! `ARCHITECTURE.md` draws the whole.

#![warn(missing_debug_implementations)]

/// The rules, pure.
pub mod lease;
/// The engine: batching, and the line of waiting calls.
pub mod lessor;
/// Where records live.
pub mod store;

/// The clock that counts suspension.
mod boot_instant;
/// The stream that keeps leases alive.
mod keepalive;
/// Requests, read and checked.
mod request;
/// The unary calls.
mod service;
/// The stream that shows what happens to keys.
mod watch;
/// What callers are told.
mod wire;

/// What counts, and what is shown of it.
mod meter;

/// Accepting connections.
mod accept;
/// What every call is given.
mod bounds;
/// Calls, counted.
mod calls;
/// Calls of the lease service past the routes.
mod express;
/// Whether this daemon should be asked.
mod health;
/// The HTTP side port.
mod http;
/// Serving connections.
mod listener;
/// What the system says of this process.
mod process;
/// What a request may take while it comes in.
mod receiving;
/// What an answer may take while it goes out.
mod sending;
/// Running the daemon.
pub mod server;
/// Which store answers.
mod stamp;
/// How the daemon stands.
mod standing;
/// What answers on keepalive streams take until they are taken.
mod untaken;

/// What was typed and what it means.
pub mod config;
/// What a panic may end.
pub mod panics;
/// Log lines.
pub mod telemetry;

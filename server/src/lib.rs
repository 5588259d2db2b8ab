//! The lease daemon, as a library for its binary and for tests that run it in-process.
//!
//! A call passes `transport`, `grpc`, `engine`, `store` and `lease`, in this order.
//! `ARCHITECTURE.md` draws the whole.

#![warn(missing_debug_implementations)]

/// The rules: how a record changes. Pure.
pub mod lease;
/// Where records live: the trait [`store::Store`], the embedded store and MongoDB.
pub mod store;
/// Turns calls into edits of records, batches the edits, and notifies whoever waits for a record.
pub mod engine;
/// The gRPC services: reads requests, calls the engine, writes responses.
mod grpc;
/// Connections: accepts and serves them, and bounds what each call may cost.
mod transport;
/// The metrics of one daemon.
mod metrics;

/// Runs the daemon: services, health, purge and drain.
pub mod server;
/// Command-line options, and the configuration they amount to.
pub mod config;
/// Log lines, written by a thread that nobody waits for.
pub mod telemetry;
/// Which part of the daemon a panic ends.
pub mod panics;
/// Whether this daemon should be asked: one source for all that say so.
mod health;
/// The HTTP side port: `/livez`, `/readyz` and `/metrics`.
mod http;
/// A clock that goes on while the machine is suspended.
mod boot_instant;

//! The lease daemon, as a library for its binary and for tests that run it in-process.
//!
//! A call passes `transport`, `grpc`, `engine`, `store` and `lease`, in this order.
//! `ARCHITECTURE.md` has the picture.

#![warn(missing_debug_implementations)]

/// The rules: how a record changes. Pure.
pub mod lease;
/// Stores records: the trait [`store::Store`], the embedded store and MongoDB.
pub mod store;
/// Turns calls into edits of records, commits the edits in batches, and passes the records on to
/// waiting calls, keepalive streams and watches.
pub mod engine;
/// The gRPC services: reads requests, calls the engine, writes responses.
mod grpc;
/// Connections: accepts and serves them, and bounds what each call may cost.
mod transport;
/// The metrics of one daemon.
mod metrics;

/// Runs the daemon: services, health, purge and drain.
pub mod server;
/// Command-line options, and the configuration made from them.
pub mod config;
/// Log lines, written by a thread of their own, so that logging never blocks.
pub mod telemetry;
/// Which part of the daemon a panic ends.
pub mod panics;
/// Whether the daemon is ready, for the health service, `/readyz` and the metrics.
mod health;
/// The HTTP side port: `/livez`, `/readyz` and `/metrics`.
mod http;
/// A clock that keeps running while the machine is suspended.
mod boot_instant;

//! The daemon as a process.

#![expect(clippy::unwrap_used, reason = "a test that meets an unexpected failure should stop there")]
#![expect(
    clippy::disallowed_methods,
    reason = "processes are watched from a plain thread, by the host's clock"
)]

mod support;

/// The ready line, the exit codes, the signals.
mod lifecycle;

/// What is refused before anyone is served.
mod start;

/// The end of a daemon on MongoDB, and of the driver with it.
mod endings;

/// Log lines and the ready line that nobody takes.
mod logging;

/// Signals, and limits that the system sets.
mod limits;

/// Panics.
mod panics;

/// The data of the embedded store: whose it is, and in which state.
mod data;

/// Killed at any moment, and short of room.
mod crash;

/// A data folder that is removed, replaced, unmounted or never finished.
mod volume;

/// What callers say, in the log.
mod logs;

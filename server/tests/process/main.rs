//! The daemon as a process.

#![expect(clippy::unwrap_used, reason = "a test that meets an unexpected failure should stop there")]
#![expect(
    clippy::disallowed_methods,
    reason = "processes are watched from a plain thread, by the host's clock"
)]

/// Daemons as processes, and calls to them.
mod support;

/// The ready line, the exit codes, and the signals that drain or end the daemon.
mod lifecycle;

/// Settings and stores that the daemon refuses at its start.
mod start;

/// How a daemon on MongoDB and its MongoDB driver end.
mod endings;

/// Log lines and a ready line that nobody reads.
mod logging;

/// Signals that do not end the daemon, and the system's limits on open files and threads.
mod limits;

/// Panics that are not contained.
mod panics;

/// The data file of the embedded store: in use, damaged, foreign, or from a newer version.
mod data;

/// A daemon that is killed at any moment, or whose disk is full.
mod crash;

/// A data folder that is removed, replaced, unmounted or incomplete.
mod volume;

/// Callers' text in the log.
mod logs;

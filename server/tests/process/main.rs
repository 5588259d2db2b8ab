//! The daemon as a process.

#![expect(clippy::unwrap_used, reason = "a test that meets an unexpected failure should stop there")]
#![expect(
    clippy::disallowed_methods,
    reason = "processes are watched from a plain thread, by the host's clock"
)]

mod support;

/// The ready line, the exit codes, and the signals that drain or end the daemon.
mod lifecycle;

/// Settings and stores that the daemon refuses at its start.
mod start;

/// The end of a daemon on MongoDB, and of the MongoDB driver within it.
mod endings;

/// Log lines and a ready line that nobody reads.
mod logging;

/// Signals without a meaning, and limits of the system on open files and threads.
mod limits;

/// Panics.
mod panics;

/// The data file of the embedded store: in use, damaged, foreign, or from a newer version.
mod data;

/// A daemon that is killed at any moment, or has no room on its disk.
mod crash;

/// A data folder that is removed, replaced, unmounted or incomplete.
mod volume;

/// Text of callers in the log.
mod logs;

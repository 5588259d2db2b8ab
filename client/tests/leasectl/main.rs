//! leasectl as a process, against daemons that also run as processes.

#![expect(clippy::unwrap_used, reason = "a test that meets an unexpected failure should stop there")]
#![expect(
    clippy::disallowed_methods,
    reason = "processes are watched from a plain thread, by the host's clock"
)]

mod support;

/// The commands that print one answer, for people and for scripts.
mod answers;

/// Failures: exit codes, and sentences that say what to do.
mod failures;

/// A command that runs under a lease that is not lost.
mod command;

/// A command whose lease is lost or in jeopardy.
mod lost;

/// A command at a terminal.
mod terminal;

/// Random trials: a command never runs past its lease.
mod trials;

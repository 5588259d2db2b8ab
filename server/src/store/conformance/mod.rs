//! One suite of tests for everything that applies the rules: the specification and both stores.

/// What applies edits: the specification, a store, or a mutant of either.
mod backends;

/// The rules, each as a test.
mod rules;

/// Random edits at random times: the stores must do what the specification does.
mod differential;

/// Commits, reads and listings.
pub(super) mod reading;

/// Damaged records must not affect other keys.
mod unreadable;

/// Purges.
mod purging;

/// Mutants of the rules. The tests must catch each of them.
pub(in crate::store) mod mutants;

//! One suite for all who apply the rules: the specification itself and both stores.

/// Where edits are applied, and a desk to apply them at.
mod backends;

/// The rules, one by one, as sentences.
mod rules;

/// Random edits at random times: the stores do what the specification does.
mod differential;

/// Commits, reads and listings.
pub(super) mod reading;

/// One record that cannot be read or written, among others.
mod unreadable;

/// Forgetting what nobody needs.
mod purging;

/// Deliberate wrongs, each of which a sentence notices.
pub(in crate::store) mod mutants;

//! The rules: what a lease is and how its record changes. Pure.
//!
//! This module uses no runtime, network, database or clock. `now` is always an argument, which the
//! caller reads from the store's clock.
//!
//! [`step`] is the specification. The embedded store runs `step` itself. The MongoDB store
//! expresses the same rules in an aggregation pipeline, and a differential test compares the two.

/// The key that is leased.
mod key;
/// The lease id and the fencing token.
mod id;
/// The name of a lease: its key and its id.
mod name;
/// Instants of the store's clock, and the TTL.
mod time;
/// The record of a key: holders, waiters, departures.
mod record;
/// The changes to one record that are committed together.
mod edit;
/// A list without duplicates, for the lists of an edit.
mod unique_list;
/// The specification: how an edit changes a record.
mod step;
/// What a record says: the standing of an id, the obstacle to an acquisition, the state of the key.
mod answer;

/// Invariants of the rules over random histories.
#[cfg(test)]
mod step_properties;
/// Commands that arrive late, repeated or out of order.
#[cfg(test)]
mod late_commands;

pub use answer::{Obstacle, Snapshot, Standing, State};
pub use edit::{Acquisition, Edit};
pub use id::{FencingToken, InvalidLeaseId, LeaseId};
pub use key::{InvalidKey, Key, MAX_KEY_BYTES};
pub use name::LeaseName;
pub use record::{Departure, Holder, Mode, NEVER_GRANTED, Reason, Record, Waiter};
pub use step::{
    LASTING_DEPARTURES, MAX_RECORD_BYTES, MAX_SHARED_HOLDERS, MAX_WAITERS, MEMORY, REMEMBERED_DEPARTURES,
    Rules, SETTLED_DEPARTURES, step,
};
pub(crate) use time::millis;
pub use time::{Timestamp, Ttl};

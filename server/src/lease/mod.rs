//! The rules, pure: what a lease is and how a record changes.
//!
//! Nothing here knows of a runtime, a wire, a database or a clock: `now` is always an argument, read from the
//! store's clock by whoever calls. [`step`] is the specification; a store either runs it or says the same thing in
//! its own language and is held to it by a differential test.

mod answer;
mod distinct;
mod edit;
mod id;
mod key;
#[cfg(test)]
mod late_commands;
mod record;
mod step;
#[cfg(test)]
mod step_properties;
mod time;

pub use answer::{Obstacle, Snapshot, Standing, State};
pub use edit::{Acquisition, Edit};
pub use id::{FencingToken, InvalidLeaseId, LeaseId};
pub use key::{InvalidKey, Key, MAX_KEY_BYTES};
pub use record::{Departure, Holder, Mode, NEVER_GRANTED, Reason, Record, Waiter};
pub use step::{
    LASTING_DEPARTURES, MAX_RECORD_BYTES, MAX_SHARED_HOLDERS, MAX_WAITERS, MEMORY, REMEMBERED_DEPARTURES,
    Rules, SETTLED_DEPARTURES, step,
};
pub(crate) use time::millis;
pub use time::{Timestamp, Ttl};

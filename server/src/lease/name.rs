//! The name of a lease.

use super::{Key, LeaseId};

/// Names one lease. The id alone does not: the same id on another key names another lease.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LeaseName {
    /// The key that is leased.
    pub key: Key,
    /// The id of the acquisition.
    pub id: LeaseId,
}

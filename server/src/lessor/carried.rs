//! The leases that keepalive streams carry.

use std::sync::Arc;

use tokio::time::Instant;

use crate::lease::{Key, LeaseId, Snapshot};

/// Leases carried by the streams of this daemon, by key.
#[derive(Debug, Default)]
pub(super) struct Carried {}

impl Carried {
    /// Takes note of a record that a commit of this daemon returned, which renewed `touched` and was sent after `sent_at`.
    pub(super) fn own(&self, _snapshot: &Arc<Snapshot>, _touched: &[LeaseId], _sent_at: Instant) {}

    /// Takes note of a record as others may have left it.
    pub(super) fn foreign(&self, _snapshot: &Arc<Snapshot>) {}

    /// Whether a stream carries a lease on this key and does not know the record as of `rev`.
    pub(super) fn wants(&self, _key: &Key, _rev: Option<i64>) -> bool {
        false
    }

    /// The keys on which streams carry leases.
    pub(super) fn keys(&self) -> Vec<Key> {
        Vec::new()
    }
}

//! Those who watch keys by prefix.

use std::sync::Arc;

use crate::lease::{Key, Snapshot};

/// The watchers of this daemon.
#[derive(Debug, Default)]
pub(super) struct Watchers {}

impl Watchers {
    pub(super) fn observe(&self, _snapshot: &Arc<Snapshot>) {}

    pub(super) fn missing(&self, _key: &Key) {}

    pub(super) fn wants(&self, _key: &Key, _rev: Option<i64>) -> bool {
        false
    }

    pub(super) fn rebuild(&self) {}
}

//! Logs records that cannot be read or written.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::StoreError;

/// The least time between two log lines. A caller may ask for the key of a damaged record any
/// number of times, so the log must not grow with the calls.
const PAUSE: Duration = Duration::from_secs(10);

static LOG: Mutex<Log> = Mutex::new(Log { next: None, left_out: 0 });

/// Decides which reports are written to the log.
#[derive(Debug)]
struct Log {
    /// When the next line may be written. `None`: at once.
    next: Option<Instant>,
    /// The number of reports left out since the latest line.
    left_out: u64,
}

impl Log {
    /// Returns the number of reports left out since the latest line if a report at `now` is to be
    /// written, else `None`.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        if self.next.is_some_and(|next| now < next) {
            self.left_out += 1;
            return None;
        }
        self.next = Some(now + PAUSE);
        Some(std::mem::take(&mut self.left_out))
    }
}

/// Logs that a record cannot be read or written. Within [`PAUSE`] of the latest line it only counts
/// the report.
pub(crate) fn report(error: &StoreError) {
    let admitted = LOG.lock().unwrap_or_else(PoisonError::into_inner).admit(Instant::now());
    if let Some(left_out) = admitted {
        tracing::error!(%error, left_out, "a key cannot be used: repair or delete its record");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_within_the_pause_are_counted_in_the_next_line() {
        let (mut log, start) = (Log { next: None, left_out: 0 }, Instant::now());
        assert_eq!(log.admit(start), Some(0));
        assert_eq!([log.admit(start), log.admit(start + PAUSE / 2)], [None, None]);
        assert_eq!(log.admit(start + PAUSE), Some(2));
    }
}

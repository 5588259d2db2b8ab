//! What is logged of records that cannot be read or written: never more than a line every few seconds, because anyone may
//! ask for the key of such a record as often as they like.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::StoreError;

/// Between two lines.
const PAUSE: Duration = Duration::from_secs(10);

static LOG: Mutex<Log> = Mutex::new(Log { next: None, left_out: 0 });

#[derive(Debug)]
struct Log {
    /// When the next line may be written.
    next: Option<Instant>,
    /// How many reports there were since the latest line.
    left_out: u64,
}

impl Log {
    /// Returns how many reports were left out before this one, if this one is to be written at `now`.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        if self.next.is_some_and(|next| now < next) {
            self.left_out += 1;
            return None;
        }
        self.next = Some(now + PAUSE);
        Some(std::mem::take(&mut self.left_out))
    }
}

/// Logs that a record cannot be read or written, or counts it for the next line.
pub(crate) fn report(error: &StoreError) {
    let admitted = LOG.lock().unwrap_or_else(PoisonError::into_inner).admit(Instant::now());
    if let Some(left_out) = admitted {
        tracing::error!(%error, left_out, "a key is out of use: mend or delete its record");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_stands_for_all_reports_of_a_while() {
        let (mut log, start) = (Log { next: None, left_out: 0 }, Instant::now());
        assert_eq!(log.admit(start), Some(0));
        assert_eq!([log.admit(start), log.admit(start + PAUSE / 2)], [None, None]);
        assert_eq!(log.admit(start + PAUSE), Some(2));
    }
}

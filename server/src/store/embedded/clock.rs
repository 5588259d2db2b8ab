//! The clock of the embedded store. It follows the machine's boot clock, which keeps running during
//! a suspension and cannot be set.
//!
//! An [`Anchor`] maps the boot clock to the store's time. It is made from the host's wall clock,
//! once for each boot of the machine, and kept in the file. A daemon that starts again during the
//! same boot uses the same anchor. So setting the wall clock while the machine is up, forward or
//! back, moves no lease.
//!
//! The store's time never goes back behind the latest commit, not even with a new anchor.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::boot_instant::since_boot;
use crate::lease::{Timestamp, millis};

/// The difference between the store's clock and the wall clock above which a warning is logged.
const NOTABLE: Duration = Duration::from_secs(1);

/// The clocks of a machine.
pub(super) trait Readings: Debug + Send + Sync {
    /// The wall clock, as time since the Unix epoch.
    fn wall(&self) -> Duration;

    /// The boot clock: the time since the machine was started, including suspension.
    fn up(&self) -> Duration;

    /// The name of this boot of the machine. Two readings of [`up`](Self::up) can be compared if
    /// they were taken under the same name. `None` where boots have no names; then each start of a
    /// daemon counts as a boot.
    fn boot(&self) -> Option<String>;
}

/// The machine that this process runs on.
#[derive(Debug)]
pub(super) struct Host;

impl Readings for Host {
    #[expect(clippy::disallowed_methods, reason = "the wall clock places the store's time after a boot")]
    fn wall(&self) -> Duration {
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
    }

    fn up(&self) -> Duration {
        since_boot()
    }

    fn boot(&self) -> Option<String> {
        let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let id = Some(id.trim()).filter(|id| !id.is_empty())?;
        // Containers share the boot id of their host. In a time namespace the boot clock is
        // shifted, so the shift belongs to the name.
        let offsets = std::fs::read_to_string("/proc/self/timens_offsets").unwrap_or_default();
        let shift = offsets.lines().find_map(|line| line.strip_prefix("boottime")).unwrap_or_default();
        match shift.split_whitespace().collect::<Vec<_>>().as_slice() {
            [] | ["0", "0"] => Some(id.to_owned()),
            shift => Some(format!("{id} shifted by {}", shift.join("."))),
        }
    }
}

/// Maps the boot clock to the store's time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Anchor {
    /// The boot that the anchor is valid for. Empty if that boot has no name.
    pub(super) boot: String,
    /// A reading of the boot clock, in milliseconds.
    pub(super) up: i64,
    /// The store's time at that reading.
    pub(super) time: Timestamp,
}

impl Anchor {
    fn at(&self, up: i64) -> Timestamp {
        Timestamp(self.time.0.saturating_add(up.saturating_sub(self.up)))
    }
}

/// The store's clock. Its time never goes back.
#[derive(Debug)]
pub(super) struct Clock {
    readings: Arc<dyn Readings>,
    anchor: Anchor,
    /// The latest time that was shown, or that of the latest commit.
    shown: Timestamp,
    #[cfg(test)]
    set: Option<Timestamp>,
}

impl Clock {
    /// Continues the clock of a file. `kept` is the anchor in the file, `latest` the time of its
    /// latest commit.
    pub(super) fn resume(readings: Arc<dyn Readings>, kept: Option<&Anchor>, latest: Timestamp) -> Self {
        let anchor = anchor(&*readings, kept, latest);
        let (wall, time) = (Timestamp(millis(readings.wall())), anchor.at(millis(readings.up())));
        let (ahead, behind) = (time - wall, wall - time);
        if ahead.max(behind) > NOTABLE {
            tracing::warn!(
                ?ahead,
                ?behind,
                "the host's clock was set since the machine was started, or is behind the latest commit; leases go by \
                 the store's clock, and the two differ until the machine is started again"
            );
        }
        Self {
            readings,
            anchor,
            shown: latest,
            #[cfg(test)]
            set: None,
        }
    }

    /// Makes sure that the clock is not behind `latest`, the time of the latest commit in a file
    /// that is opened again. Another daemon may have made that commit.
    pub(super) fn advance_to(&mut self, latest: Timestamp) {
        // A process lives within one boot, so the anchor stays valid unless the commit is ahead of
        // it.
        let up = millis(self.readings.up());
        if self.anchor.at(up) < latest {
            self.anchor = Anchor { boot: self.anchor.boot.clone(), up, time: latest };
        }
    }

    pub(super) fn anchor(&self) -> &Anchor {
        &self.anchor
    }

    /// The store's time now.
    pub(super) fn now(&mut self) -> Timestamp {
        #[cfg(test)]
        if let Some(set) = self.set {
            return set;
        }
        self.shown = self.shown.max(self.anchor.at(millis(self.readings.up())));
        self.shown
    }

    /// The boot clock. How long a batch may wait for the writer is measured on it.
    pub(super) fn up(&self) -> Duration {
        self.readings.up()
    }

    /// Stops the clock at `now`, even if that is in the past.
    #[cfg(test)]
    pub(super) fn set(&mut self, now: Timestamp) {
        self.set = Some(now);
    }
}

/// Returns the kept anchor if it is of this boot, else a new one.
fn anchor(readings: &dyn Readings, kept: Option<&Anchor>, latest: Timestamp) -> Anchor {
    let (boot, up) = (readings.boot(), millis(readings.up()));
    // A boot clock that went back belongs to another boot even if the name is the same: the machine
    // was restored from a snapshot.
    let same = kept.filter(|kept| Some(&kept.boot) == boot.as_ref() && kept.up <= up);
    match same {
        Some(kept) if kept.at(up) >= latest => kept.clone(),
        // An earlier version of this program followed the wall clock during this boot, and its
        // commits are ahead.
        Some(_) => Anchor { boot: boot.unwrap_or_default(), up, time: latest },
        None => {
            let wall = Timestamp(millis(readings.wall()));
            Anchor { boot: boot.unwrap_or_default(), up, time: wall.max(latest) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_has_a_boot_clock_that_advances_and_a_boot_with_a_name() {
        let up = Host.up();
        assert!(up > Duration::ZERO && Host.up() >= up);
        assert!(Host.boot().is_some_and(|boot| boot.len() >= 36), "{:?}", Host.boot());
        assert_eq!(Host.boot(), Host.boot());
    }

    #[test]
    fn a_first_start_shows_the_time_of_the_host() {
        let shown = Clock::resume(Arc::new(Host), None, Timestamp(0)).now();
        let host = millis(Host.wall());
        assert!(shown.0 <= host && host - shown.0 < 60_000, "{shown:?} at {host}");
    }
}

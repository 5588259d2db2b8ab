//! When the command must end: arithmetic, and the clock that leasectl and the guardian share.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// The longest margin, unless 1 % of the TTL is more than [`USUAL_RESERVE`].
const LONGEST_MARGIN: Duration = Duration::from_secs(10);
/// The longest time that is reserved for SIGKILL to take effect, unless 1 % of the TTL is more.
const USUAL_RESERVE: Duration = Duration::from_secs(1);

/// When the command is ended, for a lease with a certain TTL. The times count from when the last
/// confirmed touch was sent:
///
/// ```text
/// 0                                    TTL - margin        TTL - reserve    TTL
/// ├────────────── held ─────────────────┼───── jeopardy ─────┼───────────────┤
///                                     SIGTERM             SIGKILL    another may hold the key
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Times {
    /// How long before the end of the TTL the lease counts as being in jeopardy, and the command
    /// gets SIGTERM.
    pub(crate) margin: Duration,
    /// How long before the end of the TTL the command gets SIGKILL.
    pub(crate) reserve: Duration,
    /// How often leasectl sends the guardian the deadline.
    pub(crate) tick: Duration,
}

impl Times {
    /// Returns the times for a TTL. For TTLs up to 100 s, the margin is a quarter of the TTL, at most
    /// 10 s, and the reserve is a tenth, at most 1 s. For longer ones both grow, because the reserve
    /// is at least 1 % of the TTL, for clocks that do not run at the same rate.
    pub(crate) fn of(ttl: Duration) -> Self {
        let reserve = (ttl / 10).min(USUAL_RESERVE);
        let jeopardy = (ttl / 4).min(LONGEST_MARGIN).saturating_sub(reserve);
        let reserve = reserve.max(ttl / 100);
        let tick = (ttl / 12).clamp(Duration::from_millis(5), Duration::from_secs(5));
        Self { margin: reserve + jeopardy, reserve, tick }
    }
}

/// Nanoseconds since the machine was started. Where the platform allows it, they include the time
/// for which the machine was suspended. The value is the same in every process.
pub(crate) fn now() -> u64 {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    let clock = ClockId::Boottime;
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    let clock = ClockId::Monotonic;
    let now = Duration::try_from(clock_gettime(clock)).unwrap_or_default();
    now.as_nanos().try_into().unwrap_or(u64::MAX)
}

/// `duration` after [`now`].
pub(crate) fn after(duration: Duration) -> u64 {
    now().saturating_add(duration.as_nanos().try_into().unwrap_or(u64::MAX))
}

/// The time from [`now`] until `time`; zero if that is past.
pub(crate) fn until(time: u64) -> Duration {
    Duration::from_nanos(time.saturating_sub(now()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sigterm_comes_before_sigkill_and_both_before_the_end() {
        for milliseconds in [100, 400, 3_000, 30_000, 600_000, 86_400_000] {
            let ttl = Duration::from_millis(milliseconds);
            let Times { margin, reserve, .. } = Times::of(ttl);
            assert!(reserve >= ttl / 100 && margin > reserve, "{ttl:?}: {margin:?} {reserve:?}");
            // Two thirds of the TTL pass before a touch that failed once is confirmed by the next.
            assert!(margin <= ttl / 4, "{ttl:?}: {margin:?}");
        }
        let usual = Times::of(Duration::from_secs(30));
        assert_eq!((usual.margin, usual.reserve), (Duration::from_millis(7_500), Duration::from_secs(1)));
    }
}

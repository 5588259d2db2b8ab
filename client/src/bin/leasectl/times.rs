//! When a command must end. Arithmetic, and the clock that the guardian shares.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// The most that a command is given between SIGTERM and SIGKILL.
const LONGEST_GRACE: Duration = Duration::from_secs(10);
/// The most that is kept in hand for SIGKILL to take effect, of leases whose clocks cannot drift further apart meanwhile.
const USUAL_RESERVE: Duration = Duration::from_secs(1);

/// The times of a command that runs under a lease of some TTL. After the last touch that was confirmed had been sent:
///
/// ```text
/// 0                                    TTL - margin        TTL - reserve    TTL
/// ├────────────── held ─────────────────┼───── jeopardy ─────┼───────────────┤
///                                     SIGTERM             SIGKILL    another may hold it
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Times {
    /// How long before its end the lease counts as being in jeopardy.
    pub(crate) margin: Duration,
    /// How long before its end the command is killed.
    pub(crate) reserve: Duration,
    /// How often the guardian is told how things stand.
    pub(crate) tick: Duration,
}

impl Times {
    /// A quarter of the TTL in all, of which a tenth of the TTL for SIGKILL; of long ones no more than ends any command.
    /// A hundredth stays for clocks that do not run at the same rate, as in every lease.
    pub(crate) fn of(ttl: Duration) -> Self {
        let reserve = (ttl / 10).min(USUAL_RESERVE);
        let grace = (ttl / 4).min(LONGEST_GRACE).saturating_sub(reserve);
        let reserve = reserve.max(ttl / 100);
        let tick = (ttl / 12).clamp(Duration::from_millis(5), Duration::from_secs(5));
        Self { margin: reserve + grace, reserve, tick }
    }
}

/// Nanoseconds since the machine was started, suspended or not where the platform can tell; the same in every process.
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

/// How long until then; nothing if it is past.
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

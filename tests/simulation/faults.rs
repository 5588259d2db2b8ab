//! What goes wrong in a simulation, and when: made from its seed.

use std::time::Duration;

use fastrand::Rng;

use super::store::Weather;
use super::world::DAEMONS;
use crate::support::ms;

/// A change of the world.
#[derive(Debug, Clone)]
pub(crate) enum Happening {
    Weather(Weather),
    /// Nothing passes.
    Partition(String, String),
    /// Nothing passes this way.
    OneWay(String, String),
    /// Nothing passes until the link is mended; then all does.
    Hold(String, String),
    /// Some of it is lost.
    Lossy(String, String, f64),
    Mended(String, String),
    Crash(String),
    Start(String),
}

/// What happens when, in order.
#[derive(Debug, Default)]
pub(crate) struct Faults(Vec<(Duration, Happening)>);

impl Faults {
    /// Faults of daemons, `holders`, links and the store that all end by `until`.
    pub(crate) fn random(rng: &mut Rng, holders: &[String], until: Duration) -> Self {
        let mut faults = Self::default();
        let mean = rng.u64(200..2000);
        for holder in holders {
            for daemon in DAEMONS {
                faults.spread(rng, mean * 4, until, |rng| link_fault(rng, holder, daemon));
            }
            faults.spread(rng, mean * 20, until, |_| on_and_off(holder));
        }
        for daemon in DAEMONS {
            faults.spread(rng, mean * 8, until, |_| on_and_off(daemon));
        }
        faults.spread(rng, mean * 8, until, |rng| {
            let weather = if rng.bool() { Weather::Away } else { Weather::Slow };
            (Happening::Weather(weather), Happening::Weather(Weather::Fair))
        });
        faults.0.sort_by_key(|(at, _)| *at);
        faults
    }

    /// Faults of one thing, one after another, with pauses of `mean` milliseconds.
    fn spread(
        &mut self,
        rng: &mut Rng,
        mean: u64,
        until: Duration,
        mut fault: impl FnMut(&mut Rng) -> (Happening, Happening),
    ) {
        let mut at = Duration::ZERO;
        loop {
            at += ms(rng.u64(1..2 * mean));
            // Most are short beside a TTL, some long.
            let length = if rng.u8(..4) == 0 { ms(rng.u64(1000..6000)) } else { ms(rng.u64(10..1500)) };
            if at >= until {
                return;
            }
            let (begin, end) = fault(rng);
            self.0.push((at, begin));
            at = (at + length).min(until);
            self.0.push((at, end));
        }
    }

    /// One fault after some time.
    pub(crate) fn one(at: Duration, length: Duration, (begin, end): (Happening, Happening)) -> Self {
        Self(vec![(at, begin), (at + length, end)])
    }

    /// One fault of both links of the holder.
    pub(crate) fn both(at: Duration, length: Duration, fault: fn(String, String) -> Happening) -> Self {
        let of = |daemon: &str| {
            let (a, b) = ("holder".to_owned(), daemon.to_owned());
            Self::one(at, length, (fault(a.clone(), b.clone()), Happening::Mended(a, b)))
        };
        of(DAEMONS[0]).and(of(DAEMONS[1]))
    }

    /// Adds others, which may be at the same time.
    pub(crate) fn and(mut self, others: Self) -> Self {
        self.0.extend(others.0);
        self.0.sort_by_key(|(at, _)| *at);
        self
    }

    /// Takes what is due.
    pub(crate) fn due(&mut self, now: Duration) -> Vec<Happening> {
        let later = self.0.partition_point(|(at, _)| *at <= now);
        self.0.drain(..later).map(|(_, happening)| happening).collect()
    }
}

fn link_fault(rng: &mut Rng, a: &str, b: &str) -> (Happening, Happening) {
    let (a, b) = (a.to_owned(), b.to_owned());
    let mended = Happening::Mended(a.clone(), b.clone());
    let begin = match rng.u8(..8) {
        0 => Happening::Partition(a, b),
        1 => Happening::OneWay(a, b),
        2 => Happening::OneWay(b, a),
        3 => Happening::Lossy(a, b, 0.02 + 0.2 * rng.f64()),
        _ => Happening::Hold(a, b),
    };
    (begin, mended)
}

/// A host that crashes and is started again.
pub(crate) fn on_and_off(host: &str) -> (Happening, Happening) {
    (Happening::Crash(host.to_owned()), Happening::Start(host.to_owned()))
}

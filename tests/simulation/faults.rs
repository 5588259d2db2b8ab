//! The faults of a simulation, and when each of them begins and ends. The seed decides both.

use std::time::Duration;

use fastrand::Rng;

use super::store::StoreFault;
use super::world::DAEMONS;
use crate::support::ms;

/// The beginning or the end of a fault.
#[derive(Debug, Clone)]
pub(crate) enum Fault {
    Store(StoreFault),
    /// All messages between the two hosts are lost.
    Partition(String, String),
    /// All messages from the first host to the second are lost.
    OneWay(String, String),
    /// Messages between the two hosts are delayed until the link is repaired.
    Hold(String, String),
    /// This share of the messages between the two hosts is lost.
    Lossy(String, String, f64),
    /// The link between the two hosts works again.
    Repaired(String, String),
    Crash(String),
    Start(String),
}

/// Faults and their times, in order.
#[derive(Debug, Default)]
pub(crate) struct Faults(Vec<(Duration, Fault)>);

impl Faults {
    /// Draws random faults of daemons, `holders`, links and the store. All faults end by `until`.
    pub(crate) fn random(rng: &mut Rng, holders: &[String], until: Duration) -> Self {
        let mut faults = Self::default();
        let mean = rng.u64(200..2000);
        for holder in holders {
            for daemon in DAEMONS {
                faults.spread(rng, mean * 4, until, |rng| link_fault(rng, holder, daemon));
            }
            faults.spread(rng, mean * 20, until, |_| crash_and_restart(holder));
        }
        for daemon in DAEMONS {
            faults.spread(rng, mean * 8, until, |_| crash_and_restart(daemon));
        }
        faults.spread(rng, mean * 8, until, |rng| {
            let fault = if rng.bool() { StoreFault::Unavailable } else { StoreFault::Slow };
            (Fault::Store(fault), Fault::Store(StoreFault::None))
        });
        faults.0.sort_by_key(|(at, _)| *at);
        faults
    }

    /// Adds faults of one host, link or store, one after another. The pauses between them are
    /// `mean` milliseconds on average.
    fn spread(
        &mut self,
        rng: &mut Rng,
        mean: u64,
        until: Duration,
        mut fault: impl FnMut(&mut Rng) -> (Fault, Fault),
    ) {
        let mut at = Duration::ZERO;
        loop {
            at += ms(rng.u64(1..2 * mean));
            // Most faults are shorter than a TTL; one in four is about as long or longer.
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

    /// Makes one fault, which begins at `at` and lasts for `length`.
    pub(crate) fn one(at: Duration, length: Duration, (begin, end): (Fault, Fault)) -> Self {
        Self(vec![(at, begin), (at + length, end)])
    }

    /// Makes the same fault on the links from the holder to both daemons.
    pub(crate) fn on_both_links(at: Duration, length: Duration, fault: fn(String, String) -> Fault) -> Self {
        let of = |daemon: &str| {
            let (a, b) = ("holder".to_owned(), daemon.to_owned());
            Self::one(at, length, (fault(a.clone(), b.clone()), Fault::Repaired(a, b)))
        };
        of(DAEMONS[0]).and(of(DAEMONS[1]))
    }

    /// Adds `others`, which may overlap with these faults.
    pub(crate) fn and(mut self, others: Self) -> Self {
        self.0.extend(others.0);
        self.0.sort_by_key(|(at, _)| *at);
        self
    }

    /// Removes and returns the faults that are due.
    pub(crate) fn due(&mut self, now: Duration) -> Vec<Fault> {
        let later = self.0.partition_point(|(at, _)| *at <= now);
        self.0.drain(..later).map(|(_, fault)| fault).collect()
    }
}

fn link_fault(rng: &mut Rng, a: &str, b: &str) -> (Fault, Fault) {
    let (a, b) = (a.to_owned(), b.to_owned());
    let repaired = Fault::Repaired(a.clone(), b.clone());
    let begin = match rng.u8(..8) {
        0 => Fault::Partition(a, b),
        1 => Fault::OneWay(a, b),
        2 => Fault::OneWay(b, a),
        3 => Fault::Lossy(a, b, 0.02 + 0.2 * rng.f64()),
        _ => Fault::Hold(a, b),
    };
    (begin, repaired)
}

/// A crash of a host, and its restart.
pub(crate) fn crash_and_restart(host: &str) -> (Fault, Fault) {
    (Fault::Crash(host.to_owned()), Fault::Start(host.to_owned()))
}

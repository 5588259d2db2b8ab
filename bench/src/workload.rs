//! What is measured, at which scales, and by which figures.

use clap::ValueEnum;
use serde::Serialize;

use crate::contender::Contender;

/// A workload. The order is that of the tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Workload {
    /// Acquire and release pairs a second.
    Pairs,
    /// Keepalives acknowledged a second, where leased writes each touch.
    Keepalives,
    /// The same with leased answering from memory for leases touched a moment ago.
    Coalesced,
    /// The largest number of leases kept alive.
    Capacity,
    /// From the call of a release to the moment when the next in line is told.
    Handoff,
    /// The same with those in line at another daemon or node.
    Relay,
    /// How long after the end of a silent holder's lease the next in line is told.
    Takeover,
    /// Memory of a lease on a shared stream.
    LeaseMemory,
    /// Memory of a stream with one lease.
    StreamMemory,
    /// Processor time for a touch as leases get more.
    Cost,
    /// The same while a second daemon follows every change.
    SharedCost,
}

/// What is said of a workload.
#[derive(Debug)]
pub(crate) struct Facts {
    pub(crate) title: &'static str,
    pub(crate) text: &'static str,
    /// What there are as many of as the scale says.
    pub(crate) unit: &'static str,
    pub(crate) scales: &'static [u32],
    /// The scales of a quick run.
    pub(crate) quick: &'static [u32],
    /// The figures that the table shows; the first is the one of curves and progress.
    pub(crate) shown: &'static [&'static str],
    pub(crate) more_is_better: bool,
}

const TOLD: &[&str] = &["p50 ms", "p99 ms", "max ms"];

impl Workload {
    /// As it is named on the command line.
    pub(crate) fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    pub(crate) const fn facts(self) -> Facts {
        match self {
            Self::Pairs => Facts {
                title: "Acquire and release pairs a second",
                text: "Each caller takes and gives back a key of its own, over and over; etcd's callers lock under a lease that they have already.",
                unit: "callers",
                scales: &[1, 64, 256],
                quick: &[1, 64],
                shown: &["pairs/s"],
                more_is_better: true,
            },
            Self::Keepalives => Facts {
                title: "Keepalives acknowledged a second, each written",
                text: "A lease a stream and one message in flight on each. leased writes every touch (`--coalesce-touches=false`); etcd writes none. Redis and findOneAndUpdate have callers instead of streams.",
                unit: "streams",
                scales: &[1, 100, 1000, 10_000],
                quick: &[1, 100, 1000],
                shown: &["acks/s"],
                more_is_better: true,
            },
            Self::Coalesced => Facts {
                title: "Keepalives acknowledged a second, coalesced",
                text: "The same as leased is unless told otherwise: a lease touched less than a tenth of its TTL ago is answered from memory.",
                unit: "streams",
                scales: &[1, 100, 1000, 10_000],
                quick: &[1, 100, 1000],
                shown: &["acks/s"],
                more_is_better: true,
            },
            Self::Capacity => Facts {
                title: "The largest number of leases kept alive",
                text: "At most 1 % lost, in the eyes of holders that touch after each third of the TTL; streams (Redis: pipelines) carry 1,000 leases. Found by doubling and bisecting, so good to an eighth.",
                unit: "s TTL",
                scales: &[10],
                quick: &[2],
                shown: &["leases"],
                more_is_better: true,
            },
            Self::Handoff => Facts {
                title: "Handoff: from the call of a release until the next in line is told",
                text: "Holder and line at one daemon, or at etcd's leader, where a line is keys and watches as etcd's own clients make them.",
                unit: "in line",
                scales: &[1, 8],
                quick: &[1, 8],
                shown: TOLD,
                more_is_better: false,
            },
            Self::Relay => Facts {
                title: "Handoff to another daemon",
                text: "The line is at the other of two daemons, or at a follower of etcd's.",
                unit: "in line",
                scales: &[1, 8],
                quick: &[1, 8],
                shown: TOLD,
                more_is_better: false,
            },
            Self::Takeover => Facts {
                title: "Takeover: from the end of a silent holder's lease, grace included, until the next in line is told",
                text: "So many leases run out together, each with one in line. leased has a grace of 1 s on MongoDB and none embedded.",
                unit: "at once",
                scales: &[100, 50_000],
                quick: &[100, 2000],
                shown: TOLD,
                more_is_better: false,
            },
            Self::LeaseMemory => Facts {
                title: "Memory of a lease",
                text: "What the server's memory grows by, for each of so many leases on streams of 1,000; of etcd with the lock's key, of Redis the key. A database is counted in the second figure only.",
                unit: "leases",
                scales: &[50_000],
                quick: &[10_000],
                shown: &["B", "B with database"],
                more_is_better: false,
            },
            Self::StreamMemory => Facts {
                title: "Memory of a stream",
                text: "The same for streams that carry a lease each, 200 on a connection.",
                unit: "streams",
                scales: &[10_000],
                quick: &[1000],
                shown: &["B", "B with database"],
                more_is_better: false,
            },
            Self::Cost => Facts {
                title: "Processor time for a touch",
                text: "Of the servers together, less what they spend idle, in microseconds; streams carry 100 leases and touch them after each third of the TTL.",
                unit: "leases",
                scales: &[1000, 10_000, 100_000],
                quick: &[1000, 10_000],
                shown: &["µs"],
                more_is_better: false,
            },
            Self::SharedCost => Facts {
                title: "Processor time for a touch, with two daemons",
                text: "The same while another daemon is there, so that both have a change stream open; all streams are at the first.",
                unit: "leases",
                scales: &[1000, 10_000],
                quick: &[1000],
                shown: &["µs"],
                more_is_better: false,
            },
        }
    }

    /// Whether the contender can do it, at this scale: libraries without a server have nothing to hold streams or lines.
    pub(crate) fn takes(self, contender: Contender, scale: u32) -> bool {
        if self == Self::SharedCost {
            return matches!(contender, Contender::Mongod | Contender::ReplicaSet);
        }
        use Contender as C;
        let few = scale <= 1000;
        match contender {
            C::Embedded => self != Self::Relay,
            C::Mongod | C::ReplicaSet | C::EtcdThree => true,
            C::Etcd => self != Self::Relay,
            C::Redis => !matches!(self, Self::Handoff | Self::Relay | Self::Takeover | Self::StreamMemory),
            C::Mongolock => few && matches!(self, Self::Pairs | Self::Keepalives),
            C::Direct => few && matches!(self, Self::Pairs | Self::Keepalives) || self == Self::Capacity,
            C::Batched | C::BatchedThree => matches!(self, Self::Pairs | Self::Keepalives),
            C::Ceiling => matches!(self, Self::Pairs | Self::Keepalives | Self::Coalesced),
            C::Stub => matches!(self, Self::Pairs | Self::Keepalives),
            C::Client => self == Self::Pairs,
        }
    }
}

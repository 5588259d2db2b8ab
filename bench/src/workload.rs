//! What is measured, at which scales, and by which figures.

use clap::ValueEnum;
use serde::Serialize;

use crate::contender::Contender;

/// A workload. The tables have this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Workload {
    /// Acquire and release pairs a second.
    Pairs,
    /// Keepalives acknowledged a second, where leased writes each touch.
    Keepalives,
    /// Keepalives acknowledged a second, where leased coalesces touches.
    Coalesced,
    /// The largest number of leases kept alive.
    Capacity,
    /// The time from the start of a release until the next waiter is told.
    Handoff,
    /// The time from the start of a release until a waiter at another daemon or node is told.
    Relay,
    /// How long after the end of a silent holder's lease the next waiter is told.
    Takeover,
    /// Memory of a lease on a shared stream.
    LeaseMemory,
    /// Memory of a stream with one lease.
    StreamMemory,
    /// Processor time for a touch, at rising numbers of leases.
    Cost,
    /// Processor time for a touch while a second daemon follows every change.
    SharedCost,
}

/// The description of a workload.
#[derive(Debug)]
pub(crate) struct Facts {
    pub(crate) title: &'static str,
    pub(crate) text: &'static str,
    /// What the scale counts.
    pub(crate) unit: &'static str,
    pub(crate) scales: &'static [u32],
    /// The scales of a quick run.
    pub(crate) quick: &'static [u32],
    /// The figures that tables show. Curves and progress show the first.
    pub(crate) shown: &'static [&'static str],
    pub(crate) more_is_better: bool,
}

const TOLD: &[&str] = &["p50 ms", "p99 ms", "max ms"];

impl Workload {
    /// The name on the command line.
    pub(crate) fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    pub(crate) const fn facts(self) -> Facts {
        match self {
            Self::Pairs => Facts {
                title: "Acquire and release pairs a second",
                text: "Each caller acquires and releases a key of its own, over and over. The callers of etcd lock under a lease that they already have.",
                unit: "callers",
                scales: &[1, 64, 256],
                quick: &[1, 64],
                shown: &["pairs/s"],
                more_is_better: true,
            },
            Self::Keepalives => Facts {
                title: "Keepalives acknowledged a second, each written",
                text: "Each stream has one lease and one message in flight. leased writes every touch (`--coalesce-touches=false`); etcd writes none. Redis and findOneAndUpdate have callers instead of streams.",
                unit: "streams",
                scales: &[1, 100, 1000, 10_000],
                quick: &[1, 100, 1000],
                shown: &["acks/s"],
                more_is_better: true,
            },
            Self::Coalesced => Facts {
                title: "Keepalives acknowledged a second, coalesced",
                text: "leased as it is by default: a touch less than a tenth of the TTL after the last written one is answered without a write.",
                unit: "streams",
                scales: &[1, 100, 1000, 10_000],
                quick: &[1, 100, 1000],
                shown: &["acks/s"],
                more_is_better: true,
            },
            Self::Capacity => Facts {
                title: "The largest number of leases kept alive",
                text: "At most 1 % of the leases are lost, as seen by holders that touch after each third of the TTL. Each stream (of Redis: pipeline) has 1,000 leases. The number is found by doubling and bisecting, so it is good to an eighth.",
                unit: "s TTL",
                scales: &[10],
                quick: &[2],
                shown: &["leases"],
                more_is_better: true,
            },
            Self::Handoff => Facts {
                title: "Handoff: from the start of a release until the next waiter is told",
                text: "Holder and waiters are at one daemon, or at etcd's leader. A queue in etcd is keys and watches, as etcd's own clients make them.",
                unit: "waiting",
                scales: &[1, 8],
                quick: &[1, 8],
                shown: TOLD,
                more_is_better: false,
            },
            Self::Relay => Facts {
                title: "Handoff to another daemon",
                text: "The waiters are at the other of two daemons, or at a follower of etcd's.",
                unit: "waiting",
                scales: &[1, 8],
                quick: &[1, 8],
                shown: TOLD,
                more_is_better: false,
            },
            Self::Takeover => Facts {
                title: "Takeover: from the end of a silent holder's lease, grace included, until the next waiter is told",
                text: "This many leases run out together, each with one waiter. leased has a grace of 1 s on MongoDB and none embedded.",
                unit: "at once",
                scales: &[100, 50_000],
                quick: &[100, 2000],
                shown: TOLD,
                more_is_better: false,
            },
            Self::LeaseMemory => Facts {
                title: "Memory of a lease",
                text: "By how much the server's memory grows for each of this many leases, on streams of 1,000 leases. For etcd that includes the lock's key; for Redis it is the key. A database is counted in the second figure only.",
                unit: "leases",
                scales: &[50_000],
                quick: &[10_000],
                shown: &["B", "B with database"],
                more_is_better: false,
            },
            Self::StreamMemory => Facts {
                title: "Memory of a stream",
                text: "By how much the server's memory grows for each stream with one lease, 200 streams on a connection.",
                unit: "streams",
                scales: &[10_000],
                quick: &[1000],
                shown: &["B", "B with database"],
                more_is_better: false,
            },
            Self::Cost => Facts {
                title: "Processor time for a touch",
                text: "Processor time of the servers together, less what they spend idle, in microseconds. Each stream has 100 leases, which are touched after each third of the TTL.",
                unit: "leases",
                scales: &[1000, 10_000, 100_000],
                quick: &[1000, 10_000],
                shown: &["µs"],
                more_is_better: false,
            },
            Self::SharedCost => Facts {
                title: "Processor time for a touch, with two daemons",
                text: "Processor time for a touch while another daemon is there, so that both have a change stream open. All keepalive streams are at the first daemon.",
                unit: "leases",
                scales: &[1000, 10_000],
                quick: &[1000],
                shown: &["µs"],
                more_is_better: false,
            },
        }
    }

    /// Whether the contender can do the workload at this scale. Libraries without a server have
    /// neither streams nor queues.
    pub(crate) fn supports(self, contender: Contender, scale: u32) -> bool {
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

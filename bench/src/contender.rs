//! The contenders: their names, what each is compared with, and which programs each needs.

use clap::ValueEnum;
use serde::Serialize;

use crate::server::is_installed;

/// A contender. The tables have this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Contender {
    /// leased with its embedded store.
    Embedded,
    /// leased over one mongod.
    Mongod,
    /// leased over a replica set of three mongods.
    ReplicaSet,
    /// etcd with one node.
    Etcd,
    /// etcd with three nodes; calls go to the leader.
    EtcdThree,
    /// Redis with one node, each write synced.
    Redis,
    /// mongolock 1.3.4 on one mongod.
    Mongolock,
    /// One conditional findOneAndUpdate for each call on one mongod, as in a lock library.
    Direct,
    /// `$inc` of many records with each command on one mongod: the lowest cost of a write for each
    /// change.
    Batched,
    /// `$inc` of many records with each command on a replica set of three.
    BatchedThree,
    /// Calls of leased that need no store: what gRPC alone allows on this machine.
    Ceiling,
    /// leased with its embedded store, called with the generated stub over tonic's channels; only
    /// on request.
    Stub,
    /// leased with its embedded store, called with the client crate; only on request.
    Client,
}

impl Contender {
    /// Whether the contender takes part by default.
    pub(crate) fn is_usual(self) -> bool {
        !matches!(self, Self::Stub | Self::Client)
    }

    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Embedded => "leased, embedded",
            Self::Mongod => "leased, one mongod",
            Self::ReplicaSet => "leased, three mongods",
            Self::Etcd => "etcd, one node",
            Self::EtcdThree => "etcd, three nodes",
            Self::Redis => "Redis, always synced",
            Self::Mongolock => "mongolock, one mongod",
            Self::Direct => "findOneAndUpdate, one mongod",
            Self::Batched => "batches of $inc, one mongod",
            Self::BatchedThree => "batches of $inc, three mongods",
            Self::Ceiling => "gRPC alone",
            Self::Stub => "leased, embedded, tonic's channels",
            Self::Client => "leased, embedded, client crate",
        }
    }

    /// The contenders that this one is compared with.
    pub(crate) fn yardsticks(self) -> &'static [Self] {
        match self {
            Self::Embedded => &[Self::Etcd, Self::Redis, Self::Ceiling],
            Self::Mongod => &[Self::Etcd, Self::Redis, Self::Mongolock, Self::Direct, Self::Batched],
            Self::ReplicaSet => &[Self::EtcdThree, Self::BatchedThree],
            Self::Batched => &[Self::Etcd],
            Self::BatchedThree => &[Self::EtcdThree],
            Self::Stub | Self::Client => &[Self::Embedded],
            _ => &[],
        }
    }

    /// Says which program is missing and how to install it. `None` if nothing is missing.
    pub(crate) fn missing(self) -> Option<&'static str> {
        let (program, advice) = match self {
            Self::Etcd | Self::EtcdThree => {
                ("etcd", "etcd is not installed; Debian's package is etcd-server")
            }
            Self::Redis => {
                ("redis-server", "redis-server is not installed; Debian's package is redis-server")
            }
            Self::Mongolock => {
                ("python3", "python3 is not installed; Debian's packages are python3 and python3-pip")
            }
            _ => return None,
        };
        (!is_installed(program)).then_some(advice)
    }
}

//! Daemons over one store, each in a process of its own.

use std::path::Path;

use anyhow::Result;
use clap::ValueEnum;
use leased_client::v1::lease_service_client::LeaseServiceClient;
use throwaway_mongodb::{Mongod, ReplicaSet};
use tonic::transport::{Channel, Endpoint};

use crate::process::Process;

/// A client with a connection of its own.
pub(crate) type Leases = LeaseServiceClient<Channel>;

/// Where the leases are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Store {
    /// In a file of the daemon's own.
    Embedded,
    /// In a throwaway MongoDB of one node.
    One,
    /// In a throwaway MongoDB of three nodes, all on this machine.
    Three,
}

/// What holds the records, and the daemons over it; all end with this.
#[derive(Debug)]
pub(crate) struct Fleet {
    daemons: Vec<(String, Process)>,
    _one: Option<Mongod>,
    _three: Option<ReplicaSet>,
}

impl Fleet {
    /// Starts so many daemons; the embedded store has one.
    pub(crate) async fn start(store: Store, count: usize, binary: Option<&Path>) -> Result<Self> {
        let one = if store == Store::One { Some(Mongod::start().await?) } else { None };
        let three = if store == Store::Three { Some(ReplicaSet::start().await?) } else { None };
        let uri = one.as_ref().map(Mongod::uri).or(three.as_ref().map(ReplicaSet::uri));
        let count = if uri.is_some() { count } else { 1 };
        let daemons = (0..count).map(|_| Process::leased(binary, uri)).collect::<Result<_>>()?;
        Ok(Self { daemons, _one: one, _three: three })
    }

    /// A client of the daemon with this number, or of the last one there is.
    pub(crate) async fn client(&self, daemon: usize) -> Result<Leases> {
        let (address, _) = &self.daemons[daemon.min(self.daemons.len() - 1)];
        Ok(LeaseServiceClient::new(Endpoint::from_shared(address.clone())?.connect().await?))
    }
}

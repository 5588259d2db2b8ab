//! A contender's processes, alone on the machine and new for each run: those that idle beside it would take their part of the
//! processors, and what an earlier run left would be in its way.

use std::path::Path;

use anyhow::{Context, Result};
use throwaway_mongodb::{Mongod, ReplicaSet};

use crate::contender::Contender;
use crate::cpu::Processes;
use crate::server::{Daemon, Server};
use crate::workload::Workload;

/// Running processes, which end with it.
#[derive(Debug)]
pub(crate) struct Stage {
    servers: Vec<Server>,
    one: Option<Mongod>,
    three: Option<ReplicaSet>,
}

impl Stage {
    /// Starts what the contender needs for the workload; `program` is the daemon, else the one beside this.
    pub(crate) async fn set(
        contender: Contender,
        workload: Workload,
        program: Option<&Path>,
    ) -> Result<Self> {
        use Contender as C;
        let one = matches!(contender, C::Mongod | C::Mongolock | C::Direct | C::Batched);
        let one = if one { Some(Mongod::start().await?) } else { None };
        let three = if matches!(contender, C::ReplicaSet | C::BatchedThree) {
            Some(ReplicaSet::start().await?)
        } else {
            None
        };
        let mut stage = Self { servers: Vec::new(), one, three };
        match contender {
            C::Etcd => stage.servers = Server::etcd(1).await?,
            C::EtcdThree => stage.servers = Server::etcd(3).await?,
            C::Redis => stage.servers.push(Server::redis().await?),
            C::Mongolock | C::Direct | C::Batched | C::BatchedThree => {}
            C::Embedded | C::Mongod | C::ReplicaSet | C::Ceiling | C::Stub | C::Client => {
                stage.daemons(workload, program).await?;
            }
        }
        Ok(stage)
    }

    async fn daemons(&mut self, workload: Workload, program: Option<&Path>) -> Result<()> {
        // As fast as can be: the rate is what is measured.
        const NO_PACE: &str = "--max-stream-rate=1000000";
        let options: &[&str] = match workload {
            Workload::Keepalives => &[NO_PACE, "--coalesce-touches=false"],
            Workload::Coalesced => &[NO_PACE],
            _ => &[],
        };
        let count = if matches!(workload, Workload::Relay | Workload::SharedCost) { 2 } else { 1 };
        for _ in 0..count {
            let server = Server::leased(Daemon { program, mongodb: self.mongodb(), options }).await?;
            self.servers.push(server);
        }
        if count > 1 {
            for server in &mut self.servers {
                server.follows().await?;
            }
        }
        Ok(())
    }

    /// The connection string of the database, if there is one.
    pub(crate) fn mongodb(&self) -> Option<&str> {
        self.one.as_ref().map(Mongod::uri).or(self.three.as_ref().map(ReplicaSet::uri))
    }

    /// Where calls go.
    ///
    /// # Errors
    /// If nothing runs.
    pub(crate) fn address(&self) -> Result<&str> {
        self.servers.first().map(Server::address).or(self.mongodb()).context("no server")
    }

    /// Where others' calls go, where there is more than one place.
    ///
    /// # Errors
    /// If nothing runs.
    pub(crate) fn other_address(&self) -> Result<&str> {
        self.servers.last().map(Server::address).or(self.mongodb()).context("no server")
    }

    /// The processes without those of a database that is under them.
    pub(crate) fn server_processes(&self) -> Processes {
        self.servers.iter().filter_map(Server::process).collect()
    }

    pub(crate) fn processes(&self) -> Processes {
        let databases =
            self.one.iter().filter_map(Mongod::pid).chain(self.three.iter().flat_map(ReplicaSet::pids));
        self.server_processes().into_iter().chain(databases.map(|id| ("mongod", id))).collect()
    }
}

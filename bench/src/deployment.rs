//! The processes of a contender. Each trial starts its own processes and no others. Idle processes
//! would take processor time, and data of an earlier trial would slow the next one down.

use std::path::Path;

use anyhow::{Context, Result};
use throwaway_mongodb::{Mongod, ReplicaSet};

use crate::contender::Contender;
use crate::cpu::Processes;
use crate::server::{Daemon, Server};
use crate::workload::Workload;

/// Running processes, which end when this value is dropped.
#[derive(Debug)]
pub(crate) struct Deployment {
    servers: Vec<Server>,
    one: Option<Mongod>,
    three: Option<ReplicaSet>,
}

impl Deployment {
    /// Starts the processes that the contender needs for the workload. `program` is the daemon, by
    /// default the one beside this program.
    pub(crate) async fn start(
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
        let mut deployment = Self { servers: Vec::new(), one, three };
        match contender {
            C::Etcd => deployment.servers = Server::etcd(1).await?,
            C::EtcdThree => deployment.servers = Server::etcd(3).await?,
            C::Redis => deployment.servers.push(Server::redis().await?),
            C::Mongolock | C::Direct | C::Batched | C::BatchedThree => {}
            C::Embedded | C::Mongod | C::ReplicaSet | C::Ceiling | C::Stub | C::Client => {
                deployment.daemons(workload, program).await?;
            }
        }
        Ok(deployment)
    }

    async fn daemons(&mut self, workload: Workload, program: Option<&Path>) -> Result<()> {
        // These workloads measure the rate of keepalives, so the daemon must not limit it.
        const NO_RATE_LIMIT: &str = "--max-stream-rate=1000000";
        let options: &[&str] = match workload {
            Workload::Keepalives => &[NO_RATE_LIMIT, "--coalesce-touches=false"],
            Workload::Coalesced => &[NO_RATE_LIMIT],
            _ => &[],
        };
        let count = if matches!(workload, Workload::Relay | Workload::SharedCost) { 2 } else { 1 };
        for _ in 0..count {
            let server = Server::leased(Daemon { program, mongodb: self.mongodb(), options }).await?;
            self.servers.push(server);
        }
        if count > 1 {
            for server in &mut self.servers {
                server.until_following().await?;
            }
        }
        Ok(())
    }

    /// The connection string of the database, if there is one.
    pub(crate) fn mongodb(&self) -> Option<&str> {
        self.one.as_ref().map(Mongod::uri).or(self.three.as_ref().map(ReplicaSet::uri))
    }

    /// The address for calls.
    ///
    /// # Errors
    /// If nothing runs.
    pub(crate) fn address(&self) -> Result<&str> {
        self.servers.first().map(Server::address).or(self.mongodb()).context("no server")
    }

    /// The address of another daemon or node, if there is more than one.
    ///
    /// # Errors
    /// If nothing runs.
    pub(crate) fn other_address(&self) -> Result<&str> {
        self.servers.last().map(Server::address).or(self.mongodb()).context("no server")
    }

    /// The processes of the servers, without those of their database.
    pub(crate) fn server_processes(&self) -> Processes {
        self.servers.iter().filter_map(Server::process).collect()
    }

    /// The processes of the servers and of their database.
    pub(crate) fn processes(&self) -> Processes {
        let databases =
            self.one.iter().filter_map(Mongod::pid).chain(self.three.iter().flat_map(ReplicaSet::pids));
        self.server_processes().into_iter().chain(databases.map(|id| ("mongod", id))).collect()
    }
}

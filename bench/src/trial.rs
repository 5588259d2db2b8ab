//! One workload with one contender at one scale, once.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::time::timeout;

use crate::ceiling::Ceiling;
use crate::connection::Connection;
use crate::contender::Contender;
use crate::deployment::Deployment;
use crate::direct::Direct;
use crate::etcd::Etcd;
use crate::grpc::Client;
use crate::holder::Holder;
use crate::leased::Leased;
use crate::redis_lock::Redis;
use crate::sample::Sample;
use crate::stub::Stub;
use crate::workload::Workload;
use crate::{batched, capacity, cost, handoff, keepalives, memory, mongolock, pairs, takeover};

/// A trial: what to measure.
#[derive(Debug)]
pub(crate) struct Trial<'a> {
    pub(crate) contender: Contender,
    pub(crate) workload: Workload,
    pub(crate) scale: usize,
    /// How long a rate is measured.
    pub(crate) time: Duration,
    pub(crate) deployment: &'a Deployment,
}

impl Trial<'_> {
    /// Runs the trial, for no longer than its workload may take.
    pub(crate) async fn run(&self) -> Result<Sample> {
        timeout(self.limit(), self.dispatch())
            .await
            .with_context(|| format!("not done within {:?}", self.limit()))?
    }

    fn limit(&self) -> Duration {
        let most = match self.workload {
            Workload::Capacity => 60,
            Workload::Takeover => 70,
            Workload::Cost | Workload::SharedCost => 50,
            _ => 20,
        };
        Duration::from_secs(30) + most * self.time
    }

    async fn dispatch(&self) -> Result<Sample> {
        match self.contender {
            Contender::Embedded | Contender::Mongod | Contender::ReplicaSet => {
                self.by::<Leased<Client>>().await
            }
            Contender::Stub => self.by::<Leased<Stub>>().await,
            Contender::Client => self.by::<Holder>().await,
            Contender::Etcd | Contender::EtcdThree => self.by::<Etcd>().await,
            Contender::Redis => self.by::<Redis>().await,
            Contender::Direct => self.by::<Direct>().await,
            Contender::Ceiling => self.by::<Ceiling>().await,
            Contender::Batched | Contender::BatchedThree => batched::run(self).await,
            Contender::Mongolock => mongolock::run(self).await,
        }
    }

    async fn by<P: Connection>(&self) -> Result<Sample> {
        // Boxed, because these futures are large and there are many of them.
        match self.workload {
            Workload::Pairs => Box::pin(pairs::run::<P>(self)).await,
            Workload::Keepalives | Workload::Coalesced => Box::pin(keepalives::run::<P>(self)).await,
            Workload::Capacity => Box::pin(capacity::run::<P>(self)).await,
            Workload::Handoff | Workload::Relay => Box::pin(handoff::run::<P>(self)).await,
            Workload::Takeover => Box::pin(takeover::run::<P>(self)).await,
            Workload::LeaseMemory => Box::pin(memory::of_leases::<P>(self)).await,
            Workload::StreamMemory => Box::pin(memory::of_streams::<P>(self)).await,
            Workload::Cost | Workload::SharedCost => Box::pin(cost::run::<P>(self)).await,
        }
    }

    /// Returns a prefix of keys that has not been used before.
    pub(crate) fn prefix() -> String {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        format!("bench/{}", NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

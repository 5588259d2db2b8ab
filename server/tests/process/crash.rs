//! A daemon that is killed at any moment under load, or whose disk is full. Everything that it
//! acknowledged survives.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use leased_proto::v1::lease_service_client::LeaseServiceClient;
use leased_proto::v1::{AcquireRequest, GetRequest, LeaseRef, ReleaseRequest};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use tokio::task::JoinSet;
use tokio::time::sleep;
use tonic::transport::Channel;
use tonic::{Code, Status};
use uuid::Uuid;

use crate::support::Running;

type Leases = LeaseServiceClient<Channel>;

/// How often the daemon is killed.
const KILLS: u64 = 12;
/// How many callers work at the same time, each with its own key.
const CALLERS: u64 = 16;
/// A TTL longer than the test.
const TTL: Duration = Duration::from_secs(3600);

/// A caller that acquires and releases in turn, and what the daemon has acknowledged to it.
struct Caller {
    key: String,
    acknowledged: Arc<AtomicU64>,
    last_token: i64,
    state: State,
}

#[derive(Clone)]
enum State {
    /// The latest lease, if there was one, is acknowledged as released.
    Free(Option<Uuid>),
    /// The acquire is sent and not answered.
    Acquiring(Uuid),
    Held(Uuid),
    /// The release is sent and not answered.
    Releasing(Uuid),
}

impl Caller {
    fn named(&self, id: Uuid) -> LeaseRef {
        LeaseRef { key: self.key.clone(), lease_id: id.to_string() }
    }

    async fn acquire(&mut self, client: &mut Leases, id: Uuid) -> Result<(), Status> {
        self.state = State::Acquiring(id);
        let request = AcquireRequest {
            key: self.key.clone(),
            lease_id: id.to_string(),
            ttl: Some(TTL.try_into().unwrap()),
            ..AcquireRequest::default()
        };
        let granted = client.acquire(request).await?.into_inner();
        assert!(granted.fencing_token > self.last_token, "{}: a token that does not rise", self.key);
        self.last_token = granted.fencing_token;
        self.state = State::Held(id);
        Ok(())
    }

    async fn release(&mut self, client: &mut Leases, id: Uuid) -> Result<(), Status> {
        self.state = State::Releasing(id);
        client.release(ReleaseRequest { lease: Some(self.named(id)) }).await?;
        self.state = State::Free(Some(id));
        Ok(())
    }

    /// Acquires and releases until the connection breaks.
    async fn work(mut self, mut client: Leases) -> Self {
        loop {
            let done = match self.state.clone() {
                State::Held(id) => self.release(&mut client, id).await,
                _ => self.acquire(&mut client, Uuid::new_v4()).await,
            };
            match done {
                Ok(()) => self.acknowledged.fetch_add(1, Ordering::Relaxed),
                // A broken connection is reported with one of these codes. A refusal has a
                // different code.
                Err(status)
                    if matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled) =>
                {
                    return self;
                }
                Err(status) => panic!("{}: {status:?}", self.key),
            };
        }
    }

    /// Checks that everything acknowledged has survived, and repeats the call that was not
    /// answered.
    async fn check(mut self, mut client: Leases) -> Self {
        match self.state.clone() {
            State::Free(None) => {}
            State::Free(Some(id)) => {
                assert!(
                    self.holders(&mut client).await.is_empty(),
                    "{}: an acknowledged release is lost",
                    self.key
                );
                self.release(&mut client, id).await.unwrap();
            }
            State::Held(_) => {
                assert_eq!(
                    self.holders(&mut client).await,
                    [self.last_token],
                    "{}: an acknowledged grant is lost",
                    self.key
                );
            }
            State::Acquiring(id) => self.acquire(&mut client, id).await.unwrap(),
            State::Releasing(id) => self.release(&mut client, id).await.unwrap(),
        }
        self
    }

    async fn holders(&self, client: &mut Leases) -> Vec<i64> {
        let seen = client.get(GetRequest { key: self.key.clone() }).await.unwrap().into_inner();
        seen.lease.unwrap().holders.into_iter().map(|holder| holder.fencing_token).collect()
    }
}

/// Runs `act` for all callers at the same time.
async fn each<F>(callers: Vec<Caller>, client: &Leases, act: impl Fn(Caller, Leases) -> F) -> JoinSet<Caller>
where
    F: Future<Output = Caller> + Send + 'static,
{
    let mut acting = JoinSet::new();
    for caller in callers {
        acting.spawn(act(caller, client.clone()));
    }
    acting
}

#[tokio::test]
async fn a_kill_at_any_moment_loses_nothing_that_was_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    let acknowledged = Arc::new(AtomicU64::new(0));
    let caller = |number| Caller {
        key: format!("key/{number}"),
        acknowledged: Arc::clone(&acknowledged),
        last_token: 0,
        state: State::Free(None),
    };
    let mut callers: Vec<Caller> = (0..CALLERS).map(caller).collect();
    for round in 1..=KILLS {
        let running = Running::start_in(folder.path(), &[]);
        let client = running.client().await;
        callers = each(callers, &client, Caller::check).await.join_all().await;
        let before = acknowledged.load(Ordering::Relaxed);
        let working = each(callers, &client, Caller::work).await;
        // The daemon is killed after a different number of calls in each round, however fast the
        // machine is.
        while acknowledged.load(Ordering::Relaxed) < before + 37 * round {
            sleep(Duration::from_millis(1)).await;
        }
        running.kill();
        callers = working.join_all().await;
    }
    let running = Running::start_in(folder.path(), &[]);
    each(callers, &running.client().await, Caller::check).await.join_all().await;
}

/// Limits the size of the files that a process may write, or removes the limit.
fn limit_file_size(process: u32, bytes: Option<u64>) {
    let process = Pid::from_raw(i32::try_from(process).unwrap());
    prlimit(process, Resource::Fsize, Rlimit { current: bytes, maximum: None }).unwrap();
}

/// Returns a request with 4,000 bytes of metadata.
fn bulky(number: usize) -> AcquireRequest {
    AcquireRequest {
        key: format!("key/{number:04}"),
        ttl: Some(TTL.try_into().unwrap()),
        metadata: [("x".to_owned(), "y".repeat(4000))].into(),
        ..AcquireRequest::default()
    }
}

#[tokio::test]
async fn without_disk_space_nothing_is_acknowledged_and_nothing_is_lost() {
    let folder = tempfile::tempdir().unwrap();
    let running = Running::start_in(folder.path(), &[]);
    let mut client = running.client().await;
    limit_file_size(running.child.id(), Some(1024 * 1024));

    let mut granted = Vec::new();
    let status = loop {
        match client.acquire(bulky(granted.len())).await {
            Ok(answer) => granted.push(answer.into_inner()),
            Err(status) => break status,
        }
        assert!(granted.len() < 2000, "1 MiB cannot hold so many records");
    };
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert!(granted.len() > 20, "{} granted", granted.len());

    limit_file_size(running.child.id(), None);
    for number in granted.len()..granted.len() + 50 {
        client.acquire(bulky(number)).await.unwrap();
    }
    running.kill();
    let running = Running::start_in(folder.path(), &[]);
    let mut client = running.client().await;
    for answer in granted {
        let lease = answer.lease.unwrap();
        let seen =
            client.get(GetRequest { key: lease.key.clone() }).await.unwrap().into_inner().lease.unwrap();
        assert_eq!(seen.fencing_token, answer.fencing_token);
        client.release(ReleaseRequest { lease: Some(lease) }).await.unwrap();
    }
}

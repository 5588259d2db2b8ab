//! A replica set of three nodes that loses its primary, and daemons that keep running.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use leased_client::Reason;
use leased_client::v1::{AcquireResponse, LeaseRef};
use throwaway_mongodb::ReplicaSet;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use tonic::{Code, Status};
use uuid::Uuid;

use crate::keepalive::{KeepAlive, kept};
use crate::support::{
    AcquireBuilder, Calls, Daemon, Leases, PATIENCE, acquire, enqueue, eventually, refusal, secs,
};

/// A TTL longer than the election of a new primary takes.
const TTL: Duration = secs(20);
/// How many ended leases a record remembers. Tokens rise by at least 1 from lease to lease, so a
/// lease is forgotten only when the latest token is greater by at least this number.
const REMEMBERED_DEPARTURES: i64 = leased::lease::REMEMBERED_DEPARTURES as i64;

/// Acquires, and repeats the call with the same id while the store is unavailable.
async fn get(client: &mut Leases, key: &str, id: Uuid) -> Result<AcquireResponse, Status> {
    let start = Instant::now();
    loop {
        match client.get_lease(acquire(key).id(id).ttl(TTL)).await {
            Err(status) if is_unavailable(&status) && start.elapsed() < PATIENCE => {}
            answer => return answer,
        }
    }
}

fn is_unavailable(status: &Status) -> bool {
    status.code() == Code::Unavailable
}

/// Releases the lease with `token`, and repeats the call while the store is unavailable.
async fn give_back(client: &mut Leases, lease: &LeaseRef, token: i64) {
    let start = Instant::now();
    let mut repeats = false;
    loop {
        match client.give_back(lease).await {
            Err(status) if is_unavailable(&status) && start.elapsed() < PATIENCE => repeats = true,
            // An earlier attempt has released the lease, and since then more leases have ended than
            // the record remembers.
            Err(status)
                if repeats && refusal(&status, "loss") == (Some(Reason::LeaseLost), String::new()) =>
            {
                match client.inspect(&lease.key).await {
                    Ok(seen) => {
                        let others = seen.fencing_token - token;
                        assert!(others >= REMEMBERED_DEPARTURES, "forgotten after {others}: {seen:?}");
                        return;
                    }
                    Err(status) => {
                        assert!(is_unavailable(&status) && start.elapsed() < PATIENCE, "{status:?}")
                    }
                }
            }
            answer => return answer.unwrap(),
        }
    }
}

async fn two_daemons(set: &ReplicaSet) -> (Daemon, Daemon) {
    let one = Daemon::over(set.uri(), |_| {}).await;
    let two = one.sibling().await;
    (one, two)
}

/// Streams stay open, the new primary answers messages that were in flight, and waiters keep their
/// positions.
#[tokio::test]
async fn streams_leases_and_queues_survive_the_loss_of_the_primary() {
    let mut set = ReplicaSet::start().await.unwrap();
    let (one, two) = two_daemons(&set).await;
    let (mut at_one, mut at_two) = (one.client().await, two.client().await);
    let mut leases = Vec::new();
    for number in 0..50 {
        leases.push(at_one.get_lease(acquire(&format!("key/{number}")).ttl(TTL)).await.unwrap());
    }
    let named: Vec<LeaseRef> = leases.iter().filter_map(|granted| granted.lease.clone()).collect();
    let mut stream = KeepAlive::open(&mut at_one).await;
    stream.touch(&named).await;
    let mut queue = Vec::new();
    for (position, client) in [&mut at_two, &mut at_one].into_iter().enumerate() {
        let request = acquire("key/0").owner(&position.to_string()).ttl(TTL).wait(secs(300));
        queue.push(enqueue(client, request, position + 1).await);
    }

    let mut killed = None;
    for round in 0..3 {
        match killed.take() {
            None if round == 0 => drop(set.step_down().await.unwrap()),
            None => killed = Some(set.kill_primary().await.unwrap()),
            Some(node) => set.restart(node).await.unwrap(),
        }
        let results = stream.touch(&named).await;
        assert_eq!(results.len(), named.len());
        for (_, outcome) in &results {
            assert!(kept(outcome) > secs(10), "round {round}");
        }
        let waiting = eventually(async || at_two.inspect("key/0").await.ok()).await.waiters;
        assert_eq!(waiting.iter().map(|waiter| waiter.owner.as_str()).collect::<Vec<_>>(), ["0", "1"]);
    }

    let mut last = leases[0].fencing_token;
    let mut holder = named[0].clone();
    for waiter in queue {
        give_back(&mut at_one, &holder, last).await;
        let granted = waiter.await.unwrap().unwrap();
        assert!(granted.waited && granted.fencing_token > last);
        last = granted.fencing_token;
        holder = granted.lease.unwrap();
    }
    for granted in &leases[1..] {
        let seen = eventually(async || at_two.inspect(&granted.lease.as_ref().unwrap().key).await.ok()).await;
        assert_eq!((seen.holders.len(), seen.fencing_token), (1, granted.fencing_token));
    }
}

/// One lease of a worker: when the worker knew that it was granted, when it began to release, and
/// the token.
#[derive(Debug)]
struct Held {
    key: String,
    from: Instant,
    to: Instant,
    token: i64,
}

/// Acquires and releases in turn until `stop` is set, and returns the leases that it held.
fn work(mut client: Leases, keys: usize, stop: Arc<AtomicBool>) -> JoinHandle<Vec<Held>> {
    tokio::spawn(async move {
        let mut held = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            let key = format!("shared/{}", fastrand::usize(..keys));
            let sent_at = Instant::now();
            let Ok(granted) = get(&mut client, &key, Uuid::new_v4()).await else { continue };
            let from = Instant::now();
            // A lease this old could expire before it is released, so it is not used.
            if from.duration_since(sent_at) > TTL / 2 {
                continue;
            }
            tokio::task::yield_now().await;
            let to = Instant::now();
            give_back(&mut client, &granted.lease.unwrap(), granted.fencing_token).await;
            held.push(Held { key, from, to, token: granted.fencing_token });
        }
        held
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_grant_is_lost_or_doubled_while_primaries_step_down_and_are_killed() {
    let mut set = ReplicaSet::start().await.unwrap();
    let (one, two) = two_daemons(&set).await;
    let stop = Arc::new(AtomicBool::new(false));
    let mut workers = Vec::new();
    for number in 0..8 {
        let daemon = if number % 2 == 0 { &one } else { &two };
        workers.push(work(daemon.client().await, 3, Arc::clone(&stop)));
    }
    for _ in 0..2 {
        sleep(Duration::from_millis(300)).await;
        set.step_down().await.unwrap();
        sleep(Duration::from_millis(300)).await;
        let node = set.kill_primary().await.unwrap();
        set.wait_for_primary().await.unwrap();
        sleep(Duration::from_millis(300)).await;
        set.restart(node).await.unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    let mut held = Vec::new();
    for worker in workers {
        held.extend(worker.await.unwrap());
    }
    assert!(held.len() > 100, "{} leases", held.len());

    held.sort_by(|one, other| (&one.key, one.from).cmp(&(&other.key, other.from)));
    for pair in held.windows(2) {
        let [first, second] = pair else { unreachable!() };
        if first.key == second.key {
            assert!(first.to <= second.from, "held twice: {first:?} and {second:?}");
            assert!(first.token < second.token, "{first:?} and {second:?}");
        }
    }
}

#[tokio::test]
async fn no_lease_is_granted_or_released_without_a_majority() {
    let mut set = ReplicaSet::start().await.unwrap();
    let daemon = Daemon::over(set.uri(), |_| {}).await;
    let mut client = daemon.client().await;
    let granted = client.get_lease(acquire("held").ttl(secs(60))).await.unwrap();
    let (held, token) = (granted.lease.unwrap(), granted.fencing_token);
    let primary = set.primary().await.unwrap();
    let others: Vec<usize> = (0..3).filter(|node| *node != primary).collect();
    for node in &others {
        set.kill(*node).unwrap();
    }
    let id = Uuid::new_v4();
    let status = client.get_lease(acquire("free").id(id).ttl(secs(60))).await.unwrap_err();
    assert_eq!(refusal(&status, "").0, Some(Reason::StoreUnavailable), "{status:?}");
    let status = client.give_back(&held).await.unwrap_err();
    assert_eq!(refusal(&status, "").0, Some(Reason::StoreUnavailable), "{status:?}");

    for node in others {
        set.restart(node).await.unwrap();
    }
    let granted = get(&mut client, "free", id).await.unwrap();
    let seen = client.inspect("free").await.unwrap();
    assert_eq!((seen.holders.len(), seen.fencing_token), (1, granted.fencing_token), "one acquisition");
    give_back(&mut client, &held, token).await;
}

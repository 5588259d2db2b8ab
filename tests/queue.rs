//! Waiting in line, over one daemon and two.

use std::time::Duration;

use leased_client::Reason;
use leased_client::v1::AcquireResponse;
use rstest::rstest;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tonic::{Code, Request, Status};
use uuid::Uuid;

use crate::metrics::scrape;
use crate::support::{
    Asking, Calls, Daemon, Embedded, Fleet, GRACE, Home, Leases, MongoDb, ask, eventually, line_of, ms,
    refusal, secs,
};

type Waiting = JoinHandle<Result<AcquireResponse, Status>>;

/// A call that waits, and stands in line as number `place` when this returns.
async fn stand(client: &mut Leases, owner: &str, place: usize) -> Waiting {
    let mut waiting = client.clone();
    let request = ask("job").owner(owner).wait(secs(60));
    let call = tokio::spawn(async move { waiting.get_lease(request).await });
    line_of(client, "job", place).await;
    call
}

#[tokio::test]
async fn first_come_first_served_over_two_daemons() {
    let one = Daemon::start(MongoDb).await;
    let two = one.sibling().await;
    let (mut at_one, mut at_two) = (one.client().await, two.client().await);
    let mut lease = at_one.get_lease(ask("job").owner("0")).await.unwrap().lease.unwrap();
    let mut waiters = Vec::new();
    for number in 1..=6 {
        let client = if number % 2 == 0 { &mut at_one } else { &mut at_two };
        waiters.push(stand(client, &number.to_string(), number).await);
    }
    let line = at_one.look("job").await.unwrap().waiters;
    assert_eq!(
        line.iter().map(|waiter| waiter.owner.as_str()).collect::<Vec<_>>(),
        ["1", "2", "3", "4", "5", "6"]
    );
    let mut last = 0;
    for (number, waiter) in waiters.into_iter().enumerate() {
        at_one.give_back(&lease).await.unwrap();
        let holder = at_one.look("job").await.unwrap().holders.remove(0);
        assert_eq!(holder.owner, (number + 1).to_string(), "no instant exists in which the key is free");
        let granted = waiter.await.unwrap().unwrap();
        assert!(granted.waited && granted.fencing_token > last);
        last = granted.fencing_token;
        lease = granted.lease.unwrap();
    }
}

/// What travels between daemons is a hint; without any, a look every other second finds it.
#[tokio::test]
async fn a_release_at_another_daemon_is_noticed_within_two_seconds_or_little_more() {
    let one = Daemon::start(MongoDb).await;
    let two = one.sibling().await;
    let (mut at_one, mut at_two) = (one.client().await, two.client().await);
    let lease = at_one.get_lease(ask("job").ttl(secs(60))).await.unwrap().lease.unwrap();
    let waiter = stand(&mut at_two, "next", 1).await;
    at_one.give_back(&lease).await.unwrap();
    let released = Instant::now();
    let granted = waiter.await.unwrap().unwrap();
    // Far below the 3 s of a refresh and the TTL; the slack is the machine's.
    assert!(released.elapsed() < secs(10), "{:?}", released.elapsed());
    let remaining = at_two.renew(&granted.lease.unwrap()).await.unwrap();
    assert!(remaining > secs(25), "a foreign grant is claimed with a touch: {remaining:?}");
}

#[rstest]
#[tokio::test]
async fn when_the_wait_runs_out_the_caller_is_told_who_holds_and_leaves_the_line(
    #[values(Embedded, MongoDb, Fleet)] home: Home,
) {
    let daemon = Daemon::start(home).await;
    let mut client = daemon.client().await;
    client.get_lease(ask("job").owner("holder").ttl(secs(60))).await.unwrap();
    let first = stand(&mut client, "first", 1).await;
    let status = client.get_lease(ask("job").wait(ms(300))).await.unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists);
    assert_eq!(refusal(&status, "owner"), (Some(Reason::LeaseHeld), "holder".to_owned()));
    assert_eq!(refusal(&status, "position").1, "1", "behind one other");
    assert_eq!(client.look("job").await.unwrap().waiters.len(), 1);
    first.abort();
}

/// Whoever has been told that the wait is over has no place any more, whatever other daemons' changes made this one look
/// after its line at that moment: a place that nobody waits at would be granted to nobody.
#[rstest]
#[tokio::test]
async fn a_wait_that_is_over_leaves_no_place_behind(#[values(Embedded, MongoDb, Fleet)] home: Home) {
    let daemon = Daemon::start(home).await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(ask("job").ttl(secs(60))).await.unwrap().lease.unwrap();
    let mut callers = tokio::task::JoinSet::new();
    for number in 0..8 {
        let mut client = daemon.client().await;
        callers.spawn(async move {
            for wait in (0..40).map(|round| ms(1 + (7 * number + round) % 23)) {
                let status = client.get_lease(ask("job").wait(wait)).await.unwrap_err();
                assert_eq!(refusal(&status, "").0, Some(Reason::LeaseHeld), "{status:?}");
            }
        });
    }
    callers.join_all().await;
    assert_eq!(client.look("job").await.unwrap().waiters, []);
    client.give_back(&lease).await.unwrap();
    assert!(client.look("job").await.unwrap().holders.is_empty());
}

#[rstest]
#[tokio::test]
async fn a_call_whose_deadline_ends_while_it_waits_is_answered_before_that(
    #[values(Embedded, MongoDb, Fleet)] home: Home,
) {
    let daemon = Daemon::start(home).await;
    let mut client = daemon.client().await;
    client.get_lease(ask("job").ttl(secs(60))).await.unwrap();
    let mut request = Request::new(ask("job").wait(secs(60)));
    request.set_timeout(ms(1500));
    let status = client.acquire(request).await.unwrap_err();
    assert_eq!(refusal(&status, "").0, Some(Reason::LeaseHeld), "{status:?}");
    line_of(&mut client, "job", 0).await;
}

#[rstest]
#[tokio::test]
async fn a_caller_that_hangs_up_leaves_the_line_at_once(#[values(Embedded, MongoDb, Fleet)] home: Home) {
    let daemon = Daemon::start(home).await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(ask("job").ttl(secs(60))).await.unwrap().lease.unwrap();
    let gone = stand(&mut client, "gone", 1).await;
    let next = stand(&mut client, "next", 2).await;
    gone.abort();
    let start = Instant::now();
    line_of(&mut client, "job", 1).await;
    assert!(start.elapsed() < secs(10), "not by the lapse of its place");
    client.give_back(&lease).await.unwrap();
    assert!(next.await.unwrap().unwrap().waited);
}

/// How many waits have ended so at the daemons that the callers meet.
async fn waits(daemon: &Daemon, outcome: &str) -> f64 {
    let mut waits = 0.0;
    for member in daemon.members() {
        waits += scrape(member).await.value("leased_waits_total", &[("outcome", outcome)]);
    }
    waits
}

/// A lost answer to acquire must not leave an orphan: nobody else can know an id that the daemon picked. Only an answer
/// that has left the daemon before it hears that the caller is gone has to run out.
#[rstest]
#[tokio::test]
async fn callers_that_hang_up_at_the_moment_of_a_grant_leave_no_lease(
    #[values(Embedded, MongoDb, Fleet)] home: Home,
) {
    let daemon = Daemon::start(home).await;
    let mut client = daemon.client().await;
    for _ in 0..20 {
        let lease = client.get_lease(ask("job").ttl(secs(60))).await.unwrap().lease.unwrap();
        let granted_before = waits(&daemon, "granted").await;
        let gone = stand(&mut client, "gone", 1).await;
        let mut releasing = client.clone();
        let release = tokio::spawn(async move { releasing.give_back(&lease).await });
        tokio::task::yield_now().await;
        gone.abort();
        release.await.unwrap().unwrap();
        // Unless the answer was already on its way and taken.
        if let Ok(Ok(granted)) = gone.await {
            client.give_back(&granted.lease.unwrap()).await.unwrap();
        }
        let next = match client.get_lease(ask("job").wait(secs(20))).await {
            Ok(next) => next,
            Err(_) => {
                let granted = waits(&daemon, "granted").await - granted_before;
                assert!(granted == 1.0, "nobody was answered, and the key is held");
                client.get_lease(ask("job").wait(secs(60))).await.unwrap()
            }
        };
        client.give_back(&next.lease.unwrap()).await.unwrap();
    }
    assert!(waits(&daemon, "abandoned").await > 0.0, "nobody has hung up in time");
}

#[rstest]
#[tokio::test]
async fn a_holder_that_falls_silent_is_displaced_after_ttl_and_grace_and_not_before(
    #[values(Embedded, MongoDb, Fleet)] home: Home,
) {
    let daemon = Daemon::start(home).await;
    let mut client = daemon.client().await;
    let before = Instant::now();
    client.get_lease(ask("job").ttl(ms(1000))).await.unwrap();
    let granted = client.get_lease(ask("job").wait(secs(60))).await.unwrap();
    let took = before.elapsed();
    assert!(granted.waited);
    // The first millisecond may have begun before the clock was read here.
    assert!(took + ms(5) >= ms(1000) + GRACE, "{took:?}");
    // The timer, not the check of every other second, or by chance: a loose bound, for the machine is shared.
    assert!(took < secs(20), "{took:?}");
}

#[rstest]
#[tokio::test]
async fn a_place_outlasts_its_lapse_time_while_its_call_lives(
    #[values(Embedded, MongoDb, Fleet)] home: Home,
) {
    let daemon = Daemon::start_with(home, |config| config.rules.place = ms(1000)).await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(ask("job").ttl(secs(60))).await.unwrap().lease.unwrap();
    let first = stand(&mut client, "first", 1).await;
    tokio::time::sleep(ms(2500)).await;
    let second = stand(&mut client, "second", 2).await;
    client.give_back(&lease).await.unwrap();
    let granted = first.await.unwrap().unwrap();
    client.give_back(&granted.lease.unwrap()).await.unwrap();
    second.await.unwrap().unwrap();
}

/// The daemon that held the call is gone without a word; its place lapses and is passed over at its turn.
#[tokio::test]
async fn the_waiters_of_a_dead_daemon_are_passed_over() {
    let daemon = Daemon::start_with(MongoDb, |config| config.rules.place = ms(1500)).await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(ask("job").ttl(secs(60))).await.unwrap().lease.unwrap();
    // On drain the place of a caller that chose its id is left to it.
    let doomed = daemon.sibling().await;
    let mut at_doomed = doomed.client().await;
    let request = ask("job").owner("dead").id(Uuid::new_v4()).wait(secs(60));
    let dead = tokio::spawn(async move { at_doomed.get_lease(request).await });
    line_of(&mut client, "job", 1).await;
    let next = stand(&mut client, "next", 2).await;
    doomed.stop().await;
    assert_eq!(refusal(&dead.await.unwrap().unwrap_err(), "").0, Some(Reason::ShuttingDown));
    line_of(&mut client, "job", 1).await;
    client.give_back(&lease).await.unwrap();
    assert_eq!(client.look("job").await.unwrap().holders[0].owner, "next");
    next.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_caller_of_a_draining_daemon_keeps_its_place_at_another() {
    let one = Daemon::start(MongoDb).await;
    let two = one.sibling().await;
    let (mut at_one, mut at_two) = (one.client().await, two.client().await);
    let lease = at_two.get_lease(ask("job").ttl(secs(60))).await.unwrap().lease.unwrap();
    let request = ask("job").owner("moving").id(Uuid::new_v4()).wait(secs(60));
    let first = tokio::spawn({
        let request = request.clone();
        async move { at_one.get_lease(request).await }
    });
    line_of(&mut at_two, "job", 1).await;
    let other = stand(&mut at_two, "behind", 2).await;
    one.stop().await;
    assert_eq!(refusal(&first.await.unwrap().unwrap_err(), "").0, Some(Reason::ShuttingDown));
    let mut waiting = at_two.clone();
    let again = tokio::spawn(async move { waiting.get_lease(request).await });
    tokio::time::sleep(ms(100)).await;
    at_two.give_back(&lease).await.unwrap();
    assert_eq!(at_two.look("job").await.unwrap().holders[0].owner, "moving");
    again.await.unwrap().unwrap();
    other.abort();
}

/// A client that reconnects repeats its call before the daemon has seen the old one end.
#[rstest]
#[tokio::test]
async fn a_repeated_wait_keeps_the_place_of_the_first(#[values(Embedded, MongoDb, Fleet)] home: Home) {
    let daemon = Daemon::start(home).await;
    let mut client = daemon.client().await;
    let lease = client.get_lease(ask("job").ttl(secs(60))).await.unwrap().lease.unwrap();
    let request = ask("job").owner("same").id(Uuid::new_v4()).wait(secs(60));
    let calls: Vec<Waiting> = (0..2)
        .map(|_| {
            let (mut client, request) = (client.clone(), request.clone());
            tokio::spawn(async move { client.get_lease(request).await })
        })
        .collect();
    line_of(&mut client, "job", 1).await;
    let behind = stand(&mut client, "behind", 2).await;
    let [old, new] = <[Waiting; 2]>::try_from(calls).unwrap();
    old.abort();
    tokio::time::sleep(ms(200)).await;
    client.give_back(&lease).await.unwrap();
    let granted = new.await.unwrap().unwrap();
    assert_eq!(client.look("job").await.unwrap().holders[0].owner, "same");
    client.give_back(&granted.lease.unwrap()).await.unwrap();
    behind.await.unwrap().unwrap();
}

#[rstest]
#[tokio::test]
async fn a_full_line_takes_no_more(#[values(Embedded, MongoDb, Fleet)] home: Home) {
    let daemon = Daemon::start(home).await;
    let mut client = daemon.client().await;
    client.get_lease(ask("job").ttl(secs(60))).await.unwrap();
    let mut crowd = tokio::task::JoinSet::new();
    for connection in 0..5 {
        let client = daemon.client().await;
        for number in 0..240 {
            let mut client = client.clone();
            let request = ask("job").owner(&format!("{connection}/{number}")).wait(secs(60));
            crowd.spawn(async move { client.get_lease(request).await });
        }
    }
    eventually(async || client.look("job").await.ok().filter(|seen| seen.waiters.len() >= 1024)).await;
    let status = client.get_lease(ask("job").wait(secs(60))).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert_eq!(refusal(&status, "").0, Some(Reason::QueueFull));
    let status = client.get_lease(ask("job")).await.unwrap_err();
    assert_eq!(refusal(&status, "").0, Some(Reason::LeaseHeld), "who only tries needs no place");
}

#[rstest]
#[tokio::test]
async fn only_so_many_calls_may_wait_at_one_daemon(#[values(Embedded, MongoDb, Fleet)] home: Home) {
    let daemon = Daemon::start_with(home, |config| config.limits.bounds.waiting_calls = 1).await;
    let mut client = daemon.client().await;
    client.get_lease(ask("job").ttl(secs(60))).await.unwrap();
    let first = stand(&mut client, "first", 1).await;
    let status = client.get_lease(ask("job").wait(secs(60))).await.unwrap_err();
    assert_eq!(refusal(&status, "limit"), (Some(Reason::LimitExceeded), "waiting_calls".to_owned()));
    first.abort();
    line_of(&mut client, "job", 0).await;
    let wait: Duration = ms(50);
    let status = client.get_lease(ask("job").wait(wait)).await.unwrap_err();
    assert_eq!(refusal(&status, "").0, Some(Reason::LeaseHeld), "there is room again");
}

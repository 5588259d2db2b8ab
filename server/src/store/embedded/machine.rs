//! Tests of the store's time on a simulated machine. The machine is suspended and rebooted, its
//! wall clock is set, and its daemons start and end. The store's time must follow the boot clock
//! alone, and setting a clock must end no lease.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use rstest::rstest;

use super::clock::{Anchor, Clock, Readings};
use super::file::DataFile;
use super::{EmbeddedStore, Rules, Store};
use crate::lease::{Edit, FencingToken, Holder, LeaseId, Record, Timestamp, Ttl};
use crate::store::conformance::reading::{all_of, ask, asking, key};

const RULES: Rules = Rules { grace: Duration::ZERO, waiter_ttl: Duration::from_secs(15) };
/// The TTL of every lease here.
const TTL: Duration = Duration::from_secs(30);

/// A simulated machine. All clones are one machine.
#[derive(Debug, Clone)]
struct Machine(Arc<Mutex<State>>);

#[derive(Debug, Clone)]
struct State {
    /// The wall clock, in milliseconds.
    wall: i64,
    /// The boot clock, in milliseconds.
    up: i64,
    /// How much of `up` the machine was suspended for.
    suspended: i64,
    /// How many times the machine was started.
    boots: u32,
    mutant: Option<ClockMutant>,
}

/// Deliberate mistakes in keeping time, which the test must catch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ClockMutant {
    /// The clock follows the wall clock while the machine is up.
    FollowsWallClock,
    /// The anchor is made from the wall clock at each start of a daemon.
    AnchorsAtEachStart,
    /// The clock stands still during a suspension.
    StopsInSuspension,
    /// An anchor is used after another boot.
    IgnoresBoots,
    /// The time of the latest commit is lost.
    LosesLatestCommit,
}

impl Machine {
    fn new(mutant: Option<ClockMutant>) -> Self {
        let wall = 1_700_000_000_000;
        Self(Arc::new(Mutex::new(State { wall, up: 5_000, suspended: 0, boots: 1, mutant })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no panic")
    }

    fn pass(&self, time: i64) {
        let mut state = self.state();
        state.wall += time;
        state.up += time;
    }

    fn suspend(&self, time: i64) {
        self.pass(time);
        self.state().suspended += time;
    }

    fn set_wall(&self, step: i64) {
        self.state().wall += step;
    }

    /// Starts the machine again after `off` milliseconds. The wall clock keeps running meanwhile.
    fn boot(&self, off: i64) {
        let mut state = self.state();
        state.wall += off;
        state.up = 2_000;
        state.suspended = 0;
        state.boots += 1;
    }
}

impl Readings for Machine {
    fn wall(&self) -> Duration {
        Duration::from_millis(u64::try_from(self.state().wall).expect("after 1970"))
    }

    fn up(&self) -> Duration {
        let state = self.state();
        let shown = match state.mutant {
            Some(ClockMutant::FollowsWallClock) => state.wall,
            Some(ClockMutant::StopsInSuspension) => state.up - state.suspended,
            _ => state.up,
        };
        Duration::from_millis(u64::try_from(shown).expect("up"))
    }

    fn boot(&self) -> Option<String> {
        let state = self.state();
        match state.mutant {
            Some(ClockMutant::AnchorsAtEachStart) => None,
            Some(ClockMutant::IgnoresBoots) => Some("boot".to_owned()),
            _ => Some(format!("boot {}", state.boots)),
        }
    }
}

#[derive(Debug, Clone)]
enum Event {
    Pass(i64),
    Suspend(i64),
    SetWall(i64),
    Commit,
    /// The daemon ends and starts again after this many milliseconds.
    Restart(i64),
    Boot {
        off: i64,
        set_wall: i64,
    },
    /// The daemon opens its file again. Another daemon has committed to it, this many milliseconds
    /// after the latest commit.
    Reopen(i64),
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let step = || prop_oneof![-400_000_000_i64..400_000_000, -2_000_i64..2_000];
    let event = prop_oneof![
        4 => (0_i64..90_000).prop_map(Event::Pass),
        2 => (0_i64..9_000_000).prop_map(Event::Suspend),
        3 => step().prop_map(Event::SetWall),
        4 => Just(Event::Commit),
        3 => (0_i64..9_000).prop_map(Event::Restart),
        2 => (0_i64..9_000_000, step()).prop_map(|(off, set_wall)| Event::Boot { off, set_wall }),
        1 => prop_oneof![Just(0), 0_i64..90_000].prop_map(Event::Reopen),
    ];
    prop::collection::vec(event, 1..30)
}

/// What the file keeps about the clock.
struct Kept {
    anchor: Option<Anchor>,
    latest: Timestamp,
}

impl Kept {
    fn start(&mut self, machine: &Machine) -> Clock {
        let loses_latest = machine.state().mutant == Some(ClockMutant::LosesLatestCommit);
        let latest = if loses_latest { Timestamp(0) } else { self.latest };
        let mut clock = Clock::resume(Arc::new(machine.clone()), self.anchor.as_ref(), latest);
        self.anchor = Some(clock.anchor().clone());
        self.latest = clock.now();
        clock
    }
}

/// Plays the events and checks that the store's time advances by the time that passes.
fn keeps_time(events: &[Event], mutant: Option<ClockMutant>) -> Result<(), TestCaseError> {
    let machine = Machine::new(mutant);
    let mut kept = Kept { anchor: None, latest: Timestamp(0) };
    let mut clock = kept.start(&machine);
    let mut before = clock.now();
    for event in events {
        // How far the store's time must advance. `None` if that cannot be known.
        let mut passed = Some(0);
        match *event {
            Event::Pass(time) => {
                machine.pass(time);
                passed = Some(time);
            }
            Event::Suspend(time) => {
                machine.suspend(time);
                passed = Some(time);
            }
            Event::SetWall(step) => machine.set_wall(step),
            Event::Commit => kept.latest = clock.now(),
            Event::Restart(time) => {
                machine.pass(time);
                clock = kept.start(&machine);
                passed = Some(time);
            }
            Event::Boot { off, set_wall } => {
                machine.boot(off);
                machine.set_wall(set_wall);
                // Over a boot the time may go back, but never behind the latest commit.
                before = kept.latest;
                clock = kept.start(&machine);
                let wall = Timestamp(machine.state().wall);
                prop_assert_eq!(clock.now(), before.max(wall), "after {:?}", event);
                passed = None;
            }
            Event::Reopen(ahead) => {
                kept.latest = Timestamp(kept.latest.0 + ahead);
                clock.advance_to(kept.latest);
                kept.anchor = Some(clock.anchor().clone());
                passed = Some((kept.latest.0 - before.0).max(0));
            }
        }
        let now = clock.now();
        prop_assert!(now >= before, "after {:?}: back from {:?} to {:?}", event, before, now);
        if let Some(passed) = passed {
            prop_assert_eq!(now.0 - before.0, passed, "after {:?}", event);
        }
        before = now;
    }
    Ok(())
}

fn run(mutant: Option<ClockMutant>) -> Result<(), String> {
    let config = Config { cases: 1000, failure_persistence: None, ..Config::default() };
    let played = TestRunner::new(config).run(&events(), |events| keeps_time(&events, mutant));
    played.map_err(|error| error.to_string())
}

#[test]
fn the_stores_time_advances_with_the_boot_clock_and_never_goes_back() {
    run(None).expect("a clock that keeps time");
}

#[rstest]
fn each_clock_mutant_is_caught(
    #[values(
        ClockMutant::FollowsWallClock,
        ClockMutant::AnchorsAtEachStart,
        ClockMutant::StopsInSuspension,
        ClockMutant::IgnoresBoots,
        ClockMutant::LosesLatestCommit
    )]
    mutant: ClockMutant,
) {
    run(Some(mutant)).expect_err("the mutant is caught");
}

async fn start(folder: &Path, machine: &Machine) -> EmbeddedStore {
    loop {
        let medium = Box::new(DataFile::in_folder(folder));
        // The thread of the previous store may not have closed the file yet.
        match EmbeddedStore::open_on(medium, RULES, Arc::new(machine.clone())).await {
            Ok(store) => return store,
            Err(super::OpenError::InUse(_)) => tokio::task::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    }
}

async fn apply(store: &EmbeddedStore, name: &str, edit: Edit) -> Record {
    let batch = Arc::new(vec![(key(name), edit)]);
    all_of(store.commit(batch, Duration::from_secs(60)).await.map(|done| done.records))
        .pop()
        .expect("a record")
        .record
}

/// Acquires the key without waiting, for [`TTL`].
fn acquire(id: LeaseId) -> Edit {
    ask(crate::lease::Acquisition { ttl: Ttl::new(TTL).expect("a TTL"), wait: false, ..asking(id) })
}

fn holders(record: &Record) -> Vec<LeaseId> {
    record.holders.iter().map(|holder| holder.id).collect()
}

/// In each case less than the TTL passes between two touches, as the holder measures it.
#[rstest]
#[case::set_ahead(&[Event::SetWall(60_000)])]
#[case::set_back(&[Event::SetWall(-60_000)])]
#[case::set_ahead_before_a_restart(&[Event::SetWall(60_000), Event::Restart(2_000)])]
#[case::set_back_before_a_restart(&[Event::SetWall(-60_000), Event::Restart(2_000)])]
#[case::set_ahead_over_a_boot(&[Event::Boot { off: 9_000, set_wall: 86_400_000 }])]
#[case::set_back_over_a_boot(&[Event::Boot { off: 9_000, set_wall: -86_400_000 }])]
#[case::all_of_them(&[
    Event::SetWall(60_000),
    Event::Restart(1_000),
    Event::Boot { off: 3_000, set_wall: 600_000 },
    Event::SetWall(-700_000),
    Event::Restart(1_000),
])]
#[tokio::test]
async fn no_step_of_the_wall_clock_makes_a_second_holder(#[case] events: &[Event]) {
    let folder = tempfile::tempdir().expect("a folder");
    let machine = Machine::new(None);
    let mut store = start(folder.path(), &machine).await;
    let (first, second) = (LeaseId::random(), LeaseId::random());
    let granted = apply(&store, "job", acquire(first)).await;
    machine.pass(5_000);
    for event in events {
        match *event {
            Event::SetWall(step) => machine.set_wall(step),
            Event::Restart(time) => {
                drop(store);
                machine.pass(time);
                store = start(folder.path(), &machine).await;
            }
            Event::Boot { off, set_wall } => {
                drop(store);
                machine.boot(off);
                machine.set_wall(set_wall);
                store = start(folder.path(), &machine).await;
            }
            _ => unreachable!("not among the cases"),
        }
    }
    // The first holder still relies on its lease: less than the TTL has passed.
    assert_eq!(holders(&apply(&store, "job", acquire(second)).await), [first]);
    let touched = apply(&store, "job", Edit::default().touch(first)).await;
    assert_eq!(holders(&touched), [first]);
    // Without another touch the lease lasts exactly one TTL from the latest touch.
    machine.pass(29_999);
    assert_eq!(holders(&apply(&store, "job", acquire(second)).await), [first]);
    machine.pass(1);
    let taken = apply(&store, "job", acquire(second)).await;
    assert_eq!(holders(&taken), [second]);
    assert!(taken.token > granted.token, "tokens rise");
}

#[tokio::test]
async fn a_boot_renews_leases_that_were_held_and_no_others() {
    let folder = tempfile::tempdir().expect("a folder");
    let machine = Machine::new(None);
    let store = start(folder.path(), &machine).await;
    let (lapsed, held, released) = (LeaseId::random(), LeaseId::random(), LeaseId::random());
    apply(&store, "lapsed", acquire(lapsed)).await;
    machine.pass(30_000);
    apply(&store, "free", acquire(released)).await;
    let free = apply(&store, "free", Edit::default().release(released)).await;
    // There are more records than one chunk has.
    let crowd = (0..2_500).map(|number| (key(&format!("crowd/{number}")), acquire(LeaseId::random())));
    store.commit(Arc::new(crowd.collect()), Duration::from_secs(60)).await.expect("a commit");
    let before = apply(&store, "held", acquire(held)).await;
    drop(store);
    machine.boot(3_600_000);
    let store = start(folder.path(), &machine).await;
    let now = Timestamp(machine.state().wall);
    let read = async |name: &str| all_of(store.read(vec![key(name)]).await).pop().expect("a record").record;
    let after = read("held").await;
    let renewed = Holder { expires_at: now + TTL, ..before.holders[0].clone() };
    assert_eq!(after, Record { holders: vec![renewed], rev: before.rev + 1, ..before });
    assert_eq!(read("free").await, free);
    assert!(read("lapsed").await.holders[0].expires_at < now, "the lease had lapsed before the boot");
    for number in [0, 999, 1_000, 2_499] {
        assert_eq!(read(&format!("crowd/{number}")).await.holders[0].expires_at, now + TTL);
    }
    assert!(read("held").await.token > FencingToken(0));

    // Only the first start after a boot renews. The second one uses the anchor of the first.
    drop(store);
    machine.pass(10_000);
    let store = start(folder.path(), &machine).await;
    let again = all_of(store.read(vec![key("held")]).await).pop().expect("a record");
    assert_eq!((again.record.holders[0].expires_at, again.now), (now + TTL, now + Duration::from_secs(10)));
}

/// One lease is released before the boot and one after it, both before their `min_hold` is over.
#[rstest]
#[case::set_ahead(86_400_000)]
#[case::set_back(-86_400_000)]
#[case::right(0)]
#[tokio::test]
async fn a_boot_does_not_end_a_min_hold(#[case] set_wall: i64) {
    let folder = tempfile::tempdir().expect("a folder");
    let machine = Machine::new(None);
    let store = start(folder.path(), &machine).await;
    let min_hold = Duration::from_secs(60);
    let (early, late) = (LeaseId::random(), LeaseId::random());
    for (name, id) in [("early", early), ("late", late)] {
        let ttl = Ttl::new(TTL).expect("a TTL");
        apply(&store, name, ask(crate::lease::Acquisition { ttl, min_hold, ..asking(id) })).await;
    }
    machine.pass(20_000);
    apply(&store, "early", Edit::default().release(early)).await;
    drop(store);
    machine.boot(9_000);
    machine.set_wall(set_wall);
    let store = start(folder.path(), &machine).await;
    apply(&store, "late", Edit::default().release(late)).await;
    machine.pass(39_999);
    for name in ["early", "late"] {
        assert_eq!(holders(&apply(&store, name, acquire(LeaseId::random())).await), [], "{name}");
    }
    machine.pass(1);
    for name in ["early", "late"] {
        let next = LeaseId::random();
        assert_eq!(holders(&apply(&store, name, acquire(next)).await), [next], "{name}");
    }
}

#[tokio::test]
async fn each_start_counts_as_a_boot_where_boots_have_no_names() {
    let folder = tempfile::tempdir().expect("a folder");
    let machine = Machine::new(Some(ClockMutant::AnchorsAtEachStart));
    let store = start(folder.path(), &machine).await;
    let id = LeaseId::random();
    apply(&store, "job", acquire(id)).await;
    drop(store);
    machine.set_wall(60_000);
    let store = start(folder.path(), &machine).await;
    assert_eq!(holders(&apply(&store, "job", acquire(LeaseId::random())).await), [id]);

    let renewed = apply(&store, "job", Edit::default()).await.holders[0].expires_at;
    let (file, away) = (folder.path().join(super::file::FILE), folder.path().join("away"));
    std::fs::rename(&file, &away).expect("the file");
    store.check().await.expect_err("the file is gone");
    machine.set_wall(60_000);
    std::fs::rename(&away, &file).expect("the file");
    store.check().await.expect("the file is back");
    let reopened = apply(&store, "job", Edit::default()).await.holders[0].expires_at;
    assert_eq!(reopened, renewed, "opening the file again is no start");
}

/// The earlier version kept neither an identity nor an anchor, and followed the wall clock.
#[tokio::test]
async fn a_file_of_an_earlier_version_gets_an_identity_and_its_leases_stay_held() {
    let folder = tempfile::tempdir().expect("a folder");
    let machine = Machine::new(None);
    let store = start(folder.path(), &machine).await;
    let id = LeaseId::random();
    apply(&store, "job", acquire(id)).await;
    let before = store.id();
    drop(store);
    let writing = loop {
        match redb::Database::open(folder.path().join(super::file::FILE)) {
            Ok(database) => break database.begin_write().expect("a transaction"),
            Err(redb::DatabaseError::DatabaseAlreadyOpen) => tokio::task::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    };
    writing.delete_table(super::facts::NAMES).expect("a table");
    writing.commit().expect("a commit");

    machine.set_wall(60_000);
    let store = start(folder.path(), &machine).await;
    let after = store.id();
    assert_ne!(after, before);
    assert_eq!(holders(&apply(&store, "job", acquire(LeaseId::random())).await), [id]);
    drop(store);
    assert_eq!(start(folder.path(), &machine).await.id(), after);
}

#[tokio::test]
async fn a_store_keeps_its_identity() {
    let (folder, other) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    let machine = Machine::new(None);
    let store = start(folder.path(), &machine).await;
    let id = store.id();
    assert_ne!(id, start(other.path(), &machine).await.id());
    drop(store);
    machine.boot(1_000);
    assert_eq!(start(folder.path(), &machine).await.id(), id);
}

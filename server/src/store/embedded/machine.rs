//! A machine whose clocks the test steps: its wall clock is set, it is suspended, it is started again, and daemons on it
//! come and go. The store's time goes by its boot clock alone, and nobody loses a lease to a clock that was set.

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

const RULES: Rules = Rules { grace: Duration::ZERO, place: Duration::from_secs(15) };
/// Of every lease here.
const TTL: Duration = Duration::from_secs(30);

/// Clones are the same machine.
#[derive(Debug, Clone)]
struct Machine(Arc<Mutex<State>>);

#[derive(Debug, Clone)]
struct State {
    /// The clocks in milliseconds.
    wall: i64,
    up: i64,
    suspended: i64,
    /// How often it was started.
    boots: u32,
    mistake: Option<Mistake>,
}

/// Ways to get the time wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mistake {
    /// The wall clock is followed while the machine is up.
    FollowsTheWall,
    /// The wall clock is asked at each start of a daemon.
    AsksTheWallAtEachStart,
    /// Time stands still during a suspension.
    SleepsToo,
    /// An anchor of another boot is gone by.
    TakesBootsForOne,
    /// What the latest commit showed is forgotten.
    ForgetsTheLatest,
}

impl Machine {
    fn new(mistake: Option<Mistake>) -> Self {
        let wall = 1_700_000_000_000;
        Self(Arc::new(Mutex::new(State { wall, up: 5_000, suspended: 0, boots: 1, mistake })))
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

    /// It is off for a while, and its wall clock is wherever that takes it.
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
        let shown = match state.mistake {
            Some(Mistake::FollowsTheWall) => state.wall,
            Some(Mistake::SleepsToo) => state.up - state.suspended,
            _ => state.up,
        };
        Duration::from_millis(u64::try_from(shown).expect("up"))
    }

    fn boot(&self) -> Option<String> {
        let state = self.state();
        match state.mistake {
            Some(Mistake::AsksTheWallAtEachStart) => None,
            Some(Mistake::TakesBootsForOne) => Some("boot".to_owned()),
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
    /// The daemon ends, and starts again after a while.
    Restart(i64),
    Boot {
        off: i64,
        set_wall: i64,
    },
    /// The daemon opens its file again, in which the latest commit is another daemon's and so much later.
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

/// What the file keeps of the clock.
struct Kept {
    anchor: Option<Anchor>,
    latest: Timestamp,
}

impl Kept {
    fn start(&mut self, machine: &Machine) -> Clock {
        let forgets = machine.state().mistake == Some(Mistake::ForgetsTheLatest);
        let latest = if forgets { Timestamp(0) } else { self.latest };
        let mut clock = Clock::resume(Arc::new(machine.clone()), self.anchor.as_ref(), latest);
        self.anchor = Some(clock.anchor().clone());
        self.latest = clock.now();
        clock
    }
}

/// Plays the events and compares the store's time with the time that passes.
fn keeps_time(events: &[Event], mistake: Option<Mistake>) -> Result<(), TestCaseError> {
    let machine = Machine::new(mistake);
    let mut kept = Kept { anchor: None, latest: Timestamp(0) };
    let mut clock = kept.start(&machine);
    let mut before = clock.now();
    for event in events {
        // How far the time goes, if that is known.
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
                // What was shown after the latest commit, no answer has told.
                before = kept.latest;
                clock = kept.start(&machine);
                let wall = Timestamp(machine.state().wall);
                prop_assert_eq!(clock.now(), before.max(wall), "after {:?}", event);
                passed = None;
            }
            Event::Reopen(ahead) => {
                kept.latest = Timestamp(kept.latest.0 + ahead);
                clock.reach(kept.latest);
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

fn run(mistake: Option<Mistake>) -> Result<(), String> {
    let config = Config { cases: 1000, failure_persistence: None, ..Config::default() };
    let played = TestRunner::new(config).run(&events(), |events| keeps_time(&events, mistake));
    played.map_err(|error| error.to_string())
}

#[test]
fn the_time_of_the_store_advances_as_the_boot_clock_and_never_goes_back() {
    run(None).expect("it keeps time");
}

#[rstest]
fn each_mistake_about_time_is_noticed(
    #[values(
        Mistake::FollowsTheWall,
        Mistake::AsksTheWallAtEachStart,
        Mistake::SleepsToo,
        Mistake::TakesBootsForOne,
        Mistake::ForgetsTheLatest
    )]
    mistake: Mistake,
) {
    run(Some(mistake)).expect_err("a mistake");
}

async fn start(folder: &Path, machine: &Machine) -> EmbeddedStore {
    loop {
        let medium = Box::new(DataFile::in_folder(folder));
        // The thread of the store before may not have closed the file yet.
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

/// Asks for the key without waiting.
fn for_a_while(id: LeaseId) -> Edit {
    ask(crate::lease::Acquisition { ttl: Ttl::new(TTL).expect("a TTL"), wait: false, ..asking(id) })
}

fn holders(record: &Record) -> Vec<LeaseId> {
    record.holders.iter().map(|holder| holder.id).collect()
}

/// What may happen to the machine between a touch and the next, each in less than the TTL of the holder's own time.
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
    let granted = apply(&store, "job", for_a_while(first)).await;
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
    // The first one still believes: less than its TTL has passed.
    assert_eq!(holders(&apply(&store, "job", for_a_while(second)).await), [first]);
    let touched = apply(&store, "job", Edit::default().touch(first)).await;
    assert_eq!(holders(&touched), [first]);
    // It falls silent, and its lease lasts a whole TTL from the touch, neither less nor more.
    machine.pass(29_999);
    assert_eq!(holders(&apply(&store, "job", for_a_while(second)).await), [first]);
    machine.pass(1);
    let taken = apply(&store, "job", for_a_while(second)).await;
    assert_eq!(holders(&taken), [second]);
    assert!(taken.token > granted.token, "tokens rise");
}

#[tokio::test]
async fn a_boot_renews_those_who_held_and_nobody_else() {
    let folder = tempfile::tempdir().expect("a folder");
    let machine = Machine::new(None);
    let store = start(folder.path(), &machine).await;
    let (lapsed, held, released) = (LeaseId::random(), LeaseId::random(), LeaseId::random());
    apply(&store, "lapsed", for_a_while(lapsed)).await;
    machine.pass(30_000);
    apply(&store, "free", for_a_while(released)).await;
    let free = apply(&store, "free", Edit::default().release(released)).await;
    // More than are looked through at a time.
    let crowd = (0..2_500).map(|number| (key(&format!("crowd/{number}")), for_a_while(LeaseId::random())));
    store.commit(Arc::new(crowd.collect()), Duration::from_secs(60)).await.expect("a commit");
    let before = apply(&store, "held", for_a_while(held)).await;
    drop(store);
    machine.boot(3_600_000);
    let store = start(folder.path(), &machine).await;
    let now = Timestamp(machine.state().wall);
    let look = async |name: &str| all_of(store.read(vec![key(name)]).await).pop().expect("a record").record;
    let after = look("held").await;
    let renewed = Holder { expires_at: now + TTL, ..before.holders[0].clone() };
    assert_eq!(after, Record { holders: vec![renewed], rev: before.rev + 1, ..before });
    assert_eq!(look("free").await, free);
    assert!(look("lapsed").await.holders[0].expires_at < now, "it ended long before");
    for number in [0, 999, 1_000, 2_499] {
        assert_eq!(look(&format!("crowd/{number}")).await.holders[0].expires_at, now + TTL);
    }
    assert!(look("held").await.token > FencingToken(0));

    // Only the first start after it: the second goes by the anchor that this one left.
    drop(store);
    machine.pass(10_000);
    let store = start(folder.path(), &machine).await;
    let again = all_of(store.read(vec![key("held")]).await).pop().expect("a record");
    assert_eq!((again.record.holders[0].expires_at, again.now), (now + TTL, now + Duration::from_secs(10)));
}

/// One key is released before the boot and one after it. Less than the `min_hold` has passed for anyone.
#[rstest]
#[case::set_ahead(86_400_000)]
#[case::set_back(-86_400_000)]
#[case::right(0)]
#[tokio::test]
async fn a_boot_ends_no_min_hold(#[case] set_wall: i64) {
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
        assert_eq!(holders(&apply(&store, name, for_a_while(LeaseId::random())).await), [], "{name}");
    }
    machine.pass(1);
    for name in ["early", "late"] {
        let next = LeaseId::random();
        assert_eq!(holders(&apply(&store, name, for_a_while(next)).await), [next], "{name}");
    }
}

#[tokio::test]
async fn where_boots_have_no_names_each_start_counts_as_one() {
    let folder = tempfile::tempdir().expect("a folder");
    let machine = Machine::new(Some(Mistake::AsksTheWallAtEachStart));
    let store = start(folder.path(), &machine).await;
    let id = LeaseId::random();
    apply(&store, "job", for_a_while(id)).await;
    drop(store);
    machine.set_wall(60_000);
    let store = start(folder.path(), &machine).await;
    assert_eq!(holders(&apply(&store, "job", for_a_while(LeaseId::random())).await), [id]);

    let renewed = apply(&store, "job", Edit::default()).await.holders[0].expires_at;
    let (file, away) = (folder.path().join(super::file::FILE), folder.path().join("away"));
    std::fs::rename(&file, &away).expect("the file");
    store.check().await.expect_err("the file is gone");
    machine.set_wall(60_000);
    std::fs::rename(&away, &file).expect("the file");
    store.check().await.expect("it is back");
    let reopened = apply(&store, "job", Edit::default()).await.holders[0].expires_at;
    assert_eq!(reopened, renewed, "a file that is opened again within one start is none");
}

/// The earlier version kept neither an identity nor an anchor, and went by the wall clock.
#[tokio::test]
async fn a_file_of_an_earlier_version_gets_an_identity_and_takes_nothing_from_its_holders() {
    let folder = tempfile::tempdir().expect("a folder");
    let machine = Machine::new(None);
    let store = start(folder.path(), &machine).await;
    let id = LeaseId::random();
    apply(&store, "job", for_a_while(id)).await;
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
    assert_eq!(holders(&apply(&store, "job", for_a_while(LeaseId::random())).await), [id]);
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

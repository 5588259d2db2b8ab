//! What disks do: lose power in the middle of a write, run full, fail to sync, rot. The store stands on a disk that
//! does these things when told to, and must have everything that it has acknowledged.

use std::collections::HashMap;
use std::io::{Error, ErrorKind, Result};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use redb::{BackendError, StorageBackend};
use tokio::sync::oneshot;

use super::clock::Host;
use super::facts::blank;
use super::file::{Medium, OpenError};
use super::writer::{Commit, Home, together};
use crate::lease::{Acquisition, Edit, Key, LeaseId, Record, Rules};
use crate::store::conformance::reading::{ask, asking, key};
use crate::store::failure::Failure;

const RULES: Rules = Rules { grace: Duration::ZERO, place: Duration::from_secs(15) };

/// A disk in memory with a cache that power loss empties. Clones are the same one.
#[derive(Debug, Clone, Default)]
struct Platter(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// What is there after a loss of power.
    kept: Vec<u8>,
    /// What a read shows.
    shown: Vec<u8>,
    /// What was written and is not kept yet.
    cached: Vec<Change>,
    /// Writes until the power fails.
    power: Option<usize>,
    /// The length past which there is no room.
    room: Option<usize>,
    /// The next sync fails, and what is in the cache is never kept.
    sync_fails: bool,
    /// A sync does nothing and says that it did.
    sync_lies: bool,
    /// The next write panics.
    write_panics: bool,
    /// The file is removed before the next sync is done, and stays so.
    goes: bool,
    /// The file is not at its path.
    gone: bool,
}

#[derive(Debug, Clone)]
enum Change {
    Length(usize),
    Bytes(usize, Vec<u8>),
}

impl Change {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Length(length) => bytes.resize(*length, 0),
            Self::Bytes(offset, data) => {
                let end = offset + data.len();
                bytes.resize(bytes.len().max(end), 0);
                bytes[*offset..end].copy_from_slice(data);
            }
        }
    }
}

impl State {
    fn change(&mut self, change: Change) -> Result<()> {
        if let Some(left) = &mut self.power {
            *left = left.checked_sub(1).ok_or_else(|| Error::other("the power is off"))?;
        }
        let end = match &change {
            Change::Length(length) => *length,
            Change::Bytes(offset, data) => offset + data.len(),
        };
        assert!(!std::mem::take(&mut self.write_panics), "a panic in the middle of a write");
        if self.room.is_some_and(|room| end > room) {
            return Err(ErrorKind::StorageFull.into());
        }
        change.apply(&mut self.shown);
        self.cached.push(change);
        Ok(())
    }

    fn sync(&mut self) -> Result<()> {
        if self.power == Some(0) {
            return Err(Error::other("the power is off"));
        }
        self.gone |= self.goes;
        if std::mem::take(&mut self.sync_fails) {
            self.cached.clear();
            return Err(Error::other("input/output error"));
        }
        if !self.sync_lies {
            for change in self.cached.drain(..) {
                change.apply(&mut self.kept);
            }
        }
        Ok(())
    }
}

impl Platter {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The power fails and comes back. Of what was cached, anything may have been kept, in part and in any order.
    fn lose_power(&self, home: Home, luck: &mut impl FnMut() -> u8) {
        self.state().power = Some(0);
        drop(home);
        let state = &mut *self.state();
        for change in state.cached.drain(..) {
            match (luck() % 3, change) {
                (0, _) => {}
                (1, Change::Bytes(offset, mut data)) => {
                    data.truncate(usize::from(luck()) * 512);
                    Change::Bytes(offset, data).apply(&mut state.kept);
                }
                (_, change) => change.apply(&mut state.kept),
            }
        }
        state.shown = state.kept.clone();
        state.power = None;
    }

    fn open(&self) -> std::result::Result<Home, OpenError> {
        Home::open(Box::new(self.clone()), RULES, Arc::new(Host))
    }
}

impl Medium for Platter {
    fn path(&self) -> &Path {
        Path::new("platter")
    }

    fn prepare(&self) -> std::result::Result<(), OpenError> {
        let state = &mut *self.state();
        if state.shown.is_empty() {
            state.kept = blank();
            state.shown.clone_from(&state.kept);
        }
        Ok(())
    }

    fn mount(&self) -> std::result::Result<Arc<dyn StorageBackend>, OpenError> {
        self.find()?;
        Ok(Arc::new(self.clone()))
    }

    fn find(&self) -> std::result::Result<(), OpenError> {
        if self.state().gone {
            Err(OpenError::Gone(self.path().to_owned(), "it was removed"))
        } else {
            Ok(())
        }
    }
}

impl StorageBackend for Platter {
    fn len(&self) -> Result<u64> {
        Ok(self.state().shown.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let offset = usize::try_from(offset).map_err(Error::other)?;
        let state = self.state();
        let bytes = state.shown.get(offset..offset + out.len()).ok_or(ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(bytes);
        Ok(())
    }

    fn set_len(&self, length: u64) -> Result<()> {
        self.state().change(Change::Length(usize::try_from(length).map_err(Error::other)?))
    }

    fn sync_data(&self) -> Result<()> {
        self.state().sync()
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.state().change(Change::Bytes(usize::try_from(offset).map_err(Error::other)?, data.to_vec()))
    }

    fn try_lock_range(
        &self,
        _: std::ops::Bound<u64>,
        _: std::ops::Bound<u64>,
    ) -> std::result::Result<bool, BackendError> {
        Ok(true)
    }

    fn unlock_range(
        &self,
        _: std::ops::Bound<u64>,
        _: std::ops::Bound<u64>,
    ) -> std::result::Result<(), BackendError> {
        Ok(())
    }
}

/// The store as its callers know it: what it has acknowledged.
struct Ledger {
    platter: Platter,
    /// `None` while there is no power.
    home: Option<Home>,
    acknowledged: HashMap<Key, Record>,
    /// The latest id on each key, for a release.
    asked: HashMap<Key, LeaseId>,
}

impl Ledger {
    fn new(platter: &Platter) -> Self {
        let home = Some(platter.open().expect("an empty platter"));
        Self { platter: platter.clone(), home, acknowledged: HashMap::new(), asked: HashMap::new() }
    }

    fn home(&self) -> &Home {
        self.home.as_ref().expect("power")
    }

    fn lose_power(&mut self, mut luck: impl FnMut() -> u8) -> std::result::Result<(), TestCaseError> {
        self.platter.lose_power(self.home.take().expect("power"), &mut luck);
        let opened = self.platter.open();
        self.home = Some(opened.map_err(|error| TestCaseError::fail(error.to_string()))?);
        self.check()
    }

    /// On each of these keys a lease is released or a new one acquired.
    fn commit(&mut self, keys: &[u8], bulk: usize) -> std::result::Result<(), Failure> {
        let mut batch = Vec::new();
        for name in keys {
            let key = key(&format!("key/{name}"));
            let edit = match self.asked.remove(&key) {
                Some(id) => Edit::default().release(id),
                None => {
                    let id = LeaseId::random();
                    self.asked.insert(key.clone(), id);
                    let metadata = [("x".to_owned(), "y".repeat(bulk))].into();
                    ask(Acquisition { metadata, ..asking(id) })
                }
            };
            batch.push((key, edit));
        }
        for answer in self.home().commit(&batch)? {
            let snapshot = answer.expect("a record that can be read");
            self.acknowledged.insert(snapshot.record.key.clone(), snapshot.record);
        }
        Ok(())
    }

    /// Everything acknowledged is there, or what came of it later.
    fn check(&mut self) -> std::result::Result<(), TestCaseError> {
        for (key, acknowledged) in &self.acknowledged {
            let found =
                self.home().look(key).map_err(|failure| TestCaseError::fail(format!("{failure:?}")))?;
            let found = found.unwrap_or_else(|| Record::vacant(key.clone()));
            prop_assert!(found.rev >= acknowledged.rev, "{key}: an acknowledged commit is gone");
            prop_assert!(found.rev > acknowledged.rev || found == *acknowledged, "{key}: another record");
            prop_assert!(found.token >= acknowledged.token, "{key}: a token went back");
        }
        // What became of the unacknowledged is known from here on.
        self.asked.clear();
        for key in self.acknowledged.keys() {
            if let Ok(Some(found)) = self.home().look(key) {
                self.asked.extend(found.holders.first().map(|holder| (key.clone(), holder.id)));
            }
        }
        Ok(())
    }
}

/// Between commits, or so many writes into the next one, the power fails.
#[derive(Debug, Clone)]
struct Life {
    batches: Vec<Vec<u8>>,
    last_writes: usize,
    luck: Vec<u8>,
}

fn lives() -> impl Strategy<Value = Vec<Life>> {
    let keys = prop::collection::btree_set(0_u8..20, 1..8);
    let batches = prop::collection::vec(keys.prop_map(|keys| keys.into_iter().collect()), 1..8);
    let life = (batches, 0_usize..40, prop::collection::vec(any::<u8>(), 1..50))
        .prop_map(|(batches, last_writes, luck)| Life { batches, last_writes, luck });
    prop::collection::vec(life, 1..5)
}

fn survives(lives: &[Life], sync_lies: bool) -> std::result::Result<(), TestCaseError> {
    let platter = Platter::default();
    let mut ledger = Ledger::new(&platter);
    platter.state().sync_lies = sync_lies;
    for life in lives {
        let (last, batches) = life.batches.split_last().expect("a batch at least");
        for batch in batches {
            ledger.commit(batch, 300).map_err(|failure| TestCaseError::fail(format!("{failure:?}")))?;
        }
        platter.state().power = Some(life.last_writes);
        // It may or may not be done before the power fails.
        drop(ledger.commit(last, 300));
        let mut luck = life.luck.iter().copied().cycle();
        ledger.lose_power(|| luck.next().unwrap_or(0))?;
    }
    Ok(())
}

fn run<T: std::fmt::Debug>(
    cases: u32,
    strategy: &impl Strategy<Value = T>,
    test: impl Fn(T) -> std::result::Result<(), TestCaseError>,
) -> std::result::Result<(), String> {
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 200, ..Config::default() };
    TestRunner::new(config).run(strategy, test).map_err(|error| error.to_string())
}

#[test]
fn what_is_acknowledged_outlasts_a_loss_of_power() {
    run(150, &lives(), |lives| survives(&lives, false)).expect("nothing acknowledged is lost");
    run(150, &lives(), |lives| survives(&lives, true)).expect_err("a sync that does nothing is noticed");
}

/// A sync fails in the second of these commits; then the power does.
fn after_a_failed_sync(forgets: bool) -> std::result::Result<(), TestCaseError> {
    let platter = Platter::default();
    let mut ledger = Ledger::new(&platter);
    let failed = |failure| TestCaseError::fail(format!("{failure:?}"));
    // Leaves room in the file: the sync of one that grows comes before the commit.
    ledger.commit(&(20..40).collect::<Vec<_>>(), 3000).map_err(failed)?;
    // Each record has a page of its own, so that a later commit does not happen to write it anew.
    ledger.commit(&[0, 1, 2], 3000).map_err(failed)?;
    platter.state().sync_fails = true;
    assert!(matches!(ledger.commit(&[1, 2, 3], 3000), Err(Failure::Unknown(_))));
    if forgets {
        ledger.home().forget_unsynced();
    }
    ledger.commit(&[5], 3000).map_err(failed)?;
    ledger.check()?;
    ledger.commit(&[6], 3000).map_err(failed)?;
    ledger.lose_power(|| 0)
}

#[test]
fn what_a_failed_sync_dropped_is_written_again() {
    after_a_failed_sync(false).expect("nothing acknowledged is lost");
    after_a_failed_sync(true).expect_err("it is lost if it is not written again");
}

#[test]
fn a_full_disk_refuses_and_goes_on_when_there_is_room() {
    let platter = Platter::default();
    let mut ledger = Ledger::new(&platter);
    ledger.commit(&[0, 1, 2], 300).expect("a commit");
    let room = platter.state().shown.len();
    platter.state().room = Some(room);
    let mut refused = 0;
    for name in 10..30 {
        // What fits is acknowledged, and what does not is not.
        refused += usize::from(ledger.commit(&[name], 40_000).is_err());
    }
    assert!(refused > 10, "{refused} refused");
    platter.state().room = None;
    ledger.home().check().expect("it takes writes again");
    ledger.check().expect("everything acknowledged is there");
    ledger.commit(&[40, 41], 300).expect("a commit");
    ledger.lose_power(|| 0).expect("everything acknowledged is there");
}

#[test]
fn a_panic_in_the_middle_of_a_write_is_a_failure_of_that_commit_alone() {
    let platter = Platter::default();
    let mut ledger = Ledger::new(&platter);
    ledger.commit(&[0, 1, 2], 300).expect("a commit");
    platter.state().write_panics = true;
    assert_eq!(answers(ledger.home(), &[(&["a"], true), (&["b"], true)]), [None, None]);
    ledger.home().check().expect("it is opened anew");
    ledger.check().expect("everything acknowledged is there");
    ledger.commit(&[2, 3], 300).expect("a commit");
    ledger.lose_power(|| 0).expect("everything acknowledged is there");
}

#[test]
fn a_commit_whose_file_is_removed_before_it_is_answered_is_not_acknowledged() {
    let platter = Platter::default();
    let mut ledger = Ledger::new(&platter);
    ledger.commit(&[0], 300).expect("a commit");
    platter.state().goes = true;
    assert!(matches!(ledger.commit(&[1], 300), Err(Failure::Unknown(_))));
    let failure = ledger.commit(&[2], 300).expect_err("it stays away");
    let Failure::NotApplied(why) = &failure else { panic!("{failure:?}") };
    assert!(why.contains("is not the file that this daemon opened (it was removed)"), "{why}");
    assert!(ledger.home().check().is_err());
    platter.state().goes = false;
    platter.state().gone = false;
    ledger.home().check().expect("it is back");
    ledger.commit(&[1, 2], 300).expect("a commit");
    ledger.check().expect("everything acknowledged is there");
}

#[test]
fn a_disk_set_back_to_an_earlier_state_is_not_taken_for_the_same() {
    let platter = Platter::default();
    let mut ledger = Ledger::new(&platter);
    ledger.commit(&[0], 300).expect("a commit");
    let earlier = platter.state().kept.clone();
    let before = ledger.home().now();
    while ledger.home().now() == before {}
    ledger.commit(&[1], 300).expect("a commit");
    let latest = platter.state().kept.clone();
    platter.state().sync_fails = true;
    ledger.commit(&[2], 300).expect_err("a sync that fails");
    let put = |bytes: &[u8]| {
        let mut state = platter.state();
        state.kept = bytes.to_vec();
        state.shown = bytes.to_vec();
    };
    put(&earlier);
    let why = ledger.home().check().expect_err("another file").into_cause();
    assert!(why.contains("lacks commits that were acknowledged"), "{why}");
    assert!(platter.state().shown == earlier, "it was written to");
    put(&latest);
    ledger.home().check().expect("it is back");
    ledger.check().expect("everything acknowledged is there");
}

/// Changes to the bytes of a whole file.
#[derive(Debug, Clone)]
enum Damage {
    Flip(prop::sample::Index, u8),
    Zero(prop::sample::Index, usize),
    Cut(prop::sample::Index),
}

fn damages() -> impl Strategy<Value = (bool, Damage)> {
    let at = any::<prop::sample::Index>;
    let damage = prop_oneof![
        3 => (at(), 1_u8..).prop_map(|(at, bits)| Damage::Flip(at, bits)),
        2 => (at(), 1_usize..8192).prop_map(|(at, length)| Damage::Zero(at, length)),
        2 => at().prop_map(Damage::Cut),
    ];
    (any::<bool>(), damage)
}

/// A file before and after its latest commit.
struct Whole {
    bytes: Vec<u8>,
    before: HashMap<Key, Record>,
    after: HashMap<Key, Record>,
}

impl Whole {
    /// The damaged file is refused and left as it is, or it shows what was there. Damage to the latest commit looks
    /// like one that was under way when the power failed; then what was there before it may show.
    fn is_noticed_or_harmless(&self, damage: &Damage) -> bool {
        let mut bytes = self.bytes.clone();
        match damage {
            Damage::Flip(at, bits) => bytes[at.index(self.bytes.len())] ^= bits,
            Damage::Zero(at, length) => {
                let start = at.index(self.bytes.len());
                let end = (start + length).min(self.bytes.len());
                bytes[start..end].fill(0);
            }
            Damage::Cut(at) => bytes.truncate(at.index(self.bytes.len())),
        }
        let platter = Platter::default();
        platter.state().kept.clone_from(&bytes);
        platter.state().shown.clone_from(&bytes);
        match platter.open() {
            Ok(_) if bytes.is_empty() => true,
            Ok(home) => [&self.before, &self.after].into_iter().any(|records| shows(&home, records)),
            Err(_) => platter.state().shown == bytes,
        }
    }
}

fn shows(home: &Home, records: &HashMap<Key, Record>) -> bool {
    records.iter().all(|(key, record)| home.look(key).is_ok_and(|found| found.as_ref() == Some(record)))
}

#[test]
fn damage_is_noticed_at_start_and_nothing_is_changed() {
    let platter = Platter::default();
    let mut ledger = Ledger::new(&platter);
    let mut before = HashMap::new();
    for round in 0..10 {
        before = ledger.acknowledged.clone();
        ledger.commit(&(round..round + 15).collect::<Vec<_>>(), 300).expect("a commit");
    }
    let after = &ledger.acknowledged;
    let whole =
        || Whole { bytes: platter.state().shown.clone(), before: before.clone(), after: after.clone() };
    let crashed = whole();
    drop(ledger.home.take());
    let closed = whole();
    run(400, &damages(), |(clean, damage)| {
        let whole = if clean { &closed } else { &crashed };
        prop_assert!(whole.is_noticed_or_harmless(&damage), "clean: {clean}");
        Ok(())
    })
    .expect("damage is noticed");
}

/// What batches that wait for the writer together are answered: for each its keys, if it was applied.
fn answers(home: &Home, batches: &[(&[&str], bool)]) -> Vec<Option<Vec<Key>>> {
    let (now, mut receivers) = (home.up(), Vec::new());
    let group = batches.iter().map(|(names, in_time)| {
        let edits = names.iter().map(|name| (key(name), ask(asking(LeaseId::random())))).collect();
        let (reply, receiver) = oneshot::channel();
        receivers.push(receiver);
        let until = if *in_time { now + Duration::from_secs(60) } else { Duration::ZERO };
        Commit { batch: Arc::new(edits), until, reply }
    });
    together(home, group.collect());
    let answers = receivers.into_iter().map(|mut receiver| receiver.try_recv().ok()?.ok());
    answers
        .map(|answers| answers?.into_iter().map(|answer| Some(answer.ok()?.record.key)).collect())
        .collect()
}

#[test]
fn batches_that_wait_together_share_a_sync_and_have_their_own_answers() {
    let platter = Platter::default();
    let home = platter.open().expect("a new file");
    let keys = |names: &[&str]| Some(names.iter().map(|name| key(name)).collect::<Vec<_>>());
    let batches: [(&[&str], bool); 3] = [(&["a", "b"], true), (&["late"], false), (&["c"], true)];
    assert_eq!(answers(&home, &batches), [keys(&["a", "b"]), None, keys(&["c"])]);
    assert_eq!(home.look(&key("late")).expect("a read"), None, "it was given up before it began");

    // Only one sync fails: a second one would acknowledge the second batch.
    platter.state().sync_fails = true;
    assert_eq!(answers(&home, &[(&["d"], true), (&["e"], true)]), [None, None]);
    assert_eq!(answers(&home, &[(&["d"], true), (&["e"], true)]), [keys(&["d"]), keys(&["e"])]);
}

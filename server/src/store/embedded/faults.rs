//! Tests with disk faults: a loss of power in the middle of a write, a full disk, a sync that
//! fails, damaged bytes. The store runs on a disk in memory that has these faults on demand. Every
//! acknowledged commit must survive them.

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
use super::facts::empty_database;
use super::file::{Medium, OpenError};
use super::writer::{Commit, OpenStore, commit_group};
use crate::lease::{Acquisition, Edit, Key, LeaseId, Record, Rules};
use crate::store::conformance::reading::{ask, asking, key};
use crate::store::failure::Failure;

const RULES: Rules = Rules { grace: Duration::ZERO, waiter_ttl: Duration::from_secs(15) };

/// A disk in memory, with a cache that is lost when the power fails. All clones share one disk.
#[derive(Debug, Clone, Default)]
struct FaultyDisk(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// The bytes that survive a loss of power.
    durable: Vec<u8>,
    /// The bytes that a read returns.
    visible: Vec<u8>,
    /// The operations since the latest successful sync.
    unsynced: Vec<DiskOp>,
    /// How many more writes succeed before the power fails.
    writes_left: Option<usize>,
    /// The length that the file cannot exceed.
    capacity: Option<usize>,
    /// The next sync fails, and the cached operations are dropped.
    sync_fails: bool,
    /// Every sync reports success and does nothing.
    sync_lies: bool,
    /// The next write panics.
    write_panics: bool,
    /// The file is removed during the next sync.
    vanishes: bool,
    /// The file is not at its path.
    missing: bool,
}

#[derive(Debug, Clone)]
enum DiskOp {
    SetLen(usize),
    Write(usize, Vec<u8>),
}

impl DiskOp {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::SetLen(length) => bytes.resize(*length, 0),
            Self::Write(offset, data) => {
                let end = offset + data.len();
                bytes.resize(bytes.len().max(end), 0);
                bytes[*offset..end].copy_from_slice(data);
            }
        }
    }
}

impl State {
    fn perform(&mut self, op: DiskOp) -> Result<()> {
        if let Some(left) = &mut self.writes_left {
            *left = left.checked_sub(1).ok_or_else(|| Error::other("the power is off"))?;
        }
        let end = match &op {
            DiskOp::SetLen(length) => *length,
            DiskOp::Write(offset, data) => offset + data.len(),
        };
        assert!(!std::mem::take(&mut self.write_panics), "a panic in the middle of a write");
        if self.capacity.is_some_and(|capacity| end > capacity) {
            return Err(ErrorKind::StorageFull.into());
        }
        op.apply(&mut self.visible);
        self.unsynced.push(op);
        Ok(())
    }

    fn sync(&mut self) -> Result<()> {
        if self.writes_left == Some(0) {
            return Err(Error::other("the power is off"));
        }
        self.missing |= self.vanishes;
        if std::mem::take(&mut self.sync_fails) {
            self.unsynced.clear();
            return Err(Error::other("input/output error"));
        }
        if !self.sync_lies {
            for op in self.unsynced.drain(..) {
                op.apply(&mut self.durable);
            }
        }
        Ok(())
    }
}

impl FaultyDisk {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the power fail and return. `chance` decides which cached operations survive, and how
    /// much of each.
    fn lose_power(&self, store: OpenStore, chance: &mut impl FnMut() -> u8) {
        self.state().writes_left = Some(0);
        drop(store);
        let state = &mut *self.state();
        for op in state.unsynced.drain(..) {
            match (chance() % 3, op) {
                (0, _) => {}
                (1, DiskOp::Write(offset, mut data)) => {
                    data.truncate(usize::from(chance()) * 512);
                    DiskOp::Write(offset, data).apply(&mut state.durable);
                }
                (_, op) => op.apply(&mut state.durable),
            }
        }
        state.visible = state.durable.clone();
        state.writes_left = None;
    }

    fn open(&self) -> std::result::Result<OpenStore, OpenError> {
        OpenStore::open(Box::new(self.clone()), RULES, Arc::new(Host))
    }
}

impl Medium for FaultyDisk {
    fn path(&self) -> &Path {
        Path::new("disk")
    }

    fn prepare(&self) -> std::result::Result<(), OpenError> {
        let state = &mut *self.state();
        if state.visible.is_empty() {
            state.durable = empty_database();
            state.visible.clone_from(&state.durable);
        }
        Ok(())
    }

    fn mount(&self) -> std::result::Result<Arc<dyn StorageBackend>, OpenError> {
        self.check_path()?;
        Ok(Arc::new(self.clone()))
    }

    fn check_path(&self) -> std::result::Result<(), OpenError> {
        if self.state().missing {
            Err(OpenError::Gone(self.path().to_owned(), "it was removed"))
        } else {
            Ok(())
        }
    }
}

impl StorageBackend for FaultyDisk {
    fn len(&self) -> Result<u64> {
        Ok(self.state().visible.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let offset = usize::try_from(offset).map_err(Error::other)?;
        let state = self.state();
        let bytes = state.visible.get(offset..offset + out.len()).ok_or(ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(bytes);
        Ok(())
    }

    fn set_len(&self, length: u64) -> Result<()> {
        self.state().perform(DiskOp::SetLen(usize::try_from(length).map_err(Error::other)?))
    }

    fn sync_data(&self) -> Result<()> {
        self.state().sync()
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.state().perform(DiskOp::Write(usize::try_from(offset).map_err(Error::other)?, data.to_vec()))
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

/// A store, and everything that it has acknowledged to its callers.
struct Ledger {
    disk: FaultyDisk,
    /// `None` while there is no power.
    store: Option<OpenStore>,
    acknowledged: HashMap<Key, Record>,
    /// The latest lease on each key, for a release.
    leases: HashMap<Key, LeaseId>,
}

impl Ledger {
    fn new(disk: &FaultyDisk) -> Self {
        let store = Some(disk.open().expect("an empty disk"));
        Self { disk: disk.clone(), store, acknowledged: HashMap::new(), leases: HashMap::new() }
    }

    fn store(&self) -> &OpenStore {
        self.store.as_ref().expect("power")
    }

    fn lose_power(&mut self, mut chance: impl FnMut() -> u8) -> std::result::Result<(), TestCaseError> {
        self.disk.lose_power(self.store.take().expect("power"), &mut chance);
        let opened = self.disk.open();
        self.store = Some(opened.map_err(|error| TestCaseError::fail(error.to_string()))?);
        self.check()
    }

    /// Releases the lease on each of these keys, or acquires one with `bulk` bytes of metadata if
    /// there is none.
    fn commit(&mut self, keys: &[u8], bulk: usize) -> std::result::Result<(), Failure> {
        let mut batch = Vec::new();
        for name in keys {
            let key = key(&format!("key/{name}"));
            let edit = match self.leases.remove(&key) {
                Some(id) => Edit::default().release(id),
                None => {
                    let id = LeaseId::random();
                    self.leases.insert(key.clone(), id);
                    let metadata = [("x".to_owned(), "y".repeat(bulk))].into();
                    ask(Acquisition { metadata, ..asking(id) })
                }
            };
            batch.push((key, edit));
        }
        for answer in self.store().commit(&batch)? {
            let snapshot = answer.expect("a record that can be read");
            self.acknowledged.insert(snapshot.record.key.clone(), snapshot.record);
        }
        Ok(())
    }

    /// Checks that each acknowledged record is there, or a later version of it.
    fn check(&mut self) -> std::result::Result<(), TestCaseError> {
        for (key, acknowledged) in &self.acknowledged {
            let found =
                self.store().read(key).map_err(|failure| TestCaseError::fail(format!("{failure:?}")))?;
            let found = found.unwrap_or_else(|| Record::vacant(key.clone()));
            prop_assert!(found.rev >= acknowledged.rev, "{key}: an acknowledged commit is missing");
            prop_assert!(found.rev > acknowledged.rev || found == *acknowledged, "{key}: another record");
            prop_assert!(found.token >= acknowledged.token, "{key}: a token went back");
        }
        // Commits that were not acknowledged may have been applied or not. The records show which.
        self.leases.clear();
        for key in self.acknowledged.keys() {
            if let Ok(Some(found)) = self.store().read(key) {
                self.leases.extend(found.holders.first().map(|holder| (key.clone(), holder.id)));
            }
        }
        Ok(())
    }
}

/// Some commits, and then a last one. The power fails after `last_writes` writes of the last one,
/// or right after it if it makes fewer.
#[derive(Debug, Clone)]
struct PowerCycle {
    batches: Vec<Vec<u8>>,
    last_writes: usize,
    chance: Vec<u8>,
}

fn power_cycles() -> impl Strategy<Value = Vec<PowerCycle>> {
    let keys = prop::collection::btree_set(0_u8..20, 1..8);
    let batches = prop::collection::vec(keys.prop_map(|keys| keys.into_iter().collect()), 1..8);
    let cycle = (batches, 0_usize..40, prop::collection::vec(any::<u8>(), 1..50))
        .prop_map(|(batches, last_writes, chance)| PowerCycle { batches, last_writes, chance });
    prop::collection::vec(cycle, 1..5)
}

fn survives(power_cycles: &[PowerCycle], sync_lies: bool) -> std::result::Result<(), TestCaseError> {
    let disk = FaultyDisk::default();
    let mut ledger = Ledger::new(&disk);
    disk.state().sync_lies = sync_lies;
    for cycle in power_cycles {
        let (last, batches) = cycle.batches.split_last().expect("a batch at least");
        for batch in batches {
            ledger.commit(batch, 300).map_err(|failure| TestCaseError::fail(format!("{failure:?}")))?;
        }
        disk.state().writes_left = Some(cycle.last_writes);
        // The commit may or may not complete before the power fails.
        drop(ledger.commit(last, 300));
        let mut chance = cycle.chance.iter().copied().cycle();
        ledger.lose_power(|| chance.next().unwrap_or(0))?;
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
fn acknowledged_commits_survive_a_loss_of_power() {
    run(150, &power_cycles(), |power_cycles| survives(&power_cycles, false))
        .expect("nothing acknowledged is lost");
    run(150, &power_cycles(), |power_cycles| survives(&power_cycles, true))
        .expect_err("a sync that does nothing is noticed");
}

/// Commits, lets the sync of the next commit fail, commits again, and loses power.
fn after_a_failed_sync(omits_rewrite: bool) -> std::result::Result<(), TestCaseError> {
    let disk = FaultyDisk::default();
    let mut ledger = Ledger::new(&disk);
    let failed = |failure| TestCaseError::fail(format!("{failure:?}"));
    // Makes room in the file first. A file that grows is synced before the commit, and the failure
    // would hit that sync.
    ledger.commit(&(20..40).collect::<Vec<_>>(), 3000).map_err(failed)?;
    // Records so large that each has a page of its own. Otherwise a later commit could rewrite them
    // by chance.
    ledger.commit(&[0, 1, 2], 3000).map_err(failed)?;
    disk.state().sync_fails = true;
    assert!(matches!(ledger.commit(&[1, 2, 3], 3000), Err(Failure::Unknown(_))));
    if omits_rewrite {
        ledger.store().forget_unsynced();
    }
    ledger.commit(&[5], 3000).map_err(failed)?;
    ledger.check()?;
    ledger.commit(&[6], 3000).map_err(failed)?;
    ledger.lose_power(|| 0)
}

#[test]
fn writes_that_a_failed_sync_dropped_are_written_again() {
    after_a_failed_sync(false).expect("nothing acknowledged is lost");
    after_a_failed_sync(true).expect_err("a commit is lost if its writes are not repeated");
}

#[test]
fn a_full_disk_refuses_commits_until_there_is_room_again() {
    let disk = FaultyDisk::default();
    let mut ledger = Ledger::new(&disk);
    ledger.commit(&[0, 1, 2], 300).expect("a commit");
    let length = disk.state().visible.len();
    disk.state().capacity = Some(length);
    let mut refused = 0;
    for name in 10..30 {
        // A commit that fits is acknowledged. Any other is refused.
        refused += usize::from(ledger.commit(&[name], 40_000).is_err());
    }
    assert!(refused > 10, "{refused} refused");
    disk.state().capacity = None;
    ledger.store().check().expect("writes succeed again");
    ledger.check().expect("everything acknowledged is there");
    ledger.commit(&[40, 41], 300).expect("a commit");
    ledger.lose_power(|| 0).expect("everything acknowledged is there");
}

#[test]
fn a_panic_in_the_middle_of_a_write_fails_only_that_commit() {
    let disk = FaultyDisk::default();
    let mut ledger = Ledger::new(&disk);
    ledger.commit(&[0, 1, 2], 300).expect("a commit");
    disk.state().write_panics = true;
    assert_eq!(answers(ledger.store(), &[(&["a"], true), (&["b"], true)]), [None, None]);
    ledger.store().check().expect("the file is opened again");
    ledger.check().expect("everything acknowledged is there");
    ledger.commit(&[2, 3], 300).expect("a commit");
    ledger.lose_power(|| 0).expect("everything acknowledged is there");
}

#[test]
fn a_commit_whose_file_is_removed_before_it_is_answered_is_not_acknowledged() {
    let disk = FaultyDisk::default();
    let mut ledger = Ledger::new(&disk);
    ledger.commit(&[0], 300).expect("a commit");
    disk.state().vanishes = true;
    assert!(matches!(ledger.commit(&[1], 300), Err(Failure::Unknown(_))));
    let failure = ledger.commit(&[2], 300).expect_err("the file is still missing");
    let Failure::NotApplied(why) = &failure else { panic!("{failure:?}") };
    assert!(why.contains("is not the file that this daemon opened (it was removed)"), "{why}");
    assert!(ledger.store().check().is_err());
    disk.state().vanishes = false;
    disk.state().missing = false;
    ledger.store().check().expect("the file is back");
    ledger.commit(&[1, 2], 300).expect("a commit");
    ledger.check().expect("everything acknowledged is there");
}

#[test]
fn a_disk_that_was_set_back_to_an_earlier_state_is_refused() {
    let disk = FaultyDisk::default();
    let mut ledger = Ledger::new(&disk);
    ledger.commit(&[0], 300).expect("a commit");
    let earlier = disk.state().durable.clone();
    let before = ledger.store().now();
    while ledger.store().now() == before {}
    ledger.commit(&[1], 300).expect("a commit");
    let latest = disk.state().durable.clone();
    disk.state().sync_fails = true;
    ledger.commit(&[2], 300).expect_err("a sync that fails");
    let put = |bytes: &[u8]| {
        let mut state = disk.state();
        state.durable = bytes.to_vec();
        state.visible = bytes.to_vec();
    };
    put(&earlier);
    let why = ledger.store().check().expect_err("another file").into_cause();
    assert!(why.contains("lacks commits that were acknowledged"), "{why}");
    assert!(disk.state().visible == earlier, "the file was written to");
    put(&latest);
    ledger.store().check().expect("the file is back");
    ledger.check().expect("everything acknowledged is there");
}

/// A change to the bytes of a file.
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

/// The bytes of a file, and its records before and after its latest commit.
struct Image {
    bytes: Vec<u8>,
    before: HashMap<Key, Record>,
    after: HashMap<Key, Record>,
}

impl Image {
    /// Returns true if the damaged file is refused and left unchanged, or shows the right records.
    /// Damage to the latest commit looks like a loss of power during that commit, so the records
    /// before it are right too.
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
        let disk = FaultyDisk::default();
        disk.state().durable.clone_from(&bytes);
        disk.state().visible.clone_from(&bytes);
        match disk.open() {
            Ok(_) if bytes.is_empty() => true,
            Ok(store) => [&self.before, &self.after].into_iter().any(|records| shows(&store, records)),
            Err(_) => disk.state().visible == bytes,
        }
    }
}

fn shows(store: &OpenStore, records: &HashMap<Key, Record>) -> bool {
    records.iter().all(|(key, record)| store.read(key).is_ok_and(|found| found.as_ref() == Some(record)))
}

#[test]
fn a_damaged_file_is_refused_at_the_start_and_not_changed() {
    let disk = FaultyDisk::default();
    let mut ledger = Ledger::new(&disk);
    let mut before = HashMap::new();
    for round in 0..10 {
        before = ledger.acknowledged.clone();
        ledger.commit(&(round..round + 15).collect::<Vec<_>>(), 300).expect("a commit");
    }
    let after = &ledger.acknowledged;
    let image =
        || Image { bytes: disk.state().visible.clone(), before: before.clone(), after: after.clone() };
    let crashed = image();
    drop(ledger.store.take());
    let closed = image();
    run(400, &damages(), |(clean, damage)| {
        let image = if clean { &closed } else { &crashed };
        prop_assert!(image.is_noticed_or_harmless(&damage), "clean: {clean}");
        Ok(())
    })
    .expect("damage is noticed");
}

/// Commits batches as one group. Returns the keys of each batch, or `None` if it was not applied.
fn answers(store: &OpenStore, batches: &[(&[&str], bool)]) -> Vec<Option<Vec<Key>>> {
    let (now, mut receivers) = (store.up(), Vec::new());
    let group = batches.iter().map(|(names, in_time)| {
        let edits = names.iter().map(|name| (key(name), ask(asking(LeaseId::random())))).collect();
        let (reply, receiver) = oneshot::channel();
        receivers.push(receiver);
        let until = if *in_time { now + Duration::from_secs(60) } else { Duration::ZERO };
        Commit { batch: Arc::new(edits), until, reply }
    });
    commit_group(store, group.collect());
    let answers = receivers.into_iter().map(|mut receiver| receiver.try_recv().ok()?.ok());
    answers
        .map(|answers| answers?.into_iter().map(|answer| Some(answer.ok()?.record.key)).collect())
        .collect()
}

#[test]
fn batches_of_one_group_share_a_sync_and_get_their_own_answers() {
    let disk = FaultyDisk::default();
    let store = disk.open().expect("a new file");
    let keys = |names: &[&str]| Some(names.iter().map(|name| key(name)).collect::<Vec<_>>());
    let batches: [(&[&str], bool); 3] = [(&["a", "b"], true), (&["late"], false), (&["c"], true)];
    assert_eq!(answers(&store, &batches), [keys(&["a", "b"]), None, keys(&["c"])]);
    assert_eq!(store.read(&key("late")).expect("a read"), None, "it was too late to begin");

    // Only one sync fails. If each batch had its own sync, the second batch would be acknowledged.
    disk.state().sync_fails = true;
    assert_eq!(answers(&store, &[(&["d"], true), (&["e"], true)]), [None, None]);
    assert_eq!(answers(&store, &[(&["d"], true), (&["e"], true)]), [keys(&["d"]), keys(&["e"])]);
}

//! Tests that a record which cannot be read or written affects no other key.

use std::sync::Arc;
use std::time::Duration;

use rstest::rstest;

use super::backends::Damage::{self, BlockIsText, HolderIsText, HoldersAreText, TokenIsText, UnknownReason};
use super::backends::{Backend, TestStore, wait_for};
use super::reading::{NOW, ask, asking, commit, empty, free, key, try_commit};
use crate::lease::{Acquisition, Edit, Key, LeaseId, Timestamp};
use crate::store::{ForKey, ListQuery, Outcome, Store, StoreError};

/// Creates a store with nine keys, held by the leases at the same positions, and damages the record
/// of one key.
fn with_a_damaged_one(backend: Backend, damage: Damage) -> (TestStore, Vec<Key>, Vec<LeaseId>) {
    let store = empty(backend);
    let keys: Vec<Key> = (0..9).map(|number| key(&format!("{number}"))).collect();
    let ids: Vec<LeaseId> = keys.iter().map(|_| LeaseId::random()).collect();
    commit(&store, keys.iter().cloned().zip(ids.iter().map(|id| ask(asking(*id)))).collect());
    store.damage(&keys[DAMAGED], damage);
    (store, keys, ids)
}

const DAMAGED: usize = 4;

/// Checks that the answer for the damaged key is an error, and that every other answer shows its
/// key's lease as holder.
fn assert_apart(answers: &[ForKey], keys: &[Key], ids: &[LeaseId]) {
    assert_eq!(answers.len(), keys.len());
    for ((answer, key), id) in answers.iter().zip(keys).zip(ids) {
        match answer {
            Ok(snapshot) => {
                assert_eq!(snapshot.record.key, *key);
                assert_eq!(snapshot.record.holders[0].id, *id);
            }
            Err(StoreError::Unreadable { key: named, .. }) => assert_eq!((key, named), (&keys[DAMAGED], key)),
            Err(error) => panic!("{key}: {error}"),
        }
    }
    assert!(answers[DAMAGED].is_err());
}

#[rstest]
// The embedded store has one kind of damage.
#[case(Backend::Embedded, HoldersAreText)]
#[case(Backend::MongoDb, HoldersAreText)]
#[case(Backend::MongoDb, TokenIsText)]
#[case(Backend::MongoDb, UnknownReason)]
fn a_batch_is_applied_without_the_edit_of_a_damaged_record(#[case] backend: Backend, #[case] damage: Damage) {
    let (mut store, keys, ids) = with_a_damaged_one(backend, damage);
    let edits = [Edit::touch as fn(Edit, LeaseId) -> Edit, |edit, id| edit.enqueue(Arc::new(asking(id)))];
    for (round, edit) in edits.into_iter().enumerate() {
        store.set_clock(Timestamp(NOW.0 + 10));
        let batch = keys.iter().cloned().zip(ids.iter().map(|id| edit(Edit::default(), *id))).collect();
        let answers = wait_for(try_commit(&store, batch)).expect("answers");
        assert_apart(&answers, &keys, &ids);
        let least = i64::try_from(round).expect("two rounds") + 2;
        assert!(answers.iter().flatten().all(|snapshot| snapshot.record.rev >= least), "each was applied");
    }
    // The edit of the damaged key also fails in a batch of its own.
    let alone = vec![(keys[DAMAGED].clone(), Edit::default().touch(ids[DAMAGED]))];
    let answers = wait_for(try_commit(&store, alone)).expect("an answer");
    assert!(matches!(&answers[..], [Err(StoreError::Unreadable { .. })]), "{answers:?}");
}

#[test]
fn an_edit_that_would_make_a_document_too_large_fails_alone() {
    let store = empty(Backend::MongoDb);
    let TestStore::MongoDb(mongodb) = &store else { panic!("it is MongoDB") };
    let keys: Vec<Key> = (0..9).map(|number| key(&format!("{number}"))).collect();
    let ids: Vec<LeaseId> = keys.iter().map(|_| LeaseId::random()).collect();
    commit(&store, keys.iter().cloned().zip(ids.iter().map(|id| ask(asking(*id)))).collect());
    wait_for(mongodb.fill(&keys[DAMAGED]));
    let enqueue = || ask(Acquisition { wait: true, ..asking(LeaseId::random()) });
    let batch = keys.iter().map(|key| (key.clone(), enqueue())).collect();
    let answers = wait_for(try_commit(&store, batch)).expect("answers");
    assert_apart(&answers, &keys, &ids);
    assert!(answers.iter().flatten().all(|snapshot| snapshot.record.waiters.len() == 1));
    // An edit that does not make the document larger succeeds.
    let touch = |(key, id): (&Key, &LeaseId)| (key.clone(), Edit::default().touch(*id));
    assert_eq!(commit(&store, keys.iter().zip(&ids).map(touch).collect()).len(), keys.len());
}

/// MongoDB does not say which record it could not write, so the store searches for the record. The
/// search must end, because other batches wait for the keys.
#[test]
fn the_search_for_edits_that_cannot_be_applied_ends_at_the_deadline_of_the_batch() {
    let store = empty(Backend::MongoDb);
    let TestStore::MongoDb(mongodb) = &store else { panic!("it is MongoDB") };
    let keys: Vec<Key> = (0..40).map(|number| key(&format!("{number}"))).collect();
    commit(&store, keys.iter().map(|key| (key.clone(), ask(asking(LeaseId::random())))).collect());
    let full = [3, 30];
    for number in full {
        wait_for(mongodb.fill(&keys[number]));
    }
    let enqueue = |key: &Key| (key.clone(), ask(Acquisition { wait: true, ..asking(LeaseId::random()) }));
    let batch: Vec<_> = keys.iter().map(enqueue).collect();
    let error = wait_for(store.commit(Arc::new(batch.clone()), Duration::ZERO)).expect_err("no time");
    assert!(matches!(error, StoreError::Unavailable { outcome: Outcome::Unknown, .. }), "{error}");
    let answers = wait_for(try_commit(&store, batch)).expect("answers");
    for (number, answer) in answers.iter().enumerate() {
        match answer {
            Ok(snapshot) => assert_eq!(snapshot.record.waiters.len(), 1, "{number}"),
            Err(error) => {
                assert!(full.contains(&number), "{number}");
                assert!(matches!(error, StoreError::Unreadable { .. }), "{error}");
            }
        }
    }
    assert_eq!(answers.iter().filter(|answer| answer.is_err()).count(), full.len());
}

#[rstest]
#[case(Backend::Embedded, HoldersAreText)]
#[case(Backend::MongoDb, HoldersAreText)]
#[case(Backend::MongoDb, TokenIsText)]
#[case(Backend::MongoDb, UnknownReason)]
fn a_read_and_a_listing_show_the_other_records(#[case] backend: Backend, #[case] damage: Damage) {
    let (store, keys, ids) = with_a_damaged_one(backend, damage);
    let mut answers = wait_for(store.read(keys.clone())).expect("a read");
    answers.sort_by_key(|answer| match answer {
        Ok(snapshot) => snapshot.record.key.clone(),
        Err(StoreError::Unreadable { key, .. }) => key.clone(),
        Err(error) => panic!("{error}"),
    });
    assert_apart(&answers, &keys, &ids);

    let shown = wait_for(store.inspect(keys[0].clone())).expect("an inspection");
    assert_eq!(shown.map(|snapshot| snapshot.record.holders[0].id), Some(ids[0]));
    let shown = wait_for(store.inspect(keys[DAMAGED].clone()));
    assert!(matches!(shown, Err(StoreError::Unreadable { .. })), "{shown:?}");

    for limit in [1, 3, 100] {
        for include_free in [false, true] {
            let mut query = ListQuery { prefix: String::new(), after: None, limit, include_free };
            let mut listed = Vec::new();
            loop {
                let page = wait_for(store.list(query.clone())).expect("a page");
                query.after = page.snapshots.last().map(|snapshot| snapshot.record.key.clone());
                listed.extend(page.snapshots.into_iter().map(|snapshot| snapshot.record.key));
                if !page.more {
                    break;
                }
                assert!(query.after.is_some(), "a page with others after it has a last key");
            }
            listed.push(keys[DAMAGED].clone());
            listed.sort();
            assert_eq!(listed, keys);
        }
    }
}

#[rstest]
#[case(Backend::Embedded, HoldersAreText)]
#[case(Backend::MongoDb, HoldersAreText)]
#[case(Backend::MongoDb, HolderIsText)]
#[case(Backend::MongoDb, TokenIsText)]
#[case(Backend::MongoDb, BlockIsText)]
fn a_purge_removes_the_other_records(#[case] backend: Backend, #[case] damage: Damage) {
    let mut store = empty(backend);
    for name in ["a", "b", "c"] {
        free(&store, name, asking(LeaseId::random()));
    }
    store.damage(&key("b"), damage);
    store.set_clock(Timestamp(NOW.0 + 61_000));
    let purged = wait_for(store.purge(Duration::from_secs(60))).expect("a purge");
    let left = wait_for(store.read(["a", "b", "c"].map(key).into())).expect("a read");
    assert_eq!(purged, 2);
    assert!(matches!(&left[..], [Err(StoreError::Unreadable { .. })]), "the damaged record stays: {left:?}");
}

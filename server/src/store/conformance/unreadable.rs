//! One record that cannot be read or written, among others: it is the trouble of its own key.

use std::sync::Arc;
use std::time::Duration;

use rstest::rstest;

use super::backends::Damage::{self, BlockIsText, HolderIsText, HoldersAreText, TokenIsText, UnknownReason};
use super::backends::{Home, TestStore, wait_for};
use super::reading::{NOW, ask, asking, commit, empty, free, key};
use crate::lease::{Acquisition, Edit, Key, LeaseId, Timestamp};
use crate::store::{ForKey, ListQuery, Outcome, Store, StoreError};

const PATIENCE: Duration = Duration::from_secs(30);

/// Keys around a damaged one in the order of keys, each held by the lease with the same position.
fn with_a_damaged_one(home: Home, damage: Damage) -> (TestStore, Vec<Key>, Vec<LeaseId>) {
    let store = empty(home);
    let keys: Vec<Key> = (0..9).map(|number| key(&format!("{number}"))).collect();
    let ids: Vec<LeaseId> = keys.iter().map(|_| LeaseId::random()).collect();
    commit(&store, keys.iter().cloned().zip(ids.iter().map(|id| ask(asking(*id)))).collect());
    store.damage(&keys[DAMAGED], damage);
    (store, keys, ids)
}

const DAMAGED: usize = 4;

/// Checks that all answers but that for the damaged key are records which its lease holds.
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
#[case(Home::Embedded, HoldersAreText)]
#[case(Home::MongoDb, HoldersAreText)]
#[case(Home::MongoDb, TokenIsText)]
#[case(Home::MongoDb, UnknownReason)]
fn a_batch_is_applied_without_the_edit_that_cannot_be(#[case] home: Home, #[case] damage: Damage) {
    let (mut store, keys, ids) = with_a_damaged_one(home, damage);
    let edits = [Edit::touch as fn(Edit, LeaseId) -> Edit, |edit, id| edit.enqueue(Arc::new(asking(id)))];
    for (round, edit) in edits.into_iter().enumerate() {
        store.set_clock(Timestamp(NOW.0 + 10));
        let batch = keys.iter().cloned().zip(ids.iter().map(|id| edit(Edit::default(), *id))).collect();
        let answers = wait_for(store.commit(Arc::new(batch), PATIENCE)).expect("answers").records;
        assert_apart(&answers, &keys, &ids);
        let least = i64::try_from(round).expect("two rounds") + 2;
        assert!(answers.iter().flatten().all(|snapshot| snapshot.record.rev >= least), "each was applied");
    }
    // Alone as well.
    let alone = vec![(keys[DAMAGED].clone(), Edit::default().touch(ids[DAMAGED]))];
    let answers = wait_for(store.commit(Arc::new(alone), PATIENCE)).expect("an answer").records;
    assert!(matches!(&answers[..], [Err(StoreError::Unreadable { .. })]), "{answers:?}");
}

#[test]
fn an_edit_for_which_a_document_has_no_room_fails_alone() {
    let store = empty(Home::MongoDb);
    let TestStore::MongoDb(mongodb) = &store else { panic!("it is MongoDB") };
    let keys: Vec<Key> = (0..9).map(|number| key(&format!("{number}"))).collect();
    let ids: Vec<LeaseId> = keys.iter().map(|_| LeaseId::random()).collect();
    commit(&store, keys.iter().cloned().zip(ids.iter().map(|id| ask(asking(*id)))).collect());
    wait_for(mongodb.fill(&keys[DAMAGED]));
    let joins = || ask(Acquisition { wait: true, ..asking(LeaseId::random()) });
    let batch = keys.iter().map(|key| (key.clone(), joins())).collect();
    let answers = wait_for(store.commit(Arc::new(batch), PATIENCE)).expect("answers").records;
    assert_apart(&answers, &keys, &ids);
    assert!(answers.iter().flatten().all(|snapshot| snapshot.record.waiters.len() == 1));
    // What needs no room goes on.
    let touch = |(key, id): (&Key, &LeaseId)| (key.clone(), Edit::default().touch(*id));
    assert_eq!(commit(&store, keys.iter().zip(&ids).map(touch).collect()).len(), keys.len());
}

/// MongoDB does not say which it could not write, so they are searched for; not for ever, since their keys are taken
/// meanwhile.
#[test]
fn the_search_for_edits_that_cannot_be_applied_ends_with_the_time_of_their_batch() {
    let store = empty(Home::MongoDb);
    let TestStore::MongoDb(mongodb) = &store else { panic!("it is MongoDB") };
    let keys: Vec<Key> = (0..40).map(|number| key(&format!("{number}"))).collect();
    commit(&store, keys.iter().map(|key| (key.clone(), ask(asking(LeaseId::random())))).collect());
    let full = [3, 30];
    for number in full {
        wait_for(mongodb.fill(&keys[number]));
    }
    let joins = |key: &Key| (key.clone(), ask(Acquisition { wait: true, ..asking(LeaseId::random()) }));
    let batch: Arc<Vec<_>> = Arc::new(keys.iter().map(joins).collect());
    let told = wait_for(store.commit(Arc::clone(&batch), Duration::ZERO)).expect_err("no time");
    assert!(matches!(told, StoreError::Unavailable { outcome: Outcome::Unknown, .. }), "{told}");
    let answers = wait_for(store.commit(batch, PATIENCE)).expect("answers").records;
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
#[case(Home::Embedded, HoldersAreText)]
#[case(Home::MongoDb, HoldersAreText)]
#[case(Home::MongoDb, TokenIsText)]
#[case(Home::MongoDb, UnknownReason)]
fn a_read_and_a_listing_show_the_others(#[case] home: Home, #[case] damage: Damage) {
    let (store, keys, ids) = with_a_damaged_one(home, damage);
    let mut answers = wait_for(store.read(keys.clone())).expect("a read");
    answers.sort_by_key(|answer| match answer {
        Ok(snapshot) => snapshot.record.key.clone(),
        Err(StoreError::Unreadable { key, .. }) => key.clone(),
        Err(error) => panic!("{error}"),
    });
    assert_apart(&answers, &keys, &ids);

    let shown = wait_for(store.inspect(keys[0].clone())).expect("a look");
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
#[case(Home::Embedded, HoldersAreText)]
#[case(Home::MongoDb, HoldersAreText)]
#[case(Home::MongoDb, HolderIsText)]
#[case(Home::MongoDb, TokenIsText)]
#[case(Home::MongoDb, BlockIsText)]
fn a_purge_forgets_the_others(#[case] home: Home, #[case] damage: Damage) {
    let mut store = empty(home);
    for name in ["a", "b", "c"] {
        free(&store, name, asking(LeaseId::random()));
    }
    store.damage(&key("b"), damage);
    store.set_clock(Timestamp(NOW.0 + 61_000));
    let purged = wait_for(store.purge(Duration::from_secs(60))).expect("a purge");
    let left = wait_for(store.read(["a", "b", "c"].map(key).into())).expect("a read");
    assert_eq!(purged, 2);
    assert!(matches!(&left[..], [Err(StoreError::Unreadable { .. })]), "it stays: {left:?}");
}

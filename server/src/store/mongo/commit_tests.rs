//! Batches beside another daemon's: what one of them cannot know of the records when it writes.

use std::sync::Arc;
use std::time::Duration;

use rstest::rstest;

use super::{Location, MongoStore};
use crate::lease::{Acquisition, Edit, Key, LeaseId, Rules, Snapshot, Timestamp};
use crate::store::Store;
use crate::store::conformance::reading::{all_of, ask, asking, key};

const RULES: Rules = Rules { grace: Duration::from_millis(100), place: Duration::from_secs(15) };
const NOW: Timestamp = Timestamp(1_700_000_000_000);
const PATIENCE: Duration = Duration::from_secs(30);

/// Two daemons' stores on the same records.
async fn two() -> [MongoStore; 2] {
    let uri = throwaway_mongodb::shared().await.expect("a MongoDB for tests").to_owned();
    let location = Location { uri, database: "commit".into(), collection: LeaseId::random().reveal() };
    let mut store = MongoStore::connect(&location, RULES).await.expect("a usable store");
    store.set_clock(NOW);
    let other = MongoStore { lines: Arc::default(), ..store.clone() };
    [store, other]
}

async fn commit(store: &MongoStore, batch: Vec<(Key, Edit)>) -> Vec<Snapshot> {
    all_of(store.commit(Arc::new(batch), PATIENCE).await)
}

#[rstest]
#[tokio::test]
async fn an_edit_admits_whom_another_daemon_put_into_the_line(
    #[values(false, true)] releases: bool,
    #[values(false, true)] beside_others: bool,
) {
    let [mut ours, theirs] = two().await;
    let (contested, quiet) = (key("contested"), key("quiet"));
    let [first, holder, waiter] = [(); 3].map(|()| LeaseId::random());
    let held = vec![(contested.clone(), ask(asking(first))), (quiet.clone(), ask(asking(holder)))];
    commit(&ours, held).await;
    let waits = Acquisition { wait: true, ..asking(waiter) };
    commit(&theirs, vec![(contested.clone(), ask(waits))]).await;

    let edit = if releases {
        Edit::default().release(first)
    } else {
        // The lease and its grace are over, so any edit admits the next in line, and be it a touch of nothing.
        ours.set_clock(NOW + Duration::from_secs(2));
        Edit::default().touch(LeaseId::random())
    };
    let mut batch = vec![(contested, edit)];
    if beside_others {
        batch.push((quiet, Edit::default().touch(holder)));
        batch.push((key("unknown"), Edit::default().touch(holder)));
    }
    let after = commit(&ours, batch).await;
    let ids =
        |snapshot: &Snapshot| snapshot.record.holders.iter().map(|holder| holder.id).collect::<Vec<_>>();
    assert_eq!((ids(&after[0]), after[0].record.rev), (vec![waiter], 3));
    assert_eq!(after[0].record.waiters, []);
    if beside_others {
        assert_eq!((ids(&after[1]), after[1].record.rev), (vec![holder], 2), "applied once");
        assert_eq!((ids(&after[2]), after[2].record.rev), (vec![], 0), "no record comes of a touch");
    }
}

#[tokio::test]
async fn where_someone_was_seen_to_wait_a_touch_goes_the_long_way_until_nobody_is() {
    let [ours, theirs] = two().await;
    let contested = key("contested");
    let [holder, waiter] = [(); 2].map(|()| LeaseId::random());
    commit(&ours, vec![(contested.clone(), ask(asking(holder)))]).await;
    let touch = || vec![(contested.clone(), Edit::default().touch(holder))];
    let goes_the_long_way = || !ours.lines.has_none_at(&contested);
    assert!(!goes_the_long_way());
    commit(&theirs, vec![(contested.clone(), ask(Acquisition { wait: true, ..asking(waiter) }))]).await;
    commit(&ours, touch()).await;
    assert!(goes_the_long_way());
    commit(&theirs, vec![(contested.clone(), Edit::default().cancel(waiter))]).await;
    commit(&ours, touch()).await;
    assert!(!goes_the_long_way());
}

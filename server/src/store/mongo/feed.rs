//! The change feed: reports which records other daemons changed, from a MongoDB change stream. It
//! is open only while there are other daemons.
//!
//! The feed is a hint, and correctness does not rely on it. Each batch is fetched by a command in a
//! separate task, so a listener that stops waiting interrupts no command. After any failure the
//! stream is opened again and a gap is reported.
//!
//! The driver's own change streams are not used. They resume inside a future that must not be
//! dropped, without a pause and without a limit. They also hide the end of a batch, which this
//! module needs to measure its lag.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use mongodb::bson::raw::RawDocument;
use mongodb::bson::{Document, doc};
use mongodb::options::{ReadConcern, ReadPreference, SelectionCriteria};
use mongodb::raw_batch_cursor::{RawBatch, RawBatchCursor};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep};

use super::MongoStore;
use super::command::{ATTEMPT, Runner};
use super::daemons::{Daemons, HeartbeatConfig, Member};
use crate::lease::Key;
use crate::store::failure::Failure;
use crate::store::{FeedEvent, FeedState};

/// How long the server waits for changes before it returns an empty batch.
const AWAIT: Duration = Duration::from_millis(500);
/// The largest number of changes in a batch.
const BATCH: u32 = 1000;
/// The first pause before a broken stream is opened again. It doubles up to [`LONGEST_PAUSE`].
const PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The feed's part of a store.
#[derive(Debug)]
pub(super) struct Feed {
    /// Runs the commands of the feed and of the list of daemons.
    pub(super) background: Runner,
    pub(super) progress: Progress,
    pub(super) heartbeat: HeartbeatConfig,
    pub(super) member: Member,
}

impl Feed {
    pub(super) fn new(heartbeat: HeartbeatConfig) -> Self {
        Self {
            background: Runner::in_background(),
            progress: Progress::default(),
            heartbeat,
            member: Member::default(),
        }
    }
}

/// The state of the feed, shared with callers of [`Progress::state`].
#[derive(Debug, Default)]
pub(super) struct Progress(Mutex<FeedPhase>);

#[derive(Debug, Default, Clone, Copy)]
enum FeedPhase {
    /// There are no other daemons.
    #[default]
    Off,
    /// There are other daemons, and the stream is not open.
    Broken,
    /// All changes up to this instant have been reported.
    CaughtUpAt(Instant),
}

impl Progress {
    pub(super) fn state(&self) -> FeedState {
        match *self.phase() {
            FeedPhase::Off => FeedState::Off,
            FeedPhase::Broken => FeedState::Broken,
            FeedPhase::CaughtUpAt(then) => FeedState::Behind(then.elapsed()),
        }
    }

    pub(super) fn set_off(&self) {
        *self.phase() = FeedPhase::Off;
    }

    /// Returns whether the feed was not broken before.
    fn set_broken(&self) -> bool {
        !matches!(std::mem::replace(&mut *self.phase(), FeedPhase::Broken), FeedPhase::Broken)
    }

    fn set_caught_up(&self, then: Instant) {
        *self.phase() = FeedPhase::CaughtUpAt(then);
    }

    fn phase(&self) -> MutexGuard<'_, FeedPhase> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a stream ended while there are other daemons.
enum End {
    /// The receiver of the events was dropped.
    NoReceiver,
    /// The stream broke or could not be opened.
    Broken(String),
}

impl From<Failure> for End {
    fn from(failure: Failure) -> Self {
        Self::Broken(failure.into_cause())
    }
}

/// Reports changes while there are other daemons, until the receiver is dropped.
///
/// Cancel safe.
pub(super) async fn follow(
    store: &MongoStore,
    daemons: &Daemons,
    mut peers_present: watch::Receiver<bool>,
    events: &mpsc::Sender<FeedEvent>,
) {
    let mut pause = PAUSE;
    while peers_present.wait_for(|&others| others).await.is_ok() {
        let (opened, end) = match open_with_majority(store, daemons).await {
            Ok(cursor) => {
                (Some(Instant::now()), report(store, daemons, cursor, &peers_present, events).await)
            }
            Err(failure) => (None, Err(failure.into())),
        };
        match end {
            Ok(()) => tracing::info!("no other daemon is there; the change feed is closed"),
            Err(End::NoReceiver) => return,
            Err(End::Broken(cause)) => {
                if store.feed.progress.set_broken() {
                    tracing::warn!(cause, "the change feed broke");
                }
                // If the stream was open, the gap is reported once a stream is open again.
                if opened.is_none() && events.send(FeedEvent::Gap).await.is_err() {
                    return;
                }
                if opened.is_some_and(|opened| opened.elapsed() > LONGEST_PAUSE) {
                    pause = PAUSE;
                }
                // Jitter, so that daemons whose streams broke together do not stay in step.
                sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
        if !*peers_present.borrow() {
            store.feed.progress.set_off();
        }
    }
}

/// Opens a stream and waits until a majority has every write that precedes it. Then a read after
/// the gap sees all changes that the stream does not report.
async fn open_with_majority(store: &MongoStore, daemons: &Daemons) -> Result<RawBatchCursor, Failure> {
    let cursor = open(store).await?;
    // A heartbeat is a write that a majority acknowledges, so the majority has all earlier writes.
    daemons.send_heartbeat().await?;
    Ok(cursor)
}

/// Reports the changes of a stream until there are no other daemons.
async fn report(
    store: &MongoStore,
    daemons: &Daemons,
    mut cursor: RawBatchCursor,
    peers_present: &watch::Receiver<bool>,
    events: &mpsc::Sender<FeedEvent>,
) -> Result<(), End> {
    tracing::info!("the change feed is open");
    send(events, FeedEvent::Gap).await?;
    store.feed.progress.set_caught_up(Instant::now());
    while *peers_present.borrow() {
        // A node that is cut off, such as an old primary, keeps answering that there are no
        // changes. It has caught up only if its time is past the latest heartbeat that a majority
        // has.
        let majority = daemons.latest_heartbeat();
        let batch;
        (cursor, batch) = fetch(store, cursor).await?;
        let fetched = Instant::now();
        let mut count = 0;
        for change in read_batch(&batch)? {
            count += 1;
            if let Some(event) = change? {
                send(events, event).await?;
            }
        }
        let node = batch.as_raw_document().get_timestamp("operationTime").ok();
        // After a full batch there may be more changes.
        if majority.is_some() && majority <= node && count < BATCH {
            store.feed.progress.set_caught_up(fetched);
        } else if majority.is_some()
            && matches!(store.feed.progress.state(), FeedState::Behind(lag) if lag > store.feed.heartbeat.max_lag)
        {
            return Err(End::Broken("the feed fell too far behind".to_owned()));
        }
    }
    Ok(())
}

async fn send(events: &mpsc::Sender<FeedEvent>, event: FeedEvent) -> Result<(), End> {
    events.send(event).await.map_err(|_| End::NoReceiver)
}

/// Opens a stream of the changes from now on, without touches.
pub(super) async fn open(store: &MongoStore) -> Result<RawBatchCursor, Failure> {
    let collection = store.collection.clone();
    let open = async move {
        collection
            .aggregate(stages())
            .batch_size(BATCH)
            .max_time(ATTEMPT)
            .max_await_time(AWAIT)
            .read_concern(ReadConcern::majority())
            .selection_criteria(SelectionCriteria::ReadPreference(ReadPreference::Primary))
            .batch()
            .await
    };
    store.feed.background.run(open).await
}

/// Fetches the next batch, which may be empty.
async fn fetch(store: &MongoStore, mut cursor: RawBatchCursor) -> Result<(RawBatchCursor, RawBatch), End> {
    let fetch = async move { Ok((cursor.next().await.transpose()?, cursor)) };
    match store.feed.background.run(fetch).await? {
        (Some(batch), cursor) => Ok((cursor, batch)),
        (None, _) => Err(End::Broken("the change stream ended".to_owned())),
    }
}

/// The pipeline of the stream. It drops touches on the server: they leave `notify_rev` unchanged.
/// MongoDB may report the update of a small record as a replacement, in which a touch shows as a
/// `notify_rev` behind `rev`. An empty document, inserted before its first edit, has no `rev` and
/// is dropped too.
fn stages() -> [Document; 3] {
    let latest = doc! { "$eq": ["$fullDocument.notify_rev", "$fullDocument.rev"] };
    let which = doc! { "$or": [
        { "operationType": "update", "updateDescription.updatedFields.notify_rev": { "$exists": true } },
        { "operationType": "replace", "$expr": latest },
        { "operationType": "insert", "fullDocument.rev": { "$exists": true } },
        { "operationType": { "$in": ["delete", "drop", "rename", "dropDatabase", "invalidate"] } },
    ] };
    let rev = doc! { "$ifNull": ["$updateDescription.updatedFields.notify_rev", "$fullDocument.rev"] };
    [
        doc! { "$changeStream": {} },
        doc! { "$match": which },
        // A projection keeps `_id`, the resume token, without which the server fails the stream.
        doc! { "$project": { "operationType": 1, "documentKey": 1, "rev": rev } },
    ]
}

fn read_batch(batch: &RawBatch) -> Result<impl Iterator<Item = Result<Option<FeedEvent>, End>>, End> {
    let unreadable = |error: &dyn std::fmt::Display| End::Broken(format!("a change cannot be read: {error}"));
    let documents = batch.doc_slices().map_err(|error| unreadable(&error))?;
    Ok(documents.into_iter().map(move |document| {
        let document = document.map_err(|error| unreadable(&error))?;
        let document = document.as_document().ok_or_else(|| unreadable(&"it is no document"))?;
        read_change(document)
    }))
}

/// Reads a change. Returns `None` if it is not about a record.
fn read_change(document: &RawDocument) -> Result<Option<FeedEvent>, End> {
    let operation = document.get_str("operationType").unwrap_or("?");
    if !matches!(operation, "insert" | "update" | "replace" | "delete") {
        return Err(End::Broken(format!("an operation on the whole collection: {operation}")));
    }
    let name = document.get_document("documentKey").ok().and_then(|key| key.get_str("_id").ok());
    let key = name.and_then(|name| Key::try_from(name).ok());
    let rev = document.get_i64("rev").ok();
    Ok(key.map(|key| FeedEvent::Changed { key, rev }))
}

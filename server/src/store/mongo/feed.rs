//! The change feed: what others did to records, as a change stream tells it, while others are there.
//!
//! A hint and never the truth. One batch of the stream is one command in a task of its own, as all commands are, so
//! that whoever stops listening interrupts nothing. The driver's own change streams are not used: they resume by
//! themselves, without a pause and without an end, and do not show where a batch ends, which is what tells how far
//! behind one may be. Here whatever goes wrong has one consequence: the stream is opened anew, and a gap is told.

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
use super::daemons::{Daemons, Member, Pace};
use crate::lease::Key;
use crate::store::failure::Failure;
use crate::store::{FeedEvent, FeedState};

/// How long the server waits for changes before it says that there are none.
const AWAIT: Duration = Duration::from_millis(500);
/// Changes told with one command at most.
const BATCH: u32 = 1000;
/// The pause before a broken stream is opened anew; it doubles up to the second.
const PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// What a store has for its feed.
#[derive(Debug)]
pub(super) struct Feed {
    /// Runs the commands of the feed and of the register of daemons.
    pub(super) errands: Runner,
    pub(super) progress: Progress,
    pub(super) pace: Pace,
    pub(super) member: Member,
}

impl Feed {
    pub(super) fn new(pace: Pace) -> Self {
        Self {
            errands: Runner::for_errands(),
            progress: Progress::default(),
            pace,
            member: Member::default(),
        }
    }
}

/// How the feed stands, for those who ask.
#[derive(Debug, Default)]
pub(super) struct Progress(Mutex<Standing>);

#[derive(Debug, Default, Clone, Copy)]
enum Standing {
    /// Nobody else is there.
    #[default]
    Off,
    /// Others are there, and what they do cannot be followed.
    Broken,
    /// All that had happened at this instant has been told.
    ToldUntil(Instant),
}

impl Progress {
    pub(super) fn state(&self) -> FeedState {
        match *self.standing() {
            Standing::Off => FeedState::Off,
            Standing::Broken => FeedState::Broken,
            Standing::ToldUntil(then) => FeedState::Behind(then.elapsed()),
        }
    }

    pub(super) fn set_off(&self) {
        *self.standing() = Standing::Off;
    }

    /// Returns whether that is news.
    fn set_broken(&self) -> bool {
        !matches!(std::mem::replace(&mut *self.standing(), Standing::Broken), Standing::Broken)
    }

    fn told_until(&self, then: Instant) {
        *self.standing() = Standing::ToldUntil(then);
    }

    fn standing(&self) -> MutexGuard<'_, Standing> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a stream ended although others are there.
enum End {
    /// Nobody listens any more.
    Unheard,
    /// It broke, or could not be opened.
    Broken(String),
}

impl From<Failure> for End {
    fn from(failure: Failure) -> Self {
        Self::Broken(failure.into_cause())
    }
}

/// Tells what others do for as long as there are others, until nobody listens. May be dropped at any time.
pub(super) async fn follow(
    store: &MongoStore,
    daemons: &Daemons,
    mut company: watch::Receiver<bool>,
    events: &mpsc::Sender<FeedEvent>,
) {
    let mut pause = PAUSE;
    while company.wait_for(|&others| others).await.is_ok() {
        let (opened, end) = match begin(store, daemons).await {
            Ok(cursor) => (Some(Instant::now()), tell(store, daemons, cursor, &company, events).await),
            Err(failure) => (None, Err(failure.into())),
        };
        match end {
            Ok(()) => tracing::info!("no other daemon is there; the change feed is closed"),
            Err(End::Unheard) => return,
            Err(End::Broken(cause)) => {
                if store.feed.progress.set_broken() {
                    tracing::warn!(cause, "the change feed broke");
                }
                // One that was open tells of it when it is open again.
                if opened.is_none() && events.send(FeedEvent::Gap).await.is_err() {
                    return;
                }
                if opened.is_some_and(|opened| opened.elapsed() > LONGEST_PAUSE) {
                    pause = PAUSE;
                }
                sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
        if !*company.borrow() {
            store.feed.progress.set_off();
        }
    }
}

/// Opens a stream, and sees to it that a majority has what was written before it began: whoever reads on account of
/// the gap then sees all that the stream does not tell.
async fn begin(store: &MongoStore, daemons: &Daemons) -> Result<RawBatchCursor, Failure> {
    let cursor = open(store).await?;
    daemons.beat().await?;
    Ok(cursor)
}

/// Tells what a stream brings until nobody else is there.
async fn tell(
    store: &MongoStore,
    daemons: &Daemons,
    mut cursor: RawBatchCursor,
    company: &watch::Receiver<bool>,
    events: &mpsc::Sender<FeedEvent>,
) -> Result<(), End> {
    tracing::info!("the change feed is open");
    tell_one(events, FeedEvent::Gap).await?;
    store.feed.progress.told_until(Instant::now());
    while *company.borrow() {
        // A node that others have left behind, as an old primary may be, goes on saying that nothing happens.
        let majority = daemons.latest();
        let batch;
        (cursor, batch) = fetch(store, cursor).await?;
        let fetched = Instant::now();
        let mut count = 0;
        for change in changes(&batch)? {
            count += 1;
            if let Some(event) = change? {
                tell_one(events, event).await?;
            }
        }
        let node = batch.as_raw_document().get_timestamp("operationTime").ok();
        // After a full batch there may be more.
        if majority.is_some() && majority <= node && count < BATCH {
            store.feed.progress.told_until(fetched);
        } else if majority.is_some()
            && matches!(store.feed.progress.state(), FeedState::Behind(lag) if lag > store.feed.pace.stale)
        {
            return Err(End::Broken("it fell too far behind".to_owned()));
        }
    }
    Ok(())
}

async fn tell_one(events: &mpsc::Sender<FeedEvent>, event: FeedEvent) -> Result<(), End> {
    events.send(event).await.map_err(|_| End::Unheard)
}

/// A stream of all changes to line-ups from now on.
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
    store.feed.errands.run(open).await
}

/// The next batch, which may be empty.
async fn fetch(store: &MongoStore, mut cursor: RawBatchCursor) -> Result<(RawBatchCursor, RawBatch), End> {
    let fetch = async move { Ok((cursor.next().await.transpose()?, cursor)) };
    match store.feed.errands.run(fetch).await? {
        (Some(batch), cursor) => Ok((cursor, batch)),
        (None, _) => Err(End::Broken("the change stream ended".to_owned())),
    }
}

/// Touches stay on the server: they leave `epoch` as it is. In small records they come as a replacement, in which
/// `epoch` then lags `rev`. A blank, which has no `rev` yet, is of no interest.
fn stages() -> [Document; 3] {
    let latest = doc! { "$eq": ["$fullDocument.epoch", "$fullDocument.rev"] };
    let which = doc! { "$or": [
        { "operationType": "update", "updateDescription.updatedFields.epoch": { "$exists": true } },
        { "operationType": "replace", "$expr": latest },
        { "operationType": "insert", "fullDocument.rev": { "$exists": true } },
        { "operationType": { "$in": ["delete", "drop", "rename", "dropDatabase", "invalidate"] } },
    ] };
    let rev = doc! { "$ifNull": ["$updateDescription.updatedFields.epoch", "$fullDocument.rev"] };
    [
        doc! { "$changeStream": {} },
        doc! { "$match": which },
        // The server insists on the token, `_id`, which a projection keeps.
        doc! { "$project": { "operationType": 1, "documentKey": 1, "rev": rev } },
    ]
}

fn changes(batch: &RawBatch) -> Result<impl Iterator<Item = Result<Option<FeedEvent>, End>>, End> {
    let illegible = |error: &dyn std::fmt::Display| End::Broken(format!("a change cannot be read: {error}"));
    let documents = batch.doc_slices().map_err(|error| illegible(&error))?;
    Ok(documents.into_iter().map(move |document| {
        let document = document.map_err(|error| illegible(&error))?;
        let document = document.as_document().ok_or_else(|| illegible(&"it is no document"))?;
        change(document)
    }))
}

/// What happened, if it is about a record.
fn change(document: &RawDocument) -> Result<Option<FeedEvent>, End> {
    let operation = document.get_str("operationType").unwrap_or("?");
    if !matches!(operation, "insert" | "update" | "replace" | "delete") {
        return Err(End::Broken(format!("the collection met with this: {operation}")));
    }
    let name = document.get_document("documentKey").ok().and_then(|key| key.get_str("_id").ok());
    let key = name.and_then(|name| Key::try_from(name).ok());
    let rev = document.get_i64("rev").ok();
    Ok(key.map(|key| FeedEvent::Changed { key, rev }))
}

//! Looking after the line: nudges, checks and refreshes, when they are due. Remembers nothing.

use std::sync::Arc;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::audience::{self, Audience};
use super::committer::Committer;
use super::line::Line;
use super::part::Part;
use crate::lease::{Key, LeaseId, Standing};
use crate::store::Store;

/// Looks after the line until the daemon drains. Places last on for a while, so that their callers can go on
/// elsewhere.
pub(super) async fn keep<S: Store>(
    audience: Arc<Audience>,
    committer: Arc<Committer<S>>,
    draining: CancellationToken,
) {
    let line = &audience.line;
    loop {
        tokio::select! {
            () = draining.cancelled() => return,
            () = line.due() => {}
        }
        let chores = line.take_due(Instant::now());
        committer.submit_unanswered(chores.nudges.into_iter().map(|key| (key, Part::Nudge)));
        if !chores.refreshed.is_empty() {
            tokio::spawn(refresh(
                Arc::clone(line),
                Arc::clone(&committer),
                chores.refreshes,
                chores.refreshed,
            ));
        }
        if !chores.checks.is_empty() {
            tokio::spawn(check(Arc::clone(&audience), Arc::clone(&committer), chores.checks));
        }
    }
}

/// Prolongs places. A call whose place is gone and finds no room for another is told.
async fn refresh<S: Store>(
    line: Arc<Line>,
    committer: Arc<Committer<S>>,
    places: Vec<(LeaseId, (Key, Part))>,
    keys: Vec<Key>,
) {
    let (ids, parts): (Vec<LeaseId>, Vec<(Key, Part)>) = places.into_iter().unzip();
    // A failure is tried again at the next turn; a place outlasts several.
    if let Ok(snapshots) = committer.submit_each(parts).await {
        for (id, snapshot) in ids.into_iter().zip(&snapshots) {
            if let Some(snapshot) = snapshot.as_ref().filter(|one| one.standing(id) == Standing::Unknown) {
                line.give_up(id, snapshot);
            }
        }
    }
    line.rest(&keys);
}

/// Looks at records that other daemons may have changed.
async fn check<S: Store>(audience: Arc<Audience>, committer: Arc<Committer<S>>, keys: Vec<Key>) {
    // A failure is made good by the next check.
    drop(audience::read(&audience, &committer, &keys).await);
    audience.line.rest(&keys);
}

//! Looking after the line: nudges, checks and refreshes, when they are due. Remembers nothing.
//!
//! Looks go in lots, one after the other, so that those of a crowd never stand between the store and a call for longer
//! than one lot takes. Nudges wait for nothing, and take turns with calls.

use std::sync::Arc;

use tokio::task::yield_now;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::engine::committer::Committer;
use crate::engine::notify::{self, Audience};
use crate::engine::op::Part;
use crate::engine::queue::{Line, Looks};
use crate::lease::{Key, LeaseId, Snapshot, Standing};
use crate::store::Store;

/// Looks after the line until the daemon drains. Places last on for a while, so that their callers can go on
/// elsewhere.
pub(crate) async fn keep<S: Store>(
    audience: Arc<Audience>,
    committer: Arc<Committer<S>>,
    draining: CancellationToken,
) {
    tokio::select! {
        () = draining.cancelled() => {}
        () = nudge(&audience.line, &committer) => {}
        () = look(&audience, &committer) => {}
    }
}

async fn nudge<S: Store>(line: &Line, committer: &Arc<Committer<S>>) {
    loop {
        line.nudge_due().await;
        committer.submit_nudges(line.take_nudges(Instant::now()));
        // There may be many more, and the first can be committed meanwhile.
        yield_now().await;
    }
}

async fn look<S: Store>(audience: &Audience, committer: &Arc<Committer<S>>) {
    loop {
        audience.line.look_due().await;
        let Looks { checks, refreshes } = audience.line.take_looks(Instant::now());
        // A failure of either is made good by the next look; a place outlasts several.
        let check = async { drop(notify::read(audience, committer, &checks).await) };
        tokio::join!(check, refresh(&audience.line, committer, refreshes));
    }
}

/// Prolongs places, and takes new ones for calls whose places are gone. A call that finds no room for another is told.
async fn refresh<S: Store>(line: &Line, committer: &Arc<Committer<S>>, places: Vec<(LeaseId, (Key, Part))>) {
    let gone = placeless(committer, places).await;
    let rejoin = |(id, snapshot): (LeaseId, Arc<Snapshot>)| {
        let key = snapshot.record.key.clone();
        line.rejoin(&key, id).map(|part| (id, (key, part)))
    };
    for (id, snapshot) in placeless(committer, gone.into_iter().filter_map(rejoin).collect()).await {
        line.give_up(id, &snapshot);
    }
}

/// Commits what is to keep these places, and returns those that are gone after it, with the records that say so.
async fn placeless<S: Store>(
    committer: &Arc<Committer<S>>,
    places: Vec<(LeaseId, (Key, Part))>,
) -> Vec<(LeaseId, Arc<Snapshot>)> {
    let (ids, parts): (Vec<LeaseId>, Vec<(Key, Part)>) = places.into_iter().unzip();
    let answers = committer.submit_own(parts).await;
    let records = ids.into_iter().zip(answers).filter_map(|(id, answer)| Some((id, answer?.ok()?.snapshot)));
    records.filter(|(id, snapshot)| snapshot.standing(*id) == Standing::Unknown).collect()
}

//! `watch`: prints a line for each change.

use std::time::SystemTime;

use leased_client::{Client, KeyInfo, WatchEvent};
use tokio_stream::StreamExt;

use crate::failure::Failure;
use crate::json::{Event, change, state, time};
use crate::output::{Output, complain, json};
use crate::table;

/// Prints keys and changes, until a signal ends the process or nobody reads its output.
pub(crate) async fn watch(client: &Client, prefix: String, output: &mut Output) -> Result<u8, Failure> {
    // Reports an outage at the start. The watch itself goes on through outages, and never reports
    // one as a failure.
    let mut first = client.list(prefix.clone()).page_size(1).stream();
    first.try_next().await?;
    let mut events = client.watch(prefix).stream();
    loop {
        let event = tokio::select! {
            biased;
            event = events.try_next() => event?,
            // Also notices a closed output while there is nothing to print.
            () = output.unread() => return Err(Failure::NobodyReads),
        };
        let Some(event) = event else { return Ok(0) };
        let line = match output.is_json() {
            true => Event::of(&event).map(|event| json(&event)).transpose()?,
            false => text(&event),
        };
        if let Some(line) = line {
            output.line(&line)?;
        }
    }
}

/// Formats the line for people. `None` if the event has no line.
fn text(event: &WatchEvent) -> Option<String> {
    match event {
        WatchEvent::Snapshot(key) => Some(line(state(key.state), key)),
        WatchEvent::Change { kind, key } => Some(line(change(*kind), key)),
        WatchEvent::Interrupted { cause } => {
            complain(&format!(
                "the watch was interrupted ({cause}); it starts over as soon as a daemon answers"
            ));
            None
        }
        // The end of a snapshot, or an event of a later version.
        _ => None,
    }
}

fn line(word: &str, key: &KeyInfo) -> String {
    #[expect(
        clippy::disallowed_methods,
        reason = "for people: when this line was printed; it decides nothing"
    )]
    let now = time(SystemTime::now());
    let holders = table::holders(&key.holders);
    format!(
        "{now}  {word:<10}  {}  token {}  holder {holders}  waiting {}",
        table::plain(&key.key),
        key.token,
        key.waiters.len()
    )
}
